"""How a request's videos are handed to the engine: which frames are sampled, and how large they are."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from server.aliases import Sampling
from server.engines.budget import handed_size
from server.engines.profile import FRAMES_FORMAT, UniformSampling, VideoRules
from server.errors import SamplingRefused


@dataclass(frozen=True)
class Handover:
    """The rules of the model's engines, and what the request asks for within them."""

    rules: VideoRules
    sampling: Sampling
    full_size: bool
    """Whether frames are handed over as large as they are, whatever the model makes of them."""

    @property
    def most_frames(self) -> int:
        """The most frames that a video may have: the alias's bound or the model's own, within what was profiled."""
        own = self.rules.sampling
        default = own.num_frames if isinstance(own, UniformSampling) else own.max_frames
        return min(self.sampling.max_frames or default, self.rules.max_frames)

    @property
    def fingerprint(self) -> str:
        """What decides, besides a video's content, which bytes an engine gets."""
        told: dict[str, Any] = {
            "format": FRAMES_FORMAT,
            "sampling": self.rules.sampling.model_dump(),
            "size": None if self.full_size else self.rules.size.model_dump(),
            "most": self.most_frames,
            "asked": asdict(self.sampling),
        }
        return json.dumps(told, sort_keys=True)

    def size_of(self, *, frames: int, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) at which frames are handed over."""
        if self.full_size:
            return height, width
        return handed_size(self.rules, frames=frames, height=height, width=width)


def handover(rules: VideoRules | None, sampling: Sampling, *, full_size: bool) -> Handover | None:
    """Return how videos are handed over, None if they are handed over as they are.

    Raises SamplingRefused for frames that can't be asked of these engines.
    """
    if rules is None:
        for name, value in (
            ("frames", sampling.frames),
            ("fps", sampling.fps),
            ("start", sampling.start_seconds),
            ("end", sampling.end_seconds),
        ):
            if value is not None:
                raise SamplingRefused(
                    f"aot.{name} can't be used with this model: its engine samples videos itself", param=f"aot.{name}"
                )
        return None
    way = Handover(rules, sampling, full_size)
    if sampling.frames is not None and sampling.frames > way.most_frames:
        raise SamplingRefused(
            f"aot.frames must be in [1, {way.most_frames}] for this model, got {sampling.frames}", param="aot.frames"
        )
    return way
