"""What the headers of encoded frames say: how large the frames are, whether they are shown, and referred to."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from av import VideoStream

    from server.reader.opening import VideoPacket

    SizeReader = Callable[[VideoPacket | None], tuple[int, int]]  # of a packet, or the end; (0, 0) if it tells none

# Decoders of these don't read the headers of frames that they skip, or skip none; but there are parsers that do.
PARSED_CODECS = ("h264", "hevc", "av1")
_VP9_HEADER_BYTES = 16
_GIF_HEADER_BYTES = 13
_GIF_EXTENSION, _GIF_END = 0x21, 0x3B
_HEVC_SLICES = 32  # types of NAL units: what is below holds a part of a frame (ITU-T H.265, table 7-1)
_HEVC_UNREFERRED = range(0, 16, 2)
_START_CODE = b"\0\0\1"


def parser(stream: "VideoStream") -> "SizeReader":
    """Return what reads sizes with the codec's parser, some of them one packet later."""
    from av import CodecContext, Packet
    from av.bitstream import BitStreamFilterContext

    codec = stream.codec_context.codec.canonical_name
    parser: Any = CodecContext.create(codec, "r")
    as_stream: Any = None
    if codec == "hevc":  # in files its frames have no start codes, without which its parser finds none
        as_stream = BitStreamFilterContext("hevc_mp4toannexb", stream)
    else:
        parser.extradata = stream.codec_context.extradata

    def size_in(packet: "VideoPacket | None") -> tuple[int, int]:
        parser.width = parser.height = 0  # what is set already, parsers don't tell
        if as_stream is None or packet is None:
            parser.parse(packet)
        else:
            for piece in as_stream.filter(Packet(bytes(packet))):
                parser.parse(piece)
        return parser.width, parser.height

    return size_in


def hevc_layers(stream: "VideoStream") -> Callable[["VideoPacket"], tuple[int, bool]]:
    """Return what reads the temporal layer of a packet's frame, and whether frames of that layer may refer to it."""
    extradata = stream.codec_context.extradata or b""
    # ISO/IEC 14496-15, 8.3.3: in files each NAL unit is behind its length, of so many bytes
    length_bytes = (extradata[21] & 3) + 1 if extradata[:1] == b"\1" and len(extradata) > 21 else 0

    def layer_in(packet: "VideoPacket") -> tuple[int, bool]:
        layer, is_referred = 0, False
        for at, data in _nal_units(bytes(packet), length_bytes):
            unit_type = data[at] >> 1 & 63
            if unit_type < _HEVC_SLICES:
                layer = max(layer, (data[at + 1] & 7) - 1)
                is_referred |= unit_type not in _HEVC_UNREFERRED
        return layer, is_referred

    return layer_in


def _nal_units(data: bytes, length_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Give where each NAL unit begins that has a header, of two bytes."""
    at = 0
    while True:
        if length_bytes:
            begin = at + length_bytes
            at = begin + int.from_bytes(data[at:begin], "big")
        else:
            at = begin = data.find(_START_CODE, at) + len(_START_CODE)
            if begin < len(_START_CODE):
                return
        if begin + 2 > len(data):
            return
        yield begin, data


def vp9_size(packet: "VideoPacket | None") -> tuple[int, int]:
    """Return what the header of a VP9 key frame says; others take the size of an earlier one (VP9 bitstream, 6.2)."""
    bits = _vp9_bits(b"" if packet is None else bytes(packet))
    profile = int(bits[2]) + 2 * int(bits[3])
    at = 4 + (profile == 3)
    if bits[:2] != "10" or bits[at : at + 2] != "00":  # shows an earlier frame, or is not a key frame
        return 0, 0
    at += 4 + 24 + (profile >= 2)  # the flags, the sync code, the bit depth
    is_rgb = bits[at : at + 3] == "111"
    at += 3 + (not is_rgb) + (profile % 2) * (1 if is_rgb else 3)  # the colour space, its range, the subsampling
    return int(bits[at : at + 16], 2) + 1, int(bits[at + 16 : at + 32], 2) + 1


def is_shown(codec: str, packet: "VideoPacket") -> bool:
    """Return whether a packet has a frame that is displayed. In other codecs than these, each has."""
    if codec == "vp8":
        return bool(bytes(packet)[0] & 0x10)  # RFC 6386, 9.1
    if codec == "vp9":
        return any(_vp9_is_shown(frame) for frame in _vp9_frames(bytes(packet)))
    return codec != "gif" or _gif_has_image(bytes(packet))


def _gif_has_image(data: bytes) -> bool:
    """Return whether there is an image among a packet's blocks; what follows the last may be a comment."""
    at = 0
    if data.startswith(b"GIF8"):
        at = _GIF_HEADER_BYTES + (3 << (data[10] & 7) + 1) * (data[10] >> 7)  # the colours
    while at + 2 < len(data) and data[at] == _GIF_EXTENSION:
        at += 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return at < len(data) and data[at] != _GIF_END


def _vp9_frames(data: bytes) -> list[bytes]:
    """Return the frames of a superframe, which tells their sizes at its end (VP9 bitstream, Annex B)."""
    marker = data[-1]
    count, size_bytes = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = data[-2 - count * size_bytes :]
    if marker & 0xE0 != 0xC0 or index[0] != marker:
        return [data]
    frames, at = [], 0
    for number in range(count):
        begin = 1 + number * size_bytes
        size = int.from_bytes(index[begin : begin + size_bytes], "little")
        frames.append(data[at : at + size])
        at += size
    return frames


def _vp9_is_shown(frame: bytes) -> bool:
    bits = _vp9_bits(frame)
    at = 4 + (bits[2:4] == "11")
    return bits[at] == "1" or bits[at + 2] == "1"  # an earlier frame, or this one


def _vp9_bits(frame: bytes) -> str:
    return format(int.from_bytes(frame[:_VP9_HEADER_BYTES].ljust(_VP9_HEADER_BYTES, b"\0"), "big"), "0128b")
