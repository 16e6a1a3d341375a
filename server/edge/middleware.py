"""Middleware around every request, as plain ASGI: request id, overhead header, error answers, metrics, a log line."""

import asyncio
import logging
import re
import secrets
from collections.abc import Iterable
from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.admission.drain import Drain
from server.edge.state import caller_of, limit_headers_of, record_of, set_record
from server.errors import GatewayError, InvalidRequest, MethodNotAllowed, RouteNotFound, answer_to
from server.observe.metrics import Metrics
from server.observe.record import RequestRecord
from server.observe.usage import Ledger

if TYPE_CHECKING:
    from server.observe.tracing import Tracing  # imports an optional dependency

logger = logging.getLogger(__name__)

API = "/v1"
_ID_HEADERS = (b"x-request-id", b"x-client-request-id")  # the first that is there counts
_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_PATH_PARAMETER = re.compile(r"\{[^}]+\}")


class Observed:
    """Middleware that gives every request a record and an id, sets headers on its answer, then counts and logs it."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, ledger: Ledger, tracing: "Tracing | None" = None) -> None:
        """Wrap `app`."""
        self._app = app
        self._metrics = metrics
        self._ledger = ledger
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(request_id_of(scope["headers"]))
        if self._tracing is not None and scope["path"].startswith("/v1/"):
            record.trace = self._tracing.begin(Headers(scope=scope), scope["method"])
        set_record(scope, record)

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status, record.has_answer = message["status"], True
                added = {
                    "x-request-id": record.request_id,
                    "x-aot-gateway-overhead-ms": f"{record.overhead_ms():.3f}",
                    **limit_headers_of(scope),
                }
                answered = ((name.encode(), value.encode("latin-1")) for name, value in added.items())
                message["headers"] = [*message.get("headers", ()), *answered]
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
            await asyncio.sleep(0)  # lets the answer leave before the time for counting and logging is spent
        finally:
            record.route = _route_in(scope, default=record.route)
            tenant = caller_of(scope).tenant
            seconds = perf_counter() - record.received
            self._metrics.count(record, seconds, tenant=tenant)
            self._ledger.count(record, tenant=tenant)
            _log(record, seconds, tenant=tenant)
            if record.trace is not None:
                record.trace.end(record, tenant=tenant)


def _route_in(scope: Scope, *, default: str) -> str:
    """Return the path of the request's route, with `{id}` in place of each parameter, or `default` without a route.

    A request that was refused before its route was looked up has one all the same.
    """
    route: Any = scope.get("route")
    if route is None and "app" in scope:
        matches = (it for it in scope["app"].routes if it.matches(scope)[0] is Match.FULL)
        route = next(matches, None)
    return _template(route.path_format) if isinstance(route, Route) else default


@cache
def _template(path_format: str) -> str:
    return _PATH_PARAMETER.sub("{id}", path_format)


def _log(record: RequestRecord, seconds: float, *, tenant: str) -> None:
    before, after = record.video_tokens or (None, None)
    retention, first_token = record.retention, record.seconds_to_first_token
    logger.log(
        logging.INFO if record.route.startswith("/v1") or record.reason else logging.DEBUG,
        "request",
        extra={
            "request_id": record.request_id,
            "route": record.route,
            "tenant": tenant,
            "model": record.model,
            "engine": record.engine,
            "status": record.status,
            "stream": record.stream,
            "seconds": round(seconds, 6),
            "seconds_to_first_token": None if first_token is None else round(first_token, 6),
            "overhead_ms": round(record.overhead_ms(), 3),
            "reason": record.reason,
            "code": record.code,
            "cause": record.cause,
            "prompt_tokens": record.prompt_tokens,
            "answer_tokens": record.answer_tokens,
            "video_tokens_before": before,
            "video_tokens_after": after,
            "retention": None if retention is None else round(retention, 4),
        },
    )


class ErrorsInOpenAIShape:
    """Middleware that answers every exception with OpenAI's error object, unless an answer has begun.

    An exception that is not a GatewayError is logged, and its answer holds no details.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            await self._app(scope, receive, send)
        except Exception as exc:
            if scope["type"] != "http":
                raise
            record = record_of(scope)
            if not isinstance(exc, GatewayError):
                logger.exception("unexpected failure", extra={"request_id": record.request_id})
            answer = answer_to(exc)
            record.fail(answer)
            if not record.has_answer:
                await Response(answer.body(), answer.status, answer.headers, "application/json")(scope, receive, send)


class RefuseWhileDraining:
    """Middleware that refuses API requests while the gateway shuts down. Health checks and metrics stay available."""

    def __init__(self, app: ASGIApp, *, drain: Drain) -> None:
        """Wrap `app`."""
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        with self._drain.request():
            await self._app(scope, receive, send)


async def raise_in_our_terms(request: Request, exc: Exception) -> Response:
    """Translate the framework's own errors (unknown path, wrong method, wrong parameter) into GatewayErrors."""
    if isinstance(exc, RequestValidationError):
        error = exc.errors()[0]
        name = str(error["loc"][-1])[:80]
        rule = str(error["msg"]).removeprefix("Input should ").removeprefix("String should ")
        raise InvalidRequest(f"{name} must {rule}", param=name) from exc
    if isinstance(exc, HTTPException) and exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "")
        raise MethodNotAllowed(f"{request.method[:16]} is not allowed on this path", allowed=allowed) from exc
    if isinstance(exc, HTTPException) and exc.status_code == 404:
        raise RouteNotFound(f"there is nothing at this path; {_near(request)}") from exc
    raise exc


def _near(request: Request) -> str:
    """Return where a request to an unknown path can go instead: the path that it means, or the list of all."""
    path = "/" + request.url.path.strip("/")
    while path.startswith(f"{API}{API}/"):
        path = path.removeprefix(API)
    known = {route.path_format for route in request.app.routes if isinstance(route, Route)}
    for meant in (path, f"{API}{path}", path.removeprefix(API)):
        if meant in known and meant != request.url.path:
            return f"do you mean {meant}? The base URL of clients ends with one {API}, without a slash behind it"
    return "/openapi.json lists all paths"


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the request id from the client's headers if it is safe to log, otherwise a new one."""
    given = {name: value for name, value in headers if name in _ID_HEADERS}
    for name in _ID_HEADERS:
        if name in given and _SANE_ID.fullmatch(given[name]):
            return given[name].decode()
    return f"req_{secrets.token_hex(16)}"
