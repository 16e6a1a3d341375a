"""The facts that the probe finds out about a medium, and the limits for them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits for a video. Those that apply to sound also hold for audio clips."""

    max_seconds: float
    max_pixels: int
    """Width x height of a frame."""
    max_frames: int
    sampled_frames: int
    """The largest number of frames that an engine samples from a video."""


@dataclass(frozen=True)
class Facts:
    """The facts about a medium.

    A video's duration, frames and size are measured on its packets, so that a header can't understate them.
    """

    container: str
    codec: str
    width: int = 0
    height: int = 0
    duration_seconds: float = 0.0
    frames: int = 0
    fps: float = 0.0
    decoded_bytes: int = 0
    """The size in an engine's memory: three bytes per pixel of the sampled frames, four bytes per audio sample."""


class ProbeError(Exception):
    """The medium can't be read, it exceeds a limit, or the probe itself failed or timed out.

    The message is for the client.
    """

    def __init__(self, message: str, *, code: str | None = None) -> None:
        """Keep the error code for the client. None means the general code for the medium's kind."""
        super().__init__(message)
        self.code = code
