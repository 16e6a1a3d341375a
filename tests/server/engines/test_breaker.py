import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engines.breaker import (
    CONTENTS_TO_OPEN,
    ERROR_SECONDS,
    FAILURES_TO_OPEN,
    FIRST_DELAY_SECONDS,
    LONGEST_DELAY_SECONDS,
    SENDERS_TO_OPEN,
    Breaker,
)


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


def test_errors_that_one_sender_meets_never_open_it(clock):
    breaker = Breaker(clock)
    for number in range(50):
        assert not breaker.note_error("acme", b"%d" % number)
    for _ in range(50):
        assert not breaker.note_error("globex", b"always the same")
    assert breaker.closed


def test_errors_open_it_once_several_senders_have_met_them_on_several_contents(clock):
    breaker = Breaker(clock)
    for sender in range(SENDERS_TO_OPEN):
        for content in range(CONTENTS_TO_OPEN):
            assert breaker.closed
            opened = breaker.note_error(f"tenant {sender}", b"%d" % content)
    assert opened
    assert not breaker.admits


def meet_errors(breaker, senders):
    for sender in senders:
        for content in range(CONTENTS_TO_OPEN):
            breaker.note_error(sender, b"%d" % content)


@pytest.mark.parametrize("good", ["succeed", "answer_begins"])
def test_errors_count_only_until_the_next_good_answer(clock, good):
    breaker = Breaker(clock)
    meet_errors(breaker, ["acme"])
    getattr(breaker, good)()
    meet_errors(breaker, ["globex"])
    assert breaker.closed


def test_errors_count_only_for_a_while(clock):
    breaker = Breaker(clock)
    meet_errors(breaker, ["acme"])
    clock.now += ERROR_SECONDS + 1
    meet_errors(breaker, ["globex"])
    assert breaker.closed
    meet_errors(breaker, ["acme"])
    assert not breaker.closed


def test_an_error_to_the_trial_decides_nothing(clock):
    breaker = Breaker(clock)
    meet_errors(breaker, ["acme", "globex"])
    clock.now = FIRST_DELAY_SECONDS
    for number in range(20):
        trial = breaker.begin()
        assert not breaker.note_error("acme", b"%d" % number)
        breaker.end(trial=trial)
        assert breaker.admits
    assert breaker.seconds_to_trial() == 0


def test_answers_that_begin_and_break_off_open_it_all_the_same(clock):
    breaker = Breaker(clock)
    for _ in range(FAILURES_TO_OPEN):
        assert breaker.admits
        trial = breaker.begin()
        breaker.answer_begins()
        breaker.fail(trial=trial)
    assert not breaker.admits


def test_a_trial_whose_answer_begins_lets_all_through_but_does_not_forget(opened, clock):
    clock.now = FIRST_DELAY_SECONDS
    trial = opened.begin()
    opened.answer_begins()
    assert opened.closed
    assert opened.fail(trial=trial)
    assert opened.seconds_to_trial() == 2 * FIRST_DELAY_SECONDS


@settings(deadline=None)
@given(st.lists(st.sampled_from(["begin", "fail", "error", "answer", "succeed", "leave", "wait"]), max_size=60))
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
            elif event == "error":
                breaker.note_error("acme" if len(running) % 2 else "globex", b"%d" % len(running))
            elif event == "answer":
                breaker.answer_begins()
            elif event == "succeed":
                breaker.succeed()
            breaker.end(trial=trial)
        assert sum(running) <= 1 or breaker.closed
    for trial in running:
        breaker.end(trial=trial)
    clock.now += LONGEST_DELAY_SECONDS
    assert breaker.admits
