"""Merging within the frames of a video in three launches, see `aot_vllm.core.transport.absorb_frames`.

1. `_scalings`: a program runs all Sinkhorn iterations of one frame. It stores the column scaling before each iteration
   and after the last, and how far each iteration moved the row scaling.
2. `_weights`: all frames stop jointly. Every program sums the movements over the frames, finds the first iteration
   below the tolerance, and makes the plan of its frame from the scalings of that iteration.
3. `_merge`: the weighted sums of tokens, in float32, rounded once.

So the stopping rule is exactly that of `aot_vllm.core.sinkhorn`, and the host reads nothing.

Dimensions: T frames, P positions of a frame, A anchors of a frame, D width, I iterations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aot_vllm.config import AOTConfig
from aot_vllm.core import cost, transport
from aot_vllm.core.sinkhorn import SMALLEST
from aot_vllm.core.transport import FrameTokens
from aot_vllm.kernels.launch import launch, power_of_2, product

TILE = 4096
"""Entries of a frame's kernel that a program holds in registers at a time: whole rows of as many tokens as fit."""

FRAMES = 32
"""Frames whose movements are summed at a time."""


@triton.jit
def _scalings(
    kernel_ptr,  # (T, P, A) in: products of tokens and anchors; out: the scaled kernel
    norms_ptr,  # (T, P) lengths of the tokens
    anchors_ptr,  # (T, A)
    unit_ptr,  # (T, P) out: what a row scaling of 1 is in the scaled kernel, negative for anchors
    rows_ptr,  # (T, P) the row scalings of the last iteration
    columns_ptr,  # (T, I + 1, A) out: the column scalings
    moved_ptr,  # (T, I) out: how far each iteration moved the row scaling, summed over tokens
    nearest_ptr,  # (T, P) out: the slot of the most similar anchor
    positions,
    count,
    grid_cols,
    row_height,
    col_width,
    spatial_weight,
    epsilon,
    iterations,
    shortest,
    smallest,
    largest,
    NEAREST: tl.constexpr,
    TOKENS: tl.constexpr,
    ANCHORS: tl.constexpr,
):
    frame = tl.program_id(0).to(tl.int64)
    kernel_ptr += frame * positions * count
    norms_ptr += frame * positions
    unit_ptr += frame * positions
    rows_ptr += frame * positions
    nearest_ptr += frame * positions
    columns_ptr += frame * (iterations + 1) * count
    moved_ptr += frame * iterations

    slot = tl.arange(0, ANCHORS)
    real = slot < count
    anchor = tl.load(anchors_ptr + frame * count + slot, mask=real, other=-1).to(tl.int32)
    anchor_norm = tl.maximum(tl.load(norms_ptr + anchor, mask=real, other=1.0), shortest)
    anchor_y = (anchor // grid_cols).to(tl.float32) * row_height
    anchor_x = (anchor % grid_cols).to(tl.float32) * col_width

    lowest = tl.full((ANCHORS,), float("inf"), tl.float32)
    for start in range(0, positions, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < positions
        at = kernel_ptr + token[:, None] * count + slot[None, :]
        mask = inside[:, None] & real[None, :]
        norm = tl.maximum(tl.load(norms_ptr + token, mask=inside, other=1.0), shortest)
        cosine = tl.load(at, mask=mask, other=0.0) / norm[:, None] / anchor_norm[None, :]
        if NEAREST:
            best = tl.argmax(tl.where(mask, cosine, float("-inf")), axis=1)
            tl.store(nearest_ptr + token, best, mask=inside)
        down = (token // grid_cols).to(tl.float32)[:, None] * row_height - anchor_y[None, :]
        right = (token % grid_cols).to(tl.float32)[:, None] * col_width - anchor_x[None, :]
        costs = 1.0 - cosine + tl.sqrt(down * down + right * right) * spatial_weight
        costs = tl.where(mask, costs, float("inf"))
        is_anchor = tl.max((token[:, None] == anchor[None, :]).to(tl.int32), axis=1) > 0
        source = inside & (is_anchor == 0)
        low = tl.where(source, tl.min(costs, axis=1), 0.0)
        reduced = tl.where(source[:, None] & real[None, :], costs - low[:, None], float("inf"))
        lowest = tl.minimum(lowest, tl.min(reduced, axis=0))
        unit = tl.minimum(tl.exp(low / epsilon), largest)
        tl.store(at, reduced, mask=mask)
        tl.store(unit_ptr + token, tl.where(source, unit, -1.0), mask=inside)
        tl.store(rows_ptr + token, tl.where(source, 1.0 / unit, 0.0), mask=inside)

    lowest = tl.where(real, lowest, 0.0)
    tl.debug_barrier()
    for start in range(0, positions, TOKENS):
        token = start + tl.arange(0, TOKENS)
        at = kernel_ptr + token[:, None] * count + slot[None, :]
        mask = (token < positions)[:, None] & real[None, :]
        reduced = tl.load(at, mask=mask, other=float("inf"))
        scaled = tl.exp((reduced - lowest[None, :]) / -epsilon)
        tl.store(at, tl.where(reduced == float("inf"), 0.0, scaled), mask=mask)

    column = tl.where(real, tl.exp(lowest / -epsilon), 0.0)
    row_mass = 1.0 / (positions - count)
    column_mass = tl.where(real, 1.0 / count, 0.0)
    for iteration in range(iterations):
        tl.store(columns_ptr + iteration * count + slot, column, mask=real)
        tl.debug_barrier()
        sums = tl.zeros((TOKENS, ANCHORS), tl.float32)
        moved = tl.zeros((TOKENS,), tl.float32)
        for start in range(0, positions, TOKENS):
            token = start + tl.arange(0, TOKENS)
            inside = token < positions
            mask = inside[:, None] & real[None, :]
            scaled = tl.load(kernel_ptr + token[:, None] * count + slot[None, :], mask=mask, other=0.0)
            unit = tl.load(unit_ptr + token, mask=inside, other=-1.0)
            before = tl.load(rows_ptr + token, mask=inside, other=0.0)
            row = row_mass / tl.maximum(tl.sum(scaled * column[None, :], axis=1), smallest)
            row = tl.where(unit >= 0, row, 0.0)
            moved += tl.where(unit >= 0, tl.abs(row - before) * unit, 0.0)
            sums += scaled * row[:, None]
            tl.store(rows_ptr + token, row, mask=inside)
        column = column_mass / tl.maximum(tl.sum(sums, axis=0), smallest)
        tl.store(moved_ptr + iteration, tl.sum(moved, axis=0))
    tl.store(columns_ptr + iterations * count + slot, column, mask=real)


@triton.jit
def _weights(
    kernel_ptr,  # (T, P, A) in: the scaled kernel; out: the weight of every token in every merged anchor
    unit_ptr,  # (T, P)
    columns_ptr,  # (T, I + 1, A)
    moved_ptr,  # (T, I)
    nearest_ptr,  # (T, P)
    own_ptr,  # (T, A) out: the weight of the anchor itself
    iterations_ptr,  # (1,) out
    converged_ptr,  # (1,) out
    frames,
    positions,
    count,
    iterations,
    tolerance,
    mass,
    nearest_weight,
    smallest,
    SOLVED: tl.constexpr,
    NEAREST: tl.constexpr,
    TOKENS: tl.constexpr,
    ANCHORS: tl.constexpr,
    STEPS: tl.constexpr,
    FRAMES: tl.constexpr,
):
    frame = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, ANCHORS)
    real = slot < count
    kernel_ptr += frame * positions * count
    unit_ptr += frame * positions
    nearest_ptr += frame * positions
    row_mass = 1.0 / (positions - count)
    before = tl.zeros((ANCHORS,), tl.float32)
    after = tl.zeros((ANCHORS,), tl.float32)
    if SOLVED:
        step = tl.arange(0, STEPS)
        moved = tl.zeros((STEPS,), tl.float32)
        for start in range(0, frames, FRAMES):
            other = start + tl.arange(0, FRAMES)
            mask = (other < frames)[:, None] & (step < iterations)[None, :]
            at = moved_ptr + other.to(tl.int64)[:, None] * iterations + step[None, :]
            moved += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
        is_below = (moved * row_mass / frames < tolerance) & (step < iterations)
        last = tl.min(tl.where(is_below, step, iterations - 1), axis=0)
        if frame == 0:
            tl.store(iterations_ptr, (last + 1).to(tl.int64))
            tl.store(converged_ptr, tl.max(is_below.to(tl.int32), axis=0) > 0)
        columns_ptr += (frame * (iterations + 1) + last) * count
        before = tl.load(columns_ptr + slot, mask=real, other=0.0)
        after = tl.load(columns_ptr + count + slot, mask=real, other=0.0) * mass

    carried = tl.full((ANCHORS,), 1.0, tl.float32)
    counted = tl.full((ANCHORS,), 1.0, tl.float32)
    for start in range(0, positions, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < positions
        source = tl.load(unit_ptr + token, mask=inside, other=-1.0) >= 0
        if SOLVED:
            at = kernel_ptr + token[:, None] * count + slot[None, :]
            scaled = tl.load(at, mask=inside[:, None] & real[None, :], other=0.0)
            row = row_mass / tl.maximum(tl.sum(scaled * before[None, :], axis=1), smallest)
            carried += tl.sum(scaled * tl.where(source, row, 0.0)[:, None], axis=0) * after
        if NEAREST:
            nearest = tl.load(nearest_ptr + token, mask=inside, other=-1)
            is_nearest = source[:, None] & (nearest[:, None] == slot[None, :])
            counted += tl.sum(is_nearest.to(tl.float32), axis=0)
    by_plan = (1.0 - nearest_weight) / carried
    by_nearest = nearest_weight / counted
    tl.store(own_ptr + frame * count + slot, by_plan + by_nearest, mask=real)
    for start in range(0, positions, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < positions
        mask = inside[:, None] & real[None, :]
        at = kernel_ptr + token[:, None] * count + slot[None, :]
        source = tl.load(unit_ptr + token, mask=inside, other=-1.0) >= 0
        weight = tl.zeros((TOKENS, ANCHORS), tl.float32)
        if SOLVED:
            scaled = tl.load(at, mask=mask, other=0.0)
            row = row_mass / tl.maximum(tl.sum(scaled * before[None, :], axis=1), smallest)
            weight = scaled * tl.where(source, row, 0.0)[:, None] * (after * by_plan)[None, :]
        if NEAREST:
            nearest = tl.load(nearest_ptr + token, mask=inside, other=-1)
            is_nearest = source[:, None] & (nearest[:, None] == slot[None, :])
            weight += tl.where(is_nearest, by_nearest[None, :], 0.0)
        tl.store(at, weight, mask=mask)


@triton.jit
def _merge(
    features_ptr,  # (T, P, D)
    anchors_ptr,  # (T, A)
    weight_ptr,  # (T, P, A)
    own_ptr,  # (T, A)
    merged_ptr,  # (T, A, D) out
    positions,
    count,
    width,
    stride_frame,
    stride_token,
    stride_column,
    ANCHORS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    frame = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(1) * ANCHORS + tl.arange(0, ANCHORS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real, inside = slot < count, column < width
    features_ptr += frame * stride_frame
    weight_ptr += frame * positions * count
    columns = column.to(tl.int64)[None, :] * stride_column
    anchor = tl.load(anchors_ptr + frame * count + slot, mask=real, other=0)
    own = tl.load(own_ptr + frame * count + slot, mask=real, other=0.0)
    mask = real[:, None] & inside[None, :]
    merged = tl.load(features_ptr + anchor[:, None] * stride_token + columns, mask=mask, other=0.0).to(tl.float32)
    merged *= own[:, None]
    for start in range(0, positions, TOKENS):
        token = start + tl.arange(0, TOKENS)
        present = token < positions
        at = weight_ptr + token[None, :] * count + slot[:, None]
        weight = tl.load(at, mask=real[:, None] & present[None, :], other=0.0)
        tokens = features_ptr + token.to(tl.int64)[:, None] * stride_token + columns
        feature = tl.load(tokens, mask=present[:, None] & inside[None, :], other=0.0).to(tl.float32)
        # Half-precision features are exact in TF32. Three products keep 21 bits of the weights.
        merged = tl.dot(weight, feature, acc=merged, input_precision="tf32x3")
    out = merged_ptr + (frame * count + slot[:, None]) * width + column[None, :]
    tl.store(out, merged.to(merged_ptr.dtype.element_ty), mask=mask)


def absorb_frames(
    features: Tensor, anchors: Tensor, *, rows: int, cols: int, config: AOTConfig, compared: int | None = None
) -> FrameTokens:
    """Return the anchors after they absorbed the other tokens of their frame: (T, P, D), (T, A) -> (T, A, D).

    Arguments, result and errors are those of `aot_vllm.core.transport.absorb_frames`.
    """
    positions = rows * cols
    transport.check_within(features, anchors, positions=positions)
    frames, count = anchors.shape
    nothing = anchors[0, :0]
    if transport.merges_nothing(anchors, positions=positions, config=config):
        return FrameTokens(transport.rows_at(features, anchors), iterations=nothing, converged=nothing.bool())
    anchors = anchors.contiguous()
    weight_TPA, own_TA, iterations, converged = _absorption(features[..., :compared], anchors, cols=cols, config=config)
    merged_TAD = torch.empty(frames, count, features.shape[2], dtype=features.dtype, device=features.device)
    block = power_of_2(min(count, 64), least=16)
    grid = (triton.cdiv(features.shape[2], 128), triton.cdiv(count, block), frames)
    sizes = (positions, count, features.shape[2], *features.stride())
    blocks = {"ANCHORS": block, "TOKENS": 32, "COLUMNS": 128, "num_warps": 8 if block == 64 else 4}
    launch(_merge, grid, features, anchors, weight_TPA, own_TA, merged_TAD, *sizes, **blocks)
    if not config.mass:
        iterations, converged = nothing, nothing.bool()
    return FrameTokens(merged_TAD, iterations, converged)


def _absorption(
    features_TPD: Tensor, anchors_TA: Tensor, *, cols: int, config: AOTConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weight of every token in every merged anchor, (T, P, A), and of the anchor itself, (T, A).

    Also the iterations and the convergence of the joint solve, each (1,).
    """
    device = features_TPD.device
    frames, positions, _ = features_TPD.shape
    count = anchors_TA.shape[1]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    weight_TPA = product(features_TPD, transport.rows_at(features_TPD, anchors_TA))
    norms_TP = torch.linalg.vector_norm(features_TPD, dim=-1, dtype=torch.float32)
    iterations = config.iterations if config.mass else 0
    unit_TP, rows_TP, own_TA = empty(frames, positions), empty(frames, positions), empty(frames, count)
    columns, moved = empty(frames, iterations + 1, count), empty(frames, max(1, iterations))
    with_nearest = config.nearest_weight > 0
    nearest_TP = empty(frames, positions, dtype=torch.int32) if with_nearest else anchors_TA
    slots = power_of_2(count)
    shape = {"NEAREST": with_nearest, "TOKENS": max(1, min(power_of_2(positions), TILE // slots)), "ANCHORS": slots}
    num_warps = 8 if slots <= TILE else 16
    buffers = (weight_TPA, norms_TP, anchors_TA, unit_TP, rows_TP, columns, moved, nearest_TP)
    sizes = (positions, count, cols, 1 / max(1, positions // cols - 1), 1 / max(1, cols - 1))
    settings = (config.spatial_weight, config.epsilon, iterations)
    limits = (cost.SHORTEST, SMALLEST, torch.finfo(torch.float32).max)
    launch(_scalings, (frames,), *buffers, *sizes, *settings, *limits, num_warps=num_warps, **shape)
    num_iterations, converged = empty(1, dtype=torch.long), empty(1, dtype=torch.bool)
    results = (weight_TPA, unit_TP, columns, moved, nearest_TP, own_TA, num_iterations, converged)
    numbers = (frames, positions, count, iterations, config.tolerance, config.mass, config.nearest_weight, SMALLEST)
    constants = {"SOLVED": config.mass > 0, "STEPS": power_of_2(max(1, iterations)), "FRAMES": FRAMES}
    launch(_weights, (frames,), *results, *numbers, num_warps=num_warps, **constants, **shape)
    return weight_TPA, own_TA, num_iterations, converged
