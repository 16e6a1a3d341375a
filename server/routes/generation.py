"""What the generating endpoints have in common: a request goes in, to an engine, and its answer or stream out again."""

import hashlib
import json
from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from server.admission.buffers import Buffer, Buffers
from server.admission.drain import Lifecycle
from server.admission.gate import Gate
from server.admission.quotas import Quotas
from server.aliases import Alias
from server.edge.body import consume_body, declared_length
from server.edge.middleware import note
from server.engines.catalogue import Catalogue
from server.engines.exchange import Exchange, Upstream
from server.engines.savings import Savings, tokens_of, usage_in
from server.engines.streams import EventStream
from server.errors import (
    ClientGone,
    EngineFailed,
    GatewayError,
    UnknownModel,
    answer_to,
)
from server.observe.metrics import OTHER, Metrics
from server.observe.record import STATE_KEY, RequestRecord
from server.requests.parameters import Bounds, check_parameters


class Request(Protocol):
    """What an endpoint's request can do, once it is parsed."""

    fields: dict[str, Any]
    model: str
    stream: bool

    @property
    def has_video(self) -> bool:
        """Whether any part is a video."""

    def address_to(self, alias: Alias) -> None:
        """Rewrite for the engine."""

    def serialise(self) -> list[bytes | memoryview]:
        """Return the request as JSON, in pieces."""

    def forget_content(self) -> None:
        """Let go of the content, which may hold megabytes; what was read from it stays."""

    def reader(self, savings: Savings | None) -> EventStream:
        """Return what reads the engine's stream."""


R = TypeVar("R", bound=Request)


@dataclass(frozen=True)
class Generation(ABC, Generic[R]):
    """An endpoint as an ASGI application: it watches for the client's leaving from the body's end to the answer's."""

    path: ClassVar[str]
    """The endpoint's path, here and at the engines."""
    length_fields: ClassVar[tuple[str, ...]] = ()
    """Where a request says how long its answer may be, if it is as long as the context otherwise."""

    catalogue: Catalogue
    buffers: Buffers
    gate: Gate
    upstream: Upstream
    quotas: Quotas
    lifecycle: Lifecycle
    metrics: Metrics
    bounds: Bounds
    chat_template_kwargs: frozenset[str]
    max_body_bytes: int
    body_seconds: float

    @abstractmethod
    def parse(self, body: bytes | bytearray) -> R:
        """Return the request in `body`; raise InvalidRequest."""

    def prepared(self, request: R, record: RequestRecord, buffer: Buffer) -> AbstractAsyncContextManager[None]:
        """Make ready what the engine needs besides the request, until the block ends."""
        return nullcontext()

    def describe(self, request: R, alias: Alias, record: RequestRecord) -> None:
        """Write down in `record` what the engine's router is told besides the request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        record: RequestRecord = scope["state"][STATE_KEY]
        record.route = self.path
        with self.metrics.inflight_requests.track_inprogress(), self.gate.admitted(), self.buffers.buffer() as buffer:
            request, alias = self._read(await self._body(scope, receive, record, buffer), record)
            answer = _Answer(send)
            try:
                async with self.lifecycle.leash(receive):
                    last = await self._serve(request, alias, record, buffer, answer)
            except ClientGone:
                raise
            except GatewayError as exc:
                if answer.stream is None:
                    raise
                told = answer_to(exc)
                note(record, told)
                last = answer.stream.farewell(told)
            await answer.finish(last)

    async def _body(self, scope: Scope, receive: Receive, record: RequestRecord, buffer: Buffer) -> bytearray:
        headers = Headers(scope=scope)
        body = await read_body(headers, receive, buffer, max_bytes=self.max_body_bytes, seconds=self.body_seconds)
        record.body_complete = perf_counter()
        return body

    async def _serve(self, request: R, alias: Alias, record: RequestRecord, buffer: Buffer, answer: "_Answer") -> bytes:
        """Do everything but send the last piece, which is returned. A video's copies are let go as early as can be."""
        async with self.prepared(request, record, buffer):
            await self.quotas.take_video(record)
            self.describe(request, alias, record)
            with record.phase("parse"):
                request.address_to(alias)
                self._bound_length(request.fields)
                isolate(request.fields, record.tenant)
                body = request.serialise()
                request.forget_content()
                buffer.resize(sum(map(len, body)))
            queued = perf_counter()
            async with self.gate.engine_slot():
                record.add("queue", queued, perf_counter())
                async with self.upstream.exchange(self.path, alias.engine_model, body, record) as exchange:
                    del body
                    buffer.resize(0)
                    self._count(exchange.savings, record)
                    if request.stream:
                        return await self._stream(exchange, request.reader(exchange.savings), record, answer)
                    return await _whole(exchange, record, answer)

    def _bound_length(self, fields: dict[str, Any]) -> None:
        most = self.bounds.max_output_tokens
        if most is not None and self.length_fields and all(fields.get(name) is None for name in self.length_fields):
            fields[self.length_fields[0]] = most

    def _read(self, body: bytes | bytearray, record: RequestRecord) -> tuple[R, Alias]:
        with record.phase("parse"):
            request = self.parse(body)
            check_parameters(request.fields, self.bounds)
        record.stream = request.stream
        record.has_video = request.has_video
        try:
            alias = self.catalogue.resolve(request.model, allowed=record.allowed_models)
        except UnknownModel:
            record.model = OTHER
            raise
        record.model, record.engine_model = alias.name, alias.engine_model
        self.check(request, alias)
        return request, alias

    def check(self, request: R, alias: Alias) -> None:
        """Raise a GatewayError if the alias does not allow the request."""

    def _count(self, savings: Savings | None, record: RequestRecord) -> None:
        if savings is not None:
            record.video_tokens = (savings.before, savings.after)
            record.tokens = savings.after
            self.metrics.video_tokens.labels(record.model, "before").inc(savings.before)
            self.metrics.video_tokens.labels(record.model, "after").inc(savings.after)
            self.metrics.video_retention.labels(record.model).observe(savings.after / savings.before)

    async def _stream(self, exchange: Exchange, stream: EventStream, record: RequestRecord, answer: "_Answer") -> bytes:
        if not exchange.is_stream:
            raise EngineFailed("the engine did not answer with a stream")
        answer.address(exchange, {"cache-control": "no-cache", "x-accel-buffering": "no"})
        await answer.start(stream)
        tokens, latest, prompt_tokens = 0, record.received, record.tokens
        async for piece in exchange.pieces():
            passed = stream.feed(piece)
            record.usage = stream.usage
            record.tokens = tokens_of(stream.usage) or prompt_tokens + stream.tokens
            now = perf_counter()
            if passed:
                await answer.piece(passed)
            if stream.tokens > tokens:
                self._time(stream.tokens - tokens, now - latest, is_first=tokens == 0, record=record)
                tokens, latest = stream.tokens, now
            if stream.failure is not None:
                raise stream.failure
        stream.end()
        if stream.failure is not None:
            raise stream.failure
        return b""

    def _time(self, num_tokens: int, seconds: float, *, is_first: bool, record: RequestRecord) -> None:
        """Observe chunks that arrived together, `seconds` after the ones before: they share the gap."""
        if is_first:
            record.seconds_to_first_token = seconds
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
        self.stream: EventStream | None = None

    def address(self, exchange: Exchange, headers: dict[str, str]) -> None:
        """Settle the headers."""
        savings = {} if exchange.savings is None else exchange.savings.as_headers()
        self._headers = {"content-type": exchange.content_type, **headers, **savings}

    async def start(self, stream: EventStream | None = None) -> None:
        """Send status and headers."""
        self.stream = stream
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self._headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def piece(self, body: bytes) -> None:
        """Send a piece of the body, not the last."""
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def finish(self, body: bytes) -> None:
        """Send the last piece, or all there is."""
        if self.stream is None:
            await self.start()
        await self._send({"type": "http.response.body", "body": body})


async def _whole(exchange: Exchange, record: RequestRecord, answer: _Answer) -> bytes:
    body = await exchange.read()
    record.usage = usage_in(body)
    record.tokens = tokens_of(record.usage)
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


def isolate(fields: dict[str, Any], tenant: str) -> None:
    """Salt the engine's prefix cache with the tenant, so that nobody finds out by its speed what others have asked.

    No key is needed: a tenant can't choose the salt that reaches the engine, only refine its own.
    """
    if tenant:
        refined = f"{tenant}\0{fields.get('cache_salt') or ''}"
        fields["cache_salt"] = hashlib.sha256(refined.encode(errors="replace")).hexdigest()


async def read_body(headers: Headers, receive: Receive, buffer: Buffer, *, max_bytes: int, seconds: float) -> bytearray:
    """Return the request's body, held in `buffer`; raises as `consume_body` does, and Overloaded if it has no room."""
    body = bytearray()
    announced = declared_length(headers) or 0
    if announced <= max_bytes:  # otherwise it is too large at any time
        buffer.expect(announced)

    async def keep(piece: bytes) -> None:
        buffer.grow(len(piece))
        body.extend(piece)

    await consume_body(headers, receive, keep, max_bytes=max_bytes, seconds=seconds)
    return body
