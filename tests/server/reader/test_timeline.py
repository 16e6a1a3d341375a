"""Times of packets as they occur, and what they mean."""

import pytest

from server.reader.timeline import Clock, PacketTimes, leading, needs_decoding, timeline

CLOCK = Clock(ticks_per_second=1000, interval=40)
BROADCAST = Clock(ticks_per_second=1000, interval=40, leaps=True)


def packet(pts, dts=None, *, key=False, shown=True, duration=40):
    return PacketTimes(pts, pts if dts is None else dts, duration, key, shown)


def even(begin, count, *, step=40):
    return [packet(begin + step * number, key=number == 0, duration=step) for number in range(count)]


def test_frames_come_in_the_order_of_their_times_not_of_their_packets():
    packets = [packet(80, 0, key=True), packet(200, 40), packet(120, 80), packet(160, 120)]
    found = timeline(packets, CLOCK)
    assert found.packets == [0, 2, 3, 1]
    assert found.seconds == [0, 0.04, 0.08, 0.12]
    assert (found.duration, found.fps) == (0.16, 25)


def test_a_late_begin_is_no_part_of_the_duration():
    assert timeline(even(10_000_000, 25), CLOCK).duration == 1


def test_hidden_frames_and_what_comes_before_the_first_key_frame_are_not_counted():
    packets = [packet(0), packet(40), packet(80, key=True), packet(120), packet(120, shown=False), packet(160)]
    assert timeline(packets, CLOCK).packets == [2, 3, 5]


def test_what_is_shown_before_the_first_key_frame_may_be_missing():
    packets = [packet(120, 0, key=True), packet(40, 40), packet(80, 80), packet(160, 120), packet(150, 130)]
    assert leading(packets) == [1, 2]
    assert timeline(packets, CLOCK, missing=frozenset({1})).packets == [2, 0, 4, 3]
    assert leading([]) == []


@pytest.mark.parametrize("begin", [0, 500, 5_000_000])
def test_a_jump_of_the_clock_counts_as_one_frame(begin):
    found = timeline(even(1000, 25) + even(begin, 25), BROADCAST)
    assert found.packets == list(range(50))
    assert found.seconds[24:27] == pytest.approx([0.96, 1.0, 1.04])
    assert found.duration == pytest.approx(2)


def test_a_long_frame_is_a_long_frame_where_clocks_do_not_leap():
    packets = [*even(0, 2), packet(60_000)]
    assert timeline(packets, CLOCK).duration == 60.04
    assert timeline(packets, BROADCAST).duration == pytest.approx(0.12)


def test_a_clock_that_stumbles_is_no_jump():
    packets = [packet(0, key=True), packet(40), packet(80, 30), packet(120)]
    assert timeline(packets, CLOCK).seconds == [0, 0.04, 0.08, 0.12]


def test_a_frame_that_came_twice_at_once_is_shown_once():
    packets = [packet(0, key=True), packet(40), packet(40), packet(80)]
    assert timeline(packets, BROADCAST).packets == [0, 2, 3]
    assert timeline(packets, CLOCK).packets == [0, 1, 2, 3]


def test_a_frame_without_a_time_comes_behind_the_one_before():
    packets = [packet(0, key=True), PacketTimes(None, None, 40, False, True), packet(80), packet(120)]
    assert not needs_decoding(packets, is_made_up=False)
    assert timeline(packets, CLOCK).packets == [0, 1, 2, 3]


def test_times_that_are_missing_or_made_up_are_left_to_the_decoder():
    without = [PacketTimes(None, 40 * number, 40, number == 0, True) for number in range(4)]
    assert needs_decoding(without, is_made_up=False)
    twice = [packet(0, key=True), packet(40), packet(40, 50)]
    assert needs_decoding(twice, is_made_up=True)
    assert not needs_decoding(twice, is_made_up=False)
    found = timeline(without, CLOCK, order=[0, 2, 1, 3])
    assert (found.packets, found.seconds) == ([0, 2, 1, 3], [0, 0.04, 0.08, 0.12])
    assert found.duration == 0.16


def test_without_any_time_the_rate_tells():
    packets = [PacketTimes(None, None, 0, True, True)] * 5
    assert timeline(packets, CLOCK, order=range(5)).duration == 0.2


def test_a_last_frame_of_unknown_length_lasts_as_long_as_others():
    packets = [packet(number * 50, key=not number, duration=0) for number in range(10)]
    assert timeline(packets, CLOCK).duration == 0.5
    assert timeline(packets[:1], CLOCK).duration == 0.04


def test_nothing_is_nothing():
    found = timeline([], CLOCK)
    assert (found.packets, found.duration, found.fps) == ([], 0, 0)


def test_a_range_has_the_frame_that_is_shown_at_its_begin():
    found = timeline(even(0, 25), CLOCK)
    assert found.within(0, None) == range(25)
    assert found.within(0.5, 0.6) == range(12, 15)
    assert found.within(0.5, 0.501) == range(12, 13)
    assert found.within(0.999, None) == range(24, 25)
    assert not found.within(1, None)
    assert not found.within(0.5, 0.5)
