"""Measures how many answers survive a reduction: the embedded model, clips it has never seen, real vLLM.

    python bench/fidelity.py --out bench/results/fidelity.md --plot docs/fidelity.png

At the same retention every arm keeps the same number of tokens. Arms differ only in which tokens they keep and in how
they merge the others: the arm's reduction replaces the plugin's, between the vision tower and the language model.
Answers are greedy, and right if they equal the known answer to the letter. Intervals are 95%, by bootstrap over clips,
because the questions about one clip are not independent.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.update(
    {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the arms are put into this process
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "aot",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from rich.progress import track

from aot_vllm import VideoGrid
from aot_vllm.core.budget import budget
from bench.answers import Answers, interval, resampled
from bench.arms import ABLATIONS, ARMS, UNPOOLED, Reduce, aot
from bench.machine import ROOT, describe, engine_versions
from demo.answering import BETWEEN, HEAD
from demo.h264 import through_h264
from demo.task import KINDS, questions, render, scene

RETENTIONS = (0.50, 0.25, 0.15, 0.10, 0.05)
FULL = "none"

Results = dict[tuple[str, float], Answers]


# ---- engine


class Engine:
    """vLLM with the plugin, whose reduction can be replaced."""

    def __init__(self, model: Path, settings: dict[str, Any]) -> None:
        """Start it with these settings of the plugin."""
        from vllm import LLM, SamplingParams

        from aot_vllm.adapters import llava_onevision

        self.reduce: Reduce = aot()
        llava_onevision.reduce_video = lambda *tensors, **rest: self.reduce(*tensors, **rest)
        pool = llava_onevision.AOTLlavaOnevision.apply_pooling

        def remembering(model: Any, features: Any, *rest: Any) -> Any:
            if features.shape[-1] > 1:  # else scores
                UNPOOLED[:] = [features]
            return pool(model, features, *rest)

        llava_onevision.AOTLlavaOnevision.apply_pooling = remembering
        self.sampling = SamplingParams(temperature=0, max_tokens=8)
        self.llm = LLM(
            model=str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=2048,
            max_num_batched_tokens=4096,
            kv_cache_memory_bytes=256 * 2**20,
            limit_mm_per_prompt={"image": 0, "video": 1},
            video_pruning_rate=0.9,
            additional_config={"aot": {"anchors": "attention"} | settings},  # some arms look at its scores
            disable_log_stats=True,
        )

    def ask(self, frames: np.ndarray, asked: Sequence[str], *, name: str, retention: float) -> list[str]:
        """Return the answers to questions about one video, (T, H, W, 3) uint8; `name` tells it from other arms'."""
        requests = [
            {
                "prompt": f"{HEAD}<video>\n{question}{BETWEEN}",
                "multi_modal_data": {"video": frames},
                "multi_modal_uuids": {"video": name},
                "mm_processor_kwargs": {"aot_retention": retention},
            }
            for question in asked
        ]
        outputs = self.llm.generate(requests, self.sampling, use_tqdm=False)
        return [output.outputs[0].text.strip() for output in outputs]


def measure(
    engine: Engine, arms: dict[str, Reduce], retentions: Sequence[float], *, clips: int, first_clip: int
) -> Results:
    """Return the answers of every arm at every retention, and those of the whole videos."""
    results: Results = defaultdict(Answers)
    runs = [(FULL, 1.0, aot())]
    runs += [(name, retention, arm) for retention in retentions for name, arm in arms.items()]
    impossible = set()
    for seed in track(range(first_clip, first_clip + clips), description="clips"):
        made = scene(seed, split="test")
        frames = through_h264(render(made)[0])
        asked = questions(made)
        for name, retention, arm in runs:
            if (name, retention) in impossible:
                continue
            grid = VideoGrid(frames=len(frames), rows=6, cols=6)
            if name == "EVS" and budget(grid, retention=retention).total < grid.positions:
                impossible.add((name, retention))
                continue
            engine.reduce = arm
            texts = [question.text for question in asked]
            answers = engine.ask(frames, texts, name=f"{seed} {name} {retention}", retention=retention)
            kept = results[name, retention]
            for question, answer in zip(asked, answers, strict=True):
                kept.right.append(answer == question.answer)
                kept.clips.append(seed)
                kept.kinds.append(question.kind)
    return results


# ---- tables


def by_retention(results: Results, arms: Sequence[str], retentions: Sequence[float]) -> Iterator[str]:
    """Yield a table: arms by retention, shares with their intervals."""
    share, draws = resampled(results[FULL, 1.0])
    yield "| kept | " + " | ".join(f"{retention:.0%}" for retention in retentions) + " |"
    yield "|---|" + "--:|" * len(retentions)
    yield f"| everything: {share:.1%} ({interval(draws)}) |" + " |" * len(retentions)
    for name in arms:
        cells = []
        for retention in retentions:
            if (name, retention) in results:
                share, draws = resampled(results[name, retention])
                cells.append(f"{share:.1%} ({interval(draws)})")
            else:
                cells.append("cannot")
        yield f"| {name} | " + " | ".join(cells) + " |"


def against(results: Results, arms: Sequence[str], retention: float, *, base: str) -> Iterator[str]:
    """Yield a table at one retention: share, share of the whole's, the difference to `base` of the same draws."""
    whole, whole_draws = resampled(results[FULL, 1.0])
    base_share, base_draws = resampled(results[base, retention])
    yield f"| at {retention:.0%} | right | of the whole video's | against {base} |"
    yield "|---|--:|--:|--:|"
    for name in arms:
        if (name, retention) in results:
            share, draws = resampled(results[name, retention])
            kept = f"{share / whole:.1%} ({interval(draws / whole_draws)})"
            difference = f"{share - base_share:+.1%} ({interval(draws - base_draws)})"
            yield f"| {name} | {share:.1%} | {kept} | {difference} |"


def by_kind(results: Results, arms: Sequence[str], retention: float) -> Iterator[str]:
    """Yield a table at one retention: arms by kind of question."""
    yield f"| at {retention:.0%} | " + " | ".join(KINDS) + " |"
    yield "|---|" + "--:|" * len(KINDS)
    for name, at in ((FULL, 1.0), *((arm, retention) for arm in arms)):
        if (name, at) in results:
            cells = [f"{resampled(results[name, at], kind=kind)[0]:.1%}" for kind in KINDS]
            yield f"| {name} | " + " | ".join(cells) + " |"


def plot(results: Results, arms: Sequence[str], retentions: Sequence[float], path: Path) -> None:
    """Draw shares of right answers over retention, with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    whole, _ = resampled(results[FULL, 1.0])
    axes.axhline(whole, color="grey", linestyle="--", linewidth=1, label="the whole video")
    for name in arms:
        at = [retention for retention in retentions if (name, retention) in results]
        drawn = [resampled(results[name, retention]) for retention in at]
        shares = [share for share, _ in drawn]
        bounds = [np.quantile(draws, (0.025, 0.975)) for _, draws in drawn]
        errors = np.array([[s - low, high - s] for s, (low, high) in zip(shares, bounds, strict=True)]).T
        width = 2.4 if name == "AOT" else 1.2
        axes.errorbar(at, shares, yerr=errors, label=name, marker="o", markersize=3, linewidth=width, capsize=2)
    axes.set(xscale="log", xlabel="video tokens kept", ylabel="answers right", xticks=retentions)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Measure and write the tables and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "model")
    parser.add_argument("--clips", type=int, default=150)
    parser.add_argument("--first-clip", type=int, default=0)
    parser.add_argument("--retentions", type=float, nargs="+", default=list(RETENTIONS))
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *ABLATIONS], default=list(ARMS))
    parser.add_argument("--ablations", action="store_true", help="AOT's settings one by one in place of other methods")
    parser.add_argument("--settings", type=json.loads, default={}, help="settings for all arms that have them, JSON")
    parser.add_argument("--out", type=Path, help="also write the tables here")
    parser.add_argument("--plot", type=Path, help="draw the shares here, a PNG")
    arguments = parser.parse_args()
    names = ["AOT", "AOT, as released", "anchors, nothing moved", *ABLATIONS] if arguments.ablations else arguments.arms
    every = ARMS | ABLATIONS
    arms = {name: every[name] for name in names}
    versions = engine_versions()
    results = measure(
        Engine(arguments.model, arguments.settings),
        arms,
        arguments.retentions,
        clips=arguments.clips,
        first_clip=arguments.first_clip,
    )
    asked = len(results[FULL, 1.0].right)
    parts = ["\n".join(by_retention(results, names, arguments.retentions))]
    parts += ["\n".join(against(results, names, retention, base=names[0])) for retention in arguments.retentions]
    parts += ["\n".join(by_kind(results, names, retention)) for retention in arguments.retentions]
    parts.append(f"{arguments.clips} clips of the test split, {asked:,} questions. {describe(versions)}")
    text = "\n\n".join(parts) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)
    if arguments.plot:
        plot(results, names, arguments.retentions, arguments.plot)


if __name__ == "__main__":
    main()
