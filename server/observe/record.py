"""The record of one request: the times and counts from which its headers, metrics, log line and spans are made."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Final, Literal, Protocol

from server.errors import ErrorAnswer

NO_ROUTE: Final = "other"  # no route has the request's path, or the request was refused before the route was looked up
NO_MODEL: Final = "none"  # the request ended before its model was known
OTHER: Final = "other"  # the request's model does not exist

Phase = Literal["parse", "fetch", "probe", "queue", "connect"]


class Trace(Protocol):
    """The spans of one request. Times are perf_counter seconds."""

    def phase(self, name: str, begin: float, end: float) -> None:
        """Add a span for one phase of the gateway's own work."""

    def engine(self, name: str) -> AbstractContextManager[dict[str, str]]:
        """Hold a span open while an engine has the request; yield the headers that continue the trace there."""

    def end(self, record: "RequestRecord", *, tenant: str) -> None:
        """Close the request's span, with the attributes that are known at its end."""


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
    has_answer: bool = False
    """Whether the head of the answer has been sent."""
    reason: str | None = None
    """Why the request ended in an error: a label value of `rejections_total`."""
    code: str | None = None
    """The error's `code`, as the client got it."""
    cause: str | None = None
    """What lies behind the error: the kind of an exception or an engine's status."""
    engine: str | None = None
    """The name of the engine that was asked last."""
    body_complete: float | None = None
    headers_from_engine: float | None = None
    engine_seconds: float = 0.0
    """The time from an open connection to the engine's headers, summed over all attempts."""
    seconds_to_first_token: float | None = None
    phases: dict[Phase, float] = field(default_factory=dict)
    video_tokens: tuple[int, int] | None = None
    """The video tokens before and after the reduction, as the engine counts them."""
    video_seconds: float = 0.0
    """The duration of its videos together."""
    prefill_seconds: tuple[float, float] | None = None
    """The time of its prefill without and with the reduction, see `Savings.prefill_seconds`."""
    tokens: int = 0
    """The tokens of the prompt and of the answer so far, as the engine counts them.

    If the answer was cut short, only the tokens that arrived count.
    """
    usage: dict[str, Any] = field(default_factory=dict)
    """The `usage` object of the engine's answer."""

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Return a context manager that adds the duration of its block to the phase `name`."""
        return _Timed(self, name)

    def add(self, name: Phase, begin: float, end: float) -> None:
        """Add the time from `begin` to `end` to the phase `name`."""
        self.phases[name] = self.phases.get(name, 0.0) + end - begin
        if self.trace is not None:
            self.trace.phase(name, begin, end)

    def engine_answered(self, *, begin: float, connected: float, answered: float) -> None:
        """Add an attempt at an engine: when it began, when the connection was open, and when the headers arrived."""
        self.add("connect", begin, connected)
        self.engine_seconds += answered - connected
        self.headers_from_engine = answered

    def fail(self, answer: ErrorAnswer) -> None:
        """Note the error that ended the request, even if the headers of a stream have already promised a 200."""
        self.status, self.reason, self.cause = answer.status, answer.reason, answer.cause
        self.code = answer.content["error"]["code"]

    def count_of(self, *names: str) -> int | None:
        """Return the first of these counts in the engine's `usage`, None if it has none of them."""
        for name in names:
            if type(count := self.usage.get(name)) is int:
                return count
        return None

    @property
    def prompt_tokens(self) -> int | None:
        """The tokens of the prompt, as the engine counts them."""
        return self.count_of("prompt_tokens", "input_tokens")

    @property
    def answer_tokens(self) -> int | None:
        """The tokens of the answer, as the engine counts them."""
        return self.count_of("completion_tokens", "output_tokens")

    @property
    def retention(self) -> float | None:
        """The share of its video tokens that the request kept, None without videos."""
        return None if self.video_tokens is None else self.video_tokens[1] / self.video_tokens[0]

    def overhead_ms(self) -> float:
        """Return the gateway's own share of the time so far, in milliseconds.

        The clock starts when the request's body is complete, because a slow upload is the client's time. It stops when
        the engine's headers arrive, and the engine's own time is subtracted. If no engine has answered, it stops now.
        """
        begin = self.received if self.body_complete is None else self.body_complete
        end = perf_counter() if self.headers_from_engine is None else self.headers_from_engine
        return max(0.0, end - begin - self.engine_seconds) * 1e3


class _Timed(AbstractContextManager[None]):
    """Adds the duration of its block to a phase of a request."""

    def __init__(self, record: RequestRecord, name: Phase) -> None:
        self._record = record
        self._name = name

    def __enter__(self) -> None:
        self._begin = perf_counter()

    def __exit__(self, *_exc: object) -> None:
        self._record.add(self._name, self._begin, perf_counter())
