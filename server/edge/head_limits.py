"""uvicorn's HTTP protocol with limits on a request's head: everything that is read before its key is checked.

The size limit also holds for trailers and for every other part of a request that is not its body.
"""

import asyncio
from http import HTTPStatus
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.edge.joined import JoinedHeads

MAX_HEAD_BYTES = 64 * 1024  # for the request line with the headers, and for trailers and chunk headers


class BoundedHTTP(HttpToolsProtocol):
    """An HTTP protocol that answers 408 or 431 and closes the connection if a request's head exceeds a limit."""

    head_seconds: ClassVar[float]
    """The longest time in which the head of a request may arrive."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Start with no bytes counted."""
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_bytes = 0
        self._unfinished_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the first request's head."""
        super().connection_made(JoinedHeads(transport, self.loop))
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._head_has_come()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse `data`, and refuse a head that is too large."""
        self._unfinished_bytes += len(data)  # reset as soon as the parser reports a finished element
        super().data_received(data)
        if self._in_head and self._head_timer is None:
            self._await_head()
        if max(self._head_bytes, self._unfinished_bytes) > MAX_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        """Start to count a request's head."""
        super().on_message_begin()
        self._head_bytes = 0
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        """Count the URL as part of the head."""
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header as part of the head."""
        self._count(name + value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop the timer, if the head took more than one piece: it is complete."""
        self._head_has_come()
        self._unfinished_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Note that the latest data belong to the body, to which no limit applies here."""
        self._unfinished_bytes = 0
        super().on_body(body)

    def _count(self, part: bytes) -> None:
        self._head_bytes += len(part)
        self._unfinished_bytes = 0

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._refuse, HTTPStatus.REQUEST_TIMEOUT)

    def _head_has_come(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: HTTPStatus) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            line = f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            self.transport.write(f"{line}content-length: 0\r\nconnection: close\r\n\r\n".encode())
        self.transport.close()


def bounded_http(*, head_seconds: float) -> type[BoundedHTTP]:
    """Return a protocol that waits `head_seconds` for a request's head and accepts at most MAX_HEAD_BYTES of it."""
    return type("BoundedHTTP", (BoundedHTTP,), {"head_seconds": head_seconds})
