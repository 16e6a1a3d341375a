"""Which engine takes a request: the one that has seen its media before, unless that one is busier than its share."""

import hashlib
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

LOAD_BOUND = 1.25  # of the average load; a tighter bound spills more requests, a looser one lets an engine run hot

Affinity = Literal["hit", "spilled", "none"]


class Candidate(Protocol):
    """What the choice needs to know of an engine."""

    url: str
    inflight: int
    last_chosen: int
    """The number of the choice that fell on it last; the smallest waited longest."""


C = TypeVar("C", bound=Candidate)


def choose(candidates: Sequence[C], key: str | None) -> tuple[C, Affinity]:
    """Return one of `candidates`, and whether it is the one that `key` belongs to.

    A key belongs to the engine that comes first in its rendezvous order; it is passed on along that order while
    engines are as busy as `load_bound` allows. Without a key the engine with the fewest requests is taken, and among
    equals the one that has waited longest.
    """
    if key is None:
        return min(candidates, key=lambda c: (c.inflight, c.last_chosen)), "none"
    bound = load_bound(candidates)
    ordered = rendezvous_order(candidates, key)
    chosen = next(c for c in ordered if c.inflight + 1 <= bound)  # the least loaded always fits
    return chosen, "hit" if chosen is ordered[0] else "spilled"


def load_bound(candidates: Sequence[Candidate]) -> float:
    """Return how many requests one engine may have, counting the one that is being placed.

    That is LOAD_BOUND times the average, and at least one above it, so that a quiet pool has room for affinity.
    """
    average = (sum(c.inflight for c in candidates) + 1) / len(candidates)
    return max(LOAD_BOUND * average, average + 1)


def rendezvous_order(candidates: Sequence[C], key: str) -> list[C]:
    """Return `candidates` by descending weight under `key`; all gateways with the same engines agree on it."""
    return sorted(candidates, key=lambda c: _weight(c.url, key), reverse=True)


def _weight(url: str, key: str) -> bytes:
    return hashlib.blake2b(f"{url}\0{key}".encode(), digest_size=8).digest()
