"""The main job on one screen: a real engine, the gateway, a real video, asked once whole and once reduced.

First the embedded model, which was trained for this, is asked what it can answer; then a larger one with random
weights, in which prefill is felt as in a model one would serve, shows the time. With `--model` or `--video` only that
checkpoint and file are served. `make demo` runs it in `.venv`. Everything it starts listens on loopback and is stopped
at the end, on Ctrl-C and on failure.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI
from rich.table import Table

from demo.clip import write_clip
from demo.h264 import write_h264
from demo.stack import (
    CACHE,
    REDUCED,
    TRAINED_MODEL,
    WHOLE,
    DemoError,
    console,
    interrupt_on_signals,
    plain,
    random_model,
    retention_argument,
    stack,
)
from demo.task import KINDS, Question, questions, render, scene

QUESTION = "What happens in the video?"


@dataclass(frozen=True)
class Run:
    """The cost and the answer of one question."""

    answer: str
    before: int
    after: int
    prompt_tokens: int
    first_token_seconds: float


def video_part(clip: Path) -> dict[str, object]:
    """Return a video as a part of a message."""
    url = f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"
    return {"type": "video_url", "video_url": {"url": url}}


def client(gateway: str) -> OpenAI:
    """Return a client of the gateway."""
    return OpenAI(base_url=f"{gateway}/v1", api_key="unused", max_retries=0, timeout=600)


def ask(client: OpenAI, model: str, *media: dict[str, object], question: str = QUESTION, max_tokens: int = 24) -> Run:
    """Ask about the media as a stream and return the answer with its cost."""
    content = [*media, {"type": "text", "text": question}]
    started = time.perf_counter()
    first = 0.0
    answer = ""
    usage = None
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],  # type: ignore[misc, list-item]
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - started
            answer += chunk.choices[0].delta.content
    if usage is None or not first:
        raise DemoError(f"{model} sent no token or no usage")
    saved = (usage.model_extra or {}).get("video_tokens") or {"before": 0, "after": 0}
    return Run(answer, saved["before"], saved["after"], usage.prompt_tokens, first)


def show(whole: Run, reduced: Run, *, retention: float, random_weights: bool) -> None:
    """Print the table."""
    table = Table(title=f"“{QUESTION}”")
    for heading in ("", "every token", f"AOT, {retention:.0%} kept"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for name, cell in (
        ("answer", lambda run: plain(" ".join(run.answer.split())) or "(nothing printable)"),
        ("video tokens before", lambda run: f"{run.before:,}"),
        ("video tokens after", lambda run: f"{run.after:,}"),
        ("prompt tokens", lambda run: f"{run.prompt_tokens:,}"),
        ("time to first token", lambda run: f"{run.first_token_seconds:.2f} s"),
    ):
        table.add_row(name, cell(whole), cell(reduced))
    console.print(table)
    tokens, seconds = 1 - reduced.after / whole.after, 1 - reduced.first_token_seconds / whole.first_token_seconds
    console.print(f"{tokens:.0%} of the video tokens and {seconds:.0%} of the time to the first token saved.")
    if random_weights:
        console.print(
            "[yellow]This larger model has random weights: its answers mean nothing, its token counts and times do. "
            "Serve a real one with make demo MODEL=… VIDEO=…[/yellow]"
        )


def asked_clip() -> tuple[Path, list[Question]]:
    """Return the first clip kept from training that has questions of every kind, and one question of each."""
    for seed in itertools.count():
        made = scene(seed, split="test")
        by_kind = {question.kind: question for question in reversed(questions(made))}
        if len(by_kind) == len(KINDS):
            break
    path = CACHE / f"clip-{seed}.mp4"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_h264(path, render(made)[0])
    return path, [by_kind[kind] for kind in KINDS]


def show_answers(*, retention: float) -> None:
    """Ask the embedded model one question of every kind, and print its answers beside the right answers."""
    clip, asked = asked_clip()
    console.print(f"model   {TRAINED_MODEL}\nvideo   {clip} ({clip.stat().st_size / 1024:.0f} KiB)")
    table = Table(title="What is left of the answers")
    for heading in ("question", "what is so", "every token", f"AOT, {retention:.0%} kept"):
        table.add_column(heading, overflow="fold")
    right = {WHOLE: 0, REDUCED: 0}
    with stack(str(TRAINED_MODEL), retention=retention) as gateway:
        for question in asked:
            runs = {
                name: ask(client(gateway), name, video_part(clip), question=question.text, max_tokens=8)
                for name in right
            }
            said = {name: plain(" ".join(run.answer.split())) for name, run in runs.items()}
            for name, answer in said.items():
                right[name] += answer == question.answer
            marked = [f"{answer} [dim]{'✓' if answer == question.answer else '✗'}[/dim]" for answer in said.values()]
            table.add_row(question.text, question.answer, *marked)
    console.print(table)
    console.print(
        f"{right[WHOLE]} of {len(asked)} right with {runs[WHOLE].after:,} video tokens, "
        f"{right[REDUCED]} with {runs[REDUCED].after:,}. One clip is no measurement: those are in the README."
    )


def show_times(*, model: str | None, video: Path | None, retention: float) -> None:
    """Ask a model the same question about a video, whole and reduced, and print the cost of each."""
    checkpoint = model or str(random_model())
    clip = video or CACHE / "shapes.mp4"
    if not clip.exists():
        write_clip(clip)
    console.print(f"model   {checkpoint}\nvideo   {clip} ({clip.stat().st_size / 1024:.0f} KiB)")
    with stack(checkpoint, retention=retention) as gateway:
        asking = client(gateway)
        with console.status("Asking about the video: warming up"):
            ask(asking, REDUCED, max_tokens=2)  # first-use costs of neither arm
        with console.status("Asking about the video, every token kept"):
            whole = ask(asking, WHOLE, video_part(clip))
        with console.status(f"Asking about the video, {retention:.0%} kept"):
            reduced = ask(asking, REDUCED, video_part(clip))
        show(whole, reduced, retention=retention, random_weights=model is None)


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a checkpoint that vLLM can load, served in place of the demo's own")
    parser.add_argument("--video", type=Path, help="a video file to ask about")
    parser.add_argument("--retention", type=retention_argument, default=0.10, help="fraction of video tokens kept")
    arguments = parser.parse_args()
    if arguments.video is not None and not arguments.video.is_file():
        parser.error(f"VIDEO must be a file, got {arguments.video}")
    interrupt_on_signals()
    try:
        if arguments.model is None and arguments.video is None:
            show_answers(retention=arguments.retention)
        show_times(model=arguments.model, video=arguments.video, retention=arguments.retention)
    except DemoError as exc:
        console.print(str(exc), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
