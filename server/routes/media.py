"""The common part of the endpoints that accept media."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

from server.media.intake import Intake, Taken
from server.media.part import MediaPart
from server.requests.outgoing import ParsedRequest
from server.requests.retention import answer_tokens, telling_what_fits
from server.routes.generation import Passage


class WithMedia(ParsedRequest, Protocol):
    """A parsed request that may hold media."""

    media: list[MediaPart]


R = TypeVar("R", bound=WithMedia)


@asynccontextmanager
async def media_taken_in(intake: Intake, passage: Passage[R], length_fields: Sequence[str]) -> AsyncIterator[Taken]:
    """Take in the request's media until the block ends, and say what would fit if the prompt is too long by them."""
    request = passage.request
    answer = answer_tokens(request.fields, length_fields)
    async with intake.taken(
        request.media,
        target=passage.target,
        tenant=passage.caller.tenant,
        record=passage.record,
        buffer=passage.buffer,
    ) as taken:
        with telling_what_fits(passage.target, taken, answer=answer):
            yield taken
