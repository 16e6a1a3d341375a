"""The tokens that a request used and saved: counted by the engine, passed on by the gateway, never estimated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import msgspec

from server.engines.profile import PrefillCost

_FIELDS = msgspec.json.Decoder(dict[str, Any])
_USAGE = b'"usage":'  # always a key: inside a JSON string, its quotes would be escaped
MOST_USAGE_KEYS = 16  # that are looked at, the last first
_PROMPT = ("prompt_tokens", "input_tokens")
BEFORE, AFTER, RETENTION = "x-aot-video-tokens-before", "x-aot-video-tokens-after", "x-aot-video-retention"


@dataclass(frozen=True)
class Savings:
    """A request's video tokens before and after reduction, and the share that was kept."""

    before: int
    after: int
    retention: float

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> Self | None:
        """Return the counts in an engine's headers, or None if they are missing or contradict each other."""
        try:
            before, after = int(headers[BEFORE]), int(headers[AFTER])
            retention = float(headers[RETENTION]) if RETENTION in headers else round(after / before, 4)
        except (KeyError, ValueError, ZeroDivisionError):
            return None
        if not (before > 0 and 0 <= after <= before and 0 <= retention <= 1):
            return None
        return cls(before, after, retention)

    def as_headers(self) -> dict[str, str]:
        """Return the counts as headers for the client."""
        return {BEFORE: str(self.before), AFTER: str(self.after), RETENTION: f"{self.retention:g}"}

    def as_usage(self, usage: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the counts as the value of `usage.video_tokens`; `usage` is the engine's.

        `cached` is there if the engine had video tokens in its prefix cache.
        """
        counts = {"before": self.before, "after": self.after, "retention": self.retention}
        cached = self._cached(usage or {})
        return {**counts, "cached": cached} if cached else counts

    def prefill_seconds(self, usage: Mapping[str, Any], cost: PrefillCost) -> tuple[float, float] | None:
        """Return the time of the prefill without and with the reduction, None if `usage`, the engine's, has no counts.

        The vision tower is in neither: it runs on whole videos all the same. What the engine had in its prefix cache is
        in neither, because it would have had as much of the whole videos there. The reduction is in the second.
        """
        prompt = _prompt_tokens(usage)
        if prompt is None or self.after == 0:
            return None
        cached, growth = min(_cached_tokens(usage), prompt), self.before - self.after
        cached_share = self._cached(usage) / self.after
        reduced = cost.seconds_of(prompt) - cost.seconds_of(cached)
        whole = cost.seconds_of(prompt + growth) - cost.seconds_of(cached + growth * cached_share)
        if growth:
            reduced += (cost.reduction_seconds_per_token or 0.0) * self.before * (1 - cached_share)
        return max(0.0, whole), max(0.0, reduced)

    def _cached(self, usage: Mapping[str, Any]) -> int:
        """Return how many video tokens were in the prefix cache, at least.

        Of the prompt's cached tokens, no more than all its other tokens can be others than videos'.
        """
        prompt = _prompt_tokens(usage)
        if prompt is None:
            return 0
        return max(0, min(_cached_tokens(usage), prompt) - max(0, prompt - self.after))


def _prompt_tokens(usage: Mapping[str, Any]) -> int | None:
    counts = (usage.get(name) for name in _PROMPT)
    return next((count for count in counts if type(count) is int), None)


def _cached_tokens(usage: Mapping[str, Any]) -> int:
    """Return how many of the prompt's tokens were in the prefix cache; engines leave a 0 out."""
    for name in _PROMPT:
        details = usage.get(f"{name}_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        if type(cached) is int:
            return max(0, cached)
    return 0


def usage_in(body: bytes) -> dict[str, Any]:
    """Return the `usage` object of an engine's answer, empty if there is none."""
    usage = _from_usage_on(body)[1].get("usage")
    return usage if isinstance(usage, dict) else {}


def with_savings(body: bytes, savings: Savings) -> bytes | None:
    """Return an engine's answer with the savings in its `usage`, None if no usage is found there.

    What precedes the usage remains as it is.
    """
    begin, fields = _from_usage_on(body)
    if "usage" not in fields:
        return None
    usage = fields["usage"] if isinstance(fields["usage"], dict) else {}
    fields["usage"] = {**usage, "video_tokens": savings.as_usage(usage)}
    return body[:begin] + msgspec.json.encode(fields)[1:]


def _from_usage_on(body: bytes) -> tuple[int, dict[str, Any]]:
    """Return where `usage` begins in an engine's answer, and the answer's fields from there on: none without a usage.

    Only these are parsed, because the rest of the answer may have megabytes. A key belongs to the answer itself, and
    not to an object within it, if the rest of the body is an object's.
    """
    begin = len(body)
    for _ in range(MOST_USAGE_KEYS):
        begin = body.rfind(_USAGE, 0, begin)
        if begin < 0:
            break
        try:
            return begin, _FIELDS.decode(b"{" + body[begin:])
        except (msgspec.MsgspecError, ValueError):
            continue
    return len(body), {}


def tokens_of(usage: dict[str, Any]) -> int:
    """Return `total_tokens` in an engine's `usage`, or 0 if it is missing."""
    total = usage.get("total_tokens")
    return total if type(total) is int and total > 0 else 0
