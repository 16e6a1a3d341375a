"""The fields that all generating endpoints share, and the conversion of requests from and to JSON."""

import json
import math
from typing import Any

import msgspec

from server.errors import InvalidRequest
from server.requests.aot import read_aot

MOST_VALUES = 500_000  # parsing more would block the event loop, and take a hundred times the body's size in memory
_NOT_JSON = "the request body holds a number or character that JSON can't represent"


def read_stream_fields(fields: dict[str, Any]) -> tuple[str, bool, bool]:
    """Return the model, whether the client wants a stream, and whether it wants usage in the stream.

    Raises InvalidRequest if the model is missing or a field has the wrong type.
    """
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("you must provide a model parameter", param="model")
    stream = fields.get("stream")
    if not isinstance(stream, bool | None):
        raise InvalidRequest("stream must be a boolean", param="stream")
    options = fields.get("stream_options")
    if not isinstance(options, dict | None):
        raise InvalidRequest("stream_options must be an object", param="stream_options")
    return model, bool(stream), bool((options or {}).get("include_usage"))


def ask_for_usage(fields: dict[str, Any], *, usage_wanted: bool) -> None:
    """Make the engine report usage at the end of a stream.

    The gateway always counts it, and drops it from the stream if the client did not ask for it (`usage_wanted`).
    """
    options = dict(fields.get("stream_options") or {}, include_usage=True)
    if not usage_wanted:
        options.pop("continuous_usage_stats", None)  # had no effect without include_usage, and must not gain one now
    fields["stream_options"] = options


def dump_json(fields: dict[str, Any]) -> bytes:
    """Return `fields` as JSON; raise InvalidRequest for a value that JSON can't represent."""
    try:
        return msgspec.json.encode(fields)
    except (ValueError, RecursionError) as exc:  # for example a lone surrogate
        raise InvalidRequest(_NOT_JSON) from exc


def parse_json_object(body: bytes | bytearray) -> dict[str, Any]:
    """Return the JSON object in `body`.

    Raises InvalidRequest if the body is not a JSON object, or if it holds more than MOST_VALUES values.
    """
    if len(body) > MOST_VALUES and sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise InvalidRequest(f"the request body holds more than {MOST_VALUES} values")
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        fields = _parse_slowly(body)
    if not isinstance(fields, dict):
        raise InvalidRequest("the request body must be a JSON object")
    return fields


def _parse_slowly(body: bytes | bytearray) -> Any:
    """Return the value in a `body` that the fast parser does not take; raise InvalidRequest with the reason."""
    complaints: list[str] = []

    def constant(name: str) -> float:
        complaints.append(f"the request body is not valid JSON: it holds {name}")
        return math.nan

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            complaints.append(_NOT_JSON)
        return value

    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=constant, parse_float=number)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest("the request body is not valid JSON") from exc
    if complaints and isinstance(fields, dict):
        read_aot(fields.get("aot"))  # names the place if it is the one that matters
        raise InvalidRequest(complaints[0])
    return fields
