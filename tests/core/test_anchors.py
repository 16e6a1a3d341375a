import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aot_vllm.core.anchors import select_anchors
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
    """14 cells by 9: two windows of 7, not one of 9 and one of 5, so that each quarter has a quarter of the anchors."""
    scores = torch.arange(196.0).reshape(1, 196)
    chosen = select_anchors(scores, scores, rows=14, cols=14, count=20, global_ratio=0.0, window=9)
    rows, cols = chosen // 14, chosen % 14
    quarters = (rows // 7 * 2 + cols // 7).flatten().bincount()
    assert quarters.tolist() == [5, 5, 5, 5]
