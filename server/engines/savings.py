"""What an engine says a request used and saved: counted there, passed on here, never estimated."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

_USAGE = b'"usage":'  # inside a string of JSON its quotes would be escaped
BEFORE, AFTER, RETENTION = "x-aot-video-tokens-before", "x-aot-video-tokens-after", "x-aot-video-retention"


@dataclass(frozen=True)
class Savings:
    """A request's video tokens before and after reduction, and the share that was kept."""

    before: int
    after: int
    retention: float

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> Self | None:
        """Return the counts in an engine's headers, None if it gave none or none that make sense."""
        try:
            before, after = int(headers[BEFORE]), int(headers[AFTER])
            retention = float(headers[RETENTION]) if RETENTION in headers else round(after / before, 4)
        except (KeyError, ValueError, ZeroDivisionError):
            return None
        if not (before > 0 and 0 <= after <= before and 0 <= retention <= 1):
            return None
        return cls(before, after, retention)

    def as_headers(self) -> dict[str, str]:
        """Return the counts as headers."""
        return {BEFORE: str(self.before), AFTER: str(self.after), RETENTION: f"{self.retention:g}"}

    def as_usage(self) -> dict[str, Any]:
        """Return the counts as they stand in `usage.video_tokens`."""
        return {"before": self.before, "after": self.after, "retention": self.retention}


def usage_in(body: bytes) -> dict[str, Any]:
    """Return the `usage` in an engine's answer, empty if there is none; the rest, maybe megabytes, is not parsed."""
    _, mark, rest = body.rpartition(_USAGE)
    if not mark:
        return {}
    try:
        usage, _ = json.JSONDecoder().raw_decode(rest.decode("utf-8", errors="replace").lstrip())
    except ValueError:
        return {}
    return usage if isinstance(usage, dict) else {}


def tokens_of(usage: dict[str, Any]) -> int:
    """Return the total in an engine's `usage`, 0 if it gives none."""
    total = usage.get("total_tokens")
    return total if type(total) is int and total > 0 else 0
