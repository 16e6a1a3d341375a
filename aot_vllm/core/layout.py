"""Where the tokens of a reduced video go: index tensors that follow from counts alone.

No index depends on data, so nothing is read back from the device. Nor does the host wait for the device to take what
it sends: evenly spread counts are computed on the device, and the layout of clips is one copy from pinned memory, once
for each layout and device.

Dimensions: T frames, A anchors of a frame, C clips (the longest first), n clips running at a step, K tokens that
survive.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain

import torch
from torch import Tensor

from aot_vllm.config import check_integer
from aot_vllm.core.budget import spread
from aot_vllm.errors import SettingError


@dataclass(frozen=True)
class Step:
    """One frame of every clip that is long enough, all at the same distance from their key frames."""

    frames_apart: int
    frames: Tensor
    """(n,) the frames, in the order of the clips."""
    keep: Tensor
    """(n, 1) how many tokens each frame keeps."""
    least_kept: int
    most_kept: int
    """The smallest and the largest count in `keep`."""


@dataclass(frozen=True)
class ClipLayout:
    """How to walk through the clips, and how to line up the output.

    Every output token has a slot, its index among the anchors of its frame. The candidates are all slots that may be
    emitted, in one flat list: those of the originals, those kept at each step, and those of the merged anchors. Each of
    these stages is padded to its largest count.
    """

    key_frames: Tensor
    """(C,) the first frame of every clip."""
    steps: tuple[Step, ...]
    originals: Tensor
    """(C, 1) how many anchors of each key frame are emitted as they were."""
    most_originals: int
    """The largest count in `originals`."""
    ranks: Tensor
    """(A,) 0 to A - 1, ascending."""
    frames: Tensor
    """(K,) the frame of each output token."""
    candidates: Tensor
    """(K,) the index of each output token among the candidates."""
    merged_rows: Tensor
    """(C * A,) the output rows of the merged anchors."""


def check_clip_lengths(clip_lengths: Sequence[int], *, frames: int) -> tuple[int, ...]:
    """Return the lengths; raises `SettingError` unless each is at least 1 and their sum is `frames`."""
    lengths = tuple(check_integer("a clip length", length, minimum=1) for length in clip_lengths)
    if sum(lengths) != frames:
        raise SettingError(f"clip_lengths must sum to {frames}, the frames of tokens, got {lengths}")
    return lengths


def check_keep(keep: int | Sequence[int], *, frames: int, anchors: int) -> tuple[int, ...]:
    """Return one count for each frame; raises `SettingError` unless each of `frames` counts is in [0, `anchors`]."""
    return check_counts("keep", keep if isinstance(keep, Sequence) else (keep,) * frames, frames, anchors)


def check_counts(name: str, counts: Sequence[int], expected: int, anchors: int) -> tuple[int, ...]:
    """Return the counts; raises `SettingError` unless there are `expected` of them, each in [0, `anchors`]."""
    if len(counts) != expected:
        raise SettingError(f"{name} must have {expected} counts, got {len(counts)}")
    if max(check_integer(name, count, minimum=0) for count in counts) > anchors:
        raise SettingError(f"{name} must be at most {anchors}, the anchors of a frame, got {max(counts)}")
    return tuple(counts)


def counts_on(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return counts, (T,), on a device, without waiting for it.

    A budget spreads the tokens of all frames but the first evenly. Such counts are computed on the device. Any others
    are copied.
    """
    first, later = counts[0], tuple(counts[1:])
    if not any(later):
        counts_T = torch.zeros(len(counts), dtype=torch.long, device=device)
        counts_T[0].fill_(first)
        return counts_T
    tokens = sum(later)
    if later != spread(tokens, len(later)):
        return copied(counts, device)
    ends = torch.arange(-tokens, len(counts) * tokens, tokens, device=device).div_(len(later), rounding_mode="floor")
    counts_T = ends[1:] - ends[:-1]
    counts_T[0].fill_(first)
    return counts_T


def copied(values: Sequence[int], device: torch.device) -> Tensor:
    """Return a copy of integers on a device, (n,). On a GPU it is made from pinned memory, so the host does not wait.

    PyTorch keeps the pinned memory until the copy is done.
    """
    host = torch.tensor(values, dtype=torch.long, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


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
    """Return the layout of clips of these lengths. All counts are at most `num_anchors`.

    In the output, the merged anchors of a clip follow the tokens that its frames keep. With `merged_first` they precede
    them.
    """
    key_frames = list(accumulate(clip_lengths, initial=0))[:-1]
    longest_first = sorted(range(len(clip_lengths)), key=lambda clip: -clip_lengths[clip])
    frames_by_step = [
        [key_frames[clip] + step for clip in longest_first if clip_lengths[clip] > step]
        for step in range(max(clip_lengths))
    ]
    originals = [originals_per_clip[clip] for clip in longest_first]
    keep_by_step = [[keep_per_frame[frame] for frame in frames] for frames in frames_by_step[1:]]
    sections = _sections(clip_lengths, [originals, *keep_by_step], longest_first, num_anchors, merged_first)

    lists = [
        frames_by_step[0],
        originals,
        list(range(num_anchors)),
        [key_frames[s.clip] + s.step for s in sections for _ in s.candidates],
        list(chain.from_iterable(s.candidates for s in sections)),
        list(_merged_rows(sections, longest_first)),
        *frames_by_step[1:],
        *keep_by_step,
    ]
    tensors = copied(list(chain.from_iterable(lists)), device).split([len(values) for values in lists])
    firsts, counts, ranks, frames, candidates, merged_rows = tensors[:6]
    num_steps = len(keep_by_step)
    return ClipLayout(
        key_frames=firsts,
        steps=tuple(
            Step(step, in_step, keeps.unsqueeze(1), least_kept=min(keep), most_kept=max(keep))
            for step, (in_step, keeps, keep) in enumerate(
                zip(tensors[6 : 6 + num_steps], tensors[6 + num_steps :], keep_by_step, strict=True), start=1
            )
        ),
        originals=counts.unsqueeze(1),
        most_originals=max(originals),
        ranks=ranks,
        frames=frames,
        candidates=candidates,
        merged_rows=merged_rows,
    )


@dataclass(frozen=True)
class _Section:
    """Consecutive output tokens that come from one frame of one clip."""

    clip: int
    step: int
    candidates: range
    is_merged: bool = False


def _sections(
    clip_lengths: tuple[int, ...],
    counts_by_stage: list[list[int]],
    longest_first: list[int],
    num_anchors: int,
    merged_first: bool,
) -> list[_Section]:
    """Return the sections of the output in their order, clip by clip.

    `counts_by_stage`: how many originals each key frame emits, then how many tokens each frame of a step keeps. In each
    stage the clips are in the order `longest_first`, so the clips that are still running come first.
    """
    widths = [max(counts) for counts in counts_by_stage]
    sizes = [len(counts) * width for counts, width in zip(counts_by_stage, widths, strict=True)]
    starts = list(accumulate(sizes, initial=0))
    sections: list[_Section] = []
    for clip, length in enumerate(clip_lengths):
        place = longest_first.index(clip)
        emitted = []
        for step in range(length):
            first = starts[step] + place * widths[step]
            emitted.append(_Section(clip, step, range(first, first + counts_by_stage[step][place])))
        merged = _Section(clip, 0, range(starts[-1], starts[-1] + num_anchors), is_merged=True)
        sections += [merged, *emitted] if merged_first else [*emitted, merged]
    return sections


def _merged_rows(sections: list[_Section], longest_first: list[int]) -> Iterator[int]:
    """Yield the output rows of the merged anchors, the longest clip first."""
    first_rows = accumulate((len(section.candidates) for section in sections), initial=0)
    rows = {
        section.clip: range(first, first + len(section.candidates))
        for section, first in zip(sections, first_rows, strict=False)  # the last of `first_rows` is the end
        if section.is_merged
    }
    return chain.from_iterable(rows[clip] for clip in longest_first)
