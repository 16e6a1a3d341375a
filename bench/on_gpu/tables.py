"""The tables that are printed and written."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from aot_vllm.kernels.dispatch import Kernels
from bench.on_gpu.paths import operations
from bench.on_gpu.sizes import RETENTIONS, Case


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
    """Return how many operations each path launches for one video; Triton's where it is installed.

    PyTorch alone launches some for each choice of an anchor, so its numbers are told of two ways to choose.
    """
    paths: list[Kernels] = ["torch", "triton"] if find_spec("triton") else ["torch"]
    rows = [
        [case.name, f"{case.grid.frames} x {case.grid.positions}", anchors, path]
        + [f"{operations(case, retention, anchors, path=path):,}" for retention in RETENTIONS[1:]]
        for case in cases
        for anchors in ("diverse", "calibrated", "coverage", "attention")
        for path in paths
        if path == "triton" or anchors in ("diverse", "attention")
    ]
    return table(["model", "video", "anchors", "path", *(f"{kept:.0%}" for kept in RETENTIONS[1:])], rows, words=4)
