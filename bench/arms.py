"""What `bench/fidelity.py` compares: ways to make a video's tokens fewer, all with the signature of `reduce_video`.

Each returns exactly as many tokens as the prompt has places for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from aot_vllm import AOTConfig, VideoGrid
from aot_vllm.core.budget import budget
from aot_vllm.core.reduce import ReducedVideo, reduce_video

Reduce = Callable[..., ReducedVideo]


def chosen(features: Tensor, index_K: Tensor, grid: VideoGrid, retention: float) -> ReducedVideo:
    """Return the tokens at these places of the flattened video, in their order and as they are."""
    index_K = index_K.sort().values
    none = index_K[:0]
    cells = index_K % grid.positions
    counts = budget(grid, retention=retention)
    if len(index_K) != counts.total:
        raise ValueError(f"an arm kept {len(index_K)} tokens, the prompt has places for {counts.total}")
    tokens = features.reshape(grid.tokens, -1)[index_K]
    frames = index_K // grid.positions
    return ReducedVideo(tokens, frames, cells // grid.cols, cells % grid.cols, counts, none, none.bool())


def evenly(total: int, places: int) -> Tensor:
    """Return `total` of `places` places, evenly spread."""
    return ((torch.arange(total) + 0.5) * places / total).long()


def uniform(features: Tensor, *_: Tensor, grid: VideoGrid, retention: float, **__: Any) -> ReducedVideo:
    """Every n-th token."""
    total = budget(grid, retention=retention).total
    return chosen(features, evenly(total, grid.tokens), grid, retention)


def at_random(features: Tensor, *_: Tensor, grid: VideoGrid, retention: float, **__: Any) -> ReducedVideo:
    """Any tokens; the same for the same video."""
    generator = torch.Generator().manual_seed(int(features.double().sum().abs() * 1e3) % 2**31)
    index = torch.randperm(grid.tokens, generator=generator)[: budget(grid, retention=retention).total]
    return chosen(features, index, grid, retention)


def attention(
    features: Tensor, _: Tensor, scores: Tensor, *, grid: VideoGrid, retention: float, **__: Any
) -> ReducedVideo:
    """The tokens of each frame that receive most attention in the deep layer; frames get equally many."""
    total = budget(grid, retention=retention).total
    counts = torch.bincount(evenly(total, grid.frames), minlength=grid.frames).tolist()
    rows = [frame * grid.positions + scores[frame].topk(count).indices for frame, count in enumerate(counts)]
    return chosen(features, torch.cat(rows), grid, retention)


def stock(method: str) -> Reduce:
    """Return what vLLM's own function keeps, which may be more than asked for: EVS keeps the first frame whole."""

    def reduce(features: Tensor, *_: Tensor, grid: VideoGrid, retention: float, **__: Any) -> ReducedVideo:
        from vllm.multimodal.video_prune import evs, vidcom2

        total = budget(grid, retention=retention).total
        size = (grid.frames, grid.rows, grid.cols)
        function = {"EVS": evs, "VidCom2": vidcom2}[method].compute_retention_mask
        rate = 1 - (total + 0.5) / grid.tokens  # both round down
        mask = function(features.reshape(grid.tokens, -1), size, spatial_merge_size=1, q=rate)
        return chosen(features, mask.flatten().nonzero()[:, 0], grid, retention)

    return reduce


def aot(**settings: Any) -> Reduce:
    """Return the method with these settings in place of the defaults."""

    def reduce(*tensors: Tensor, config: AOTConfig, **rest: Any) -> ReducedVideo:
        return reduce_video(*tensors, config=dataclasses.replace(config, **({"anchors": DEFAULT} | settings)), **rest)

    return reduce


def anchors_by(score: Callable[[Tensor], Tensor]) -> Reduce:
    """Return the method with the anchors of each frame that score highest: features (T, P, D) to scores (T, P)."""
    by_score = aot(anchors="attention", global_ratio=1.0)

    def reduce(features: Tensor, *_: Tensor, **rest: Any) -> ReducedVideo:
        scores = score(features)
        return by_score(features, scores, scores, **rest)

    return reduce


def unlikeness(features: Tensor) -> Tensor:
    """Return the cosine distance of tokens to the mean of their frame."""
    return 1 - cosine_similarity(features, features.mean(1, keepdim=True), dim=-1)


def without_transport(features: Tensor, *scores: Tensor, **arguments: Any) -> ReducedVideo:
    """The tokens AOT keeps, as they were."""
    reduced = aot()(features, *scores, **arguments)
    grid = arguments["grid"]
    index = (reduced.frames * grid.rows + reduced.rows) * grid.cols + reduced.cols
    return dataclasses.replace(reduced, tokens=features.reshape(grid.tokens, -1)[index])


DEFAULT = AOTConfig().anchors
ARMS: dict[str, Reduce] = {
    "AOT": aot(),
    "AOT, as released": aot(anchors="attention", emit="both", kappa=0.3, iterations=100),
    "anchors, nothing moved": without_transport,
    "EVS": stock("EVS"),
    "VidCom2": stock("VidCom2"),
    "attention": attention,
    "uniform": uniform,
    "random": at_random,
}
ABLATIONS: dict[str, Reduce] = {
    "anchors by attention": aot(anchors="attention"),
    "anchors by length": anchors_by(lambda features: features.norm(dim=-1)),
    "anchors by distance from the frame's mean": anchors_by(unlikeness),
    "anchors by attention, kept and emitted as released": aot(anchors="attention", emit="both", kappa=0.3),
    "30% kept of later frames, emitted twice": aot(emit="both", kappa=0.3),
    "1 clip": aot(clips=1),
    "4 clips": aot(clips=4),
    "16 clips": aot(clips=16),
    "least kept of later frames": aot(kappa=0.0),
    "30% kept of later frames": aot(kappa=0.3),
    "half kept of later frames": aot(kappa=0.5),
    "no mass": aot(mass=0.0),
    "a mass of 5": aot(mass=5.0),
    "full mass": aot(mass=36.0),
    "no mean of the nearest": aot(nearest_weight=0.0),
    "half mean of the nearest": aot(nearest_weight=0.5),
    "no distance in space": aot(spatial_weight=0.0),
    "5 iterations": aot(iterations=5),
    "100 iterations": aot(iterations=100),
}
