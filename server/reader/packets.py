"""What the packets of a video say: how many frames are shown, when, and how large they are. One frame is decoded."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from server.reader import frame_headers
from server.reader.decoding import Decoder, mark, number_of
from server.reader.facts import Facts, Limits, ReadError
from server.reader.fields import Fields
from server.reader.frames_file import BYTES_PER_PIXEL
from server.reader.opening import opened
from server.reader.pictures import is_turned
from server.reader.timeline import Clock, PacketTimes, Timeline, first_key, leading, needs_decoding, timeline

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer

    from server.reader.frame_headers import SizeReader
    from server.reader.opening import VideoPacket

MAX_FPS = 1000
MAX_UNDECODABLE = 500  # packets from the first on: a video of which so many can't be decoded is none
_BROADCAST_FORMATS = ("mpegts", "mpeg")  # whose clocks leap
_TABLE_FORMATS = ("mp4", "mov")  # which say beforehand which frames there are
_DECODE_TIME_FORMATS = ("avi",)  # which tell when frames are decoded; when H.264 shows them, libav makes up from that
_GUESSED_TIME_FORMATS = ("mpeg",)  # several frames may share what tells the time of the first
_FIELD_FORMATS = ("mpegts", "h264")  # where the two fields of a frame are packets of their own
_FIXED_CODECS = ("gif",)  # all frames are drawn on one canvas


class Frames(Protocol):
    """The frames of a video, to be decoded."""

    def frames(
        self, wanted: Collection[int], *, keys_back: int = 0, threads: int = 1
    ) -> Iterator[tuple[int, "VideoFrame"]]:
        """Give those that can be decoded, each behind the number of its packet, in no certain order."""


@dataclass(frozen=True)
class Scanned:
    """A video whose packets were read."""

    facts: Facts
    timeline: Timeline
    decoder: "Frames"


def scan(descriptor: int, demuxer: str, limits: Limits) -> Scanned:
    """Return what is in the video in an open file.

    Raises ReadError if it is not a video that is taken, and av.FFmpegError if it is a broken one.
    """
    opening = partial(opened, descriptor, demuxer, limits)
    with opening() as (container, stream, packets):
        seen = _Packets(stream, limits, has_fields=container.format.name in _FIELD_FORMATS)
        for packet in packets:
            seen.read(packet)
        seen.end()
        doubtful = seen.find_unmarked_key() if container.format.name in _TABLE_FORMATS else []
        _check_claims(container, stream, seen.times, limits)
        clock = _clock(container, stream)
        codec = stream.codec_context.codec.canonical_name
        container_name = container.format.name
        is_reordered = container_name in _DECODE_TIME_FORMATS and codec == "h264" and stream.codec_context.has_b_frames
    decoder = Decoder(opening, seen.times, codec=codec)
    is_made_up = container_name in _GUESSED_TIME_FORMATS
    is_unknown = is_reordered or needs_decoding(seen.times, is_made_up=is_made_up)
    if is_unknown:
        shown = timeline(seen.times, clock, order=decoder.order())
    else:
        shown = _timeline(seen.times, clock, decoder, [*leading(seen.times), *doubtful])
    check_timeline(shown, limits)
    width, height = seen.size
    frames = len(shown.packets)
    facts = Facts(
        container=container_name,
        codec=codec,
        width=width,
        height=height,
        duration_seconds=shown.duration,
        frames=frames,
        fps=shown.fps,
        decoded_bytes=min(frames, limits.sampled_frames) * width * height * BYTES_PER_PIXEL,
    )
    return Scanned(facts, shown, decoder)


def _timeline(packets: Sequence[PacketTimes], clock: Clock, decoder: Decoder, doubtful: Sequence[int]) -> Timeline:
    """Return when frames are shown; whether the doubtful ones are, a decoder tells."""
    missing = frozenset(doubtful).difference(number for number, _ in decoder.frames(frozenset(doubtful)))
    return timeline(packets, clock, missing=missing)


def _clock(container: "InputContainer", stream: "VideoStream") -> Clock:
    ticks_per_second = float(1 / stream.time_base) if stream.time_base else 1.0
    rate = float(stream.guessed_rate or stream.average_rate or 1)
    return Clock(
        ticks_per_second=ticks_per_second,
        interval=ticks_per_second / (rate if 0 < rate <= MAX_FPS else 1),
        leaps=container.format.name in _BROADCAST_FORMATS,
    )


def _check_claims(
    container: "InputContainer", stream: "VideoStream", packets: Sequence[PacketTimes], limits: Limits
) -> None:
    """Raise ReadError if the header makes false claims, or most of what it tells of is missing."""
    frames = len(packets)
    check_frames(stream.frames, limits)
    if stream.frames > 10 * frames + 100:  # clips that were cut without encoding them anew claim what they were
        raise ReadError(f"the video claims {stream.frames} frames and holds {frames}")
    told = len(stream.index_entries) if container.format.name in _TABLE_FORMATS else 0
    if told > 2 * frames:
        raise ReadError(f"the video is truncated: {frames} of its {told} frames are there")


def check_timeline(shown: Timeline, limits: Limits) -> None:
    """Raise ReadError if no frame is shown, or more in a second or for longer than is allowed."""
    if not shown.packets:
        raise ReadError("the video holds no frame that can be decoded")
    if len(shown.packets) > 1:
        fps = shown.fps
        if not 0 < fps <= MAX_FPS:
            raise ReadError(f"the video claims {fps:.6g} frames per second, at most {MAX_FPS} are allowed")
    check_duration("video", shown.duration, limits, code="video_too_long")


def check_frames(frames: int, limits: Limits) -> None:
    """Raise ReadError for too many frames."""
    if frames > limits.max_frames:
        raise ReadError(f"the video has more than {limits.max_frames} frames", code="video_too_long")


def check_duration(kind: str, seconds: float, limits: Limits, *, code: str) -> None:
    """Raise ReadError for a medium that lasts too long."""
    if not seconds <= limits.max_seconds:
        raise ReadError(
            f"the {kind} lasts {seconds:.6g} seconds, at most {limits.max_seconds:g} are allowed", code=code
        )


class _Packets:
    """Decodes the first frame of a video; of the others it reads the headers, and the packets' times."""

    def __init__(self, stream: "VideoStream", limits: Limits, *, has_fields: bool) -> None:
        """Take a stream of which nothing has been read yet, and whether fields may be packets of their own."""
        self.times: list[PacketTimes] = []
        self._first_decoded = 0
        self._context = context = stream.codec_context
        self._codec = context.codec.canonical_name
        self._limits = limits
        self._largest = (0, 0)
        self._is_decoded = self._is_turned = False
        self._fields = Fields(context.extradata) if has_fields and self._codec == "h264" else None
        self._size_in = self._reader(stream)
        self._layer_in = frame_headers.hevc_layers(stream) if self._codec == "hevc" else _no_layer
        self._note(context.width, context.height)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the largest frame, as displayed."""
        width, height = self._largest
        return (height, width) if self._is_turned else (width, height)

    def read(self, packet: "VideoPacket") -> None:
        """Take in the next packet; raise ReadError for one that breaks a limit or is encrypted."""
        if self._context.codec_tag == "encv" or packet.has_sidedata("encryption_info"):
            raise ReadError("the video is encrypted")
        self._append(packet)
        check_frames(len(self.times), self._limits)
        if not self._is_decoded:
            self._decode(packet)
            if len(self.times) > MAX_UNDECODABLE and not self._is_decoded:
                raise ReadError("the video holds no frame that can be decoded")
        self._note(*self._size_in(packet))

    def find_unmarked_key(self) -> list[int]:
        """Mark the first packet as a key frame if frames before the first that is marked can be decoded.

        Return the packets between the two.
        """
        key = first_key(self.times)
        if key <= self._first_decoded:
            return []
        self.times[0] = self.times[0]._replace(is_key=True)
        return [number for number in range(1, key) if self.times[number].is_shown]

    def _append(self, packet: "VideoPacket") -> None:
        duration = packet.duration or 0
        is_rest = self._fields is not None and self._fields.is_rest(bytes(packet))
        if is_rest:
            self.times[-1] = self.times[-1]._replace(duration=self.times[-1].duration + duration)
        is_key = packet.is_keyframe and not is_rest
        is_shown = not is_rest and not packet.is_discard and frame_headers.is_shown(self._codec, packet)
        layer = self._layer_in(packet)
        self.times.append(PacketTimes(packet.pts, packet.dts, duration, is_key, is_shown, is_rest, *layer))

    def end(self) -> None:
        """Raise ReadError if no frame could be decoded."""
        if not self._is_decoded:
            self._decode(None)
        if not self._is_decoded:
            raise ReadError("the video holds no frame that can be decoded")
        self._note(*self._size_in(None))

    def _decode(self, packet: "VideoPacket | None") -> None:
        if packet is not None:
            mark(packet, len(self.times) - 1)
        frames = self._tried(packet)
        if frames:
            self._is_decoded, self._is_turned = True, is_turned(frames[0])
            self._first_decoded = max(number_of(frames[0]), 0)
        self._note(self._context.width, self._context.height)

    def _tried(self, packet: "VideoPacket | None") -> list:  # type: ignore[type-arg]
        from av import FFmpegError

        had_size = bool(self._context.width)
        try:
            return self._context.decode(packet)
        except FFmpegError:
            if had_size and not self._context.width:  # libav has no size for frames beyond `max_pixels`
                raise too_large("grow to too many", self._limits) from None
            return []

    def _note(self, width: int, height: int) -> None:
        if width * height > self._limits.max_pixels:
            raise too_large(f"have {width} x {height}", self._limits)
        self._largest = max(self._largest, (width, height), key=math.prod)

    def _reader(self, stream: "VideoStream") -> "SizeReader":
        if self._codec == "vp9":  # its decoder skips nothing, its parser tells no size
            return frame_headers.vp9_size
        if self._codec in _FIXED_CODECS:
            return lambda packet: (0, 0)
        return frame_headers.parser(stream) if self._codec in frame_headers.PARSED_CODECS else self._skim

    def _skim(self, packet: "VideoPacket | None") -> tuple[int, int]:
        if not self._is_decoded:
            return 0, 0
        self._context.skip_frame = "ALL"
        self._tried(packet)
        return self._context.width, self._context.height


def _no_layer(packet: "VideoPacket") -> tuple[int, bool]:
    return 0, True


def too_large(size: str, limits: Limits) -> ReadError:
    """Return the refusal of frames that have too many pixels."""
    return ReadError(
        f"the video's frames {size} pixels, at most {limits.max_pixels} are allowed", code="media_too_large"
    )
