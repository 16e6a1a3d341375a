"""`POST /v1/completions` and `POST /v1/responses`: passed through, except for videos and images, which are taken in."""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from server.errors import FetchFailed, MediaRefused, RetentionRefused, SamplingRefused
from server.media.intake import Intake, Taken
from server.openapi import BY_ENGINES, SAVINGS, RawRoute
from server.requests.response import ParsedResponse, parse_response_request
from server.requests.text import ParsedCompletion, parse_completion_request
from server.routes.bodies import CompletionRequest, Passed, Response, ResponseRequest
from server.routes.generation import Generation, Passage
from server.routes.media import media_taken_in


@dataclass(frozen=True)
class Completions(Generation[ParsedCompletion]):
    """The endpoint for completions of a text prompt."""

    path = "/v1/completions"

    def parse(self, body: bytes | bytearray) -> ParsedCompletion:
        """Return the completion request in `body`."""
        return parse_completion_request(body)

    @property
    def route(self) -> RawRoute:
        """The route to the endpoint."""
        summary = "Continue a text, whole or as a stream"
        return RawRoute(self.path, self, create_completion, summary=summary, kinds=BY_ENGINES, headers={})


@dataclass(frozen=True)
class Responses(Generation[ParsedResponse]):
    """The endpoint for responses, without the features for which engines would store responses."""

    path = "/v1/responses"
    length_fields = ("max_output_tokens",)

    intake: Intake

    def parse(self, body: bytes | bytearray) -> ParsedResponse:
        """Return the request for a response in `body`."""
        return parse_response_request(body)

    def taken_in(self, passage: Passage[ParsedResponse]) -> AbstractAsyncContextManager[Taken]:
        """Take in the videos and images of the request."""
        return media_taken_in(self.intake, passage, self.length_fields)

    @property
    def route(self) -> RawRoute:
        """The route to the endpoint."""
        summary = "Answer a conversation about videos, whole or as a stream; nothing is stored"
        kinds = (*BY_ENGINES, RetentionRefused, SamplingRefused, MediaRefused, FetchFailed)
        return RawRoute(self.path, self, create_response, summary=summary, kinds=kinds, headers=SAVINGS)


def create_completion(body: CompletionRequest) -> Passed:
    """Give the endpoint its schema in the OpenAPI document; never called."""
    raise NotImplementedError


def create_response(body: ResponseRequest) -> Response:
    """Give the endpoint its schema in the OpenAPI document; never called."""
    raise NotImplementedError
