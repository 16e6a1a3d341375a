"""What tokens are multiplied by before their distances are measured, and sums and changes of such scaled tokens.

See `aot_vllm.core.distances` and `aot_vllm.core.memory`. Dimensions: T frames, P positions of a frame, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aot_vllm.config import Distance
from aot_vllm.core.cost import SHORTEST
from aot_vllm.core.distances import EXTREME
from aot_vllm.kernels.launch import launch, power_of_2

TOKENS, COLUMNS = 16, 128
"""What a program reads at a time: so many tokens, so many columns of each."""


@triton.jit
def median(values, counted):
    """Return the lower median of the numbers that are counted, all at least 0.

    Floats of this sign are in the order of their bits. Bit by bit, the median is the largest number that at most half
    of the others are below. Without any number it is a NaN or 0.
    """
    bits = values.to(tl.int32, bitcast=True)
    half = (tl.sum(counted.to(tl.int32), axis=0) - 1) // 2
    found = tl.zeros((), tl.int32)
    for step in range(31):
        larger = found | (1 << (30 - step))
        below = tl.sum((counted & (bits < larger)).to(tl.int32), axis=0)
        found = tl.where(below <= half, larger, found)
    return found.to(tl.float32, bitcast=True)


@triton.jit
def _scales(
    norms_ptr,  # (T, P) lengths of the tokens
    scales_ptr,  # (T, P) out
    squares_ptr,  # (T, P) out: squares of the scaled tokens' lengths
    positions,
    extreme,
    shortest,
    COSINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    frame = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < positions
    norm = tl.load(norms_ptr + frame * positions + at, mask=real, other=0.0)
    if COSINE:
        scale = 1.0 / tl.where(norm < shortest, shortest, norm)
    else:
        middle = median(norm, norm > 0.0)
        scale = tl.where(norm > extreme * middle, middle / tl.where(norm > 0.0, norm, 1.0), 1.0)
    tl.store(scales_ptr + frame * positions + at, scale, mask=real)
    tl.store(squares_ptr + frame * positions + at, norm * norm * scale * scale, mask=real)


@triton.jit
def _changes(
    features_ptr,  # (T, P, D)
    scales_ptr,  # (T, P)
    changed_ptr,  # (T, P) out
    positions,
    width,
    stride_frame,
    stride_token,
    stride_column,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    frame = tl.program_id(1).to(tl.int64) + 1
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    real = token < positions
    features_ptr += frame * stride_frame
    scales_ptr += frame * positions
    scale = tl.load(scales_ptr + token, mask=real, other=0.0)[:, None]
    before = tl.load(scales_ptr - positions + token, mask=real, other=0.0)[:, None]
    sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        column = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        mask = real[:, None] & (column < width)[None, :]
        at = features_ptr + token[:, None] * stride_token + (column * stride_column)[None, :]
        change = tl.load(at, mask=mask, other=0.0).to(tl.float32) * scale
        change -= tl.load(at - stride_frame, mask=mask, other=0.0).to(tl.float32) * before
        sums += change * change
    tl.store(changed_ptr + frame * positions + token, tl.sqrt(tl.sum(sums, axis=1)), mask=real)


@triton.jit
def _totals(
    features_ptr,  # (T, P, D)
    scales_ptr,  # (T, P)
    totals_ptr,  # (T, D) out
    positions,
    width,
    stride_frame,
    stride_token,
    stride_column,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    frame = tl.program_id(1).to(tl.int64)
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside = column < width
    sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, positions, TOKENS):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)
        real = token < positions
        scale = tl.load(scales_ptr + frame * positions + token, mask=real, other=0.0)
        at = features_ptr + frame * stride_frame + token[:, None] * stride_token + (column * stride_column)[None, :]
        sums += tl.load(at, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32) * scale[:, None]
    tl.store(totals_ptr + frame * width + column, tl.sum(sums, axis=0), mask=inside)


def scales_and_squares(features: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    """Return the scales of tokens, see `aot_vllm.core.distances.length_scales`, and the squares of scaled lengths.

    (T, P, D) -> (T, P), (T, P).
    """
    frames, positions, _ = features.shape
    norms_TP = torch.linalg.vector_norm(features, dim=2, dtype=torch.float32)
    scales_TP, squares_TP = torch.empty_like(norms_TP), torch.empty_like(norms_TP)
    block = power_of_2(positions)
    launch(
        _scales,
        (frames,),
        norms_TP,
        scales_TP,
        squares_TP,
        positions,
        EXTREME,
        SHORTEST,
        COSINE=distance == "cosine",
        BLOCK=block,
        num_warps=max(1, min(16, block // 256)),
    )
    return scales_TP, squares_TP


def changes(features: Tensor, scales_TP: Tensor) -> Tensor:
    """Return how far each scaled token is from the one at its position in the frame before, (T, P). Not set for 0."""
    frames, positions, width = features.shape
    changed_TP = torch.empty_like(scales_TP)
    if frames > 1:
        grid = (triton.cdiv(positions, TOKENS), frames - 1)
        blocks = {"TOKENS": TOKENS, "COLUMNS": COLUMNS}
        launch(_changes, grid, features, scales_TP, changed_TP, positions, width, *features.stride(), **blocks)
    return changed_TP


def totals(features: Tensor, scales_TP: Tensor) -> Tensor:
    """Return the sums of the scaled tokens of each frame, (T, P, D), (T, P) -> (T, D)."""
    frames, positions, width = features.shape
    totals_TD = torch.empty(frames, width, dtype=torch.float32, device=features.device)
    grid = (triton.cdiv(width, COLUMNS), frames)
    blocks = {"TOKENS": TOKENS, "COLUMNS": COLUMNS}
    launch(_totals, grid, features, scales_TP, totals_TD, positions, width, *features.stride(), **blocks)
    return totals_TD
