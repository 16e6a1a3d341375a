"""`POST /v1/chat/completions`: in, through, and out again."""

import asyncio
import json
from collections.abc import Collection
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from server.aliases import Alias
from server.catalogue import Catalogue
from server.errors import (
    BodyTimeout,
    BodyTooLarge,
    ClientGone,
    EngineFailed,
    GatewayError,
    InvalidRequest,
    UnknownModel,
    answer_to,
)
from server.gate import Gate
from server.lifecycle import Lifecycle
from server.media.intake import Intake
from server.metrics import OTHER, Metrics
from server.middleware import note
from server.record import STATE_KEY, RequestRecord
from server.savings import Savings
from server.schemas import ChatRequest, parse_chat_request
from server.sse import ChatStream
from server.upstream import Exchange, Upstream

PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class ChatCompletions:
    """The endpoint, as an ASGI application: it watches for the client's leaving from the body's end to the answer's."""

    catalogue: Catalogue
    gate: Gate
    intake: Intake
    upstream: Upstream
    lifecycle: Lifecycle
    metrics: Metrics
    max_body_bytes: int
    body_seconds: float
    chat_template_kwargs: Collection[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        record: RequestRecord = scope["state"][STATE_KEY]
        record.route = PATH
        with self.metrics.inflight_requests.track_inprogress(), self.gate.admitted():
            chat, alias = self._read(await self._body(scope, receive, record), record)
            answer = _Answer(send)
            try:
                async with self.lifecycle.leash(receive):
                    last = await self._serve(chat, alias, record, answer)
            except ClientGone:
                raise
            except GatewayError as exc:
                if not answer.started:
                    raise
                told = answer_to(exc)
                note(record, told)
                last = told.event()
            await answer.finish(last)

    async def _body(self, scope: Scope, receive: Receive, record: RequestRecord) -> bytes:
        headers = Headers(scope=scope)
        body = await read_body(headers, receive, max_bytes=self.max_body_bytes, seconds=self.body_seconds)
        record.body_complete = perf_counter()
        return body

    async def _serve(self, chat: ChatRequest, alias: Alias, record: RequestRecord, answer: "_Answer") -> bytes:
        """Do everything but send the last piece, which is returned. A video's copies are let go as early as can be."""
        async with self.intake.taken(chat, record):
            with record.phase("parse"):
                chat.address_to(alias)
                body = chat.serialise()
                chat.forget_content()
            queued = perf_counter()
            async with self.gate.engine_slot():
                record.add("queue", perf_counter() - queued)
                async with self.upstream.exchange(PATH, alias.engine_model, body, record) as exchange:
                    del body
                    self._count(exchange.savings, record)
                    if chat.stream:
                        return await self._stream(exchange, chat, record, answer)
                    return await _whole(exchange, answer)

    def _read(self, body: bytes, record: RequestRecord) -> tuple[ChatRequest, Alias]:
        with record.phase("parse"):
            chat = parse_chat_request(body, chat_template_kwargs=self.chat_template_kwargs)
        record.stream = chat.stream
        record.has_video = chat.has_video
        try:
            alias = self.catalogue.resolve(chat.model)
        except UnknownModel:
            record.model = OTHER
            raise
        record.model = alias.name
        alias.retention_for(chat.retention)  # refused before its videos are fetched
        return chat, alias

    def _count(self, savings: Savings | None, record: RequestRecord) -> None:
        if savings is not None:
            record.video_tokens = (savings.before, savings.after)
            self.metrics.video_tokens.labels(record.model, "before").inc(savings.before)
            self.metrics.video_tokens.labels(record.model, "after").inc(savings.after)
            self.metrics.video_retention.labels(record.model).observe(savings.after / savings.before)

    async def _stream(self, exchange: Exchange, chat: ChatRequest, record: RequestRecord, answer: "_Answer") -> bytes:
        if not exchange.is_stream:
            raise EngineFailed("the engine did not answer with a stream")
        answer.address(exchange, {"cache-control": "no-cache", "x-accel-buffering": "no"})
        await answer.start()
        stream = ChatStream(savings=exchange.savings, usage_wanted=chat.usage_wanted)
        tokens, latest = 0, record.received
        async for piece in exchange.pieces():
            passed = stream.feed(piece)
            if stream.tokens > tokens:
                now = perf_counter()
                self._time(stream.tokens - tokens, now - latest, is_first=tokens == 0, record=record)
                tokens, latest = stream.tokens, now
            if passed:
                await answer.piece(passed)
            if stream.failure is not None:
                raise stream.failure
        stream.end()
        if stream.failure is not None:
            raise stream.failure
        return b""

    def _time(self, num_tokens: int, seconds: float, *, is_first: bool, record: RequestRecord) -> None:
        """Observe chunks that arrived together, `seconds` after the ones before: they share the gap."""
        if is_first:
            self.metrics.time_to_first_token.labels(record.model).observe(seconds)
            return
        gaps = self.metrics.inter_token_latency.labels(record.model)
        for _ in range(num_tokens):
            gaps.observe(seconds / num_tokens)


class _Answer:
    """The answer to a client, sent in pieces."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._headers: dict[str, str] = {}
        self.started = False

    def address(self, exchange: Exchange, headers: dict[str, str]) -> None:
        """Settle the headers."""
        savings = {} if exchange.savings is None else exchange.savings.as_headers()
        self._headers = {"content-type": exchange.content_type, **headers, **savings}

    async def start(self) -> None:
        """Send status and headers."""
        self.started = True
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self._headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def piece(self, body: bytes) -> None:
        """Send a piece of the body, not the last."""
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def finish(self, body: bytes) -> None:
        """Send the last piece, or all there is."""
        if not self.started:
            await self.start()
        await self._send({"type": "http.response.body", "body": body})


async def _whole(exchange: Exchange, answer: _Answer) -> bytes:
    body = await exchange.read()
    if exchange.savings is not None:
        body = _with_savings(body, exchange.savings)
    answer.address(exchange, {"content-length": str(len(body))})
    return body


def _with_savings(body: bytes, savings: Savings) -> bytes:
    """Return the engine's answer with `usage.video_tokens`; raise EngineFailed if it is no JSON object."""
    try:
        content: Any = json.loads(body)
    except ValueError as exc:
        raise EngineFailed("the engine's answer could not be read") from exc
    if not isinstance(content, dict):
        raise EngineFailed("the engine's answer could not be read")
    usage = content.get("usage")
    content["usage"] = {**(usage if isinstance(usage, dict) else {}), "video_tokens": savings.as_usage()}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


async def read_body(headers: Headers, receive: Receive, *, max_bytes: int, seconds: float) -> bytes:
    """Return the request's body; raise BodyTooLarge, BodyTimeout or ClientGone. A length that lies changes nothing."""
    too_large = BodyTooLarge(f"the request body is larger than {max_bytes} bytes")
    try:
        if int(headers.get("content-length", "0")) > max_bytes:
            raise too_large
    except ValueError:
        raise InvalidRequest("content-length must be a number") from None
    pieces, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone("the client closed the connection")
                piece = message.get("body", b"")
                size += len(piece)
                if size > max_bytes:
                    raise too_large
                pieces.append(piece)
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError:
        raise BodyTimeout(f"the request body did not arrive within {seconds:g} seconds") from None
