"""Clips for benchmarks of the media path: ten seconds are encoded once, longer ones repeat their packets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "bench" / "clips"
RATE = 25
PERIOD_SECONDS = 10
SIZES = {"240p": (240, 426), "480p": (480, 854), "720p": (720, 1280), "1080p": (1080, 1920)}
"""Height and width."""
# Key frames are where the encoders put them by default: every 250 frames for the x26 ones, every 128 for libvpx, every
# five seconds for SVT-AV1.
CODECS = {
    "h264": ("libx264", "mp4", {"preset": "medium", "crf": "23", "g": "250", "bf": "3"}),
    "hevc": ("libx265", "mp4", {"preset": "fast", "crf": "26", "x265-params": "log-level=none"}),
    "vp9": ("libvpx-vp9", "webm", {"deadline": "good", "cpu-used": "5", "crf": "34", "b": "0", "row-mt": "1"}),
    "av1": ("libsvtav1", "mp4", {"preset": "9", "crf": "35"}),
}


@dataclass(frozen=True)
class Kind:
    """A codec, a size of SIZES and a length in seconds, a multiple of PERIOD_SECONDS unless it is shorter."""

    codec: str
    size: str
    seconds: int

    @property
    def name(self) -> str:
        """What tables call it."""
        length = f"{self.seconds // 60} min" if self.seconds % 60 == 0 else f"{self.seconds} s"
        return f"{self.codec} {self.size} {length}"


def pictures(height: int, width: int, frames: int) -> Iterator[np.ndarray]:
    """Give frames, (height, width, 3) uint8: a detailed view that is panned, things that cross it, grain."""
    rng = np.random.default_rng(5)
    high, wide = height + frames, width + 3 * frames
    view = np.zeros((high, wide, 3), np.float32)
    for cell, depth in ((96, 60), (24, 26), (6, 12), (2, 6)):
        coarse = rng.normal(0, depth, (high // cell + 2, wide // cell + 2, 3)).astype(np.float32)
        view += coarse.repeat(cell, axis=0).repeat(cell, axis=1)[:high, :wide]
    view = np.clip(view + 128, 16, 240).astype(np.int16)
    grain = rng.normal(0, 2, (height + 64, width + 64, 1)).round().astype(np.int16)
    side = height // 5
    for number in range(frames):
        picture = view[number : number + height, 3 * number : 3 * number + width].copy()
        for thing, (speed, shade) in enumerate(((5, 230), (-7, 30), (11, 150))):
            left = (speed * number + thing * width // 3) % (width - side)
            top = (height - side) * (thing + 1) // 4
            picture[top : top + side, left : left + side, thing] = shade
        y, x = rng.integers(0, 64, 2)
        yield np.clip(picture + grain[y : y + height, x : x + width], 0, 255).astype(np.uint8)


def clip(kind: Kind) -> Path:
    """Return a clip's file, made now if it is not there."""
    path = CACHE / f"{kind.codec}-{kind.size}-{kind.seconds}.{CODECS[kind.codec][1]}"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    if kind.seconds <= PERIOD_SECONDS:
        _encode(kind, unfinished)
    else:
        _repeat(clip(Kind(kind.codec, kind.size, PERIOD_SECONDS)), unfinished, kind)
    unfinished.rename(path)
    return path


def marking(path: Path, mark: str) -> bytes:
    """Return bytes to put behind a clip that make it another file, and the same video: readers skip them."""
    body = mark.encode()
    if path.suffix == ".mp4":
        return (8 + len(body)).to_bytes(4, "big") + b"free" + body
    return b"\xec" + (0x4000 | len(body)).to_bytes(2, "big") + body  # EBML's Void


def _encode(kind: Kind, path: Path) -> None:
    encoder, container, options = CODECS[kind.codec]
    height, width = SIZES[kind.size]
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        with av.open(str(path), "w", format=container) as output:
            stream = output.add_stream(encoder, rate=RATE, options=options)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for picture in pictures(height, width, kind.seconds * RATE):
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            output.mux(stream.encode(None))
    finally:  # SVT-AV1 makes the thread that calls it a real-time one, if it may
        os.sched_setscheduler(0, policy, parameters)


def _repeat(source: Path, path: Path, kind: Kind) -> None:
    with av.open(str(source)) as one, av.open(str(path), "w", format=CODECS[kind.codec][1]) as output:
        video = one.streams.video[0]
        stream = output.add_stream_from_template(video, opaque=True)
        packets = [packet for packet in one.demux(video) if packet.size]
        assert video.time_base is not None
        period = round(PERIOD_SECONDS / video.time_base)
        for turn in range(kind.seconds // PERIOD_SECONDS):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts = packet.pts + turn * period, packet.dts + turn * period
                copy.duration, copy.time_base, copy.is_keyframe = packet.duration, packet.time_base, packet.is_keyframe
                copy.stream = stream
                output.mux(copy)
