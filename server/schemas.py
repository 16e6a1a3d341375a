"""The fields of a chat request that the gateway reads. Everything else passes through as it came."""

import json
import math
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

URL_KEYS: dict[str, Kind] = {"video_url": "video", "image_url": "image", "audio_url": "audio"}
LARGE_URL_CHARACTERS = 65_536
MOST_VALUES = 500_000  # parsing more would hold up everybody else's requests, and take a hundred times their size


@dataclass
class MediaPart:
    """A media URL in a message. `holder[key]` is where it stands; `param` is how an error names the place."""

    kind: Kind
    url: str
    param: str
    holder: dict[str, Any]
    key: str
    is_plain: bool = False  # verified to be ASCII without a character that JSON escapes

    def replace(self, url: str) -> None:
        """Put another URL in the place; a data URL made by the gateway is plain."""
        self.holder[self.key] = self.url = url
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

    def serialise(self) -> bytes:
        """Return the request as JSON; raise InvalidRequest for what JSON can't carry.

        Large data URLs are set aside and joined in afterwards: escaping and encoding megabytes of base64 that need
        neither would be the largest cost of a video request.
        """
        aside = [part for part in self.media if part.is_plain and len(part.url) >= LARGE_URL_CHARACTERS]
        marks = [f"aot-{uuid4().hex}" for _ in aside]
        for part, mark in zip(aside, marks, strict=True):
            part.holder[part.key] = mark
        try:
            rest = dump_json(self.fields)
        finally:
            for part in aside:
                part.holder[part.key] = part.url
        pieces = []
        for part, mark in zip(aside, marks, strict=True):
            before, rest = rest.split(mark.encode(), 1)
            pieces += [before, part.url.encode()]
        return b"".join([*pieces, rest])


def parse_chat_request(body: bytes, *, chat_template_kwargs: Collection[str]) -> ChatRequest:
    """Return the request in `body`.

    Raises InvalidRequest if it is no chat request, ForbiddenField if it sets what only the operator may set, and
    RetentionRefused if `aot.retention` is not a number; `chat_template_kwargs` names the template switches allowed.
    """
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


def parse_json_object(body: bytes) -> dict[str, Any]:
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
    """Yield every media URL. Engines take parts without a type too, and URLs without an object around them."""
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part, dict):
                continue
            where = f"messages[{i}].content[{j}]"
            _refuse_part_fields(part, where)
            for key, kind in URL_KEYS.items():
                value = part.get(key)
                if value is None:
                    continue
                holder, slot = (value, "url") if isinstance(value, dict) else (part, key)
                url = holder.get(slot)
                if not isinstance(url, str):
                    raise InvalidRequest(f"{where}.{key}.url must be a string", param=f"{where}.{key}.url")
                if holder is value:
                    _refuse_part_fields(value, f"{where}.{key}")
                yield MediaPart(kind, url, f"{where}.{key}", holder, slot)


def _refuse_part_fields(part: dict[str, Any], where: str) -> None:
    kind = part.get("type")
    if isinstance(kind, str) and kind.endswith("_embeds"):
        raise ForbiddenField(f"parts of type {kind[:80]} can't be sent", param=where)
    for name in part:
        if name == "uuid" or name.endswith("_embeds"):
            raise ForbiddenField(f"{name[:80]} can't be set in a media part", param=f"{where}.{name[:80]}")
