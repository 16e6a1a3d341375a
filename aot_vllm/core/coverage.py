"""The choice of anchors that cover a frame: greedy facility location.

The cost of a choice is the sum, over the tokens of a frame, of the squared distance to the nearest anchor. With
`cosine` that is facility location by cosine similarity. Greedy k-center keeps the largest gap small; this rule keeps
the mean gap small.

Dimensions: T frames, P positions of a frame, C candidates, A anchors of a frame, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from aot_vllm.config import Distance, Memory
from aot_vllm.core.anchors import check_choice
from aot_vllm.core.distances import Frame, distances_to, frames_of
from aot_vllm.core.memory import Remembered, walk

ALL_CANDIDATES = 1024
"""In a frame of more positions than this, anchors are chosen among evenly spaced positions: this many, or twice as many
as anchors if that is more. All tokens still count as tokens to be covered. So the table of distances is linear in the
positions."""

OWN = 2**-10
"""A token's own gap counts so much more when it is a candidate. Two tokens that are near each other alone would else
gain the same, and rounding would choose."""


def select_covering_anchors(
    features: Tensor,
    *,
    count: int,
    keep: int | Sequence[int] | None = None,
    distance: Distance = "cosine",
    memory: Memory = "previous",
) -> Tensor:
    """Return `count` distinct positions of every frame, in the order of their choice: (T, P, D) -> (T, count).

    Greedy facility location (Nemhauser, Wolsey, Fisher, "An analysis of approximations for maximizing submodular set
    functions", 1978): each choice is the token that brings the tokens of the frame nearest to an anchor, summed over
    the frame. Tokens that are already near a remembered token need no cover.

    The first choice, if nothing is remembered, is the token nearest to all others. `keep`, `distance` and `memory` have
    the meaning that they have in `select_diverse_anchors`, and so have errors. A NaN does not change the number of
    choices; a token with one is chosen last.
    """
    keep_per_frame = check_choice(features, count=count, keep=keep)
    positions = features.shape[1]
    candidates = num_candidates(positions, count=count)
    candidates_C = torch.arange(0, candidates * positions, positions, device=features.device)
    candidates_C = candidates_C.div_(candidates, rounding_mode="floor")

    def choose(_: int, frame: Frame, near_P: Tensor | None) -> Tensor:
        return _cover(frame, near_P, candidates_C, count=count)

    return walk(frames_of(features, distance), keep_per_frame, choose, Remembered.by(memory))


def num_candidates(positions: int, *, count: int) -> int:
    """Return among how many positions of a frame the anchors are chosen."""
    return min(positions, max(ALL_CANDIDATES, 2 * count))


def _cover(frame: Frame, near_P: Tensor | None, candidates_C: Tensor, *, count: int) -> Tensor:
    """Return the positions of `count` tokens, each of which lowers the sum of distances most, (count,)."""
    distances_CP = _distances(frame, candidates_C)
    rest_C = distances_CP.masked_fill(frame.squares.isnan(), 0).sum(dim=1)
    gain_C = rest_C.neg_().nan_to_num_(neginf=torch.finfo(torch.float32).min)
    chosen_C = torch.zeros_like(gain_C)
    order: list[Tensor] = []
    for _ in range(count):
        if near_P is not None:  # infinite where a NaN is compared
            gain_C = (near_P - distances_CP).nan_to_num_(0, 0).clamp_min_(0).sum(dim=1)
            gain_C.add_(near_P.index_select(0, candidates_C).nan_to_num_(0, 0, 0), alpha=OWN)
        best_1 = (gain_C + chosen_C).argmax(dim=0, keepdim=True)
        row_P = distances_CP.index_select(0, best_1)[0]
        near_P = row_P if near_P is None else torch.fmin(near_P, row_P)
        chosen_C = chosen_C.index_fill(0, best_1, -torch.inf)
        order.append(best_1)
    return candidates_C.index_select(0, torch.cat(order))


def _distances(frame: Frame, candidates_C: Tensor) -> Tensor:
    """Return the squared distances from each candidate to each token of a frame, (C, P). Infinite for NaN."""
    if frame.distances is not None:
        distances_CP = frame.distances.index_select(0, candidates_C).nan_to_num_(torch.inf, torch.inf)
    else:
        distances_CP = distances_to(*frame.scaled(candidates_C), frame)
    return distances_CP.clamp_min_(0)
