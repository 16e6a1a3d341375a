"""The videos that users ask about: H.264 clips made once, some sent again and again, some new each time."""

from __future__ import annotations

import base64
import os
import random
import struct
import tempfile
from pathlib import Path

from demo.clip import write_clip

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "loadtest"
SERIAL_BYTES = 16  # with the box's header 24 bytes: a multiple of three, so its base64 can be appended


def free_box(content: bytes) -> bytes:
    """Return the ISO base media box that readers skip, to stand at the end of an MP4."""
    return struct.pack(">I4s", 8 + len(content), b"free") + content


class Video:
    """One clip, and any number of copies of it that no cache contains."""

    def __init__(self, clip: bytes) -> None:
        """Encode the clip once; filled up so that the base64 of a copy is this and the base64 of its last box."""
        filled = clip + free_box(bytes(-(len(clip) + 8) % 3))
        self._stem = "data:video/mp4;base64," + base64.b64encode(filled).decode()

    @property
    def url(self) -> str:
        """The clip as a data URL, always the same."""
        return self._stem

    def new_url(self) -> str:
        """Return a copy that no cache knows: the same pictures in a file of another content."""
        return self._stem + base64.b64encode(free_box(os.urandom(SERIAL_BYTES))).decode()


class Library:
    """The clips of a test: `num_clips` of each size."""

    def __init__(self, *, sizes: list[tuple[int, int]], num_clips: int, frames: int) -> None:
        """Read the clips, made now where they are not there."""
        self._videos = [
            Video(_clip(width, height, frames=frames, seed=seed))
            for width, height in sizes
            for seed in range(num_clips)
        ]

    def pick(self, *, repeat_share: float) -> str:
        """Return the data URL of a video, with that probability one that was sent before or will be again."""
        video = random.choice(self._videos)
        return video.url if random.random() < repeat_share else video.new_url()


def sizes_in(text: str) -> list[tuple[int, int]]:
    """Return the sizes in text like `480x360,1280x720`; raise ValueError if there are none or odd ones."""
    sizes = []
    for item in text.split(","):
        width, cross, height = item.strip().partition("x")
        if not (cross and width.isdecimal() and height.isdecimal()) or 0 in (int(width), int(height)):
            raise ValueError(f"sizes must be like 480x360,1280x720, got {text}")
        if int(width) % 2 or int(height) % 2:
            raise ValueError(f"width and height must be even for H.264, got {item.strip()}")
        sizes.append((int(width), int(height)))
    return sizes


def _clip(width: int, height: int, *, frames: int, seed: int) -> bytes:
    path = CACHE / f"{width}x{height}-{frames}-{seed}.mp4"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as directory:  # workers beside this one may make the same
            made = Path(directory) / path.name
            write_clip(made, frames=frames, height=height, width=width, seed=seed)
            made.replace(path)
    return path.read_bytes()
