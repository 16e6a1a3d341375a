"""How large a video becomes in a model, and how many tokens it has before and after the reduction."""

import math

from server.engines.profile import FixedSize, GridTokens, SmartResize, VideoRules


def handed_size(rules: VideoRules, *, frames: int, height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) at which frames are handed over, never larger than they are.

    Where only one side shrinks, the other one is left to the model's processor. That works if the processor comes to
    the same size from there; if it doesn't, frames are handed over as they are.
    """
    target = model_size(rules, frames=frames, height=height, width=width)
    smaller = (min(height, target[0]), min(width, target[1]))
    agrees = model_size(rules, frames=frames, height=smaller[0], width=smaller[1]) == target
    return smaller if agrees else (height, width)


def model_size(rules: VideoRules, *, frames: int, height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) that the model's processor makes of frames."""
    size = rules.size
    if isinstance(size, FixedSize):
        return size.height, size.width
    return _smart_resize(size, frames=frames, height=height, width=width)


def _smart_resize(size: SmartResize, *, frames: int, height: int, width: int) -> tuple[int, int]:
    """Return sides that are multiples of the factor, with about the same shape and pixels within the bounds."""
    factor = size.factor
    depth = math.ceil(frames / size.temporal_factor) * size.temporal_factor if size.over == "video" else 1
    tall, wide = (max(factor, round(side / factor) * factor) for side in (height, width))
    if depth * tall * wide > size.max_pixels:
        shrink = math.sqrt(frames_of(size, frames) * height * width / size.max_pixels)
        tall, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif depth * tall * wide < size.min_pixels:
        grow = math.sqrt(size.min_pixels / (frames_of(size, frames) * height * width))
        tall, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return tall, wide


def frames_of(size: SmartResize, frames: int) -> int:
    """Return the frames that the bounds on pixels are about: those of the video, or one."""
    return frames if size.over == "video" else 1


def tokens_before(rules: VideoRules, *, frames: int, height: int, width: int) -> int:
    """Return the tokens of a video of so many frames before the reduction."""
    units, per_unit = _grid(rules, frames=frames, height=height, width=width)
    return units * per_unit + rules.tokens.extra


def tokens_after(rules: VideoRules, retention: float, *, frames: int, height: int, width: int) -> int:
    """Return the tokens that are left at a retention: that share of all, rounded, and at least one a unit of frames."""
    units, per_unit = _grid(rules, frames=frames, height=height, width=width)
    return max(units, round(retention * units * per_unit)) + rules.tokens.extra


def _grid(rules: VideoRules, *, frames: int, height: int, width: int) -> tuple[int, int]:
    tokens = rules.tokens
    units = math.ceil(frames / tokens.frames_per_unit)
    if isinstance(tokens, GridTokens):
        tall, wide = model_size(rules, frames=frames, height=height, width=width)
        return units, (tall // tokens.cell) * (wide // tokens.cell)
    return units, tokens.per_unit
