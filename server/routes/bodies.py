"""The bodies of the generating endpoints, for the OpenAPI document only. Requests are read by the parsers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.requests.parameters import OPERATOR_FIELDS


class Retention(BaseModel):
    """The options for the reduction of video tokens."""

    model_config = ConfigDict(extra="forbid")

    retention: Annotated[float | None, Field(gt=0, le=1)] = None
    """The share of video tokens to keep, within the bounds of the model."""


class MediaURL(BaseModel):
    """The URL of a medium."""

    url: str


class VideoPart(BaseModel):
    """A video, as an https URL or a data URL."""

    model_config = ConfigDict(extra="allow")

    type: Literal["video_url"]
    video_url: MediaURL


class ChatMessage(BaseModel):
    """A message of the conversation. Fields that are not described here pass through to the engine."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[VideoPart | dict[str, Any]] | None = None


class ChatCompletionRequest(BaseModel):
    """OpenAI's chat completion request. Fields that are not described here pass through to the engine."""

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
    """OpenAI's completion request. Fields that are not described here pass through to the engine."""

    model_config = ChatCompletionRequest.model_config

    model: Annotated[str, Field(min_length=1)]
    prompt: str | list[Any]
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None


class ResponseRequest(BaseModel):
    """OpenAI's response request, without videos. Fields that are not described here pass through to the engine."""

    model_config = ChatCompletionRequest.model_config

    model: Annotated[str, Field(min_length=1)]
    input: str | list[Any]
    stream: bool | None = None


class VideoTokens(BaseModel):
    """The video tokens before and after the reduction, summed over the request's videos, as the engine counts them."""

    before: Annotated[int, Field(ge=1)]
    after: Annotated[int, Field(ge=0)]
    retention: Annotated[float, Field(ge=0, le=1)]


class Usage(BaseModel):
    """The token counts from the engine. `video_tokens` is present if the engine reported them."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"required": []})

    video_tokens: VideoTokens | None = None


class ChatCompletion(BaseModel):
    """The engine's answer, with the saved video tokens in its usage."""

    model_config = ConfigDict(extra="allow")

    choices: list[dict[str, Any]]
    usage: Usage | None = None


class Passed(BaseModel):
    """The engine's answer, unchanged."""

    model_config = ConfigDict(extra="allow")

    usage: dict[str, Any] | None = None
