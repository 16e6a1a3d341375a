"""H.264 in fields, each a packet of its own, as cameras record it and PyAV's encoders don't: raw samples throughout."""

import io
from fractions import Fraction

import av

from tests.server.reader.recordings import numbered

CLOCK = Fraction(1, 90_000)
FRAME_NUM_BITS = 4
_MACROBLOCK = 16
_PCM = 25  # a macroblock's type


class _Bits:
    def __init__(self):
        self.text = ""

    def put(self, value, bits):
        self.text += f"{value:0{bits}b}" if bits else ""
        return self

    def counted(self, *values):
        for value in values:
            bits = (value + 1).bit_length()
            self.put(0, bits - 1).put(value + 1, bits)
        return self

    def aligned(self):
        self.text += "0" * (-len(self.text) % 8)
        return self

    def raw(self, data):
        self.text += "".join(f"{byte:08b}" for byte in data)
        return self

    def unit(self, header):
        """The unit, with its start code and its end; no sample here is so small that it needs to be escaped."""
        self.text += "1"
        self.aligned()
        body = bytes(int(self.text[at : at + 8], 2) for at in range(0, len(self.text), 8))
        return b"\0\0\0\1" + bytes([header]) + body


def parameter_sets(width, height):
    sequence = _Bits().put(77, 8).put(0, 8).put(30, 8).counted(0, FRAME_NUM_BITS - 4, 2, 1).put(0, 1)
    sequence.counted(width // 16 - 1, height // 32 - 1).put(0, 1).put(0, 1).put(1, 1).put(0, 1).put(0, 1)
    picture = _Bits().counted(0, 0).put(0, 2).counted(0, 0, 0).put(0, 3).counted(0, 0, 0).put(0, 3)
    return sequence.unit(0x67) + picture.unit(0x68)


def _slice(picture, *, number, is_bottom):
    luma = picture[int(is_bottom) :: 2, :, 0]
    bits = _Bits().counted(0, 7, 0).put(0, FRAME_NUM_BITS).put(1, 1).put(int(is_bottom), 1)
    if is_bottom:
        bits.put(0, 1)  # no marking of references
    else:
        bits.counted(number % 2).put(0, 2)
    bits.counted(0)
    for top in range(0, luma.shape[0], _MACROBLOCK):
        for left in range(0, luma.shape[1], _MACROBLOCK):
            block = luma[top : top + _MACROBLOCK, left : left + _MACROBLOCK]
            bits.counted(_PCM).aligned().raw(block.tobytes()).raw(bytes([128]) * 128)
    return bits.unit(0x41 if is_bottom else 0x65)


def in_fields(frames=12, *, size=(128, 64)):
    """The packets of numbered frames, two a frame."""
    width, height = size
    packets = []
    for number in range(frames):
        picture = numbered(number, width, height)
        first = _slice(picture, number=number, is_bottom=False)
        packets += [parameter_sets(width, height) + first, _slice(picture, number=number, is_bottom=True)]
    return packets


def transport_stream(frames=12, rate=25):
    """The same as a transport stream."""
    buffer, ticks = io.BytesIO(), 90_000 // rate
    sets = parameter_sets(128, 64)
    with av.open(buffer, "w", format="mpegts") as output:
        stream = output.add_stream("h264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        stream.codec_context.extradata = sets
        for number, data in enumerate(in_fields(frames)):
            packet = av.Packet(data)
            packet.pts = packet.dts = number * ticks // 2
            packet.time_base, packet.stream, packet.is_keyframe = CLOCK, stream, number % 2 == 0
            output.mux(packet)
    return buffer.getvalue()
