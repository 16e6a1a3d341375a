"""The HTTP connections to engines."""

import socket
from contextvars import ContextVar
from time import perf_counter
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp.connector import Connection
from aiohttp.tracing import Trace

# Below the 5 s after which vLLM's uvicorn closes idle connections. A request on a connection that the engine closes at
# that moment fails, and may not be sent again.
KEEPALIVE_SECONDS = 3.0
# A connection whose other end has vanished without a word breaks after this many seconds, and a probe a second.
LOST_AFTER_SECONDS = 4


_connected: ContextVar[float] = ContextVar("connected")


def connected_at() -> float:
    """Return when the connection of this task's latest request was open, in perf_counter seconds.

    Raises LookupError if the task has sent no request.
    """
    return _connected.get()


class _Connector(aiohttp.TCPConnector):
    """Notes when a request has got its connection. aiohttp's own tracing would make calls for each of its steps."""

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - as in the base class
    ) -> Connection:
        """Return a connection for a request: one that is kept, or a new one."""
        connection = await super().connect(req, traces, timeout)
        _connected.set(perf_counter())
        return connection


class EngineSession:
    """The HTTP session with all engines, open while its `async with` block lasts.

    It sets no limit on connections, because the admission queue already limits the requests in flight.
    """

    def __init__(self, *, connect_seconds: float, api_key: str | None = None) -> None:
        """Set the time-out for a connection. Who sends a request limits the rest of its time.

        `api_key` is sent to all engines; None sends no key.
        """
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds)
        self._authorization = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._http: aiohttp.ClientSession | None = None

    @property
    def http(self) -> aiohttp.ClientSession:
        """The open session; raises RuntimeError outside the block."""
        if self._http is None:
            raise RuntimeError("the engines' session is not open: the application's lifespan has not begun")
        return self._http

    async def __aenter__(self) -> Self:
        """Open the session. Connections are opened on demand."""
        self._http = aiohttp.ClientSession(
            connector=_Connector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS, socket_factory=_probed_socket),
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"accept-encoding": "identity", "user-agent": "aot-gateway", **self._authorization},
        )
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close all connections."""
        await self.http.close()


def _probed_socket(found: aiohttp.AddrInfoType) -> socket.socket:
    """Return a socket on which the kernel probes whether the other end still exists while nothing is sent."""
    family, kind, protocol, _, _ = found
    probed = socket.socket(family, kind, protocol)
    probed.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("KEEPIDLE", 1), ("KEEPINTVL", 1), ("KEEPCNT", LOST_AFTER_SECONDS - 1)):
        if hasattr(socket, f"TCP_{name}"):  # some systems lack one of them
            probed.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
    return probed
