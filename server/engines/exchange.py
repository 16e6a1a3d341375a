"""One exchange with one engine: the request out, the headers in, and the body to whoever reads it."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter

import aiohttp

from server.engines.pool import Attempt, Engine, EnginePool
from server.engines.profile import VideoRules
from server.engines.savings import Savings
from server.engines.session import Connecting, EngineSession
from server.errors import EngineFailed, EngineTimeout, EngineUnavailable, GatewayError, engine_error
from server.observe.metrics import Metrics
from server.observe.record import RequestRecord

logger = logging.getLogger(__name__)

Body = Sequence[bytes | memoryview]
"""A request's body, in pieces of any size."""

PIECE_BYTES = 256 * 1024
WHOLE_BODY_BYTES = 2**20  # above, aiohttp wants bodies in pieces, so that writing one does not hold up the loop
ERROR_BODY_BYTES = 64 * 1024
ERROR_BODY_SECONDS = 5.0
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class Call:
    """A request to an engine, but for its body."""

    path: str
    model: str
    """The engine's name for it."""
    is_stream: bool
    has_video: bool
    key: str | None = None
    """Calls with the same key go to the same engine."""
    rules: VideoRules | None = None
    """The rules by which its videos were made into frames; None if they are handed over as they are."""
    headers: Mapping[str, str] = field(default_factory=dict)


class Exchange:
    """An engine's answer, headers read. Errors while reading the body are raised as GatewayErrors."""

    def __init__(self, response: aiohttp.ClientResponse, attempt: Attempt) -> None:
        """Wrap a response of status 200; what becomes of its body is the attempt's outcome."""
        self._response = response
        self._attempt = attempt
        self.savings = Savings.from_headers(response.headers)
        self.is_stream = response.content_type == "text/event-stream"
        self.content_type = response.headers.get("content-type", "application/json")

    async def read(self) -> bytes:
        """Return the whole body."""
        return b"".join([piece async for piece in self.pieces()])

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives. Its first byte, not its headers, shows that the engine works."""
        begun = False
        try:
            async for piece in self._response.content.iter_any():
                if not begun:
                    begun = True
                    self._attempt.succeeded()
                yield piece
        except (aiohttp.ClientError, OSError) as exc:
            self._attempt.failed()
            raise _broken(exc) from exc


class Exchanges:
    """Sends requests to the pool's engines."""

    def __init__(self, *, session: EngineSession, pool: EnginePool, metrics: Metrics, headers_seconds: float) -> None:
        """Use `session` for the exchanges, and wait at most `headers_seconds` for a stream to begin."""
        self._session = session
        self._pool = pool
        self._metrics = metrics
        self._headers_seconds = headers_seconds

    @asynccontextmanager
    async def exchange(self, call: Call, body: Body, record: RequestRecord) -> AsyncIterator[Exchange]:
        """Post a request to an engine and give its answer; leaving the block early makes the engine stop.

        An engine that can't be connected to has been sent nothing, and one that answers 503 has spent nothing: then
        another one is tried, as long as there are any and at most MAX_ATTEMPTS in all. What an engine broke off or was
        silent about is never sent again: it may have cost a prefill, or have been the cause.
        Raises EngineUnavailable, EngineFailed, EngineTimeout, or the engine's own refusal.
        """
        async with AsyncExitStack() as held:
            attempt, response = await self._answered(call, body, record, held)
            del body  # may be megabytes, and the answer may take minutes
            exchange = Exchange(response, attempt)
            if call.has_video:
                _note_savings(attempt.engine, exchange.savings, record.request_id)
            yield exchange

    async def _answered(
        self, call: Call, body: Body, record: RequestRecord, held: AsyncExitStack
    ) -> tuple[Attempt, aiohttp.ClientResponse]:
        """Return the answer of the first engine that takes the request, and put on `held` what to let go after it."""
        tried: list[Engine] = []
        reason, refusal = "", GatewayError("")
        while len(tried) < MAX_ATTEMPTS:
            try:
                attempt = held.enter_context(
                    self._pool.attempt(call.model, key=call.key, rules=call.rules, without=tried)
                )
            except EngineUnavailable:
                if not tried:
                    raise
                break
            if tried:
                self._metrics.upstream_retries.labels(reason).inc()
            tried.append(attempt.engine)
            traced = held.enter_context(record.trace.engine(attempt.engine.name)) if record.trace else {}
            try:
                response = await self._send(call, attempt, body, traced, record)
            except EngineUnavailable as exc:
                reason, refusal = "connect", exc
            else:
                held.callback(_let_go, response)
                if response.status == 200:
                    return attempt, response
                refusal = await self._refusal(attempt, response, record.request_id)
                if response.status != 503:
                    raise refusal
                reason = "refused"
            await held.aclose()
        raise refusal

    async def _send(
        self, call: Call, attempt: Attempt, body: Body, traced: Mapping[str, str], record: RequestRecord
    ) -> aiohttp.ClientResponse:
        connecting = Connecting()
        size_bytes = sum(map(len, body))
        begin = perf_counter()
        # Without a stream the headers come with the end of the answer: only the limit on silence can hold for them.
        limit = self._headers_seconds if call.is_stream else None
        try:
            async with asyncio.timeout(limit):
                response = await self._session.http.post(
                    attempt.engine.url + call.path,
                    data=b"".join(body) if size_bytes <= WHOLE_BODY_BYTES else _in_pieces(body),
                    headers={
                        "content-type": "application/json",
                        "content-length": str(size_bytes),
                        "x-request-id": record.request_id,
                        **call.headers,
                        **traced,
                    },
                    allow_redirects=False,
                    trace_request_ctx=connecting,
                )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
            attempt.unreachable()
            raise EngineUnavailable("no engine is available, try again later") from exc
        except (aiohttp.ClientError, OSError) as exc:
            attempt.failed()
            raise _broken(exc) from exc
        record.engine_answered(begin=begin, connected=connecting.finished or begin, answered=perf_counter())
        return response

    async def _refusal(self, attempt: Attempt, response: aiohttp.ClientResponse, request_id: str) -> GatewayError:
        try:
            async with asyncio.timeout(ERROR_BODY_SECONDS):
                body = await response.content.read(ERROR_BODY_BYTES)
        except (aiohttp.ClientError, OSError):
            body = b""
        if response.status >= 500:
            attempt.failed()
        else:
            attempt.succeeded()
        logger.warning(
            "engine answered with an error",
            extra={
                "request_id": request_id,
                "engine": attempt.engine.name,
                "engine_status": response.status,
            },
        )
        return engine_error(response.status, body)


def _let_go(response: aiohttp.ClientResponse) -> None:
    if response.content.at_eof():
        response.release()
    else:
        response.close()  # the engine sees the connection drop and aborts the request


def _note_savings(engine: Engine, savings: Savings | None, request_id: str) -> None:
    """Say so once when an engine stops reporting what its videos cost: it then serves them whole, or does not tell."""
    if savings is None and engine.reports_savings:
        logger.warning(
            "engine reports no video tokens: it runs without --video-pruning-rate, or its VLLM_PLUGINS does not name "
            "aot; retentions may have no effect there",
            extra={"request_id": request_id, "engine": engine.name},
        )
    engine.reports_savings = savings is not None


def _broken(exc: Exception) -> GatewayError:
    if isinstance(exc, TimeoutError):
        return EngineTimeout("the engine did not answer in time")
    return EngineFailed("the engine broke off while working on this request")


async def _in_pieces(body: Body) -> AsyncIterator[memoryview]:
    for view in (memoryview(piece) for piece in body):
        for begin in range(0, len(view), PIECE_BYTES):
            yield view[begin : begin + PIECE_BYTES]
