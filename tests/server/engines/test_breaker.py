import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engines.breaker import FAILURES_TO_OPEN, FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS, Breaker


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def opened(clock):
    breaker = Breaker(clock)
    for _ in range(FAILURES_TO_OPEN):
        assert breaker.admits
        breaker.fail(trial=breaker.begin())
    return breaker


def test_it_opens_after_failures_in_a_row_and_not_before(clock):
    breaker = Breaker(clock)
    for _ in range(FAILURES_TO_OPEN - 1):
        assert not breaker.fail(trial=False)
    breaker.succeed()
    for _ in range(FAILURES_TO_OPEN - 1):
        assert not breaker.fail(trial=False)
    assert breaker.admits
    assert breaker.fail(trial=False)
    assert not breaker.admits


def test_after_the_delay_one_request_is_let_through_at_a_time(opened, clock):
    assert opened.seconds_to_trial() == FIRST_DELAY_SECONDS
    clock.now = FIRST_DELAY_SECONDS
    assert opened.admits
    assert opened.seconds_to_trial() == 0
    trial = opened.begin()
    assert trial
    assert not opened.admits
    opened.end(trial=trial)  # the client left, so the outcome is unknown
    assert opened.admits


def test_a_trial_that_succeeds_closes_it(opened, clock):
    clock.now = FIRST_DELAY_SECONDS
    trial = opened.begin()
    opened.succeed()
    opened.end(trial=trial)
    assert opened.closed
    assert not opened.begin()


def test_each_failed_trial_doubles_the_delay_up_to_a_limit(opened, clock):
    delays = []
    for _ in range(8):
        delays.append(opened.seconds_to_trial())
        clock.now += delays[-1]
        trial = opened.begin()
        assert opened.fail(trial=trial)
        opened.end(trial=trial)
    assert delays == [1, 2, 4, 8, 16, 30, 30, 30]
    assert delays[-1] == LONGEST_DELAY_SECONDS


def test_requests_that_were_under_way_when_it_opened_do_not_prolong_it(opened, clock):
    clock.now = 0.5
    assert not opened.fail(trial=False)
    assert opened.seconds_to_trial() == FIRST_DELAY_SECONDS - 0.5


@settings(deadline=None)
@given(st.lists(st.sampled_from(["begin", "fail", "succeed", "leave", "wait"]), max_size=60))
def test_it_never_lets_two_trials_run_and_never_locks_up(events):
    clock = Clock()
    breaker, running = Breaker(clock), []
    for event in events:
        if event == "wait":
            clock.now += LONGEST_DELAY_SECONDS
        elif event == "begin" and breaker.admits:
            running.append(breaker.begin())
        elif event != "begin" and running:
            trial = running.pop(0)
            if event == "fail":
                breaker.fail(trial=trial)
            elif event == "succeed":
                breaker.succeed()
            breaker.end(trial=trial)
        assert sum(running) <= 1 or breaker.closed
    for trial in running:
        breaker.end(trial=trial)
    clock.now += LONGEST_DELAY_SECONDS
    assert breaker.admits
