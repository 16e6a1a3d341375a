"""The main job on one screen: a real engine, the gateway, a real video, asked once whole and once reduced.

`make demo` runs it in `.venv`; `--model` and `--video` serve another checkpoint or file. Everything it starts listens
on loopback and is stopped at the end, on Ctrl-C and on failure.
"""

from __future__ import annotations

import argparse
import base64
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from clip import write_clip
from openai import OpenAI
from rich.table import Table
from stack import (
    CACHE,
    REDUCED,
    WHOLE,
    DemoError,
    console,
    interrupt_on_signals,
    plain,
    random_model,
    retention_argument,
    stack,
)

QUESTION = "What happens in the video?"


@dataclass(frozen=True)
class Run:
    """What one question cost and brought."""

    answer: str
    before: int
    after: int
    prompt_tokens: int
    first_token_seconds: float


def embedded_video() -> Path:
    """Return the demo's H.264 clip, made now if it is not there."""
    path = CACHE / "shapes.mp4"
    if not path.exists():
        write_clip(path)
    return path


def ask(client: OpenAI, model: str, *media: dict[str, object], max_tokens: int = 24) -> Run:
    """Ask about the media as a stream and return the answer with what it cost."""
    content = [*media, {"type": "text", "text": QUESTION}]
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
            "[yellow]The demo's own model has random weights: its answers mean nothing, its token counts and times do. "
            "Serve a trained one with make demo MODEL=… VIDEO=…[/yellow]"
        )


def demo(*, model: str | None, video: Path | None, retention: float) -> None:
    """Start everything, ask twice, print the table."""
    checkpoint = model or str(random_model())
    clip = video or embedded_video()
    url = f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"
    part = {"type": "video_url", "video_url": {"url": url}}
    console.print(f"model   {checkpoint}\nvideo   {clip} ({clip.stat().st_size / 1024:.0f} KiB)")

    with stack(checkpoint, retention=retention) as gateway:
        client = OpenAI(base_url=f"{gateway}/v1", api_key="unused", max_retries=0, timeout=600)
        with console.status("Asking about the video: warming up"):
            ask(client, REDUCED, max_tokens=2)  # first-use costs of neither arm
        with console.status("Asking about the video, every token kept"):
            whole = ask(client, WHOLE, part)
        with console.status(f"Asking about the video, {retention:.0%} kept"):
            reduced = ask(client, REDUCED, part)
        show(whole, reduced, retention=retention, random_weights=model is None)


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a checkpoint that vLLM can load; one with random weights if not given")
    parser.add_argument("--video", type=Path, help="a video file; the embedded clip if not given")
    parser.add_argument("--retention", type=retention_argument, default=0.10, help="fraction of video tokens kept")
    arguments = parser.parse_args()
    if arguments.video is not None and not arguments.video.is_file():
        parser.error(f"VIDEO must be a file, got {arguments.video}")
    interrupt_on_signals()
    try:
        demo(model=arguments.model, video=arguments.video, retention=arguments.retention)
    except DemoError as exc:
        console.print(str(exc), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
