"""Savings and costs, on their way to headers and counters."""

import pytest
import torch

from aot_vllm import AOTConfig, VideoGrid, reduce_video
from aot_vllm.adapters import telemetry
from aot_vllm.adapters.telemetry import ReductionMeter, SavingsLedger, VideoSavings, WorkerTotals
from tests.strategies import noise

GRID = VideoGrid(6, 3, 4)
NOTHING = dict.fromkeys(("reductions", "reduced_tokens", "reduction_seconds", "tower_seconds", "unconverged_solves"), 0)


def reduced(*, retention=0.5, iterations=20):
    """A video of noise, reduced with merging inside its frames in one solve."""
    config = AOTConfig(mass=1.0, iterations=iterations)
    return reduce_video(noise(0, 6, 12, 8), None, None, grid=GRID, retention=retention, config=config)


def test_a_request_sums_the_savings_of_its_videos_and_has_none_without_videos():
    videos = [VideoSavings(289, 73, 0.25), VideoSavings(10, 4, 0.25)]
    assert VideoSavings.total(videos) == VideoSavings(299, 77, 0.25)
    assert VideoSavings.total([]) is None


def test_a_full_ledger_drops_the_video_that_was_written_longest_ago():
    ledger = SavingsLedger(capacity=2)
    for name in ("a", "b", "a", "c"):
        ledger.write(name, VideoSavings(2, 1, 0.5))
    assert [ledger.read(name) is not None for name in "abc"] == [True, False, True]


def test_the_meter_counts_reductions_seconds_and_unconverged_solves():
    meter = ReductionMeter()
    for iterations in (1000, 1, 1):
        with meter.timing("reduction", torch.device("cpu")):
            video = reduced(iterations=iterations)
        meter.add(video, tokens=GRID.tokens)
    statistics = meter.statistics()
    assert statistics["reductions"] == 3
    assert statistics["reduced_tokens"] == 3 * GRID.tokens == 3 * 72
    assert statistics["unconverged_solves"] == 2
    assert statistics["tower_seconds"] == 0
    assert 0 < statistics["reduction_seconds"] < 60
    assert meter.statistics() == statistics


def test_a_video_that_keeps_every_token_is_no_reduction():
    meter = ReductionMeter()
    meter.add(reduced(retention=1), tokens=GRID.tokens)
    assert meter.statistics() == NOTHING


def test_a_stage_is_timed_by_itself(monkeypatch):
    times = iter((1.0, 3.0, 10.0, 10.5))
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: next(times))
    meter = ReductionMeter()
    for stage in ("tower", "reduction"):
        with meter.timing(stage, torch.device("cpu")):
            pass
    assert meter.statistics() == {**NOTHING, "tower_seconds": 2.0, "reduction_seconds": 0.5}


def test_reading_the_meter_waits_for_no_event_and_the_next_reading_has_what_was_running():
    class Event:
        def __init__(self, *, finished):
            self.finished = finished

        def query(self):
            return self.finished

        def elapsed_time(self, ended):
            assert ended.finished
            return 500.0

    meter, running = ReductionMeter(), Event(finished=False)
    meter._events = [("reduction", Event(finished=True), end) for end in (Event(finished=True), running)]
    assert meter.statistics()["reduction_seconds"] == 0.5
    running.finished = True
    assert meter.statistics()["reduction_seconds"] == 1.0
    assert meter.statistics()["reduction_seconds"] == 1.0


def test_a_failed_reduction_is_not_counted():
    meter = ReductionMeter()
    with pytest.raises(RuntimeError, match="solver"), meter.timing("reduction", torch.device("cpu")):
        raise RuntimeError("solver")
    assert meter.statistics()["reductions"] == 0


def test_totals_become_increments_of_counters_which_never_go_down():
    counters = (telemetry.REDUCTIONS, telemetry.REDUCTION_SECONDS, telemetry.TOWER_SECONDS)

    def read():
        return [counter._value.get() for counter in counters]

    totals, start = WorkerTotals(), read()
    for reductions, seconds in ((2, 0.5), (2, 0.5), (5, 0.75), (0, 0.0), (1, 0.25)):
        reported = {"reductions": reductions, "reduction_seconds": seconds, "tower_seconds": 4 * seconds}
        totals.count([{**NOTHING, **reported}])
    grown = [end - begin for end, begin in zip(read(), start, strict=True)]
    assert grown == [6, 1.0, 4.0]


def test_the_time_of_reductions_for_a_token_is_that_of_all_of_them():
    totals = WorkerTotals()
    assert totals.reduction_seconds_per_token is None
    totals.count([NOTHING, NOTHING])
    assert totals.reduction_seconds_per_token is None
    engines = ((2, 300, 0.125), (1, 100, 0.375))
    totals.count([{**NOTHING, "reductions": n, "reduced_tokens": t, "reduction_seconds": s} for n, t, s in engines])
    assert totals.reduction_seconds_per_token == 0.00125
