"""The bodies of the generating endpoints, for the OpenAPI document only. Requests are read by the parsers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.requests.parameters import OPERATOR_FIELDS

NEVER = (*OPERATOR_FIELDS, "extra_body", "retention")
"""Fields that no request may have."""


class VideoOptions(BaseModel):
    """What to look at in videos, and how many of their tokens to keep, within the bounds of the model."""

    model_config = ConfigDict(extra="forbid")

    retention: Annotated[float | None, Field(gt=0, le=1, description="the share of video tokens to keep")] = None
    tokens: Annotated[
        int | None, Field(ge=1, description="instead of a retention, a bound on the video tokens of all videos")
    ] = None
    frames: Annotated[int | None, Field(ge=1, description="the number of frames to sample")] = None
    fps: Annotated[float | None, Field(gt=0, description="instead of a number, frames a second to sample")] = None
    start: Annotated[float | None, Field(ge=0, description="seconds; frames are sampled from here on")] = None
    end: Annotated[float | None, Field(gt=0, description="seconds; frames are sampled up to here")] = None


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
        json_schema_extra={"not": {"anyOf": [{"required": [name]} for name in NEVER]}},
    )

    model: Annotated[str, Field(min_length=1)]
    messages: list[ChatMessage]
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    aot: VideoOptions | None = None


class CompletionRequest(BaseModel):
    """OpenAI's completion request. Fields that are not described here pass through to the engine."""

    model_config = ChatCompletionRequest.model_config

    model: Annotated[str, Field(min_length=1)]
    prompt: str | list[Any]
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None


class ResponseRequest(BaseModel):
    """OpenAI's response request. Fields that are not described here pass through to the engine."""

    model_config = ChatCompletionRequest.model_config

    model: Annotated[str, Field(min_length=1)]
    input: str | list[Any]
    stream: bool | None = None
    aot: VideoOptions | None = None


class VideoTokens(BaseModel):
    """The video tokens before and after the reduction, summed over the request's videos, as the engine counts them."""

    before: Annotated[int, Field(ge=1)]
    after: Annotated[int, Field(ge=0)]
    retention: Annotated[float, Field(ge=0, le=1)]
    cached: Annotated[int | None, Field(ge=1, description="how many the engine had in its prefix cache, at least")] = (
        None
    )


class Usage(BaseModel):
    """The token counts from the engine. `video_tokens` is present if the engine reported them."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"required": []})

    video_tokens: VideoTokens | None = None


class ChatCompletion(BaseModel):
    """The engine's answer, with the saved video tokens in its usage."""

    model_config = ConfigDict(extra="allow")

    choices: list[dict[str, Any]]
    usage: Usage | None = None


class Response(BaseModel):
    """The engine's response, with the saved video tokens in its usage."""

    model_config = ConfigDict(extra="allow")

    usage: Usage | None = None


class Passed(BaseModel):
    """The engine's answer, unchanged."""

    model_config = ConfigDict(extra="allow")

    usage: dict[str, Any] | None = None
