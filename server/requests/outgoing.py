"""A request on its way out to its engine: addressed, bounded, kept apart from other tenants', and written as JSON."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

from server.aliases import Asked, Target
from server.engines.savings import Savings
from server.engines.streams import EventStream


class ParsedRequest(Protocol):
    """What the requests of all generating endpoints can do, once they are parsed."""

    fields: dict[str, Any]
    model: str
    stream: bool
    asked: Asked
    """What the request wants of the reduction and the sampling."""

    @property
    def has_video(self) -> bool:
        """Whether any part is a video."""

    def address_to(self, target: Target) -> None:
        """Rewrite the fields for the engine."""

    def serialise(self) -> list[bytes | memoryview]:
        """Return the request as JSON, in pieces."""

    def forget_content(self) -> None:
        """Let go of the content, which may hold megabytes; what was read from it stays."""

    def reader(self, savings: Savings | None) -> EventStream:
        """Return what reads the engine's stream."""


def outgoing(
    request: ParsedRequest,
    target: Target,
    *,
    tenant: str,
    length_fields: Sequence[str],
    max_output_tokens: int | None,
) -> list[bytes | memoryview]:
    """Return the request as its engine gets it, as JSON in pieces; its content is let go.

    `length_fields` are the names by which a request of this kind bounds its answer.
    Raises InvalidRequest for what JSON can't carry.
    """
    request.address_to(target)
    bound_length(request.fields, length_fields, max_output_tokens)
    isolate(request.fields, tenant)
    body = request.serialise()
    request.forget_content()
    return body


def bound_length(fields: dict[str, Any], length_fields: Sequence[str], max_output_tokens: int | None) -> None:
    """Set the operator's bound on the answer's length in a request that names none."""
    if max_output_tokens is not None and length_fields and all(fields.get(name) is None for name in length_fields):
        fields[length_fields[0]] = max_output_tokens


def isolate(fields: dict[str, Any], tenant: str) -> None:
    """Salt the engine's prefix cache with the tenant: the speed of an answer then tells nothing about other tenants.

    The salt needs no secret: a tenant can't choose the salt that reaches the engine, only refine its own.
    """
    if tenant:
        refined = f"{tenant}\0{fields.get('cache_salt') or ''}"
        fields["cache_salt"] = hashlib.sha256(refined.encode(errors="replace")).hexdigest()
