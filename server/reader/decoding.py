"""Decodes chosen frames of a video, and of the others no more than it takes."""

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from server.reader.timeline import PacketTimes, first_key

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext

    from server.reader.opening import VideoPacket

# Decoders of these skip frames that no other refers to, and are no worse for it. In HEVC, frames of a higher temporal
# layer may refer to them. Other decoders skip none, or keep what they learn from each frame.
_SKIPPING_CODECS = ("h264", "mpeg1video", "mpeg2video", "mpeg4")
_LAYERED_CODECS = ("hevc",)
# Others take little time. VP8's threads make what they can of damage, and say nothing of it.
_THREADED_CODECS = ("h264", "hevc", "vp9", "av1")
_ONE_KEY_CODECS = ("gif",)  # each frame is drawn over the last


class Opening(Protocol):
    """Opens the video from its begin on."""

    def __call__(
        self, *, threads: int = 1
    ) -> "AbstractContextManager[tuple[InputContainer, VideoStream, Iterator[VideoPacket]]]":
        """Give container, stream and packets, to be decoded by so many threads."""


class FalseKeyError(Exception):
    """A packet is marked as a key frame and isn't."""


class DamagedError(Exception):
    """The video is damaged, and several threads decode it. What is made of the damage is then a matter of chance."""


class Decoder:
    """Decodes chosen frames. It reads the file anew each time, and feeds the decoder from key frames on."""

    def __init__(self, opening: Opening, packets: Sequence[PacketTimes], *, codec: str) -> None:
        """Take what opens the video, and its packets' times; frames are known by the number of their packet."""
        self._opening = opening
        self._packets = packets
        self._skipped = _skipped(packets, codec)
        self._is_threaded = codec in _THREADED_CODECS
        first = first_key(packets)
        keys = [number for number, packet in enumerate(packets) if packet.is_key]
        self._keys = [first] if codec in _ONE_KEY_CODECS or not keys else keys

    def frames(
        self, wanted: Collection[int], *, keys_back: int = 0, threads: int = 1
    ) -> Iterator[tuple[int, "VideoFrame"]]:
        """Give the frames that can be decoded, each behind its number, in no certain order.

        Decoding begins `keys_back` key frames earlier than it should have to. What raises av.FFmpegError while
        decoding is passed over by one thread; several raise DamagedError. Raises FalseKeyError if a frame isn't what
        decoding can begin with.
        """
        segments = self._segments(wanted, keys_back)
        if not segments:
            return
        threads = threads if self._is_threaded else 1
        decoded = _decoded_by_several if threads > 1 else _decoded
        start, end = segments.pop(0)
        with self._opening(threads=threads) as (_, stream, packets):
            context, new_extradata = stream.codec_context, None
            for number, packet in enumerate(packets):
                if packet.has_sidedata("new_extradata"):
                    new_extradata = packet.get_sidedata("new_extradata")
                if number < start:
                    continue
                if new_extradata is not None and not packet.has_sidedata("new_extradata"):
                    packet.set_sidedata(new_extradata)  # what was passed over told how to decode this one
                new_extradata = None
                mark(packet, number)
                may_skip = number in self._skipped and self._begin(number) not in wanted
                context.skip_frame = "NONREF" if may_skip else "DEFAULT"
                yield from self._chosen(decoded(context, packet), wanted, start)
                if number == end:
                    yield from self._chosen(decoded(context, None), wanted, start)
                    if not segments:
                        return
                    context.flush_buffers()
                    start, end = segments.pop(0)
            yield from self._chosen(decoded(context, None), wanted, start)

    def order(self) -> list[int]:
        """Return the numbers of all frames in the order in which they come out."""
        numbers = []
        with self._opening() as (_, stream, packets):
            context = stream.codec_context
            for number, packet in enumerate(packets):
                mark(packet, number)
                numbers += [number_of(frame) for frame in _decoded(context, packet)]
            numbers += [number_of(frame) for frame in _decoded(context, None)]
        return list(dict.fromkeys(numbers))

    def _chosen(
        self, frames: Iterator["VideoFrame"], wanted: Collection[int], start: int
    ) -> Iterator[tuple[int, "VideoFrame"]]:
        for frame in frames:
            number = number_of(frame)
            if number == start and not frame.key_frame and start != self._keys[0]:
                raise FalseKeyError
            if number in wanted:
                yield number, frame

    def _segments(self, wanted: Collection[int], keys_back: int) -> list[tuple[int, int]]:
        """Return the first and the last packet of each part that has to be decoded."""
        segments: list[tuple[int, int]] = []
        for number in sorted(wanted):
            start = self._start(number, keys_back)
            end = number
            if end + 1 < len(self._packets) and self._packets[end + 1].is_rest:
                end += 1
            if segments and start <= segments[-1][1]:
                segments[-1] = min(start, segments[-1][0]), end
            else:
                segments.append((start, end))
        return segments

    def _begin(self, number: int) -> int:
        """Return the packet that begins the frame which a packet is of."""
        return number - 1 if number < len(self._packets) and self._packets[number].is_rest else number

    def _start(self, number: int, keys_back: int) -> int:
        at = bisect_right(self._keys, number) - 1
        shown, key_shown = self._packets[number].pts, self._packets[self._keys[max(at, 0)]].pts
        if shown is not None and key_shown is not None and shown < key_shown:
            at -= 1  # shown before its key frame, it may refer to frames before that
        return self._keys[max(at - keys_back, 0)]


def _decoded(context: "VideoCodecContext", packet: "VideoPacket | None") -> Iterator["VideoFrame"]:
    from av import FFmpegError

    try:
        yield from context.decode(packet)
    except FFmpegError:
        return


def mark(packet: "VideoPacket", number: int) -> None:
    """Put a packet's number in the place of its time, which decoders only hand on to its frame.

    An `opaque` object would do too, if decoders' threads could let go of one without waiting for Python's lock.
    """
    packet.pts = number


def number_of(frame: "VideoFrame") -> int:
    """Return the number of the packet that a frame comes from."""
    return -1 if frame.pts is None else frame.pts


def _decoded_by_several(context: "VideoCodecContext", packet: "VideoPacket | None") -> Iterator["VideoFrame"]:
    from av import FFmpegError

    try:
        for frame in context.decode(packet):
            if frame.is_corrupt:
                raise DamagedError
            yield frame
    except FFmpegError:
        raise DamagedError from None


def _skipped(packets: Sequence[PacketTimes], codec: str) -> Collection[int]:
    """Return the packets that a decoder may skip if no frame refers to theirs."""
    if codec in _SKIPPING_CODECS:
        return range(len(packets))
    if codec not in _LAYERED_CODECS:
        return ()
    highest = max((packet.layer for packet in packets), default=0)
    return {number for number, packet in enumerate(packets) if not packet.is_referred and packet.layer == highest}
