"""The HTTP connections to engines."""

from time import perf_counter
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import aiohttp

# vLLM's uvicorn closes idle connections after 5 s; one reused at that moment would fail a request for good.
KEEPALIVE_SECONDS = 3.0


class Connecting:
    """Passed with a request as `trace_request_ctx`, it notes when there was a connection."""

    finished: float | None = None


class EngineSession:
    """Connects from when its block is entered until it is left. The queue bounds the number of connections."""

    def __init__(self, *, connect_seconds: float, read_seconds: float, api_key: str | None = None) -> None:
        """Send engines an API key if they want one; `read_seconds` bounds their silence."""
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds, sock_read=read_seconds)
        self._authorization = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._http: aiohttp.ClientSession | None = None

    @property
    def http(self) -> aiohttp.ClientSession:
        """The session."""
        if self._http is None:
            raise RuntimeError("the engines' session is not open: the application's lifespan has not begun")
        return self._http

    async def __aenter__(self) -> Self:
        """Open the session; nothing is connected yet."""
        timing = aiohttp.TraceConfig()
        timing.on_connection_create_end.append(_note_connected)
        timing.on_connection_reuseconn.append(_note_connected)
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"accept-encoding": "identity", "user-agent": "aot-gateway", **self._authorization},
            trace_configs=[timing],
        )
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close all connections."""
        await self.http.close()


async def _note_connected(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: Any) -> None:
    if isinstance(context.trace_request_ctx, Connecting):
        context.trace_request_ctx.finished = perf_counter()
