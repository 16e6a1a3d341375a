"""The whole reduction of one video, as the method section tells it.

Dimensions: T frames, P positions of a frame, A anchors of a frame, D width, K tokens that survive.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from aot_vllm.config import AOTConfig
from aot_vllm.core.anchors import select_anchors, select_diverse_anchors
from aot_vllm.core.budget import Budget, budget
from aot_vllm.core.grid import VideoGrid
from aot_vllm.core.transport import absorb_frames, merge_across_frames
from aot_vllm.errors import ShapeError


@dataclass(frozen=True)
class ReducedVideo:
    """The tokens that survive, (K, D), and the frame, row and column each came from, all (K,).

    `iterations` and `converged` have one entry for each transport problem solved, on the device of the tokens: reading
    them is up to the caller, when it may wait for the device.
    """

    tokens: Tensor
    frames: Tensor
    rows: Tensor
    cols: Tensor
    budget: Budget
    iterations: Tensor
    converged: Tensor

    @property
    def unconverged(self) -> Tensor:
        """How many solves ran out of iterations, a tensor of no dimensions: nothing is read from the device."""
        return (~self.converged).sum()


def reduce_video(
    features: Tensor,
    local_scores: Tensor | None,
    global_scores: Tensor | None,
    *,
    grid: VideoGrid,
    retention: float,
    config: AOTConfig | None = None,
    compared: int | None = None,
) -> ReducedVideo:
    """Return the reduced video: features (T, P, D), scores (T, P) -> exactly `budget(...).total` tokens.

    `retention` in (0, 1] is the fraction of tokens kept; at 1 the input comes back unchanged. Scores are needed where
    `config` has anchors chosen by attention, and may be None otherwise. Tokens have the type of `features`; everything
    is accumulated in float32. Nothing waits for the device. Where a model hands its language model several features of
    a token side by side, `compared` is the width of the first: the plan follows from it alone, and the same plan merges
    the others. Raises `ShapeError` for tensors that do not fit the grid and `SettingError` for a retention outside its
    range. Section 3 of the paper.
    """
    config = config or AOTConfig()
    counts = budget(grid, retention=retention, config=config)
    _check_shapes(features, {"local_scores": local_scores, "global_scores": global_scores}, grid)
    if compared is not None and not 1 <= compared <= features.shape[2]:
        raise ShapeError(f"compared must be in [1, {features.shape[2]}], the width of features, got {compared}")
    if counts.identity:
        return _unchanged(features, grid, counts)

    order_TA = _diverse_order(features[:, :, :compared], counts) if config.anchors == "diverse" else None

    def anchors_of(part: _Part) -> tuple[Tensor, Tensor | None]:
        if order_TA is not None:
            return order_TA[part.frames, : part.anchors].sort(dim=1)
        if local_scores is None or global_scores is None:
            raise ShapeError("local_scores and global_scores must be tensors, for anchors are chosen by attention")
        anchors_TA = select_anchors(
            local_scores[part.frames],
            global_scores[part.frames],
            rows=grid.rows,
            cols=grid.cols,
            count=part.anchors,
            global_ratio=config.global_ratio,
            window=config.window,
        )
        if config.kappa < 1:
            return anchors_TA, None  # what matches the key frame least is kept
        received_TA = global_scores[part.frames].gather(1, anchors_TA)
        return anchors_TA, received_TA.argsort(dim=1, descending=True, stable=True).argsort(dim=1)

    parts = [
        _reduce_part(features, *anchors_of(part), part, counts=counts, grid=grid, config=config, compared=compared)
        for part in _parts(counts)
    ]
    whole = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    tokens_KD, frames_K, cells_K, iterations, converged = whole
    return ReducedVideo(tokens_KD, frames_K, cells_K // grid.cols, cells_K % grid.cols, counts, iterations, converged)


def _diverse_order(features: Tensor, counts: Budget) -> Tensor:
    """Return the anchors of every frame in the order of their choice, (T, A), A those of the first clip's frames.

    A clip with fewer has the first of them.
    """
    clips = zip(counts.anchors_per_clip, counts.clip_lengths, strict=True)
    anchors_per_frame = [anchors for anchors, length in clips for _ in range(length)]
    keep = list(map(min, counts.per_frame, anchors_per_frame))  # which counts what is emitted twice once
    return select_diverse_anchors(features, count=anchors_per_frame[0], keep=keep)


@dataclass(frozen=True)
class _Part:
    """Neighbouring clips with the same number of anchors, which are reduced together."""

    anchors: int
    clips: slice
    frames: slice


def _parts(counts: Budget) -> Iterator[_Part]:
    """Yield the one or two runs of clips with equally many anchors."""
    first_frames = list(accumulate(counts.clip_lengths, initial=0))
    first_clip = 0
    for anchors, clips in groupby(counts.anchors_per_clip):
        end_clip = first_clip + len(list(clips))
        yield _Part(anchors, slice(first_clip, end_clip), slice(first_frames[first_clip], first_frames[end_clip]))
        first_clip = end_clip


def _reduce_part(
    features: Tensor,
    anchors_TA: Tensor,
    ranks_TA: Tensor | None,
    part: _Part,
    *,
    counts: Budget,
    grid: VideoGrid,
    config: AOTConfig,
    compared: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return a part's tokens, their frames and positions, and the iterations and convergence of its solves."""
    size = {"rows": grid.rows, "cols": grid.cols}
    within = absorb_frames(features[part.frames], anchors_TA, **size, config=config, compared=compared)
    across = merge_across_frames(
        within.tokens,
        clip_lengths=counts.clip_lengths[part.clips],
        keep=counts.keep_per_frame[part.frames],
        config=config,
        originals=counts.originals_per_clip[part.clips],
        ranks=ranks_TA,
        compared=compared,
    )
    return (
        across.tokens,
        across.frames + part.frames.start,
        anchors_TA[across.frames, across.slots],
        torch.cat([within.iterations, across.iterations]),
        torch.cat([within.converged, across.converged]),
    )


def _unchanged(features: Tensor, grid: VideoGrid, counts: Budget) -> ReducedVideo:
    """Return the video with all its tokens, in the order of frames and positions."""
    index_K = torch.arange(grid.tokens, device=features.device)
    cells_K = index_K % grid.positions
    return ReducedVideo(
        tokens=features.reshape(grid.tokens, -1),
        frames=index_K // grid.positions,
        rows=cells_K // grid.cols,
        cols=cells_K % grid.cols,
        budget=counts,
        iterations=index_K[:0],
        converged=index_K[:0].bool(),
    )


def _check_shapes(features: Tensor, scores: Mapping[str, Tensor | None], grid: VideoGrid) -> None:
    """Raise `ShapeError` for the first tensor that does not fit the grid."""
    expected = (grid.frames, grid.positions)
    if features.dim() != 3 or features.shape[:2] != expected or features.shape[2] == 0:
        raise ShapeError(
            f"features must have shape ({grid.frames}, {grid.positions}, width), got {tuple(features.shape)}"
        )
    if not features.is_floating_point():
        raise ShapeError(f"features must be of a floating-point type, got {features.dtype}")
    for name, given in scores.items():
        if given is not None and given.shape != expected:
            raise ShapeError(f"{name} must have shape {expected}, got {tuple(given.shape)}")
