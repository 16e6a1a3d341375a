"""Sends a request to an engine and gives its answer: headers first, then the body as it arrives."""

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import aiohttp

from server.engines.pool import Attempt, Engine, EnginePool
from server.engines.profile import VideoRules
from server.engines.savings import Savings
from server.engines.session import EngineSession, connected_at
from server.engines.streams import EventStream, is_aborted
from server.errors import (
    EngineFailed,
    EngineMisconfigured,
    EngineTimeout,
    EngineUnavailable,
    GatewayError,
    engine_error,
)
from server.observe.metrics import Metrics
from server.observe.record import RequestRecord

logger = logging.getLogger(__name__)

Body = Sequence[bytes | memoryview]
"""The body of a request, in pieces of any size."""

PIECE_BYTES = 256 * 1024
WHOLE_BODY_BYTES = 2**20  # aiohttp wants larger bodies in pieces, so that writing one does not block the event loop
ERROR_BODY_BYTES = 64 * 1024
ERROR_BODY_SECONDS = 5.0
LONGEST_ANSWER_BYTES = 64 * 2**20
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class Call:
    """A request to an engine, without its body."""

    path: str
    model: str
    """The engine's name for the model."""
    is_stream: bool
    has_video: bool
    key: str | None = None
    """The affinity key: calls with the same key go to the same engine, as long as its load allows."""
    rules: VideoRules | None = None
    """The rules by which frames were sampled from its videos. None if it holds the videos themselves."""
    headers: Mapping[str, str] = field(default_factory=dict)
    sender: str = ""
    """Who asks: errors that only one sender meets do not count against an engine."""
    has_media: bool = False
    """Whether it holds videos, images or audio."""
    reader: Callable[[Savings | None], EventStream] | None = None
    """Returns a parser for the engine's stream. None if it can't be a stream."""


@dataclass(frozen=True)
class _Asking:
    """A request to an engine, with all that is sent and noted along with it."""

    call: Call
    body: Body = field(repr=False)
    content: bytes
    """What tells the request from others of the same sender."""
    traced: Mapping[str, str]
    record: RequestRecord


class Refused(Exception):
    """The engine answered with an error, before it generated anything."""

    def __init__(self, error: GatewayError, *, status: int | None) -> None:
        """Keep the error for the client, and the engine's status; None if it sent its error in a stream."""
        super().__init__(error.message)
        self.error = error
        self.status = status


class Exchange:
    """An engine's answer, whose headers have been read. Errors while reading its body are raised as GatewayErrors."""

    def __init__(self, response: aiohttp.ClientResponse, attempt: Attempt, *, call: Call, content: bytes) -> None:
        """Wrap a response with status 200. Whether its body arrives decides the outcome of `attempt`.

        `content` identifies the request among those of the same sender.
        """
        self._response = response
        self._attempt = attempt
        self._call = call
        self._content = content
        self._ahead: deque[bytes] = deque()
        self._has_begun = False
        self.savings = Savings.from_headers(response.headers)
        self.is_stream = response.content_type == "text/event-stream"
        self.content_type = response.headers.get("content-type", "application/json")

    async def read(self) -> bytes:
        """Return the whole body.

        Raises EngineFailed if it is larger than LONGEST_ANSWER_BYTES, incomplete, or of a request that was aborted.
        """
        pieces, size_bytes = [], 0
        while piece := await self.next_piece():
            pieces.append(piece)
            size_bytes += len(piece)
            if size_bytes > LONGEST_ANSWER_BYTES:
                raise EngineFailed(f"the engine's answer is larger than {LONGEST_ANSWER_BYTES} bytes")
        body = b"".join(pieces)
        if is_aborted(body) or not (self._says_its_end or _is_json(body)):
            self._attempt.failed()
            raise EngineFailed("the engine broke off while working on this request")
        return body

    @property
    def _says_its_end(self) -> bool:
        """Whether the body says where it ends. Otherwise it ends where the connection does, wherever that is."""
        return "content-length" in self._response.headers or "transfer-encoding" in self._response.headers

    async def begin(self) -> None:
        """Read a stream until it holds output, and keep what was read for `next_piece`.

        Raises Refused if the stream holds an error and no output: nothing was generated.
        """
        if self._call.reader is None:
            return
        stream, read = self._call.reader(None), deque[bytes]()
        while piece := await self.next_piece():
            read.append(piece)
            stream.feed(piece)
            if stream.failure is not None and not stream.tokens:
                raise Refused(stream.failure, status=500 if isinstance(stream.failure, EngineFailed) else None)
            if stream.tokens or stream.done or stream.failure is not None:
                break
        self._ahead = read

    async def next_piece(self) -> bytes:
        """Return the next piece of the body as soon as it arrives, empty at the end.

        Whoever reads it says with `complete` or `broke_off` what has come of it.
        """
        if self._ahead:
            return self._ahead.popleft()
        wait = self._attempt.wait
        wait.begin(self._give_up)
        try:
            piece = await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as exc:
            self._attempt.failed()
            raise _broken(exc) from exc
        finally:
            wait.over()
        if piece and not self._has_begun:
            self._has_begun = True
            self._attempt.answer_begins()
        return piece

    def _give_up(self) -> None:
        gone = self._attempt.wait.in_vain
        self._response.content.set_exception(
            aiohttp.ServerDisconnectedError() if gone else aiohttp.SocketTimeoutError()
        )

    def prefill_seconds(self, usage: Mapping[str, Any]) -> tuple[float, float] | None:
        """Return the time of the prefill without and with the reduction; `usage` is the engine's.

        None without videos, or if the engine has not measured its prefill or reports no cached tokens.
        """
        profile = self._attempt.engine.profile
        if self.savings is None or profile is None or profile.prefill is None or not profile.prompt_tokens_details:
            return None
        return self.savings.prefill_seconds(usage, profile.prefill)

    def complete(self) -> None:
        """Note that the answer is complete: the engine works."""
        self._attempt.succeeded()

    def broke_off(self) -> None:
        """Note that the engine ended its answer before it was complete."""
        self._attempt.failed()

    def ended_with_error(self) -> None:
        """Note that the engine reported an error of its own in the answer, as it might have in place of one."""
        self._attempt.answered_with_error(self._call.sender, self._content)


class Exchanges:
    """Sends requests to the pool's engines."""

    def __init__(self, *, session: EngineSession, pool: EnginePool, metrics: Metrics, headers_seconds: float) -> None:
        """Use `session` for the exchanges, and wait at most `headers_seconds` for the headers of a stream."""
        self._session = session
        self._pool = pool
        self._metrics = metrics
        self._headers_seconds = headers_seconds

    async def exchange(self, call: Call, body: Body, record: RequestRecord, held: ExitStack) -> Exchange:
        """Post a request to an engine and return its answer.

        Closing `held` ends the exchange. Before the answer is complete, this makes the engine abort the request.

        Another engine is tried if the first one can't be connected to, answers 503 or is not set up for the request,
        because it has then spent no computing time on it. There are at most MAX_ATTEMPTS attempts. A request that an
        engine has accepted and then failed on is not sent to another: it may have cost a prefill, or it may have
        caused the failure. With media it is sent to the same engine once more, see `_ask`.
        Raises EngineUnavailable, EngineFailed, EngineTimeout, or the engine's own error.
        """
        content = _identity(call, body)
        tried: list[Engine] = []
        reason = ""
        refusal: GatewayError | None = None
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
            record.engine = attempt.engine.name
            traced = held.enter_context(record.trace.engine(attempt.engine.name)) if record.trace else {}
            asking = _Asking(call, body, content, traced, record)
            try:
                return await self._ask(asking, attempt, held)
            except EngineUnavailable as exc:
                reason, refusal = "connect", exc
            except Refused as refused:
                refusal = refused.error
                if refused.status == 503:
                    reason = "refused"
                elif isinstance(refusal, EngineMisconfigured):
                    reason = "misconfigured"
                else:
                    raise refusal from None
            held.close()
        assert refusal is not None  # noqa: S101 - the loop ends without an answer only after a refusal
        raise refusal

    async def _ask(self, asking: "_Asking", attempt: Attempt, held: ExitStack) -> Exchange:
        """Return the answer of one engine.

        A request with media that the engine answers with 500 is sent to it once more. After a request that vLLM
        refuses for a parameter, its API server takes the media of that request for cached in the engine, which has
        never seen them (vllm-project/vllm#43941). The next request about these media fails, and clears that up.
        Raises Refused for an error of the engine, and EngineUnavailable if the engine can't be reached.
        """
        try:
            return await self._once(asking, attempt, held)
        except Refused as refused:
            if refused.status != 500 or not asking.call.has_media:
                self._judge(asking, attempt, refused)
                raise
        self._metrics.upstream_retries.labels("cache_miss").inc()
        try:
            return await self._once(asking, attempt, held)
        except EngineUnavailable as exc:
            raise EngineFailed("the engine broke off while working on this request") from exc
        except Refused as refused:
            self._judge(asking, attempt, refused)
            raise refused.error from None

    async def _once(self, asking: "_Asking", attempt: Attempt, held: ExitStack) -> Exchange:
        response = await self._send(asking, attempt)
        held.callback(_let_go, response)
        if response.status != 200:
            error = await self._refusal(response, attempt.engine, asking.record.request_id)
            raise Refused(error, status=response.status)
        exchange = Exchange(response, attempt, call=asking.call, content=asking.content)
        if asking.call.has_video:
            _note_savings(attempt.engine, exchange.savings, asking.record.request_id)
        if exchange.is_stream and asking.call.is_stream and asking.call.has_media:
            await exchange.begin()
        return exchange

    @staticmethod
    def _judge(asking: "_Asking", attempt: Attempt, refused: Refused) -> None:
        if isinstance(refused.error, EngineMisconfigured):
            return
        if refused.status is not None and refused.status >= 500:
            attempt.answered_with_error(asking.call.sender, asking.content)
        else:
            attempt.succeeded()

    async def _send(self, asking: "_Asking", attempt: Attempt) -> aiohttp.ClientResponse:
        call, body, record = asking.call, asking.body, asking.record
        size_bytes = sum(map(len, body))
        begin = perf_counter()
        # If the answer is not a stream, the engine sends its headers only when it has generated the whole answer.
        # Then only the pool's limit on silence applies.
        limit = self._headers_seconds if call.is_stream else None
        try:
            async with asyncio.timeout(limit) as deadline:
                attempt.wait.begin(partial(deadline.reschedule, 0.0))
                response = await self._session.http.post(
                    attempt.engine.url + call.path,
                    data=b"".join(body) if size_bytes <= WHOLE_BODY_BYTES else _in_pieces(body),
                    headers={
                        "content-type": "application/json",
                        "content-length": str(size_bytes),
                        "x-request-id": record.request_id,
                        **call.headers,
                        **asking.traced,
                    },
                    allow_redirects=False,
                )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
            attempt.unreachable()
            raise EngineUnavailable("no engine is available, try again later") from exc
        except (aiohttp.ClientError, OSError) as exc:
            attempt.failed()
            raise _broken(exc, gone=attempt.wait.in_vain) from exc
        finally:
            attempt.wait.over()
        record.engine_answered(begin=begin, connected=connected_at(), answered=perf_counter())
        return response

    async def _refusal(self, response: aiohttp.ClientResponse, engine: Engine, request_id: str) -> GatewayError:
        try:
            async with asyncio.timeout(ERROR_BODY_SECONDS):
                body = await response.content.read(ERROR_BODY_BYTES)
        except (aiohttp.ClientError, OSError):
            body = b""
        error = engine_error(response.status, body)
        where = {"request_id": request_id, "engine": engine.name, "engine_status": response.status}
        if isinstance(error, EngineMisconfigured):
            logger.error(
                "engine is not set up for the gateway", extra={**where, "engine_message": error.engine_message}
            )
        else:
            logger.warning("engine answered with an error", extra=where)
        return error


def _identity(call: Call, body: Body) -> bytes:
    """Return what tells a request from others of the same sender: its media, or else the ends of its body."""
    if call.key is not None:
        return call.key.encode()
    first, last = body[0], body[-1]
    return b"%d " % sum(map(len, body)) + first[:512] + last[-1024:]


def _let_go(response: aiohttp.ClientResponse) -> None:
    if response.content.at_eof():
        response.release()
    else:
        response.close()  # the engine notices the closed connection and aborts the request


def _note_savings(engine: Engine, savings: Savings | None, request_id: str) -> None:
    """Note whether the engine reports video tokens, and log a warning when it stops reporting them.

    Such an engine either serves videos without reduction, or does not say what the reduction saved.
    """
    if savings is None and engine.reports_savings:
        logger.warning(
            "engine reports no video tokens: it runs without --video-pruning-rate, or its VLLM_PLUGINS does not name "
            "aot; retentions may have no effect there",
            extra={"request_id": request_id, "engine": engine.name},
        )
    engine.reports_savings = savings is not None


def _broken(exc: Exception, *, gone: bool = False) -> GatewayError:
    if isinstance(exc, TimeoutError) and not gone:
        return EngineTimeout("the engine did not answer in time")
    return EngineFailed("the engine broke off while working on this request")


def _is_json(body: bytes) -> bool:
    try:
        json.loads(body)
    except ValueError:
        return False
    return True


async def _in_pieces(body: Body) -> AsyncIterator[memoryview]:
    for view in (memoryview(piece) for piece in body):
        for begin in range(0, len(view), PIECE_BYTES):
            yield view[begin : begin + PIECE_BYTES]
