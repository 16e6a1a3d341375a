"""Where the tokens of a reduced video go: index tensors that follow from counts alone.

Made on the host and kept per layout and device, so that no index is ever found by looking at data on the device.

Dimensions: T frames, A anchors of a frame, C clips (the longest first), n clips running at a step, K tokens that
survive.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain

import torch
from torch import Tensor

from aot_vllm.config import check_integer
from aot_vllm.errors import SettingError


@dataclass(frozen=True)
class Step:
    """One frame of every clip that still has one, at the same distance from its key frame."""

    frames_apart: int
    frames: Tensor
    """(n,) the frames, in the order of the clips."""
    keep: Tensor
    """(n, 1) how many tokens each of them keeps."""
    least_kept: int
    most_kept: int
    """The smallest and the largest of `keep`."""


@dataclass(frozen=True)
class ClipLayout:
    """How to walk through the clips, and how to line up what comes out.

    The candidates for the output are the slots of all originals, of what each step keeps, and of the merged anchors,
    each padded to its largest count and flattened one after the other.
    """

    key_frames: Tensor
    """(C,) the first frame of every clip."""
    steps: tuple[Step, ...]
    originals: Tensor
    """(C, 1) how many anchors of each key frame are emitted as they were."""
    most_originals: int
    """The largest of `originals`."""
    ranks: Tensor
    """(A,) ascending from 0."""
    frames: Tensor
    """(K,) the frame of each output token."""
    candidates: Tensor
    """(K,) the candidate whose slot each output token has."""
    merged_rows: Tensor
    """(C * A,) the output rows of the merged anchors."""


def check_clip_lengths(clip_lengths: Sequence[int], *, frames: int) -> tuple[int, ...]:
    """Return the lengths; raises `SettingError` for those that are not at least 1 each and `frames` together."""
    lengths = tuple(check_integer("a clip length", length, minimum=1) for length in clip_lengths)
    if sum(lengths) != frames:
        raise SettingError(f"clip_lengths must sum to {frames}, the frames of tokens, got {lengths}")
    return lengths


def check_keep(keep: int | Sequence[int], *, frames: int, anchors: int) -> tuple[int, ...]:
    """Return one count a frame; raises `SettingError` for another number of them, or for one outside 0 to `anchors`."""
    return check_counts("keep", keep if isinstance(keep, Sequence) else (keep,) * frames, frames, anchors)


def check_counts(name: str, counts: Sequence[int], expected: int, anchors: int) -> tuple[int, ...]:
    """Return the counts; raises `SettingError` where they are not as many as expected, or not in 0 to `anchors`."""
    if len(counts) != expected:
        raise SettingError(f"{name} must have {expected} counts, got {len(counts)}")
    if max(check_integer(name, count, minimum=0) for count in counts) > anchors:
        raise SettingError(f"{name} must be at most {anchors}, the anchors of a frame, got {max(counts)}")
    return tuple(counts)


@lru_cache(maxsize=64)
def clip_layout(
    clip_lengths: tuple[int, ...],
    keep_per_frame: tuple[int, ...],
    originals_per_clip: tuple[int, ...],
    num_anchors: int,
    device: torch.device,
    *,
    merged_first: bool = False,
) -> ClipLayout:
    """Return the layout of clips of these lengths; counts are at most `num_anchors`.

    A clip's merged anchors come behind what its frames keep, or before it.
    """
    starts = list(accumulate(clip_lengths, initial=0))[:-1]
    order = sorted(range(len(clip_lengths)), key=lambda clip: -clip_lengths[clip])

    def frames_at(step: int) -> list[int]:
        return [starts[clip] + step for clip in order if clip_lengths[clip] > step]

    # The most of each stage of the output: the originals, the kept tokens step by step, the merged anchors.
    kept = [max(keep_per_frame[frame] for frame in frames_at(step)) for step in range(1, max(clip_lengths))]
    stage_widths = [max(originals_per_clip), *kept, num_anchors]
    stage_sizes = [len(order) * stage_widths[0], *(len(frames_at(i + 1)) * width for i, width in enumerate(kept))]
    stage_starts = list(accumulate(stage_sizes, initial=0))

    frames: list[int] = []
    candidates: list[range] = []
    merged_rows: dict[int, range] = {}

    def emit_merged(clip: int) -> None:
        merged_rows[clip] = range(len(frames), len(frames) + num_anchors)
        frames.extend([starts[clip]] * num_anchors)
        candidates.append(range(stage_starts[-1], stage_starts[-1] + num_anchors))

    for clip, (start, length) in enumerate(zip(starts, clip_lengths, strict=True)):
        if merged_first:
            emit_merged(clip)
        counts = [originals_per_clip[clip], *keep_per_frame[start + 1 : start + length]]
        place = order.index(clip)
        for step, count in enumerate(counts):
            first = stage_starts[step] + place * stage_widths[step]
            frames += [start + step] * count
            candidates.append(range(first, first + count))
        if not merged_first:
            emit_merged(clip)

    def index(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return ClipLayout(
        key_frames=index(frames_at(0)),
        steps=tuple(
            Step(step, index(at), index(counts).unsqueeze(1), min(counts), max(counts))
            for step in range(1, max(clip_lengths))
            for at in [frames_at(step)]
            for counts in [[keep_per_frame[frame] for frame in at]]
        ),
        originals=index([originals_per_clip[clip] for clip in order]).unsqueeze(1),
        most_originals=stage_widths[0],
        ranks=index(list(range(num_anchors))),
        frames=index(frames),
        candidates=index(list(chain.from_iterable(candidates))),
        merged_rows=index(list(chain.from_iterable(merged_rows[clip] for clip in order))),
    )
