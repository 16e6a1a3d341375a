"""Greedy k-center of all frames of a video in one launch, see `aot_vllm.core.anchors.select_diverse_anchors`.

Distances are those of scaled tokens. Products are of tokens as they are, and are scaled where they are read.

Each choice depends on all choices before it, in its own frame and in the previous one. So one program walks through the
video, and one warp or a few hold the distances of a frame in registers. A step is short: two reductions over integers,
which are single instructions of a warp since compute capability 8.0, and two rows of products, which are in flight
together.

Where tables of products would take too much memory, another kernel does without. There a step computes the row of the
last choice from the features. Reading the features takes its time, so the positions are divided among programs on all
processors of the GPU, which agree on each choice.

Dimensions: T frames, n frames of a block, P positions of a frame, A anchors of a frame, D width.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from aot_vllm.config import Distance, Memory
from aot_vllm.core import anchors, distances
from aot_vllm.core.layout import counts_on
from aot_vllm.kernels.launch import launch, power_of_2, product
from aot_vllm.kernels.lengths import changes, scales_and_squares, totals

BLOCK_BYTES = 256 * 2**20
"""Memory that tables of products may always take: of a frame with itself and with the next frame, for a block of
frames. It holds 1,164 frames of 14 x 14 tokens, or 372 frames of 300."""

MOST_BLOCKS = 3
"""A block takes four launches. A longer video takes larger blocks, but no more memory than its features take."""

TOKENS, COLUMNS = 16, 256
"""What a program reads at a time of a frame without a table: so many tokens, so many columns of each."""

BEHIND_ALL = -(2**63)
"""Less than every mark of a choice."""


@triton.jit
def ranks(far, real):
    """Return integers in the order of the distances: a NaN is the farthest, padding is behind negative infinity."""
    bits = (far + 0.0).to(tl.int32, bitcast=True)
    rank = tl.where(far != far, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(real, rank, -0x80000000)


@triton.jit
def kept_before(keep_ptr, frame):
    """Return how many anchors the frames before this one keep."""
    kept = tl.zeros((), tl.int64)
    for earlier in range(frame):
        kept += tl.load(keep_ptr + earlier)
    return kept


@triton.jit
def _spread_out(
    own_ptr,  # (n, P, P) products of the tokens of a frame
    following_ptr,  # (n or n - 1, P, P) products with the tokens of the next frame
    sums_ptr,  # (n, P) sums of the rows of `own`, each product with the scale of its column
    scales_ptr,  # (n and more, P) what tokens are multiplied by
    weights_ptr,  # (n and more, P) what their distances are multiplied by
    changed_ptr,  # (n and more, P) how far each position is from its token in the frame before
    keep_ptr,  # (T,) how many anchors each frame keeps
    near_ptr,  # (P,) from one block to the next: squared distance to the nearest token before, less the token's square
    covered_ptr,  # (P,) from one block to the next: squared distance of the tokens before to the nearest one kept
    order_ptr,  # (n, A) out: the anchors
    first_frame,
    block_frames,
    frames,
    positions,
    count,
    WEIGHTED: tl.constexpr,
    CARRIED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    real = at < positions
    # A condition on a number is written as a limit on positions: Triton's interpreter takes no others as masks.
    in_block = at < tl.where(first_frame > 0, positions, 0)
    near = tl.load(near_ptr + at, mask=in_block, other=float("inf"))
    covered = tl.full((BLOCK,), float("inf"), tl.float32)
    kept = tl.load(keep_ptr + first_frame - 1, mask=first_frame > 0, other=0)
    if CARRIED:
        covered = tl.load(covered_ptr + at, mask=in_block, other=float("inf"))
        kept = kept_before(keep_ptr, first_frame)
    for index in range(block_frames):
        frame = first_frame + index
        scale = tl.load(scales_ptr + at, mask=real, other=0.0)
        squares = tl.load(own_ptr + at.to(tl.int64) * (positions + 1), mask=real, other=0.0) * scale * scale
        keep = tl.load(keep_ptr + frame)
        next_real = at < tl.where(frame + 1 < frames, positions, 0)
        next_scale = tl.load(scales_ptr + positions + at, mask=next_real, other=0.0)
        starts_afresh = kept == 0
        sums = tl.load(sums_ptr + at, mask=at < tl.where(starts_afresh, positions, 0), other=0.0)
        far = near + squares
        if CARRIED:
            changed = tl.load(changed_ptr + at, mask=at < tl.where(frame > 0, positions, 0), other=0.0)
            carried = tl.sqrt(tl.maximum(covered, 0.0)) + changed
            far = tl.minimum(far, carried * carried)
            covered = far
            kept += keep
        else:
            kept = keep
        rest = squares * positions - 2.0 * (sums * scale)
        weight = tl.full((BLOCK,), 1.0, tl.float32)
        if WEIGHTED:
            rest += tl.sum(tl.where(real, squares, 0.0), axis=0)
            weight = tl.load(weights_ptr + at, mask=real, other=1.0)
        far = tl.where(starts_afresh, rest, far)
        near = tl.full((BLOCK,), float("inf"), tl.float32)
        for choice in range(count):
            rank = ranks(far * weight if WEIGHTED else far, real)
            farthest = tl.max(rank, axis=0)
            best = tl.min(tl.where(rank == farthest, at, BLOCK), axis=0)  # the lowest position of a tie
            tl.store(order_ptr + choice, best.to(tl.int64))
            row_of_best = best.to(tl.int64) * positions
            own_row = tl.load(own_ptr + row_of_best + at, mask=real, other=0.0)
            next_row = tl.load(
                following_ptr + row_of_best + at,
                mask=at < tl.where((choice < keep) & (frame + 1 < frames), positions, 0),
                other=0.0,
            )
            own_scale = tl.load(scales_ptr + best)
            square = tl.load(own_ptr + row_of_best + best) * own_scale * own_scale
            distance = (square - 2.0 * (own_row * own_scale * scale)) + squares
            if CARRIED:
                kept_distance = tl.where(choice < keep, tl.where(at == best, 0.0, distance), float("inf"))
                covered = tl.minimum(covered, kept_distance)
            distance = tl.where(at == best, float("-inf"), distance)
            far = tl.where(starts_afresh & (choice == 0), distance, tl.minimum(far, distance))  # drops NaN
            next_distance = square - 2.0 * (next_row * own_scale * next_scale)
            near = tl.where(choice < keep, tl.minimum(near, next_distance), near)
        own_ptr += positions * positions
        following_ptr += positions * positions
        sums_ptr += positions
        scales_ptr += positions
        weights_ptr += positions
        changed_ptr += positions
        order_ptr += count
    tl.store(near_ptr + at, near, mask=real)
    if CARRIED:
        tl.store(covered_ptr + at, covered, mask=real)


@triton.jit
def _marks(far, token, real):
    """Return integers in the order of choice: by distance, and a tie goes to the lowest position, in the lower half."""
    return (ranks(far, real).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def _products(rows, vector_ptr, real, width, stride_column, stride_vector, COLUMNS: tl.constexpr):
    """Return the products of some tokens with a vector. `rows` point to the tokens; zero for those not `real`."""
    sums = tl.zeros((rows.shape[0], COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        column = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = column < width
        vector = tl.load(vector_ptr + column * stride_vector, mask=inside, other=0.0).to(tl.float32)
        at = rows[:, None] + (column * stride_column)[None, :]
        sums += tl.load(at, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32) * vector[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def agreed(mark, best_ptr, arrived_ptr, programs, BEHIND_ALL: tl.constexpr):
    """Return the position of the largest mark of all programs: each waits here for all others.

    The programs share nothing else. So there is nothing to order but these two numbers.
    """
    tl.atomic_max(best_ptr, mark, sem="relaxed")
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    while tl.atomic_add(arrived_ptr, 0, sem="acquire") < programs:
        pass
    best = tl.atomic_max(best_ptr, BEHIND_ALL, sem="relaxed")  # reads it where all programs see the same
    return 0x7FFFFFFF - (best & 0x7FFFFFFF)


@triton.jit
def _mark(far, weights_ptr, token, real, WEIGHTED: tl.constexpr):
    """Return the largest mark of some tokens."""
    if WEIGHTED:
        far *= tl.load(weights_ptr + token, mask=real, other=1.0)
    return tl.max(_marks(far, token, real), axis=0)


@triton.jit
def _sum(pointer, number, BLOCK: tl.constexpr):
    """Return the sum of so many numbers."""
    total = 0.0
    for start in range(0, number, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(pointer + at, mask=at < number, other=0.0), axis=0)
    return total


@triton.jit
def _with_carried(far, covered_ptr, changed_ptr, token, real, has_before):
    """Return squared distances with those that earlier frames leave, and keep them for the next frame."""
    changed = tl.load(changed_ptr + token, mask=real & has_before, other=0.0)
    carried = tl.sqrt(tl.maximum(tl.load(covered_ptr + token, mask=real, other=0.0), 0.0)) + changed
    far = tl.minimum(far, carried * carried)
    tl.store(covered_ptr + token, far, mask=real)
    return far


@triton.jit
def _cover(covered_ptr, distance, token, is_kept, positions):
    """Lower the squared distances to what is kept, if the anchor at this distance is."""
    mask = token < tl.where(is_kept, positions, 0)
    covered = tl.load(covered_ptr + token, mask=mask, other=0.0)
    tl.store(covered_ptr + token, tl.minimum(covered, distance), mask=mask)


@triton.jit
def _spread_out_without_table(
    features_ptr,  # (T, P, D)
    totals_ptr,  # (T, D) sums of the scaled tokens
    scales_ptr,  # (T, P) what tokens are multiplied by
    squares_ptr,  # (T, P) squares of the scaled tokens' lengths
    weights_ptr,  # (T, P) what their distances are multiplied by
    changed_ptr,  # (T, P) how far each position is from its token in the frame before
    keep_ptr,  # (T,) how many anchors each frame keeps
    far_ptr,  # (P,) squared distance to the nearest choice
    near_ptr,  # (T, P) in: infinity; squared distance to the nearest token that frames before keep, less the square
    covered_ptr,  # (P,) in: infinity; squared distance to the nearest token kept so far
    best_ptr,  # (T, A) in: `BEHIND_ALL`; out: the marks of the anchors
    arrived_ptr,  # (T, A) in: zeros; out: how many programs have made their mark
    frames,
    positions,
    count,
    width,
    stride_frame,
    stride_token,
    stride_column,
    WEIGHTED: tl.constexpr,
    CARRIED: tl.constexpr,
    ALL: tl.constexpr,
    BEHIND_ALL: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    programs = tl.num_programs(0)
    first, apart = tl.program_id(0) * TOKENS, programs * TOKENS  # a program has every `programs`-th run of tokens
    kept = tl.zeros((), tl.int64)
    for frame in range(frames):
        keep = tl.load(keep_ptr + frame)
        starts_afresh = kept == 0
        kept = kept + keep if ALL or CARRIED else keep
        mark = tl.full((), BEHIND_ALL, tl.int64)
        for start in range(first, positions, apart):
            token = start + tl.arange(0, TOKENS)
            real = token < positions
            squares = tl.load(squares_ptr + token, mask=real, other=0.0)
            far = tl.load(near_ptr + token, mask=real, other=0.0) + squares
            if CARRIED:
                far = _with_carried(far, covered_ptr, changed_ptr, token, real, frame > 0)
            if starts_afresh:
                rows = features_ptr + token.to(tl.int64) * stride_token
                sums = _products(rows, totals_ptr, real, width, stride_column, 1, COLUMNS)
                sums *= tl.load(scales_ptr + token, mask=real, other=0.0)
                far = squares * positions - 2.0 * sums + _sum(squares_ptr, positions, TOKENS)
            tl.store(far_ptr + token, far, mask=real)
            mark = tl.maximum(mark, _mark(far, weights_ptr, token, real, WEIGHTED))
        for choice in range(count):
            best = agreed(mark, best_ptr + choice, arrived_ptr + choice, programs, BEHIND_ALL)
            chosen = features_ptr + best * stride_token
            square = tl.load(squares_ptr + best)
            own_scale = tl.load(scales_ptr + best)
            mark = tl.full((), BEHIND_ALL, tl.int64)
            for start in range(first, positions, apart):
                token = start + tl.arange(0, TOKENS)
                real = token < positions
                squares = tl.load(squares_ptr + token, mask=real, other=0.0)
                rows = features_ptr + token.to(tl.int64) * stride_token
                row = _products(rows, chosen, real, width, stride_column, stride_column, COLUMNS)
                row *= own_scale * tl.load(scales_ptr + token, mask=real, other=0.0)
                distance = (square - 2.0 * row) + squares
                if CARRIED:
                    _cover(covered_ptr, tl.where(token == best, 0.0, distance), token, choice < keep, positions)
                distance = tl.where(token == best, float("-inf"), distance)
                far = tl.load(far_ptr + token, mask=real, other=0.0)
                far = tl.where(starts_afresh & (choice == 0), distance, tl.minimum(far, distance))  # drops NaN
                tl.store(far_ptr + token, far, mask=real)
                mark = tl.maximum(mark, _mark(far, weights_ptr, token, real, WEIGHTED))
                # A frame tells the next one, or all later ones, how far its anchors are.
                told = tl.minimum(frames - 1 - frame, frames if ALL else 1)
                for later in range(1, tl.where(choice < keep, told, 0) + 1):
                    rows += stride_frame
                    at = later * positions + token
                    row = _products(rows, chosen, real, width, stride_column, stride_column, COLUMNS)
                    row *= own_scale * tl.load(scales_ptr + at, mask=real, other=0.0)
                    near = tl.load(near_ptr + at, mask=real, other=0.0)
                    tl.store(near_ptr + at, tl.minimum(near, square - 2.0 * row), mask=real)
        features_ptr += stride_frame
        totals_ptr += width
        scales_ptr += positions
        squares_ptr += positions
        weights_ptr += positions
        changed_ptr += positions
        near_ptr += positions
        best_ptr += count
        arrived_ptr += count


def select_diverse_anchors(
    features: Tensor,
    *,
    count: int,
    keep: int | Sequence[int] | None = None,
    weights: Tensor | None = None,
    distance: Distance = "euclidean",
    memory: Memory = "previous",
) -> Tensor:
    """Return `count` distinct positions of every frame, in the order of their choice: (T, P, D) -> (T, count).

    Arguments, result and errors are those of `aot_vllm.core.anchors.select_diverse_anchors`, and so is the limit on
    tables of positions x positions, `TABLE_BYTES`. With a memory of `all` frames no tables are made: there would be one
    for each pair of frames.
    """
    keep_per_frame = anchors.check_choice(features, count=count, keep=keep, weights=weights)
    keep_T = counts_on(keep_per_frame, features.device)
    scales_TP, squares_TP = scales_and_squares(features, distance)
    carried = memory == "carried"
    extras = (
        scales_TP if weights is None else weights.float().contiguous(),
        changes(features, scales_TP) if carried else scales_TP,
    )
    flags = {"WEIGHTED": weights is not None, "CARRIED": carried}
    at_once = 0 if memory == "all" else _frames_at_once(features)
    if at_once:
        return _anchors_by_table(features, keep_T, (scales_TP, *extras), count=count, at_once=at_once, flags=flags)
    flags["ALL"] = memory == "all"
    return _anchors_without_table(features, keep_T, (scales_TP, squares_TP, *extras), count=count, flags=flags)


def _frames_at_once(features: Tensor) -> int:
    """Return how many frames may have tables at the same time, or 0 where tables would take too much memory."""
    frames, positions, _ = features.shape
    if 4 * positions**2 > distances.TABLE_BYTES:
        return 0
    at_once, wanted = BLOCK_BYTES // (8 * positions**2), triton.cdiv(frames, MOST_BLOCKS)
    if at_once >= wanted:
        return at_once
    return wanted if wanted * 8 * positions**2 <= features.nbytes else 0


def _anchors_by_table(
    features: Tensor, keep_T: Tensor, extras: tuple[Tensor, ...], *, count: int, at_once: int, flags: dict[str, bool]
) -> Tensor:
    """Return the anchors of frames whose products fit into tables, of so many frames at once.

    `extras` and `flags` are arguments of the kernel: scales, weights, changes; and what of them it reads.
    """
    frames, positions, _ = features.shape
    order_TA = torch.empty(frames, count, dtype=torch.long, device=features.device)
    near_P, covered_P = (torch.empty(positions, dtype=torch.float32, device=features.device) for _ in range(2))
    block = power_of_2(positions)
    for first in range(0, frames, at_once):
        tokens_nPD = features[first : first + at_once]
        next_nPD = features[first + 1 : first + 1 + at_once]
        own_nPP = product(tokens_nPD, tokens_nPD)
        following_nPP = product(tokens_nPD[: len(next_nPD)], next_nPD) if len(next_nPD) else own_nPP
        launch(
            _spread_out,
            (1,),
            own_nPP,
            following_nPP,
            torch.bmm(own_nPP, extras[0][first : first + at_once].unsqueeze(2)),
            *(part[first:] for part in extras),
            keep_T,
            near_P,
            covered_P,
            order_TA[first:],
            first,
            len(tokens_nPD),
            frames,
            positions,
            count,
            BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
            **flags,
        )
    return order_TA


def _anchors_without_table(
    features: Tensor, keep_T: Tensor, extras: tuple[Tensor, ...], *, count: int, flags: dict[str, bool]
) -> Tensor:
    """Return the anchors of frames of many positions, in memory that is linear in the positions.

    `extras` and `flags` are arguments of the kernel: scales, squares, weights, changes; and what of them it reads.
    """
    frames, positions, width = features.shape
    device = features.device
    far_P = torch.empty(positions, dtype=torch.float32, device=device)
    near_TP = torch.full((frames + 1, positions), torch.inf, dtype=torch.float32, device=device)
    best_TA = torch.full((frames, count), BEHIND_ALL, dtype=torch.long, device=device)
    launch(
        _spread_out_without_table,
        (min(programs_at_once(device), triton.cdiv(positions, TOKENS)),),
        features,
        totals(features, extras[0]),
        *extras,
        keep_T,
        far_P,
        near_TP,
        near_TP[frames],
        best_TA,
        torch.zeros(frames, count, dtype=torch.int32, device=device),
        frames,
        positions,
        count,
        width,
        *features.stride(),
        BEHIND_ALL=BEHIND_ALL,
        TOKENS=TOKENS,
        COLUMNS=power_of_2(min(width, COLUMNS)),
        num_warps=16,
        launch_cooperative_grid=True,  # programs wait for each other, so all must run at once
        **flags,
    )
    return best_TA.bitwise_not_().bitwise_and_(0x7FFFFFFF)


def programs_at_once(device: torch.device) -> int:
    """Return how many programs run at the same time for certain: one on each processor. The interpreter runs one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
