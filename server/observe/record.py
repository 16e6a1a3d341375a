"""What one request has been through, for its headers, its metrics and its line in the log."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Literal

from server.observe.metrics import NO_MODEL

if TYPE_CHECKING:
    from server.media.facts import Facts
    from server.observe.tracing import RequestTrace

STATE_KEY: Final = "aot_record"

Phase = Literal["parse", "fetch", "probe", "queue", "connect"]


@dataclass
class RequestRecord:
    """The life of one request. Times are perf_counter seconds."""

    request_id: str
    received: float = field(default_factory=perf_counter)
    route: str = "other"
    model: str = NO_MODEL
    stream: bool = False
    has_video: bool = False
    status: int = 500
    body_complete: float | None = None
    headers_from_engine: float | None = None
    engine_seconds: float = 0.0
    phases: dict[Phase, float] = field(default_factory=dict)
    reason: str | None = None
    video_tokens: tuple[int, int] | None = None
    tenant: str = ""
    """Who asks; empty where no API keys are configured."""
    allowed_models: Collection[str] | None = None
    """The models the tenant may use; None for all."""
    media_key: str | None = None
    """What the request's media are, by content: requests with the same key go to the same engine."""
    video_seconds: float = 0.0
    longest_video: "Facts | None" = None
    tokens: int = 0
    """What the request used so far: prompt and answer as the engine counts, or of an answer cut short what was seen."""
    headers: dict[str, str] = field(default_factory=dict)
    """More headers for the answer, whatever it is."""
    engine_headers: dict[str, str] = field(default_factory=dict)
    """More headers for the engine."""
    engine_model: str | None = None
    seconds_to_first_token: float | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    """The engine's, in a stream or where the request is traced."""
    trace: "RequestTrace | None" = None

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

    def overhead_ms(self) -> float:
        """Return the gateway's own share of the time so far, in milliseconds.

        The clock starts when the body is complete (a slow upload is not the gateway's) and stops when the engine's
        headers arrive; the wait for them is taken off. Without an engine it stops now.
        """
        begin = self.received if self.body_complete is None else self.body_complete
        end = perf_counter() if self.headers_from_engine is None else self.headers_from_engine
        return max(0.0, end - begin - self.engine_seconds) * 1e3
