"""How the number of users changes during a test."""

from __future__ import annotations

from math import ceil

SHAPES = ("soak", "steps", "spike")
NUM_STEPS = 5
REST_SHARE = 0.1  # of a spike's users, before and after it


def stages(shape: str, *, users: int, seconds: float) -> list[tuple[float, int]]:
    """Return (end in seconds, number of users) of each stage.

    `soak` holds all users, `steps` comes to them in five equal steps, `spike` has them for the middle fifth.
    """
    if shape == "steps":
        return [(seconds * i / NUM_STEPS, ceil(users * i / NUM_STEPS)) for i in range(1, NUM_STEPS + 1)]
    if shape == "spike":
        rest = max(1, round(users * REST_SHARE))
        return [(seconds * 0.4, rest), (seconds * 0.6, users), (seconds, rest)]
    return [(seconds, users)]


def users_at(moment: float, plan: list[tuple[float, int]]) -> int | None:
    """Return how many users there are `moment` seconds in, None after the end."""
    return next((users for end, users in plan if moment < end), None)
