"""Parses the requests of `/v1/completions` and `/v1/responses`, and finds the images in the latter."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from server.aliases import Asked, Target
from server.engines.savings import Savings
from server.engines.streams import ChatStream, EventStream, ResponseStream
from server.errors import ForbiddenField, InvalidRequest
from server.media.part import MediaPart
from server.requests.fields import (
    ask_for_usage,
    dump_json,
    parse_json_object,
    read_stream_fields,
)

MOST_PROMPTS = 64


@dataclass
class ParsedText:
    """A parsed request without videos: all its fields, and the values that the gateway has read from them."""

    fields: dict[str, Any] = field(repr=False)
    model: str
    stream: bool
    usage_wanted: bool
    asked: Asked = Asked()  # noqa: RUF009 - it is frozen
    has_video: bool = False

    @property
    def has_media(self) -> bool:
        """Whether it holds media: a completion never does."""
        return False

    def address_to(self, target: Target) -> None:
        """Rewrite the fields for the engine: its name for the model."""
        self.fields["model"] = target.engine_model

    def serialise(self) -> list[bytes | memoryview]:
        """Return the request as JSON; raise InvalidRequest for a value that JSON can't represent."""
        return [dump_json(self.fields)]

    def forget_content(self) -> None:
        """Release the content."""
        self.fields.clear()


class ParsedCompletion(ParsedText):
    """A parsed request to `/v1/completions`."""

    def address_to(self, target: Target) -> None:
        """Rewrite the fields for the engine: its name for the model, and `include_usage` in streams."""
        super().address_to(target)
        if self.stream:
            ask_for_usage(self.fields, usage_wanted=self.usage_wanted)

    def reader(self, savings: Savings | None) -> EventStream:
        """Return the parser for the engine's stream."""
        return ChatStream(savings=savings, usage_wanted=self.usage_wanted)


@dataclass
class ParsedResponse(ParsedText):
    """A parsed request to `/v1/responses`."""

    media: list[MediaPart] = field(default_factory=list)

    @property
    def has_media(self) -> bool:
        """Whether it holds images."""
        return bool(self.media)

    def address_to(self, target: Target) -> None:
        """Rewrite the fields for the engine: its name for the model, and `store` off.

        A response stored at the engine would not be protected by the tenant's key.
        """
        super().address_to(target)
        self.fields["store"] = False

    def reader(self, savings: Savings | None) -> EventStream:
        """Return the parser for the engine's stream. `savings` is unused, because there are no videos."""
        del savings
        return ResponseStream()


def parse_completion_request(body: bytes | bytearray) -> ParsedCompletion:
    """Return the completion request in `body`; raise InvalidRequest if it is malformed."""
    fields = parse_json_object(body)
    _refuse_retention(fields)
    prompt = fields.get("prompt")
    if not isinstance(prompt, str | list):
        raise InvalidRequest("prompt must be a string or an array", param="prompt")
    if isinstance(prompt, list) and len(prompt) > MOST_PROMPTS and not isinstance(prompt[0], int):
        raise InvalidRequest(f"prompt must hold at most {MOST_PROMPTS} prompts, got {len(prompt)}", param="prompt")
    return ParsedCompletion(fields, *read_stream_fields(fields))


def parse_response_request(body: bytes | bytearray) -> ParsedResponse:
    """Return the request for a response in `body`, with its images.

    Raises InvalidRequest if the request is malformed, and ForbiddenField for other media and for tools of the engine.
    """
    fields = parse_json_object(body)
    _refuse_retention(fields)
    given = fields.get("input")
    if not isinstance(given, str | list):
        raise InvalidRequest("input must be a string or an array", param="input")
    media = [image for where, part in _objects(given, "input") for image in _images(part, where)]
    tools = fields.get("tools")
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise ForbiddenField("tools must be of type function", param=f"tools[{i}].type")
    return ParsedResponse(fields, *read_stream_fields(fields), media=media)


def _refuse_retention(fields: dict[str, Any]) -> None:
    if fields.get("aot") is not None:
        raise InvalidRequest("aot has no effect here: send videos to /v1/chat/completions", param="aot")


def _objects(value: object, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every object in `value` with its path, at any depth, because engines also read parts without a `type`."""
    waiting = [(where, value)]
    while waiting:
        where, item = waiting.pop()
        if isinstance(item, dict):
            yield where, item
            waiting += [(f"{where}.{key}", below) for key, below in item.items() if isinstance(below, dict | list)]
        elif isinstance(item, list):
            waiting += [(f"{where}[{i}]", below) for i, below in enumerate(item)]


def _images(part: dict[str, Any], where: str) -> Iterator[MediaPart]:
    """Yield the image in an object, if it has one; raise ForbiddenField if the object holds another medium."""
    kind = part.get("type")
    if isinstance(kind, str) and ("video" in kind or "audio" in kind or "file" in kind or kind.endswith("_embeds")):
        _send_to_chat(where)
    for name, value in part.items():
        if value is None or name == "image_url":
            continue
        if name.endswith(("_url", "_embeds")) or name in ("url", "input_audio", "file_id", "file_data", "uuid"):
            _send_to_chat(f"{where}.{name}")
    image = part.get("image_url")
    if isinstance(image, str):
        yield MediaPart("image", "url", image, f"{where}.image_url", part, part, "image_url")
    elif image is not None:
        raise InvalidRequest(f"{where}.image_url must be a string", param=f"{where}.image_url"[:200])


def _send_to_chat(where: str) -> NoReturn:
    raise ForbiddenField(
        "image_url is the only media field accepted here; send videos and other media to /v1/chat/completions",
        param=where[:200],
    )
