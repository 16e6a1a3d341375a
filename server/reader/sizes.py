"""How large an engine's processor makes a video's frames, and how large it is enough to hand them over."""

import math
from collections.abc import Mapping
from typing import Any

MAX_ASPECT_RATIO = 200  # Qwen's processors refuse more

Size = tuple[int, int]
"""Height and width."""


def handed_over(told: Mapping[str, Any] | None, size: Size, *, num_frames: int) -> Size:
    """Return the size to scale frames to: the processor's own where that is smaller, never larger than they are.

    Frames stay as they are where the processor would come to another size from the smaller ones. Raises ValueError
    for a rule that isn't known.
    """
    target = None if told is None else _target(told, size, num_frames)
    if told is None or target is None:
        return size
    smaller = min(size[0], target[0]), min(size[1], target[1])
    return smaller if _target(told, smaller, num_frames) == target else size


def model_size(told: Mapping[str, Any], size: Size, *, num_frames: int) -> Size:
    """Return the size that the processor makes of frames; the same size if it refuses them."""
    return _target(told, size, num_frames) or size


def _target(told: Mapping[str, Any], size: Size, num_frames: int) -> Size | None:
    """Return what the processor makes of the size; None if it refuses."""
    rule = told.get("rule")
    if rule == "fixed":
        return int(told["height"]), int(told["width"])
    if rule != "smart_resize":
        raise ValueError(f"rule must be one of fixed, smart_resize, got {rule}")
    if told.get("over", "frame") == "video":
        return _smart_over_video(told, size, num_frames)
    return _smart(told, size, weight=1, cells=1)


def _smart_over_video(told: Mapping[str, Any], size: Size, num_frames: int) -> Size | None:
    """As Qwen3-VL's video processor: the limits are on all frames' pixels together."""
    factor, temporal_factor = told["factor"], told["temporal_factor"]
    if num_frames < temporal_factor:
        return None
    if min(size) < factor:
        scale = max(factor / size[0], factor / size[1])
        size = int(size[0] * scale), int(size[1] * scale)
    return _smart(told, size, weight=num_frames, cells=round(num_frames / temporal_factor) * temporal_factor)


def _smart(told: Mapping[str, Any], size: Size, *, weight: int, cells: int) -> Size | None:
    """As Qwen's `smart_resize`: multiples of `factor` that keep the pixels, times `cells`, within limits."""
    height, width = size
    factor, least, most = told["factor"], told["min_pixels"], told["max_pixels"]
    if max(size) / min(size) > MAX_ASPECT_RATIO:
        return None
    new = round(height / factor) * factor, round(width / factor) * factor
    if cells * new[0] * new[1] > most:
        beta = math.sqrt(weight * height * width / most)
        return (
            max(factor, math.floor(height / beta / factor) * factor),
            max(factor, math.floor(width / beta / factor) * factor),
        )
    if cells * new[0] * new[1] < least:
        beta = math.sqrt(least / (weight * height * width))
        return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return new
