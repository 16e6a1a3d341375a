"""The OpenAPI document: from the routes, the models they answer with and the table of errors, so that it says no more.

Endpoints that are plain ASGI applications have an `Operation` here, as FastAPI knows nothing of them.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

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
    FetchFailed,
    ForbiddenField,
    GatewayError,
    InvalidRequest,
    MediaRefused,
    Overloaded,
    RateLimited,
    RetentionRefused,
    Unauthorized,
    UnknownModel,
    Verdict,
)
from server.requests.parameters import OPERATOR_FIELDS

Schema = dict[str, Any]
REF = "#/components/schemas/{model}"
TITLE = "AOT gateway"
DESCRIPTION = "An OpenAI-compatible front for vLLM engines that reports what token reduction saved."
KEY_SCHEME = "apiKey"
EVERYWHERE = (Unauthorized, RateLimited, Draining)

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
_SAVINGS: dict[str, Schema] = {
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


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's fields."""

    message: str
    type: Annotated[str, Field(json_schema_extra={"enum": sorted({v.type for v in (*VERDICTS.values(), INTERNAL)})})]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error's body; after a stream has begun, its last event."""

    error: ErrorDetail


class Retention(BaseModel):
    """What a request may ask of the token reduction."""

    model_config = ConfigDict(extra="forbid")

    retention: Annotated[float | None, Field(gt=0, le=1)] = None
    """The share of video tokens to keep, inside the bounds of the model."""


class MediaURL(BaseModel):
    """A place that media are taken from."""

    url: str


class VideoPart(BaseModel):
    """A video, as an https URL or a data URL."""

    model_config = ConfigDict(extra="allow")

    type: Literal["video_url"]
    video_url: MediaURL


class ChatMessage(BaseModel):
    """A message of the conversation. What engines take beside what is described here passes through."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[VideoPart | dict[str, Any]] | None = None


class ChatCompletionRequest(BaseModel):
    """OpenAI's request. Fields that are not described here pass through to the engine."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"not": {"anyOf": [{"required": [name]} for name in OPERATOR_FIELDS]}},
    )

    model: Annotated[str, Field(min_length=1)]
    messages: list[ChatMessage]
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    aot: Retention | None = None


class CompletionRequest(BaseModel):
    """OpenAI's request of the older endpoint. Fields that are not described here pass through to the engine."""

    model_config = ChatCompletionRequest.model_config

    model: Annotated[str, Field(min_length=1)]
    prompt: str | list[Any]
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None


class ResponseRequest(BaseModel):
    """OpenAI's request of the newer endpoint, without videos. What is not described here passes through."""

    model_config = ChatCompletionRequest.model_config

    model: Annotated[str, Field(min_length=1)]
    input: str | list[Any]
    stream: bool | None = None


class VideoTokens(BaseModel):
    """What the reduction saved on the request's videos together, as the engine counts."""

    before: Annotated[int, Field(ge=1)]
    after: Annotated[int, Field(ge=0)]
    retention: Annotated[float, Field(ge=0, le=1)]


class Usage(BaseModel):
    """The engine's counts; `video_tokens` where it reported them."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"required": []})

    video_tokens: VideoTokens | None = None


class ChatCompletion(BaseModel):
    """The engine's answer, with what was saved in its usage."""

    model_config = ConfigDict(extra="allow")

    choices: list[dict[str, Any]]
    usage: Usage | None = None


class Passed(BaseModel):
    """The engine's answer, as it came."""

    model_config = ConfigDict(extra="allow")

    usage: dict[str, Any] | None = None


EVENT: Schema = {
    "type": "object",
    "description": "One event of the stream",
    "properties": {"data": {"type": "string", "description": "a chunk or an error as JSON, or [DONE]"}},
    "required": ["data"],
}


@dataclass(frozen=True)
class Operation:
    """An endpoint that is a plain ASGI application. Its answer may be a stream of events."""

    name: str
    summary: str
    request: type[BaseModel]
    answer: type[BaseModel]
    refusals: tuple[type[GatewayError], ...]
    headers: Mapping[str, Schema]

    def described(self) -> Schema:
        """Return OpenAPI's operation object."""
        return {
            "operationId": self.name,
            "summary": self.summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(self.request)}}},
            "responses": {
                "200": {
                    "description": "The engine's answer",
                    "content": {
                        "application/json": {"schema": _ref(self.answer)},
                        "text/event-stream": {"schema": EVENT},
                    },
                    "headers": dict(self.headers),
                },
                **{str(status): response for status, response in refusals(*self.refusals, by_engine=True).items()},
            },
        }


_REFUSALS = (
    *(InvalidRequest, ForbiddenField, UnknownModel, BodyTooLarge, BodyTimeout),
    *(Overloaded, EngineUnavailable, EngineFailed, EngineTimeout),
)
OPERATIONS: dict[str, Operation] = {
    "/v1/chat/completions": Operation(
        name="create_chat_completion",
        summary="Answer a conversation about videos, whole or as a stream",
        request=ChatCompletionRequest,
        answer=ChatCompletion,
        refusals=(*_REFUSALS, RetentionRefused, MediaRefused, FetchFailed),
        headers=_SAVINGS,
    ),
    "/v1/completions": Operation(
        name="create_completion",
        summary="Continue a text, whole or as a stream",
        request=CompletionRequest,
        answer=Passed,
        refusals=_REFUSALS,
        headers={},
    ),
    "/v1/responses": Operation(
        name="create_response",
        summary="Answer a conversation without videos, keeping nothing, whole or as a stream",
        request=ResponseRequest,
        answer=Passed,
        refusals=_REFUSALS,
        headers={},
    ),
}


def refusals(*kinds: type[GatewayError], by_engine: bool = False) -> dict[int | str, Schema]:
    """Return the responses for errors of an endpoint under /v1/ and of what surrounds it, as FastAPI takes them."""
    verdicts = [VERDICTS[kind] for kind in (*kinds, *EVERYWHERE)]
    if by_engine:
        verdicts += ENGINE_VERDICTS.values()
    by_status: dict[int, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_status[verdict.status].append(verdict)
    return {status: _refusal(by_status[status]) for status in sorted(by_status)}


def document(
    routes: Iterable[BaseRoute], *, operations: Mapping[str, Operation], keys_needed: bool, metrics_keys_needed: bool
) -> Schema:
    """Return the document for `routes`, and for `operations` by their paths."""
    found = get_openapi(title=TITLE, version=__version__, description=DESCRIPTION, routes=list(routes))
    models: list[type[BaseModel]] = [
        ErrorBody,
        *(model for each in operations.values() for model in (each.request, each.answer)),
    ]
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=REF)
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas.update(definitions["$defs"])
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own; here a bad parameter is a 400
        schemas.pop(unused, None)
    components["headers"] = _EVERY_ANSWER | _LIMITS | _SAVINGS | _BY_VERDICT
    components["securitySchemes"] = {KEY_SCHEME: {"type": "http", "scheme": "bearer"}}
    for path, operation in operations.items():
        found["paths"].setdefault(path, {})["post"] = operation.described()
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
        responses[str(verdict.status)] = _refusal([verdict])
    described["responses"] = dict(sorted(responses.items()))
    for status, response in responses.items():
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
        "content": {"application/json": {"schema": _ref(ErrorBody)}},
        "headers": {name: _BY_VERDICT[name] for name, applies in headers.items() if applies},
    }


def _ref(model: type[BaseModel]) -> Schema:
    return {"$ref": REF.format(model=model.__name__)}
