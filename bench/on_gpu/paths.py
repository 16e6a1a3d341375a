"""The ways to compute a reduction, and what each asks of a GPU."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from aot_vllm import AOTConfig, ReducedVideo, reduce_video
from aot_vllm.kernels.dispatch import Kernels, algorithms_for
from aot_vllm.presets import PRESETS
from bench.on_gpu.calls import Launches, own_launches
from bench.on_gpu.sizes import Case


@dataclass(frozen=True)
class Implementation:
    """One way to compute a reduction: `reduce_video`, and the scores that anchors by attention are chosen by."""

    reduce_video: Callable[..., ReducedVideo]
    attention_received: Callable[..., Tensor]


def paths(device: torch.device, forced: Sequence[str] | None = None) -> dict[str, Implementation]:
    """Return the ways to compute a reduction on a device, by name, PyTorch's first; or those that are `forced`.

    This function alone knows how a path is chosen.
    """
    by_itself = algorithms_for(device)
    algorithms = {name: algorithms_for(device, kernels=name) for name in forced or ("torch",)}
    if forced is None and by_itself != algorithms["torch"]:
        algorithms["triton"] = by_itself
    return {
        name: Implementation(partial(reduce_video, algorithms=parts), parts.attention_received)
        for name, parts in algorithms.items()
    }


def chosen_by(anchors: str) -> AOTConfig:
    """Return the preset of this name, or the defaults with these anchors, and transport within frames."""
    if anchors not in PRESETS:
        return AOTConfig(anchors=anchors, mass=0.2)  # type: ignore[arg-type]
    return replace(AOTConfig.preset(anchors), mass=0.2)


def operations(case: Case, retention: float, anchors: str = "diverse", *, path: Kernels = "torch") -> int:
    """Return how many operations a path launches, from shapes alone: nothing is calculated. Scores are not counted."""
    grid, size, meta = case.grid, case.tower, torch.device("meta")
    features = torch.empty(grid.frames, grid.positions, size.out * size.outputs, dtype=torch.bfloat16, device=meta)
    scores = torch.empty(2, grid.frames, grid.positions, device=meta)
    settings = {"config": chosen_by(anchors), "algorithms": algorithms_for(meta, kernels=path)}
    reduce = partial(reduce_video, features, *scores, grid=grid, retention=retention, compared=size.out, **settings)
    reduce()  # what a first call makes and keeps is made
    with Launches() as seen, nullcontext([]) if path == "torch" else own_launches() as own:
        reduce()
    return seen.count + len(own)
