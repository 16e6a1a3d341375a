"""Time to first token and requests a second through real vLLM: every token, AOT at 25%, AOT at 10%.

    python bench/ttft.py --out bench/results/ttft.md

A model with random weights and the text shape of Qwen2-0.5B is asked about 32-frame H.264 clips, each clip once, so
that no cache helps. Each arm is a separate server, asked over HTTP with 1 and with 4 concurrent requests. The stages
are timed in one more process for each arm, one request at a time, around the functions that decode, preprocess, encode
and reduce. The rest of the time to the first token is prefill, scheduling included.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.machine import describe, engine_versions  # noqa: E402 - found through the line above
from bench.servers import free_port, process  # noqa: E402
from demo.clip import write_clip  # noqa: E402

FRAMES = 32
ANSWER_TOKENS = 4
QUESTION = "What happens in the video?"
CHECKPOINT = ROOT / ".cache" / "bench" / "llava-onevision-0.5b-random"
STAGES = ("decoding", "processor", "tower", "reduction", "prefill")
ENGINE = {
    "max_model_len": 8192,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 2**30,
    "enable_prefix_caching": False,
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "aot",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def clips(count: int, *, first_seed: int) -> list[str]:
    """Return data URLs of clips that differ in everything but their size."""
    urls = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first_seed, first_seed + count):
            path = Path(folder) / f"{seed}.mp4"
            write_clip(path, frames=2 * FRAMES, seed=seed)
            urls.append("data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode())
    return urls


def messages(url: str) -> list[dict[str, Any]]:
    """Return the chat about one clip."""
    video = {"type": "video_url", "video_url": {"url": url}}
    return [{"role": "user", "content": [video, {"type": "text", "text": QUESTION}]}]


@contextmanager
def server(retention: float) -> Iterator[str]:
    """Run a server with every token (retention 1) or with AOT, and yield its address."""
    port = free_port()
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(CHECKPOINT), "--served-model-name", "bench"),
        *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "bfloat16"),
        *("--max-model-len", "8192", "--max-num-batched-tokens", "8192", "--max-num-seqs", "4"),
        *("--kv-cache-memory-bytes", str(2**30), "--no-enable-prefix-caching"),
        *("--limit-mm-per-prompt", '{"image": 0, "video": 1}'),
    ]
    if retention < 1:
        command += ["--video-pruning-rate", f"{1 - retention:.6g}"]
    address = f"http://127.0.0.1:{port}"
    with process(command, health=f"{address}/health", environment=ENVIRONMENT):
        yield address


async def ask(client: Any, url: str) -> tuple[float, int]:
    """Return seconds to the first token and prompt tokens of one streamed request."""
    started = time.perf_counter()
    first = 0.0
    stream = await client.chat.completions.create(
        model="bench",
        messages=messages(url),
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content and not first:
            first = time.perf_counter() - started
        if chunk.usage:
            prompt_tokens = chunk.usage.prompt_tokens
    return first, prompt_tokens


async def load(address: str, urls: list[str], *, concurrency: int) -> dict[str, float]:
    """Ask about each clip once, with a given concurrency; return median and worst TTFT and requests per second."""
    from openai import AsyncOpenAI

    waiting = iter(urls)
    seen: list[tuple[float, int]] = []

    async def worker(client: AsyncOpenAI) -> None:
        for url in waiting:
            seen.append(await ask(client, url))  # noqa: PERF401 - workers share the iterator

    async with AsyncOpenAI(base_url=f"{address}/v1", api_key="unused", timeout=1800, max_retries=0) as client:
        started = time.perf_counter()
        await asyncio.gather(*(worker(client) for _ in range(concurrency)))
        seconds = time.perf_counter() - started
    return {
        "ttft": statistics.median(first for first, _ in seen),
        "worst": max(first for first, _ in seen),
        "rate": len(urls) / seconds,
        "prompt_tokens": seen[0][1],
    }


class Stopwatch:
    """Adds up the time spent in wrapped functions, by stage."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        """Time every call of `owner.name`."""
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[stage] += time.perf_counter() - started

        setattr(owner, name, timed)


def stages(retention: float, requests: int) -> dict[str, float]:
    """Return the mean seconds of a request in each stage; runs in a process of its own."""
    os.environ.update(ENVIRONMENT)
    import vllm
    from vllm.multimodal.media import VideoMediaIO

    arguments = {} if retention == 1 else {"video_pruning_rate": 1 - retention}
    llm = vllm.LLM(
        str(CHECKPOINT),
        enforce_eager=True,
        dtype="bfloat16",
        limit_mm_per_prompt={"image": 0, "video": 1},
        **ENGINE,
        **arguments,
    )
    watch = Stopwatch()
    watch.wrap(VideoMediaIO, "load_base64", "decoding")
    watch.wrap(llm.renderer.mm_processor, "apply", "processor")
    llm.apply_model(lambda model: watch.wrap(model, "embed_multimodal", "tower"))
    if retention < 1:
        from aot_vllm.adapters import llava_onevision

        watch.wrap(llava_onevision, "reduce_video", "reduction")
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0)
    warm, *urls = clips(requests + 1, first_seed=900)
    llm.chat(messages(warm), sampling, use_tqdm=False)
    watch.seconds = dict.fromkeys(STAGES, 0.0)
    started = time.perf_counter()
    for url in urls:
        llm.chat(messages(url), sampling, use_tqdm=False)
    total = time.perf_counter() - started
    watch.seconds["tower"] -= watch.seconds["reduction"]
    watch.seconds["prefill"] = total - sum(watch.seconds.values())
    return {stage: seconds / requests for stage, seconds in watch.seconds.items()}


def stages_in_process(retention: float, requests: int) -> dict[str, float]:
    """Run `stages` in a fresh process."""
    command = [sys.executable, __file__, "--stages", str(retention), "--requests", str(requests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(arms: dict[float, dict[str, Any]], line: str) -> str:
    """Return both tables as markdown."""
    whole = arms[1.0]
    rows = [
        "| | prompt tokens | TTFT, 1 at a time | | TTFT, 4 at a time | | requests/s, 1 | requests/s, 4 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for retention, arm in arms.items():
        cells = [f"{arm['load'][1]['prompt_tokens']:,}"]
        for concurrency in (1, 4):
            ttft = arm["load"][concurrency]["ttft"]
            cells += [f"{ttft:.2f} s", f"{whole['load'][concurrency]['ttft'] / ttft:.2f}x"]
        cells += [f"{arm['load'][concurrency]['rate']:.3f}" for concurrency in (1, 4)]
        rows.append(f"| {name(retention)} | " + " | ".join(cells) + " |")
    rows += [
        "",
        "| share of one request | " + " | ".join(STAGES) + " | seconds |",
        "|---|" + "--:|" * (len(STAGES) + 1),
    ]
    for retention, arm in arms.items():
        total = sum(arm["stages"].values())
        shares = " | ".join(f"{arm['stages'][stage] / total:.1%}" for stage in STAGES)
        rows.append(f"| {name(retention)} | {shares} | {total:.2f} |")
    return "\n".join([*rows, "", line, ""])


def name(retention: float) -> str:
    """Return the name of an arm."""
    return "every token" if retention == 1 else f"AOT {retention:.0%}"


def main() -> None:
    """Measure all arms and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=4, help="measured requests of each load")
    parser.add_argument("--out", type=Path, help="also write the tables here")
    parser.add_argument("--stages", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stages is not None:
        print(json.dumps(stages(arguments.stages, arguments.requests)))
        return

    if not (CHECKPOINT / "model.safetensors").exists():
        maker = [sys.executable, "-m", "demo.checkpoint", str(CHECKPOINT)]
        subprocess.run([*maker, "--preset", "small", "--dtype", "bfloat16"], cwd=ROOT, check=True)
    arms: dict[float, dict[str, Any]] = {}
    for retention in (1.0, 0.25, 0.10):
        loads = {}
        with server(retention) as address:
            asyncio.run(load(address, clips(1, first_seed=0), concurrency=1))
            for concurrency in (1, 4):
                urls = clips(arguments.requests, first_seed=100 * concurrency)
                loads[concurrency] = asyncio.run(load(address, urls, concurrency=concurrency))
        arms[retention] = {"load": loads, "stages": stages_in_process(retention, 2)}
        print(name(retention), json.dumps(arms[retention]), flush=True)
    text = table(arms, f"{FRAMES} frames of 196 tokens, bfloat16. {describe(engine_versions())}")
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
