"""Greedy k-center of all frames of a video in one launch, see `aot_vllm.core.anchors.select_diverse_anchors`.

Each choice depends on all choices before it, in its own frame and in the previous one. So one program walks through the
video, and one warp or a few hold the distances of a frame in registers. A step is short: two reductions over integers,
which are single instructions of a warp since compute capability 8.0, and two rows of products, which are in flight
together.

Dimensions: T frames, n frames of a block, P positions of a frame, A anchors of a frame, D width.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from aot_vllm.core import anchors
from aot_vllm.core.layout import counts_on
from aot_vllm.kernels.launch import launch, power_of_2, product

BLOCK_BYTES = 256 * 2**20
"""Most memory for the products of a block of frames, with themselves and with the next frame. It holds 1,164 frames of
14 x 14 tokens, or 372 frames of 300. A longer video takes three launches more for each further block."""


@triton.jit
def _spread_out(
    own_ptr,  # (n, P, P) products of the tokens of a frame
    following_ptr,  # (n or n - 1, P, P) products with the tokens of the next frame
    sums_ptr,  # (n, P) sums of the rows of `own`
    keep_ptr,  # (T,) how many anchors each frame keeps
    near_ptr,  # (P,) from one block to the next: squared distance to the nearest token before, less the token's square
    order_ptr,  # (n, A) out: the anchors
    first_frame,
    block_frames,
    frames,
    positions,
    count,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    real = at < positions
    # A condition on a number is written as a limit on positions: Triton's interpreter takes no others as masks.
    near = tl.load(near_ptr + at, mask=at < tl.where(first_frame > 0, positions, 0), other=float("inf"))
    for index in range(block_frames):
        frame = first_frame + index
        squares = tl.load(own_ptr + at.to(tl.int64) * (positions + 1), mask=real, other=0.0)
        kept_before = tl.load(keep_ptr + frame - 1, mask=frame > 0, other=0)
        keep = tl.load(keep_ptr + frame)
        keep = tl.where(frame + 1 < frames, keep, 0)
        starts_afresh = kept_before == 0
        sums = tl.load(sums_ptr + at, mask=at < tl.where(starts_afresh, positions, 0), other=0.0)
        far = tl.where(starts_afresh, squares * positions - 2.0 * sums, near + squares)
        near = tl.full((BLOCK,), float("inf"), tl.float32)
        for choice in range(count):
            # Integers in the order of the distances: a NaN is the farthest, and padding is behind negative infinity.
            bits = (far + 0.0).to(tl.int32, bitcast=True)
            rank = tl.where(far != far, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
            rank = tl.where(real, rank, -0x80000000)
            farthest = tl.max(rank, axis=0)
            best = tl.min(tl.where(rank == farthest, at, BLOCK), axis=0)  # the lowest position of a tie
            tl.store(order_ptr + choice, best.to(tl.int64))
            row_of_best = best.to(tl.int64) * positions
            own_row = tl.load(own_ptr + row_of_best + at, mask=real, other=0.0)
            next_row = tl.load(
                following_ptr + row_of_best + at, mask=at < tl.where(choice < keep, positions, 0), other=float("-inf")
            )
            square = tl.load(own_ptr + row_of_best + best)
            distance = tl.where(at == best, float("-inf"), (square - 2.0 * own_row) + squares)
            far = tl.where(starts_afresh & (choice == 0), distance, tl.minimum(far, distance))  # drops NaN
            near = tl.minimum(near, square - 2.0 * next_row)
        own_ptr += positions * positions
        following_ptr += positions * positions
        sums_ptr += positions
        order_ptr += count
    tl.store(near_ptr + at, near, mask=real)


def select_diverse_anchors(features: Tensor, *, count: int, keep: int | Sequence[int] | None = None) -> Tensor:
    """Return `count` distinct positions of every frame, in the order of their choice: (T, P, D) -> (T, count).

    Arguments, result and errors are those of `aot_vllm.core.anchors.select_diverse_anchors`. Frames whose products
    would exceed its `TABLE_BYTES` are left to that function, for they are so large that launches do not matter.
    """
    keep_per_frame = anchors.check_diverse(features, count=count, keep=keep)
    frames, positions, _ = features.shape
    if 4 * positions**2 > anchors.TABLE_BYTES:
        return anchors.select_diverse_anchors(features, count=count, keep=keep_per_frame)
    keep_T = counts_on(keep_per_frame, features.device)
    order_TA = torch.empty(frames, count, dtype=torch.long, device=features.device)
    near_P = torch.empty(positions, dtype=torch.float32, device=features.device)
    block = power_of_2(positions)
    at_once = max(1, BLOCK_BYTES // (8 * positions**2))
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
            own_nPP.sum(dim=1),
            keep_T,
            near_P,
            order_TA[first:],
            first,
            len(tokens_nPD),
            frames,
            positions,
            count,
            BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
        )
    return order_TA
