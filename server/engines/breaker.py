"""The circuit breaker of one engine: protects requests from an engine that is healthy by its checks but fails them."""

from collections.abc import Callable
from time import monotonic

FAILURES_TO_OPEN = 3
FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 30.0


class Breaker:
    """A circuit breaker that opens after FAILURES_TO_OPEN consecutive failures.

    After a delay it lets a single request through, the trial. If the trial fails too, the delay doubles, up to
    LONGEST_DELAY_SECONDS. Any success closes the breaker.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """Start closed. `clock` returns seconds."""
        self._clock = clock
        self._failures = 0
        self._openings = 0
        self._open_until: float | None = None
        self._on_trial = False

    @property
    def closed(self) -> bool:
        """Whether the breaker is closed: all requests pass."""
        return self._open_until is None

    @property
    def admits(self) -> bool:
        """Whether a request may go to the engine now: any request while closed, otherwise only the trial."""
        return self._open_until is None or (self._clock() >= self._open_until and not self._on_trial)

    def seconds_to_trial(self) -> float:
        """Return the time in seconds until the next trial, 0 if the breaker is closed."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - self._clock())

    def begin(self) -> bool:
        """Note that a request is sent to the engine; return whether it is the trial."""
        if self.closed:
            return False
        self._on_trial = True
        return True

    def end(self, *, trial: bool) -> None:
        """Note that a request is over. If the trial ended without a result, the next request is a new trial."""
        if trial:
            self._on_trial = False

    def succeed(self) -> None:
        """Close the breaker, because the engine has answered."""
        self._failures = self._openings = 0
        self._open_until = None

    def fail(self, *, trial: bool) -> bool:
        """Count a failure; return whether it opened the breaker. A failed trial opens it again."""
        self._failures += 1
        opens = trial or (self.closed and self._failures >= FAILURES_TO_OPEN)
        if opens:
            delay = min(FIRST_DELAY_SECONDS * 2**self._openings, LONGEST_DELAY_SECONDS)
            self._open_until = self._clock() + delay
            self._openings += 1
        return opens
