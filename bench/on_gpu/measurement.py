"""The whole measurement of a case, and the checks on it."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aot_vllm import ReducedVideo
from bench.on_gpu.calls import added_memory, counted_waits, device_work, synchronise, timed
from bench.on_gpu.choices import agreement, differing_repeats
from bench.on_gpu.models import Request
from bench.on_gpu.paths import Implementation
from bench.on_gpu.sizes import Case

REPEATS = 20
LARGEST_GAP = 1e-4
"""Two paths sum in a different order, so they may part where two tokens are equally far. Farther apart than this,
relative to the distance, it is another choice and no rounding."""
LARGEST_SCORE_GAP = 1e-2
"""So far apart, relative to the largest, may the scores of two paths be. The torch path rounds logits to bfloat16."""


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
