"""`POST /v1/video/tokens`: what the videos of a chat request would cost, without generating anything."""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from server.aliases import Target
from server.engines.exchange import Call
from server.engines.pool import EnginePool
from server.engines.profile import VideoRules
from server.errors import EngineFailed, FetchFailed, InvalidRequest, MediaRefused, RetentionRefused, SamplingRefused
from server.media.intake import Taken
from server.media.shape import VideoShape
from server.openapi import BY_ENGINES, RawRoute
from server.reader.facts import Facts
from server.requests.chat import ParsedChat
from server.requests.prompt import text_prompt
from server.requests.retention import settle_retention
from server.routes.answer import Answer
from server.routes.bodies import ChatCompletionRequest
from server.routes.chat import ChatCompletions
from server.routes.generation import Passage

Count = Annotated[int, Field(ge=0)]


class TokenCounts(BaseModel):
    """Video tokens before and after the reduction."""

    before: Count
    after: Count


class FrameSize(BaseModel):
    """A size in pixels."""

    width: Count
    height: Count


class CountedVideo(BaseModel):
    """One video: what it holds, what the model would be given of it, and the tokens that become of it."""

    duration: Annotated[float, Field(ge=0, description="seconds that the pictures last")]
    fps: float
    source_frames: Annotated[Count, Field(description="frames that the video shows")]
    source_size: Annotated[FrameSize, Field(description="as displayed")]
    frames: Annotated[Count, Field(description="frames that are sampled")]
    size: Annotated[FrameSize, Field(description="the size that the model's processor makes of a frame")]
    video_tokens: TokenCounts


class VideoTokenCount(BaseModel):
    """What the videos of a request cost, in the order in which the request holds them."""

    object: Literal["video.tokens"] = "video.tokens"
    model: str
    retention: float
    video_tokens: Annotated[TokenCounts, Field(description="of all videos together, as the engine would report them")]
    prompt_tokens: Annotated[Count, Field(description="an estimate for the whole prompt after the reduction")]
    context_length: Annotated[int | None, Field(description="the most tokens of prompt and answer together")]
    videos: list[CountedVideo]


@dataclass(frozen=True)
class VideoTokens(ChatCompletions):
    """The endpoint that counts. A request is read, admitted and limited as the chat request that it is."""

    path = "/v1/video/tokens"

    pool: EnginePool

    async def _serve(self, passage: Passage[ParsedChat], answer: Answer) -> bytes:
        request, record = passage.request, passage.record
        if not request.has_video:
            raise InvalidRequest("the messages hold no video whose tokens could be counted", param="messages")
        async with self.taken_in(passage) as taken:
            rules = taken.rules
            profile = None if rules is None else self.pool.profile(passage.target.engine_model, rules)
            if rules is None or profile is None:
                raise InvalidRequest(
                    "the tokens of videos can't be counted for this model: its engines don't tell how they count",
                    param="model",
                    code="video_tokens_unknown",
                )
            target = settle_retention(passage.target, rules, taken.shapes)
            reduction = profile.reduction
            asked = reduction.retention if target.retention is None else target.retention
            retention = asked if reduction.active else 1.0
            text_tokens = await self._text_tokens(passage, target, taken)
            videos = [
                _counted(facts, shape, rules, retention)
                for facts, shape in zip(taken.videos, taken.shapes, strict=True)
            ]
            after = sum(video.video_tokens.after for video in videos)
            counted = VideoTokenCount(
                model=record.model,
                retention=retention,
                video_tokens=TokenCounts(before=sum(video.video_tokens.before for video in videos), after=after),
                prompt_tokens=text_tokens + after + sum(shape.text_around(rules) for shape in taken.shapes),
                context_length=profile.context_length,
                videos=videos,
            )
        return answer.whole(counted.model_dump_json().encode())

    async def _text_tokens(self, passage: Passage[ParsedChat], target: Target, taken: Taken) -> int:
        """Return how many tokens the prompt has without its videos, as an engine of the model counts them."""
        call = Call(
            path="/tokenize",
            model=target.engine_model,
            is_stream=False,
            has_video=False,
            has_media=passage.request.has_media,
            reader=passage.request.reader,
            sender=passage.sender,
            rules=taken.rules,
        )
        body = text_prompt(passage.request, target)
        passage.buffer.resize(sum(map(len, body)))
        with ExitStack() as held:
            exchange = await self.exchanges.exchange(call, body, passage.record, held)
            content = await exchange.read()
            exchange.complete()
        try:
            count = json.loads(content)["count"]
        except (ValueError, KeyError, TypeError):
            count = None
        if not isinstance(count, int):
            raise EngineFailed("the engine's count of tokens could not be read")
        return count

    @property
    def route(self) -> RawRoute:
        """The route to the endpoint."""
        return RawRoute(
            self.path,
            self,
            count_video_tokens,
            summary="Count the tokens that the videos of a chat request become; nothing is generated",
            kinds=(*BY_ENGINES, RetentionRefused, SamplingRefused, MediaRefused, FetchFailed),
            headers={},
            streams=False,
        )


def _counted(facts: Facts, shape: VideoShape, rules: VideoRules, retention: float) -> CountedVideo:
    height, width = shape.model_size(rules)
    return CountedVideo(
        duration=facts.duration_seconds,
        fps=facts.fps,
        source_frames=facts.frames,
        source_size=FrameSize(width=facts.width, height=facts.height),
        frames=shape.frames,
        size=FrameSize(width=width, height=height),
        video_tokens=TokenCounts(before=shape.tokens_before(rules), after=shape.tokens_after(rules, retention)),
    )


def count_video_tokens(body: ChatCompletionRequest) -> VideoTokenCount:
    """Give the endpoint its schema in the OpenAPI document; never called."""
    raise NotImplementedError
