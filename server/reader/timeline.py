"""Which frames of a video are shown, in which order and when: worked out from its packets alone."""

import itertools
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_STEP_BACK_SECONDS = 1.0  # clocks stumble over damage; only recordings that were joined go back further
MAX_LEAP_SECONDS = 10.0  # in streams whose clock may leap; what ffmpeg takes as one (-dts_delta_threshold)


class PacketTimes(NamedTuple):
    """What one packet says. Times are in ticks of the stream; None is unknown."""

    pts: int | None
    dts: int | None
    duration: int
    is_key: bool
    is_shown: bool
    """Whether its frame is displayed: not one that others are only made from, not one cut away by an edit list."""
    is_rest: bool = False
    """Whether it is the second field of the frame that the packet before begins."""
    layer: int = 0
    """The temporal layer."""
    is_referred: bool = True
    """Whether other frames of its layer may refer to its frame."""


@dataclass(frozen=True)
class Clock:
    """How a stream's times are to be read."""

    ticks_per_second: float
    interval: float
    """Ticks between frames, where the packets don't tell."""
    leaps: bool = False
    """Whether the clock may leap, and a frame come twice, as in streams that are broadcast."""


@dataclass(frozen=True)
class Timeline:
    """A video as it is shown."""

    packets: Sequence[int]
    """The number of each frame's packet, in the order of display."""
    seconds: Sequence[float]
    """When each is shown, from 0 on."""
    duration: float

    @property
    def fps(self) -> float:
        """Frames a second, on average."""
        return len(self.packets) / self.duration if self.duration > 0 else 0.0

    def within(self, start: float, end: float | None) -> range:
        """Return the frames that are shown between two times, at least the one at `start`; empty if there is none."""
        if start >= self.duration or (end is not None and end <= start):
            return range(0)
        first = bisect_left(self.seconds, self.seconds[bisect_right(self.seconds, start) - 1])
        return range(first, len(self.seconds) if end is None else max(first + 1, bisect_left(self.seconds, end)))


def first_key(packets: Sequence[PacketTimes]) -> int:
    """Return the number of the packet that decoding begins with."""
    return next((number for number, packet in enumerate(packets) if packet.is_key), 0)


def leading(packets: Sequence[PacketTimes]) -> list[int]:
    """Return the packets behind the first key frame that are shown before it: some need frames that aren't there."""
    key = first_key(packets)
    begin = packets[key].pts if packets else None
    found: list[int] = []
    if begin is None:
        return found
    for number in range(key + 1, len(packets)):
        packet = packets[number]
        if packet.is_key:
            break
        if packet.pts is not None and packet.pts < begin and packet.is_shown:
            found.append(number)
    return found


def needs_decoding(packets: Sequence[PacketTimes], *, is_made_up: bool) -> bool:
    """Return whether the packets don't tell the order of display.

    Where libav may have made up times, those that two packets share show that it did.
    """
    times = [packet.pts for packet in packets if packet.is_shown]
    return 2 * times.count(None) > len(times) or (is_made_up and len(set(times)) < len(times))


def timeline(
    packets: Sequence[PacketTimes], clock: Clock, *, missing: frozenset[int] = frozenset(), order: Sequence[int] = ()
) -> Timeline:
    """Return when which packets' frames are shown, other than the `missing` ones, from the first key frame on.

    `order` is that of the decoder's output, if the packets don't tell.
    """
    if order:
        return _in_order(packets, clock, order)
    first = first_key(packets)
    sections: list[list[tuple[int, int]]] = []
    for numbers in _sections(packets, clock, first):
        shown = [number for number in numbers if packets[number].is_shown and number not in missing]
        if shown:
            sections.append(_timed(packets, _once(packets, shown) if clock.leaps else shown))
    interval = _interval(sections, packets) or clock.interval
    in_order: list[int] = []
    ticks: list[float] = []
    for section in sections:
        offset = ticks[-1] + interval - section[0][0] if ticks else -section[0][0]
        in_order += [number for _, number in section]
        ticks += [time + offset for time, _ in section]
    last = packets[in_order[-1]].duration or interval if in_order else 0
    return _laid_out(in_order, ticks, last=last, clock=clock)


def _in_order(packets: Sequence[PacketTimes], clock: Clock, order: Sequence[int]) -> Timeline:
    """Take the times in the order of decoding: they are those of display, but for who has which."""
    times = sorted(time for number in order if (time := packets[number].dts) is not None)
    if len(times) < len(order) or times[0] == times[-1]:
        ticks = [number * clock.interval for number in range(len(order))]
        return _laid_out(order, ticks, last=clock.interval, clock=clock)
    last = packets[order[-1]].duration or (times[-1] - times[0]) / (len(times) - 1)
    return _laid_out(order, [float(time - times[0]) for time in times], last=last, clock=clock)


def _laid_out(numbers: Sequence[int], ticks: Sequence[float], *, last: float, clock: Clock) -> Timeline:
    end = ticks[-1] + last if ticks else 0.0
    return Timeline(numbers, [time / clock.ticks_per_second for time in ticks], end / clock.ticks_per_second)


def _sections(packets: Sequence[PacketTimes], clock: Clock, first: int) -> Iterator[list[int]]:
    """Give the packets between one jump of the clock and the next."""
    section: list[int] = []
    before: int | None = None
    for number in range(first, len(packets)):
        now = packets[number].dts
        if now is not None:
            if before is not None and _jumps(now - before, packets[number].is_key, clock):
                yield section
                section = []
            before = now
        section.append(number)
    yield section


def _jumps(step: float, is_key: bool, clock: Clock) -> bool:
    if step < 0:
        return is_key or -step > MAX_STEP_BACK_SECONDS * clock.ticks_per_second
    return clock.leaps and step > MAX_LEAP_SECONDS * clock.ticks_per_second


def _timed(packets: Sequence[PacketTimes], numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return the packets in the order of display, each behind its time; those without one stay behind the last."""
    timed, time = [], 0
    for number in numbers:
        packet = packets[number]
        known = packet.pts if packet.pts is not None else packet.dts
        time = known if known is not None else time + packet.duration
        timed.append((time, number))
    return sorted(timed)


def _once(packets: Sequence[PacketTimes], numbers: Sequence[int]) -> list[int]:
    """Leave out frames that come again at once: what was sent twice is whole the second time."""
    return [
        number
        for number, following in zip(numbers, [*numbers[1:], None], strict=True)
        if following is None or packets[number][:2] != packets[following][:2] or packets[number].pts is None
    ]


def _interval(sections: Sequence[Sequence[tuple[int, int]]], packets: Sequence[PacketTimes]) -> float:
    """Return the time between frames: mostly, or what the packets say; 0 if nothing tells."""
    steps = [b[0] - a[0] for section in sections for a, b in itertools.pairwise(section) if b[0] > a[0]]
    return statistics.median(steps or [packet.duration for packet in packets] or [0])
