"""The circuit breaker of one engine: keeps requests from an engine that passes its health checks and serves none."""

from collections.abc import Callable
from time import monotonic

FAILURES_TO_OPEN = 3
FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 30.0


class Breaker:
    """Opens after consecutive failures; after a delay, which doubles each time, lets one request through on trial."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """Start closed. `clock` tells seconds."""
        self._clock = clock
        self._failures = 0
        self._openings = 0
        self._open_until: float | None = None
        self._on_trial = False

    @property
    def closed(self) -> bool:
        """Whether requests pass freely."""
        return self._open_until is None

    @property
    def admits(self) -> bool:
        """Whether a request may go to the engine now."""
        return self._open_until is None or (self._clock() >= self._open_until and not self._on_trial)

    def seconds_to_trial(self) -> float:
        """Return how long it will be until a request is let through."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - self._clock())

    def begin(self) -> bool:
        """Note that a request goes out; return whether it is the one on trial."""
        if self.closed:
            return False
        self._on_trial = True
        return True

    def end(self, *, trial: bool) -> None:
        """Note that a request is over, whatever became of it; a trial without a verdict is followed by another."""
        if trial:
            self._on_trial = False

    def succeed(self) -> None:
        """Close: the engine has answered."""
        self._failures = self._openings = 0
        self._open_until = None

    def fail(self, *, trial: bool) -> bool:
        """Count a failure; return whether it opened the breaker, as the last one too many and a failed trial do."""
        self._failures += 1
        opens = trial or (self.closed and self._failures >= FAILURES_TO_OPEN)
        if opens:
            delay = min(FIRST_DELAY_SECONDS * 2**self._openings, LONGEST_DELAY_SECONDS)
            self._open_until = self._clock() + delay
            self._openings += 1
        return opens
