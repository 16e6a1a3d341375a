"""How much the distances of a token count, in a few launches, see `aot_vllm.core.calibration`.

Dimensions: T frames, P positions of a frame, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aot_vllm.core.calibration import LEAST, MOST, SIMILAR
from aot_vllm.core.cost import SHORTEST
from aot_vllm.errors import ShapeError
from aot_vllm.kernels.launch import launch, power_of_2
from aot_vllm.kernels.lengths import COLUMNS, TOKENS, median, scales_and_squares, totals


@triton.jit
def _in_medians(
    scores_ptr,  # (T, P)
    counted_ptr,  # (T, P) out: the scores in medians of their frame
    positions,
    most,
    shortest,
    BLOCK: tl.constexpr,
):
    frame = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < positions
    score = tl.load(scores_ptr + frame * positions + at, mask=real, other=0.0)
    score = tl.where(score > 0.0, score, 0.0)  # a NaN too
    score = tl.where(score < most, score, most)
    middle = tl.maximum(median(score, real), shortest)
    tl.store(counted_ptr + frame * positions + at, score / middle, mask=real)


@triton.jit
def _resemblance(
    means_ptr,  # (T, D) sums of the directions of each frame
    resembles_ptr,  # (T,) out: cosine of a frame and the one before it
    width,
    shortest,
    COLUMNS: tl.constexpr,
):
    frame = tl.program_id(0).to(tl.int64)
    product = tl.zeros((COLUMNS,), tl.float32)
    square = tl.zeros((COLUMNS,), tl.float32)
    before = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < width
        own = tl.load(means_ptr + frame * width + column, mask=inside, other=0.0)
        other = tl.load(
            means_ptr + (frame - 1) * width + column, mask=column < tl.where(frame > 0, width, 0), other=0.0
        )
        product += own * other
        square += own * own
        before += other * other
    length = tl.maximum(tl.sqrt(tl.sum(square, axis=0)), shortest)
    length_before = tl.maximum(tl.sqrt(tl.sum(before, axis=0)), shortest)
    tl.store(resembles_ptr + frame, tl.sum(product, axis=0) / length / length_before)


@triton.jit
def _segments(
    means_ptr,  # (T, D) sums of the directions of each frame
    resembles_ptr,  # (T + 1,)
    segments_ptr,  # (T, D) out: the sum of the frames of each frame's segment
    frames,
    width,
    similar,
    COLUMNS: tl.constexpr,
):
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside = column < width
    sums = tl.zeros((COLUMNS,), tl.float32)
    first = 0
    for frame in range(frames):
        sums += tl.load(means_ptr + frame * width + column, mask=inside, other=0.0)
        resembles = tl.load(resembles_ptr + frame + 1)
        is_last = (frame + 1 == frames) | (resembles < similar)
        for member in range(first, tl.where(is_last, frame + 1, first)):
            tl.store(segments_ptr + member * width + column, sums, mask=inside)
        sums = tl.where(is_last, 0.0, sums)
        first = tl.where(is_last, frame + 1, first)


@triton.jit
def _weigh(
    features_ptr,  # (T, P, D)
    scales_ptr,  # (T, P) what makes the length of a token 1
    segments_ptr,  # (T, D)
    counted_ptr,  # (T, P) attention in medians
    sums_ptr,  # (P,) its sums over frames
    weights_ptr,  # (T, P) out
    frames,
    positions,
    width,
    stride_frame,
    stride_token,
    stride_column,
    least,
    shortest,
    RELEVANCE: tl.constexpr,
    ATTENTION: tl.constexpr,
    SINKS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    frame = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real = token < positions
    weight = tl.full((TOKENS,), 1.0, tl.float32)
    if ATTENTION:
        counted = tl.load(counted_ptr + frame * positions + token, mask=real, other=0.0)
        if SINKS:
            others = tl.load(sums_ptr + token, mask=real, other=0.0) - counted
            counted /= tl.maximum(others / tl.maximum(frames - 1, 1), 1.0)
        weight = tl.maximum(counted, least)
    if RELEVANCE:
        products = tl.zeros((TOKENS, COLUMNS), tl.float32)
        square = tl.zeros((COLUMNS,), tl.float32)
        rows = features_ptr + frame * stride_frame + token.to(tl.int64) * stride_token
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < width
            segment = tl.load(segments_ptr + frame * width + column, mask=inside, other=0.0)
            square += segment * segment
            at = rows[:, None] + (column.to(tl.int64) * stride_column)[None, :]
            features = tl.load(at, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
            products += features * segment[None, :]
        length = tl.maximum(tl.sqrt(tl.sum(square, axis=0)), shortest)
        cosine = tl.sum(products, axis=1) / length
        cosine *= tl.load(scales_ptr + frame * positions + token, mask=real, other=0.0)
        weight *= tl.where(cosine > least, cosine, least)  # a NaN is the least
    tl.store(weights_ptr + frame * positions + token, weight, mask=real)


def token_weights(
    features: Tensor,
    scores: Tensor | None,
    *,
    by_attention: bool = True,
    without_sinks: bool = True,
    by_relevance: bool = True,
) -> Tensor | None:
    """Return the product of the factors that are switched on: (T, P, D), (T, P) -> (T, P), or None without any.

    Arguments, result and errors are those of `aot_vllm.core.calibration.token_weights`.
    """
    if not (by_attention or by_relevance):
        return None
    frames, positions, width = features.shape
    weights_TP = torch.empty(frames, positions, dtype=torch.float32, device=features.device)
    scales_TP = segments_TD = counted_TP = sums_P = weights_TP
    if by_attention:
        if scores is None:
            raise ShapeError("scores must be a tensor if distances are weighted by attention, got None")
        counted_TP = _counted(scores)
        sums_P = counted_TP.sum(dim=0) if without_sinks else counted_TP
    if by_relevance:
        scales_TP, _ = scales_and_squares(features, "cosine")
        segments_TD = _sums_of_segments(totals(features, scales_TP))
    launch(
        _weigh,
        (triton.cdiv(positions, TOKENS), frames),
        features,
        scales_TP,
        segments_TD,
        counted_TP,
        sums_P,
        weights_TP,
        frames,
        positions,
        width,
        *features.stride(),
        LEAST,
        SHORTEST,
        RELEVANCE=by_relevance,
        ATTENTION=by_attention,
        SINKS=without_sinks,
        TOKENS=TOKENS,
        COLUMNS=COLUMNS,
    )
    return weights_TP


def _counted(scores: Tensor) -> Tensor:
    """Return scores in medians of their frame, (T, P)."""
    frames, positions = scores.shape
    counted_TP = torch.empty(frames, positions, dtype=torch.float32, device=scores.device)
    block = power_of_2(positions)
    num_warps = max(1, min(16, block // 256))
    scores = scores.float().contiguous()
    launch(_in_medians, (frames,), scores, counted_TP, positions, MOST, SHORTEST, BLOCK=block, num_warps=num_warps)
    return counted_TP


def _sums_of_segments(means_TD: Tensor) -> Tensor:
    """Return for each frame the sum of the means of its segment, (T, D)."""
    frames, width = means_TD.shape
    segments_TD = torch.empty_like(means_TD)
    resembles_T = torch.empty(frames + 1, dtype=torch.float32, device=means_TD.device)
    launch(_resemblance, (frames,), means_TD, resembles_T, width, SHORTEST, COLUMNS=COLUMNS)
    grid = (triton.cdiv(width, COLUMNS),)
    launch(_segments, grid, means_TD, resembles_T, segments_TD, frames, width, SIMILAR, COLUMNS=COLUMNS)
    return segments_TD
