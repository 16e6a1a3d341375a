"""Which frames of a video an engine looks at: the rules of vLLM's loaders, which name frames by number.

Each rule is vLLM 0.32's, to the index (vllm/multimodal/video.py), applied to the video's own facts. Where a rule of
vLLM's divides by zero or leaves a model too few frames, the last frame is given again.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

LOADER_MAX_FRAMES = 768  # Qwen2VLVideoBackend._MAX_FRAMES, Qwen3VLVideoBackend._MAX_FRAMES
LOADER_MAX_FPS = 30
# torch.arange on a CPU: of so many floats it rounds the first to float32 and counts on from there, so often at once;
# what is left over it counts from 0.
FLOATS_IN_VECTOR, VECTORS_AT_ONCE = 8, 2


@dataclass(frozen=True)
class Clip:
    """What is sampled: so many frames, so many a second, so many seconds long."""

    num_frames: int
    fps: float
    duration: float


@dataclass(frozen=True)
class Uniform:
    """At even distances over the whole, both ends included: the loader `opencv`."""

    num_frames: int
    fps: float = -1

    def indices(self, clip: Clip) -> list[int]:
        """Return the smaller of so many frames, and so many a second; all of them for -1."""
        count = clip.num_frames
        if self.num_frames > 0:
            count = min(count, self.num_frames)
        if self.fps > 0:
            count = min(count, math.floor(clip.duration * self.fps))
        count = max(1, count)
        if count == clip.num_frames:
            return list(range(count))
        return [int(index) for index in np.linspace(0, clip.num_frames - 1, count, dtype=int)]

    def with_num_frames(self, num_frames: int) -> "Uniform":
        """Return the rule that takes so many frames."""
        return Uniform(num_frames)

    def with_fps(self, fps: float) -> "Uniform":
        """Return the rule that takes so many frames a second, and not more frames than this one."""
        return replace(self, fps=fps)


@dataclass(frozen=True)
class Qwen2VL:
    """So many frames a second, a multiple of `frame_factor`, from the first on: the loader `qwen2_vl`."""

    fps: float = 2
    min_frames: int = 4
    max_frames: int = LOADER_MAX_FRAMES
    frame_factor: int = 2

    def indices(self, clip: Clip) -> list[int]:
        """Return the frames that begin equal parts of the video."""
        factor, total = self.frame_factor, clip.num_frames
        most = min(self.max_frames, LOADER_MAX_FRAMES, total) // factor * factor
        if most < factor:
            return [min(index, total - 1) for index in range(factor)]
        wanted = total / clip.fps * min(self.fps, LOADER_MAX_FPS)
        count = math.floor(min(max(wanted, self.min_frames), most) / factor) * factor
        count = max(count, factor)
        return _counted_in_float32(total, total / count)

    def with_num_frames(self, num_frames: int) -> "Qwen2VL":
        """Return the rule that takes so many frames, less what is over a multiple of `frame_factor`."""
        return replace(self, min_frames=num_frames, max_frames=num_frames)

    def with_fps(self, fps: float) -> "Qwen2VL":
        """Return the rule that takes so many frames a second."""
        return replace(self, fps=fps)


@dataclass(frozen=True)
class Qwen3VL:
    """So many frames a second, both ends included: the loader `qwen3_vl`."""

    fps: float = 2
    min_frames: int = 4
    max_frames: int = LOADER_MAX_FRAMES

    def indices(self, clip: Clip) -> list[int]:
        """Return frames at even distances."""
        total = clip.num_frames
        if total < 2:
            return [0, 0]
        count = int(total / clip.fps * min(self.fps, LOADER_MAX_FPS))
        count = min(max(count, self.min_frames), self.max_frames, LOADER_MAX_FRAMES, total)
        return [int(index) for index in np.linspace(0, total - 1, count).round()]

    def with_num_frames(self, num_frames: int) -> "Qwen3VL":
        """Return the rule that takes so many frames."""
        return replace(self, min_frames=num_frames, max_frames=num_frames)

    def with_fps(self, fps: float) -> "Qwen3VL":
        """Return the rule that takes so many frames a second."""
        return replace(self, fps=fps)


Sampling = Uniform | Qwen2VL | Qwen3VL
_RULES: dict[str, Callable[..., Sampling]] = {"uniform": Uniform, "qwen2_vl": Qwen2VL, "qwen3_vl": Qwen3VL}


def sampling_from(told: Mapping[str, Any]) -> Sampling:
    """Return the rule that an engine told of; raise ValueError if it is none of these."""
    settings = dict(told)
    name = settings.pop("rule", None)
    if name not in _RULES:
        raise ValueError(f"rule must be one of {', '.join(_RULES)}, got {name}")
    try:
        return _RULES[name](**settings)
    except TypeError as exc:
        raise ValueError(f"{name}: {exc}") from exc


def _counted_in_float32(total: int, step: float) -> list[int]:
    """Return `torch.arange(0, total, step).int()` on a CPU, no index beyond the last frame."""
    position = np.arange(math.ceil(total / step))
    at_once = FLOATS_IN_VECTOR * VECTORS_AT_ONCE
    in_vectors = position < len(position) // at_once * at_once
    place = position % FLOATS_IN_VECTOR * in_vectors
    begin = ((position - place) * step).astype(np.float32).astype(np.float64)
    times = (begin + place * step).astype(np.float32)
    return [int(index) for index in np.minimum(times.astype(int), total - 1)]
