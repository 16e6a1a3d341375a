"""`POST /v1/chat/completions`: the one that takes videos."""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from server.aliases import Alias
from server.media.intake import Intake
from server.record import RequestRecord
from server.routes.generation import Generation
from server.schemas import ChatRequest, parse_chat_request

PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class ChatCompletions(Generation[ChatRequest]):
    """The endpoint."""

    path = PATH
    length_fields = ("max_completion_tokens", "max_tokens")

    intake: Intake

    def parse(self, body: bytes) -> ChatRequest:
        """Return the chat request in `body`."""
        return parse_chat_request(body, chat_template_kwargs=self.chat_template_kwargs)

    def check(self, request: ChatRequest, alias: Alias) -> None:
        """Refuse a retention that the alias does not allow before any video is fetched."""
        alias.retention_for(request.retention)

    def prepared(self, request: ChatRequest, record: RequestRecord) -> AbstractAsyncContextManager[None]:
        """Take in the request's media."""
        return self.intake.taken(request, record)
