"""Parses the requests of `/v1/responses`, and finds the videos and the images in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from server.aliases import Target
from server.engines.savings import Savings
from server.engines.streams import EventStream, ResponseStream
from server.errors import ForbiddenField, InvalidRequest
from server.media.part import MediaPart, Source
from server.requests.aot import read_aot
from server.requests.fields import parse_json_object, read_stream_fields
from server.requests.knobs import refuse_idle_fields, refuse_idle_keys_of_video
from server.requests.parameters import OPERATOR_FIELDS, refuse_beside_media
from server.requests.text import ParsedText

VIDEO_KEYS: dict[str, Source] = {"video_url": "url", "file_url": "url", "file_data": "base64", "file_id": "upload"}
"""The keys that hold a video, and what each of them holds."""
VIDEO_TYPES = (None, "input_video", "video_url", "input_file")
_CONTENT = re.compile(r"input\[\d+\]\.content\[\d+\]")


@dataclass
class ParsedResponse(ParsedText):
    """A parsed request to `/v1/responses`."""

    media: list[MediaPart] = field(default_factory=list)

    @property
    def has_media(self) -> bool:
        """Whether it holds videos or images."""
        return bool(self.media)

    def address_to(self, target: Target) -> None:
        """Rewrite the fields for the engine: its name for the model, the retention, the preset, and `store` off.

        A response stored at the engine would not be protected by the tenant's key.
        """
        super().address_to(target)
        for name in ("aot", *OPERATOR_FIELDS):
            self.fields.pop(name, None)
        if self.has_video and target.processor_kwargs:
            self.fields["mm_processor_kwargs"] = target.processor_kwargs
        self.fields["store"] = False

    def forget_content(self) -> None:
        """Release the content. The values read from it remain."""
        super().forget_content()
        self.media.clear()

    def reader(self, savings: Savings | None) -> EventStream:
        """Return the parser for the engine's stream."""
        return ResponseStream(savings=savings, model=self.model)


def parse_response_request(body: bytes | bytearray) -> ParsedResponse:
    """Return the request for a response in `body`, with its videos and images.

    Raises InvalidRequest if the request is malformed, ForbiddenField for other media and for tools of the engine, and
    the errors of `read_aot`.
    """
    fields = parse_json_object(body)
    given = fields.get("input")
    if not isinstance(given, str | list):
        raise InvalidRequest("input must be a string or an array", param="input")
    media = list(_media(given))
    has_video = any(part.kind == "video" for part in media)
    refuse_idle_fields(fields, has_video=has_video)
    if media:
        refuse_beside_media(fields)
    tools = fields.get("tools")
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise ForbiddenField("tools must be of type function", param=f"tools[{i}].type")
    asked = read_aot(fields.get("aot"))
    return ParsedResponse(fields, *read_stream_fields(fields), asked=asked, has_video=has_video, media=media)


def _media(given: object) -> Iterator[MediaPart]:
    """Yield every medium, in its order. Objects are searched at any depth, as engines read parts without a type too."""
    waiting = [("input", given)]
    while waiting:
        where, item = waiting.pop()
        if isinstance(item, dict):
            keys = [key for key in VIDEO_KEYS if item.get(key) is not None]
            if keys and item.get("type") in VIDEO_TYPES and _CONTENT.fullmatch(where):
                yield _video(item, keys, where)
                continue
            yield from _images(item, where)
            below = [(f"{where}.{key}", value) for key, value in item.items() if isinstance(value, dict | list)]
        elif isinstance(item, list):
            below = [(f"{where}[{i}]", value) for i, value in enumerate(item)]
        else:
            below = []
        waiting += reversed(below)


def _video(part: dict[str, Any], keys: list[str], where: str) -> MediaPart:
    key = keys[0]
    if len(keys) > 1 or part.get("image_url") is not None:
        raise InvalidRequest(f"{where} must hold one medium, not {len(keys)} or an image besides", param=where)
    holder, place, param = part, key, f"{where}.{key}"
    if key == "video_url" and isinstance(part[key], dict):
        holder, place, param = part[key], "url", f"{where}.video_url.url"
    for name in (*part, *holder):
        if name == "uuid" or name.endswith("_embeds"):
            raise ForbiddenField(f"{name[:80]} can't be set in a media part", param=f"{where}.{name[:80]}")
    refuse_idle_keys_of_video(part, where)
    if holder is not part:
        refuse_idle_keys_of_video(holder, f"{where}.{key}")
    value = holder.get(place)
    if not isinstance(value, str):
        raise InvalidRequest(f"{param} must be a string", param=param)
    source = VIDEO_KEYS[key]
    if source == "base64" and value[:5].lower() == "data:":
        source = "url"
    return MediaPart("video", source, value, param, part, holder, place, in_response=True)


def _images(part: dict[str, Any], where: str) -> Iterator[MediaPart]:
    """Yield the image in an object, if it has one; raise ForbiddenField if the object holds another medium."""
    kind = part.get("type")
    if isinstance(kind, str) and ("video" in kind or "audio" in kind or "file" in kind or kind.endswith("_embeds")):
        raise _misplaced(where)
    for name, value in part.items():
        if value is None or name == "image_url":
            continue
        if name.endswith(("_url", "_embeds")) or name in ("url", "input_audio", "file_id", "file_data", "uuid"):
            raise _misplaced(f"{where}.{name}")
    image = part.get("image_url")
    if isinstance(image, str):
        yield MediaPart("image", "url", image, f"{where}.image_url", part, part, "image_url", in_response=True)
    elif image is not None:
        raise InvalidRequest(f"{where}.image_url must be a string", param=f"{where}.image_url"[:200])


def _misplaced(where: str) -> ForbiddenField:
    return ForbiddenField(
        "media are taken here in the content of messages: a video as "
        '{"type": "input_video", "video_url": …} or in an input_file part, an image as '
        '{"type": "input_image", "image_url": …}; send other media to /v1/chat/completions',
        param=where[:200],
    )
