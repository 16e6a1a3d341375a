"""The tree of exceptions, and the one table that maps each of them to the answer a client gets.

ConfigurationError            the gateway does not start; the message is for the operator

GatewayError
├── InvalidRequest            the client can correct the request
│   ├── ForbiddenField        a field that only the operator may set
│   ├── RetentionRefused      `aot.retention` or `aot.tokens` is not a number within the alias's bounds
│   ├── SamplingRefused       `aot.frames`, `fps`, `start` or `end` does not fit the model or the video
│   └── MediaRefused          a video, image or audio clip is not allowed or not readable
│       └── FetchFailed       the host of a media URL did not deliver the file
├── Unauthorized              no valid API key
├── RouteNotFound, MethodNotAllowed
├── UnknownModel, UnknownFile
├── BodyTooLarge, BodyTimeout
├── RateLimited               the tenant has used up one of its limits
├── Overloaded                the gateway is at capacity: its queue, memory, downloads or media store
├── Draining                  the gateway is shutting down
├── EngineUnavailable         no engine for the request's model accepted it; no computing time was spent
├── ModelNotServed            no engine serves the model of the request's alias
├── EngineMisconfigured       an engine refused the request because of how it or the gateway is set up
├── EngineFailed              an engine accepted the request and then failed
├── EngineTimeout             an engine accepted the request and then stopped responding
├── EngineRefused             an engine answered with an error of its own
│   └── ContextExceeded       the prompt is longer than the model's context
└── ClientGone                the client disconnected; seen in metrics and logs only
"""

import json
import math
import re
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Self

MESSAGE_LIMIT = 800
MISCONFIGURED = "the engine does not accept the gateway's requests as it is set up, which only the operator can change"


class ConfigurationError(Exception):
    """A setting or the configuration file is wrong. The message names the place, the value and what is allowed."""


class GatewayError(Exception):
    """Base class of all errors that end a request.

    The client gets `param` and `code` in the fields of the same names in OpenAI's error object.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        """Keep the message, which the client will see: it must hold no address, path or key.

        `retry_after_seconds` is the time after which a retry makes sense, if it is known.
        """
        super().__init__(message)
        self.engine_status: int | None = None
        """The status that the engine answered with, if it did."""
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_seconds = retry_after_seconds


class InvalidRequest(GatewayError):
    """The request is malformed."""


class ForbiddenField(InvalidRequest):
    """The request sets a field that only the operator may set."""


class RetentionRefused(InvalidRequest):
    """The request's retention is not a number within the bounds of its model."""


class SamplingRefused(InvalidRequest):
    """The frames that the request asks for can't be sampled."""


class MediaRefused(InvalidRequest):
    """A media part is not allowed or not readable."""

    def at(self, param: str) -> Self:
        """Return the same error with the place of the medium as its `param`. Several requests may share one error."""
        placed = copy(self)
        placed.param = param
        return placed


class FetchFailed(MediaRefused):
    """The host of a media URL did not deliver the file."""

    def __init__(self, message: str, *, code: str = "media_fetch_failed") -> None:
        """Keep the message and the code."""
        super().__init__(message, code=code)


class Unauthorized(GatewayError):
    """The request has no valid API key."""


class RouteNotFound(GatewayError):
    """There is no route for the path."""


class MethodNotAllowed(GatewayError):
    """The route does not accept this method."""

    def __init__(self, message: str, *, allowed: str) -> None:
        """Keep `allowed`, the value of the `allow` header."""
        super().__init__(message)
        self.allowed = allowed


class UnknownModel(GatewayError):
    """The model is neither an alias nor served by an engine."""


class UnknownFile(GatewayError):
    """The tenant has no such file."""


class BodyTooLarge(GatewayError):
    """The body is larger than its limit."""


class BodyTimeout(GatewayError):
    """The body did not arrive within its time limit."""


class RateLimited(GatewayError):
    """The tenant has used up one of its limits. After `retry_after_seconds` the request would fit again."""


class Overloaded(GatewayError):
    """The gateway is at capacity.

    Its queue, its memory for requests, its downloads or its media store is full, or the request has waited too long.
    """

    body_untouched = True
    """Whether nothing of the request's body was read."""


class Draining(GatewayError):
    """The gateway is shutting down."""


class UsageUnavailable(GatewayError):
    """The usage is in a Redis that can't be reached."""


class EngineUnavailable(GatewayError):
    """No engine for the request's model could be reached, so no engine has spent computing time on the request."""


class ModelNotServed(GatewayError):
    """All engines have told what they serve, and the model of the request's alias is not among it."""


class EngineMisconfigured(GatewayError):
    """The request failed because of how the gateway and its engines are set up: only the operator can mend that."""

    def __init__(self, message: str, *, code: str | None = None, engine_message: str | None = None) -> None:
        """Keep the engine's own message for the log."""
        super().__init__(message, code=code)
        self.engine_message = engine_message


class EngineFailed(GatewayError):
    """The engine failed after it had accepted the request."""


class EngineTimeout(GatewayError):
    """The engine stopped responding after it had accepted the request."""


class ClientGone(GatewayError):
    """The client closed the connection."""


class EngineRefused(GatewayError):
    """An error that the engine answered with, translated for the client."""

    def __init__(self, message: str, *, status: int, param: str | None = None, code: str | None = None) -> None:
        """Keep `status`, the HTTP status for the client."""
        super().__init__(message, param=param, code=code)
        self.status = status


class ContextExceeded(EngineRefused):
    """The engine counted more tokens in the prompt than its model takes."""

    def __init__(self, *, prompt_tokens: int, context_tokens: int, advice: str = ": shorten the prompt") -> None:
        """Keep both counts. `advice` goes on after them."""
        message = f"This model's maximum context length is {context_tokens} tokens, and the prompt has {prompt_tokens}"
        super().__init__(message + advice, status=400, code="context_length_exceeded")
        self.prompt_tokens = prompt_tokens
        self.context_tokens = context_tokens


@dataclass(frozen=True)
class Verdict:
    """How a class of errors is answered and counted.

    `status` is the HTTP status, `type` and `code` are OpenAI's, `reason` is the label of `rejections_total`, and
    `retry_is_waste` tells clients not to retry.
    """

    status: int
    type: str
    reason: str
    code: str | None = None
    retry_after_seconds: int | None = None
    retry_is_waste: bool = False


VERDICTS: dict[type[GatewayError], Verdict] = {
    InvalidRequest: Verdict(400, "invalid_request_error", "invalid_request"),
    ForbiddenField: Verdict(400, "invalid_request_error", "forbidden_field", code="forbidden_field"),
    RetentionRefused: Verdict(400, "invalid_request_error", "retention", code="invalid_retention"),
    SamplingRefused: Verdict(400, "invalid_request_error", "sampling", code="invalid_sampling"),
    MediaRefused: Verdict(400, "invalid_request_error", "media", code="invalid_media"),
    FetchFailed: Verdict(400, "invalid_request_error", "media_fetch", code="media_fetch_failed"),
    Unauthorized: Verdict(401, "invalid_request_error", "unauthorized", code="invalid_api_key"),
    RouteNotFound: Verdict(404, "invalid_request_error", "not_found", code="not_found"),
    MethodNotAllowed: Verdict(405, "invalid_request_error", "not_found", code="method_not_allowed"),
    UnknownModel: Verdict(404, "invalid_request_error", "unknown_model", code="model_not_found"),
    UnknownFile: Verdict(404, "invalid_request_error", "unknown_file", code="file_not_found"),
    BodyTimeout: Verdict(408, "invalid_request_error", "body_timeout", code="request_timeout"),
    BodyTooLarge: Verdict(413, "invalid_request_error", "body_too_large", code="request_too_large"),
    RateLimited: Verdict(429, "rate_limit_error", "rate_limited", code="rate_limit_exceeded", retry_after_seconds=1),
    Overloaded: Verdict(429, "rate_limit_error", "queue_full", code="rate_limit_exceeded", retry_after_seconds=1),
    Draining: Verdict(503, "server_error", "draining", code="draining", retry_after_seconds=2),
    UsageUnavailable: Verdict(
        503, "server_error", "usage_unavailable", code="usage_unavailable", retry_after_seconds=5
    ),
    EngineUnavailable: Verdict(503, "server_error", "no_engine", code="engine_unavailable", retry_after_seconds=2),
    ModelNotServed: Verdict(503, "server_error", "misconfigured", code="model_not_served", retry_after_seconds=10),
    EngineMisconfigured: Verdict(
        500, "server_error", "misconfigured", code="engine_misconfigured", retry_is_waste=True
    ),
    EngineFailed: Verdict(502, "server_error", "engine_failed", code="engine_failed", retry_is_waste=True),
    EngineTimeout: Verdict(504, "server_error", "engine_timeout", code="engine_timeout", retry_is_waste=True),
    ClientGone: Verdict(499, "invalid_request_error", "client_gone", code="client_closed_request"),
}
ENGINE_VERDICTS: dict[int, Verdict] = {
    400: Verdict(400, "invalid_request_error", "engine_refused"),
    404: Verdict(404, "invalid_request_error", "engine_refused", code="model_not_found"),
    413: Verdict(413, "invalid_request_error", "engine_refused", code="request_too_large"),
    429: Verdict(429, "rate_limit_error", "engine_refused", code="rate_limit_exceeded", retry_after_seconds=1),
    503: Verdict(503, "server_error", "engine_refused", code="engine_unavailable", retry_after_seconds=2),
}
INTERNAL = Verdict(500, "server_error", "internal", code="internal_error", retry_is_waste=True)
REASONS = sorted({v.reason for v in (*VERDICTS.values(), *ENGINE_VERDICTS.values(), INTERNAL)})


@dataclass(frozen=True)
class ErrorAnswer:
    """An error as it leaves the gateway."""

    status: int
    reason: str
    content: dict[str, Any]
    headers: dict[str, str]
    cause: str | None = None
    """What lies behind the error, for the log: the kind of an exception or an engine's status, never a message."""

    def body(self) -> bytes:
        """Return OpenAI's error object as JSON."""
        return json.dumps(self.content, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")

    def event(self) -> bytes:
        """Return OpenAI's error object as the last event of a stream."""
        return b"data: " + self.body() + b"\n\n"


def answer_to(exc: BaseException) -> ErrorAnswer:
    """Return the answer to `exc`. Any exception but a GatewayError becomes an internal error without details."""
    if not isinstance(exc, GatewayError):
        answer = _answer(INTERNAL, GatewayError("the gateway failed on this request"))
        return replace(answer, cause=type(exc).__name__)
    verdict = ENGINE_VERDICTS[exc.status] if isinstance(exc, EngineRefused) else VERDICTS[type(exc)]
    return _answer(verdict, exc)


def _answer(verdict: Verdict, exc: GatewayError) -> ErrorAnswer:
    headers = {}
    if verdict.retry_after_seconds is not None:
        headers["retry-after"] = str(max(1, math.ceil(exc.retry_after_seconds or verdict.retry_after_seconds)))
    if verdict.retry_is_waste:
        headers["x-should-retry"] = "false"
    if isinstance(exc, MethodNotAllowed):
        headers["allow"] = exc.allowed
    if isinstance(exc, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    error = {
        "message": exc.message,
        "type": verdict.type,
        "param": exc.param,
        "code": exc.code or verdict.code,
    }
    return ErrorAnswer(verdict.status, verdict.reason, {"error": error}, headers, _cause_of(exc))


def _cause_of(exc: GatewayError) -> str | None:
    if exc.engine_status is not None:
        return f"engine status {exc.engine_status}"
    cause: BaseException | None = exc
    while isinstance(cause, GatewayError):
        cause = cause.__cause__
    return None if cause is None else type(cause).__name__


def engine_error(status: int, body: bytes) -> GatewayError:
    """Return an engine's error answer as one of the gateway's errors, see `_translated`."""
    error = _translated(status, body)
    error.engine_status = status
    return error


def _translated(status: int, body: bytes) -> GatewayError:
    """Translate an engine's error answer, which is JSON in any of vLLM's shapes or the text of a proxy in between.

    An error that the client can correct (most 4xx) keeps its message, scrubbed. The engine's 401 and 403 concern the
    gateway's own credentials, and some of its 400s concern what the gateway has added to the request. Both become an
    EngineMisconfigured. The engine's 5xx messages describe its internals; they become an EngineFailed.
    """
    message, param = _message_of(body)
    if status in (401, 403) or (status in (400, 422) and _OURS.search(f"{param} {message}")):
        return EngineMisconfigured(MISCONFIGURED, engine_message=scrub(message or ""))
    if status == 503:
        return EngineRefused("the engine is not taking requests, try again later", status=503)
    if status in (408, 504):
        return EngineTimeout("the engine did not answer in time")
    if status not in (400, 404, 413, 415, 422, 429):
        return EngineFailed("the engine failed on this request")
    prompt, context = _PROMPT_TOKENS.search(message or ""), _CONTEXT_TOKENS.search(message or "")
    if prompt and context and status == 400:
        return ContextExceeded(prompt_tokens=int(prompt[1] or prompt[2]), context_tokens=int(context[1]))
    text = scrub(message) if message and not _NOT_FOR_CLIENTS.search(message) else "the engine refused the request"
    if status == 404 and "does not exist" not in text:  # the engine lacks the route, not the model
        return EngineFailed("the engine does not serve this kind of request")
    code = "context_length_exceeded" if "maximum context length" in text or "max_model_len" in text else None
    return EngineRefused(text, status=400 if status in (415, 422) else status, param=param, code=code)


_OURS = re.compile(
    r"^(?:mm_processor|media_io)_kwargs\b|\baot_preset\b|--trust-request-mm-kwargs"
    r"|--allowed-local-media-path|\blocal files\b",
    re.IGNORECASE,
)
"""Found in the `param` and message of an engine that refuses what the gateway itself has put into the request."""

_PROMPT_TOKENS = re.compile(
    r"(?:prompt|Input length) \((?:length )?(\d{1,12})\)"
    r"|(?:contains|requested|resulted in)(?: at least)? (\d{1,12}) (?:input )?tokens"
)
_CONTEXT_TOKENS = re.compile(r"maximum (?:context|model) length (?:is |of |\()(\d{1,12})")
_NOT_FOR_CLIENTS = re.compile(
    r"\w+_embeds\b|image_pil|mm_processor_kwargs|media_io_kwargs|chat_template\b|--[a-z][\w-]+|max_model_len"
    r"|(?:kv|ec)_transfer_params|vllm_xargs|VLLM_[A-Z_]+"
)
"""Names in an engine's message of what clients can't send, and of what only its operator can set."""
_VALIDATION = re.compile(r"\d+ validation errors?\b")
_COMPLAINT = re.compile(r"""["']msg["']: (?:"([^"]{1,300})"|'((?:[^'\\]|\\.){1,300})')""")


def _complaint_of(message: str, param: object) -> tuple[str | None, str | None]:
    """Return the first of pydantic's complaints, in a sentence, and the place that it is about."""
    found = _COMPLAINT.search(message)
    place = param.removeprefix("body.") if isinstance(param, str) and re.fullmatch(r"[\w.-]{1,120}", param) else None
    if found is None or place is None:
        return None, place
    rule = (found[1] or found[2]).replace("\\'", "'").removeprefix("Value error, ")
    rule = f"must {rule.removeprefix('Input should ')}" if rule.startswith("Input should ") else f"is wrong: {rule}"
    return f"{place} {rule}", place


def _message_of(body: bytes) -> tuple[str | None, str | None]:
    try:
        parsed = json.loads(body)
    except ValueError:
        return None, None
    if not isinstance(parsed, dict):
        return None, None
    error = parsed.get("error", parsed)
    if isinstance(error, str):
        return error, None
    if not isinstance(error, dict):
        return None, None
    message, param = error.get("message", error.get("detail")), error.get("param")
    if isinstance(message, str) and _VALIDATION.match(message):
        return _complaint_of(message, param)
    if isinstance(message, list):  # FastAPI's validation errors
        first = message[0] if message and isinstance(message[0], dict) else {}
        message = first.get("msg")
        where = [str(step) for step in first.get("loc", []) if step != "body"]
        param = ".".join(where) or None
    param = param if isinstance(param, str) and re.fullmatch(r"[\w.\[\]-]{1,120}", param) else None
    return (message if isinstance(message, str) else None), param


_SECRETS = (
    (re.compile(r"\b(?:sk-|hf_)[\w-]{6,}|\bBearer\s+\S+", re.IGNORECASE), "[key]"),
    (re.compile(r"\bdata:[\w/+.-]*;base64,\S*"), "[data]"),
    (re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\")]+", re.IGNORECASE), "[url]"),
    (re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?::\d+)?"), "[address]"),
    (re.compile(r"\[[0-9a-f:]*:[0-9a-f:]*:[0-9a-f:.]*\](?::\d+)?", re.IGNORECASE), "[address]"),
    (re.compile(r"(?<![\w:])(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{1,4}(?![\w:])", re.IGNORECASE), "[address]"),
    (re.compile(r"\b(?=[\w.-]*[a-z])[\w-]+(?:\.[\w-]+)*:\d{2,5}\b", re.IGNORECASE), "[address]"),
    (re.compile(r"(?<![\w.~])~?/(?:[\w.@+-]+/)+[\w.@+-]*"), "[path]"),
)


def scrub(text: str) -> str:
    """Return `text` without keys, URLs, addresses and paths, shortened to MESSAGE_LIMIT characters."""
    text = text[: 4 * MESSAGE_LIMIT]
    for pattern, stand_in in _SECRETS:
        text = pattern.sub(stand_in, text)
    return text if len(text) <= MESSAGE_LIMIT else text[: MESSAGE_LIMIT - 1] + "…"
