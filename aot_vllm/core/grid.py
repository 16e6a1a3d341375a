"""The size of a video in tokens, as the language model receives it."""

from dataclasses import dataclass

from aot_vllm.config import check_integer


@dataclass(frozen=True)
class VideoGrid:
    """A video of `frames` temporal units with `rows` x `cols` tokens each, after the model's own pooling or merging.

    Raises `SettingError` unless all three are integers of at least 1.
    """

    frames: int
    rows: int
    cols: int

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("frames", "rows", "cols"):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), minimum=1))

    @property
    def positions(self) -> int:
        """Number of tokens of one frame."""
        return self.rows * self.cols

    @property
    def tokens(self) -> int:
        """Number of tokens of the whole video before the reduction."""
        return self.frames * self.positions
