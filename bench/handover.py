"""Measures whether a model answers alike about frames that the gateway hands over and about the video itself.

    python bench/handover.py --out bench/results/handover.md

The embedded model is asked about clips it has never seen, enlarged so that frames have to be scaled: by the engine
alone, which decodes the video itself with vLLM's loader, and through the gateway, which hands over frames in the size
that the model's processor makes of them, or in full size. Answers are greedy, and right if they equal the known answer
to the letter. Intervals are 95%, by bootstrap over clips.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.answers import Answers, interval, resampled
from bench.machine import describe, engine_versions
from bench.servers import free_port, process
from demo.h264 import write_h264
from demo.stack import TRAINED_MODEL, engine_command, engine_environment
from demo.task import Question, questions, render, scene

SIDE = 480
RETENTIONS = (1.0, 0.1)
OWN, SCALED, FULL_SIZE = "the engine's own loader", "frames, scaled", "frames, full size"
MODEL = "demo-model"


@contextlib.contextmanager
def servers() -> Iterator[dict[str, str]]:
    """Start an engine and two gateways in front of it; give the address of each arm."""
    ports = {arm: free_port() for arm in (OWN, SCALED, FULL_SIZE)}
    urls = {arm: f"http://127.0.0.1:{port}" for arm, port in ports.items()}
    flags = ("--no-enable-prefix-caching", "--max-num-seqs", "16")
    engine = engine_command(str(TRAINED_MODEL), ports[OWN], retention=0.1, flags=flags)
    with contextlib.ExitStack() as stack:
        stack.enter_context(process(engine, health=f"{urls[OWN]}/health", environment=engine_environment()))
        for arm in (SCALED, FULL_SIZE):
            environment = {
                "AOT_GATEWAY_PORT": str(ports[arm]),
                "AOT_GATEWAY_ENGINES": urls[OWN],
                "AOT_GATEWAY_MEDIA_FULL_SIZE": str(arm == FULL_SIZE).lower(),
            }
            gateway = [sys.executable, "-m", "server"]
            stack.enter_context(process(gateway, health=f"{urls[arm]}/health/ready", environment=environment))
        yield urls


def enlarged(seed: int) -> tuple[str, list[Question]]:
    """Return a clip of the test split as a data URL, SIDE x SIDE pixels, and all questions about it."""
    made = scene(seed, split="test")
    pictures = [Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for picture in render(made)[0]]
    file = io.BytesIO()
    write_h264(file, (np.asarray(picture) for picture in pictures))
    return "data:video/mp4;base64," + base64.b64encode(file.getvalue()).decode(), questions(made)


def answer(client: httpx.Client, arm: str, url: str, video: str, question: str, retention: float) -> str:
    """Return the answer of an arm; a request to the engine itself says its retention in the engine's words."""
    part = {"type": "video_url", "video_url": {"url": video}}
    asked = {"mm_processor_kwargs": {"aot_retention": retention}} if arm == OWN else {"aot": {"retention": retention}}
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": question}]}],
        "max_tokens": 8,
        "temperature": 0,
        **asked,
    }
    answered = client.post(f"{url}/v1/chat/completions", json=body)
    answered.raise_for_status()
    return str(answered.json()["choices"][0]["message"]["content"]).strip()


def measure(clips: int, most: int) -> tuple[dict[tuple[str, float], Answers], dict[tuple[str, float], int]]:
    """Return the answers of each arm at each retention, and how many of them the engine's own loader led to.

    About each clip at most `most` questions are asked.
    """
    results: dict[tuple[str, float], Answers] = defaultdict(Answers)
    alike: dict[tuple[str, float], int] = defaultdict(int)
    with servers() as urls, httpx.Client(timeout=120) as client:
        for seed in track(range(clips), description="clips"):
            video, asked = enlarged(seed)
            for retention in RETENTIONS:
                for question in asked[seed % 3 :: max(1, len(asked) // most)][:most]:
                    said = {arm: answer(client, arm, urls[arm], video, question.text, retention) for arm in urls}
                    for arm, text in said.items():
                        kept = results[arm, retention]
                        kept.right.append(text == question.answer)
                        kept.clips.append(seed)
                        kept.kinds.append(question.kind)
                        alike[arm, retention] += text == said[OWN]
    return results, alike


def table(results: dict[tuple[str, float], Answers], alike: dict[tuple[str, float], int]) -> Iterator[str]:
    """Yield the rows: arms by retention, with the difference to the engine's own loader of the same draws."""
    yield "| kept | what the engine gets | right | against its own loader | the same answer |"
    yield "|--:|---|--:|--:|--:|"
    for (arm, retention), answers in sorted(results.items(), key=lambda item: -item[0][1]):
        share, draws = resampled(answers)
        base, base_draws = resampled(results[OWN, retention])
        total = len(answers.right)
        same = f"{alike[arm, retention]:,} of {total:,}"
        difference = f"{share - base:+.1%} ({interval(draws - base_draws)})"
        yield f"| {retention:.0%} | {arm} | {share:.1%} ({interval(draws)}) | {difference} | {same} |"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--questions", type=int, default=6, help="the most about one clip")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results, alike = measure(arguments.clips, arguments.questions)
    lines = [f"{arguments.clips} clips of {SIDE} x {SIDE} pixels, 16 frames.", "", *table(results, alike)]
    text = "\n".join([*lines, "", describe(engine_versions())]) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
