"""Real vLLM engines for tests: one in this process, others as servers of their own."""

import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest

KV_BYTES = 64 * 2**20
DTYPE = os.environ.get("AOT_TEST_DTYPE")
"""What engines calculate in, if not in what a checkpoint was saved in."""
GRAPHS = os.environ.get("AOT_TEST_GRAPHS") == "1"
EAGER = {"enforce_eager": True} if GRAPHS else {}
"""For engines that hooks watch, which graphs pass by."""
COMMON = {
    "enforce_eager": not GRAPHS,
    "max_model_len": 8192,
    "kv_cache_memory_bytes": KV_BYTES,
    "max_num_batched_tokens": 8192,
}


def video(frames, *, side=84, seed=0):
    """Return (frames, side, side, 3) uint8: a bright block moving over a still, noisy background."""
    rng = np.random.default_rng(seed)
    background = rng.integers(0, 160, (side, side, 3))
    clip = np.repeat(background[None], frames, axis=0)
    size = side // 4
    for index in range(frames):
        left = (index * 5 + seed * 11) % (side - size)
        clip[index, left : left + size, size : 2 * size] = 230
    return (clip + rng.integers(0, 20, clip.shape)).astype(np.uint8)


def image(*, side=84, seed=0):
    """Return one frame of another clip as an image."""
    return video(1, side=side, seed=seed + 100)[0]


def prompt(*media, question="What happens?"):
    """Return a chat prompt with placeholders for `media`, each "video" or "image", in that order."""
    placeholders = "".join(f"<{kind}>" for kind in media)
    return f"<|im_start|>user {placeholders}\n{question}<|im_end|><|im_start|>assistant\n"


BY_ATTENTION = {"aot": {"anchors": "attention"}}
"""Anchors as the paper has them, by scores of the vision tower; the default needs none."""


@dataclass(frozen=True)
class Answer:
    prompt_tokens: int
    tokens: tuple
    logprobs: tuple
    prompt: tuple = field(default=(), repr=False)


def in_float32(test):
    """Leave out a test of numbers to four decimals where engines calculate with fewer."""
    return pytest.mark.skipif(DTYPE == "bfloat16", reason="compares numbers to four decimals")(test)


def rounding(name):
    """Return how far apart logprobs of a checkpoint may be where the same is calculated in another order.

    Qwen3.5 calculates in bfloat16, whose neighbours are 1/32 apart at 4.
    """
    return 1 / 16 if name.startswith("qwen3.5") or DTYPE == "bfloat16" else 2e-4


def agree(one, other, *, within):
    """Return whether two answers to the same prompt agree as far as both go, or up to a tie between two tokens."""
    if one.prompt != other.prompt:
        return False
    steps = zip(one.tokens, one.logprobs, other.tokens, other.logprobs, strict=False)
    for token, logprob, other_token, other_logprob in steps:
        if abs(logprob - other_logprob) > within:
            return False
        if token != other_token:
            return True
    return True


class Engine:
    """One `vllm.LLM` in this process."""

    def __init__(self, model, **arguments):
        from vllm import LLM

        interpolate_natively()
        # as it is saved: vLLM would rather calculate in bfloat16
        dtype = DTYPE or json.loads((Path(model) / "config.json").read_text())["dtype"]
        limits = {"limit_mm_per_prompt": {"image": 2, "video": 3}}
        settings = {**COMMON, "dtype": dtype, **limits, "seed": 0, "disable_log_stats": True, **arguments}
        self.llm = LLM(model=str(model), **settings)

    def ask(self, *requests, max_tokens=4):
        """Answer requests made by `request`, all handed over at once."""
        from vllm import SamplingParams

        outputs = self.llm.generate(
            list(requests), SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=0), use_tqdm=False
        )
        return [
            Answer(
                prompt_tokens=len(output.prompt_token_ids),
                tokens=tuple(output.outputs[0].token_ids),
                logprobs=tuple(next(iter(step.values())).logprob for step in output.outputs[0].logprobs),
                prompt=tuple(output.prompt_token_ids),
            )
            for output in outputs
        ]

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        gc.freeze()  # an engine collects garbage eight times as it starts, each time among all that was imported


def interpolate_natively():
    """Let Qwen3-VL's tower interpolate its position embeddings in PyTorch where Triton is interpreted.

    vLLM's kernel for it takes most of a test's time in the interpreter. It is neither the runner's nor ours.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        from vllm.model_executor.models import qwen3_vl

        qwen3_vl.HAS_TRITON = False


def request(*media, retention=None, question="What happens?"):
    """Return a request about media given as arrays: 4-d for a video, 3-d for an image."""
    kinds = ["video" if array.ndim == 4 else "image" for array in media]
    data = {}
    for kind, array in zip(kinds, media, strict=True):
        data.setdefault(kind, []).append(array)
    asked = {"prompt": prompt(*kinds, question=question), "multi_modal_data": data}
    if retention is not None:
        asked["mm_processor_kwargs"] = {"aot_retention": retention}
    return asked


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def process(command, *, health, log: Path, environment=None, timeout_seconds=150):
    """Run a server until the block ends; `health` is the URL that answers 200 once it is up."""
    with log.open("w") as output:
        started = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        try:
            deadline = time.monotonic() + timeout_seconds
            while True:
                if started.poll() is not None:
                    raise AssertionError(f"{command[:4]} ended with {started.returncode}:\n{log.read_text()[-3000:]}")
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(health, timeout=2).status_code == 200:
                        break
                if time.monotonic() > deadline:
                    raise AssertionError(f"{command[:4]} was not up in time:\n{log.read_text()[-3000:]}")
                time.sleep(0.3)
            yield started
        finally:
            started.terminate()
            try:
                started.wait(20)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait(10)


def serve_command(model, port, *arguments):
    """Return the command line of a vLLM server on loopback."""
    return [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(model),
        "--host=127.0.0.1",
        f"--port={port}",
        *(() if GRAPHS else ("--enforce-eager",)),
        "--max-model-len=8192",
        "--max-num-batched-tokens=8192",
        f"--dtype={DTYPE or 'float32'}",
        f"--kv-cache-memory-bytes={KV_BYTES}",
        '--limit-mm-per-prompt={"image":1,"video":3}',
        "--enable-prompt-tokens-details",
        "--trust-request-mm-kwargs",
        *arguments,
    ]
