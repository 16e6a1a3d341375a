"""The tokens that a request used and saved: counted by the engine, passed on by the gateway, never estimated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import msgspec

_FIELDS = msgspec.json.Decoder(dict[str, Any])
_USAGE = b'"usage":'  # always a key: inside a JSON string, its quotes would be escaped
MOST_USAGE_KEYS = 16  # that are looked at, the last first
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

    def _cached(self, usage: Mapping[str, Any]) -> int:
        """Return how many video tokens were in the prefix cache, at least.

        Of the prompt's cached tokens, no more than all its other tokens can be others than videos'.
        """
        for name in ("prompt_tokens", "input_tokens"):
            prompt, details = usage.get(name), usage.get(f"{name}_details")
            cached = details.get("cached_tokens") if isinstance(details, dict) else None
            if type(prompt) is int and type(cached) is int:
                return max(0, min(cached, prompt) - max(0, prompt - self.after))
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
