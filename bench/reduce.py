"""Times `reduce_video` on the CPU against the matrix products it can't do without, and against a plain per-frame loop.

    python bench/reduce.py --out bench/results/reduce.md

All three run in turns in one process on the same inputs; times are medians. Peak memory is the rise of the resident
set above what it was before the call, from the kernel's own high-water mark (VmHWM, reset through clear_refs), each in
a fresh process.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from aot_vllm import AOTConfig, VideoGrid, budget, reduce_video

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.machine import describe

CONFIG = AOTConfig(mass=0.2)
"""Anchors by diversity, and one transport within each frame."""


def make_inputs(grid: VideoGrid, width: int) -> Tensor:
    """A slowly changing scene with noise: features (T, P, D)."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    features = torch.empty(grid.frames, grid.positions, width)
    scene = noise(grid.positions, width)
    for frame in features:
        scene.mul_(0.95).add_(noise(grid.positions, width), alpha=0.3)
        frame.copy_(scene)
    return features


def reduction(features: Tensor, grid: VideoGrid, retention: float) -> None:
    """The settings of the measurement."""
    reduce_video(features, None, None, grid=grid, retention=retention, config=CONFIG)


def products(features: Tensor, grid: VideoGrid, retention: float) -> None:
    """Only the matrix products: distances, costs and applied plans, in the shapes the default gives them."""
    x = features
    torch.bmm(x, x.transpose(1, 2))
    anchors = x[:, : budget(grid, retention=retention).anchors]
    anchors + torch.bmm(torch.bmm(anchors, x.transpose(1, 2)), x)


def frame_loop(features: Tensor, grid: VideoGrid, retention: float) -> None:
    """The same method written frame by frame, the stopping rule read back after every iteration."""
    counts = budget(grid, retention=retention)
    axis = torch.linspace(0, 1, grid.rows), torch.linspace(0, 1, grid.cols)
    places = torch.cartesian_prod(*axis)
    output, before = [], None
    for x, keep in zip(features, counts.per_frame, strict=True):
        order = _loop_anchors(x, counts.anchors, before)
        before = x[order[:keep]]
        chosen, ranks = order.sort()
        output.append(_loop_within(x, chosen, places, CONFIG)[ranks < keep])
    assert len(torch.cat(output)) == counts.total


def _loop_anchors(x: Tensor, size: int, before: Tensor | None) -> Tensor:
    apart = torch.cdist(x, x).square()
    far = apart.mean(1) if before is None else torch.cdist(x, before).square().amin(1)
    chosen: list[int] = []
    while len(chosen) < size:
        chosen.append(int(far.argmax()))
        row = apart[chosen[-1]]
        far = row.clone() if before is None and len(chosen) == 1 else torch.minimum(far, row)
        far[chosen] = -torch.inf
    return torch.tensor(chosen)


def _loop_within(x: Tensor, chosen: Tensor, places: Tensor, config: AOTConfig) -> Tensor:
    others = torch.ones(len(x), dtype=torch.bool)
    others[chosen] = False
    anchors, sources = x[chosen], x[others]
    cosine = normalize(sources, dim=1) @ normalize(anchors, dim=1).T
    plan = _loop_sinkhorn(1 - cosine + config.spatial_weight * torch.cdist(places[others], places[chosen]), config)
    plan *= config.mass
    nearest = torch.zeros_like(plan).scatter_(1, cosine.argmax(1, keepdim=True), 1.0)
    moved = (anchors + plan.T @ sources) / (1 + plan.sum(0)[:, None])
    mean = (anchors + nearest.T @ sources) / (1 + nearest.sum(0)[:, None])
    return (1 - config.nearest_weight) * moved + config.nearest_weight * mean


def _loop_sinkhorn(cost: Tensor, config: AOTConfig) -> Tensor:
    kernel = torch.exp(-cost / config.epsilon)
    row, col = torch.ones(len(kernel)), torch.ones(kernel.shape[1])
    for _ in range(config.iterations):
        before = row
        row = 1 / len(row) / (kernel @ col)
        col = 1 / len(col) / (kernel.T @ row)
        if (row - before).abs().mean().item() < config.tolerance:
            break
    return row[:, None] * kernel * col


CANDIDATES: dict[str, Callable[[Tensor, VideoGrid, float], None]] = {
    "matrix products alone": products,
    "reduce_video": reduction,
    "per-frame loop": frame_loop,
}


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _peak_bytes(name: str, grid: VideoGrid, width: int, retention: float, threads: int) -> int:
    """Rise of the resident set during the second call of a candidate, the first having loaded the libraries."""
    torch.set_num_threads(threads)
    small = VideoGrid(2, grid.rows, grid.cols)
    CANDIDATES[name](make_inputs(small, width), small, retention)
    inputs = make_inputs(grid, width)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    CANDIDATES[name](inputs, grid, retention)
    return _status("VmHWM") - before


def measure(grid: VideoGrid, width: int, retention: float, repeats: int, threads: int) -> dict[str, dict[str, float]]:
    """Median seconds of each candidate, run in turns, and its peak memory."""
    torch.set_num_threads(threads)
    inputs = make_inputs(grid, width)
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for repeat in range(repeats + 1):
        for name, candidate in CANDIDATES.items():
            started = time.perf_counter()
            candidate(inputs, grid, retention)
            if repeat > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    del inputs
    results = {}
    for name in CANDIDATES:
        with get_context("spawn").Pool(1) as pool:
            peak = pool.apply(_peak_bytes, (name, grid, width, retention, threads))
        results[name] = {
            "median_seconds": statistics.median(seconds[name]),
            "fastest_seconds": min(seconds[name]),
            "slowest_seconds": max(seconds[name]),
            "peak_extra_bytes": float(peak),
        }
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--side", type=int, default=14)
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--retention", type=float, default=0.10)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()

    grid = VideoGrid(options.frames, options.side, options.side)
    results = measure(grid, options.width, options.retention, options.repeats, options.threads)
    floor = results["matrix products alone"]["median_seconds"]
    counts = budget(grid, retention=options.retention)
    table = [
        f"`reduce_video`, {grid.frames} x {grid.rows}x{grid.cols} x {options.width} float32, retention "
        f"{options.retention}: {grid.tokens} -> {counts.total} tokens, {counts.anchors} anchors a frame.",
        "",
        "| | median of " + str(options.repeats) + " | fastest to slowest | against the products | peak extra memory |",
        "|---|---|---|---|---|",
    ]
    for name, numbers in results.items():
        median, fastest, slowest = (numbers[f"{key}_seconds"] * 1e3 for key in ("median", "fastest", "slowest"))
        table.append(
            f"| {name} | {median:.0f} ms | {fastest:.0f} to {slowest:.0f} ms | {median / 1e3 / floor:.2f}x "
            f"| {numbers['peak_extra_bytes'] / 2**20:.0f} MiB |"
        )
    where = describe(f"torch {torch.__version__}, {options.threads} threads")
    text = "\n".join([*table, "", where, ""])
    print(text)
    if options.out:
        options.out.write_text(text)
    if options.json:
        options.json.write_text(json.dumps({"machine": where, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
