"""Parses the requests of `/v1/completions`, and what they have in common with those of `/v1/responses`."""

from dataclasses import dataclass, field
from typing import Any

from server.aliases import Asked, Target
from server.engines.savings import Savings
from server.engines.streams import ChatStream, EventStream
from server.errors import InvalidRequest
from server.requests.fields import (
    ask_for_usage,
    dump_json,
    parse_json_object,
    read_stream_fields,
)
from server.requests.knobs import CODE, VIDEO_FIELDS, refuse_idle_fields

MOST_PROMPTS = 64


@dataclass
class ParsedText:
    """A parsed request: all its fields, and the values that the gateway has read from them."""

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
        return ChatStream(savings=savings, usage_wanted=self.usage_wanted, model=self.model)


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


def _refuse_retention(fields: dict[str, Any]) -> None:
    for name in ("aot", *VIDEO_FIELDS):
        if fields.get(name) is not None:
            raise InvalidRequest(
                f"{name} has no effect here: send videos to /v1/chat/completions or /v1/responses",
                param=name,
                code=None if name == "aot" else CODE,
            )
    refuse_idle_fields(fields, has_video=False)
