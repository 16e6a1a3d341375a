"""Measures a real model's answers on lmms-eval's video benchmarks through the gateway, whole and reduced.

    bench/lmms_eval.sh llava-hf/llava-onevision-qwen2-7b-ov-hf

makes lmms-eval's environment and runs this. It starts the engine and the gateway, or takes a gateway that runs. With
`--local CLIPS` it asks about the embedded model's own clips instead, which shows without weights or data that
everything between lmms-eval and the engine holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.machine import ROOT, describe
from demo.h264 import write_h264
from demo.stack import TRAINED_MODEL, WHOLE, stack
from demo.task import questions, render, scene

RETENTIONS = (1.0, 0.25, 0.20, 0.15, 0.10, 0.05)
METRICS = {  # of lmms-eval's tasks: the metric, and what brings it to percent
    "mvbench": ("mvbench_accuracy", 1),
    "egoschema_subset": ("score", 100),
    "longvideobench_val_v": ("lvb_acc", 100),
    "videomme": ("videomme_perception_score", 1),
    "shapes": ("accuracy", 100),
}
BENCHMARKS = ("mvbench", "egoschema_subset", "longvideobench_val_v", "videomme")
PUBLISHED = {1.0: 58.4, 0.25: 58.5, 0.20: 58.2, 0.15: 57.7, 0.10: 57.0, 0.05: 52.8}
"""The paper's mean over the four (EgoSchema's full set) of LLaVA-OneVision-7B at 32 frames, by retention."""

MEDIA_SETTINGS = {  # LongVideoBench and VideoMME have videos of an hour
    "AOT_GATEWAY_MEDIA_MAX_BYTES": str(2 * 2**30),
    "AOT_GATEWAY_MAX_BUFFERED_BYTES": str(4 * 2**30),
    "AOT_GATEWAY_MEDIA_MAX_SECONDS": "7200",
    "AOT_GATEWAY_MEDIA_MAX_FRAMES": "1000000",
    "AOT_GATEWAY_MEDIA_READ_SECONDS": "120",
    "AOT_GATEWAY_MEDIA_STORE_BYTES": str(2**40),
    "AOT_GATEWAY_MEDIA_HANDOFF": "file",
    "AOT_GATEWAY_FILES_TENANT_BYTES": str(2**40),
    "AOT_GATEWAY_ENGINE_HEADERS_SECONDS": "1200",
    "AOT_GATEWAY_ENGINE_READ_SECONDS": "1200",
}


@contextlib.contextmanager
def serving(checkpoint: str, directory: Path) -> Iterator[str]:
    """Start the engine and the gateway with a Files API below `directory`; give the gateway's base URL."""
    media, files = directory / "media", directory / "files"
    media.mkdir(), files.mkdir()
    settings = {**MEDIA_SETTINGS, "AOT_GATEWAY_MEDIA_DIR": str(media), "AOT_GATEWAY_FILES_DIR": str(files)}
    flags = ("--allowed-local-media-path", str(media))
    with stack(checkpoint, retention=0.1, gateway_settings=settings, engine_flags=flags) as gateway:
        yield gateway


def write_local_task(directory: Path, clips: int) -> None:
    """Write a task that lmms-eval finds: clips of the test split, and all questions about them."""
    with (directory / "questions.jsonl").open("w") as lines:
        for seed in range(clips):
            made = scene(seed, split="test")
            video = directory / f"{seed}.mp4"
            write_h264(video, render(made)[0])
            for question in questions(made):
                doc = {"video": str(video), "question": question.text, "answer": question.answer}
                lines.write(json.dumps(doc) + "\n")
    for source in (ROOT / "bench" / "local_task").glob("shapes.*"):
        shutil.copy(source, directory)
    task = directory / "shapes.yaml"
    task.write_text(task.read_text().replace("questions.jsonl", str(directory / "questions.jsonl")))


def evaluate(python: Path, *arguments: str) -> dict[str, Any]:
    """Return what one run of lmms-eval found; its own output goes to standard error."""
    script = ROOT / "bench" / "lmms_gateway.py"
    with subprocess.Popen(
        [str(python), str(script), *arguments], stdout=subprocess.PIPE, text=True, env=os.environ
    ) as run:
        assert run.stdout is not None
        last = ""
        for line in run.stdout:
            sys.stderr.write(line)
            last = line
    if run.returncode:
        sys.exit(f"lmms-eval ended with {run.returncode}")
    return dict(json.loads(last))


def percent(result: dict[str, Any], task: str) -> float:
    """Return a task's score in percent; that of a group is the mean of its members."""
    metric, factor = METRICS[task]
    members = [scores[metric] for name, scores in result["scores"].items() if name == task and metric in scores]
    if not members:
        members = [
            scores[metric]
            for name, scores in result["scores"].items()
            if name.startswith(f"{task}_") and metric in scores
        ]
    if not members:
        raise ValueError(f"lmms-eval reported no {metric} of {task}, but {result['scores']}")
    return factor * sum(members) / len(members)


def table(results: dict[float, dict[str, Any]], tasks: Sequence[str], published: bool) -> str:
    """Return the scores by retention as markdown."""
    heads = ["kept", "video tokens", *tasks, *(["mean"] if len(tasks) > 1 else []), *(["paper"] if published else [])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "--:|" * len(heads)]
    for retention, result in results.items():
        scores = [percent(result, task) for task in tasks]
        cells = [f"{retention:.0%}", f"{result['after']:,} of {result['before']:,}", *(f"{s:.1f}" for s in scores)]
        if len(tasks) > 1:
            cells.append(f"{sum(scores) / len(scores):.1f}")
        if published:
            cells.append(f"{PUBLISHED[retention]:.1f}" if retention in PUBLISHED else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every retention and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--serve", metavar="MODEL", help="a checkpoint to start the engine and the gateway with")
    where.add_argument("--gateway", metavar="URL", help="a gateway that runs, without /v1; its key in AOT_API_KEY")
    parser.add_argument("--model", default=WHOLE, help="the model's name at that gateway")
    parser.add_argument("--tasks", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--local", type=int, metavar="CLIPS", help="ask about so many of the embedded clips instead")
    parser.add_argument("--retentions", type=float, nargs="+", default=list(RETENTIONS))
    parser.add_argument("--limit", type=int, help="questions of each task, for a try")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time")
    parser.add_argument("--evaluator", type=Path, required=True, help="the Python that has lmms-eval")
    parser.add_argument("--out", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    if not (arguments.serve or arguments.gateway or arguments.local):
        parser.error("one of --serve, --gateway or --local is needed")

    tasks = ["shapes"] if arguments.local else arguments.tasks
    served = arguments.serve or ("" if arguments.gateway else str(TRAINED_MODEL))
    results = {}
    with contextlib.ExitStack() as running:
        directory = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="aot-accuracy-")))
        options = ["--model", arguments.model, "--concurrency", str(arguments.concurrency), "--tasks", *tasks]
        if arguments.local:
            local = directory / "task"
            local.mkdir()
            write_local_task(local, arguments.local)
            options += ["--include", str(local)]
        if arguments.limit:
            options += ["--limit", str(arguments.limit)]
        gateway = arguments.gateway or running.enter_context(serving(served, directory))
        options += ["--base-url", f"{gateway}/v1", "--api-key", os.environ.get("AOT_API_KEY", "unused")]
        for retention in arguments.retentions:
            results[retention] = evaluate(arguments.evaluator, "--retention", str(retention), *options)
    asked = sum(next(iter(results.values()))["counts"].values())
    published = "llava-onevision-qwen2-7b" in served.lower() and tuple(tasks) == BENCHMARKS
    line = f"{served or arguments.model}, {asked:,} questions at each retention. {describe()}"
    text = f"{table(results, tasks, published)}\n\n{line}\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
