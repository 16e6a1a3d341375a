"""API keys: finds the caller that a key belongs to."""

import hmac
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, TypeVar

from starlette.datastructures import Headers

from server.configuration import Configuration, Key
from server.errors import Unauthorized
from server.keys import digest_of

Holder = TypeVar("Holder")


def _now() -> datetime:
    return datetime.now(UTC)


class KeyRing(Generic[Holder]):
    """A set of API keys, each with its holder."""

    def __init__(self, keys: Iterable[tuple[Key, Holder]], *, clock: Callable[[], datetime] = _now) -> None:
        """Take the pairs of a key and its holder. `clock` returns the current time, for keys that expire."""
        self._keys = tuple(keys)
        self._clock = clock

    def holder(self, headers: Headers) -> Holder:
        """Return the holder of the key in the `authorization` header.

        Raises Unauthorized if the header holds no key, or if the key is unknown or has expired.
        """
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized("an API key is needed, in an Authorization header: Bearer <key>")
        digest = digest_of(key.encode("latin-1"))  # undoes Starlette's decoding of header bytes
        found = None
        for entry in self._keys:  # always compares with every key, so that the response time reveals nothing
            if hmac.compare_digest(digest, entry[0].sha256):
                found = entry
        if found is None:
            raise Unauthorized("the API key is not a valid one")
        if not found[0].is_valid_at(self._clock()):
            raise Unauthorized("the API key has expired")
        return found[1]


@dataclass(frozen=True)
class Caller:
    """Who sent a request: the tenant, and the models it may use (None: all of them).

    The tenant is empty if the gateway needs no keys.
    """

    tenant: str = ""
    models: Collection[str] | None = None


ANYONE = Caller()


def tenant_keys(configuration: Configuration) -> KeyRing[Caller] | None:
    """Return the tenants' keys. None if there are no tenants, so that the API needs no key."""
    if configuration.tenants is None:
        return None
    callers: Mapping[str, Caller] = {
        name: Caller(name, None if tenant.models is None else frozenset(tenant.models))
        for name, tenant in configuration.tenants.items()
    }
    return KeyRing((key, callers[name]) for name, tenant in configuration.tenants.items() for key in tenant.keys)


def metrics_keys(configuration: Configuration) -> KeyRing[None] | None:
    """Return the keys for `/metrics`. None if reading metrics needs no key."""
    keys = configuration.metrics_keys
    return None if keys is None else KeyRing((key, None) for key in keys)
