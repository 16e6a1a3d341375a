"""The common part of the generating endpoints: parses a request, forwards it to an engine, and returns the answer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar, Generic, TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from server.admission.auth import Caller
from server.admission.buffers import Buffer
from server.admission.entrance import Entrance
from server.admission.quotas import Allowance
from server.aliases import Target
from server.edge.body import BodyLimits, read_body, skim_model
from server.edge.state import allowance_of, caller_of, record_of, sender_of
from server.engines.catalogue import Catalogue
from server.engines.exchange import Call, Exchange, Exchanges
from server.engines.savings import tokens_of, usage_in
from server.engines.streams import EventStream
from server.errors import ClientGone, EngineFailed, GatewayError, Overloaded, UnknownModel, answer_to
from server.media.intake import NOTHING, Taken
from server.observe.metrics import Metrics
from server.observe.record import NO_MODEL, OTHER, RequestRecord
from server.requests.outgoing import ParsedRequest, outgoing
from server.requests.parameters import Bounds, check_parameters
from server.requests.retention import settle_retention
from server.routes.answer import Answer, as_asked

SKIMMED_BYTES = 2**20
"""How much is read of a body that there is no room for, to find the model that it names."""

R = TypeVar("R", bound=ParsedRequest)


@dataclass(frozen=True)
class Passage(Generic[R]):
    """One request on its way through the gateway, with all that belongs to it.

    That is its target at the engines, its caller, its allowance, its record and its buffer.
    """

    request: R
    target: Target
    caller: Caller
    allowance: Allowance
    record: RequestRecord
    buffer: Buffer
    sender: str
    """The tenant or, without tenants, the client's address."""


@dataclass(frozen=True)
class Generation(ABC, Generic[R]):
    """A generating endpoint, as an ASGI application.

    From the end of the request's body to the end of the answer it watches whether the client disconnects.
    """

    path: ClassVar[str]
    """The endpoint's path, at the gateway and at the engines."""
    length_fields: ClassVar[tuple[str, ...]] = ()
    """The fields in which a request bounds the length of its answer.

    Empty if the engine has a small default of its own, so that the operator's bound need not be set.
    """

    entrance: Entrance
    body_limits: BodyLimits
    bounds: Bounds
    catalogue: Catalogue
    exchanges: Exchanges
    metrics: Metrics

    @abstractmethod
    def parse(self, body: bytes | bytearray) -> R:
        """Return the request in `body`; raise InvalidRequest if it is malformed."""

    def taken_in(self, passage: Passage[R]) -> AbstractAsyncContextManager[Taken]:
        """Return a context manager that takes in the request's media and keeps them until its block ends."""
        del passage
        return nullcontext(NOTHING)

    def engine_headers(self, target: Target, taken: Taken) -> Mapping[str, str]:
        """Return additional headers for the engine, or for a router in front of it."""
        del target, taken
        return {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            await self._admitted(scope, receive, send)
        except Overloaded as exc:
            record = record_of(scope)
            if record.model == NO_MODEL and exc.body_untouched:
                headers, names = Headers(scope=scope), self.catalogue.names
                record.model = await skim_model(headers, receive, names, max_bytes=SKIMMED_BYTES) or NO_MODEL
            raise

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        record, allowance = record_of(scope), allowance_of(scope)
        with self.entrance.gate.admitted(), self.entrance.buffers.buffer() as buffer:
            body = await read_body(Headers(scope=scope), receive, buffer, self.body_limits)
            record.body_complete = perf_counter()
            request, target = self._read(body, caller_of(scope), record)
            del body
            passage = Passage(request, target, caller_of(scope), allowance, record, buffer, sender=sender_of(scope))
            answer = Answer(send)
            try:
                async with self.entrance.drain.leash(receive):
                    last = await self._serve(passage, answer)
            except ClientGone:
                raise
            except GatewayError as exc:
                if answer.stream is None:
                    raise
                told = answer_to(exc)
                record.fail(told)
                last = answer.stream.farewell(told)
            await answer.finish(last)

    def _read(self, body: bytes | bytearray, caller: Caller, record: RequestRecord) -> tuple[R, Target]:
        with record.phase("parse"):
            request = self.parse(body)
            check_parameters(request.fields, self.bounds)
        record.stream = request.stream
        try:
            alias = self.catalogue.resolve(request.model, allowed=caller.models)
        except UnknownModel:
            record.model = OTHER
            raise
        record.model, record.engine_model = alias.name, alias.engine_model
        return request, alias.target(request.asked)

    async def _serve(self, passage: Passage[R], answer: Answer) -> bytes:
        """Serve the request, and return the last piece of the answer instead of sending it.

        All copies of a video are released as early as possible.
        """
        request, record = passage.request, passage.record
        async with self.taken_in(passage) as taken:
            record.video_seconds = taken.video_seconds
            await passage.allowance.take_video(taken.video_seconds)
            target = settle_retention(passage.target, taken.rules, taken.shapes)
            call = Call(
                path=self.path,
                model=target.engine_model,
                is_stream=request.stream,
                has_video=request.has_video,
                has_media=request.has_media,
                reader=request.reader,
                sender=passage.sender,
                key=taken.key,
                rules=taken.rules,
                headers=self.engine_headers(target, taken),
            )
            with record.phase("parse"):
                body = outgoing(
                    request,
                    target,
                    tenant=passage.caller.tenant,
                    length_fields=self.length_fields,
                    max_output_tokens=self.bounds.max_output_tokens,
                )
                passage.buffer.resize(sum(map(len, body)))
            queued = perf_counter()
            async with self.entrance.gate.engine_slot():
                record.add("queue", queued, perf_counter())
                with ExitStack() as held:
                    exchange = await self.exchanges.exchange(call, body, record, held)
                    del body  # frees the memory early: a body may have megabytes, and the answer may take minutes
                    passage.buffer.resize(0)
                    if exchange.savings is not None:
                        record.video_tokens = (exchange.savings.before, exchange.savings.after)
                        record.tokens = exchange.savings.after
                    if request.stream:
                        last = await self._stream(exchange, request.reader(exchange.savings), record, answer)
                    else:
                        last = await _whole(exchange, record, answer)
                    record.prefill_seconds = exchange.prefill_seconds(record.usage)
                    return last

    async def _stream(self, exchange: Exchange, stream: EventStream, record: RequestRecord, answer: Answer) -> bytes:
        if not exchange.is_stream:
            raise EngineFailed("the engine did not answer with a stream")
        answer.address(exchange, {"cache-control": "no-cache", "x-accel-buffering": "no"})
        await answer.start(stream)
        tokens, latest, prompt_tokens = 0, record.received, record.tokens
        while piece := await exchange.next_piece():
            passed = stream.feed(piece)
            record.usage = stream.usage
            record.tokens = tokens_of(stream.usage) or prompt_tokens + stream.tokens
            now = perf_counter()
            if passed:
                await answer.piece(passed)
            if stream.tokens > tokens:
                if tokens == 0:
                    record.seconds_to_first_token = now - latest
                else:
                    self._observe_gaps(stream.tokens - tokens, now - latest, record.model)
                tokens, latest = stream.tokens, now
            if stream.failure is not None:
                break
        else:
            stream.end()
        if stream.failure is None:
            exchange.complete()
            return b""
        if stream.broke_off:
            exchange.broke_off()
        elif isinstance(stream.failure, EngineFailed):
            exchange.ended_with_error()
        raise stream.failure

    def _observe_gaps(self, num_tokens: int, seconds: float, model: str) -> None:
        """Observe the gaps of `num_tokens` chunks that arrived together: they share `seconds` equally."""
        gaps = self.metrics.inter_token_latency.labels(model)
        for _ in range(num_tokens):
            gaps.observe(seconds / num_tokens)


async def _whole(exchange: Exchange, record: RequestRecord, answer: Answer) -> bytes:
    body = await exchange.read()
    record.usage = usage_in(body)
    record.tokens = tokens_of(record.usage)
    body = as_asked(body, exchange.savings, model=record.model)
    exchange.complete()
    answer.address(exchange, {"content-length": str(len(body))})
    return body
