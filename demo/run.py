"""The main job on one screen: a real engine, the gateway, a real video, asked once whole and once reduced.

`make demo` runs it in `.venv`; `--model` and `--video` serve another checkpoint or file. Everything it starts listens
on loopback and is stopped at the end, on Ctrl-C and on failure.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from openai import OpenAI
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "demo"
WHOLE, REDUCED = "demo", "demo-reduced"
QUESTION = "What happens in the video?"
ENGINE_SECONDS = 900  # a large checkpoint may first have to be downloaded
GATEWAY_SECONDS = 60
console = Console(highlight=False)


class DemoError(Exception):
    """Something the demo needs did not come up; the message says what and where its log is."""


@dataclass(frozen=True)
class Run:
    """What one question cost and brought."""

    answer: str
    before: int
    after: int
    prompt_tokens: int
    first_token_seconds: float


def on_gpu() -> bool:
    """Return whether the installed vLLM is the one for GPUs."""
    return not importlib.metadata.version("vllm").endswith("+cpu")


def embedded_model() -> Path:
    """Return the checkpoint that the demo brings along, made now if it is not there."""
    directory = CACHE / "llava-onevision-random"
    if not (directory / "model.safetensors").exists():
        with console.status("Making the embedded checkpoint: LLaVA-OneVision's architecture, random weights"):
            script = ROOT / "demo" / "checkpoint.py"
            made = subprocess.run(
                [sys.executable, str(script), str(directory)], capture_output=True, text=True, check=False
            )
        if made.returncode:
            raise DemoError(f"the embedded checkpoint could not be made:\n{made.stderr[-2000:]}")
    return directory


def embedded_video() -> Path:
    """Return the demo's H.264 clip, made now if it is not there."""
    from clip import write_clip

    path = CACHE / "shapes.mp4"
    if not path.exists():
        write_clip(path)
    return path


def free_port() -> int:
    """Return a port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def engine_command(model: str, port: int, *, retention: float) -> list[str]:
    """Return the command line of the engine."""
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", model, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo-model"),
        *("--video-pruning-rate", f"{1 - retention:.6g}"),
        "--enable-prompt-tokens-details",
        "--trust-request-mm-kwargs",  # the gateway, the only client, puts a request's retention there
        *("--limit-mm-per-prompt", '{"image": 0, "video": 1}'),
        *("--max-num-batched-tokens", "8192"),  # 32 frames of 196 tokens enter the encoder cache whole
        *("--max-model-len", "8192"),
    ]
    if not on_gpu():
        command += ["--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", str(2**29)]
    return command


def engine_environment() -> dict[str, str]:
    """Return the environment of the engine: the plugin with its headers; no compiling where it doesn't pay."""
    environment = {**os.environ, "VLLM_PLUGINS": "aot", "VLLM_NO_USAGE_STATS": "1"}
    if not on_gpu():
        environment |= {"TORCHDYNAMO_DISABLE": "1"}
    return environment


def gateway_config(retention: float) -> str:
    """Return the gateway's YAML: one name for the model as it is, one for the model at `retention`."""
    models = {
        WHOLE: {"engine_model": "demo-model", "retention": 1.0},
        REDUCED: {"engine_model": "demo-model", "retention": retention},
    }
    return json.dumps({"models": models})  # JSON is YAML


@contextlib.contextmanager
def running(
    title: str, command: list[str], *, environment: dict[str, str], log: Path, ready: str, timeout_seconds: float
) -> Iterator[None]:
    """Start a server, show its last log line until `ready` answers, and stop it with all its children at the end."""
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
    try:
        with console.status(f"Starting {title}") as status:
            while not _answers(ready):
                seconds = time.monotonic() - started
                tail = log.read_text(errors="replace").splitlines()[-1:]
                status.update(f"Starting {title}, {seconds:.0f} s  [dim]{_plain(tail[0]) if tail else ''}[/dim]")
                if process.poll() is not None:
                    raise DemoError(f"{title} ended at once:\n{_last_words(log)}")
                if seconds > timeout_seconds:
                    raise DemoError(f"{title} was not up after {seconds:.0f} s:\n{_last_words(log)}")
                time.sleep(0.3)
        console.print(f"{title} is up after {time.monotonic() - started:.0f} s  [dim]{log}[/dim]")
        yield
    finally:
        _stop(process)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _plain(line: str) -> str:
    return line[-110:].replace("[", "(").replace("]", ")")


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-25:]) + f"\nThe whole log is {log}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and the session of children it started."""
    for sign, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a child that outlived its parent


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
        ("answer", lambda run: _plain(" ".join(run.answer.split())) or "(nothing printable)"),
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
            "[yellow]The embedded model has random weights: its answers mean nothing, its token counts and times do. "
            "Serve a trained one with make demo MODEL=… VIDEO=…[/yellow]"
        )


def demo(*, model: str | None, video: Path | None, retention: float) -> None:
    """Start everything, ask twice, print the table."""
    checkpoint = model or str(embedded_model())
    clip = video or embedded_video()
    url = f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"
    part = {"type": "video_url", "video_url": {"url": url}}
    console.print(f"model   {checkpoint}\nvideo   {clip} ({clip.stat().st_size / 1024:.0f} KiB)")

    engine_port, gateway_port = free_port(), free_port()
    logs = Path(tempfile.mkdtemp(prefix="aot-demo-"))
    config = logs / "gateway.yaml"
    config.write_text(gateway_config(retention))
    gateway_environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AOT_GATEWAY_")},
        "AOT_GATEWAY_PORT": str(gateway_port),
        "AOT_GATEWAY_ENGINES": f"http://127.0.0.1:{engine_port}",
        "AOT_GATEWAY_CONFIG": str(config),
    }
    engine = running(
        "vLLM with the AOT plugin",
        engine_command(checkpoint, engine_port, retention=retention),
        environment=engine_environment(),
        log=logs / "engine.log",
        ready=f"http://127.0.0.1:{engine_port}/health",
        timeout_seconds=ENGINE_SECONDS,
    )
    gateway = running(
        "the gateway",
        [sys.executable, "-m", "server"],
        environment=gateway_environment,
        log=logs / "gateway.log",
        ready=f"http://127.0.0.1:{gateway_port}/health/ready",
        timeout_seconds=GATEWAY_SECONDS,
    )
    with engine, gateway:
        client = OpenAI(base_url=f"http://127.0.0.1:{gateway_port}/v1", api_key="unused", max_retries=0, timeout=600)
        with console.status("Asking about the video: warming up"):
            ask(client, REDUCED, max_tokens=2)  # first-use costs of neither arm
        with console.status("Asking about the video, every token kept"):
            whole = ask(client, WHOLE, part)
        with console.status(f"Asking about the video, {retention:.0%} kept"):
            reduced = ask(client, REDUCED, part)
        show(whole, reduced, retention=retention, random_weights=model is None)


def _retention(text: str) -> float:
    """Return a retention the gateway takes: hundredths below 1."""
    try:
        retention = float(text)
    except ValueError:
        retention = float("nan")
    if not (0.01 <= retention < 1 and round(retention, 2) == retention):
        raise argparse.ArgumentTypeError(f"RETENTION must be in [0.01, 0.99] with at most two decimals, got {text}")
    return retention


def _terminate(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a checkpoint that vLLM can load; the embedded one if not given")
    parser.add_argument("--video", type=Path, help="a video file; the embedded clip if not given")
    parser.add_argument("--retention", type=_retention, default=0.10, help="fraction of video tokens kept")
    arguments = parser.parse_args()
    if arguments.video is not None and not arguments.video.is_file():
        parser.error(f"VIDEO must be a file, got {arguments.video}")
    for sign in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts what it runs in the background without
        signal.signal(sign, _terminate)
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
