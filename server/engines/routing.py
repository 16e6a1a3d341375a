"""Chooses the engine for a request, by rendezvous hashing with bounded loads.

Requests about the same media go to the same engine, where its caches already hold them, unless that engine is busier
than its share.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

LOAD_BOUND = 1.25  # times the average load; a lower bound spills more requests, a higher one overloads single engines

Affinity = Literal["hit", "spilled", "none"]


class Candidate(Protocol):
    """What the choice needs to know about an engine."""

    url: str
    inflight: int
    last_chosen: int
    """The sequence number of the last choice of this engine. The smallest number marks the longest wait."""


C = TypeVar("C", bound=Candidate)


def choose(candidates: Sequence[C], key: str | None) -> tuple[C, Affinity]:
    """Return one of `candidates`, and whether it is the engine that `key` belongs to.

    A key belongs to the first engine in the key's rendezvous order. If that engine has reached the load bound, the
    next one in the order is tried ("spilled"). Without a key, the engine with the fewest requests is chosen, and among
    equals the one that has waited longest (round-robin).
    """
    if key is None:
        return min(candidates, key=lambda c: (c.inflight, c.last_chosen)), "none"
    bound = load_bound(candidates)
    ordered = rendezvous_order(candidates, key)
    chosen = next(c for c in ordered if c.inflight + 1 <= bound)  # the least loaded engine is always within the bound
    return chosen, "hit" if chosen is ordered[0] else "spilled"


def load_bound(candidates: Sequence[Candidate]) -> float:
    """Return how many requests one engine may have, including the one to be placed.

    The bound is LOAD_BOUND times the average load, and at least the average plus one. So affinity also works at low
    load, where LOAD_BOUND alone would leave no room for a second request.
    """
    average = (sum(c.inflight for c in candidates) + 1) / len(candidates)
    return max(LOAD_BOUND * average, average + 1)


def rendezvous_order(candidates: Sequence[C], key: str) -> list[C]:
    """Return `candidates` in the rendezvous order of `key`. All gateways with the same engines get the same order."""
    return sorted(candidates, key=lambda c: _weight(c.url, key), reverse=True)


def _weight(url: str, key: str) -> bytes:
    return hashlib.blake2b(f"{url}\0{key}".encode(), digest_size=8).digest()
