"""What surrounds every request, as plain ASGI: id, overhead header, errors in OpenAI's shape, metrics, a log line."""

import asyncio
import logging
import re
from time import perf_counter
from typing import TYPE_CHECKING
from uuid import uuid4

from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.admission.drain import Lifecycle
from server.errors import ErrorAnswer, GatewayError, InvalidRequest, MethodNotAllowed, RouteNotFound, answer_to
from server.observe.metrics import Metrics
from server.observe.record import STATE_KEY, RequestRecord

if TYPE_CHECKING:
    from server.observe.tracing import Tracing

logger = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class Observed:
    """Gives every request a record, an id and its headers; counts and logs it when it has been answered."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, tracing: "Tracing | None" = None) -> None:
        """Wrap `app`."""
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = RequestRecord(request_id_of(headers))
        if self._tracing is not None and scope["path"].startswith("/v1/"):
            record.trace = self._tracing.begin(headers, scope["method"])
        scope.setdefault("state", {})[STATE_KEY] = record

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                answered = MutableHeaders(scope=message)
                answered["x-request-id"] = record.request_id
                answered["x-aot-gateway-overhead-ms"] = f"{record.overhead_ms():.3f}"
                answered.update(record.headers)
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
            await asyncio.sleep(0)  # the answer goes out before it is counted
        finally:
            self._observe(record, perf_counter() - record.received)
            if record.trace is not None:
                record.trace.end(record)

    def _observe(self, record: RequestRecord, seconds: float) -> None:
        status_class = f"{record.status // 100}xx"
        stream = str(record.stream).lower()
        self._metrics.requests.labels(record.route, record.model, status_class, stream).inc()
        self._metrics.request_duration.labels(record.route, stream).observe(seconds)
        for phase, spent in record.phases.items():
            self._metrics.overhead.labels(phase).observe(spent)
        if record.reason is not None:
            self._metrics.rejections.labels(record.reason).inc()
        before, after = record.video_tokens or (None, None)
        logger.log(
            logging.INFO if record.route.startswith("/v1") or record.reason else logging.DEBUG,
            "request",
            extra={
                "request_id": record.request_id,
                "route": record.route,
                "tenant": record.tenant,
                "model": record.model,
                "status": record.status,
                "stream": record.stream,
                "seconds": round(seconds, 6),
                "overhead_ms": round(record.overhead_ms(), 3),
                "reason": record.reason,
                "video_tokens_before": before,
                "video_tokens_after": after,
            },
        )


class ErrorsInOpenAIShape:
    """Answers every exception of the app; what is not a GatewayError is logged and told without details."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        started = False

        async def send_watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_watched)
        except Exception as exc:
            if scope["type"] != "http":
                raise
            record: RequestRecord = scope["state"][STATE_KEY]
            if not isinstance(exc, GatewayError):
                logger.exception("unexpected failure", extra={"request_id": record.request_id})
            answer = answer_to(exc)
            note(record, answer)
            if not started:
                await Response(answer.body(), answer.status, answer.headers, "application/json")(scope, receive, send)


class RefuseWhileDraining:
    """Turns away API requests once the gateway is shutting down; probes and metrics go on."""

    def __init__(self, app: ASGIApp, *, lifecycle: Lifecycle) -> None:
        """Wrap `app`."""
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        with self._lifecycle.request():
            await self._app(scope, receive, send)


def note(record: RequestRecord, answer: ErrorAnswer) -> None:
    """Remember an error for the metrics and the log; also one that came after a stream's headers had said 200."""
    record.status = answer.status
    record.reason = answer.reason


async def raise_in_our_terms(request: Request, exc: Exception) -> Response:
    """Turn the framework's own refusals, of paths, methods and parameters, into GatewayErrors."""
    if isinstance(exc, RequestValidationError):
        error = exc.errors()[0]
        name = str(error["loc"][-1])[:80]
        rule = str(error["msg"]).removeprefix("Input should ").removeprefix("String should ")
        raise InvalidRequest(f"{name} must {rule}", param=name) from exc
    if isinstance(exc, HTTPException) and exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "")
        raise MethodNotAllowed(f"{request.method[:16]} is not allowed on this path", allowed=allowed) from exc
    if isinstance(exc, HTTPException) and exc.status_code == 404:
        raise RouteNotFound("unknown request URL; see the documentation for what the gateway serves") from exc
    raise exc


def request_id_of(headers: Headers) -> str:
    """Return the id the client gave, if it is a sane one, or a new one."""
    for name in ("x-request-id", "x-client-request-id"):
        given = headers.get(name)
        if given is not None and _SANE_ID.fullmatch(given):
            return given
    return f"req_{uuid4().hex}"
