"""Servers in processes of their own, for the time of a measurement."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(command: list[str], *, health: str, environment: dict[str, str] | None = None) -> Iterator[int]:
    """Run a server, give its process id once `health` answers, and end it."""
    with tempfile.TemporaryFile("w+") as log:
        started = subprocess.Popen(
            command, env={**os.environ, **(environment or {})}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            for _ in range(1500):
                try:
                    if httpx.get(health, timeout=2).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if started.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{command} ended:\n{log.read()[-3000:]}")
                time.sleep(0.2)
            else:
                sys.exit(f"{command} was not up in time")
            yield started.pid
        finally:
            started.terminate()
            try:
                started.wait(10)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()
