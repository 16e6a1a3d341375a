"""The circuit breaker of one engine: protects requests from an engine that is healthy by its checks but fails them.

Two kinds of failure count. A request that broke off or timed out says something about the engine. An error that the
engine answered with (5xx) may be the fault of its request, so it says something only if several senders met one.
"""

from collections.abc import Callable
from time import monotonic

FAILURES_TO_OPEN = 3
FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 30.0
SENDERS_TO_OPEN = 2
CONTENTS_TO_OPEN = 2  # of each sender
ERROR_SECONDS = 60.0  # after which an error no longer counts


class Breaker:
    """A circuit breaker that opens after FAILURES_TO_OPEN consecutive failures, or after errors to several senders.

    Errors open it if SENDERS_TO_OPEN senders have each met one on CONTENTS_TO_OPEN different requests. After a delay
    it lets a single request through, the trial. If the trial fails too, the delay doubles, up to
    LONGEST_DELAY_SECONDS. Any answer closes the breaker, and a complete one makes it forget all failures.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """Start closed. `clock` returns seconds."""
        self._clock = clock
        self._failures = 0
        self._errors: dict[str, dict[bytes, float]] = {}
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

    def answer_begins(self) -> None:
        """Close the breaker, because the engine answers. Earlier failures count until an answer is complete."""
        self._open_until = None
        self._errors.clear()

    def succeed(self) -> None:
        """Close the breaker and forget all failures, because the engine has answered completely."""
        self.answer_begins()
        self._failures = self._openings = 0

    def fail(self, *, trial: bool) -> bool:
        """Count a failure of the engine; return whether it opened the breaker. A failed trial opens it again."""
        self._failures += 1
        return self._open(trial or (self.closed and self._failures >= FAILURES_TO_OPEN))

    def note_error(self, sender: str, content: bytes) -> bool:
        """Note that the engine answered a request with an error; return whether this opened the breaker.

        `content` identifies the request. An error to a trial decides nothing: the next request is a new trial.
        """
        fresh = self._clock() - ERROR_SECONDS
        for known in self._errors.values():
            for old in [each for each, noted in known.items() if noted < fresh]:
                del known[old]
        self._errors = {name: known for name, known in self._errors.items() if known}
        contents = self._errors.setdefault(sender, {})
        if content not in contents and len(contents) == CONTENTS_TO_OPEN:
            del contents[min(contents, key=contents.__getitem__)]
        contents[content] = self._clock()
        many = sum(len(known) == CONTENTS_TO_OPEN for known in self._errors.values())
        return self._open(self.closed and many >= SENDERS_TO_OPEN)

    def _open(self, opens: bool) -> bool:
        if opens:
            delay = min(FIRST_DELAY_SECONDS * 2**self._openings, LONGEST_DELAY_SECONDS)
            self._open_until = self._clock() + delay
            self._openings += 1
        return opens
