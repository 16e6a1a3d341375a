"""What FastAPI can't derive for the OpenAPI document: errors and headers of every answer, keys, and raw ASGI endpoints.

Everything else follows from the routes and the models they declare.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from server import __version__
from server.errors import (
    ENGINE_VERDICTS,
    INTERNAL,
    VERDICTS,
    BodyTimeout,
    BodyTooLarge,
    Draining,
    EngineFailed,
    EngineTimeout,
    EngineUnavailable,
    ForbiddenField,
    GatewayError,
    InvalidRequest,
    Overloaded,
    RateLimited,
    Unauthorized,
    UnknownModel,
    Verdict,
)

Schema = dict[str, Any]
TITLE = "AOT gateway"
DESCRIPTION = "An OpenAI-compatible front for vLLM engines that reports what token reduction saved."
KEY_SCHEME = "apiKey"
EVERYWHERE = (Unauthorized, RateLimited, Draining)
BY_ENGINES = (
    *(InvalidRequest, ForbiddenField, UnknownModel, BodyTooLarge, BodyTimeout),
    *(Overloaded, EngineUnavailable, EngineFailed, EngineTimeout),
)
"""How every generating endpoint may refuse a request, besides what engines say themselves."""

_EVERY_ANSWER: dict[str, Schema] = {
    "x-request-id": {"description": "the request's id", "schema": {"type": "string"}, "required": True},
    "x-aot-gateway-overhead-ms": {
        "description": "the gateway's own time in milliseconds",
        "schema": {"type": "number", "minimum": 0},
        "required": True,
    },
}
_LIMITS: dict[str, Schema] = {
    f"x-ratelimit-{what}-{measure}": {"description": f"{text} of {measure} in a minute", "schema": schema}
    for measure in ("requests", "tokens", "video-seconds")
    for what, text, schema in (
        ("limit", "the limit", {"type": "integer", "minimum": 1}),
        ("remaining", "what is left", {"type": "integer", "minimum": 0}),
        ("reset", "the time until all is left again", {"type": "string", "examples": ["12.500s"]}),
    )
}
SAVINGS: dict[str, Schema] = {
    "x-aot-video-tokens-before": {
        "description": "video tokens before the reduction",
        "schema": {"type": "integer", "minimum": 1},
    },
    "x-aot-video-tokens-after": {
        "description": "video tokens after it",
        "schema": {"type": "integer", "minimum": 0},
    },
    "x-aot-video-retention": {
        "description": "the share kept",
        "schema": {"type": "number", "minimum": 0, "maximum": 1},
    },
}
_BY_VERDICT: dict[str, Schema] = {
    "retry-after": {"description": "seconds to wait before another try", "schema": {"type": "integer", "minimum": 0}},
    "x-should-retry": {"description": "that another try would only be waste", "schema": {"const": "false"}},
    "www-authenticate": {"description": "the scheme to send a key with", "schema": {"const": "Bearer"}},
}
_EVENT: Schema = {
    "type": "object",
    "description": "One event of the stream",
    "properties": {"data": {"type": "string", "description": "a chunk or an error as JSON, or [DONE]"}},
    "required": ["data"],
}


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's fields."""

    message: str
    type: Annotated[str, Field(json_schema_extra={"enum": sorted({v.type for v in (*VERDICTS.values(), INTERNAL)})})]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error's body; after a stream has begun, its last event."""

    error: ErrorDetail


class RawRoute(APIRoute):
    """A route to a plain ASGI application, described by the signature of a function that is never called."""

    def __init__(
        self,
        path: str,
        app: ASGIApp,
        signature: Callable[..., Any],
        *,
        summary: str,
        kinds: Iterable[type[GatewayError]],
        headers: Mapping[str, Schema],
    ) -> None:
        """Send what is posted to `path` to `app`, which answers with JSON or a stream of events, or refuses."""
        answer = {"content": {"text/event-stream": {"schema": _EVENT}}, "headers": dict(headers)}
        super().__init__(
            path,
            signature,
            methods=["POST"],
            operation_id=signature.__name__,
            summary=summary,
            response_description="The engine's answer",
            responses={200: answer, **refusals(*kinds, by_engine=True)},
        )
        self.description = ""
        self.app = app


def refusals(*kinds: type[GatewayError], by_engine: bool = False) -> dict[int | str, Schema]:
    """Return the responses for errors of an endpoint under /v1/ and of what surrounds it, as FastAPI takes them."""
    verdicts = [VERDICTS[kind] for kind in (*kinds, *EVERYWHERE)]
    if by_engine:
        verdicts += ENGINE_VERDICTS.values()
    by_status: dict[int, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_status[verdict.status].append(verdict)
    return {status: _refusal(by_status[status]) for status in sorted(by_status)}


def document(routes: Iterable[BaseRoute], *, keys_needed: bool, metrics_keys_needed: bool) -> Schema:
    """Return the document for `routes`."""
    found = get_openapi(title=TITLE, version=__version__, description=DESCRIPTION, routes=list(routes))
    components = found["components"]
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own; here a bad parameter is a 400
        components["schemas"].pop(unused, None)
    components["headers"] = _EVERY_ANSWER | _LIMITS | SAVINGS | _BY_VERDICT
    components["securitySchemes"] = {KEY_SCHEME: {"type": "http", "scheme": "bearer"}}
    for path, methods in found["paths"].items():
        is_api = path.startswith("/v1/")
        for described in methods.values():
            needs_key = (keys_needed and is_api) or (metrics_keys_needed and path == "/metrics")
            _complete(described, is_api=is_api, needs_key=needs_key)
    return found


def _complete(described: Schema, *, is_api: bool, needs_key: bool) -> None:
    """Add to an operation what surrounds every endpoint."""
    described["security"] = [{KEY_SCHEME: []}] if needs_key else []
    responses = described["responses"]
    responses.pop("422", None)
    for verdict in (INTERNAL, *([VERDICTS[Unauthorized]] if needs_key and not is_api else [])):
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorBody.__name__}"}}}
        responses[str(verdict.status)] = {**_refusal([verdict]), "content": content}
    described["responses"] = dict(sorted(responses.items()))
    for status, response in responses.items():
        response.pop("model", None)
        is_counted = is_api and status != "401"
        names = [*_EVERY_ANSWER, *(_LIMITS if is_counted else ()), *response.get("headers", ())]
        response["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _refusal(verdicts: list[Verdict]) -> Schema:
    codes = sorted({verdict.code or "null" for verdict in verdicts})
    headers = {
        "retry-after": any(verdict.retry_after_seconds is not None for verdict in verdicts),
        "x-should-retry": any(verdict.retry_is_waste for verdict in verdicts),
        "www-authenticate": any(verdict.status == 401 for verdict in verdicts),
    }
    return {
        "description": f"Refused; `code` is {', '.join(codes)} or a more exact one",
        "model": ErrorBody,
        "headers": {name: _BY_VERDICT[name] for name, applies in headers.items() if applies},
    }
