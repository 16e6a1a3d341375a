"""Greedy facility location in one launch for a block of frames, see `aot_vllm.core.coverage.select_covering_anchors`.

A step reads the whole table of a frame. So the candidates are divided among programs on all processors of the GPU,
which agree on each choice. Every program holds all distances to the nearest anchor in its registers.

Dimensions: T frames, n frames of a block, P positions of a frame, C candidates, A anchors of a frame, D width.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from aot_vllm.config import Distance, Memory
from aot_vllm.core import coverage
from aot_vllm.core.anchors import check_choice
from aot_vllm.core.layout import counts_on
from aot_vllm.kernels.anchors import BEHIND_ALL, BLOCK_BYTES, MOST_BLOCKS, agreed, kept_before, programs_at_once, ranks
from aot_vllm.kernels.launch import launch, power_of_2, product
from aot_vllm.kernels.lengths import changes, scales_and_squares


@triton.jit
def _distances(table_ptr, candidate, place, scales_ptr, squares_ptr, scale, squares, at, real, positions):
    """Return the squared distances of a candidate to all tokens: infinite where a NaN is compared, and for padding."""
    row = tl.load(table_ptr + candidate * positions + at, mask=real, other=0.0)
    row = row * tl.load(scales_ptr + place) * scale
    distance = (tl.load(squares_ptr + place) - 2.0 * row) + squares
    distance = tl.where(distance == distance, tl.maximum(distance, 0.0), float("inf"))
    return tl.where(real, distance, float("inf"))


@triton.jit
def _gain(near, distance, squares, own, real, starts_afresh, OWN: tl.constexpr):
    """Return by how much a candidate lowers the sum of distances, or the negative sum if nothing is near yet."""
    is_nearer = distance < near
    lowered = tl.sum(tl.where(is_nearer, tl.where(is_nearer, near, 0.0) - tl.where(is_nearer, distance, 0.0), 0.0))
    lowered += OWN * tl.sum(tl.where(own & (near < float("inf")), near, 0.0))
    rest = tl.sum(tl.where(real & (squares == squares), distance, 0.0))
    return tl.where(starts_afresh, -rest, lowered)


@triton.jit
def _cover(
    own_ptr,  # (n, C, P) products of the candidates of a frame with its tokens
    following_ptr,  # (n or n - 1, C, P) products with the tokens of the next frame
    scales_ptr,  # (n and more, P) what tokens are multiplied by
    squares_ptr,  # (n and more, P) squares of the scaled tokens' lengths
    changed_ptr,  # (n and more, P) how far each position is from its token in the frame before
    keep_ptr,  # (T,) how many anchors each frame keeps
    near_ptr,  # (P,) from one block to the next: squared distance to the nearest token before, less the token's square
    covered_ptr,  # (P,) from one block to the next: squared distance of the tokens before to the nearest one kept
    taken_ptr,  # (n, C) in: zeros; which candidates are chosen
    best_ptr,  # (n, A) in: `BEHIND_ALL`; out: the marks of the anchors
    arrived_ptr,  # (n, A) in: zeros; out: how many programs have made their mark
    first_frame,
    block_frames,
    frames,
    positions,
    candidates,
    count,
    CARRIED: tl.constexpr,
    BEHIND_ALL: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    programs = tl.num_programs(0)
    at = tl.arange(0, BLOCK)
    real = at < positions
    in_block = at < tl.where(first_frame > 0, positions, 0)
    near_next = tl.load(near_ptr + at, mask=in_block, other=float("inf"))
    covered = tl.load(covered_ptr + at, mask=in_block, other=float("inf"))
    kept = tl.load(keep_ptr + first_frame - 1, mask=first_frame > 0, other=0)
    if CARRIED:
        kept = kept_before(keep_ptr, first_frame)
    for index in range(block_frames):
        frame = first_frame + index
        keep = tl.load(keep_ptr + frame)
        next_real = at < tl.where(frame + 1 < frames, positions, 0)
        scale = tl.load(scales_ptr + at, mask=real, other=0.0)
        next_scale = tl.load(scales_ptr + positions + at, mask=next_real, other=0.0)
        squares = tl.load(squares_ptr + at, mask=real, other=0.0)
        near = near_next + squares
        starts_afresh = kept == 0
        kept = kept + keep if CARRIED else keep
        if CARRIED:
            changed = tl.load(changed_ptr + at, mask=at < tl.where(frame > 0, positions, 0), other=0.0)
            carried = tl.sqrt(tl.maximum(covered, 0.0)) + changed
            near = tl.minimum(near, carried * carried)
            covered = near
        near = tl.where(near == near, near, float("inf"))
        near_next = tl.full((BLOCK,), float("inf"), tl.float32)
        for choice in range(count):
            mark = tl.full((), BEHIND_ALL, tl.int64)
            fresh = starts_afresh & (choice == 0)
            for candidate in range(tl.program_id(0), candidates, programs):
                place = candidate * positions // candidates
                distance = _distances(
                    own_ptr, candidate, place, scales_ptr, squares_ptr, scale, squares, at, real, positions
                )
                gain = _gain(near, distance, squares, at == place, real, fresh, OWN)
                is_free = tl.load(taken_ptr + candidate) == 0
                rank = ranks(gain, is_free).to(tl.int64) << 32
                mark = tl.maximum(mark, rank | (0x7FFFFFFF - candidate))
            best = agreed(mark, best_ptr + choice, arrived_ptr + choice, programs, BEHIND_ALL)
            tl.store(taken_ptr + best, 1)
            place = best * positions // candidates
            distance = _distances(own_ptr, best, place, scales_ptr, squares_ptr, scale, squares, at, real, positions)
            near = tl.where(fresh, distance, tl.minimum(near, distance))
            if CARRIED:
                kept_distance = tl.where(choice < keep, tl.where(at == place, 0.0, distance), float("inf"))
                covered = tl.minimum(covered, kept_distance)
            told = at < tl.where((choice < keep) & (frame + 1 < frames), positions, 0)
            next_row = tl.load(following_ptr + best * positions + at, mask=told, other=0.0)
            next_row = next_row * tl.load(scales_ptr + place) * next_scale
            next_distance = tl.load(squares_ptr + place) - 2.0 * next_row
            near_next = tl.where(choice < keep, tl.minimum(near_next, next_distance), near_next)
            tl.debug_barrier()  # before the next step asks what is taken
        own_ptr += candidates * positions
        following_ptr += candidates * positions
        scales_ptr += positions
        squares_ptr += positions
        changed_ptr += positions
        taken_ptr += candidates
        best_ptr += count
        arrived_ptr += count
    if tl.program_id(0) == 0:
        tl.store(near_ptr + at, near_next, mask=real)
        tl.store(covered_ptr + at, covered, mask=real)


def select_covering_anchors(
    features: Tensor,
    *,
    count: int,
    keep: int | Sequence[int] | None = None,
    distance: Distance = "cosine",
    memory: Memory = "previous",
) -> Tensor:
    """Return `count` distinct positions of every frame, in the order of their choice: (T, P, D) -> (T, count).

    Arguments, result and errors are those of `aot_vllm.core.coverage.select_covering_anchors`. A memory of `all` frames
    has no kernel: the tables would be one for each pair of frames. PyTorch chooses then.
    """
    if memory == "all":
        return coverage.select_covering_anchors(features, count=count, keep=keep, distance=distance, memory=memory)
    keep_per_frame = check_choice(features, count=count, keep=keep)
    positions = features.shape[1]
    candidates = coverage.num_candidates(positions, count=count)
    scales_TP, squares_TP = scales_and_squares(features, distance)
    carried = memory == "carried"
    per_token = (scales_TP, squares_TP, changes(features, scales_TP) if carried else scales_TP)
    keep_T = counts_on(keep_per_frame, features.device)
    at_once = _frames_at_once(features, candidates)
    best_TA = _marks(features, per_token, keep_T, candidates=candidates, count=count, at_once=at_once, carried=carried)
    chosen_TA = best_TA.bitwise_not_().bitwise_and_(0x7FFFFFFF)
    return chosen_TA if candidates == positions else chosen_TA.mul_(positions).div_(candidates, rounding_mode="floor")


def _frames_at_once(features: Tensor, candidates: int) -> int:
    """Return of how many frames the tables are made at the same time: few blocks, in the memory of `anchors`."""
    frames, positions, _ = features.shape
    frame_bytes = 8 * candidates * positions
    wanted = triton.cdiv(frames, MOST_BLOCKS)
    return max(1, BLOCK_BYTES // frame_bytes, wanted if wanted * frame_bytes <= features.nbytes else 0)


def _marks(
    features: Tensor,
    per_token: tuple[Tensor, ...],
    keep_T: Tensor,
    *,
    candidates: int,
    count: int,
    at_once: int,
    carried: bool,
) -> Tensor:
    """Return the marks of the anchors, (T, A). `per_token`: scales, squares and changes, each (T, P)."""
    frames, positions, _ = features.shape
    device = features.device
    near_P, covered_P = (torch.empty(positions, dtype=torch.float32, device=device) for _ in range(2))
    taken_TC = torch.zeros(frames, candidates, dtype=torch.int32, device=device)
    best_TA = torch.full((frames, count), BEHIND_ALL, dtype=torch.long, device=device)
    arrived_TA = torch.zeros(frames, count, dtype=torch.int32, device=device)
    places_C = torch.arange(0, candidates * positions, positions, device=device)
    places_C = places_C.div_(candidates, rounding_mode="floor")
    block = power_of_2(positions)
    for first in range(0, frames, at_once):
        tokens_nPD = features[first : first + at_once]
        some_nCD = tokens_nPD if candidates == positions else tokens_nPD.index_select(1, places_C)
        next_nPD = features[first + 1 : first + 1 + at_once]
        own_nCP = product(some_nCD, tokens_nPD)
        following_nCP = product(some_nCD[: len(next_nPD)], next_nPD) if len(next_nPD) else own_nCP
        launch(
            _cover,
            (min(programs_at_once(device), candidates),),
            own_nCP,
            following_nCP,
            *(part[first:] for part in per_token),
            keep_T,
            near_P,
            covered_P,
            taken_TC[first:],
            best_TA[first:],
            arrived_TA[first:],
            first,
            len(tokens_nPD),
            frames,
            positions,
            candidates,
            count,
            CARRIED=carried,
            BEHIND_ALL=BEHIND_ALL,
            OWN=coverage.OWN,
            BLOCK=block,
            num_warps=max(1, min(16, block // 256)),
            launch_cooperative_grid=True,  # programs wait for each other, so all must run at once
        )
    return best_TA
