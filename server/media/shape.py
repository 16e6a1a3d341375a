"""What a video is to a model: how many frames, how large, and how many tokens they become."""

import math
from dataclasses import dataclass

from server.engines.profile import GridTokens, VideoRules
from server.reader.frames_file import FramesHeader
from server.reader.sizes import model_size


@dataclass(frozen=True)
class VideoShape:
    """Frames as they are handed over, and their size in pixels."""

    frames: int
    height: int
    width: int

    @classmethod
    def of(cls, header: FramesHeader) -> "VideoShape":
        """Return the shape of the frames in a file."""
        return cls(header.frames, header.height, header.width)

    def tokens_before(self, rules: VideoRules) -> int:
        """Return the number of tokens before the reduction."""
        units, per_unit = self._grid(rules)
        return units * per_unit + rules.tokens.extra

    def tokens_after(self, rules: VideoRules, retention: float) -> int:
        """Return the number of tokens that are left: that share of all, rounded, and at least one a unit of frames."""
        units, per_unit = self._grid(rules)
        tokens = units * per_unit
        return max(units, min(tokens, round(retention * tokens))) + rules.tokens.extra

    def text_around(self, rules: VideoRules) -> int:
        """Return the number of text tokens that the model's processor writes around the video and its units, about."""
        units, _ = self._grid(rules)
        return rules.tokens.text_per_video + units * rules.tokens.text_per_unit

    def model_size(self, rules: VideoRules) -> tuple[int, int]:
        """Return the height and the width that the model's processor makes of the frames."""
        return model_size(rules.size.model_dump(), (self.height, self.width), num_frames=self.frames)

    def _grid(self, rules: VideoRules) -> tuple[int, int]:
        """Return the units of frames that tokens are made of, and the tokens of a unit."""
        tokens = rules.tokens
        units = math.ceil(self.frames / tokens.frames_per_unit)
        if not isinstance(tokens, GridTokens):
            return units, tokens.per_unit
        height, width = self.model_size(rules)
        return units, (height // tokens.cell) * (width // tokens.cell)
