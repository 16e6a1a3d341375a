"""The common part of the endpoints that accept media."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Protocol, TypeVar

from server.media.intake import NOTHING, Intake, Taken
from server.media.part import MediaPart
from server.requests.outgoing import ParsedRequest
from server.requests.retention import answer_tokens, telling_what_fits
from server.routes.generation import Passage


class WithMedia(ParsedRequest, Protocol):
    """A parsed request that may hold media."""

    media: list[MediaPart]


R = TypeVar("R", bound=WithMedia)


def media_taken_in(
    intake: Intake, passage: Passage[R], length_fields: Sequence[str]
) -> AbstractAsyncContextManager[Taken]:
    """Take in the request's media until the block ends, and say what would fit if the prompt is too long by them."""
    return _taken_in(intake, passage, length_fields) if passage.request.media else nullcontext(NOTHING)


@asynccontextmanager
async def _taken_in(intake: Intake, passage: Passage[R], length_fields: Sequence[str]) -> AsyncIterator[Taken]:
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
