"""Notices that requests wait too long for an engine, or for one that is gone, on connections that are still open.

One look a second at all waits takes the place of a timer that each piece of an answer would set anew.

An engine that is told to stop closes its port before its connections. An engine that stops may then never end its
streams. One that finishes its streams first goes on sending, or keeps its port open until it has.
"""

import asyncio
import socket
from collections.abc import Callable, Collection
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

LOOK_SECONDS = 1.0
SILENT_SECONDS = 1.5  # with the time between two looks, an engine that is gone is noticed within 2.5 seconds
CONNECT_SECONDS = 1.0


class Wait:
    """How long a request has waited for its engine, and how to end the wait."""

    def __init__(self) -> None:
        """Start without waiting."""
        self.since: float | None = None
        """When the wait began, in monotonic seconds. None while the request does not wait for the engine."""
        self.in_vain = False
        """Whether the engine is gone."""
        self._end: Callable[[], None] | None = None

    def begin(self, end: Callable[[], None]) -> None:
        """Begin to wait. `end` is called if the wait is too long, or if the engine is gone."""
        self._end = end
        self.since = monotonic()

    def over(self) -> None:
        """Stop waiting: the engine has sent something, or the request is over."""
        self.since = None

    def give_up(self, *, in_vain: bool) -> None:
        """End the wait: the engine is gone (`in_vain`), or it has been silent for too long."""
        self.since, self.in_vain = None, in_vain
        if self._end is not None:
            self._end()


async def watch(url: str, waits: Collection[Wait], *, longest_seconds: float, gone: Callable[[], None]) -> None:
    """Look forever after the requests that wait for the engine at `url`; call `gone` when it is.

    No wait lasts much longer than `longest_seconds`. While at least one of `waits` is long, the engine is asked for a
    connection. If it refuses, the long waits end.
    """
    while True:
        await asyncio.sleep(min(LOOK_SECONDS, longest_seconds / 4))
        for wait in _since(waits, longest_seconds):
            wait.give_up(in_vain=False)
        silent = _since(waits, SILENT_SECONDS)
        if silent and await refuses(url):
            gone()
            for wait, since in silent.items():
                if wait.since == since:
                    wait.give_up(in_vain=True)


def _since(waits: Collection[Wait], seconds: float) -> dict[Wait, float]:
    """Return the waits that have lasted for so long, and when each began."""
    latest = monotonic() - seconds
    return {wait: wait.since for wait in waits if wait.since is not None and wait.since <= latest}


async def refuses(url: str) -> bool:
    """Return whether every address of a server refuses connections. One that does not answer does not refuse."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError:
        return False
    outcomes = await asyncio.gather(*(_is_refused(family, address) for family, _, _, _, address in found))
    return bool(outcomes) and all(outcomes)


async def _is_refused(family: int, address: Any) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as knocking:
            knocking.setblocking(False)
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(knocking, address)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
