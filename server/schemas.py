"""The fields of a chat request that the gateway reads. Everything else passes through as it came."""

import json
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn
from uuid import uuid4

from server.aliases import Alias
from server.errors import ForbiddenField, InvalidRequest, RetentionRefused
from server.parameters import OPERATOR_FIELDS
from server.savings import Savings
from server.sse import ChatStream

Kind = Literal["video", "image", "audio"]
Source = Literal["url", "base64", "upload"]

URL_KEYS: dict[str, Kind] = {"video_url": "video", "image_url": "image", "audio_url": "audio"}
PART_TYPES = {"image_url": "input_image"}  # what else parts with that key may be called
MEDIA_KEYS = (*URL_KEYS, "input_audio", "file")
LARGE_VALUE_CHARACTERS = 65_536
MAX_SET_ASIDE = 1024
MOST_VALUES = 500_000  # parsing more would hold up everybody else's requests, and take a hundred times their size
_DATA_URL = re.compile(rb'"data:[a-z]{5}/[a-z0-9.+-]{1,40};base64,')
_MARK = re.compile(rb"(aot-[0-9a-f]{32})")
_MARK_CHARACTERS = 36


@dataclass
class MediaPart:
    """A medium in a message: `value`, which stands at `holder[key]` in the message's `part`, says where it is.

    `param` is how an error names the place.
    """

    kind: Kind
    source: Source
    value: str = field(repr=False)
    param: str
    part: dict[str, Any] = field(repr=False)
    holder: dict[str, Any] = field(repr=False)
    key: str
    is_plain: bool = False  # verified to be ASCII without a character that JSON escapes
    payload: memoryview | None = field(default=None, repr=False)
    """The base64 of a large data URL, as it came; in `value` there is a mark in its place."""

    def replace(self, url: str, *, uuid: str | None = None) -> None:
        """Put a URL made by the gateway in the place; a video's with the name that engines know its content by.

        Engines read a part with a `uuid` by its keys and not by its type, so nothing else is left in it.
        """
        if self.kind == "video":
            self.holder, self.key = {}, "url"
            self.part.clear()
            self.part.update(type="video_url", video_url=self.holder, uuid=uuid)
        if url != self.value:
            self.payload = None
        self.holder[self.key] = self.value = url
        self.is_plain = True


@dataclass
class ChatRequest:
    """A chat request as parsed, and what was read from it."""

    fields: dict[str, Any]
    model: str
    stream: bool
    usage_wanted: bool
    retention: float | None
    media: list[MediaPart] = field(default_factory=list)

    @property
    def has_video(self) -> bool:
        """Whether any part is a video."""
        return any(part.kind == "video" for part in self.media)

    def address_to(self, alias: Alias) -> None:
        """Rewrite for the engine: its model name, the retention, and the usage that the savings are reported in.

        Raises RetentionRefused if the alias does not allow the request's retention.
        """
        retention = alias.retention_for(self.retention)
        self.fields["model"] = alias.engine_model
        for name in ("aot", *OPERATOR_FIELDS):
            self.fields.pop(name, None)
        if retention is not None and self.has_video:
            self.fields["mm_processor_kwargs"] = {"aot_retention": retention}
        if self.stream:
            ask_for_usage(self.fields, usage_wanted=self.usage_wanted)

    def forget_content(self) -> None:
        """Let go of the messages, which may hold megabytes; what was read from them stays."""
        self.fields.clear()
        self.media.clear()

    def reader(self, savings: Savings | None) -> ChatStream:
        """Return what reads the engine's stream."""
        return ChatStream(savings=savings, usage_wanted=self.usage_wanted)

    def serialise(self) -> list[bytes | memoryview]:
        """Return the request as JSON, in pieces; raise InvalidRequest for what JSON can't carry.

        Large media are pieces of their own, as they came: escaping, encoding or copying megabytes of base64 that need
        none of it would be the largest cost of a video request.
        """
        aside = {part.value[-_MARK_CHARACTERS:]: part.payload for part in self.media if part.payload is not None}
        large = [part for part in self.media if part.is_plain and len(part.value) >= LARGE_VALUE_CHARACTERS]
        for part in large:
            part.holder[part.key] = mark = _new_mark()
            aside[mark] = memoryview(part.value.encode())
        try:
            pieces = _MARK.split(dump_json(self.fields))
        finally:
            for part in large:
                part.holder[part.key] = part.value
        by_mark: dict[bytes, memoryview] = {mark.encode(): payload for mark, payload in aside.items()}
        return [by_mark.get(piece, piece) for piece in pieces]


def parse_chat_request(body: bytes | bytearray, *, chat_template_kwargs: Collection[str]) -> ChatRequest:
    """Return the request in `body`.

    Raises InvalidRequest if it is no chat request, ForbiddenField if it sets what only the operator may set, and
    RetentionRefused if `aot.retention` is not a number; `chat_template_kwargs` names the template switches allowed.

    Large data URLs are set aside before the rest is parsed, which is nearly nothing then. What turns out not to be a
    medium is parsed after all.
    """
    light, payloads = _set_aside(body)
    chat = _read_request(light, chat_template_kwargs)
    for part in chat.media:
        part.payload = payloads.pop(part.value[-_MARK_CHARACTERS:], None)
    return chat if not payloads else _read_request(body, chat_template_kwargs)


def _set_aside(body: bytes | bytearray) -> tuple[bytes | bytearray, dict[str, memoryview]]:
    """Return `body` with a mark in the place of each large string of base64, and those by their marks."""
    view = memoryview(body)
    pieces: list[bytes | memoryview] = []
    payloads: dict[str, memoryview] = {}
    done = at = 0
    for _ in range(MAX_SET_ASIDE):
        found = _DATA_URL.search(body, at)
        end = -1 if found is None else body.find(b'"', found.end())
        if found is None or end < 0:
            break
        at, begin = end, found.end()
        if end - begin >= LARGE_VALUE_CHARACTERS and body.find(b"\\", begin, end) < 0:
            mark = _new_mark()
            payloads[mark] = view[begin:end]
            pieces += [view[done:begin], mark.encode()]
            done = end
    return (b"".join([*pieces, view[done:]]) if payloads else body), payloads


def _new_mark() -> str:
    return f"aot-{uuid4().hex}"


def _read_request(body: bytes | bytearray, chat_template_kwargs: Collection[str]) -> ChatRequest:
    fields = parse_json_object(body)
    refuse_template_fields(fields, chat_template_kwargs)
    model, stream, usage_wanted = read_stream_fields(fields)
    if not isinstance(fields.get("messages"), list):
        raise InvalidRequest("messages must be an array", param="messages")
    return ChatRequest(
        fields=fields,
        model=model,
        stream=stream,
        usage_wanted=usage_wanted,
        retention=_retention(fields.get("aot")),
        media=list(_media_parts(fields["messages"])),
    )


def read_stream_fields(fields: dict[str, Any]) -> tuple[str, bool, bool]:
    """Return the model, whether a stream is wanted and whether its usage is; raise InvalidRequest."""
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
    """Have a stream end with its usage, which the gateway counts and hides from a client that does not want it."""
    options = dict(fields.get("stream_options") or {}, include_usage=True)
    if not usage_wanted:
        options.pop("continuous_usage_stats", None)  # means nothing to the engine without include_usage
    fields["stream_options"] = options


def dump_json(fields: dict[str, Any]) -> bytes:
    """Return `fields` as JSON; raise InvalidRequest for what JSON can't carry."""
    try:
        return json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (ValueError, RecursionError) as exc:  # an infinite number, a lone surrogate
        raise InvalidRequest("the request body holds a number or character that JSON can't carry") from exc


def parse_json_object(body: bytes | bytearray) -> dict[str, Any]:
    """Return the JSON object in `body`; raise InvalidRequest if there is none, or one of too many values."""
    if len(body) > MOST_VALUES and sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise InvalidRequest(f"the request body holds more than {MOST_VALUES} values")
    constants: list[str] = []

    def note_constant(name: str) -> float:
        constants.append(name)
        return math.nan

    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=note_constant)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest("the request body is not valid JSON") from exc
    if not isinstance(fields, dict):
        raise InvalidRequest("the request body must be a JSON object")
    if constants:
        _retention(fields.get("aot"))  # names the place if it is the one that matters
        raise InvalidRequest(f"the request body is not valid JSON: it holds {constants[0]}")
    return fields


def refuse_template_fields(fields: dict[str, Any], chat_template_kwargs: Collection[str]) -> None:
    """Raise ForbiddenField for a switch of the chat template that is not among `chat_template_kwargs`."""
    template_kwargs = fields.get("chat_template_kwargs")
    if template_kwargs is None:
        return
    if not isinstance(template_kwargs, dict):
        raise InvalidRequest("chat_template_kwargs must be an object", param="chat_template_kwargs")
    for name in template_kwargs:
        if name not in chat_template_kwargs:
            _forbid(f"chat_template_kwargs.{name}")


def _forbid(name: str) -> NoReturn:
    raise ForbiddenField(f"{name[:200]} can't be set in a request", param=name[:200])


def _retention(aot: object) -> float | None:
    if aot is None:
        return None
    if not isinstance(aot, dict):
        raise RetentionRefused('aot must be an object like {"retention": 0.15}', param="aot")
    unknown = [name for name in aot if name != "retention"]
    if unknown:
        raise RetentionRefused(f"aot has no key {unknown[0][:80]!r}; it takes retention", param="aot.retention")
    value = aot.get("retention")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise RetentionRefused("aot.retention must be a number in (0, 1]", param="aot.retention")
    if not 0 < value <= 1:
        shown = f", got {value:g}" if abs(value) < 10**6 else ""
        raise RetentionRefused(f"aot.retention must be in (0, 1]{shown}", param="aot.retention")
    return float(value)


def _media_parts(messages: list[Any]) -> Iterator[MediaPart]:
    """Yield every medium. Engines take parts without a type too, and URLs without an object around them."""
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part, dict):
                continue
            where = f"messages[{i}].content[{j}]"
            _refuse_part_fields(part, where)
            keys = [key for key in MEDIA_KEYS if part.get(key) is not None]
            if not keys:
                continue
            if len(keys) > 1:
                raise InvalidRequest(f"{where} must hold one of {' and '.join(keys)}, not both", param=where)
            kind = part.get("type")
            if kind is not None and kind not in (keys[0], PART_TYPES.get(keys[0])):
                raise InvalidRequest(f"{where}.type must be {keys[0]} where the part holds one", param=where)
            yield _media_part(part, keys[0], f"{where}.{keys[0]}")


def _media_part(part: dict[str, Any], key: str, where: str) -> MediaPart:
    value = part[key]
    if isinstance(value, dict):
        _refuse_part_fields(value, where)
    if key == "input_audio":
        return _found("audio", "base64", where, part, value, "data")
    if key == "file":
        sources: dict[str, Source] = {"file_id": "upload", "file_data": "base64"}
        given = [name for name in sources if isinstance(value, dict) and value.get(name) is not None]
        if len(given) != 1:
            raise InvalidRequest(f"{where} must have either a file_id or file_data", param=where)
        return _found("video", sources[given[0]], where, part, value, given[0])
    if isinstance(value, dict):
        return _found(URL_KEYS[key], "url", where, part, value, "url")
    return _found(URL_KEYS[key], "url", where, part, part, key, f"{where}.url")


def _found(
    kind: Kind, source: Source, where: str, part: dict[str, Any], holder: object, key: str, param: str | None = None
) -> MediaPart:
    param = param or f"{where}.{key}"
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(holder, dict) or not isinstance(value, str):
        raise InvalidRequest(f"{param} must be a string", param=param)
    if key == "file_data" and value[:5].lower() == "data:":
        source = "url"
    return MediaPart(kind, source, value, param, part, holder, key)


def _refuse_part_fields(part: dict[str, Any], where: str) -> None:
    kind = part.get("type")
    if isinstance(kind, str) and kind.endswith("_embeds"):
        raise ForbiddenField(f"parts of type {kind[:80]} can't be sent", param=where)
    for name in part:
        if name == "uuid" or name.endswith("_embeds"):
            raise ForbiddenField(f"{name[:80]} can't be set in a media part", param=f"{where}.{name[:80]}")
