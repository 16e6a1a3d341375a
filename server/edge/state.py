"""The record, the caller and the allowance of a request: stored in its ASGI scope by middleware, read by routes."""

from collections.abc import Mapping

from starlette.types import Scope

from server.admission.auth import ANYONE, Caller
from server.admission.quotas import Allowance
from server.observe.record import RequestRecord

_RECORD, _CALLER, _ALLOWANCE = "aot_record", "aot_caller", "aot_allowance"


def set_record(scope: Scope, record: RequestRecord) -> None:
    """Store the request's record."""
    scope.setdefault("state", {})[_RECORD] = record


def record_of(scope: Scope) -> RequestRecord:
    """Return the request's record."""
    record: RequestRecord = scope["state"][_RECORD]
    return record


def set_caller(scope: Scope, caller: Caller) -> None:
    """Store who sent the request."""
    scope["state"][_CALLER] = caller


def caller_of(scope: Scope) -> Caller:
    """Return who sent the request. This is ANYONE if the request needed no key."""
    caller: Caller = scope["state"].get(_CALLER, ANYONE)
    return caller


def sender_of(scope: Scope) -> str:
    """Return whom a request is from, as far as the gateway can tell: its tenant or, without tenants, its address."""
    client = scope.get("client")
    return caller_of(scope).tenant or (client[0] if client else "")


def set_allowance(scope: Scope, allowance: Allowance) -> None:
    """Store the request's allowance: what it takes from its tenant's limits."""
    scope["state"][_ALLOWANCE] = allowance


def allowance_of(scope: Scope) -> Allowance:
    """Return the request's allowance: what it takes from its tenant's limits."""
    allowance: Allowance = scope["state"][_ALLOWANCE]
    return allowance


def limit_headers_of(scope: Scope) -> Mapping[str, str]:
    """Return the `x-ratelimit-*` headers. They are empty if the request ended before its limits were looked up."""
    allowance: Allowance | None = scope["state"].get(_ALLOWANCE)
    return {} if allowance is None else allowance.headers
