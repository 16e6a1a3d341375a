"""Probes media in worker processes, so that a file which crashes its reader harms nothing else."""

import asyncio
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from server.media.facts import Facts, Limits, ProbeError
from server.media.threads import opened_off_loop

MESSAGE_BYTES = 64 * 1024
PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class Prober:
    """A pool of up to `num_workers` worker processes. Each probes one file at a time."""

    def __init__(self, *, limits: Limits, seconds: float, num_workers: int = min(4, os.cpu_count() or 1)) -> None:
        """Create the pool, whose processes start on demand. `seconds` limits a probe in time and in CPU time."""
        self._limits = limits
        self._seconds = seconds
        self._slots = asyncio.Semaphore(num_workers)
        self._idle: list[_Worker] = []

    async def probe(self, descriptor: int, *, kind: str, demuxer: str = "") -> Facts:
        """Return the facts about the medium in the open file `descriptor`.

        Raises ProbeError if the medium is not allowed or not readable, or if the probe crashes or times out.
        """
        job = {"kind": kind, "demuxer": demuxer, "limits": asdict(self._limits)}
        async with self._slots:
            worker = await self._worker()
            try:
                async with asyncio.timeout(self._seconds + 1):
                    reply = await worker.ask(job, descriptor)
            except TimeoutError:
                worker.close()
                raise ProbeError(f"the {kind} could not be read within {self._seconds:g} seconds") from None
            except (OSError, ValueError):
                worker.close()
                raise ProbeError(f"the {kind} could not be read: it broke its reader") from None
            except BaseException:
                worker.close()
                raise
            self._idle.append(worker)
        if "error" in reply:
            raise ProbeError(str(reply["error"]), code=reply["code"])
        return Facts(**reply)

    async def _worker(self) -> "_Worker":
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.close()
        return await opened_off_loop(_Worker, self._seconds)

    @property
    def process_ids(self) -> list[int]:
        """The process ids of the idle workers."""
        return [worker.process.pid for worker in self._idle]

    def close(self) -> None:
        """End the idle worker processes."""
        while self._idle:
            self._idle.pop().close()


class _Worker:
    """One worker process, and the gateway's end of its socket."""

    def __init__(self, seconds: float) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 - this interpreter, this module
                [sys.executable, "-m", "server.media.probe_worker", str(math.ceil(seconds))],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PYTHONPATH": str(PACKAGE_ROOT)},  # no other variables: the gateway's may hold secrets
                cwd="/",
                start_new_session=True,  # Ctrl-C reaches the gateway only: running requests still need their probes
            )

    async def ask(self, job: dict[str, Any], descriptor: int) -> dict[str, Any]:
        """Send a job to the worker and return its answer; raise OSError or ValueError if the worker has crashed."""
        loop = asyncio.get_running_loop()
        socket.send_fds(self._socket, [json.dumps(job).encode() + b"\n"], [descriptor])
        reply = b""
        while not reply.endswith(b"\n"):
            piece = await loop.sock_recv(self._socket, MESSAGE_BYTES)
            if not piece or len(reply) > MESSAGE_BYTES:
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
