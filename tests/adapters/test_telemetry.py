"""Savings and costs on their way to headers and counters."""

import pytest
import torch

from aot_vllm.adapters import telemetry
from aot_vllm.adapters.telemetry import ReductionMeter, SavingsLedger, VideoSavings, WorkerTotals


def test_a_request_sums_its_videos_and_has_none_without_any():
    videos = [VideoSavings(289, 73, 0.25), VideoSavings(10, 4, 0.25)]
    assert VideoSavings.total(videos) == VideoSavings(299, 77, 0.25)
    assert VideoSavings.total([]) is None


def test_the_ledger_forgets_the_video_that_was_not_seen_for_longest():
    ledger = SavingsLedger(capacity=2)
    for name in ("a", "b", "a", "c"):
        ledger.write(name, VideoSavings(2, 1, 0.5))
    assert [ledger.read(name) is not None for name in "abc"] == [True, False, True]


def test_the_meter_counts_reductions_seconds_and_unconverged_solves():
    meter = ReductionMeter()
    for solves in (0, 2, 1):
        with meter.timing(torch.device("cpu")):
            torch.randn(64, 64) @ torch.randn(64, 64)
        meter.add_unconverged(torch.tensor(solves))
    statistics = meter.statistics()
    assert statistics["reductions"] == 3
    assert statistics["unconverged_solves"] == 3
    assert 0 < statistics["reduction_seconds"] < 60
    assert meter.statistics() == statistics


def test_a_failed_reduction_is_not_counted():
    meter = ReductionMeter()
    with pytest.raises(RuntimeError, match="solver"), meter.timing(torch.device("cpu")):
        raise RuntimeError("solver")
    assert meter.statistics()["reductions"] == 0


def test_totals_become_increments_and_never_go_down():
    def read():
        return telemetry.REDUCTIONS._value.get(), telemetry.REDUCTION_SECONDS._value.get()

    totals, start = WorkerTotals(), read()
    for reductions, seconds in ((2, 0.5), (2, 0.5), (5, 0.75), (0, 0.0), (1, 0.25)):
        totals.count({"reductions": reductions, "reduction_seconds": seconds, "unconverged_solves": 0})
    grown = [end - begin for end, begin in zip(read(), start, strict=True)]
    assert grown == [6, 1.0]
