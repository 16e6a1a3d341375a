"""What a video is to a model: how many frames, and how large."""

from dataclasses import dataclass

from server.engines import budget
from server.engines.profile import VideoRules


@dataclass(frozen=True)
class VideoShape:
    """A video as it is handed over: frames, and their size in pixels."""

    frames: int
    height: int
    width: int
    duration_seconds: float

    def tokens_before(self, rules: VideoRules) -> int:
        """Return its tokens before the reduction."""
        return budget.tokens_before(rules, frames=self.frames, height=self.height, width=self.width)

    def tokens_after(self, rules: VideoRules, retention: float) -> int:
        """Return the tokens that are left at a retention."""
        return budget.tokens_after(rules, retention, frames=self.frames, height=self.height, width=self.width)
