"""What is found out about a medium, and what it is allowed to be."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What videos, and where it applies audio clips, are allowed."""

    max_seconds: float
    max_pixels: int
    """Width x height."""
    max_frames: int
    sampled_frames: int
    """How many frames of a video an engine looks at, at most."""


@dataclass(frozen=True)
class Facts:
    """What a medium holds. A video's duration, frames and size come from its packets, whatever the header claims."""

    container: str
    codec: str
    width: int = 0
    """As displayed."""
    height: int = 0
    duration_seconds: float = 0.0
    """Of a video, how long its pictures last."""
    frames: int = 0
    """How many are shown."""
    fps: float = 0.0
    decoded_bytes: int = 0
    """What it takes in an engine's memory: three bytes a pixel of the sampled frames, four a sample of audio."""


class ReadError(Exception):
    """The medium can't be read, breaks a limit, or reading it broke or outran its own. The text is fit for a client."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        """Keep the code that the client gets, if the kind's own does not say enough."""
        super().__init__(message)
        self.code = code
