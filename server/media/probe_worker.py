"""The worker process that probes media.

Jobs arrive on the socket that is the process's standard input. A job is a line of JSON, with the descriptor of the open
file attached. The answer is a line of JSON too.
"""

import json
import math
import os
import resource
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from server.media.facts import Facts, Limits, ProbeError

if TYPE_CHECKING:
    from av import Packet, VideoStream
    from av.container import InputContainer

    VideoPacket = Packet[VideoStream]
    SizeReader = Callable[[VideoPacket | None], tuple[int, int]]  # of a packet, or None at the end; (0, 0) if unknown

MEMORY_BYTES = 2 * 2**30  # of address space; libav's libraries alone take a third of it
MESSAGE_BYTES = 64 * 1024

VIDEO_CODECS = (
    *("h264", "hevc", "vp8", "vp9", "av1"),
    *("h263", "flv1", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "theora"),
)
# For these codecs, libav's parsers report the frame size. Their decoders do not read the headers of frames that they
# skip, or can't skip frames at all.
_PARSED_CODECS = ("h264", "hevc", "av1")
_AUDIO_CODECS = ("aac", "alac", "flac", "mp3", "opus", "vorbis", "pcm_f32le", "pcm_s16le", "pcm_s24le", "pcm_u8")
# The decoders that libav may open, by libav's names. libav opens some of them before it reports what a file holds.
_DECODERS = ",".join((*VIDEO_CODECS, "flv", "libdav1d", *_AUDIO_CODECS, "mp3float", "libopus", "libvorbis"))
_IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
MAX_IMAGE_PIXELS = 2**26
MAX_FPS = 1000
BYTES_PER_PIXEL = 3
BYTES_PER_SAMPLE = 4


class _Frames:
    """Decodes the first frame of a video, and reads the sizes of all others from their headers."""

    def __init__(self, stream: "VideoStream", limits: Limits) -> None:
        """Take a stream from which nothing has been decoded yet."""
        self.largest = (0, 0)
        self._context = context = stream.codec_context
        self._limits = limits
        self._is_decoded = False
        self._size_in = self._reader(stream)
        self._note(context.width, context.height)

    def read(self, packet: "VideoPacket") -> None:
        """Read the next packet.

        Raises ProbeError for a frame that is too large, and av.FFmpegError if the first frame can't be decoded.
        """
        if not self._is_decoded:
            self._decode(packet)
        self._note(*self._size_in(packet))

    def end(self) -> None:
        """Finish reading; raise ProbeError if no frame could be decoded."""
        if not self._is_decoded:
            self._decode(None)
        if not self._is_decoded:
            raise ProbeError("the video holds no frame that can be decoded")
        self._note(*self._size_in(None))

    def _decode(self, packet: "VideoPacket | None") -> None:
        self._is_decoded = bool(self._context.decode(packet))
        self._note(self._context.width, self._context.height)

    def _note(self, width: int, height: int) -> None:
        if width * height > self._limits.max_pixels:
            raise _too_large(f"have {width} x {height}", self._limits)
        self.largest = max(self.largest, (width, height), key=math.prod)

    def _reader(self, stream: "VideoStream") -> "SizeReader":
        codec = stream.codec_context.codec.canonical_name
        if codec == "vp9":  # libav's VP9 decoder can't skip frames, and its parser does not report sizes
            return _vp9_size
        return _parser(stream) if codec in _PARSED_CODECS else self._skim

    def _skim(self, packet: "VideoPacket | None") -> tuple[int, int]:
        from av import FFmpegError

        if not self._is_decoded:
            return 0, 0
        self._context.skip_frame = "ALL"
        try:
            self._context.decode(packet)
        except FFmpegError:
            if not self._context.width:  # libav reports no size for a frame with more than `max_pixels`
                raise _too_large("grow to too many", self._limits) from None
        return self._context.width, self._context.height


def _parser(stream: "VideoStream") -> "SizeReader":
    """Return a function that reads frame sizes with the codec's parser, which may report a size one packet later."""
    from av import CodecContext, Packet
    from av.bitstream import BitStreamFilterContext

    codec = stream.codec_context.codec.canonical_name
    parser: Any = CodecContext.create(codec, "r")
    as_stream: Any = None
    if codec == "hevc":  # the parser needs start codes, which HEVC frames in MP4 files lack
        as_stream = BitStreamFilterContext("hevc_mp4toannexb", stream)
    else:
        parser.extradata = stream.codec_context.extradata

    def size_in(packet: "VideoPacket | None") -> tuple[int, int]:
        parser.width = parser.height = 0  # parsers report a size only while none is set
        if as_stream is None or packet is None:
            parser.parse(packet)
        else:
            for piece in as_stream.filter(Packet(bytes(packet))):
                parser.parse(piece)
        return parser.width, parser.height

    return size_in


def _vp9_size(packet: "VideoPacket | None") -> tuple[int, int]:
    """Return the size in the header of a VP9 key frame; (0, 0) for other frames, which reuse an earlier frame's size.

    See section 6.2 of the VP9 bitstream specification.
    """
    frame = b"" if packet is None else bytes(packet)[:16]
    bits = format(int.from_bytes(frame.ljust(16, b"\0"), "big"), "0128b")
    profile = int(bits[2]) + 2 * int(bits[3])
    at = 4 + (profile == 3)
    if bits[:2] != "10" or bits[at : at + 2] != "00":  # repeats an earlier frame, or is not a key frame
        return 0, 0
    at += 4 + 24 + (profile >= 2)  # the flags, the sync code, the bit depth
    is_rgb = bits[at : at + 3] == "111"
    at += 3 + (not is_rgb) + (profile % 2) * (1 if is_rgb else 3)  # the colour space, its range, the subsampling
    return int(bits[at : at + 16], 2) + 1, int(bits[at + 16 : at + 32], 2) + 1


def read_video(descriptor: int, demuxer: str, limits: Limits) -> Facts:
    """Return the facts about the video in an open file. One frame is decoded; of the others, only headers are read.

    The caller names the demuxer, libav does not guess it, and it may open no other file or URL: playlists are never
    followed. Raises ProbeError if the video is not allowed, and av.FFmpegError if it is broken.
    """
    import av  # here, so that the gateway's own process never loads the decoders

    options = {
        "codec_whitelist": _DECODERS,
        "protocol_whitelist": "none",
        "max_pixels": str(limits.max_pixels),
        "threads": "1",
    }
    with os.fdopen(descriptor, "rb") as file, av.open(file, "r", format=demuxer, options=options) as container:
        stream = _video_stream(container, limits)
        packets = _Packets(stream, limits)
        for packet in container.demux(stream):
            if packet.size:
                packets.read(packet)
        facts = packets.facts(container)
    _check_duration("video", facts.duration_seconds, limits, code="video_too_long")
    return facts


def _video_stream(container: "InputContainer", limits: Limits) -> "VideoStream":
    """Return the video stream, ready to be decoded; raise ProbeError if there is none or its codec is not supported."""
    from av import VideoStream

    stream = next((stream for stream in container.streams if isinstance(stream, VideoStream)), None)
    if stream is None:
        raise ProbeError("the file holds no video stream")
    context = stream.codec_context
    codec = "an unknown codec" if context is None else context.codec.canonical_name
    if codec not in VIDEO_CODECS:
        raise ProbeError(f"the video is in {codec}; supported codecs are {', '.join(VIDEO_CODECS)}")
    context.options = {"max_pixels": str(limits.max_pixels)}
    stream.thread_count = 1
    return stream


class _Packets:
    """Measures a video on its packets: the number of frames, their times and their sizes."""

    def __init__(self, stream: "VideoStream", limits: Limits) -> None:
        """Take a stream from which nothing has been read yet."""
        self._stream = stream
        self._limits = limits
        self._pictures = _Frames(stream, limits)
        self._frames, self._begin, self._end = 0, math.inf, -math.inf

    def read(self, packet: "VideoPacket") -> None:
        """Read the next packet; raise ProbeError if it is damaged or exceeds a limit."""
        if packet.is_corrupt:
            raise ProbeError("the video is truncated")
        self._frames += 1
        _check_frames(self._frames, self._limits)
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None:
            self._begin, self._end = min(self._begin, time), max(self._end, time + (packet.duration or 0))
        self._pictures.read(packet)

    def facts(self, container: "InputContainer") -> Facts:
        """Return the facts, after all packets have been read; raise ProbeError if the header's claims are false."""
        self._pictures.end()
        stream, frames = self._stream, self._frames
        _check_frames(stream.frames, self._limits)
        if stream.frames > 10 * frames + 100:  # tolerant: a clip cut without re-encoding keeps the old header
            raise ProbeError(f"the video claims {stream.frames} frames and holds {frames}")
        seconds_per_tick = float(stream.time_base or 0)
        measured = (self._end - self._begin) * seconds_per_tick if self._end > self._begin else 0.0
        claimed = [(stream.duration or 0) * seconds_per_tick, (container.duration or 0) / 1e6]
        fps = frames / measured if measured else 0.0
        for rate in (fps, float(stream.guessed_rate or stream.average_rate or fps)):
            if frames > 1 and not 0 < rate <= MAX_FPS:
                raise ProbeError(f"the video claims {rate:.6g} frames per second, at most {MAX_FPS} are allowed")
        width, height = self._pictures.largest
        return Facts(
            container=container.format.name,
            codec=stream.codec_context.codec.canonical_name,
            width=width,
            height=height,
            duration_seconds=max(measured, *claimed),
            frames=frames,
            fps=fps,
            decoded_bytes=min(frames, self._limits.sampled_frames) * width * height * BYTES_PER_PIXEL,
        )


def read_audio(descriptor: int, demuxer: str, limits: Limits) -> Facts:
    """Return the facts about the audio clip in an open file, without decoding it; raises as `read_video` does."""
    import av

    options = {"codec_whitelist": _DECODERS, "protocol_whitelist": "none"}
    with os.fdopen(descriptor, "rb") as file, av.open(file, "r", format=demuxer, options=options) as container:
        stream = next((stream for stream in container.streams if isinstance(stream, av.AudioStream)), None)
        if stream is None or stream.codec_context is None or not stream.time_base:
            raise ProbeError("the file holds no audio stream")
        codec = stream.codec_context.codec.canonical_name
        if codec not in _AUDIO_CODECS:
            raise ProbeError(f"the audio is in {codec}; supported codecs are {', '.join(_AUDIO_CODECS)}")
        measured = sum(packet.duration or 0 for packet in container.demux(stream)) * float(stream.time_base)
        claimed = float((stream.duration or 0) * stream.time_base)
        seconds = max(measured, claimed)
        _check_duration("audio", seconds, limits, code="audio_too_long")
        samples = seconds * stream.codec_context.sample_rate * stream.codec_context.channels
        return Facts(
            container.format.name, codec, duration_seconds=seconds, decoded_bytes=int(samples * BYTES_PER_SAMPLE)
        )


def read_image(descriptor: int, demuxer: str, limits: Limits) -> Facts:
    """Return the facts about the image in an open file, from its header only; raise ProbeError if it is too large."""
    from PIL import Image

    del demuxer, limits
    with os.fdopen(descriptor, "rb") as file, Image.open(file, formats=_IMAGE_FORMATS) as image:
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ProbeError(
                f"the image has {image.width} x {image.height} pixels, at most {MAX_IMAGE_PIXELS} are allowed",
                code="media_too_large",
            )
        return Facts(
            container=str(image.format).lower(),
            codec="",
            width=image.width,
            height=image.height,
            decoded_bytes=image.width * image.height * BYTES_PER_PIXEL,
        )


_READERS: dict[str, Callable[[int, str, Limits], Facts]] = {
    "video": read_video,
    "image": read_image,
    "audio": read_audio,
}


def _too_large(size: str, limits: Limits) -> ProbeError:
    return ProbeError(
        f"the video's frames {size} pixels, at most {limits.max_pixels} are allowed", code="media_too_large"
    )


def _check_frames(frames: int, limits: Limits) -> None:
    if frames > limits.max_frames:
        raise ProbeError(f"the video has more than {limits.max_frames} frames", code="video_too_long")


def _check_duration(kind: str, seconds: float, limits: Limits, *, code: str) -> None:
    if not seconds <= limits.max_seconds:
        raise ProbeError(
            f"the {kind} lasts {seconds:.6g} seconds, at most {limits.max_seconds:g} are allowed",
            code=code,
        )


def _answer(line: bytes, descriptor: int) -> dict[str, Any]:
    job = json.loads(line)
    kind = job["kind"]
    try:
        return asdict(_READERS[kind](descriptor, job["demuxer"], Limits(**job["limits"])))
    except ProbeError as exc:
        return {"error": str(exc), "code": exc.code}
    except (MemoryError, OverflowError):
        return {"error": f"the {kind} could not be read within the limits", "code": None}
    except Exception:  # errors of libav and Pillow, and any other that a damaged file causes in their bindings
        return {"error": f"the {kind} is truncated or broken", "code": None}


def main(cpu_seconds: int) -> None:
    """Answer jobs until the gateway closes the socket. `cpu_seconds` limits the CPU time of each job."""
    import av
    from PIL import Image

    av.logging.set_level(None)
    Image.MAX_IMAGE_PIXELS = None  # turns off Pillow's own warning: `read_image` checks the size
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=0) as jobs:
        while True:
            line, descriptors, _, _ = socket.recv_fds(jobs, MESSAGE_BYTES, 1)
            if not line or not descriptors:
                return
            usage = resource.getrusage(resource.RUSAGE_SELF)
            spent = math.ceil(usage.ru_utime + usage.ru_stime)
            resource.setrlimit(resource.RLIMIT_CPU, (spent + cpu_seconds, resource.RLIM_INFINITY))
            jobs.sendall(json.dumps(_answer(line, descriptors[0])).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
