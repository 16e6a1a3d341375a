"""Animated WebP, which libav doesn't decode and Pillow does."""

import io
import os
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from server.reader.facts import Facts, Limits
from server.reader.frames_file import BYTES_PER_PIXEL
from server.reader.packets import Scanned, check_frames, check_timeline, too_large
from server.reader.timeline import Timeline

if TYPE_CHECKING:
    from av import VideoFrame

DEMUXER = "webp"
DEFAULT_MILLISECONDS = 100  # what browsers give frames that say nothing
_CHUNK = struct.Struct("<4sI")
_FIRST_CHUNK_AT = 12


def scan(descriptor: int, limits: Limits) -> Scanned:
    """Return what is in an animation; raise ReadError if it breaks a limit, OSError if it is broken."""
    canvas, milliseconds = _chunks(descriptor)
    _check_size(canvas, limits)
    check_frames(len(milliseconds), limits)
    with _opened(descriptor) as image:
        width, height = image.size
        frames = getattr(image, "n_frames", 1)
    _check_size((width, height), limits)
    lengths = [length or DEFAULT_MILLISECONDS for length in milliseconds[:frames]]
    lengths += [DEFAULT_MILLISECONDS] * (frames - len(lengths))
    ends = [total / 1000 for total in accumulate(lengths)]
    shown = Timeline(range(frames), [0.0, *ends[:-1]], ends[-1])
    check_timeline(shown, limits)
    facts = Facts(
        container="webp",
        codec="webp",
        width=width,
        height=height,
        duration_seconds=shown.duration,
        frames=frames,
        fps=shown.fps,
        decoded_bytes=min(frames, limits.sampled_frames) * width * height * BYTES_PER_PIXEL,
    )
    return Scanned(facts, shown, _Animation(descriptor))


class _Animation:
    """Decodes chosen frames, each of which is drawn over the last."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def frames(
        self, wanted: Collection[int], *, keys_back: int = 0, threads: int = 1
    ) -> Iterator[tuple[int, "VideoFrame"]]:
        """Give the frames that can be decoded, each behind its number."""
        from av import VideoFrame

        del keys_back, threads
        with _opened(self._descriptor) as image:
            for number in sorted(wanted):
                try:
                    image.seek(number)
                    picture = np.asarray(image.convert("RGB"))
                except (OSError, EOFError):  # nor can those behind it be
                    return
                yield number, VideoFrame.from_ndarray(picture, format="rgb24")


@contextmanager
def _opened(descriptor: int) -> Iterator[Image.Image]:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        _, claimed = _CHUNK.unpack(file.read(_CHUNK.size))
        file.seek(0)
        is_whole = _CHUNK.size + claimed <= os.fstat(descriptor).st_size
        with Image.open(file if is_whole else _cut(file.read()), formats=("WEBP",)) as image:
            yield image


def _cut(data: bytes) -> io.BytesIO:
    """Return a file that was cut off without the chunk in which it was; libwebp takes whole ones only."""
    at = end = _FIRST_CHUNK_AT
    while at + _CHUNK.size <= len(data):
        _, size = _CHUNK.unpack_from(data, at)
        at += _CHUNK.size + size + size % 2
        if at <= len(data):
            end = at
    return io.BytesIO(_CHUNK.pack(b"RIFF", end - _CHUNK.size) + data[_CHUNK.size : end])


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    if size[0] * size[1] > limits.max_pixels:
        raise too_large(f"have {size[0]} x {size[1]}", limits)


def _chunks(descriptor: int) -> tuple[tuple[int, int], list[int]]:
    """Return the size that the header tells of, (0, 0) if it tells none, and how long each frame is shown."""
    canvas, milliseconds = (0, 0), []
    at, end = _FIRST_CHUNK_AT, os.fstat(descriptor).st_size
    while at + _CHUNK.size <= end:
        name, size = _CHUNK.unpack(os.pread(descriptor, _CHUNK.size, at))
        body = os.pread(descriptor, 16, at + _CHUNK.size).ljust(16, b"\0")
        if name == b"VP8X":
            canvas = _number(body[4:7]) + 1, _number(body[7:10]) + 1
        elif name == b"ANMF":
            milliseconds.append(_number(body[12:15]))
        at += _CHUNK.size + size + size % 2
    return canvas, milliseconds


def _number(body: bytes) -> int:
    return int.from_bytes(body, "little")
