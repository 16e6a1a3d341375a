"""One exchange with one engine: the request out, the headers in, and the body to whoever reads it."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import aiohttp

from server.engines import Engine, EnginePool
from server.errors import EngineFailed, EngineTimeout, EngineUnavailable, GatewayError, engine_error
from server.metrics import Metrics
from server.record import RequestRecord
from server.savings import Savings

logger = logging.getLogger(__name__)

PIECE_BYTES = 256 * 1024
WHOLE_BODY_BYTES = 2**20  # above, aiohttp wants bodies in pieces, so that writing one does not hold up the loop
ERROR_BODY_BYTES = 64 * 1024
# vLLM's uvicorn closes idle connections after 5 s; one reused at that moment would fail a request for good.
KEEPALIVE_SECONDS = 3.0


def new_session(*, connect_seconds: float, read_seconds: float, api_key: str | None = None) -> aiohttp.ClientSession:
    """Return a session for talking to engines, which may want an API key. The queue bounds its connections."""
    authorization = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    timing = aiohttp.TraceConfig()
    timing.on_connection_create_end.append(_note_connected)
    timing.on_connection_reuseconn.append(_note_connected)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds, sock_read=read_seconds),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"accept-encoding": "identity", "user-agent": "aot-gateway", **authorization},
        trace_configs=[timing],
    )


async def _note_connected(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: Any) -> None:
    if isinstance(context.trace_request_ctx, _Connecting):
        context.trace_request_ctx.finished = perf_counter()


class _Connecting:
    finished: float | None = None


class Exchange:
    """An engine's answer, headers read. Errors while reading the body are raised as GatewayErrors."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        """Wrap a response of status 200."""
        self._response = response
        self.savings = Savings.from_headers(response.headers)
        self.is_stream = response.content_type == "text/event-stream"
        self.content_type = response.headers.get("content-type", "application/json")

    async def read(self) -> bytes:
        """Return the whole body."""
        try:
            return await self._response.read()
        except (aiohttp.ClientError, OSError) as exc:
            raise _broken(exc) from exc

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives."""
        try:
            async for piece in self._response.content.iter_any():
                yield piece
        except (aiohttp.ClientError, OSError) as exc:
            raise _broken(exc) from exc


class Upstream:
    """Sends requests to the pool's engines."""

    def __init__(self, *, session: aiohttp.ClientSession, pool: EnginePool, metrics: Metrics) -> None:
        """Use `session` for the exchanges."""
        self._session = session
        self._pool = pool
        self._metrics = metrics

    @asynccontextmanager
    async def exchange(self, model: str, body: bytes, record: RequestRecord) -> AsyncIterator[Exchange]:
        """Post a chat request to an engine and give its answer; leaving the block early makes the engine stop.

        An engine that can't be connected to has not been sent anything: then, once, another one is tried.
        Raises EngineUnavailable, EngineFailed, EngineTimeout, or the engine's own refusal.
        """
        engine = self._pool.choose(model, key=record.media_key)
        try:
            response = await self._send(engine, body, record)
        except EngineUnavailable:
            engine = self._pool.choose(model, key=record.media_key, without=(engine,))
            self._metrics.upstream_retries.labels("connect").inc()
            response = await self._send(engine, body, record)
        del body  # may be megabytes, and the answer may take minutes
        try:
            if response.status != 200:
                raise await self._refusal(engine, response, record)
            exchange = Exchange(response)
            if record.has_video:
                _note_savings(engine, exchange.savings, record)
            yield exchange
        finally:
            engine.inflight -= 1
            if response.content.at_eof():
                response.release()
            else:
                response.close()  # the engine sees the connection drop and aborts the request

    async def _send(self, engine: Engine, body: bytes, record: RequestRecord) -> aiohttp.ClientResponse:
        connecting = _Connecting()
        begin = perf_counter()
        engine.inflight += 1
        try:
            response = await self._session.post(
                f"{engine.url}/v1/chat/completions",
                data=body if len(body) <= WHOLE_BODY_BYTES else _in_pieces(body),
                headers={
                    "content-type": "application/json",
                    "content-length": str(len(body)),
                    "x-request-id": record.request_id,
                },
                allow_redirects=False,
                trace_request_ctx=connecting,
            )
        except BaseException as exc:
            engine.inflight -= 1
            if isinstance(exc, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
                self._pool.mark_unreachable(engine)
                raise EngineUnavailable("no engine is available, try again later") from exc
            if isinstance(exc, aiohttp.ClientError | OSError):
                raise _broken(exc) from exc
            raise
        now = perf_counter()
        connected = connecting.finished or begin
        record.add("connect", connected - begin)
        record.engine_seconds += now - connected
        record.headers_from_engine = now
        return response

    async def _refusal(self, engine: Engine, response: aiohttp.ClientResponse, record: RequestRecord) -> GatewayError:
        try:
            body = await response.content.read(ERROR_BODY_BYTES)
        except (aiohttp.ClientError, OSError):
            body = b""
        logger.warning(
            "engine answered with an error",
            extra={"request_id": record.request_id, "engine": engine.name, "engine_status": response.status},
        )
        return engine_error(response.status, body)


def _note_savings(engine: Engine, savings: Savings | None, record: RequestRecord) -> None:
    """Say so once when an engine stops reporting what its videos cost: it then serves them whole, or does not tell."""
    if savings is None and engine.reports_savings:
        logger.warning(
            "engine reports no video tokens: it runs without --video-pruning-rate, or its VLLM_PLUGINS does not name "
            "aot; retentions may have no effect there",
            extra={"request_id": record.request_id, "engine": engine.name},
        )
    engine.reports_savings = savings is not None


def _broken(exc: Exception) -> GatewayError:
    if isinstance(exc, TimeoutError):
        return EngineTimeout("the engine did not answer in time")
    return EngineFailed("the engine broke off while working on this request")


async def _in_pieces(body: bytes) -> AsyncIterator[memoryview]:
    view = memoryview(body)
    for begin in range(0, len(view), PIECE_BYTES):
        yield view[begin : begin + PIECE_BYTES]
