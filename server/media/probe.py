"""What a video holds, found out in a process of its own: a file that breaks the demuxer breaks nothing else.

Run as a program, this module is that process: it reads jobs from the socket on its standard input, each a line of
JSON with the video's file descriptor attached, and answers each with a line of JSON.
"""

import asyncio
import contextlib
import json
import math
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MEMORY_BYTES = 2 * 2**30  # address space, of which libav's libraries take a third
REPLY_BYTES = 64 * 1024
PACKAGE_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Probe:
    """A video's facts. Duration and frames come from its packets, where the header claims less."""

    container: str
    codec: str
    width: int
    height: int
    duration_seconds: float
    frames: int
    fps: float


class ProbeError(Exception):
    """The video can't be read, or reading it broke or outran its limits. The text is fit for a client."""


@contextmanager
def in_memory(data: bytes) -> Iterator[int]:
    """Give a file descriptor of an unnamed file that holds `data`."""
    with contextlib.ExitStack() as stack:
        if hasattr(os, "memfd_create"):
            file = stack.enter_context(os.fdopen(os.memfd_create("aot-media"), "w+b"))
        else:
            file = stack.enter_context(tempfile.TemporaryFile())
        file.write(data)
        file.seek(0)  # the descriptor carries its position along
        yield file.fileno()


class Prober:
    """Keeps up to `num_workers` worker processes, each for one video at a time."""

    def __init__(self, *, seconds: float, num_workers: int = min(4, os.cpu_count() or 1)) -> None:
        """Start no process until there is a video to probe; `seconds` bounds each video, in time and in CPU time."""
        self._seconds = seconds
        self._slots = asyncio.Semaphore(num_workers)
        self._idle: list[_Worker] = []

    async def probe(self, descriptor: int, demuxer: str) -> Probe:
        """Return the facts about the video in the file `descriptor`; raise ProbeError if there are none to be had."""
        async with self._slots:
            worker = await self._worker()
            try:
                async with asyncio.timeout(self._seconds + 1):
                    reply = await worker.ask({"demuxer": demuxer}, descriptor)
            except TimeoutError:
                await worker.kill()
                raise ProbeError(f"the video could not be read within {self._seconds:g} seconds") from None
            except (OSError, ValueError):
                await worker.kill()
                raise ProbeError("the video could not be read: it broke its reader") from None
            except BaseException:
                await worker.kill()
                raise
            self._idle.append(worker)
        if "error" in reply:
            raise ProbeError(str(reply["error"]))
        return Probe(**reply)

    async def _worker(self) -> "_Worker":
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                return worker
            await worker.kill()
        return await asyncio.to_thread(_Worker, self._seconds)

    @property
    def process_ids(self) -> list[int]:
        """The idle workers' process ids."""
        return [worker.process.pid for worker in self._idle]

    async def close(self) -> None:
        """End the worker processes."""
        while self._idle:
            await self._idle.pop().kill()


class _Worker:
    """One worker process and the gateway's end of its socket."""

    def __init__(self, seconds: float) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 - this interpreter, this module
                [sys.executable, "-m", "server.media.probe", str(math.ceil(seconds))],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PYTHONPATH": str(PACKAGE_ROOT)},  # nothing of the gateway's environment
                cwd="/",
                start_new_session=True,  # a Ctrl-C at the gateway must not break probes of requests that may finish
            )

    async def ask(self, job: dict[str, str], descriptor: int) -> dict[str, Any]:
        """Return the worker's answer; raise OSError or ValueError if it has none."""
        loop = asyncio.get_running_loop()
        socket.send_fds(self._socket, [json.dumps(job).encode() + b"\n"], [descriptor])
        reply = b""
        while not reply.endswith(b"\n"):
            piece = await loop.sock_recv(self._socket, REPLY_BYTES)
            if not piece or len(reply) > REPLY_BYTES:
                raise ConnectionResetError
            reply += piece
        answer = json.loads(reply)
        if not isinstance(answer, dict):
            raise ValueError("not an answer")
        return answer

    async def kill(self) -> None:
        """End the process and reap it."""
        self._socket.close()
        self.process.kill()
        await asyncio.to_thread(self.process.wait)


def read_facts(descriptor: int, demuxer: str) -> Probe:
    """Return the facts about the video in an open file, decoding one frame and counting packets of the rest.

    The demuxer is given, never guessed: no playlist or script that names other files is ever opened.
    Raises ProbeError if it is not a video, and av.FFmpegError if it is a broken one.
    """
    import av  # the gateway's own process never loads the decoders

    with os.fdopen(descriptor, "rb") as file, av.open(file, "r", format=demuxer) as container:
        if not container.streams.video:
            raise ProbeError("the file holds no video stream")
        stream = container.streams.video[0]
        stream.thread_count = 1
        decoded, frames, begin, end = False, 0, math.inf, -math.inf
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if packet.is_corrupt:
                raise ProbeError("the video is truncated")
            frames += 1
            time = packet.pts if packet.pts is not None else packet.dts
            if time is not None:
                begin, end = min(begin, time), max(end, time + (packet.duration or 0))
            decoded = decoded or bool(stream.decode(packet))
        if not decoded and not stream.decode(None):
            raise ProbeError("the video holds no frame that can be decoded")
        context = stream.codec_context
        measured = float((end - begin) * stream.time_base) if end > begin and stream.time_base else 0.0
        claimed = [
            float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0,
            container.duration / 1e6 if container.duration else 0.0,
        ]
        duration = max(measured, *claimed)
        return Probe(
            container=container.format.name,
            codec=context.name,
            width=context.width,
            height=context.height,
            duration_seconds=duration,
            frames=frames,
            fps=frames / measured if measured else 0.0,
        )


def _answer(line: bytes, descriptor: int) -> dict[str, Any]:
    import av

    try:
        facts = asdict(read_facts(descriptor, json.loads(line)["demuxer"]))
    except ProbeError as exc:
        return {"error": str(exc)}
    except av.FFmpegError:
        return {"error": "the video is truncated or broken"}
    except (MemoryError, OverflowError, ValueError):
        return {"error": "the video could not be read within the limits"}
    return facts


def main(cpu_seconds: int) -> None:
    """Answer jobs until the gateway is gone."""
    import av

    av.logging.set_level(None)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=0) as jobs:
        while True:
            line, descriptors, _, _ = socket.recv_fds(jobs, REPLY_BYTES, 1)
            if not line or not descriptors:
                return
            usage = resource.getrusage(resource.RUSAGE_SELF)
            spent = math.ceil(usage.ru_utime + usage.ru_stime)
            resource.setrlimit(resource.RLIMIT_CPU, (spent + cpu_seconds, resource.RLIM_INFINITY))
            jobs.sendall(json.dumps(_answer(line, descriptors[0])).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
