import math
import subprocess
import sys
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engines.routing import choose, load_bound, rendezvous_order

KEYS = [f"key-{i}" for i in range(300)]


@dataclass(eq=False)
class Candidate:
    url: str
    inflight: int = 0
    last_chosen: int = 0


def pool(count, loads=None):
    return [Candidate(f"http://engine-{i}:8000", (loads or [0] * count)[i]) for i in range(count)]


loads = st.lists(st.integers(0, 200), min_size=1, max_size=12)


@settings(deadline=None)
@given(st.integers(2, 12), st.data())
def test_an_engine_that_goes_moves_only_its_own_keys(count, data):
    engines = pool(count)
    gone = data.draw(st.sampled_from(engines))
    rest = [engine for engine in engines if engine is not gone]
    for key in KEYS[:60]:
        before, after = choose(engines, key)[0], choose(rest, key)[0]
        assert after is before or before is gone


@settings(deadline=None)
@given(loads, st.text(max_size=8))
def test_no_engine_is_given_more_than_the_bound(loads, key):
    engines = pool(len(loads), loads)
    average = (sum(loads) + 1) / len(loads)
    chosen, outcome = choose(engines, key)
    assert chosen.inflight + 1 <= max(1.25 * average, average + 1)
    home = rendezvous_order(engines, key)[0]
    assert (outcome == "hit") == (chosen is home)
    if outcome == "spilled":
        assert home.inflight + 1 > load_bound(engines)


@settings(deadline=None)
@given(st.integers(1, 8), st.lists(st.sampled_from(KEYS[:5]), max_size=150))
def test_the_bound_holds_while_requests_pile_up(count, keys):
    engines = pool(count)
    for placed, key in enumerate(keys, 1):
        choose(engines, key)[0].inflight += 1
        assert max(engine.inflight for engine in engines) <= math.ceil(max(1.25 * placed / count, placed / count + 1))


@settings(deadline=None)
@given(st.permutations(range(6)))
def test_the_order_in_which_engines_are_listed_does_not_matter(order):
    engines = pool(6)
    shuffled = [engines[i] for i in order]
    assert all(choose(engines, key)[0] is choose(shuffled, key)[0] for key in KEYS[:40])


def test_keys_spread_over_the_engines():
    counts = {engine.url: 0 for engine in pool(4)}
    for key in KEYS:
        counts[choose(pool(4), key)[0].url] += 1
    assert min(counts.values()) > 45  # the mean is 75, the standard deviation 7.5


def test_another_process_makes_the_same_choices():
    program = (
        "from tests.server.engines.test_routing import *;"
        "print([choose(pool(5), key)[0].url for key in KEYS], rendezvous_order.__module__)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = f"{[choose(pool(5), key)[0].url for key in KEYS]} server.engines.routing\n"
    assert outputs == {here.encode()}


@settings(deadline=None)
@given(loads)
def test_without_a_key_the_least_loaded_engine_is_chosen(loads):
    engines = pool(len(loads), loads)
    chosen, outcome = choose(engines, None)
    assert chosen.inflight == min(loads)
    assert outcome == "none"


def test_equally_loaded_engines_take_turns():
    engines = pool(3)
    order = []
    for number in range(1, 10):
        chosen, _ = choose(engines, None)
        chosen.last_chosen = number
        order.append(chosen.url[-6])
    assert order == list("012") * 3
