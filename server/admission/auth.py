"""Who asks: API keys to tenants, before anything else is read of a request."""

import hmac
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, TypeVar

from starlette.datastructures import Headers

from server.configuration import Configuration, Key
from server.errors import Unauthorized
from server.keys import digest_of

OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/openapi.json"})
METRICS_PATH = "/metrics"

Holder = TypeVar("Holder")


def _now() -> datetime:
    return datetime.now(UTC)


class KeyRing(Generic[Holder]):
    """Keys and their holders."""

    def __init__(self, keys: Iterable[tuple[Key, Holder]], *, clock: Callable[[], datetime] = _now) -> None:
        """Take each key with whom it stands for."""
        self._keys = tuple(keys)
        self._clock = clock

    def holder(self, headers: Headers) -> Holder:
        """Return whose key is in the `authorization` header; raise Unauthorized if it is nobody's or has expired."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized("an API key is needed, in an Authorization header: Bearer <key>")
        digest = digest_of(key.encode("latin-1"))  # as servers decode headers
        found = None
        for entry in self._keys:  # to the end, whichever fits: the time taken tells nothing
            if hmac.compare_digest(digest, entry[0].sha256):
                found = entry
        if found is None:
            raise Unauthorized("the API key is not a valid one")
        if not found[0].is_valid_at(self._clock()):
            raise Unauthorized("the API key has expired")
        return found[1]


@dataclass(frozen=True)
class Caller:
    """Who asks: a tenant, empty where the gateway is open, and the models that it may use, None for all of them."""

    tenant: str = ""
    models: Collection[str] | None = None


ANYONE = Caller()


def tenant_keys(configuration: Configuration) -> KeyRing[Caller] | None:
    """Return the tenants' keys; None if there are none, and the gateway is open to everybody."""
    if configuration.tenants is None:
        return None
    callers: Mapping[str, Caller] = {
        name: Caller(name, None if tenant.models is None else frozenset(tenant.models))
        for name, tenant in configuration.tenants.items()
    }
    return KeyRing((key, callers[name]) for name, tenant in configuration.tenants.items() for key in tenant.keys)


def metrics_keys(configuration: Configuration) -> KeyRing[None] | None:
    """Return the keys for reading metrics; None if anybody may."""
    keys = configuration.metrics_keys
    return None if keys is None else KeyRing((key, None) for key in keys)
