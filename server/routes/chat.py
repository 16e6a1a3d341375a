"""`POST /v1/chat/completions`: the endpoint that accepts videos."""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from server.aliases import Target
from server.errors import FetchFailed, MediaRefused, RetentionRefused, SamplingRefused
from server.media.intake import Intake, Taken
from server.media.llm_d import video_headers
from server.openapi import BY_ENGINES, SAVINGS, RawRoute
from server.requests.chat import ParsedChat, parse_chat_request
from server.routes.bodies import ChatCompletion, ChatCompletionRequest
from server.routes.generation import Generation, Passage
from server.routes.media import media_taken_in


@dataclass(frozen=True)
class ChatCompletions(Generation[ParsedChat]):
    """The endpoint for chat completions."""

    path = "/v1/chat/completions"
    length_fields = ("max_completion_tokens", "max_tokens")

    intake: Intake
    llm_d_headers: bool

    def parse(self, body: bytes | bytearray) -> ParsedChat:
        """Return the chat request in `body`."""
        return parse_chat_request(body)

    def taken_in(self, passage: Passage[ParsedChat]) -> AbstractAsyncContextManager[Taken]:
        """Take in the request's videos, images and audio clips."""
        return media_taken_in(self.intake, passage, self.length_fields)

    def engine_headers(self, target: Target, taken: Taken) -> Mapping[str, str]:
        """Return headers that describe the longest video to llm-d's router, if they are enabled."""
        if not self.llm_d_headers or taken.longest_video is None:
            return {}
        return video_headers(taken.longest_video, retention=target.retention)

    @property
    def route(self) -> RawRoute:
        """The route to the endpoint."""
        return RawRoute(
            self.path,
            self,
            create_chat_completion,
            summary="Answer a conversation about videos, whole or as a stream",
            kinds=(*BY_ENGINES, RetentionRefused, SamplingRefused, MediaRefused, FetchFailed),
            headers=SAVINGS,
        )


def create_chat_completion(body: ChatCompletionRequest) -> ChatCompletion:
    """Give the endpoint its schema in the OpenAPI document; never called."""
    raise NotImplementedError
