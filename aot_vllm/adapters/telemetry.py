"""The savings and the costs of the reduction, on their way from processor and worker to headers and `/metrics`.

The processor writes the token counts of each video into a `SavingsLedger` under the hash of the video. The endpoint
reads them for the request that it serves. Workers measure reductions. The endpoint asks them at each scrape.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from prometheus_client import Counter, Gauge
from torch import Tensor

from aot_vllm.adapters.settings import Reduction
from aot_vllm.core.reduce import ReducedVideo


@dataclass(frozen=True)
class VideoSavings:
    """Placeholder tokens of one video, or of all videos of a request, before and after the reduction."""

    before: int
    after: int
    retention: float

    @classmethod
    def total(cls, savings: Iterable[VideoSavings]) -> VideoSavings | None:
        """Return the sums over the videos of a request, None without videos. All of them have the same retention."""
        videos = list(savings)
        if not videos:
            return None
        return cls(
            before=sum(video.before for video in videos),
            after=sum(video.after for video in videos),
            retention=videos[0].retention,
        )


class SavingsLedger:
    """The savings of recent videos by multimodal hash. The oldest entry is dropped first. Thread-safe.

    Every request writes its videos just before they are read. So the capacity needs to hold only the videos of the
    requests that are rendered at the same time.
    """

    def __init__(self, *, capacity: int = 16384) -> None:
        """Hold at most `capacity` videos."""
        self._capacity = capacity
        self._by_hash: OrderedDict[str, VideoSavings] = OrderedDict()
        self._lock = threading.Lock()

    def write(self, mm_hash: str, savings: VideoSavings) -> None:
        """Store the savings of the video with this hash, as the latest entry."""
        with self._lock:
            self._by_hash[mm_hash] = savings
            self._by_hash.move_to_end(mm_hash)
            while len(self._by_hash) > self._capacity:
                self._by_hash.popitem(last=False)

    def read(self, mm_hash: str) -> VideoSavings | None:
        """Return the savings of the video with this hash, None if there is no entry or it was dropped."""
        with self._lock:
            return self._by_hash.get(mm_hash)


LEDGER = SavingsLedger()
"""The ledger of this API server process, which runs both the processor and the endpoint."""

VIDEO_TOKENS = Counter("aot_engine_video_tokens", "Video placeholder tokens of served requests.", ["stage"])
VIDEOS_REDUCED = Counter("aot_engine_videos_reduced", "Videos of served requests that were shortened.")
REDUCTIONS = Counter(
    "aot_engine_reductions", "Videos reduced in the worker. A video found in a cache is not reduced again."
)
TOWER_SECONDS = Counter("aot_engine_tower_seconds", "Time of the vision tower on videos in the worker.")
REDUCTION_SECONDS = Counter("aot_engine_reduction_seconds", "Time spent choosing and merging tokens in the worker.")
UNCONVERGED = Counter("aot_engine_unconverged_solves", "Transport problems that ended at the iteration limit.")

INFO = Gauge(
    "aot_engine_info",
    "1, with what the engine was started with: its retention, its preset, and the single settings that change it.",
    ["retention", "preset", "changes"],
    multiprocess_mode="max",
)


def show(reduction: Reduction) -> None:
    """Show on `/metrics` what the engine was started with."""
    changes = ",".join(f"{name}={value}" for name, value in reduction.changes.items())
    INFO.labels(f"{reduction.retention:g}", reduction.preset, changes).set(1)


def count(savings: VideoSavings) -> None:
    """Add one video of a served request to the counters of this process."""
    VIDEO_TOKENS.labels("before").inc(savings.before)
    VIDEO_TOKENS.labels("after").inc(savings.after)
    if savings.after < savings.before:
        VIDEOS_REDUCED.inc()


Stage = Literal["tower", "reduction"]


class ReductionMeter:
    """Counts and times reductions in a worker, and times towers. The host never waits for the device.

    On CUDA, the time is taken between two events, and the count of unconverged solves is copied to the host after each
    reduction. A scrape reads what is finished. The next one has the rest.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self._reductions = 0
        self._reduced_tokens = 0
        self._seconds: dict[Stage, float] = {"tower": 0.0, "reduction": 0.0}
        self._events: list[tuple[Stage, torch.cuda.Event, torch.cuda.Event]] = []
        self._unconverged: Tensor | None = None
        self._unconverged_on_host: Tensor | None = None

    @contextmanager
    def timing(self, stage: Stage, device: torch.device) -> Iterator[None]:
        """Time a stage of one video on `device`."""
        if device.type == "cuda":
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            yield
            ended.record()
            self._events.append((stage, started, ended))
            if len(self._events) >= 1024:
                self._collect()
        else:
            start = time.perf_counter()
            yield
            self._seconds[stage] += time.perf_counter() - start

    def add(self, reduced: ReducedVideo, *, tokens: int) -> None:
        """Count a reduced video of so many tokens and its unconverged solves, unless it kept every token."""
        if reduced.budget.identity:
            return
        self._reductions += 1
        self._reduced_tokens += tokens
        solves = reduced.unconverged
        self._unconverged = solves if self._unconverged is None else self._unconverged + solves
        if self._unconverged_on_host is None:
            self._unconverged_on_host = torch.zeros(solves.shape, dtype=solves.dtype, pin_memory=solves.is_cuda)
        self._unconverged_on_host.copy_(self._unconverged, non_blocking=True)

    def _collect(self) -> None:
        """Add the times of finished reductions."""
        waiting = []
        for stage, started, ended in self._events:
            if ended.query():
                self._seconds[stage] += started.elapsed_time(ended) / 1000
            else:
                waiting.append((stage, started, ended))
        self._events = waiting

    def statistics(self) -> dict[str, float]:
        """Return the totals since the worker started, without times and solves of what still runs on the device."""
        self._collect()
        return {
            "reductions": self._reductions,
            "reduced_tokens": self._reduced_tokens,
            "reduction_seconds": self._seconds["reduction"],
            "tower_seconds": self._seconds["tower"],
            "unconverged_solves": 0 if self._unconverged_on_host is None else int(self._unconverged_on_host),
        }


METER = ReductionMeter()
"""The meter of this worker process."""


class WorkerExtension:
    """Methods that the API server can call on every worker, through vLLM's `worker_extension_cls`."""

    def aot_reduction_statistics(self) -> dict[str, float]:
        """Return the totals of this worker, see `ReductionMeter.statistics`."""
        return METER.statistics()


class WorkerTotals:
    """Converts the totals that the workers of each engine report into increments of this process's counters."""

    def __init__(self) -> None:
        """Nothing counted yet."""
        self._counted: list[dict[str, float]] = []

    @property
    def reduction_seconds_per_token(self) -> float | None:
        """The time of reductions in all engines for each token before them, None before the first."""
        tokens = sum(totals["reduced_tokens"] for totals in self._counted)
        return sum(totals["reduction_seconds"] for totals in self._counted) / tokens if tokens else None

    def count(self, statistics: Sequence[Mapping[str, float]]) -> None:
        """Add the growth since the last call to the counters. `statistics`: one for each data-parallel engine."""
        for engine, totals in enumerate(statistics):
            counted = self._counted[engine] if engine < len(self._counted) else {}
            for name, counter in (
                ("reductions", REDUCTIONS),
                ("reduction_seconds", REDUCTION_SECONDS),
                ("tower_seconds", TOWER_SECONDS),
                ("unconverged_solves", UNCONVERGED),
            ):
                counter.inc(max(0.0, totals[name] - counted.get(name, 0.0)))
        self._counted = [dict(totals) for totals in statistics]
