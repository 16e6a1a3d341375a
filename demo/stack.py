"""Starts an engine and a gateway on loopback, for the demo and the load test."""

from __future__ import annotations

import argparse
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, MappingProxyType

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "demo"
TRAINED_MODEL = ROOT / "demo" / "model"
WHOLE, REDUCED = "demo", "demo-reduced"
ENGINE_SECONDS = 900  # a large checkpoint may first have to be downloaded
GATEWAY_SECONDS = 60
console = Console(highlight=False)


class DemoError(Exception):
    """A process of the demo did not start; the message names it and its log file."""


def on_gpu() -> bool:
    """Return whether the installed vLLM is the one for GPUs."""
    return not importlib.metadata.version("vllm").endswith("+cpu")


def random_model() -> Path:
    """Return a checkpoint in which prefill is felt, with random weights, made now if it is not there."""
    directory = CACHE / "llava-onevision-random"
    if not (directory / "model.safetensors").exists():
        with console.status("Making a checkpoint: LLaVA-OneVision's architecture, random weights"):
            command = [sys.executable, "-m", "demo.checkpoint", str(directory)]
            made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if made.returncode:
            raise DemoError(f"the checkpoint could not be made:\n{made.stderr[-2000:]}")
    return directory


def free_port() -> int:
    """Return a free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def engine_command(model: str, port: int, *, retention: float, flags: Sequence[str] = ()) -> list[str]:
    """Return the command line of the engine, `flags` last."""
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
    return [*command, *flags]


def engine_environment() -> dict[str, str]:
    """Return the environment of the engine: the plugin with its headers; no compiling where it doesn't pay.

    vLLM's sockets lie in /tmp: their paths may have 107 characters, which a long TMPDIR exceeds.
    """
    environment = {"VLLM_RPC_BASE_PATH": "/tmp", **os.environ, "VLLM_PLUGINS": "aot", "VLLM_NO_USAGE_STATS": "1"}
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
def stack(
    checkpoint: str,
    *,
    retention: float,
    gateway_settings: Mapping[str, str] = MappingProxyType({}),
    engine_flags: Sequence[str] = (),
) -> Iterator[str]:
    """Start the engine with `checkpoint` and the gateway, give the gateway's base URL, and stop both at the end.

    The gateway offers the model as WHOLE and, at `retention`, as REDUCED. `gateway_settings` are more of its
    `AOT_GATEWAY_` variables, `engine_flags` more arguments of the engine.
    """
    engine_port, gateway_port = free_port(), free_port()
    logs = Path(tempfile.mkdtemp(prefix="aot-demo-"))
    config = logs / "gateway.yaml"
    config.write_text(gateway_config(retention))
    gateway_environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AOT_GATEWAY_")},
        "AOT_GATEWAY_PORT": str(gateway_port),
        "AOT_GATEWAY_ENGINES": f"http://127.0.0.1:{engine_port}",
        "AOT_GATEWAY_CONFIG": str(config),
        **gateway_settings,
    }
    engine = running(
        "vLLM with the AOT plugin",
        engine_command(checkpoint, engine_port, retention=retention, flags=engine_flags),
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
        yield f"http://127.0.0.1:{gateway_port}"


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
                status.update(f"Starting {title}, {seconds:.0f} s  [dim]{plain(tail[0]) if tail else ''}[/dim]")
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


def plain(line: str) -> str:
    """Return the end of a line, escaped so that rich reads no markup in it."""
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


def retention_argument(text: str) -> float:
    """Return a retention the gateway takes: hundredths below 1."""
    try:
        retention = float(text)
    except ValueError:
        retention = float("nan")
    if not (0.01 <= retention < 1 and round(retention, 2) == retention):
        raise argparse.ArgumentTypeError(f"RETENTION must be in [0.01, 0.99] with at most two decimals, got {text}")
    return retention


def interrupt_on_signals() -> None:
    """Have SIGINT and SIGTERM raise KeyboardInterrupt, so that everything started is stopped."""
    for sign in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts what it runs in the background without
        signal.signal(sign, _interrupt)


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
