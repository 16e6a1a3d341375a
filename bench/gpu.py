"""Times a video's way through the GPU: vision tower, scores, reduction and prefill, at the sizes of published models.

    python bench/gpu.py                  # measures; needs a GPU with 24 GB
    python bench/gpu.py --write          # and writes bench/results/gpu.md and gpu.json
    python bench/gpu.py --flops          # no GPU: the work of each stage, and the speed-up that it allows
    python bench/gpu.py --launches       # no GPU: how many operations the torch path of a reduction launches
    python bench/gpu.py --tiny           # no GPU, seconds: shows that the script runs and that its checks pass

It needs torch and this repository; Triton, where there are kernels for it. It downloads nothing: weights are random,
and one layer's weights serve for all layers. A layer multiplies the same shapes with its own weights or with another's,
so the time is the same. Rotary embeddings are left out; they cost no products.

A reduction is a path and a setting of `anchors`. Each is checked as well as timed: it keeps as many tokens as the
budget says, retention 1 changes nothing, 20 repeats are equal bit for bit, a second call never waits for the GPU, and
each path chooses the tokens that the torch path chooses. The exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - the repository comes first on the path
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention, silu  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from aot_vllm import AOTConfig, ReducedVideo, VideoGrid, budget, reduce_video  # noqa: E402
from aot_vllm.adapters.scores import scoring_layers  # noqa: E402
from aot_vllm.kernels.dispatch import algorithms_for  # noqa: E402
from bench.machine import describe  # noqa: E402

RETENTIONS = (1.0, 0.25, 0.10, 0.05)
TEXT_TOKENS = 30
"""Tokens of a prompt that are not the video's: the chat template and a short question."""
REPEATS = 20
LARGEST_GAP = 1e-4
"""Two paths sum in a different order, so they may part where two tokens are equally far. Farther apart than this,
relative to the distance, it is another choice and no rounding."""
LARGEST_SCORE_GAP = 1e-2
"""So far apart, relative to the largest, may the scores of two paths be. The torch path rounds logits to bfloat16."""


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


# Sizes, and the work that follows from them. A multiplication with its addition is 2 FLOPs.


@dataclass(frozen=True)
class Tower:
    """A vision tower. A frame has `rows` x `cols` patches; `merge` x `merge` of them become one token.

    With a `merge` of 1 the features are pooled instead. In every `whole_every`-th layer a patch attends to the whole
    frame, in the others to its window. `outputs`: features of a token, side by side (deepstack has several).
    """

    layers: int
    width: int
    heads: int
    mlp: int
    gated: bool
    pixels: int
    merge: int
    out: int
    outputs: int = 1
    whole_every: int = 1
    window: int = 8

    def windows(self, rows: int, cols: int) -> int:
        """Return the number of windows of a frame. Here all have the mean size; in the model the last are smaller."""
        return -(-rows // self.window) * -(-cols // self.window)

    def flops(self, rows: int, cols: int) -> int:
        """Return the work on one frame."""
        patches = rows * cols
        layer = 2 * patches * (4 * self.width**2 + (3 if self.gated else 2) * self.width * self.mlp)
        whole = self.layers // self.whole_every
        context = whole * patches + (self.layers - whole) * patches // self.windows(rows, cols)
        wide = self.width * self.merge**2
        hidden = wide if self.merge > 1 else self.out
        head = 2 * patches // self.merge**2 * (wide * hidden + hidden * self.out) * self.outputs
        return 2 * patches * self.pixels * self.width + self.layers * layer + 4 * patches * context * self.width + head


@dataclass(frozen=True)
class Text:
    """A decoder with gated MLPs and heads of `width / heads`."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int

    def flops(self, tokens: int) -> int:
        """Return the work of a prefill. A token attends to those before it, half of all on average."""
        head = self.width // self.heads
        weights = self.width * (2 * self.heads + 2 * self.kv_heads) * head + 3 * self.width * self.mlp
        return self.layers * (2 * tokens * weights + 2 * tokens**2 * self.width)


@dataclass(frozen=True)
class Case:
    """A video to a model: the patches of a frame, and the tokens that the model makes of it."""

    name: str
    tower: Tower
    text: Text
    patches: tuple[int, int]
    grid: VideoGrid

    def kept(self, retention: float) -> int:
        """Return how many of the video's tokens are left."""
        return budget(self.grid, retention=retention).total

    def tower_flops(self) -> int:
        """Return the work of the tower on the video."""
        return self.grid.frames * self.tower.flops(*self.patches)

    def prefill_flops(self, retention: float) -> int:
        """Return the work of the prefill."""
        return self.text.flops(self.kept(retention) + TEXT_TOKENS)

    def limit(self, retention: float) -> float:
        """Return how many times less work the tower and the reduced prefill are than the tower and the whole one."""
        tower = self.tower_flops()
        return (tower + self.prefill_flops(1.0)) / (tower + self.prefill_flops(retention))


SIGLIP = Tower(26, 1152, 16, 4304, gated=False, pixels=588, merge=1, out=3584)
"""SigLIP so400m has 27 layers; LLaVA-OneVision runs 26 of them."""
QWEN25_TOWER = Tower(32, 1280, 16, 3420, gated=True, pixels=1176, merge=2, out=3584, whole_every=8)
QWEN3_TOWER = Tower(27, 1152, 16, 4304, gated=False, pixels=1536, merge=2, out=4096, outputs=4)
QWEN2_7B = Text(28, 3584, 28, 4, 18944)
QWEN3_8B = Text(36, 4096, 32, 8, 12288)
CASES = (
    Case("LLaVA-OneVision-7B", SIGLIP, QWEN2_7B, (27, 27), VideoGrid(32, 14, 14)),
    Case("Qwen2.5-VL-7B", QWEN25_TOWER, QWEN2_7B, (30, 40), VideoGrid(64, 15, 20)),
    Case("Qwen3-VL-8B", QWEN3_TOWER, QWEN3_8B, (30, 40), VideoGrid(64, 15, 20)),
    Case("Qwen3-VL-8B", QWEN3_TOWER, QWEN3_8B, (20, 20), VideoGrid(384, 10, 10)),
)
TINY_TEXT = Text(2, 32, 4, 2, 64)
TINY = (
    Case("tiny, pooled", Tower(4, 32, 4, 48, False, 12, 1, 32), TINY_TEXT, (9, 9), VideoGrid(4, 5, 5)),
    Case("tiny, merged", Tower(4, 32, 4, 48, True, 12, 2, 32, 2, 2, 4), TINY_TEXT, (8, 12), VideoGrid(5, 4, 6)),
)


# The models, of random weights.


class Layer(nn.Module):
    """A transformer layer. `seen` is called with its queries and keys, (batch, heads, tokens, size)."""

    def __init__(self, width: int, heads: int, kv_heads: int, mlp: int, *, gated: bool) -> None:
        super().__init__()
        self.heads, self.size, self.gated = (heads, kv_heads, kv_heads), width // heads, gated
        norm = nn.RMSNorm if gated else nn.LayerNorm
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv = nn.Linear(width, sum(self.heads) * self.size)
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, (1 + gated) * mlp), nn.Linear(mlp, width)

    def forward(self, x: Tensor, *, causal: bool, seen: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(2, (-1, self.size)).transpose(1, 2).split(self.heads, 1)
        if seen is not None:
            seen(query, key)
        grouped = self.heads[0] != self.heads[1]
        attended = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        hidden = self.up(self.norm2(x))
        if self.gated:
            gate, hidden = hidden.chunk(2, -1)
            return x + self.down(silu(gate) * hidden)
        return x + self.down(gelu(hidden, approximate="tanh"))


class TowerModel(nn.Module):
    """A tower with what joins it to the language model. Frames go through it in blocks, as in the plugin."""

    FRAMES_AT_ONCE = 16

    def __init__(self, case: Case) -> None:
        super().__init__()
        size = case.tower
        self.case, self.size = case, size
        wide = size.width * size.merge**2
        hidden = wide if size.merge > 1 else size.out
        self.embed = nn.Linear(size.pixels, size.width)
        self.layer = Layer(size.width, size.heads, size.heads, size.mlp, gated=size.gated)
        self.head = nn.Sequential(nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, size.out))
        whole = [index for index in range(size.layers) if (index + 1) % size.whole_every == 0]
        config = AOTConfig(anchors="attention")
        self.scored = scoring_layers(config, num_layers=size.layers, whole_frame=whole)

    def forward(self, pixels: Tensor, *, scored_by: Implementation | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return the features (T, P, D) of patches (T, patches, pixels), and both scores, (T, P), or none."""
        blocks = [self._block(block, scored_by) for block in pixels.split(self.FRAMES_AT_ONCE)]
        features, scores = zip(*blocks, strict=True)
        return torch.cat(features), [torch.cat(parts) for parts in zip(*scores, strict=True)]

    def _block(self, pixels: Tensor, scored_by: Implementation | None) -> tuple[Tensor, list[Tensor]]:
        size, scores = self.size, []

        def score(query: Tensor, key: Tensor) -> None:
            query, key = (part.transpose(1, 2).flatten(2) for part in (query, key))
            received = scored_by.attention_received(query, key, num_heads=size.heads, scale=self.layer.size**-0.5)
            scores.append(self._to_tokens(received[:, :, None])[:, :, 0] / size.heads)

        x = self.embed(pixels)
        windows = size.windows(*self.case.patches)
        for index in range(size.layers):
            if (index + 1) % size.whole_every:
                x = self.layer(x.reshape(-1, x.shape[1] // windows, size.width), causal=False).view(x.shape)
            else:
                x = self.layer(x, causal=False, seen=score if scored_by and index in self.scored else None)
        if size.merge == 1:
            return self._to_tokens(self.head(x)), scores
        x = x.unflatten(1, (-1, size.merge**2)).flatten(2)
        return torch.cat([self.head(x) for _ in range(size.outputs)], 2), scores

    def _to_tokens(self, values: Tensor) -> Tensor:
        """Return values of patches, (T, patches, C), as those of tokens: pooled, or the mean of those merged."""
        grid = self.case.grid
        if self.size.merge > 1:
            return values.unflatten(1, (-1, self.size.merge**2)).mean(2)
        image = values.unflatten(1, self.case.patches).movedim(3, 1)
        return interpolate(image, size=(grid.rows, grid.cols), mode="bilinear").flatten(2).movedim(1, 2)


class Request:
    """A video and a model on a device: the stages of a request, each to be called by itself or in turn."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        text, made = case.text, {"device": device, "dtype": torch.bfloat16}
        with device:
            self._tower = TowerModel(case).to(torch.bfloat16)
            self._layer = Layer(text.width, text.heads, text.kv_heads, text.mlp, gated=True).to(torch.bfloat16)
        self._pixels = torch.randn(case.grid.frames, case.patches[0] * case.patches[1], case.tower.pixels, **made)
        self._prompt = torch.randn(1, case.grid.tokens + TEXT_TOKENS, text.width, **made)
        self.features = slow_scene(case.grid, case.tower.out * case.tower.outputs, device)
        self.scores: list[Tensor] = []

    def tower(self, *, scored_by: Implementation | None = None) -> list[Tensor]:
        """Run the tower; return the two scores of each token, if they are asked for."""
        return self._tower(self._pixels, scored_by=scored_by)[1]

    def reduce(self, retention: float, anchors: str, path: Implementation) -> ReducedVideo:
        """Reduce a scene that changes slowly. The output of a tower of random weights is no video."""
        scores = self.scores if anchors == "attention" else (None, None)
        config, compared = AOTConfig(anchors=anchors), self.case.tower.out
        sizes = {"grid": self.case.grid, "retention": retention, "config": config, "compared": compared}
        return path.reduce_video(self.features, *scores, **sizes)

    def prefill(self, video_tokens: int) -> None:
        """Run the language model's layers over so many tokens of the video and the text."""
        x = self._prompt[:, : video_tokens + TEXT_TOKENS]
        for _ in range(self.case.text.layers):
            x = self._layer(x, causal=True)

    def whole(self) -> None:
        """Run everything from the pixels to the first token, without a reduction."""
        self.tower()
        self.prefill(self.case.grid.tokens)

    def reduced(self, retention: float, anchors: str, path: Implementation) -> None:
        """Run everything from the pixels to the first token."""
        self.tower(scored_by=path if anchors == "attention" and retention < 1 else None)
        self.prefill(len(self.reduce(retention, anchors, path).tokens))


def slow_scene(grid: VideoGrid, width: int, device: torch.device) -> Tensor:
    """Return features (T, P, D), in bfloat16, of a scene that changes slowly, with noise."""
    noise = partial(torch.randn, grid.positions, width, device=device)
    scene, frames = noise(), []
    for _ in range(grid.frames):
        scene = scene * 0.95 + noise() * 0.3
        frames.append(scene.bfloat16())
    return torch.stack(frames)


# What is measured of a call.


def synchronise(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device, *, repeats: int) -> dict[str, float]:
    """Return the median, lowest and highest milliseconds, and after how many the host has handed over all work.

    A call that takes long is repeated less often, for about 3 seconds in all and at least 3 times.
    """
    walls, hosts = [], []
    call()
    for repeat in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        call()
        hosts.append((time.perf_counter() - start) * 1e3)
        synchronise(device)
        walls.append((time.perf_counter() - start) * 1e3)
        if repeat >= 2 and sum(walls) > 3e3:
            break
    return {"ms": statistics.median(walls), "low": min(walls), "high": max(walls), "host_ms": statistics.median(hosts)}


@contextmanager
def counted_waits(device: torch.device) -> Iterator[list[Any]]:
    """Yield a list that has, at the end, an entry for each time the host waited for the GPU; none without CUDA."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        waits: list[Any] = []
        try:
            yield waits
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            waits.extend(warning for warning in caught if "called a synchronizing" in str(warning.message))


def check_counting(device: torch.device) -> None:
    """Raise `RuntimeError` if a wait is not counted on this device: a column of zeros would say nothing."""
    with counted_waits(device) as waits:
        torch.ones(1, device=device).item()
    if device.type == "cuda" and not waits:
        raise RuntimeError("this torch does not report where the host waits for the GPU")


class Launches(TorchDispatchMode):
    """Counts the operations that a GPU would be given: all but views and allocations."""

    NOTHING = ("empty", "new_empty", "_unsafe_view", "_reshape_alias", "_local_scalar_dense")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # inference mode hands over composite operations whole
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        self.count += not is_view and not func.overloadpacket.__name__.startswith(self.NOTHING)
        return func(*args, **(kwargs or {}))


def operations(case: Case, retention: float, anchors: str = "diverse") -> int:
    """Return how many operations the torch path launches, from shapes alone: nothing is calculated."""
    grid, size = case.grid, case.tower
    features = torch.empty(grid.frames, grid.positions, size.out * size.outputs, dtype=torch.bfloat16, device="meta")
    scores = torch.empty(2, grid.frames, grid.positions, device="meta")
    config = AOTConfig(anchors=anchors)
    reduce = partial(reduce_video, features, *scores, grid=grid, retention=retention, config=config, compared=size.out)
    reduce()  # what a first call makes and keeps is made
    with Launches() as seen:
        reduce()
    return seen.count


def device_work(call: Callable[[], object], device: torch.device) -> dict[str, float | None]:
    """Return the kernels and copies of a call and the milliseconds in which they keep a GPU busy.

    Without CUDA it is the operations of the call, and nothing is known of copies and time.
    """
    if device.type != "cuda":
        with Launches() as seen:
            call()
        return {"launches": seen.count, "copies": None, "busy_ms": None}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        synchronise(device)
    work = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = sum("Memcpy" in event.name for event in work)
    busy = sum(event.device_time for event in work) / 1e3
    return {"launches": len(work) - copies, "copies": copies, "busy_ms": busy}


def added_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """Return the MiB by which a call raises the GPU's memory in use at its peak."""
    if device.type != "cuda":
        return None
    synchronise(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronise(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


# What is checked of a reduction.


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


# The whole measurement.


def measure(
    case: Case,
    device: torch.device,
    implementations: Mapping[str, Implementation],
    *,
    retentions: Sequence[float],
    repeats: int,
) -> dict[str, Any]:
    """Return everything that is measured of a case. The choices of the first path are those the others must make."""
    request = Request(case, device)
    time_of = partial(timed, device=device, repeats=repeats)
    tower, whole = time_of(request.tower), time_of(request.whole)
    received = {name: request.tower(scored_by=path) for name, path in implementations.items()}
    request.scores = next(iter(received.values()))
    result = {
        "case": case.name,
        "video": f"{case.grid.frames} x {case.grid.positions}",
        "tokens": case.grid.tokens,
        "tower": tower | {"tflop": case.tower_flops() / 1e12},
        "scores": {
            name: {
                "ms": time_of(partial(request.tower, scored_by=path))["ms"] - tower["ms"],
                "apart": max(map(relative, received[name], request.scores)),
            }
            for name, path in implementations.items()
        },
        "prefill": time_of(partial(request.prefill, case.grid.tokens)) | {"tflop": case.prefill_flops(1.0) / 1e12},
        "first_token": whole,
        "reductions": [],
    }
    for retention in retentions:
        prefill = time_of(partial(request.prefill, case.kept(retention)))
        for anchors in ("diverse", "attention"):
            references: list[ReducedVideo] = []
            for name, path in implementations.items():
                row = measure_reduction(request, retention, anchors, path, references, repeats=repeats)
                row |= {"path": name, "prefill": prefill, "limit": case.limit(retention)}
                row["speed_up"] = whole["ms"] / row["first_token"]["ms"]
                row["share_of_tower"] = row["warm"]["ms"] / tower["ms"]
                result["reductions"].append(row)
    return result


def relative(values: Tensor, reference: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest value."""
    return float((values - reference).abs().max() / reference.abs().max())


def measure_reduction(
    request: Request,
    retention: float,
    anchors: str,
    path: Implementation,
    references: list[ReducedVideo],
    *,
    repeats: int,
) -> dict[str, Any]:
    """Return what is measured and checked of a retention.

    `references` has the first path's result, or nothing, and then takes this one.
    """
    device, grid = request.device, request.case.grid
    call = partial(request.reduce, retention, anchors, path)
    synchronise(device)
    start = time.perf_counter()
    with counted_waits(device) as first_waits:
        reduced = call()
    synchronise(device)
    first_ms = (time.perf_counter() - start) * 1e3
    with counted_waits(device) as warm_waits:
        call()
    if not references:
        references.append(reduced)
    compared = request.features[:, :, : request.case.tower.out] if anchors == "diverse" else None
    return {
        "retention": retention,
        "anchors": anchors,
        "kept": len(reduced.tokens),
        "budget": request.case.kept(retention),
        "identity": torch.equal(reduced.tokens, request.features.flatten(0, 1)),
        "first_ms": first_ms,
        "first_waits": len(first_waits),
        "warm": timed(call, device, repeats=repeats) | device_work(call, device) | {"waits": len(warm_waits)},
        "added_mib": added_memory(call, device),
        "repeats": REPEATS,
        "differing_repeats": differing_repeats(call, repeats=REPEATS),
        "agreement": agreement(reduced, references[0], compared, grid),
        "first_token": timed(partial(request.reduced, retention, anchors, path), device, repeats=repeats),
    }


def failures(results: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each check that failed."""
    found = []
    for result in results:
        for name, scores in result["scores"].items():
            if not scores["apart"] <= LARGEST_SCORE_GAP:
                found.append(f"{result['case']}, {result['video']}, {name}: scores differ by {scores['apart']:.0e}")
        for row in result["reductions"]:
            where = f"{result['case']}, {result['video']}, {row['retention']:.0%}, {row['anchors']}, {row['path']}"
            gap_of_choice = row["agreement"]["gap"]
            checks = {
                f"keeps {row['kept']} tokens, the budget says {row['budget']}": row["kept"] != row["budget"],
                "changes the video at retention 1": row["retention"] == 1 and not row["identity"],
                f"{row['differing_repeats']} of {row['repeats']} repeats differ": row["differing_repeats"] > 0,
                f"a warm call waits {row['warm']['waits']} times": row["warm"]["waits"] > 0,
                f"another choice than torch's, apart by {gap_of_choice}": (gap_of_choice or 0) > LARGEST_GAP,
            }
            found += [f"{where}: {text}" for text, failed in checks.items() if failed]
    return found


# Tables.


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 2) -> str:
    """Return a table whose first `words` columns are words and whose others are numbers."""
    rule = "|" + "---|" * words + "--:|" * (len(head) - words)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def stages_table(results: list[dict[str, Any]]) -> str:
    """Return how long the tower and the prefill of the whole video take, and how fast they calculate."""

    def speed(stage: dict[str, Any], tflop: float) -> list[str]:
        return [f"{stage['ms']:.1f} ms", f"{tflop / stage['ms'] * 1e3:.3g}"]

    rows = []
    for result in results:
        tower, prefill = result["tower"], result["prefill"]
        scores = ", ".join(f"{name} {measured['ms']:.2f} ms" for name, measured in result["scores"].items())
        rows.append(
            [
                *(result["case"], result["video"], *speed(tower, tower["tflop"]), scores),
                *(*speed(prefill, prefill["tflop"]), f"{result['first_token']['ms']:.1f} ms"),
            ]
        )
    head = ["model", "video", "tower", "TFLOP/s", "scores, if attention chooses", "prefill, whole", "TFLOP/s"]
    return table([*head, "TTFT, whole"], rows)


def reductions_table(results: list[dict[str, Any]]) -> str:
    """Return a line for each reduction."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def same(row: dict[str, Any]) -> str:
        apart = row["agreement"]["gap"]
        return f"{row['agreement']['share']:.1%}" + ("" if apart is None else f", gap {apart:.0e}")

    rows = []
    for result in results:
        for row in result["reductions"]:
            warm, equal = row["warm"], row["repeats"] - row["differing_repeats"]
            rows.append(
                [
                    *(result["case"], result["video"], row["anchors"], row["path"]),
                    *(f"{row['retention']:.0%}", f"{row['kept']:,}"),
                    *(f"{row['first_ms']:.2f} ms", f"{warm['ms']:.2f} ms", number(warm["busy_ms"], ".2f")),
                    *(f"{row['share_of_tower']:.1%}", number(warm["launches"], ",")),
                    *(f"{row['first_waits']} / {warm['waits']}", number(row["added_mib"], ".0f")),
                    *(f"{row['first_token']['ms']:.1f} ms", f"{row['speed_up']:.2f}x", f"{row['limit']:.2f}x"),
                    *(f"{equal} of {row['repeats']}", same(row)),
                ]
            )
    head = ["model", "video", "anchors", "path", "kept", "tokens", "first call", "warm", "GPU busy, ms"]
    head += ["of the tower", "launches", "waits, first / warm", "MiB added", "TTFT", "faster", "limit"]
    return table([*head, "equal repeats", "choice as torch's"], rows, words=4)


def flops_table(cases: Sequence[Case]) -> str:
    """Return the work of each stage and the speed-up it allows, from sizes alone."""
    rows = []
    for case in cases:
        tower, whole = case.tower_flops(), case.prefill_flops(1.0)
        reduced = [f"{case.prefill_flops(retention) / 1e12:.1f}" for retention in RETENTIONS]
        limits = [f"{case.limit(retention):.1f}x" for retention in RETENTIONS[1:]]
        video = f"{case.grid.frames} x {case.grid.positions}"
        rows.append([case.name, video, f"{tower / 1e12:.1f}", f"{tower / (tower + whole):.0%}", *reduced, *limits])
    head = ["model", "video", "tower, TFLOP", "its share"]
    head += [f"prefill {retention:.0%}" for retention in RETENTIONS]
    return table([*head, *(f"limit {retention:.0%}" for retention in RETENTIONS[1:])], rows)


def operations_table(cases: Sequence[Case]) -> str:
    """Return how many operations the torch path launches for one video."""
    rows = [
        [case.name, f"{case.grid.frames} x {case.grid.positions}", anchors]
        + [f"{operations(case, retention, anchors):,}" for retention in RETENTIONS[1:]]
        for case in cases
        for anchors in ("diverse", "attention")
    ]
    return table(["model", "video", "anchors", *(f"{kept:.0%}" for kept in RETENTIONS[1:])], rows, words=3)


def machine(device: torch.device, commit: str | None) -> str:
    """Return the card, the versions and the commit."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    triton = importlib.util.find_spec("triton") is not None and importlib.import_module("triton").__version__
    versions = f"torch {torch.__version__}, " + (f"Triton {triton}" if triton else "no Triton")
    if commit is None and shutil.which("git") is not None:
        return f"{card}, {describe(versions)}"
    return f"{card}, {versions}, commit {commit or 'unknown'}"


def report(results: list[dict[str, Any]], where: str) -> str:
    """Return both tables, the checks that failed and the machine."""
    found = failures(results)
    verdict = "\n".join(f"- FAILED: {text}" for text in found) if found else "All checks passed."
    return "\n\n".join([stages_table(results), reductions_table(results), verdict, where]) + "\n"


def write(folder: Path, results: list[dict[str, Any]], where: str) -> None:
    """Write the tables and the numbers."""
    (folder / "gpu.md").write_text(report(results, where))
    (folder / "gpu.json").write_text(json.dumps({"machine": where, "results": results}, indent=1) + "\n")


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU: does the script run")
    parser.add_argument("--flops", action="store_true", help="the work of each stage, without measuring")
    parser.add_argument("--launches", action="store_true", help="the operations of a reduction, without measuring")
    parser.add_argument("--cases", type=int, nargs="+", choices=range(len(CASES)), help="some of the cases, from 0")
    parser.add_argument("--retentions", type=float, nargs="+", default=RETENTIONS)
    parser.add_argument("--paths", nargs="+", choices=["torch", "triton"], help="by default those made for the device")
    parser.add_argument("--repeats", type=int, default=10, help="of each time")
    parser.add_argument("--write", action="store_true", help="write bench/results/gpu.md and gpu.json")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--commit", help="the commit that is measured, where git cannot tell")
    parsed = parser.parse_args(arguments)
    without_gpu = parsed.tiny or parsed.flops or parsed.launches
    if not (without_gpu or torch.cuda.is_available()):
        parser.error("there is no GPU here: --tiny shows that the script runs, --flops what a GPU has to do")
    if parsed.write and without_gpu:
        parser.error("--write is for what was measured on a GPU")
    return parsed


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 if a check failed."""
    chosen = options(arguments)
    cases = TINY if chosen.tiny else [CASES[index] for index in chosen.cases or range(len(CASES))]
    if chosen.flops:
        print(flops_table(cases))
        return 0
    device = torch.device("cpu" if chosen.tiny or chosen.launches else "cuda")
    where = machine(device, chosen.commit)
    if chosen.launches:
        print(operations_table(cases), where, sep="\n\n")
        return 0
    check_counting(device)
    found = paths(device, chosen.paths)
    results = []
    for case in cases:
        measured = measure(case, device, found, retentions=chosen.retentions, repeats=chosen.repeats)
        results.append(measured)
        print(f"{case.name}, {case.grid.frames} x {case.grid.positions}: done", file=sys.stderr, flush=True)
    print(report(results, where))
    if chosen.json:
        chosen.json.write_text(json.dumps({"machine": where, "results": results}, indent=1) + "\n")
    if chosen.write:
        write(ROOT / "bench" / "results", results, where)
    return int(bool(failures(results)))


if __name__ == "__main__":
    sys.exit(main())
