"""The parts of the OpenAPI document that FastAPI can't derive from the routes and their models.

These are the errors and headers of every answer, the API keys, and the endpoints that are plain ASGI applications.
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
    EngineMisconfigured,
    EngineTimeout,
    EngineUnavailable,
    ForbiddenField,
    GatewayError,
    InvalidRequest,
    ModelNotServed,
    Overloaded,
    RateLimited,
    Unauthorized,
    UnknownModel,
    Verdict,
)

Schema = dict[str, Any]
TITLE = "AOT gateway"
DESCRIPTION = "An OpenAI-compatible proxy in front of vLLM engines that reports how many video tokens were saved."
KEY_SCHEME = "apiKey"
EVERYWHERE = (Unauthorized, RateLimited, Draining)
BY_ENGINES = (
    *(InvalidRequest, ForbiddenField, UnknownModel, BodyTooLarge, BodyTimeout),
    *(Overloaded, EngineUnavailable, ModelNotServed, EngineMisconfigured, EngineFailed, EngineTimeout),
)
"""The errors that every generating endpoint may answer with, besides the engine's own."""

_EVERY_ANSWER: dict[str, Schema] = {
    "x-request-id": {"description": "the request's id", "schema": {"type": "string"}, "required": True},
    "x-aot-gateway-overhead-ms": {
        "description": "the gateway's own time in milliseconds",
        "schema": {"type": "number", "minimum": 0},
        "required": True,
    },
}
_LIMITS: dict[str, Schema] = {
    f"x-ratelimit-{what}-{measure}": {"description": text.format(measure.replace("-", " ")), "schema": schema}
    for measure in ("requests", "tokens", "video-seconds")
    for what, text, schema in (
        ("limit", "the limit on {} per minute", {"type": "integer", "minimum": 1}),
        ("remaining", "the {} that are left of the limit", {"type": "integer", "minimum": 0}),
        ("reset", "the time until all {} are available again", {"type": "string", "examples": ["12.500s"]}),
    )
}
SAVINGS: dict[str, Schema] = {
    "x-aot-video-tokens-before": {
        "description": "video tokens before the reduction",
        "schema": {"type": "integer", "minimum": 1},
    },
    "x-aot-video-tokens-after": {
        "description": "video tokens after the reduction",
        "schema": {"type": "integer", "minimum": 0},
    },
    "x-aot-video-retention": {
        "description": "the share of video tokens that was kept",
        "schema": {"type": "number", "minimum": 0, "maximum": 1},
    },
}
_BY_VERDICT: dict[str, Schema] = {
    "retry-after": {"description": "seconds to wait before a retry", "schema": {"type": "integer", "minimum": 0}},
    "x-should-retry": {
        "description": "a retry would only repeat the work of the engine",
        "schema": {"const": "false"},
    },
    "www-authenticate": {"description": "the scheme for sending the API key", "schema": {"const": "Bearer"}},
}
ANSWER_HEADERS = frozenset({*_EVERY_ANSWER, *_LIMITS, *SAVINGS, *_BY_VERDICT})
"""The headers of answers, besides those of HTTP itself."""
_EVENT: Schema = {
    "type": "object",
    "description": "One event of the stream",
    "properties": {"data": {"type": "string", "description": "a chunk or an error, in JSON, or [DONE]"}},
    "required": ["data"],
}


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: Annotated[str, Field(json_schema_extra={"enum": sorted({v.type for v in (*VERDICTS.values(), INTERNAL)})})]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error answer. In a stream that has begun, the data of its last event."""

    error: ErrorDetail


class RawRoute(APIRoute):
    """A route to a plain ASGI application.

    FastAPI documents the route by the signature of a function that is never called.
    """

    def __init__(
        self,
        path: str,
        app: ASGIApp,
        signature: Callable[..., Any],
        *,
        summary: str,
        kinds: Iterable[type[GatewayError]],
        headers: Mapping[str, Schema],
        streams: bool = True,
    ) -> None:
        """Route `POST path` to `app`, which answers with JSON or with an error of `kinds`.

        With `streams` it may also answer with a stream of events. `headers` are those of successful answers.
        """
        answer: Schema = {"headers": dict(headers)}
        if streams:
            answer["content"] = {"text/event-stream": {"schema": _EVENT}}
        super().__init__(
            path,
            signature,
            methods=["POST"],
            operation_id=signature.__name__,
            summary=summary,
            response_description="The engine's answer" if streams else "The answer",
            responses={200: answer, **refusals(*kinds, by_engine=True)},
        )
        self.description = ""
        self.app = app


def refusals(*kinds: type[GatewayError], by_engine: bool = False) -> dict[int | str, Schema]:
    """Return the error responses of an endpoint under /v1/, in FastAPI's form for `responses`.

    Those are `kinds`, the errors of the middleware and, with `by_engine`, the engine's own errors.
    """
    verdicts = [*(VERDICTS[kind] for kind in (*kinds, *EVERYWHERE)), INTERNAL]
    if by_engine:
        verdicts += ENGINE_VERDICTS.values()
    by_status: dict[int, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_status[verdict.status].append(verdict)
    return {status: _refusal(by_status[status]) for status in sorted(by_status)}


def document(routes: Iterable[BaseRoute], *, keys_needed: bool, metrics_keys_needed: bool) -> Schema:
    """Return the OpenAPI document for `routes`.

    `keys_needed` and `metrics_keys_needed` say whether the API and the paths from `/metrics` on ask for a key.
    """
    found = get_openapi(title=TITLE, version=__version__, description=DESCRIPTION, routes=list(routes))
    components = found["components"]
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's 422, which this gateway answers as a 400
        components["schemas"].pop(unused, None)
    components["headers"] = _EVERY_ANSWER | _LIMITS | SAVINGS | _BY_VERDICT
    components["securitySchemes"] = {KEY_SCHEME: {"type": "http", "scheme": "bearer"}}
    for path, methods in found["paths"].items():
        is_api = path.startswith("/v1/")
        for described in methods.values():
            needs_key = (keys_needed and is_api) or (metrics_keys_needed and path.startswith("/metrics"))
            _complete(described, is_api=is_api, needs_key=needs_key)
    return found


def _complete(described: Schema, *, is_api: bool, needs_key: bool) -> None:
    """Add the errors, headers and keys that are common to all endpoints to an operation."""
    described["security"] = [{KEY_SCHEME: []}] if needs_key else []
    responses = described["responses"]
    responses.pop("422", None)
    for verdict in (INTERNAL, *([VERDICTS[Unauthorized]] if needs_key and not is_api else [])):
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorBody.__name__}"}}}
        responses.setdefault(str(verdict.status), {**_refusal([verdict]), "content": content})
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
        "description": f"Refused; `code` is {', '.join(codes)} or a more specific one",
        "model": ErrorBody,
        "headers": {name: _BY_VERDICT[name] for name, applies in headers.items() if applies},
    }
