"""Time per output token through real vLLM, while 1 and 16 requests about videos run: AOT off against on.

    python bench/decode.py --out bench/results/decode.md

vLLM calls a pruning model's `recompute_mrope_positions` for every running request: Model Runner V1 at each step, those
of decoding included. So what counts is a step's own cost, not the model's: the checkpoint is a tiny one with random
weights, of which a step takes the least. Every arm is an engine in a process of its own with one thread; they take
turns, one batch of requests at a time, so that what else the machine does falls on all. A step is timed from the
outside, once every request of the batch is decoding. Off is measured twice: what the second differs from the first is
what nothing costs here. vLLM's own pruning (EVS) is measured beside: on a CPU its runner lacks a flag, set here
too, for without it the first video ends the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.machine import describe, engine_versions  # noqa: E402 - found through the line above

FRAMES = 64
RUNNING = (1, 16)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "aot",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@dataclass(frozen=True)
class Arm:
    """How an engine is started, and what its requests ask for."""

    name: str
    arguments: dict[str, Any]
    retention: float | None = None


PRUNED = {"video_pruning_rate": 0.9}
ARMS = {
    "off": Arm("off", {}),
    "again": Arm("off, again", {}),
    "whole": Arm("AOT on, requests for all", PRUNED, retention=1.0),
    "reduced": Arm("AOT on, 10%", PRUNED),
    "evs": Arm("vLLM's EVS, 10%", {**PRUNED, "additional_config": {"aot": {"enabled": False}}}),
}


SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 8192,
    "max_num_batched_tokens": 8192,
    "kv_cache_memory_bytes": 2**29,
    "limit_mm_per_prompt": {"image": 0, "video": 1},
    "seed": 0,
}
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What happens?<|im_end|>\n<|im_start|>assistant\n"
)


def request(clip: Any, *, retention: float | None) -> dict[str, Any]:
    """Return a question about a clip whose frames were taken twice a second."""
    metadata = {
        "fps": 2.0,
        "duration": len(clip) / 2,
        "total_num_frames": len(clip),
        "frames_indices": list(range(len(clip))),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    asked: dict[str, Any] = {"prompt": PROMPT, "multi_modal_data": {"video": [(clip, metadata)]}}
    return asked if retention is None else {**asked, "mm_processor_kwargs": {"aot_retention": retention}}


def serve(model: str, arm: Arm, steps: int) -> None:
    """Answer each line of standard input, a number of requests, with the seconds of each decoding step."""
    import numpy as np
    from vllm import LLM, SamplingParams

    from demo.clip import frame
    from demo.tiny_checkpoints import checkpoint

    if arm is ARMS["evs"]:
        import vllm.v1.worker.cpu_model_runner  # noqa: F401 - which the next line mends

        from aot_vllm.adapters.compat import let_cpu_runner_recompute_positions

        let_cpu_runner_recompute_positions()
    llm = LLM(model=str(checkpoint(model)), max_num_seqs=max(RUNNING), **SETTINGS, **arm.arguments)
    clips = [
        np.stack([frame(index, FRAMES, height=224, width=224, seed=seed) for index in range(FRAMES)])
        for seed in range(max(RUNNING))
    ]
    requests = [request(clip, retention=arm.retention) for clip in clips]
    outputs = llm.generate(requests, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    print(json.dumps({"tokens": [len(output.prompt_token_ids or ()) for output in outputs]}), flush=True)
    for line in sys.stdin:
        print(json.dumps(decoding_steps(llm, requests[: int(line)], steps)), flush=True)


def decoding_steps(llm: Any, requests: list[Any], steps: int) -> list[float]:
    """Return the seconds of `steps` steps in which every request is given one token."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=steps + 64, ignore_eos=True)
    engine = llm.llm_engine
    for index, request in enumerate(requests):
        engine.add_request(str(index), request, sampling)
    tokens: dict[str, int] = {}
    while len(tokens) < len(requests) or min(tokens.values()) < 4:
        tokens |= {output.request_id: len(output.outputs[0].token_ids) for output in engine.step()}
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        outputs = engine.step()
        seconds.append(time.perf_counter() - started)
        assert len(outputs) == len(requests)
    while engine.has_unfinished_requests():
        engine.step()
    return seconds


class Process:
    """An arm's engine in a process of its own."""

    def __init__(self, model: str, key: str, steps: int) -> None:
        """Start it; the first answer says how many prompt tokens its requests have."""
        command = [sys.executable, __file__, "--model", model, "--arm", key, "--steps", str(steps)]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.prompt_tokens = self._read()["tokens"][0]

    def ask(self, running: int) -> list[float]:
        """Return the seconds of its steps with so many requests running."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{running}\n")
        self._process.stdin.flush()
        return list(self._read())

    def _read(self) -> Any:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        for line in self._process.stdout:
            if line.startswith(("[", '{"tokens"')):
                try:
                    return json.loads(line)
                except ValueError:  # a line of vLLM's log
                    continue
        sys.exit(self._process.stderr.read()[-3000:])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def table(rows: dict[str, tuple[int, dict[int, list[float]]]], line: str) -> str:
    """Return medians as markdown; `rows` are prompt tokens and medians of a round, for each number of requests."""
    heads = [f"{running} running | | half of the rounds" for running in RUNNING]
    text = ["| | prompt tokens | " + " | ".join(heads) + " |", "|---|--:|" + "--:|--:|--:|" * len(RUNNING)]
    _, base = rows[ARMS["off"].name]
    for name, (prompt_tokens, rounds) in rows.items():
        cells = []
        for running in RUNNING:
            ratios = [mine / off for mine, off in zip(rounds[running], base[running], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells += [
                f"{statistics.median(rounds[running]) * 1e3:.2f} ms",
                f"{middle:.2f}x",
                f"{low:.2f} to {high:.2f}",
            ]
        text.append(f"| {name} | {prompt_tokens:,} | " + " | ".join(cells) + " |")
    return "\n".join([*text, "", line, ""])


def main() -> None:
    """Measure all arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=["qwen2.5-vl", "qwen3-vl"], default="qwen2.5-vl")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each arm")
    parser.add_argument("--steps", type=int, default=50, help="decoding steps of a turn")
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm is not None:
        serve(arguments.model, ARMS[arguments.arm], arguments.steps)
        return

    processes = {key: Process(arguments.model, key, arguments.steps) for key in ARMS}
    rounds: dict[str, dict[int, list[float]]] = {key: {running: [] for running in RUNNING} for key in ARMS}
    try:
        for turn in range(arguments.rounds + 1):
            for running in RUNNING:
                for key in random.Random(turn).sample(list(ARMS), len(ARMS)):
                    seconds = statistics.median(processes[key].ask(running))
                    if turn:  # the first turn warms up
                        rounds[key][running].append(seconds)
                print(turn, running, {key: f"{rounds[key][running][-1:]}" for key in ARMS}, flush=True)
    finally:
        for process in processes.values():
            process.close()
    rows = {arm.name: (processes[key].prompt_tokens, rounds[key]) for key, arm in ARMS.items()}
    text = table(rows, f"{arguments.model} with 2 text layers, float32, Model Runner V1. {describe(engine_versions())}")
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
