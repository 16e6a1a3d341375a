"""Anchors that cover a frame: greedy facility location."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aot_vllm.core import coverage, distances
from aot_vllm.core.anchors import select_diverse_anchors
from aot_vllm.core.coverage import num_candidates, select_covering_anchors
from aot_vllm.errors import SettingError, ShapeError
from tests import reference
from tests.strategies import few, noise, seeds


def gaps(frame, chosen):
    """Return the squared distance of each direction of a frame to the nearest chosen one."""
    directions = torch.nn.functional.normalize(frame.double(), dim=-1)
    return torch.cdist(directions, directions[chosen]).square().amin(1)


@few
@given(
    frames=st.integers(1, 4),
    positions=st.integers(3, 14),
    seed=seeds,
    distance=st.sampled_from(["euclidean", "cosine"]),
    memory=st.sampled_from(["previous", "carried", "all"]),
    data=st.data(),
)
def test_the_choice_is_that_of_the_oracle(frames, positions, seed, distance, memory, data):
    features = noise(seed, frames, positions, 8)
    count = data.draw(st.integers(1, positions // 2))  # once all is covered, nothing is left to gain
    keep = data.draw(st.lists(st.integers(0, count), min_size=frames, max_size=frames))
    options = {"distance": distance, "memory": memory}
    chosen = select_covering_anchors(features, count=count, keep=keep, **options)
    assert chosen.tolist() == reference.select_covering_anchors_of_video(features.tolist(), count, keep, **options)


def test_every_content_is_covered_in_the_order_of_its_size():
    """Five directions, which cover 9, 7, 5, 3 and 1 of 25 tokens."""
    frame = torch.eye(5).repeat_interleave(torch.tensor([3, 7, 1, 9, 5]), dim=0)
    (chosen,) = select_covering_anchors(frame[None], count=5).tolist()
    assert [int(frame[at].argmax()) for at in chosen] == [3, 1, 4, 0, 2]


def test_the_mean_gap_is_smaller_than_that_of_tokens_far_from_each_other():
    features = torch.cat((noise(2, 1, 80, 16) * 0.2 + noise(3, 1, 1, 16), noise(4, 1, 20, 16)), dim=1)
    covering, diverse = (
        gaps(features[0], select(features, count=10, distance="cosine")[0]).mean()
        for select in (select_covering_anchors, select_diverse_anchors)
    )
    assert covering < 0.9 * diverse


def test_each_choice_lowers_the_cost_by_less_than_the_one_before():
    """Facility location is submodular. The first choice has nothing to compare with."""
    features = noise(5, 1, 40, 8)
    order = select_covering_anchors(features, count=40)[0]
    costs = torch.stack([gaps(features[0], order[:size]).sum() for size in range(1, 41)])
    gains = -costs.diff()
    assert (gains > -1e-9).all()
    assert (gains.diff() < 1e-6).all()


@pytest.mark.parametrize("memory", ["carried", "all"])
def test_content_that_an_early_frame_keeps_is_not_kept_again(memory):
    kept = select_covering_anchors(torch.stack([torch.eye(6)] * 3), count=2, memory=memory)
    assert sorted(kept.flatten().tolist()) == list(range(6))


def test_a_larger_choice_starts_with_the_smaller_choice():
    features = noise(5, 4, 30, 16)
    more = select_covering_anchors(features, count=10, keep=4)
    assert torch.equal(more[:, :6], select_covering_anchors(features, count=6, keep=4))


@pytest.mark.parametrize(
    ("positions", "count", "candidates"),
    [(196, 20, 196), (1024, 1000, 1024), (4096, 100, 1024), (4096, 1000, 2000), (4096, 4096, 4096), (1, 1, 1)],
)
def test_large_frames_have_fewer_candidates_but_always_enough(positions, count, candidates):
    assert num_candidates(positions, count=count) == candidates


def test_a_large_frame_is_covered_by_evenly_spaced_candidates(monkeypatch):
    monkeypatch.setattr(coverage, "ALL_CANDIDATES", 8)
    features = noise(6, 3, 20, 8)
    chosen = select_covering_anchors(features, count=3)
    candidates = [at * 20 // 8 for at in range(8)]
    expected = reference.select_covering_anchors_of_video(
        features.tolist(), 3, [3] * 3, candidates=candidates, distance="cosine"
    )
    assert chosen.tolist() == expected
    monkeypatch.setattr(distances, "TABLE_BYTES", 1)
    assert torch.equal(select_covering_anchors(features, count=3), chosen)


@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan, torch.inf, 65504.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_constant_frames_of_any_kind_still_give_the_exact_count(value, dtype):
    chosen = select_covering_anchors(torch.full((2, 15, 4), value, dtype=dtype), count=7)
    assert (chosen.sort(dim=1).values.diff(dim=1) > 0).all()


def test_features_with_nan_do_not_change_the_count_and_are_chosen_last():
    features = noise(3, 4, 20, 6)
    features[:, 7] = torch.nan
    features[2, :, 3] = torch.inf
    chosen = select_covering_anchors(features, count=20)
    assert (chosen.sort(dim=1).values.diff(dim=1) > 0).all()
    assert 7 not in chosen[:2, :10]
    assert torch.equal(chosen[:1], select_covering_anchors(features[:1], count=20))


def test_what_does_not_fit_is_refused():
    with pytest.raises(SettingError, match="count must be at most 9"):
        select_covering_anchors(torch.ones(1, 9, 2), count=10)
    with pytest.raises(ShapeError, match=r"features must have shape \(frames, positions, width\)"):
        select_covering_anchors(torch.ones(9, 2), count=1)
