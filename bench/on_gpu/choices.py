"""What is checked of a reduction: equal repeats, and the choice of another path."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aot_vllm import ReducedVideo, VideoGrid


def places(reduced: ReducedVideo, grid: VideoGrid) -> Tensor:
    """Return where each kept token stood in the video, (K,)."""
    return reduced.frames * grid.positions + reduced.rows * grid.cols + reduced.cols


def differing_repeats(call: Callable[[], ReducedVideo], *, repeats: int) -> int:
    """Return how many of so many repeats differ from a first call, in any bit of a token or in any place."""

    def same(left: ReducedVideo, right: ReducedVideo) -> bool:
        names = ("frames", "rows", "cols")
        tokens = (left.tokens.view(torch.uint8), right.tokens.view(torch.uint8))
        pairs = [tokens, *((getattr(left, name), getattr(right, name)) for name in names)]
        return all(torch.equal(*pair) for pair in pairs)

    first = call()
    return sum(not same(first, call()) for _ in range(repeats))


def agreement(
    reduced: ReducedVideo, reference: ReducedVideo, compared: Tensor | None, grid: VideoGrid
) -> dict[str, Any]:
    """Return the share of tokens that both keep, and how near the two were to a tie where they first part.

    `gap` is None where no choice differs. `compared`: the features, (T, P, D), whose distances chose. Without them the
    choice was by scores that both were given, so that the gap of a difference is infinite.
    """
    ours, theirs = (set(places(video, grid).tolist()) for video in (reduced, reference))
    if ours == theirs:
        return {"share": 1.0, "gap": None}
    share = len(ours & theirs) / len(theirs)
    if compared is None:
        return {"share": share, "gap": float("inf")}
    frame = min(ours ^ theirs) // grid.positions  # those after it started from other tokens
    kept = [{place % grid.positions for place in some if place // grid.positions == frame} for some in (ours, theirs)]
    before = [place % grid.positions for place in ours if place // grid.positions == frame - 1]
    return {"share": share, "gap": gap(compared[frame].double(), compared[frame - 1, before].double(), *kept)}


def gap(tokens: Tensor, before: Tensor, ours: set[int], theirs: set[int]) -> float:
    """Return the relative difference of the distances, squared, of the first choice in which two frames differ.

    Follows the choices that both made, farthest first, in float64. (P, D) and (k, D).
    """
    distance = torch.cdist(tokens, tokens).square()
    far = torch.cdist(tokens, before).square().amin(1) if len(before) else distance.mean(1)
    chosen: set[int] = set()
    while True:
        our, their = (max(some - chosen, key=lambda at: float(far[at]), default=None) for some in (ours, theirs))
        if our is None or their is None:
            return float("inf")
        if our != their:
            return float((far[our] - far[their]).abs() / far[[our, their]].max())
        far = torch.minimum(far, distance[our]) if chosen or len(before) else distance[our]
        chosen.add(our)
