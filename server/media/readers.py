"""Reads media in processes of their own: a file that breaks its reader breaks nothing else."""

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from server.media.threads import opened_off_loop
from server.reader.facts import Facts, Limits, ReadError
from server.reader.frames_file import FramesHeader
from server.reader.wanted import Reading, Wanted

MESSAGE_BYTES = 64 * 1024
REPLY_BYTES = 2**21  # which frames were read, a hundred thousand at most
START_SECONDS = 60  # it takes a fraction of one, but for a machine that is very busy
MAX_THREADS = 4  # for one video: each keeps frames in memory, and what the next one adds becomes less
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


class Reader:
    """Keeps up to `num_workers` worker processes, each for one file at a time."""

    def __init__(
        self,
        *,
        limits: Limits,
        seconds: float,
        num_workers: int = os.cpu_count() or 1,
        max_frames_bytes: int = GIB,
    ) -> None:
        """Start no process until there is a file to read.

        There are never more threads that decode than `num_workers`. A file that is read alone may have several.
        `seconds` bounds each file's reading, in time and in each thread's CPU time; `max_frames_bytes` what may be
        written of it.
        """
        self._limits = limits
        self._seconds = seconds
        self._max_frames_bytes = max_frames_bytes
        self._slots = asyncio.Semaphore(num_workers)
        self._num_workers = num_workers
        self._num_busy = 0
        self._idle: list[_Worker] = []

    async def examine(self, descriptor: int, *, kind: str, demuxer: str = "") -> Facts:
        """Return the facts about the medium in the file `descriptor`; raise ReadError if there are none to be had."""
        return Facts(**await self._ask([descriptor], kind=kind, demuxer=demuxer, wanted=None))

    async def read(self, descriptor: int, *, demuxer: str, wanted: Wanted, into: int) -> Reading:
        """Write sampled frames of the video in the file `descriptor` into the empty file `into`, as a frames file.

        Raises ReadError if it can't be read; then what is in `into` is no frames file.
        """
        if wanted.max_bytes > self._max_frames_bytes:
            raise ValueError(f"max_bytes must be at most {self._max_frames_bytes}, got {wanted.max_bytes}")
        reply = await self._ask([descriptor, into], kind="video", demuxer=demuxer, wanted=wanted)
        return Reading(Facts(**reply["facts"]), FramesHeader(**reply["header"]))

    async def _ask(
        self, descriptors: Sequence[int], *, kind: str, demuxer: str, wanted: Wanted | None
    ) -> dict[str, Any]:
        job: dict[str, Any] = {
            "kind": kind,
            "demuxer": demuxer,
            "limits": asdict(self._limits),
            "wanted": None if wanted is None else asdict(wanted),
        }
        async with self._slots:
            with self._threads() as threads:
                reply = await self._answer({**job, "threads": threads}, descriptors)
        if "error" in reply:
            raise ReadError(str(reply["error"]), code=reply["code"])
        return reply

    async def _answer(self, job: dict[str, Any], descriptors: Sequence[int]) -> dict[str, Any]:
        kind = job["kind"]
        try:
            worker = await self._worker()
        except OSError as exc:
            raise ReadError(f"the {kind} could not be read: its reader did not start") from exc
        try:
            async with asyncio.timeout(self._seconds + 1):
                reply = await worker.ask(job, descriptors)
        except TimeoutError:
            worker.close()
            raise self._too_slow(kind) from None
        except (OSError, ValueError):
            worker.close()
            if worker.process.returncode == -signal.SIGXCPU:
                raise self._too_slow(kind) from None
            raise ReadError(f"the {kind} could not be read: it broke its reader") from None
        except BaseException:
            worker.close()
            raise
        self._idle.append(worker)
        return reply

    def _too_slow(self, kind: str) -> ReadError:
        return ReadError(f"the {kind} could not be read within {self._seconds:g} seconds")

    async def _worker(self) -> "_Worker":
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.close()
        return await opened_off_loop(_Worker, self._seconds, self._max_frames_bytes)

    @contextmanager
    def _threads(self) -> Iterator[int]:
        """Give how many threads a file is read with: the fewer files are being read, the more."""
        self._num_busy += 1
        try:
            yield min(self._num_workers // self._num_busy, MAX_THREADS)
        finally:
            self._num_busy -= 1

    @property
    def process_ids(self) -> list[int]:
        """The idle workers' process ids."""
        return [worker.process.pid for worker in self._idle]

    def close(self) -> None:
        """End the worker processes."""
        while self._idle:
            self._idle.pop().close()


class _Worker:
    """One worker process and the gateway's end of its socket."""

    def __init__(self, seconds: float, max_frames_bytes: int) -> None:
        """Start the process, and wait until it is ready: its start doesn't count as the time of a file."""
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 - this interpreter, this module
                [sys.executable, "-m", "server.reader.worker", str(math.ceil(seconds)), str(max_frames_bytes)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Nothing of the gateway's environment. numpy's algebra, which isn't used, would reserve memory a core.
                env={"PYTHONPATH": str(PACKAGE_ROOT), "OPENBLAS_NUM_THREADS": "1"},
                cwd="/",
                start_new_session=True,  # a Ctrl-C at the gateway must not break what requests may finish
            )
        try:
            self._socket.settimeout(START_SECONDS)
            if not self._socket.recv(1):
                raise ConnectionResetError
        except OSError:
            self.close()
            raise
        self._socket.setblocking(False)

    async def ask(self, job: dict[str, Any], descriptors: Sequence[int]) -> dict[str, Any]:
        """Return the worker's answer; raise OSError or ValueError if it has none."""
        loop = asyncio.get_running_loop()
        socket.send_fds(self._socket, [json.dumps(job).encode() + b"\n"], list(descriptors))
        reply = b""
        while not reply.endswith(b"\n"):
            piece = await loop.sock_recv(self._socket, MESSAGE_BYTES)
            if not piece or len(reply) > REPLY_BYTES:
                raise ConnectionResetError
            reply += piece
        answer = json.loads(reply)
        if not isinstance(answer, dict):
            raise ValueError("not an answer")
        return answer

    def close(self) -> None:
        """Kill the process and reap it."""
        self._socket.close()
        self.process.kill()
        self.process.wait()
