"""Reads the sampled frames of a video into a frames file."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from server.reader import animations
from server.reader.decoding import DamagedError, FalseKeyError
from server.reader.facts import Limits, ReadError
from server.reader.frames_file import FramesFile, FramesHeader
from server.reader.packets import Scanned, scan
from server.reader.pictures import Pictures
from server.reader.protection import is_encrypted
from server.reader.sampling import Clip, sampling_from
from server.reader.sizes import handed_over
from server.reader.timeline import Timeline
from server.reader.wanted import Reading, Wanted

if TYPE_CHECKING:
    from av import VideoFrame

MAX_WAITING = 4  # frames that are decoded and not yet scaled
KEYS_BACK = 2  # where a stream is refreshed bit by bit, frames are whole from the key frame before on
FROM_THE_FIRST = 2**31


@contextmanager
def _encryption_told(descriptor: int, demuxer: str) -> Iterator[None]:
    """Say of what can't be read that it is encrypted, where the file says so."""
    from av import FFmpegError

    try:
        yield
    except (ReadError, FFmpegError) as exc:
        if getattr(exc, "code", None) is None and is_encrypted(descriptor, demuxer):
            raise ReadError("the video is encrypted") from exc
        raise


def scan_video(descriptor: int, demuxer: str, limits: Limits) -> Scanned:
    """Return what is in the video in an open file; raise ReadError if it is none that is taken."""
    if demuxer == animations.DEMUXER:
        return animations.scan(descriptor, limits)
    with _encryption_told(descriptor, demuxer):
        return scan(descriptor, demuxer, limits)


def read_video(
    descriptor: int, demuxer: str, limits: Limits, wanted: Wanted, into: int, *, threads: int = 1
) -> Reading:
    """Write a frames file into the empty file `into`; raise as `scan_video`, or ReadError for too broken a video.

    Up to so many threads decode; how many changes nothing in the file.
    """
    video = scan_video(descriptor, demuxer, limits)
    chosen = _chosen(video.timeline, wanted)
    full = video.facts.height, video.facts.width
    size = handed_over(wanted.size, full, num_frames=len(chosen))
    header = FramesHeader(
        frames=len(chosen),
        height=size[0],
        width=size[1],
        total_num_frames=video.facts.frames,
        fps=video.facts.fps,
        duration=video.facts.duration_seconds,
        frames_indices=chosen,
        source_height=full[0],
        source_width=full[1],
    )
    if header.pixels_bytes > wanted.max_bytes:
        raise ReadError(
            f"the video's {len(chosen)} frames of {size[1]} x {size[0]} pixels take {header.pixels_bytes} bytes, "
            f"at most {wanted.max_bytes} are allowed",
            code="media_too_large",
        )
    file = FramesFile(into, header)
    with _encryption_told(descriptor, demuxer):
        return Reading(video.facts, file.finish(_filled(video, chosen, file, threads)))


def _filled(video: Scanned, chosen: Sequence[int], file: FramesFile, threads: int) -> list[int]:
    """Write all frames; return which ones."""
    keys_back = 0
    while True:
        try:
            return _Sheet(video, chosen, file).fill(keys_back=keys_back, threads=threads)
        except DamagedError:
            threads = 1
        except FalseKeyError:
            keys_back = FROM_THE_FIRST


def _chosen(timeline: Timeline, wanted: Wanted) -> list[int]:
    """Return the frames to take, by number."""
    frames = timeline.within(wanted.start, wanted.end)
    if not frames:
        end = "its end" if wanted.end is None else f"{wanted.end:g}"
        raise ReadError(
            f"the video has no frame from {wanted.start:g} to {end} seconds: it lasts {timeline.duration:.6g}"
        )
    rule = sampling_from(wanted.sampling)
    if wanted.fps is not None:
        rule = rule.with_fps(wanted.fps)
    if wanted.num_frames is not None:
        rule = rule.with_num_frames(wanted.num_frames)
    clip = Clip(len(frames), timeline.fps, len(frames) / timeline.fps)
    return [frames[index] for index in rule.indices(clip)]


class _Sheet:
    """The places of a frames file, and which frame of the video is at each."""

    def __init__(self, video: Scanned, chosen: Sequence[int], file: FramesFile) -> None:
        self._decoder = video.decoder
        self._packets = video.timeline.packets
        self._chosen = chosen
        self._places: dict[int, list[int]] = {}
        for place, target in enumerate(chosen):
            self._places.setdefault(target, []).append(place)
        self._targets = sorted(self._places)
        self._file = file
        self._pictures = Pictures((file.header.height, file.header.width))
        self._used: dict[int, int] = {}
        """By frame that was chosen, the one that stands for it."""

    def fill(self, *, keys_back: int, threads: int) -> list[int]:
        """Write a frame to each place; return which ones.

        Raises ReadError if half of them can't be decoded, DamagedError if several threads can't decode one, and
        FalseKeyError.
        """
        numbers = {self._packets[target]: target for target in self._targets}
        with _aside(threads > 1) as aside:
            for number, frame in self._decoder.frames(numbers, keys_back=keys_back, threads=threads):
                aside(self._put, numbers[number], numbers[number], frame)
        if len(self._used) < len(self._targets):
            if threads > 1:
                raise DamagedError
            self._recover(keys_back)
        self._fill_up()
        return [self._used[target] for target in self._chosen]

    def _put(self, target: int, index: int, frame: "VideoFrame") -> None:
        pixels = self._pictures.pixels(frame)
        for place in self._places[target]:
            self._file.write(place, pixels)
        self._used[target] = index

    def _recover(self, keys_back: int) -> None:
        """Try again from earlier on, and take the next frame that can be decoded: as vLLM's `frame_recovery` does."""
        windows: dict[int, tuple[int, int]] = {}
        for target, following in zip(self._targets, [*self._targets[1:], len(self._packets)], strict=True):
            if target not in self._used:
                windows |= {self._packets[index]: (target, index) for index in range(target, following)}
        least = KEYS_BACK if 2 * len(self._used) >= len(self._targets) else FROM_THE_FIRST
        for number, frame in self._decoder.frames(windows, keys_back=max(keys_back, least)):
            target, index = windows[number]
            if index < self._used.get(target, index + 1):
                self._put(target, index, frame)
        decoded = sum(index == target for target, index in self._used.items())
        if 2 * decoded < len(self._targets):
            raise ReadError(f"only {decoded} of the video's {len(self._targets)} sampled frames can be decoded")

    def _fill_up(self) -> None:
        """Give what is still missing the frame before it, or the first."""
        stand_in = next(iter(sorted(self._used)))
        for target in self._targets:
            if target in self._used:
                stand_in = target
                continue
            for place in self._places[target]:
                self._file.copy(self._places[stand_in][0], place)
            self._used[target] = self._used[stand_in]


@contextmanager
def _aside(is_apart: bool) -> Iterator[Callable[..., None]]:
    """Give what calls a function, in a thread of its own if `is_apart`; all calls are done when the block ends."""
    if not is_apart:
        yield lambda function, *arguments: function(*arguments)
        return
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as thread:

        def call(function: Callable[..., None], *arguments: object) -> None:
            waiting.append(thread.submit(function, *arguments))
            if len(waiting) > MAX_WAITING:
                waiting.popleft().result()

        yield call
        for done in waiting:
            done.result()
