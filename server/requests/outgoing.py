"""Prepares a request for its engine: rewrites, bounds and serialises it, and isolates its tenant's prefix cache."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

from server.aliases import Asked, Target
from server.engines.savings import Savings
from server.engines.streams import EventStream


class ParsedRequest(Protocol):
    """The interface of parsed requests, common to all generating endpoints."""

    fields: dict[str, Any]
    model: str
    stream: bool
    asked: Asked
    """What the request wants of the reduction and the sampling."""

    @property
    def has_video(self) -> bool:
        """Whether at least one part is a video."""

    @property
    def has_media(self) -> bool:
        """Whether at least one part is a video, an image or an audio clip."""

    def address_to(self, target: Target) -> None:
        """Rewrite the fields for the engine."""

    def serialise(self) -> list[bytes | memoryview]:
        """Return the request as JSON, in pieces."""

    def forget_content(self) -> None:
        """Release the content, which may hold megabytes. The values read from it remain."""

    def reader(self, savings: Savings | None) -> EventStream:
        """Return the parser for the engine's stream."""


def outgoing(
    request: ParsedRequest,
    target: Target,
    *,
    tenant: str,
    length_fields: Sequence[str],
    max_output_tokens: int | None,
) -> list[bytes | memoryview]:
    """Return the request for the engine, as JSON in pieces, and release its content.

    `length_fields` are the fields in which this kind of request bounds the length of its answer.
    Raises InvalidRequest for a value that JSON can't represent.
    """
    request.address_to(target)
    bound_length(request.fields, length_fields, max_output_tokens)
    isolate(request.fields, tenant)
    body = request.serialise()
    request.forget_content()
    return body


def bound_length(fields: dict[str, Any], length_fields: Sequence[str], max_output_tokens: int | None) -> None:
    """Set the operator's bound on the answer's length, if the request has no bound of its own."""
    if max_output_tokens is not None and length_fields and all(fields.get(name) is None for name in length_fields):
        fields[length_fields[0]] = max_output_tokens


def isolate(fields: dict[str, Any], tenant: str) -> None:
    """Salt the engine's prefix cache with the tenant, so that cache hits reveal nothing about other tenants' requests.

    The salt needs no secret. A tenant can't choose the salt that reaches the engine: its own `cache_salt` is hashed
    together with its name.
    """
    if tenant:
        refined = f"{tenant}\0{fields.get('cache_salt') or ''}"
        fields["cache_salt"] = hashlib.sha256(refined.encode(errors="replace")).hexdigest()
