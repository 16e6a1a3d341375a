"""`POST /v1/chat/completions`: the one that takes videos."""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from server.admission.buffers import Buffer
from server.aliases import Alias
from server.media.intake import Intake
from server.media.llm_d import video_headers
from server.observe.record import RequestRecord
from server.requests.chat import ChatRequest, parse_chat_request
from server.routes.generation import Generation

PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class ChatCompletions(Generation[ChatRequest]):
    """The endpoint."""

    path = PATH
    length_fields = ("max_completion_tokens", "max_tokens")

    intake: Intake
    llm_d_headers: bool

    def parse(self, body: bytes | bytearray) -> ChatRequest:
        """Return the chat request in `body`."""
        return parse_chat_request(body, chat_template_kwargs=self.chat_template_kwargs)

    def check(self, request: ChatRequest, alias: Alias) -> None:
        """Refuse a retention that the alias does not allow before any video is fetched."""
        alias.retention_for(request.retention)

    def prepared(
        self, request: ChatRequest, record: RequestRecord, buffer: Buffer
    ) -> AbstractAsyncContextManager[None]:
        """Take in the request's media."""
        return self.intake.taken(request.media, record, buffer)

    def describe(self, request: ChatRequest, alias: Alias, record: RequestRecord) -> None:
        """Tell llm-d's router of the longest video."""
        if self.llm_d_headers and record.longest_video is not None:
            retention = alias.retention_for(request.retention)
            record.engine_headers.update(video_headers(record.longest_video, retention=retention))
