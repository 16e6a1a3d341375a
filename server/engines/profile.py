"""What an engine tells of itself (`GET /v1/aot/engine`): how it samples, sizes and counts a video.

An engine without the plugin, or with another version of the frames format, tells nothing that can be used here. It is
handed videos as they are.
"""

import math
from bisect import bisect_left
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

PATH: Final = "/v1/aot/engine"
FRAMES_FORMAT: Final = 1

Count = Annotated[int, Field(ge=1)]


class _Told(BaseModel):
    """A part of what is told; later versions of the plugin may tell more."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class UniformSampling(_Told):
    """The smaller of `num_frames` frames and `fps` frames a second, evenly spread over the video; None is no bound."""

    rule: Literal["uniform"]
    num_frames: Count | None
    fps: Annotated[float, Field(gt=0)] | None = None

    def spec(self, max_frames: int | None) -> dict[str, Any]:
        """Return the rule as the reader takes it, with at most `max_frames` frames."""
        counts = [count for count in (self.num_frames, max_frames) if count is not None]
        return {"rule": self.rule, "num_frames": min(counts, default=-1), "fps": self.fps or -1}


class Qwen2Sampling(_Told):
    """`fps` frames a second, within bounds, in multiples of `frame_factor`: Qwen2-VL and Qwen2.5-VL."""

    rule: Literal["qwen2_vl"]
    fps: Annotated[float, Field(gt=0)]
    min_frames: Count
    max_frames: Count
    frame_factor: Count = 2

    def spec(self, max_frames: int | None) -> dict[str, Any]:
        """Return the rule as the reader takes it, with at most `max_frames` frames."""
        return {**self.model_dump(), "max_frames": min(self.max_frames, max_frames or self.max_frames)}


class Qwen3Sampling(_Told):
    """`fps` frames a second, within bounds: Qwen3-VL and Qwen3.5."""

    rule: Literal["qwen3_vl"]
    fps: Annotated[float, Field(gt=0)]
    min_frames: Count
    max_frames: Count

    def spec(self, max_frames: int | None) -> dict[str, Any]:
        """Return the rule as the reader takes it, with at most `max_frames` frames."""
        return {**self.model_dump(), "max_frames": min(self.max_frames, max_frames or self.max_frames)}


class FixedSize(_Told):
    """Every frame is made this large."""

    rule: Literal["fixed"]
    height: Count
    width: Count


class SmartResize(_Told):
    """Sides are multiples of `factor`, and the pixels of a frame or of the video lie within bounds."""

    rule: Literal["smart_resize"]
    factor: Count
    min_pixels: Count
    max_pixels: Count
    over: Literal["frame", "video"]
    temporal_factor: Count = 1


class _Tokens(_Told):
    """The common part of the rules of tokens."""

    frames_per_unit: Count
    extra: Annotated[int, Field(ge=0)] = 0
    """Video tokens that belong to no unit of frames."""
    text_per_video: Annotated[int, Field(ge=0)] = 0
    """Text tokens around a video, about."""
    text_per_unit: Annotated[int, Field(ge=0)] = 0
    """Text tokens around each unit of frames, about."""


class ConstantTokens(_Tokens):
    """So many tokens for each unit of frames."""

    rule: Literal["constant"]
    per_unit: Count


class GridTokens(_Tokens):
    """A token for each cell of a frame, which is `cell` pixels wide and high."""

    rule: Literal["grid"]
    cell: Count


Sampling = Annotated[UniformSampling | Qwen2Sampling | Qwen3Sampling, Field(discriminator="rule")]
Size = Annotated[FixedSize | SmartResize, Field(discriminator="rule")]
Tokens = Annotated[ConstantTokens | GridTokens, Field(discriminator="rule")]


class VideoRules(_Told):
    """All that decides which frames of a video a model looks at, how large, and how many tokens they become."""

    sampling: Sampling
    size: Size
    tokens: Tokens
    max_frames: Count


class Reduction(_Told):
    """Whether the engine reduces videos, and to which share of their tokens unless a request says otherwise."""

    active: bool = False
    retention: Annotated[float, Field(gt=0, le=1)] = 1.0
    preset: str | None = None
    presets: tuple[str, ...] = ()
    """The presets that a request may name."""
    settings: dict[str, Any] | None = None


class Versions(_Told):
    """The versions of what an engine runs."""

    aot_vllm: str | None = None
    vllm: str | None = None


class PrefillCost(_Told):
    """What the engine measured of its prefill: the time to the first token after prompts of text, by their length."""

    tokens: Annotated[tuple[Count, ...], Field(min_length=1)]
    seconds: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
    reduction_seconds_per_token: Annotated[float, Field(ge=0)] | None = None
    """The time of reductions for each token before them. None if the engine has reduced no video yet."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.tokens) != len(self.seconds) or list(self.tokens) != sorted(set(self.tokens)):
            raise ValueError("tokens must grow, with seconds for each")
        return self

    def seconds_of(self, tokens: float) -> float:
        """Return the time for a prompt of so many tokens, 0 for none.

        Between two lengths that were measured it grows by a power of the length. Beyond the longest it grows as the
        length does: prefill grows faster, so this is less than the truth.
        """
        if tokens <= 0:
            return 0.0
        place = bisect_left(self.tokens, tokens)
        if place == 0:
            return self.seconds[0]
        if place == len(self.tokens):
            return self.seconds[-1] * tokens / self.tokens[-1]
        low, high = self.tokens[place - 1 : place + 1]
        share = math.log(tokens / low) / math.log(high / low)
        return math.exp(math.log(self.seconds[place - 1]) * (1 - share) + math.log(self.seconds[place]) * share)


def _if_valid(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        return None


class EngineLimits(_Told):
    """How much an engine takes in one request; None is no limit."""

    videos: int | None = None
    media_decode_bytes: int | None = None


class EngineProfile(_Told):
    """One engine, as far as the gateway needs to know it."""

    frames_format: int
    reduction: Reduction = Reduction()
    architecture: str
    context_length: Count | None = None
    sampling: Sampling | None = None
    size: Size | None = None
    tokens: Tokens | None = None
    max_frames: Count | None = None
    versions: Versions = Versions()
    request_kwargs_trusted: bool | None = None
    prompt_tokens_details: bool | None = None
    limits: EngineLimits = EngineLimits()
    prefill: Annotated[PrefillCost | None, WrapValidator(_if_valid)] = None
    """What its prefill costs. None if the engine has not measured it."""

    @property
    def speaks_frames(self) -> bool:
        """Whether it takes frames in the format that the gateway writes."""
        return self.frames_format == FRAMES_FORMAT

    @property
    def video_rules(self) -> VideoRules | None:
        """The rules for handing over frames; None if this engine has to be handed videos as they are."""
        if not self.speaks_frames:
            return None
        if self.sampling is None or self.size is None or self.tokens is None or self.max_frames is None:
            return None
        return VideoRules(sampling=self.sampling, size=self.size, tokens=self.tokens, max_frames=self.max_frames)


def read_profile(content: Any) -> EngineProfile | None:
    """Return the profile in an engine's answer, None if it is none."""
    try:
        return EngineProfile.model_validate(content)
    except ValidationError:
        return None
