"""Transport plans applied: within a frame (phase I), and across the frames of a clip (phase II).

Dimensions: T frames, P positions of a frame, A anchors of a frame, D width, C clips (the longest first), n clips
running at a step, K tokens that survive, k tokens kept of a frame.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from aot_vllm.config import AOTConfig
from aot_vllm.core import cost
from aot_vllm.core.layout import (
    ClipLayout,
    Step,
    check_clip_lengths,
    check_counts,
    check_keep,
    clip_layout,
    counts_on,
)
from aot_vllm.core.sinkhorn import TransportPlan, sinkhorn
from aot_vllm.errors import ShapeError

# Half-precision features are copied to float32 in blocks of at most this many bytes.
BLOCK_BYTES = 256 * 2**20
SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class FrameTokens:
    """The merged anchors of every frame, `tokens` (T, A, D), with the iterations and the convergence of the solve."""

    tokens: Tensor
    iterations: Tensor
    converged: Tensor


@dataclass(frozen=True)
class ClipTokens:
    """The tokens that survive, in output order, with their origins and the outcome of each solve.

    `tokens` (K, D). `frames` (K,) and `slots` (K,) index the first two dimensions of the input. A merged anchor comes
    from its key frame. `iterations` and `converged` have one entry for each solve, which is at most one per later
    frame.
    """

    tokens: Tensor
    frames: Tensor
    slots: Tensor
    iterations: Tensor
    converged: Tensor


def merge_within_frames(features: Tensor, anchors: Tensor, *, rows: int, cols: int, config: AOTConfig) -> Tensor:
    """Return the anchors after they absorbed the other tokens of their frame: (T, P, D), (T, A) -> (T, A, D).

    Row j belongs to `anchors[:, j]`. Anchors are distinct positions. Sums are accumulated in float32 and returned in
    the type of `features`. Entries must be below 1e18 / sqrt(D), where squares overflow. Raises `ShapeError` for
    features or anchors that do not fit the grid. Section 3.2.
    """
    return absorb_frames(features, anchors, rows=rows, cols=cols, config=config).tokens


def absorb_frames(
    features: Tensor, anchors: Tensor, *, rows: int, cols: int, config: AOTConfig, compared: int | None = None
) -> FrameTokens:
    """Return the result of `merge_within_frames`, with the outcome of the solve.

    The plan is computed from the first `compared` columns of `features`, by default from all. All columns are merged.
    """
    check_within(features, anchors, positions=rows * cols)
    anchors_TAD = rows_at(features, anchors)
    nothing = anchors[0, :0]
    if merges_nothing(anchors, positions=rows * cols, config=config):
        return FrameTokens(anchors_TAD, iterations=nothing, converged=nothing.bool())

    anchors_TAD = anchors_TAD.float()
    similarity_TPA = _similarity(features[..., :compared], anchors_TAD[..., :compared])
    source_TP = torch.ones_like(similarity_TPA[:, :, 0]).scatter_(1, anchors, 0)
    nearest_TP = similarity_TPA.argmax(dim=2) if config.nearest_weight else None
    if config.mass:
        solution = _match_within(similarity_TPA, source_TP, anchors, rows=rows, cols=cols, config=config)
        plan_TPA, iterations, converged = solution.plan.mul_(config.mass), solution.iterations, solution.converged
    else:
        plan_TPA, iterations, converged = similarity_TPA.zero_(), nothing, nothing.bool()
    weight_TPA, own_TA = _absorption(plan_TPA, nearest_TP, source_TP, nearest_weight=config.nearest_weight)
    merged_TAD = anchors_TAD.mul_(own_TA.unsqueeze(2))
    for block in _blocks(features):
        merged_TAD[block].baddbmm_(weight_TPA[block].transpose(1, 2), features[block].float())
    return FrameTokens(merged_TAD.to(features.dtype), iterations, converged)


def merges_nothing(anchors: Tensor, *, positions: int, config: AOTConfig) -> bool:
    """Return whether the anchors stay what they are: no other token is left, or no other token carries mass."""
    return anchors.shape[1] == positions or config.mass == config.nearest_weight == 0


def _match_within(
    similarity_TPA: Tensor, source_TP: Tensor, anchors_TA: Tensor, *, rows: int, cols: int, config: AOTConfig
) -> TransportPlan:
    """Return the transport of the other tokens of each frame onto its anchors. Overwrites the similarities.

    All frames are stopped jointly, as in the released code.
    """
    cost_TPA = similarity_TPA.neg_().add_(1)
    cost_TPA += cost.spatial_distance(anchors_TA, rows=rows, cols=cols).mul_(config.spatial_weight)
    return sinkhorn(
        cost_TPA,
        row_mass=source_TP / (rows * cols - anchors_TA.shape[1]),
        epsilon=config.epsilon,
        iterations=config.iterations,
        tolerance=config.tolerance,
        joint=True,
    )


def _similarity(features_TPD: Tensor, anchors_TAD: Tensor) -> Tensor:
    """Return the cosine similarity of every token to every anchor of its frame, (T, P, A)."""
    norms_TP, norms_TA = cost.norms(features_TPD), cost.norms(anchors_TAD)
    blocks = [
        cost.cosine(features_TPD[block].float(), anchors_TAD[block], norms_TP[block], norms_TA[block])
        for block in _blocks(features_TPD)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _absorption(
    plan_TPA: Tensor, nearest_TP: Tensor | None, source_TP: Tensor, *, nearest_weight: float
) -> tuple[Tensor, Tensor]:
    """Return the weight of every token in every merged anchor, (T, P, A), and of the anchor itself, (T, A).

    A merged anchor blends two means: the mean weighted by the plan, and the plain mean of the anchor and its nearest
    tokens. Both are linear in the tokens, so one matrix holds both. Overwrites the plan. `nearest_TP` is read if the
    second mean has a weight.
    """
    carried_TA = 1 + plan_TPA.sum(dim=1)
    by_plan_TA = (1 - nearest_weight) / carried_TA
    weight_TPA = plan_TPA.mul_(by_plan_TA.unsqueeze(1))
    if nearest_TP is None:
        return weight_TPA, by_plan_TA
    counted_TA = torch.ones_like(carried_TA).scatter_add_(1, nearest_TP, source_TP)
    by_nearest_TA = nearest_weight / counted_TA
    weight_TP = by_nearest_TA.gather(1, nearest_TP) * source_TP
    weight_TPA.scatter_add_(2, nearest_TP.unsqueeze(2), weight_TP.unsqueeze(2))
    return weight_TPA, by_plan_TA + by_nearest_TA


def rows_at(features_TPD: Tensor, positions_TA: Tensor) -> Tensor:
    """Return a copy of the features at some positions of each frame, (T, A, D).

    `index_select` copies whole rows. Indexing both dimensions at once copies element by element on the CPU, which is
    ten times slower.
    """
    frames, positions, width = features_TPD.shape
    starts_T1 = torch.arange(0, frames * positions, positions, device=positions_TA.device).unsqueeze(1)
    rows = features_TPD.flatten(0, 1).index_select(0, (positions_TA + starts_T1).flatten())
    return rows.view(frames, -1, width)


def _blocks(features_TPD: Tensor) -> Iterator[slice]:
    """Yield runs of frames whose float32 copy fits `BLOCK_BYTES`; one run for float32, which needs no copy."""
    frames, positions, width = features_TPD.shape
    step = frames if features_TPD.dtype == torch.float32 else max(1, BLOCK_BYTES // (4 * positions * width))
    for start in range(0, frames, step):
        yield slice(start, start + step)


def merge_across_frames(
    tokens: Tensor,
    *,
    clip_lengths: Sequence[int],
    keep: int | Sequence[int],
    config: AOTConfig,
    originals: Sequence[int] | None = None,
    ranks: Tensor | None = None,
    compared: int | None = None,
) -> ClipTokens:
    """Return the surviving tokens of all clips, clip by clip: (T, A, D) -> (K, D).

    The output of a clip has three kinds of tokens:

    - `originals`: anchors of the key frame as they were, one count for each clip. By default all if `config.emit` is
      `both`, otherwise none. If not all, those that absorbed most.
    - `keep`: tokens kept of each later frame, one count for all frames or one for each. Counts of key frames are
      ignored. A frame keeps its tokens of lowest `ranks`, (T, A), which rank the slots of a frame from 0 to A - 1. By
      default these are the tokens that match the key frame least.
    - Merged anchors of the key frame. They absorbed all other tokens of the later frames. If `config.kappa` is 1, those
      tokens are dropped instead.

    Merged anchors come last, or first if `config.emit` is `compact`. Slots ascend within each frame. Plans are computed
    from the first `compared` columns, by default from all. All columns are merged.

    Raises `ShapeError` for tokens that are not (T, A, D), `SettingError` for counts that do not fit them. Section 3.3.
    """
    keep_per_frame, originals = _check_across(tokens, clip_lengths, keep, originals, config)
    if ranks is not None and config.kappa == 1 and config.emit == "compact" and not any(originals):
        return _keep_by_rank(tokens, ranks, clip_lengths=clip_lengths, keep_per_frame=keep_per_frame)
    layout = clip_layout(
        tuple(clip_lengths),
        keep_per_frame,
        originals,
        tokens.shape[1],
        tokens.device,
        merged_first=config.emit == "compact",
    )
    tokens_TAD = tokens.float()
    norms_TA = cost.norms(tokens_TAD[..., :compared])
    merged_CAD = tokens_TAD.index_select(0, layout.key_frames)
    absorbed_CA = torch.zeros_like(merged_CAD[:, :, 0])
    state = (tokens_TAD, merged_CAD, norms_TA, absorbed_CA)
    slots, solutions = [], []
    for step in layout.steps:
        if step.least_kept == len(layout.ranks):
            slots.append(layout.ranks.expand(len(step.frames), -1))  # every token is kept, so nothing is absorbed
            continue
        order_nA = None if ranks is None else ranks.index_select(0, step.frames).argsort(dim=1, stable=True)
        if order_nA is None or config.kappa < 1:
            order_nA, solution = _absorb_step(
                state, step, order_nA, ranks_A=layout.ranks, config=config, compared=compared
            )
            solutions.append(solution)
        slots.append(_first(order_nA, step.keep, most=step.most_kept, ranks=layout.ranks))

    by_absorbed_CA = absorbed_CA.argsort(dim=1, descending=True, stable=True)
    slots.insert(0, _first(by_absorbed_CA, layout.originals, most=layout.most_originals, ranks=layout.ranks))
    return _line_up(tokens, merged_CAD, slots, solutions, layout)


def _absorb_step(
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    step: Step,
    order_nA: Tensor | None,
    *,
    ranks_A: Tensor,
    config: AOTConfig,
    compared: int | None,
) -> tuple[Tensor, TransportPlan]:
    """Match one later frame of every clip with the key frames, which absorb what the frame doesn't keep.

    `state` holds tokens (T, A, D), merged anchors (C, A, D), norms (T, A) and absorbed mass (C, A); merged anchors and
    mass change in place. Returns the order in which the frames keep their tokens, (n, A), and the solution.
    """
    tokens_TAD, merged_CAD, norms_TA, absorbed_CA = state
    x_nAD, y_nAD = tokens_TAD.index_select(0, step.frames), merged_CAD[: len(step.frames)]
    discount = cost.temporal_discount(step.frames_apart, sigma=config.temporal_sigma)
    solution = _match(
        x_nAD[..., :compared], y_nAD[..., :compared], norms_TA[step.frames], discount=discount, config=config
    )
    share_nAA = solution.plan / solution.plan.sum(dim=2, keepdim=True).clamp_min_(SMALLEST)
    if order_nA is None:  # a low largest share means a poor match: the token carries change
        order_nA = share_nAA.amax(dim=2).argsort(dim=1, stable=True)
    if config.kappa < 1:
        absorbed_CA[: len(step.frames)] += _absorb(x_nAD, y_nAD, share_nAA, order_nA, step, ranks_A)
    return order_nA, solution


def _keep_by_rank(
    tokens_TAD: Tensor, ranks_TA: Tensor, *, clip_lengths: Sequence[int], keep_per_frame: Sequence[int]
) -> ClipTokens:
    """Return the tokens of lowest rank of every frame, and all tokens of key frames, in the order of the input.

    Nothing moves between frames, so no layout of steps is needed.
    """
    num_anchors = ranks_TA.shape[1]
    counts = list(keep_per_frame)
    for key_frame in list(accumulate(clip_lengths, initial=0))[:-1]:
        counts[key_frame] = num_anchors
    is_dropped_TA = ranks_TA >= counts_on(counts, ranks_TA.device).unsqueeze(1)
    kept_K = is_dropped_TA.flatten().argsort(stable=True)[: sum(counts)]
    nothing = kept_K[:0]
    return ClipTokens(
        tokens=tokens_TAD.flatten(0, 1).index_select(0, kept_K),
        frames=kept_K // num_anchors,
        slots=kept_K % num_anchors,
        iterations=nothing,
        converged=nothing.bool(),
    )


def _match(x_nAD: Tensor, y_nAD: Tensor, x_norms_nA: Tensor, *, discount: float, config: AOTConfig) -> TransportPlan:
    """Return the transport of tokens x of later frames onto the anchors y of their clips, one problem for each clip."""
    cost_nAA = cost.cosine(x_nAD, y_nAD, x_norms_nA, cost.norms(y_nAD)).neg_().add_(1)
    cost_nAA -= cost_nAA.amin(dim=(1, 2), keepdim=True)
    return sinkhorn(
        cost_nAA.mul_(discount),
        row_mass=torch.full_like(x_norms_nA, 1 / x_norms_nA.shape[1]),
        epsilon=config.epsilon,
        iterations=config.iterations,
        tolerance=config.tolerance,
        joint=False,
    )


def _absorb(x_nAD: Tensor, y_nAD: Tensor, share_nAA: Tensor, order_nA: Tensor, step: Step, ranks_A: Tensor) -> Tensor:
    """Merge the tokens x into the anchors y, in place, and return the mass that each anchor absorbed, (n, A).

    The first tokens of each order are kept, as many as the step says, and give nothing.
    """
    is_absorbed_nA = torch.zeros_like(share_nAA[:, :, 0]).scatter_(1, order_nA, (ranks_A >= step.keep).float())
    given_nAA = share_nAA * is_absorbed_nA.unsqueeze(2)
    mass_nA = given_nAA.sum(dim=1)
    y_nAD.baddbmm_(given_nAA.transpose(1, 2), x_nAD).div_(1 + mass_nA.unsqueeze(2))
    return mass_nA


def _first(order_nA: Tensor, count_n1: Tensor, *, most: int, ranks: Tensor) -> Tensor:
    """Return the first `count` slots of each order, ascending, then padding up to `most`: (n, most)."""
    return order_nA[:, :most].masked_fill(ranks[:most] >= count_n1, len(ranks)).sort(dim=1).values


def _line_up(
    tokens: Tensor, merged_CAD: Tensor, slots: list[Tensor], solutions: list[TransportPlan], layout: ClipLayout
) -> ClipTokens:
    """Return the surviving tokens in output order; `slots` are the layout's candidates before the merged anchors."""
    slots_K = torch.cat([*(slots_nk.flatten() for slots_nk in slots), layout.ranks])[layout.candidates]
    tokens_KD = tokens.flatten(0, 1).index_select(0, layout.frames * len(layout.ranks) + slots_K)
    tokens_KD.index_copy_(0, layout.merged_rows, merged_CAD.flatten(0, 1).to(tokens.dtype))
    nothing = layout.ranks[:0]
    return ClipTokens(
        tokens=tokens_KD,
        frames=layout.frames,
        slots=slots_K,
        iterations=torch.cat([nothing, *(solution.iterations for solution in solutions)]),
        converged=torch.cat([nothing.bool(), *(solution.converged for solution in solutions)]),
    )


def _check_across(
    tokens: Tensor,
    clip_lengths: Sequence[int],
    keep: int | Sequence[int],
    originals: Sequence[int] | None,
    config: AOTConfig,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the counts of kept tokens and of originals. Raises for the first argument that does not fit."""
    if tokens.dim() != 3 or 0 in tokens.shape:
        raise ShapeError(f"tokens must have shape (frames, anchors, width), all at least 1, got {tuple(tokens.shape)}")
    frames, num_anchors, _ = tokens.shape
    lengths = check_clip_lengths(clip_lengths, frames=frames)
    if originals is None:
        originals = (num_anchors if config.emit == "both" else 0,) * len(lengths)
    keep_per_frame = check_keep(keep, frames=frames, anchors=num_anchors)
    return keep_per_frame, check_counts("originals", originals, len(lengths), num_anchors)


def check_within(features: Tensor, anchors: Tensor, *, positions: int) -> None:
    """Raise `ShapeError` unless features, anchors and grid fit each other."""
    if features.dim() != 3 or features.shape[1] != positions or 0 in features.shape:
        raise ShapeError(f"features must have shape (frames, {positions}, width), got {tuple(features.shape)}")
    frames = features.shape[0]
    if anchors.dim() != 2 or anchors.shape[0] != frames or not 1 <= anchors.shape[1] <= positions:
        raise ShapeError(f"anchors must have shape ({frames}, 1 to {positions}), got {tuple(anchors.shape)}")
