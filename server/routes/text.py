"""`POST /v1/completions` and `POST /v1/responses`: passed through, but for the images of responses."""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from server.admission.buffers import Buffer
from server.media.intake import Intake
from server.observe.record import RequestRecord
from server.requests.text import (
    CompletionRequest,
    ResponseRequest,
    parse_completion_request,
    parse_response_request,
)
from server.routes.generation import Generation


class Completions(Generation[CompletionRequest]):
    """The older endpoint: a prompt, no chat."""

    path = "/v1/completions"

    def parse(self, body: bytes | bytearray) -> CompletionRequest:
        """Return the completion request in `body`."""
        return parse_completion_request(body, chat_template_kwargs=self.chat_template_kwargs)


@dataclass(frozen=True)
class Responses(Generation[ResponseRequest]):
    """The newer endpoint, without what engines would keep between requests."""

    path = "/v1/responses"
    length_fields = ("max_output_tokens",)

    intake: Intake

    def parse(self, body: bytes | bytearray) -> ResponseRequest:
        """Return the request for a response in `body`."""
        return parse_response_request(body, chat_template_kwargs=self.chat_template_kwargs)

    def prepared(
        self, request: ResponseRequest, record: RequestRecord, buffer: Buffer
    ) -> AbstractAsyncContextManager[None]:
        """Take in the request's images."""
        return self.intake.taken(request.media, record, buffer)
