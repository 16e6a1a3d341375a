import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.aliases import Alias, Asked, Sampling
from server.errors import RetentionRefused, SamplingRefused

hundredths = st.integers(1, 100).map(lambda n: n / 100)


@given(
    st.lists(hundredths, min_size=2, max_size=2).map(sorted),
    st.floats(allow_nan=False, min_value=-2, max_value=3) | hundredths,
)
def test_a_retention_is_taken_exactly_if_it_is_inside_the_bounds_and_never_leaves_them(bounds, asked):
    low, high = bounds
    alias = Alias("a", "m", None, low, high)
    if low <= asked <= high:
        given_ = alias.target(Asked(asked)).retention
        assert low <= given_ <= high
        assert abs(given_ - asked) <= 0.005 + 1e-12
        assert given_ == round(given_, 2)
    else:
        with pytest.raises(RetentionRefused):
            alias.target(Asked(asked))


@given(st.floats(min_value=0, max_value=1, exclude_min=True))
def test_without_bounds_everything_above_0_up_to_1_is_taken(asked):
    assert 0.01 <= Alias("a", "m").target(Asked(asked)).retention <= 1


@pytest.mark.parametrize("asked", [0.0, -0.1, 1.0001])
def test_without_bounds_everything_else_is_refused(asked):
    with pytest.raises(RetentionRefused, match=r"\(0, 1\]"):
        Alias("a", "m").target(Asked(asked))


def test_what_is_not_asked_is_the_default_of_the_alias():
    assert Alias("a", "m", 0.1, 0.05, 0.5).target().retention == 0.1
    assert Alias("a", "m").target().retention is None


def test_a_bound_on_tokens_decides_within_the_bounds_of_the_alias():
    target = Alias("a", "m", 0.1, 0.05, 0.5).target(Asked(tokens=2000))
    assert (target.retention, target.max_tokens, target.min_retention, target.max_retention) == (None, 2000, 0.05, 0.5)


def test_an_engine_is_told_what_the_alias_or_the_request_names_and_nothing_else():
    assert Alias("a", "m").target().processor_kwargs == {}
    assert Alias("a", "m", 0.1).target().processor_kwargs == {"aot_retention": 0.1}
    assert Alias("a", "m", preset="paper").target().processor_kwargs == {"aot_preset": "paper"}
    both = Alias("a", "m", 0.1, preset="paper").target(Asked(0.3)).processor_kwargs
    assert both == {"aot_retention": 0.3, "aot_preset": "paper"}


def test_frames_are_bounded_by_the_alias():
    alias = Alias("a", "m", max_frames=64)
    assert alias.target(Asked(sampling=Sampling(frames=64))).sampling == Sampling(frames=64, max_frames=64)
    assert alias.target(Asked(sampling=Sampling(fps=2.0))).sampling == Sampling(fps=2.0, max_frames=64)
    with pytest.raises(SamplingRefused, match=r"\[1, 64\].*got 65") as caught:
        alias.target(Asked(sampling=Sampling(frames=65)))
    assert caught.value.param == "aot.frames"
    assert Alias("a", "m").target(Asked(sampling=Sampling(frames=10**6))).sampling.frames == 10**6
