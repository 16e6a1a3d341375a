"""Parses chat requests. The gateway reads only the fields it needs; all others pass through unchanged."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from server.aliases import Asked, Target
from server.engines.savings import Savings
from server.engines.streams import ChatStream
from server.errors import ForbiddenField, InvalidRequest
from server.media.part import Kind, MediaPart, Source
from server.requests.aot import read_aot
from server.requests.fields import (
    ask_for_usage,
    dump_json,
    parse_json_object,
    read_stream_fields,
)
from server.requests.knobs import refuse_idle_fields, refuse_idle_keys_of_video
from server.requests.parameters import OPERATOR_FIELDS, refuse_beside_media

URL_KEYS: dict[str, Kind] = {"video_url": "video", "image_url": "image", "audio_url": "audio"}
PART_TYPES = {"image_url": "input_image", "video_url": "input_video"}  # another `type` of parts with this key
MEDIA_KEYS = (*URL_KEYS, "input_audio", "file")
TEXT_TYPES = ("text", "input_text", "output_text", "refusal", "thinking", "tool_reference")
LARGE_VALUE_CHARACTERS = 65_536
MAX_SET_ASIDE = 1024
_DATA_URL = re.compile(rb'"(?i:data):[^"\\]{0,200}?;(?i:base64),')
_MARK = re.compile(rb"(aot-[0-9a-f]{32})")
_MARK_CHARACTERS = 36


@dataclass
class ParsedChat:
    """A parsed chat request: all its fields, and the values that the gateway has read from them."""

    fields: dict[str, Any]
    model: str
    stream: bool
    usage_wanted: bool
    asked: Asked
    media: list[MediaPart] = field(default_factory=list)

    @property
    def has_video(self) -> bool:
        """Whether at least one part is a video."""
        return any(part.kind == "video" for part in self.media)

    @property
    def has_media(self) -> bool:
        """Whether at least one part is a video, an image or an audio clip."""
        return bool(self.media)

    def address_to(self, target: Target) -> None:
        """Rewrite the fields for the engine: the model's name, retention, preset, and `include_usage` in streams."""
        self.fields["model"] = target.engine_model
        for name in ("aot", *OPERATOR_FIELDS):
            self.fields.pop(name, None)
        if self.has_video and target.processor_kwargs:
            self.fields["mm_processor_kwargs"] = target.processor_kwargs
        if self.stream:
            ask_for_usage(self.fields, usage_wanted=self.usage_wanted)

    def forget_content(self) -> None:
        """Release the messages, which may hold megabytes. The values read from them remain."""
        self.fields.clear()
        self.media.clear()

    def reader(self, savings: Savings | None) -> ChatStream:
        """Return the parser for the engine's stream."""
        return ChatStream(savings=savings, usage_wanted=self.usage_wanted, model=self.model)

    def serialise(self) -> list[bytes | memoryview]:
        """Return the request as JSON, in pieces; raise InvalidRequest for a value that JSON can't represent.

        Each large medium is a piece of its own and is passed on unchanged. Base64 needs no escaping, and escaping,
        encoding or copying megabytes of it would be the largest cost of a video request.
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


def parse_chat_request(body: bytes | bytearray) -> ParsedChat:
    """Return the request in `body`.

    Large data URLs are set aside first, so that the JSON parser has little to read. If one of them turns out not to be
    a medium, the whole body is parsed again, with nothing set aside.
    Raises InvalidRequest if the body is not a chat request, ForbiddenField for a part or field that clients may not
    send, and the errors of `read_aot`.
    """
    light, payloads = _set_aside(body)
    chat = _read_request(light)
    for part in chat.media:
        part.payload = payloads.pop(part.value[-_MARK_CHARACTERS:], None)
    return chat if not payloads else _read_request(body)


def _set_aside(body: bytes | bytearray) -> tuple[bytes | bytearray, dict[str, memoryview]]:
    """Return `body` with a unique mark in place of each large base64 string, and a mapping from marks to strings."""
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


def _read_request(body: bytes | bytearray) -> ParsedChat:
    fields = parse_json_object(body)
    model, stream, usage_wanted = read_stream_fields(fields)
    if not isinstance(fields.get("messages"), list):
        raise InvalidRequest("messages must be an array", param="messages")
    media = list(_media_parts(fields["messages"]))
    if media:
        refuse_beside_media(fields)
    chat = ParsedChat(
        fields=fields,
        model=model,
        stream=stream,
        usage_wanted=usage_wanted,
        asked=read_aot(fields.get("aot")),
        media=media,
    )
    refuse_idle_fields(fields, has_video=chat.has_video)
    return chat


def _media_parts(messages: list[Any]) -> Iterator[MediaPart]:
    """Yield every medium in `messages`.

    A part may lack its `type`, and a URL may be a plain string instead of an object, because engines accept both.
    """
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part, dict):
                continue
            where = f"messages[{i}].content[{j}]"
            _refuse_part_fields(part, where)
            keys = [key for key in MEDIA_KEYS if part.get(key) is not None]
            if not keys:
                _check_text_part(part, where)
                continue
            if len(keys) > 1:
                raise InvalidRequest(f"{where} must hold one of {' and '.join(keys)}, not both", param=where)
            kind = part.get("type")
            if kind is not None and kind not in (keys[0], PART_TYPES.get(keys[0])):
                raise InvalidRequest(f"{where}.type must be {keys[0]}, because the part has that key", param=where)
            media = _media_part(part, keys[0], f"{where}.{keys[0]}")
            if media.kind == "video":
                refuse_idle_keys_of_video(part, where)
                if media.holder is not part:
                    refuse_idle_keys_of_video(media.holder, f"{where}.{keys[0]}")
            yield media


def _check_text_part(part: dict[str, Any], where: str) -> None:
    """Raise InvalidRequest if a part without media has a type of its own, or one that needs a medium."""
    kind = part.get("type")
    if kind is None or kind in TEXT_TYPES:
        return
    key = next((key for key, other in PART_TYPES.items() if kind == other), kind)
    if key in MEDIA_KEYS:
        raise InvalidRequest(f"{where} is of type {kind} and must have the key {key}", param=f"{where}.{key}")
    shown = kind[:80] if isinstance(kind, str) else json.dumps(kind)[:80]
    right = next((key for key, medium in URL_KEYS.items() if medium in shown), None)
    hint = f': send {{"type": "{right}", "{right}": {{"url": …}}}}' if right else ""
    raise InvalidRequest(
        f"{where}.type must be one of text, {', '.join(MEDIA_KEYS)}, got {shown!r}{hint}", param=f"{where}.type"
    )


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
    if source == "base64" and value[:5].lower() == "data:":
        if key != "file_data":  # what is probed must be what the engine gets, and engines take base64 alone here
            raise InvalidRequest(f"{param} must be base64, without data:…;base64, before it", param=param)
        source = "url"
    return MediaPart(kind, source, value, param, part, holder, key)


def _refuse_part_fields(part: dict[str, Any], where: str) -> None:
    kind = part.get("type")
    if isinstance(kind, str) and kind.endswith("_embeds"):
        raise ForbiddenField(f"parts of type {kind[:80]} can't be sent", param=where)
    for name in part:
        if name == "uuid" or name.endswith("_embeds"):
            raise ForbiddenField(f"{name[:80]} can't be set in a media part", param=f"{where}.{name[:80]}")
