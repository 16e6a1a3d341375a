"""The whole reduction of one video (section 3 of the paper).

1. The budget fixes how many tokens every frame and every clip keeps.
2. Each frame chooses its anchors: far from each other, or such that they cover the frame, or by attention.
3. Within a frame, the anchors absorb the other tokens (phase I).
4. Across the frames of a clip, the anchors of the key frame absorb the anchors of the later frames (phase II).

Dimensions: T frames, P positions of a frame, A anchors of a frame, D width, K tokens that survive.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from aot_vllm.config import AOTConfig
from aot_vllm.core.algorithms import TORCH, Algorithms
from aot_vllm.core.anchors import select_anchors
from aot_vllm.core.budget import Budget, budget
from aot_vllm.core.calibration import attention_weights
from aot_vllm.core.grid import VideoGrid
from aot_vllm.core.transport import merge_across_frames
from aot_vllm.errors import ShapeError


@dataclass(frozen=True)
class ReducedVideo:
    """The tokens that survive, (K, D), and the frame, row and column of each, all (K,).

    `iterations` and `converged` have one entry for each transport problem. They stay on the device of the tokens:
    reading them makes the host wait, so the caller chooses when to read.
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
        """How many solves ended at the iteration limit, as a 0-d tensor on the device."""
        return (~self.converged).sum()


def needs_scores(grid: VideoGrid, *, retention: float, config: AOTConfig) -> bool:
    """Return whether `reduce_video` reads the scores of a video of this size.

    It does not if anchors are chosen by distances alone, or if every token survives. Raises `SettingError` for a
    retention outside its range.
    """
    return config.uses("global_layer") and not budget(grid, retention=retention, config=config).identity


def reduce_video(
    features: Tensor,
    local_scores: Tensor | None,
    global_scores: Tensor | None,
    *,
    grid: VideoGrid,
    retention: float,
    config: AOTConfig | None = None,
    compared: int | None = None,
    algorithms: Algorithms = TORCH,
) -> ReducedVideo:
    """Return the reduced video: features (T, P, D) and scores (T, P) to exactly `budget(...).total` tokens.

    `retention` in (0, 1] is the fraction of tokens kept; 1 returns the input unchanged. Scores may be None where
    `needs_scores` says so. Tokens have the type of `features`; sums are accumulated in float32. The host never waits
    for the device.

    `compared`: some models give the language model several features per token, side by side in D. The transport plan
    is computed from the first `compared` columns alone and merges all columns. By default it is computed from all.

    `algorithms`: who computes the expensive parts, by default PyTorch. Kernels give the same choice of tokens, unless
    two tokens are equally good up to rounding.

    Raises `ShapeError` for tensors that do not fit the grid, `SettingError` for a retention outside its range.
    Section 3 of the paper.
    """
    config = config or AOTConfig()
    counts = budget(grid, retention=retention, config=config)
    _check_features(features, grid, compared)
    _check_scores({"local_scores": local_scores, "global_scores": global_scores}, grid)
    if counts.identity:
        return _unchanged(features, grid, counts)

    parts = list(_parts(counts))
    if config.anchors == "attention":
        scores = _attention_scores(local_scores, global_scores, config)
        anchors = [_attended_anchors(*scores, part, grid=grid, config=config) for part in parts]
    else:
        order_TA = _greedy_order(features[:, :, :compared], global_scores, counts, config, algorithms)
        anchors = [_ordered_anchors(order_TA, part) for part in parts]
    survivors = [
        _merge_part(
            features,
            chosen,
            part,
            counts=counts,
            grid=grid,
            config=config,
            compared=compared,
            algorithms=algorithms,
        )
        for chosen, part in zip(anchors, parts, strict=True)
    ]
    tokens_KD, frames_K, cells_K, iterations, converged = (
        survivors[0] if len(survivors) == 1 else map(torch.cat, zip(*survivors, strict=True))
    )
    return ReducedVideo(tokens_KD, frames_K, cells_K // grid.cols, cells_K % grid.cols, counts, iterations, converged)


@dataclass(frozen=True)
class _Part:
    """Neighbouring clips with the same number of anchors. They are reduced together, as one batch."""

    num_anchors: int
    clips: slice
    frames: slice


@dataclass(frozen=True)
class _Anchors:
    """The anchors of every frame of a part.

    `positions` (T, A), ascending. `ranks` (T, A): a later frame keeps its anchors of lowest rank; None leaves the
    choice to the transport across frames, which keeps the anchors that match the key frame least.
    """

    positions: Tensor
    ranks: Tensor | None


def _parts(counts: Budget) -> Iterator[_Part]:
    """Yield the one or two runs of clips with equally many anchors."""
    first_frames = list(accumulate(counts.clip_lengths, initial=0))
    first_clip = 0
    for num_anchors, clips in groupby(counts.anchors_per_clip):
        end_clip = first_clip + len(list(clips))
        yield _Part(num_anchors, slice(first_clip, end_clip), slice(first_frames[first_clip], first_frames[end_clip]))
        first_clip = end_clip


def _greedy_order(
    features: Tensor, scores: Tensor | None, counts: Budget, config: AOTConfig, algorithms: Algorithms
) -> Tensor:
    """Return the anchors of every frame in the order of their choice, (T, A).

    A is the number of anchors in the first clip, which is the largest. A clip with fewer anchors takes the first ones.
    """
    clips = zip(counts.anchors_per_clip, counts.clip_lengths, strict=True)
    anchors_per_frame = [num_anchors for num_anchors, length in clips for _ in range(length)]
    # A key frame that is emitted twice has more tokens in the budget than it has distinct positions.
    distinct_per_frame = list(map(min, counts.per_frame, anchors_per_frame))
    choice = {
        "count": anchors_per_frame[0],
        "keep": distinct_per_frame,
        "distance": config.distance,
        "memory": config.memory,
    }
    if config.anchors == "coverage":
        return algorithms.select_covering_anchors(features, **choice)
    weights = None
    if config.anchors == "calibrated":
        weights = algorithms.token_weights(
            features,
            scores,
            by_attention=config.by_attention,
            without_sinks=config.without_sinks,
            by_relevance=config.by_relevance,
        )
    return algorithms.select_diverse_anchors(features, weights=weights, **choice)


def _ordered_anchors(order_TA: Tensor, part: _Part) -> _Anchors:
    """Return the anchors of a part; those chosen first have the lowest ranks."""
    positions_TA, ranks_TA = order_TA[part.frames, : part.num_anchors].sort(dim=1)
    return _Anchors(positions_TA, ranks_TA)


def _attention_scores(
    local_scores: Tensor | None, global_scores: Tensor | None, config: AOTConfig
) -> tuple[Tensor, Tensor]:
    """Return both scores, without sinks if that is asked for. Raises `ShapeError` if one is missing."""
    if local_scores is None or global_scores is None:
        raise ShapeError("local_scores and global_scores must be tensors if anchors are chosen by attention, got None")
    if config.without_sinks:
        return attention_weights(local_scores), attention_weights(global_scores)
    return local_scores, global_scores


def _attended_anchors(
    local_scores: Tensor, global_scores: Tensor, part: _Part, *, grid: VideoGrid, config: AOTConfig
) -> _Anchors:
    """Return the anchors of a part; those with the highest global scores have the lowest ranks.

    At a kappa below 1 there are no ranks: the transport across frames decides, as in the paper.
    """
    positions_TA = select_anchors(
        local_scores[part.frames],
        global_scores[part.frames],
        rows=grid.rows,
        cols=grid.cols,
        count=part.num_anchors,
        global_ratio=config.global_ratio,
        window=config.window,
    )
    if config.kappa < 1:
        return _Anchors(positions_TA, ranks=None)
    received_TA = global_scores[part.frames].gather(1, positions_TA)
    return _Anchors(positions_TA, received_TA.argsort(dim=1, descending=True, stable=True).argsort(dim=1))


def _merge_part(
    features: Tensor,
    anchors: _Anchors,
    part: _Part,
    *,
    counts: Budget,
    grid: VideoGrid,
    config: AOTConfig,
    compared: int | None,
    algorithms: Algorithms,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return a part's surviving tokens, their frames and positions, and the iterations and convergence of its solves.

    Phase I merges within frames (section 3.2), phase II across frames (section 3.3).
    """
    within = algorithms.absorb_frames(
        features[part.frames], anchors.positions, rows=grid.rows, cols=grid.cols, config=config, compared=compared
    )
    across = merge_across_frames(
        within.tokens,
        clip_lengths=counts.clip_lengths[part.clips],
        keep=counts.keep_per_frame[part.frames],
        config=config,
        originals=counts.originals_per_clip[part.clips],
        ranks=anchors.ranks,
        compared=compared,
    )
    return (
        across.tokens,
        across.frames + part.frames.start if part.frames.start else across.frames,
        anchors.positions[across.frames, across.slots],
        _joined(within.iterations, across.iterations),
        _joined(within.converged, across.converged),
    )


def _joined(one: Tensor, other: Tensor) -> Tensor:
    """Return both, one after the other, without a copy if one is empty."""
    return torch.cat([one, other]) if len(one) and len(other) else one if len(one) else other


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


def _check_features(features: Tensor, grid: VideoGrid, compared: int | None) -> None:
    """Raise `ShapeError` for features that do not fit the grid, or a width to compare that they do not have."""
    if features.dim() != 3 or features.shape[:2] != (grid.frames, grid.positions) or features.shape[2] == 0:
        raise ShapeError(
            f"features must have shape ({grid.frames}, {grid.positions}, width), got {tuple(features.shape)}"
        )
    if not features.is_floating_point():
        raise ShapeError(f"features must be of a floating-point type, got {features.dtype}")
    if compared is not None and not 1 <= compared <= features.shape[2]:
        raise ShapeError(f"compared must be in [1, {features.shape[2]}], the width of features, got {compared}")


def _check_scores(scores: Mapping[str, Tensor | None], grid: VideoGrid) -> None:
    """Raise `ShapeError` for the first score tensor that does not fit the grid."""
    expected = (grid.frames, grid.positions)
    for name, given in scores.items():
        if given is not None and given.shape != expected:
            raise ShapeError(f"{name} must have shape {expected}, got {tuple(given.shape)}")
