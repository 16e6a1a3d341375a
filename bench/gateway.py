"""Measures the overhead of gateways, this one and its peers: the time they add to asking the same engine directly.

    python bench/gateway.py --peers --out bench/results/gateway.md

The engine answers at once, so that only the overhead remains. The arms are asked in turn, one request at a time or 64
at once, so that other load on the machine affects all arms. The overhead of an arm is the median over rounds of its
time minus the direct time of the same round.

Bodies are 200 bytes of text, or contain a data URL and are 1 MiB and 8 MiB large. Each video is a different playable
MP4, because this gateway opens and probes every video, while the others forward it unread. In the arm with files, this
gateway writes the video to a shared volume instead of the request.

Each chunk of a stream carries the time at which it left the engine; all processes use the clock of the same machine.
Processor time and memory are those of all processes of an arm. `--soak SECONDS` holds 200 streams open through this
gateway, each ten seconds long and about a different video, and prints memory and the number of open files.
`--peers` adds vllm-router and LiteLLM's proxy, in a separate environment, with the versions of `bench/peers.txt`.
`--only` leaves out all arms but those that it names, to compare a few of them in little time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.machine import describe  # noqa: E402 - found through the line above
from bench.servers import free_port, process  # noqa: E402
from demo.clip import write_clip  # noqa: E402

PEERS = ROOT / ".cache" / "bench" / "peers"
BODIES = {"200 B": 200, "1 MiB": 2**20, "8 MiB": 8 * 2**20}
OURS = "aot gateway"
MANY = 64
STREAMED_BYTES = 128 * 1024
CHAT = "/v1/chat/completions"


def family(pid: int) -> list[int]:
    """Return the ids of a process and all below it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def processor_seconds(pid: int) -> float:
    """Return the processor time a process and those below it have taken."""
    return sum(own_processor_seconds(member) for member in family(pid))


def own_processor_seconds(pid: int) -> float:
    """Return the processor time that a process alone has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int) -> float:
    """Return their resident memory."""
    pages = sum(int(Path(f"/proc/{member}/statm").read_text().split()[1]) for member in family(pid))
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files(pid: int) -> int:
    """Return how many files and sockets they hold open."""
    return sum(len(list(Path(f"/proc/{member}/fd").iterdir())) for member in family(pid))


class Bodies:
    """Requests of a given size, each about a different video."""

    def __init__(self) -> None:
        """Make the clip that all videos are variations of."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write_clip(path, frames=64, seed=1)
            self._clip = path.read_bytes()
        self._made = 0

    def make(self, size: int) -> bytes:
        """Return a body of about `size` bytes; a video is filled up with a box that players skip."""
        self._made += 1
        text = {"type": "text", "text": f"What happens in number {self._made}?"}
        content: list[dict[str, Any]] = [text]
        if size > 4096:
            room = size * 3 // 4 - len(self._clip) - 1024
            box = (room + 8).to_bytes(4, "big") + b"free" + self._made.to_bytes(8, "big").ljust(room, b"\0")
            url = "data:video/mp4;base64," + base64.b64encode(self._clip + box).decode()
            content.insert(0, {"type": "video_url", "video_url": {"url": url}})
        return json.dumps({"model": "bench", "messages": [{"role": "user", "content": content}]}).encode()

    def stream(self, size: int) -> bytes:
        """Return a request for a stream."""
        return self.make(size)[:-1] + b',"stream":true}'


Session = aiohttp.ClientSession


def new_session() -> Session:
    """Return a client that keeps its connections."""
    return Session(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=120),
        headers={"content-type": "application/json", "authorization": "Bearer sk-bench"},
    )


async def ask(session: Session, address: str, body: bytes) -> float:
    """Return the seconds one request took."""
    started = time.perf_counter()
    async with session.post(address + CHAT, data=body) as answer:
        text = await answer.read()
        if answer.status != 200:
            sys.exit(f"{address} answered {answer.status}: {text[:300]!r}")
    return time.perf_counter() - started


def turns(arms: dict[str, str], number: int) -> list[str]:
    """Return the names of the arms in a random order for each round, so that no arm always follows the same one."""
    return random.Random(number).sample(list(arms), len(arms))


async def one_at_a_time(arms: dict[str, str], make: Callable[[], bytes], rounds: int) -> dict[str, list[float]]:
    """Return each arm's seconds, a request a round."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    async with new_session() as session:
        for number in range(rounds + 3):
            for name in turns(arms, number):
                taken = await ask(session, arms[name], make())
                if number >= 3:
                    seconds[name].append(taken)
    return seconds


async def many_at_once(arms: dict[str, str], make: Callable[[], bytes], rounds: int) -> dict[str, list[float]]:
    """Return each arm's seconds a request, in batches of `MANY`."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    async with new_session() as session:
        for number in range(rounds + 1):
            for name in turns(arms, number):
                bodies = [make() for _ in range(MANY)]
                started = time.perf_counter()
                await asyncio.gather(*(ask(session, arms[name], body) for body in bodies))
                if number:
                    seconds[name].append((time.perf_counter() - started) / MANY)
    return seconds


async def chunk_delays(session: Session, address: str, body: bytes) -> list[float]:
    """Return the delay of each chunk of a stream, without the first chunk."""
    delays, rest = [], b""
    async with session.post(address + CHAT, data=body) as answer:
        if answer.status != 200:
            sys.exit(f"{address} answered {answer.status}: {(await answer.read())[:300]!r}")
        async for piece in answer.content.iter_any():
            now = time.perf_counter()
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                payload = event.partition(b"data: ")[2]
                if payload.startswith(b"{") and (choices := json.loads(payload)["choices"]):
                    content = choices[0].get("delta", {}).get("content")
                    if content:
                        delays.append(now - float(content))
    return delays[1:]


async def streams(arms: dict[str, str], bodies: Bodies, rounds: int) -> dict[str, list[float]]:
    """Return the median delay of a stream's chunks, a stream a round."""
    delays: dict[str, list[float]] = {name: [] for name in arms}
    async with new_session() as session:
        for number in range(rounds):
            for name in turns(arms, number):
                delays[name].append(statistics.median(await chunk_delays(session, arms[name], bodies.stream(200))))
    return delays


def added(seconds: dict[str, list[float]], name: str) -> float:
    """Return the overhead of an arm in milliseconds: the median over rounds of its time minus the direct time."""
    pairs = zip(seconds[name], seconds["direct"], strict=True)
    return statistics.median(mine - direct for mine, direct in pairs) * 1e3


async def processor_time(address: str, pid: int, make: Callable[[], bytes], requests: int) -> float:
    """Return the processor seconds of an arm for 1,000 requests, 16 at a time."""
    async with new_session() as session:
        before = processor_seconds(pid)
        for _ in range(requests // 16):
            await asyncio.gather(*(ask(session, address, make()) for _ in range(16)))
        return (processor_seconds(pid) - before) / (requests // 16 * 16) * 1000


async def soak(address: str, pid: int, bodies: Bodies, seconds: float) -> list[tuple[float, float, int]]:
    """Hold 200 streams open, a new one for each that ends; return seconds, memory in MiB and open files."""
    until = time.monotonic() + seconds
    seen = []

    async def stream_after_stream(session: Session) -> None:
        while time.monotonic() < until:
            await chunk_delays(session, address, bodies.stream(STREAMED_BYTES))

    async with new_session() as session:
        streaming = asyncio.gather(*(stream_after_stream(session) for _ in range(200)))
        started = time.monotonic()
        while time.monotonic() < until:
            await asyncio.sleep(min(30, seconds / 10))
            seen.append((time.monotonic() - started, memory_mib(pid), open_files(pid)))
        await streaming
    return seen


def start_arms(
    stack: ExitStack, *, peers: bool, gap_seconds: float, only: Sequence[str] | None = None
) -> tuple[dict[str, str], dict[str, int]]:
    """Start the engine and everything in front of it; return addresses and process ids by name.

    With `only`, nothing is started but the arms that it names.
    """
    engine_port = free_port()
    engine = f"http://127.0.0.1:{engine_port}"
    bench = ROOT / "bench"
    stack.enter_context(
        process(
            [sys.executable, str(bench / "mock_engine.py"), str(engine_port), str(gap_seconds)],
            health=f"{engine}/health",
        )
    )
    arms, pids = {"direct": engine}, {}

    def add(name: str, command: list[str], port: int, health: str, environment: dict[str, str] | None = None) -> None:
        if only is not None and name not in only:
            return
        arms[name] = f"http://127.0.0.1:{port}"
        pids[name] = stack.enter_context(process(command, health=arms[name] + health, environment=environment))

    ours = {"AOT_GATEWAY_ENGINES": engine, "AOT_GATEWAY_MAX_CONCURRENCY": "256", "PYTHONPATH": str(ROOT)}
    media = stack.enter_context(tempfile.TemporaryDirectory())
    files = {"AOT_GATEWAY_MEDIA_HANDOFF": "file", "AOT_GATEWAY_MEDIA_DIR": media}
    for name, settings in ((OURS, {}), ("aot gateway, videos as files", files)):
        port = free_port()
        environment = {**ours, **settings, "AOT_GATEWAY_PORT": str(port)}
        add(name, [sys.executable, "-m", "server"], port, "/health/ready", environment)
    port = free_port()
    add("streaming proxy", [sys.executable, str(bench / "streaming_proxy.py"), str(port), engine], port, "/health")
    if peers:
        port, metrics = free_port(), free_port()
        command = [str(PEERS / "bin" / "vllm-router"), "--worker-urls", engine, "--policy", "round_robin"]
        options = [
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--prometheus-port",
            str(metrics),
            "--log-level",
            "error",
        ]
        add("vllm-router", command + options, port, "/health")
        port = free_port()
        config = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "litellm.json"
        model = {"model": "hosted_vllm/bench", "api_base": f"{engine}/v1", "api_key": "unused"}
        config.write_text(json.dumps({"model_list": [{"model_name": "bench", "litellm_params": model}]}))
        command = [str(PEERS / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        local = {
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOG": "ERROR",
            "PATH": f"{PEERS}/bin:{os.environ['PATH']}",
        }
        add("LiteLLM proxy", command, port, "/health/liveliness", local)
    return arms, pids


def install_peers() -> None:
    """Make the environment of the peers, if it does not exist."""
    pins = Path(__file__).with_name("peers.txt").read_bytes()
    stamp = PEERS / "pins.txt"
    if stamp.exists() and stamp.read_bytes() == pins:
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(PEERS)], check=True)
    install = [
        str(PEERS / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "-r",
        str(ROOT / "bench" / "peers.txt"),
    ]
    subprocess.run(install, check=True)
    stamp.write_bytes(pins)


async def measure(arms: dict[str, str], pids: dict[str, int], rounds: int) -> str:
    """Return the table."""
    bodies = Bodies()
    columns: dict[str, Callable[[str], str]] = {}
    for name, size in BODIES.items():
        turns = rounds if size < 2**21 else max(10, rounds // 4)
        seconds = await one_at_a_time(arms, lambda size=size: bodies.make(size), turns)  # type: ignore[misc]
        direct = statistics.median(seconds["direct"]) * 1e3
        print(name, {arm: round(added(seconds, arm), 2) for arm in arms}, flush=True)
        columns[f"{name} ({direct:.1f} ms direct)"] = lambda arm, s=seconds: f"{added(s, arm):.2f} ms"  # type: ignore[misc]
    seconds = await many_at_once(arms, lambda: bodies.make(200), max(5, rounds // 10))
    rate = {arm: 1 / statistics.median(taken) for arm, taken in seconds.items()}
    print("many", rate, flush=True)
    columns[f"requests/s, {MANY} at once ({rate['direct']:,.0f} direct)"] = lambda arm: f"{rate[arm]:,.0f}"
    delays = await streams(arms, bodies, max(5, rounds // 20))
    columns["each chunk of a stream"] = lambda arm: f"{added(delays, arm):.3f} ms"
    spent = {arm: await processor_time(arms[arm], pid, lambda: bodies.make(200), 960) for arm, pid in pids.items()}
    columns["processor, 1,000 requests of 200 B"] = lambda arm: f"{spent[arm]:.2f} s"
    columns["memory"] = lambda arm: f"{memory_mib(pids[arm]):.0f} MiB"
    lines = ["| added by | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    lines += [f"| {arm} | " + " | ".join(cell(arm) for cell in columns.values()) + " |" for arm in pids]
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200, help="requests of each size to each arm")
    parser.add_argument("--peers", action="store_true", help="measure vllm-router and LiteLLM's proxy too")
    parser.add_argument("--only", nargs="+", metavar="ARM", help=f"measure these arms alone, such as {OURS!r}")
    parser.add_argument("--soak", type=float, help="instead hold 200 streams through ours for so many seconds")
    parser.add_argument("--out", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    if arguments.peers:
        install_peers()
    with ExitStack() as stack:
        gap_seconds = 0.1 if arguments.soak else 0.01
        arms, pids = start_arms(stack, peers=arguments.peers, gap_seconds=gap_seconds, only=arguments.only)
        if missing := set(arguments.only or ()) - set(pids):
            sys.exit(f"there is no arm called {', '.join(sorted(missing))}; there are {', '.join(pids) or 'others'}")
        if arguments.soak:
            seen = asyncio.run(soak(arms[OURS], pids[OURS], Bodies(), arguments.soak))
            lines = ["| after | memory | open files |", "|--:|--:|--:|"]
            lines += [f"| {at:.0f} s | {mib:.0f} MiB | {files} |" for at, mib, files in seen]
            text = "\n".join(lines)
        else:
            text = asyncio.run(measure(arms, pids, arguments.rounds))
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("aiohttp", "fastapi", "uvicorn")]
    text += f"\n\n{describe(*versions)}\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
