"""Times a video's way through the GPU: vision tower, scores, reduction and prefill, at the sizes of published models.

    python bench/gpu.py                  # measures; needs a GPU with 24 GB
    python bench/gpu.py --write          # and writes bench/results/gpu.md and gpu.json
    python bench/gpu.py --flops          # no GPU: the work of each stage, and the speed-up that it allows
    python bench/gpu.py --launches       # no GPU: how many operations each path of a reduction launches
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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - the repository comes first on the path

from bench.machine import describe  # noqa: E402
from bench.on_gpu.calls import check_counting  # noqa: E402
from bench.on_gpu.measurement import failures, measure  # noqa: E402
from bench.on_gpu.paths import paths  # noqa: E402
from bench.on_gpu.sizes import CASES, RETENTIONS, TINY  # noqa: E402
from bench.on_gpu.tables import flops_table, operations_table, reductions_table, stages_table  # noqa: E402


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
