"""What an engine says it saved: counted there, passed on here, never estimated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

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
