import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from aot_vllm.core import distances
from aot_vllm.core.anchors import select_anchors, select_diverse_anchors
from aot_vllm.errors import SettingError, ShapeError
from tests import reference
from tests.strategies import grids, many, noise, seeds


def draw(data, grid):
    return {
        "rows": grid.rows,
        "cols": grid.cols,
        "count": data.draw(st.integers(1, grid.positions)),
        "global_ratio": data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0])),
        "window": data.draw(st.integers(1, 12)),
    }


@many
@given(grid=grids(frames=3, side=13), seed=seeds, data=st.data())
def test_the_choice_is_that_of_the_oracle(grid, seed, data):
    local, glob = noise(seed, 2, grid.frames, grid.positions)
    arguments = draw(data, grid)
    chosen = select_anchors(local, glob, **arguments)
    for frame in range(grid.frames):
        assert chosen[frame].tolist() == reference.select_anchors(
            local[frame].tolist(), glob[frame].tolist(), **arguments
        )


@many
@given(grid=grids(frames=3, side=9), seed=seeds, data=st.data())
def test_ties_go_to_the_lower_position_in_a_batch_and_alone(grid, seed, data):
    local, glob = (noise(seed, 2, grid.frames, grid.positions) * 2).round()
    arguments = draw(data, grid)
    chosen = select_anchors(local, glob, **arguments)
    for frame in range(grid.frames):
        assert chosen[frame].tolist() == reference.select_anchors(
            local[frame].tolist(), glob[frame].tolist(), **arguments
        )
        alone = select_anchors(local[frame : frame + 1], glob[frame : frame + 1], **arguments)
        assert torch.equal(alone[0], chosen[frame])


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf, 65504.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_constant_scores_of_any_kind_still_give_the_exact_count(value, dtype):
    scores = torch.full((2, 15), value, dtype=dtype)
    chosen = select_anchors(scores, scores, rows=3, cols=5, count=7, window=2)
    assert chosen.shape == (2, 7)
    assert (chosen.diff(dim=1) > 0).all()


def test_a_nan_ranks_lowest():
    scores = torch.arange(16.0).unsqueeze(0)
    scores[0, [3, 15]] = torch.nan
    chosen = select_anchors(scores, scores, rows=4, cols=4, count=14, global_ratio=1.0)
    assert chosen.tolist() == [[p for p in range(16) if p not in (3, 15)]]


def test_with_a_global_ratio_of_1_the_local_scores_do_not_matter():
    local, glob = noise(1, 2, 2, 49)
    chosen = select_anchors(local, glob, rows=7, cols=7, count=10, global_ratio=1.0)
    assert torch.equal(chosen, glob.topk(10).indices.sort(1).values)


def test_each_window_has_its_share_of_local_anchors():
    local, glob = noise(2, 2, 3, 36)
    chosen = select_anchors(local, glob, rows=6, cols=6, count=8, global_ratio=0.0, window=3)
    quarter = (chosen // 6 // 3) * 2 + chosen % 6 // 3
    assert all(torch.bincount(row, minlength=4).tolist() == [2, 2, 2, 2] for row in quarter)


@pytest.mark.parametrize("count", [0, 10, -1, True, 2.0, None])
def test_a_count_outside_the_frame_is_refused(count):
    with pytest.raises(SettingError, match="count"):
        select_anchors(torch.ones(1, 9), torch.ones(1, 9), rows=3, cols=3, count=count)


@pytest.mark.parametrize(("name", "value"), [("global_ratio", 1.5), ("window", 0), ("global_ratio", torch.nan)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(SettingError, match=name):
        select_anchors(torch.ones(1, 9), torch.ones(1, 9), rows=3, cols=3, count=2, **{name: value})


def test_scores_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(ShapeError, match=r"local_scores must have shape \(frames, 9\), got \(1, 8\)"):
        select_anchors(torch.ones(1, 8), torch.ones(1, 8), rows=3, cols=3, count=1)
    with pytest.raises(ShapeError, match="global_scores"):
        select_anchors(torch.ones(2, 9), torch.ones(1, 9), rows=3, cols=3, count=1)


def test_a_window_that_does_not_divide_the_grid_cuts_it_evenly():
    """A window of 9 cuts a side of 14 into 7 and 7, not into 9 and 5. So each quarter has a quarter of the anchors."""
    scores = torch.arange(196.0).reshape(1, 196)
    chosen = select_anchors(scores, scores, rows=14, cols=14, count=20, global_ratio=0.0, window=9)
    rows, cols = chosen // 14, chosen % 14
    quarters = (rows // 7 * 2 + cols // 7).flatten().bincount()
    assert quarters.tolist() == [5, 5, 5, 5]


DISTANCES = st.sampled_from(["euclidean", "cosine"])
MEMORIES = st.sampled_from(["previous", "carried", "all"])


@many
@given(
    frames=st.integers(1, 6),
    positions=st.integers(1, 25),
    seed=seeds,
    distance=DISTANCES,
    memory=MEMORIES,
    weighted=st.booleans(),
    data=st.data(),
)
def test_diverse_anchors_are_those_of_the_oracle(frames, positions, seed, distance, memory, weighted, data):
    assume(positions != 2)  # of two tokens, neither is farther from the other
    features = noise(seed, frames, positions, 8)
    features[:, ::7] *= 30
    count = data.draw(st.integers(1, positions))
    keep = data.draw(st.lists(st.integers(0, count), min_size=frames, max_size=frames))
    weights = noise(seed + 1, frames, positions).exp() if weighted else None
    options = {"distance": distance, "memory": memory}
    chosen = select_diverse_anchors(features, count=count, keep=keep, weights=weights, **options)
    expected = reference.select_diverse_anchors_of_video(
        features.tolist(), count, keep, weights=weights.tolist() if weighted else None, **options
    )
    assert chosen.tolist() == expected


@pytest.mark.parametrize("memory", ["previous", "carried", "all"])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_without_a_table_the_choice_is_the_same(distance, memory, monkeypatch):
    features, weights = noise(7, 5, 30, 8), noise(8, 5, 30).exp()
    features[:, 3] *= 30
    arguments = {"count": 6, "keep": [6, 0, 2, 5, 6], "weights": weights, "distance": distance, "memory": memory}
    with_table = select_diverse_anchors(features, **arguments)
    monkeypatch.setattr(distances, "TABLE_BYTES", 1)
    assert torch.equal(select_diverse_anchors(features, **arguments), with_table)


def test_an_equal_weight_changes_nothing():
    features = noise(4, 3, 20, 8)
    weights = torch.full((3, 20), 2.0)  # a power of 2 changes no digit
    assert torch.equal(
        select_diverse_anchors(features, count=7, weights=weights), select_diverse_anchors(features, count=7)
    )


def test_a_heavy_token_is_chosen_first_and_a_light_one_last():
    features, weights = noise(5, 2, 20, 8), torch.ones(2, 20)
    weights[:, 3], weights[:, 8] = 1e3, 1e-3
    chosen = select_diverse_anchors(features, count=20, keep=0, weights=weights)
    assert chosen[:, 0].tolist() == [3, 3]
    assert chosen[:, -1].tolist() == [8, 8]


@pytest.mark.parametrize("memory", ["carried", "all"])
def test_content_that_an_early_frame_keeps_is_not_kept_again(memory):
    """Six things stand still for three frames, and two are kept of each. The frame before alone knows four of them."""
    frames = torch.stack([torch.eye(6)] * 3)
    kept = select_diverse_anchors(frames, count=2, memory=memory)
    assert sorted(kept.flatten().tolist()) == list(range(6))


def test_carried_content_fades_where_it_changes():
    """After a cut, nothing that was kept before counts as near."""
    frames = noise(6, 4, 12, 8)
    frames[2:] = noise(7, 1, 12, 8) * 2
    carried = select_diverse_anchors(frames, count=3, memory="carried")
    assert set(carried[2].tolist()).isdisjoint(carried[3].tolist())


def test_with_cosine_a_token_may_be_of_any_length():
    features, lengths = noise(9, 4, 30, 8), noise(10, 4, 30, 1).exp()
    chosen = select_diverse_anchors(features, count=9, distance="cosine")
    assert torch.equal(select_diverse_anchors(features * lengths, count=9, distance="cosine"), chosen)


def test_by_plain_distance_tokens_of_ordinary_length_stay_as_they_are():
    features = noise(9, 3, 30, 64)  # lengths of 5.6 to 9.3
    plain = [frame.unsqueeze(0) for frame in features]
    for frame in plain:
        chosen = select_diverse_anchors(frame, count=5)[0].tolist()
        assert chosen == reference.spread_out(frame[0].tolist(), None, 5)


def test_weights_that_do_not_fit_the_features_are_refused():
    with pytest.raises(ShapeError, match=r"weights must have shape \(3, 9\), got \(3, 8\)"):
        select_diverse_anchors(noise(1, 3, 9, 2), count=1, weights=torch.ones(3, 8))


def test_repeated_content_is_chosen_once_and_rare_content_is_chosen():
    background, things = torch.eye(8)[0], torch.eye(8)[1:4]
    frame = background.repeat(25, 1)
    frame[[3, 4, 5, 11, 17]] = things[[0, 0, 0, 1, 2]]
    for scaled in (frame, frame * 3):
        chosen = select_diverse_anchors(scaled[None], count=4)
        assert chosen.sort(dim=1).values.tolist() == [[0, 3, 11, 17]]


def test_each_frame_chooses_content_that_the_previous_frame_does_not_keep():
    chosen = select_diverse_anchors(torch.stack([torch.eye(6)] * 3), count=3, keep=[3, 2, 3])
    first, second, third = (set(row) for row in chosen.tolist())
    assert first | second == set(range(6))
    assert set(chosen[1, :2].tolist()).isdisjoint(third)


def test_a_larger_choice_starts_with_the_smaller_choice():
    features = noise(5, 9, 30, 16)
    more = select_diverse_anchors(features, count=10, keep=4)
    assert torch.equal(more[:, :6], select_diverse_anchors(features, count=6, keep=4))


@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan, torch.inf, 65504.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_constant_frames_of_any_kind_still_give_the_exact_count(value, dtype):
    chosen = select_diverse_anchors(torch.full((2, 15, 4), value, dtype=dtype), count=7)
    assert chosen.shape == (2, 7)
    assert (chosen.sort(dim=1).values.diff(dim=1) > 0).all()


def test_features_with_nan_do_not_change_the_count():
    features = noise(3, 4, 20, 6)
    features[1, 7] = torch.nan
    features[2, :, 3] = torch.inf
    chosen = select_diverse_anchors(features, count=9)
    assert (chosen.sort(dim=1).values.diff(dim=1) > 0).all()
    assert torch.equal(chosen[:1], select_diverse_anchors(features[:1], count=9))


@pytest.mark.parametrize("count", [0, 10, -1, True, 2.0, None])
def test_a_count_of_diverse_anchors_outside_the_frame_is_refused(count):
    with pytest.raises(SettingError, match="count"):
        select_diverse_anchors(torch.ones(1, 9, 2), count=count)


@pytest.mark.parametrize("shape", [(9, 2), (0, 9, 2), (1, 0, 2), (1, 9, 0)])
def test_features_that_are_not_frames_of_tokens_are_refused(shape):
    with pytest.raises(ShapeError, match=r"features must have shape \(frames, positions, width\), all at least 1"):
        select_diverse_anchors(torch.ones(shape), count=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": [1, 1]}, "keep must have 3 counts, got 2"),
        ({"keep": 5}, "keep must be at most 4"),
        ({"keep": -1}, "keep must be an integer of at least 0, got -1"),
    ],
)
def test_counts_that_do_not_fit_the_frames_are_refused(arguments, message):
    with pytest.raises(SettingError, match=message):
        select_diverse_anchors(noise(1, 3, 9, 2), count=4, **arguments)
