"""What has happened to one request: times and counts, from which its headers, metrics, log line and spans are made."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Final, Literal, Protocol

from server.errors import ErrorAnswer

NO_ROUTE: Final = "other"  # there is none for its path, or it was turned away before that was looked up
NO_MODEL: Final = "none"  # the request ended before it named one
OTHER: Final = "other"  # it named one that does not exist

Phase = Literal["parse", "fetch", "probe", "queue", "connect"]


class Trace(Protocol):
    """The spans of one request. Times are perf_counter seconds."""

    def phase(self, name: str, begin: float, end: float) -> None:
        """Add a span for something the gateway did."""

    def engine(self, name: str) -> AbstractContextManager[dict[str, str]]:
        """Hold a span open while an engine has the request; give the headers that let the engine continue it."""

    def end(self, record: "RequestRecord", *, tenant: str) -> None:
        """Close the request's span with what is known at its end."""


@dataclass
class RequestRecord:
    """The record of one request. Times are perf_counter seconds."""

    request_id: str
    trace: Trace | None = None
    received: float = field(default_factory=perf_counter)
    route: str = NO_ROUTE
    model: str = NO_MODEL
    engine_model: str | None = None
    stream: bool = False
    status: int = 500
    reason: str | None = None
    """Why the request ended in an error; a key of `rejections_total`."""
    body_complete: float | None = None
    headers_from_engine: float | None = None
    engine_seconds: float = 0.0
    """The wait for the engine's headers, from the moment a connection was there."""
    seconds_to_first_token: float | None = None
    phases: dict[Phase, float] = field(default_factory=dict)
    video_tokens: tuple[int, int] | None = None
    """Before and after the reduction, as the engine counts."""
    tokens: int = 0
    """Prompt and answer so far, as the engine counts; of an answer that was cut short, the tokens that arrived."""
    usage: dict[str, Any] = field(default_factory=dict)
    """The engine's `usage`."""

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Add the time inside the block to a phase."""
        begin = perf_counter()
        try:
            yield
        finally:
            self.add(name, begin, perf_counter())

    def add(self, name: Phase, begin: float, end: float) -> None:
        """Add the time between two moments to a phase."""
        self.phases[name] = self.phases.get(name, 0.0) + end - begin
        if self.trace is not None:
            self.trace.phase(name, begin, end)

    def engine_answered(self, *, begin: float, connected: float, answered: float) -> None:
        """Add a request to an engine: when it began, when a connection was there, when the headers arrived."""
        self.add("connect", begin, connected)
        self.engine_seconds += answered - connected
        self.headers_from_engine = answered

    def fail(self, answer: ErrorAnswer) -> None:
        """Note the error that ended the request, also one that came after a stream's headers had said 200."""
        self.status, self.reason = answer.status, answer.reason

    def overhead_ms(self) -> float:
        """Return the gateway's own share of the time so far, in milliseconds.

        The clock starts when the body is complete: a slow upload is the client's. It stops when the engine's headers
        arrive, and the wait for them is taken off. Without an engine it stops now.
        """
        begin = self.received if self.body_complete is None else self.body_complete
        end = perf_counter() if self.headers_from_engine is None else self.headers_from_engine
        return max(0.0, end - begin - self.engine_seconds) * 1e3
