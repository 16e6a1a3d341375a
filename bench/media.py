"""The way of a video: handed over as frames by the gateway, or read by vLLM's own loaders.

    python bench/media.py --out bench/results/media.md

One engine with a tiny model answers with one token, so that reading the video takes most of the time. All arms ask
this engine, in turn: through a gateway that hands frames over as a file, through one that hands them over inline, and
directly, where vLLM reads the video itself with OpenCV, and with torchcodec where that is installed. All fetch the clip
from the same server on loopback. No clip is asked about twice: each has other bytes at its end.

The model looks at 32 frames of 384 x 384 pixels, in large patches. Clips have 25 frames a second and move everywhere.
Ten seconds are encoded, longer clips repeat them. The first table has the median time of one request at a time; memory
is the peak of the gateway's process that reads the clip. The second table has the processor time of the gateway, its
readers and the engine's API server for the same requests. The model's own is left out: its process looks out for work
for a second after each request, busily. The third table has videos a second with several requests at a time. The last
one says what can be gained at most: how long the same libav takes to decode the whole clip, and to decode only what the
32 frames are made from. Without an engine, scaling or hand-over; each frame that another refers to has to be decoded.

torchcodec is measured where it is installed: a build for CPUs (0.12.0, say, without its dependencies) beside FFmpeg's
shared libraries.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import aiohttp
import av
from av.codec.context import ThreadType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.clips import CODECS, Kind, clip, marking  # noqa: E402 - found through the line above
from bench.gateway import family, own_processor_seconds, processor_seconds  # noqa: E402
from bench.machine import describe, engine_versions  # noqa: E402
from bench.servers import free_port, process  # noqa: E402
from demo.tiny_checkpoints import checkpoint  # noqa: E402
from server.reader.facts import Limits  # noqa: E402
from server.reader.reading import scan_video  # noqa: E402
from server.reader.sampling import Clip, Uniform  # noqa: E402

FILE, INLINE, OPENCV, TORCHCODEC = "frames in a file", "frames inline", "OpenCV", "torchcodec"
MODEL = "bench"
MIB = 2**20
NUM_FRAMES = 32  # what the model samples
THREADS = 2
DEMUXERS = {".mp4": "mov,mp4,m4a,3gp,3g2,mj2", ".webm": "matroska,webm"}
LIMITS = Limits(max_seconds=900, max_pixels=1920 * 1088, max_frames=10**6, sampled_frames=NUM_FRAMES)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "aot",
    "VLLM_RPC_BASE_PATH": "/tmp",  # sockets' paths may have 107 characters
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_VIDEO_FETCH_TIMEOUT": "600",
}
GATEWAY = {
    "AOT_GATEWAY_MEDIA_ALLOW_HTTP": "true",
    "AOT_GATEWAY_MEDIA_MAX_BYTES": str(512 * MIB),
    "AOT_GATEWAY_MEDIA_MAX_SECONDS": "900",
    "AOT_GATEWAY_MEDIA_FETCH_SECONDS": "600",
    "AOT_GATEWAY_MEDIA_READ_SECONDS": "600",
    "AOT_GATEWAY_MAX_BUFFERED_BYTES": str(2048 * MIB),
    "AOT_GATEWAY_LOG_LEVEL": "warning",
}


@dataclass(frozen=True)
class Arm:
    """Whom to ask, and how the video is read."""

    address: str
    more: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request."""
    engine: int | None = None
    """The engine's process id."""
    gateway: int | None = None

    def processor_seconds(self) -> float:
        """Return the processor time that gateway and API server have taken so far; the model's is left out."""
        engine = 0.0 if self.engine is None else own_processor_seconds(self.engine)
        return engine + (0.0 if self.gateway is None else processor_seconds(self.gateway))


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    kinds: Sequence[Kind]
    several: Mapping[Kind, Sequence[int]]
    """How many requests at a time."""
    rounds: int
    """Requests of each arm about a clip of less than LONG_SECONDS; about a longer one, one."""
    pause_seconds: float = 2.0
    """Before each round of an arm: the engine's process spins for a second after its last step."""


LONG_SECONDS = 120
FULL = Plan(
    [Kind(codec, size, seconds) for codec in CODECS for size in ("480p", "720p", "1080p") for seconds in (10, 60, 600)],
    {
        Kind("h264", "720p", 10): (1, 4, 16),
        Kind("h264", "720p", 60): (1, 4, 16),
        Kind("h264", "720p", 600): (1, 4),
        Kind("hevc", "720p", 60): (1, 4, 16),
        Kind("vp9", "720p", 60): (1, 4, 16),
        Kind("av1", "720p", 60): (1, 4, 16),
    },
    rounds=5,
)
TINY = Plan(
    [Kind("h264", "240p", 2), Kind("av1", "240p", 2)], {Kind("h264", "240p", 2): (1, 2)}, rounds=1, pause_seconds=0
)


class Clips:
    """A server of clips. Each URL is given once, and what it leads to has bytes that no other has."""

    def __init__(self) -> None:
        """Serve nothing yet."""
        self._served: dict[str, tuple[Path, bytes]] = {}
        self._numbers = count()
        served = self._served

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, tail = served[self.path]
                self.send_response(200)
                self.send_header("content-type", f"video/{path.suffix[1:]}")
                self.send_header("content-length", str(path.stat().st_size + len(tail)))
                self.end_headers()
                with path.open("rb") as file:
                    shutil.copyfileobj(file, self.wfile, MIB)
                self.wfile.write(tail)

            def log_message(self, *arguments: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def url(self, kind: Kind) -> str:
        """Return the URL of a clip that nobody has seen yet."""
        number = next(self._numbers)
        path = clip(kind)
        name = f"/{number}{path.suffix}"
        self._served[name] = path, marking(path, f"clip {number} of {time.time_ns()}")
        return f"http://{self.host}{name}"

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def engine(model: str, store: Path) -> Iterator[Arm]:
    """Run an engine that reads files in `store`."""
    port = free_port()
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(checkpoint(model)), "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "float32"),
        *("--max-model-len", "8192", "--max-num-batched-tokens", "8192", "--kv-cache-memory-bytes", str(2**29)),
        *("--limit-mm-per-prompt", '{"image": 0, "video": 1}', "--allowed-local-media-path", str(store)),
        *("--mm-processor-cache-gb", "1", "--trust-request-mm-kwargs"),
    ]
    address = f"http://127.0.0.1:{port}"
    with process(command, health=f"{address}/health", environment=ENVIRONMENT) as pid:
        yield Arm(address, engine=pid)


@contextmanager
def arms(engine: Arm, store: Path, clips: Clips) -> Iterator[dict[str, Arm]]:
    """Run the gateways in front of an engine that reads files in `store`, and yield all ways to it."""
    with ExitStack() as stack:
        yield {
            FILE: stack.enter_context(
                _gateway(engine, clips, {"AOT_GATEWAY_MEDIA_HANDOFF": "file", "AOT_GATEWAY_MEDIA_DIR": str(store)})
            ),
            INLINE: stack.enter_context(_gateway(engine, clips, {"AOT_GATEWAY_MEDIA_HANDOFF": "inline"})),
            OPENCV: engine,
            TORCHCODEC: replace(engine, more={"media_io_kwargs": {"video": {"backend": "torchcodec"}}}),
        }


@contextmanager
def _gateway(engine: Arm, clips: Clips, settings: Mapping[str, str]) -> Iterator[Arm]:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {
        **GATEWAY,
        "AOT_GATEWAY_PORT": str(port),
        "AOT_GATEWAY_ENGINES": engine.address,
        "AOT_GATEWAY_MEDIA_ALLOW_HOSTS": clips.host,
        "PYTHONPATH": str(ROOT),
        **settings,
    }
    with process([sys.executable, "-m", "server"], health=f"{address}/health/ready", environment=environment) as pid:
        yield replace(engine, address=address, gateway=pid)


class Refused(Exception):
    """The video was not read; the text says why."""


async def ask(session: aiohttp.ClientSession, arm: Arm, url: str, model: str) -> float:
    """Return the seconds until a question about a video has its answer, one token; raise Refused."""
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What happens?"}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 1, **arm.more}
    started = time.perf_counter()
    async with session.post(f"{arm.address}/v1/chat/completions", json=body) as answer:
        text = await answer.text()
        if answer.status != 200:
            raise Refused(f"{answer.status}: {text[:300]}")
    return time.perf_counter() - started


@dataclass
class Results:
    """Times by clip and arm; None where the arm can't read the clip."""

    seconds: dict[Kind, dict[str, float | None]] = field(default_factory=dict)
    processor: dict[Kind, dict[str, float | None]] = field(default_factory=dict)
    peaks: dict[Kind, float] = field(default_factory=dict)
    """MiB of a process that reads clips."""
    rates: dict[Kind, dict[int, dict[str, float | None]]] = field(default_factory=dict)
    """Videos a second, by how many requests at a time."""
    decoding: dict[Kind, tuple[float, float]] = field(default_factory=dict)
    """Seconds for the whole clip, and for what the sampled frames are made from."""


def decoding(kind: Kind, rounds: int) -> tuple[float, float]:
    """Return the seconds that decoding takes: of the whole clip, and of what the sampled frames are made from."""
    with clip(kind).open("rb") as file:
        video = scan_video(file.fileno(), DEMUXERS[clip(kind).suffix], LIMITS)
        frames = video.timeline.packets
        sampled = {frames[index] for index in Uniform(NUM_FRAMES).indices(Clip(len(frames), 0, 0))}
        times: dict[bool, list[float]] = {True: [], False: []}
        for is_whole in [True, False] * (rounds if kind.seconds < LONG_SECONDS else 1):
            started = time.perf_counter()
            if is_whole:
                _decode_all(clip(kind))
            else:
                for _ in video.decoder.frames(sampled, threads=THREADS):
                    pass
            times[is_whole].append(time.perf_counter() - started)
    return statistics.median(times[True]), statistics.median(times[False])


def _decode_all(path: Path) -> None:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count, stream.codec_context.thread_type = THREADS, ThreadType.FRAME
        for _ in container.decode(stream):
            pass


async def measured(arms: Mapping[str, Arm], clips: Clips, plan: Plan, *, model: str = MODEL) -> Results:
    """Ask all arms about all clips, in turn."""
    results = Results()
    for kind in {*plan.kinds, *plan.several}:
        clip(kind)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3600)) as session:
        for arm in arms.values():
            await _tried(session, arm, [clips.url(plan.kinds[0])], model)
        for kind in plan.kinds:
            readers = _readers(arms)
            _forget_peaks(readers)
            times = await _in_turn(session, arms, clips, kind, model, plan, at_once=1)
            results.seconds[kind] = {name: _median(seen, 0) for name, seen in times.items()}
            results.processor[kind] = {name: _median(seen, 1) for name, seen in times.items()}
            results.peaks[kind] = max((_peak_mib(pid) for pid in readers), default=0.0)
            print(
                kind.name, results.seconds[kind], results.processor[kind], f"{results.peaks[kind]:.0f} MiB", flush=True
            )
        for kind, numbers in plan.several.items():
            results.rates[kind] = {}
            for number in numbers:
                times = await _in_turn(session, arms, clips, kind, model, plan, at_once=number)
                results.rates[kind][number] = {
                    name: number / median if (median := _median(seen, 0)) else None for name, seen in times.items()
                }
                print(kind.name, number, "at a time", results.rates[kind][number], flush=True)
    results.decoding = {kind: decoding(kind, plan.rounds) for kind in plan.kinds}
    return results


async def _in_turn(
    session: aiohttp.ClientSession,
    arms: Mapping[str, Arm],
    clips: Clips,
    kind: Kind,
    model: str,
    plan: Plan,
    *,
    at_once: int,
) -> dict[str, list[tuple[float, float]]]:
    """Return what each arm took to answer `at_once` requests, by round; nothing if it can't read the clip."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    able = list(arms)
    rounds = max(1, plan.rounds // at_once) if kind.seconds < LONG_SECONDS else 1
    for number in range(rounds):
        for name in random.Random(number).sample(able, len(able)):
            await asyncio.sleep(plan.pause_seconds)
            taken = await _tried(session, arms[name], [clips.url(kind) for _ in range(at_once)], model)
            if taken is None:
                able.remove(name)
                times[name] = []
            else:
                times[name].append(taken)
    return times


async def _tried(
    session: aiohttp.ClientSession, arm: Arm, urls: Sequence[str], model: str
) -> tuple[float, float] | None:
    """Return seconds until the last of these clips is answered about, and of the processor; None if one can't be."""
    spent, started = arm.processor_seconds(), time.perf_counter()
    try:
        await asyncio.gather(*(ask(session, arm, url, model) for url in urls))
    except Refused as exc:
        if arm.gateway is not None:
            raise
        print(f"not read: {exc}", flush=True)
        return None
    return time.perf_counter() - started, arm.processor_seconds() - spent


def _median(taken: Sequence[tuple[float, float]], which: int) -> float | None:
    return statistics.median(each[which] for each in taken) if taken else None


def _readers(arms: Mapping[str, Arm]) -> list[int]:
    """Return the ids of the processes in which the gateways read media."""
    return [
        pid
        for arm in arms.values()
        if arm.gateway is not None
        for pid in family(arm.gateway)
        if b"server.reader.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def _forget_peaks(pids: Sequence[int]) -> None:
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def _peak_mib(pid: int) -> float:
    """Return the most memory that a process has had resident since its peak was forgotten."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def table(results: Results, line: str) -> str:
    """Return the tables as markdown."""
    names = list(next(iter(results.seconds.values())))
    own = [name for name in (OPENCV, TORCHCODEC) if name in names]
    heads = " | ".join([*names, *(f"file against {name}" for name in own)])
    rows = [
        f"| seconds to the answer | {heads} | memory |",
        "|---|" + "--:|" * (len(names) + len(own) + 1),
    ]
    for kind, seconds in results.seconds.items():
        cells = [_cell(seconds[name], "{:.2f} s") for name in names]
        cells += [_ratio(seconds[name], seconds[FILE]) for name in own]
        rows.append(f"| {kind.name} | {' | '.join(cells)} | {results.peaks[kind]:.0f} MiB |")
    rows += ["", f"| seconds of the processor | {heads} |", "|---|" + "--:|" * (len(names) + len(own))]
    for kind, spent in results.processor.items():
        cells = [_cell(spent[name], "{:.2f} s") for name in names] + [_ratio(spent[name], spent[FILE]) for name in own]
        rows.append(f"| {kind.name} | {' | '.join(cells)} |")
    rows += ["", f"| videos a second | at a time | {heads} |", "|---|--:|" + "--:|" * (len(names) + len(own))]
    for kind, numbers in results.rates.items():
        for number, rates in numbers.items():
            cells = [_cell(rates[name], "{:.2f}") for name in names]
            cells += [_ratio(rates[FILE], rates[name]) for name in own]
            rows.append(f"| {kind.name} | {number} | {' | '.join(cells)} |")
    if not results.rates:
        rows = rows[:-3]
    rows += ["", "| decoding alone | all frames | what the sampled ones need | gain at most |", "|---|--:|--:|--:|"]
    rows += [
        f"| {kind.name} | {whole:.2f} s | {needed:.2f} s | {whole / needed:.2f}x |"
        for kind, (whole, needed) in results.decoding.items()
    ]
    return "\n".join([*rows, "", line, ""])


def _cell(value: float | None, form: str) -> str:
    return "not read" if value is None else form.format(value)


def _ratio(one: float | None, other: float | None) -> str:
    return f"{one / other:.2f}x" if one is not None and other else ""


async def run(plan: Plan, model: str) -> Results:
    """Start everything and measure."""
    with ExitStack() as stack:
        store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aot-media-")))
        clips = Clips()
        stack.callback(clips.close)
        ways = stack.enter_context(arms(stack.enter_context(engine(model, store)), store, clips))
        if importlib.util.find_spec("torchcodec") is None:
            del ways[TORCHCODEC]
        return await measured(ways, clips, plan)


def _kinds(text: str) -> list[Kind]:
    """Return the clips that an argument like `h264/720p/60,vp9/480p/10` names."""
    return [Kind(codec, size, int(seconds)) for codec, size, seconds in (each.split("/") for each in text.split(","))]


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="one small clip and a smaller model: whether it all works")
    parser.add_argument("--kinds", type=_kinds, help="only these clips: h264/720p/60,vp9/480p/10")
    parser.add_argument("--several", type=_kinds, help="only these clips with several requests at a time")
    parser.add_argument("--rounds", type=int, default=FULL.rounds, help="requests about each clip, one at a time")
    parser.add_argument("--out", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    plan = TINY if arguments.tiny else Plan(FULL.kinds, FULL.several, arguments.rounds)
    if arguments.kinds or arguments.several:
        several = {kind: numbers for kind, numbers in FULL.several.items() if kind in (arguments.several or ())}
        plan = Plan(arguments.kinds or FULL.kinds, several, arguments.rounds)
    results = asyncio.run(run(plan, "tiny" if arguments.tiny else "coarse-384"))
    missing = "" if importlib.util.find_spec("torchcodec") else "torchcodec is not installed. "
    text = table(results, f"32 frames. {missing}{describe(engine_versions(), _versions())}")
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def _versions() -> str:
    from importlib.metadata import version

    return f"PyAV {version('av')}, OpenCV {version('opencv-python-headless')}"


if __name__ == "__main__":
    main()
