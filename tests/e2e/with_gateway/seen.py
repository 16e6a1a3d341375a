"""What tests of the way through expect and look at."""

import time

import httpx
from prometheus_client.parser import text_string_to_metric_families

BEFORE = 32 * 9 + 1
"""Tokens of the clip that the tests ask about."""


def after(retention):
    """Return how many of them are left."""
    return max(32, round(288 * retention)) + 1


def counts(video_tokens):
    """Return what videos came to, whatever of it was in the engine's cache."""
    return {name: count for name, count in (video_tokens or {}).items() if name != "cached"}


def wait_until(true, *, seconds=5):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def metric(address, name, **labels):
    families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
