"""What a video shows, found out by decoding all of it: what the gateway's reader is compared with.

    python bench/full_decode.py < LIST

The work is libav's and Pillow's alone. libav guesses the container, each frame that comes out counts, and nothing of
the gateway's reader is used. Run as a script, it reads paths, one a line, and answers each with a line of JSON.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer

THUMBNAIL = 12
"""Pixels a side."""
_SMALL = 8 * THUMBNAIL
_TURNS = (-180, -90, 90, 180)
LEAP_SECONDS = 10.0
"""A clock of a stream that is broadcast which goes so far in one step is another recording's."""
_BROADCAST = ("mpegts", "mpeg")


@dataclass
class Decoded:
    """All frames of a video, in the order in which they are shown."""

    frames: int = 0
    seconds: float = 0.0
    width: int = 0
    """Of the largest frame, as displayed."""
    height: int = 0
    codec: str = ""
    errors: int = 0
    """Packets that could not be decoded."""
    thumbnails: list[list[int]] = field(default_factory=list)
    """Of each frame, THUMBNAIL x THUMBNAIL shades of grey."""


def decode(path: str) -> Decoded:
    """Return what is in a file; raise an error of libav's or of Pillow's, or ValueError, if that is no video."""
    with open(path, "rb") as file:
        head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return _animation(path)
    import av

    av.logging.set_level(None)
    with av.open(path, metadata_errors="replace") as container:
        stream = _shown_stream(container)
        found = Decoded(codec=stream.codec_context.codec.canonical_name)
        stream.codec_context.thread_count = 1  # several threads make up other pictures for what is damaged
        times: list[float | None] = []
        last = 0.0
        for frame in _frames(container, stream, found):
            turned = frame.rotation in _TURNS and frame.rotation % 180 != 0
            width, height = (frame.height, frame.width) if turned else (frame.width, frame.height)
            if width * height > found.width * found.height:
                found.width, found.height = width, height
            found.thumbnails.append(_thumbnail(_upright(frame)))
            times.append(frame.time)
            last = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
        found.frames = len(times)
        interval = 1 / float(stream.guessed_rate or stream.average_rate or 25)
        most = LEAP_SECONDS if container.format.name in _BROADCAST else math.inf
        found.seconds = _seconds(times, last, interval, most=most)
    return found


def _shown_stream(container: InputContainer) -> VideoStream:
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    raise ValueError("no video stream")


def _frames(container: InputContainer, stream: VideoStream, found: Decoded) -> Iterator[VideoFrame]:
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError:
            found.errors += 1
            return
        try:
            yield from packet.decode()
        except av.FFmpegError:
            found.errors += 1


def _upright(frame: VideoFrame) -> Image.Image:
    """Return the frame in grey and as displayed, mirrored if it is displayed mirrored."""
    from av.sidedata.sidedata import Type

    small = frame
    if min(frame.width, frame.height) > _SMALL:
        small = frame.reformat(_SMALL, _SMALL, format="rgb24", interpolation="AREA", threads=1)
    image = Image.fromarray(small.to_ndarray(format="rgb24")).convert("L")
    try:
        data = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError:  # something else that PyAV has no name for
        return image.rotate(frame.rotation, expand=True) if frame.rotation in _TURNS else image
    if data is None or frame.rotation not in (0, *_TURNS):
        return image
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()
    if a * d - b * c < 0:  # mirrored; FFmpeg's rotation is that of the matrix without it
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        a, b = -a, -b
    return image.rotate(round(-np.degrees(np.arctan2(b, a)) / 90) * 90, expand=True)


def _thumbnail(image: Image.Image) -> list[int]:
    small = image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return [int(shade) for shade in np.asarray(small).ravel()]


def _seconds(times: list[float | None], last: float, interval: float, *, most: float) -> float:
    """Return how long frames are shown, the last of them `last` or as most.

    A step of the clock back, or further than `most`, counts as one frame.
    """
    known = [time for time in times if time is not None]
    if len(known) < len(times) or len(known) < 2:
        return (last or interval) * len(times)
    steps = [after - before for before, after in itertools.pairwise(known)]
    if sum(step < 0 for step in steps) > len(steps) / 8:  # a container that tells no time of display
        return interval * len(known)
    forward = [step for step in steps if 0 < step < most] or [interval]
    usual = statistics.median(forward)
    return sum(step if 0 <= step < most else usual for step in steps) + (last or usual)


def _animation(path: str) -> Decoded:
    with Image.open(path) as image:
        found = Decoded(width=image.width, height=image.height, codec="webp")
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            found.thumbnails.append(_thumbnail(image.convert("RGB")))
            found.seconds += (image.info.get("duration") or 100) / 1000
            found.frames += 1
    return found


def answer() -> None:
    """Answer each path on standard input; what can't be decoded with why not."""
    Image.MAX_IMAGE_PIXELS = None
    for line in sys.stdin:
        try:
            found = asdict(decode(line.rstrip("\n")))
        except Exception as exc:  # libav's and Pillow's errors, and those of their bindings
            found = {"error": f"{type(exc).__name__}: {getattr(exc, 'strerror', None) or exc}".splitlines()[0]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    answer()
