"""Parsers of completion and response requests: the fields that the gateway reads, and the images in responses."""

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
    """A request without videos as parsed, and what was read from it."""

    fields: dict[str, Any] = field(repr=False)
    model: str
    stream: bool
    usage_wanted: bool
    asked: Asked = Asked()  # noqa: RUF009 - it is frozen
    has_video: bool = False

    def address_to(self, target: Target) -> None:
        """Rewrite for the engine: its name for the model."""
        self.fields["model"] = target.engine_model

    def serialise(self) -> list[bytes | memoryview]:
        """Return the request as JSON; raise InvalidRequest for what JSON can't carry."""
        return [dump_json(self.fields)]

    def forget_content(self) -> None:
        """Let go of the content."""
        self.fields.clear()


class ParsedCompletion(ParsedText):
    """A request for a completion."""

    def address_to(self, target: Target) -> None:
        """Rewrite for the engine: its name for the model, and the usage in any case."""
        super().address_to(target)
        if self.stream:
            ask_for_usage(self.fields, usage_wanted=self.usage_wanted)

    def reader(self, savings: Savings | None) -> EventStream:
        """Return what reads the engine's stream."""
        return ChatStream(savings=savings, usage_wanted=self.usage_wanted)


@dataclass
class ParsedResponse(ParsedText):
    """A request for a response."""

    media: list[MediaPart] = field(default_factory=list)

    def address_to(self, target: Target) -> None:
        """Rewrite for the engine: its name for the model, and nothing to be kept there, where no key would guard it."""
        super().address_to(target)
        self.fields["store"] = False

    def reader(self, savings: Savings | None) -> EventStream:
        """Return what reads the engine's stream; without videos there are no savings."""
        del savings
        return ResponseStream()


def parse_completion_request(body: bytes | bytearray) -> ParsedCompletion:
    """Return the completion request in `body`; raise InvalidRequest or ForbiddenField."""
    fields = parse_json_object(body)
    _refuse_retention(fields)
    prompt = fields.get("prompt")
    if not isinstance(prompt, str | list):
        raise InvalidRequest("prompt must be a string or an array", param="prompt")
    if isinstance(prompt, list) and len(prompt) > MOST_PROMPTS and not isinstance(prompt[0], int):
        raise InvalidRequest(f"prompt must hold at most {MOST_PROMPTS} prompts, got {len(prompt)}", param="prompt")
    return ParsedCompletion(fields, *read_stream_fields(fields))


def parse_response_request(body: bytes | bytearray) -> ParsedResponse:
    """Return the request for a response in `body`, with its images; raise InvalidRequest or ForbiddenField."""
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
        raise InvalidRequest("aot has no effect here: videos are taken at /v1/chat/completions", param="aot")


def _objects(value: object, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every object in `value` with its place, whatever it stands in: engines read parts without a type too."""
    waiting = [(where, value)]
    while waiting:
        where, item = waiting.pop()
        if isinstance(item, dict):
            yield where, item
            waiting += [(f"{where}.{key}", below) for key, below in item.items() if isinstance(below, dict | list)]
        elif isinstance(item, list):
            waiting += [(f"{where}[{i}]", below) for i, below in enumerate(item)]


def _images(part: dict[str, Any], where: str) -> Iterator[MediaPart]:
    """Yield the image that an object holds; raise ForbiddenField if it holds other media."""
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
        "of media, only images by image_url are taken here; send videos and others to /v1/chat/completions",
        param=where[:200],
    )
