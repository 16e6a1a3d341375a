"""What is asked of the reader of videos, and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.reader.facts import Facts
from server.reader.frames_file import FramesHeader


@dataclass(frozen=True)
class Wanted:
    """What is to be read of a video."""

    sampling: Mapping[str, Any]
    """The engine's rule, as it tells it."""
    max_bytes: int
    """What the frames may take, uncompressed."""
    size: Mapping[str, Any] | None = None
    """The size that the engine's processor makes of frames, as it tells it; None for frames as they are."""
    start: float = 0.0
    """Seconds; frames are taken from here on."""
    end: float | None = None
    num_frames: int | None = None
    """Instead of what the rule says."""
    fps: float | None = None


@dataclass(frozen=True)
class Reading:
    """What was read."""

    facts: Facts
    header: FramesHeader
