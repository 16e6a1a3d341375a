"""Videos whose frames tell their number, of every kind that showed a fault somewhere."""

import functools
import io
import struct
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

from tests.server.clips import as_scheduled_before

BARS, BAR_WIDTH, HEIGHT = 8, 16, 64
WIDTH = BARS * BAR_WIDTH
MILLISECOND = Fraction(1, 1000)


def numbered(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A picture of a number: white bars are its ones, the highest on the left; the rest is dark."""
    bars = [((number + 1) >> (BARS - 1 - bar)) & 1 for bar in range(BARS)]
    columns = np.array(bars, np.uint8)[np.arange(width) * BARS // width] * 200 + 28
    return np.repeat(np.broadcast_to(columns, (height, width))[..., None], 3, axis=2)


def busy(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A picture in which everything moves, so that a frame made from wrong ones is a wrong one."""
    texture = np.random.default_rng(3).integers(0, 80, (height, width, 3), np.uint8)
    picture = np.roll(texture, (number, 3 * number), axis=(0, 1))
    at = number * 7 % (width - 16)
    picture[height // 4 : height // 2, at : at + 16] = 128 + number % 100
    return picture


def number_of(picture: np.ndarray) -> int:
    """The number that a picture is of, whatever its size."""
    columns = picture.astype(float).mean(axis=(0, 2))
    width = len(columns)
    number = 0
    for bar in range(BARS):
        begin, end = bar * width / BARS, (bar + 1) * width / BARS
        middle = columns[int(begin + (end - begin) / 4) : max(int(end - (end - begin) / 4), int(begin) + 1)]
        number = number * 2 + int(middle.mean() > 128)
    return number - 1


@functools.cache
def recording(
    container: str,
    codec: str,
    frames: int = 24,
    rate: int = 8,
    *,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    pix_fmt: str = "yuv420p",
    options: tuple[tuple[str, str], ...] = (),
    encoder: tuple[tuple[str, str], ...] = (),
    times: tuple[int, ...] = (),
    sound_seconds: float = 0,
    has_cover: bool = False,
    has_video: bool = True,
    draw: Callable[[int, int, int], np.ndarray] = numbered,
) -> bytes:
    """Numbered frames; `times` in milliseconds, where they are not a matter of the rate."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=dict(options)) as output, as_scheduled_before():
        video = output.add_stream(codec, rate=rate, options=dict(encoder)) if has_video else None
        sound = output.add_stream("aac", rate=16000, layout="mono") if sound_seconds else None
        cover = _cover(output) if has_cover else None
        if video is not None:
            (video.width, video.height), video.pix_fmt = size, pix_fmt
            if times:
                video.codec_context.time_base = MILLISECOND
        if cover is not None:
            picture = av.VideoFrame.from_ndarray(numbered(200, 300, 300), format="rgb24")
            output.mux([*cover.encode(picture), *cover.encode(None)])
        if video is not None:
            for number in range(frames):
                frame = av.VideoFrame.from_ndarray(draw(number, *size), format="rgb24")
                if times:
                    frame.pts, frame.time_base = times[number], MILLISECOND
                output.mux(video.encode(frame))
            output.mux(video.encode(None))
        if sound is not None:
            for at in range(0, int(sound_seconds * 16000), 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 16000, at
                output.mux(sound.encode(silence))
            output.mux(sound.encode(None))
    return buffer.getvalue()


def animation(frames: int = 24, milliseconds: int = 125, *, size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    """Numbered frames as WebP."""
    buffer = io.BytesIO()
    first, *others = (Image.fromarray(numbered(number, *size)) for number in range(frames))
    first.save(buffer, "WEBP", save_all=True, append_images=others, duration=milliseconds)
    return buffer.getvalue()


def _cover(output):
    cover = output.add_stream("mjpeg", rate=1)
    cover.width, cover.height, cover.pix_fmt = 300, 300, "yuvj420p"
    cover.disposition = Disposition.attached_pic
    return cover


def box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), name) + body


def shown_by(mp4: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """The same with another display matrix."""
    changed = bytearray(mp4)
    matrix = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", changed, changed.index(b"tkhd") + 44, *matrix)
    return bytes(changed)


def encrypted(mp4: bytes) -> bytes:
    """The same as common encryption has it, its key not told."""
    data, noise = bytearray(mp4), np.random.default_rng(5)
    at = data.index(b"avc1", data.index(b"stsd"))
    (size,) = struct.unpack_from(">I", data, at - 4)
    scheme = box(b"schm", struct.pack(">I4sI", 0, b"cenc", 0x10000))
    defaults = box(b"schi", box(b"tenc", bytes(6) + b"\1\x08" + b"\1" * 16))
    protection = box(b"sinf", box(b"frma", b"avc1") + scheme + defaults)
    data[at : at + 4] = b"encv"
    data[at - 4 + size : at - 4 + size] = protection
    for name in (b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        where = data.rindex(name, 0, at) - 4
        struct.pack_into(">I", data, where, struct.unpack_from(">I", data, where)[0] + len(protection))
    struct.pack_into(">I", data, at - 4, size + len(protection))
    begin = data.index(b"mdat") + 4
    end = begin - 8 + struct.unpack_from(">I", data, begin - 8)[0]
    while begin < end:
        (length,) = struct.unpack_from(">I", data, begin)
        cover = slice(begin + 5, min(begin + 4 + length, end))
        data[cover] = noise.bytes(len(data[cover]))
        begin += 4 + length
    return bytes(data)


def remuxed(container: str, source: bytes) -> bytes:
    """The same packets in another container."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(source)) as old, av.open(buffer, "w", format=container) as output:
        video = output.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.size:
                packet.pts = packet.dts = number * (packet.duration or 1)
                packet.stream = video
                output.mux(packet)
    return buffer.getvalue()


def with_note(h264: bytes) -> bytes:
    """H.264 without a container, with a note in front of each key frame that has its own kind of side data.

    It is one of those that a registered company writes (ITU-T T.35): of an enhancement layer, as some players have it.
    """
    body = b"\xb4\x00\x50\x00" + b"\x55" * 12
    note = b"\0\0\0\1\x06\x04" + bytes([len(body)]) + body + b"\x80"
    return h264.replace(b"\0\0\1\x65", note[1:] + b"\0\0\1\x65")


def encrypted_matroska(live: bytes) -> bytes:
    """The same with a track that says it is encrypted; the file must tell no length of its own."""
    key = _element(
        "6240", _element("5033", b"\1") + _element("5035", _element("47E1", b"\5") + _element("47E2", b"k" * 16))
    )
    added = _element("6D80", key)
    data = bytearray(live)
    tracks = data.index(bytes.fromhex("1654AE6B"), data.index(b"Lavf"))  # a table before that tells of them too
    entry = data.index(b"\xae", tracks + 4)
    for at in (entry + 1, tracks + 4):
        width = 9 - data[at].bit_length()
        size = int.from_bytes(data[at : at + width], "big") & (1 << 7 * width) - 1
        if at == entry + 1:
            data[at + width + size : at + width + size] = added
        data[at : at + width] = (size + len(added) | 1 << 7 * width).to_bytes(width, "big")
    return bytes(data)


def _element(name: str, body: bytes) -> bytes:
    return bytes.fromhex(name) + (len(body) | 0x4000).to_bytes(2, "big") + body


def scrambled(stream: bytes) -> bytes:
    """A transport stream whose video is scrambled."""
    packets, noise = [bytearray(packet) for packet in packets_of(stream)], np.random.default_rng(6)
    for number in video_packets(packets):
        packet = packets[number]
        begin = 4 + (packet[3] >> 5 & 1) * (1 + packet[4])
        packet[3] |= 0x80
        packet[begin:] = noise.bytes(188 - begin)
    return b"".join(packets)


def packets_of(stream: bytes) -> list[bytes]:
    """The packets of a transport stream."""
    return [stream[at : at + 188] for at in range(0, len(stream), 188)]


def video_packets(packets: list[bytes]) -> list[int]:
    """Which of a transport stream's packets are the video's."""
    return [number for number, packet in enumerate(packets) if (packet[1] & 31) << 8 | packet[2] == 0x100]


def without_packet(stream: bytes, share: float = 0.5) -> bytes:
    """A transport stream of which a packet of video got lost."""
    packets = packets_of(stream)
    of_video = video_packets(packets)
    del packets[of_video[int(len(of_video) * share)]]
    return b"".join(packets)


def with_packets_twice(stream: bytes) -> bytes:
    """A transport stream of which each hundredth packet came twice."""
    return b"".join(packet * (2 if number % 100 == 50 else 1) for number, packet in enumerate(packets_of(stream)))


def later(stream: bytes, seconds: float) -> bytes:
    """A transport stream whose clock is so much ahead, and wraps as 33 bits do."""
    ticks, packets = int(seconds * 90_000), [bytearray(packet) for packet in packets_of(stream)]
    for packet in packets:
        begin = 4 + (packet[3] >> 5 & 1) * (1 + packet[4])
        if not packet[1] & 0x40 or packet[begin : begin + 3] != b"\0\0\1":
            continue
        flags = packet[begin + 7] >> 6
        for at in [begin + 9, begin + 14][: {0: 0, 2: 1, 3: 2}[flags]]:
            _shift(packet, at, ticks)
    return b"".join(packets)


def _shift(packet: bytearray, at: int, ticks: int) -> None:
    value = int.from_bytes(packet[at : at + 5], "big")
    time = (value >> 33 & 7) << 30 | (value >> 17 & 0x7FFF) << 15 | value >> 1 & 0x7FFF
    time = (time + ticks) % 2**33
    marks = value & ~(7 << 33 | 0x7FFF << 17 | 0x7FFF << 1)
    value = marks | (time >> 30) << 33 | (time >> 15 & 0x7FFF) << 17 | (time & 0x7FFF) << 1
    packet[at : at + 5] = value.to_bytes(5, "big")


def every_packet_a_key(container: str, data: bytes) -> bytes:
    """The same packets in another container, each marked as a key frame."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=container) as output:
        video = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.is_keyframe, packet.stream = True, video
                output.mux(packet)
    return buffer.getvalue()
