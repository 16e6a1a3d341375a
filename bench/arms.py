"""The arms of `bench/fidelity.py`: methods of token reduction, all with the signature of `reduce_video`.

Each arm returns exactly as many tokens as the prompt has placeholders.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, normalize

from aot_vllm import AOTConfig, VideoGrid
from aot_vllm.core.anchors import select_diverse_anchors
from aot_vllm.core.budget import budget
from aot_vllm.core.reduce import ReducedVideo, reduce_video
from aot_vllm.core.transport import absorb_frames, merge_across_frames

Reduce = Callable[..., ReducedVideo]


def chosen(features: Tensor, index_K: Tensor, grid: VideoGrid, retention: float) -> ReducedVideo:
    """Return the tokens at these indices of the flattened video, in ascending order and unchanged."""
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
    """Return `total` evenly spaced indices below `places`."""
    return ((torch.arange(total) + 0.5) * places / total).long()


def uniform(features: Tensor, *_: Tensor, grid: VideoGrid, retention: float, **__: Any) -> ReducedVideo:
    """Uniform sampling: evenly spaced tokens of the flattened video."""
    total = budget(grid, retention=retention).total
    return chosen(features, evenly(total, grid.tokens), grid, retention)


def at_random(features: Tensor, *_: Tensor, grid: VideoGrid, retention: float, **__: Any) -> ReducedVideo:
    """Random tokens; the same tokens for the same video."""
    generator = torch.Generator().manual_seed(int(features.double().sum().abs() * 1e3) % 2**31)
    index = torch.randperm(grid.tokens, generator=generator)[: budget(grid, retention=retention).total]
    return chosen(features, index, grid, retention)


def attention(
    features: Tensor, _: Tensor, scores: Tensor, *, grid: VideoGrid, retention: float, **__: Any
) -> ReducedVideo:
    """The tokens of each frame that receive most attention in the deep layer; all frames keep equally many tokens."""
    total = budget(grid, retention=retention).total
    counts = torch.bincount(evenly(total, grid.frames), minlength=grid.frames).tolist()
    rows = [frame * grid.positions + scores[frame].topk(count).indices for frame, count in enumerate(counts)]
    return chosen(features, torch.cat(rows), grid, retention)


def stock(method: str) -> Reduce:
    """Return vLLM's own pruning function as an arm. It may keep too many tokens: EVS keeps the first frame whole."""

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


def alone(features: Tensor) -> Tensor:
    """Return scores that rank each frame's tokens in their order of choice, if each frame ignores the others."""
    positions = features.shape[1]
    order = select_diverse_anchors(features, count=positions, keep=0)
    return -order.argsort(dim=1).float()


def by_directions(features: Tensor, *scores: Tensor, **rest: Any) -> ReducedVideo:
    """Anchors by the distance of directions: all tokens are normalised to length 1 before the choice."""
    directions = normalize(features.float(), dim=-1)
    width = features.shape[-1]
    reduced = aot()(torch.cat((directions, features), dim=-1), *scores, compared=width, **rest)
    return dataclasses.replace(reduced, tokens=reduced.tokens[:, width:])


def before_pooling(features: Tensor, *_: Tensor, grid: VideoGrid, **rest: Any) -> ReducedVideo:
    """Anchors chosen before pooling, four times as many; the pooled cells with most of them are kept."""
    (fine,) = UNPOOLED
    frames, positions, _ = fine.shape
    side = math.isqrt(positions)
    counts = budget(grid, retention=rest["retention"])
    times = positions // grid.positions
    order_TA = select_diverse_anchors(
        fine,
        count=times * max(counts.anchors_per_clip),
        keep=[times * kept for kept in counts.per_frame],
    )
    falling_A = torch.linspace(1, 0.999, order_TA.shape[1]).expand(frames, -1)  # among equals, the earlier choice
    mask = torch.zeros(frames, positions).scatter_(1, order_TA, falling_A)
    scores = interpolate(mask.view(frames, 1, side, side), (grid.rows, grid.cols), mode="bilinear").flatten(1)
    by_score = aot(anchors="attention", global_ratio=1.0)
    return by_score(features, scores, scores, grid=grid, **rest)


def changes(features: Tensor) -> Tensor:
    """Return the distance of each frame from the previous one, (T,); the first frame gets the largest distance."""
    far = (features[1:] - features[:-1]).float().square().sum(-1).mean(1)
    return torch.cat((far.max()[None], far))


def by_change(features: Tensor, *_: Tensor, grid: VideoGrid, retention: float, **__: Any) -> ReducedVideo:
    """Half of all anchors are distributed by the change of each frame; nothing is merged."""
    total = budget(grid, retention=retention).total
    wanted = total * (0.5 / grid.frames + 0.5 * changes(features) / changes(features).sum())
    counts = wanted.floor().clamp(1, grid.positions).long()
    while counts.sum() != total:
        more = bool(counts.sum() < total)
        can = counts < grid.positions if more else counts > 1
        short = (wanted - counts).masked_fill(~can, -torch.inf if more else torch.inf)
        counts[short.argmax() if more else short.argmin()] += 1 if more else -1
    kept = counts.tolist()
    order = select_diverse_anchors(features, count=max(kept), keep=kept)
    rows = [frame * grid.positions + order[frame, :count] for frame, count in enumerate(kept)]
    return chosen(features, torch.cat(rows), grid, retention)


def cut_at_changes(**settings: Any) -> Reduce:
    """Return the method with the same number of clips, cut where the change between frames is largest."""

    def reduce(
        features: Tensor, *_: Tensor, grid: VideoGrid, retention: float, config: AOTConfig, **__: Any
    ) -> ReducedVideo:
        config = dataclasses.replace(config, anchors=DEFAULT, **settings)
        counts = budget(grid, retention=retention, config=config)
        clips = len(counts.clip_lengths)
        starts = [0, *(1 + changes(features)[1:].topk(clips - 1).indices.sort().values).tolist(), grid.frames]
        kept = iter(sorted((k for k in counts.keep_per_frame if k), reverse=True))
        keeps = [0 if frame in starts else next(kept) for frame in range(grid.frames)]
        most = counts.anchors_per_clip[0]
        order = select_diverse_anchors(features, count=most, keep=[k or most for k in keeps])
        parts = []
        for clip, anchors in enumerate(counts.anchors_per_clip):
            first, end = starts[clip], starts[clip + 1]
            keep = keeps[first:end]
            slots, ranks = order[first:end, :anchors].sort(dim=1)
            within = absorb_frames(features[first:end], slots, rows=grid.rows, cols=grid.cols, config=config)
            across = merge_across_frames(
                within.tokens, clip_lengths=[end - first], keep=keep, config=config, ranks=ranks
            )
            cells = slots[across.frames, across.slots]
            parts.append((across.tokens, across.frames + first, cells))
        tokens, frames, cells = map(torch.cat, zip(*parts, strict=True))
        if len(tokens) != counts.total:
            raise ValueError(f"an arm kept {len(tokens)} tokens, the prompt has places for {counts.total}")
        none = cells[:0]
        return ReducedVideo(tokens, frames, cells // grid.cols, cells % grid.cols, counts, none, none.bool())

    return reduce


UNPOOLED: list[Tensor] = []
"""The input of the model's last pooling, (T, positions of the encoder, D), if the benchmark records it."""

DEFAULT = AOTConfig().anchors
RELEASED = {name: value for name, value in AOTConfig.paper().settings().items() if not name.endswith("_layer")}
TRANSPORT = {name: RELEASED[name] for name in ("mass", "nearest_weight", "kappa")}
ARMS: dict[str, Reduce] = {
    "AOT": aot(),
    "AOT, as released": aot(**RELEASED),
    "anchors, nothing moved": aot(mass=0.0, nearest_weight=0.0),
    "EVS": stock("EVS"),
    "VidCom2": stock("VidCom2"),
    "attention": attention,
    "uniform": uniform,
    "random": at_random,
}
ABLATIONS: dict[str, Reduce] = {
    "anchors by direction": by_directions,
    "anchors of each frame by itself": anchors_by(alone),
    "anchors chosen before pooling": before_pooling,
    "anchors by length": anchors_by(lambda features: features.norm(dim=-1)),
    "anchors by distance from the frame's mean": anchors_by(unlikeness),
    "anchors by attention": aot(anchors="attention"),
    "anchors by distance, all else as released": aot(**(RELEASED | {"anchors": DEFAULT})),
    "more for frames that change, nothing moved": by_change,
    "30% kept of later frames": aot(kappa=0.3),
    "30% kept of later frames, 4 clips": aot(kappa=0.3, clips=4),
    "30% kept of later frames, clips cut at changes": cut_at_changes(kappa=0.3),
    "30% kept of later frames, emitted twice": aot(kappa=0.3, emit="both"),
    "half kept of later frames": aot(kappa=0.5),
    "transport as released": aot(**TRANSPORT),
    "transport as released, within frames alone": aot(**(TRANSPORT | {"kappa": 1.0})),
    "transport as released, across frames alone": aot(kappa=TRANSPORT["kappa"], mass=0.0),
    "transport as released, half kept of later frames": aot(**(TRANSPORT | {"kappa": 0.5})),
    "transport as released, 70% kept of later frames": aot(**(TRANSPORT | {"kappa": 0.7})),
    "transport as released, 70% kept of later frames, 4 clips": aot(**(TRANSPORT | {"kappa": 0.7}), clips=4),
    "a mass of 1": aot(mass=1.0),
    "a mass of 5": aot(mass=5.0),
    "full mass": aot(mass=36.0),
    "a tenth mean of the nearest": aot(nearest_weight=0.1),
    "half mean of the nearest": aot(nearest_weight=0.5),
    "no distance in space": aot(spatial_weight=0.0),
    "5 iterations": aot(iterations=5),
    "100 iterations": aot(iterations=100),
}
