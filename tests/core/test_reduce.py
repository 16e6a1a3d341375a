import dataclasses
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from aot_vllm import AOTConfig, VideoGrid, budget, reduce_video
from aot_vllm.core.reduce import needs_scores
from aot_vllm.errors import SettingError, ShapeError
from tests import reference
from tests.strategies import configs, few, grids, many, retentions, seeds, video

FIELDS = ("tokens", "frames", "rows", "cols")


def same_bits(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


@few
@given(
    grid=grids(frames=9, side=4),
    seed=seeds,
    retention=retentions,
    config=configs,
    compared=st.sampled_from([None, 3, 6, 11]),
)
def test_the_reduction_is_that_of_the_oracle(grid, seed, retention, config, compared):
    assume(grid.positions != 2 or config.anchors == "attention")  # of two tokens, neither is farther from the other
    inputs = video(seed, grid)
    reduced = reduce_video(*inputs, grid=grid, retention=retention, config=config, compared=compared)
    survivors = reference.reduce_video(
        *(tensor.tolist() for tensor in inputs), grid.rows, grid.cols, retention, dataclasses.asdict(config), compared
    )
    assert reduced.frames.tolist() == [frame for _, frame, _ in survivors]
    assert (reduced.rows * grid.cols + reduced.cols).tolist() == [cell for _, _, cell in survivors]
    torch.testing.assert_close(reduced.tokens, torch.tensor([token for token, _, _ in survivors]), rtol=1e-4, atol=1e-5)


@few
@given(grid=grids(frames=9, side=5), seed=seeds, retention=retentions, config=configs)
def test_a_setting_that_takes_no_effect_changes_neither_tokens_nor_counts(grid, seed, retention, config):
    """The layers are read where scores are made, not here."""
    other = {
        "global_ratio": 0.9,
        "window": 2,
        "epsilon": 0.7,
        "iterations": 1,
        "tolerance": 1.0,
        "spatial_weight": 9.0,
        "temporal_sigma": 9.0,
        "clips": 3,
    }
    idle = {name: value for name, value in other.items() if not config.uses(name)}
    inputs, changed = video(seed, grid), replace(config, **idle)
    one, another = (
        reduce_video(*inputs, grid=grid, retention=retention, config=either) for either in (config, changed)
    )
    assert same_bits(one, another)
    assert one.budget == another.budget
    assert config.digest() == changed.digest()


@many
@given(grid=grids(frames=40, side=8), seed=seeds, retention=retentions, config=configs)
def test_the_count_is_the_budget_in_total_and_for_each_frame(grid, seed, retention, config):
    counts = budget(grid, retention=retention, config=config)
    reduced = reduce_video(*video(seed, grid, width=3), grid=grid, retention=retention, config=config)
    assert reduced.budget == counts
    assert reduced.tokens.shape == (counts.total, 3)
    assert tuple(reduced.frames.bincount(minlength=grid.frames).tolist()) == counts.per_frame
    assert reduced.tokens.isfinite().all()
    for index, size in ((reduced.rows, grid.rows), (reduced.cols, grid.cols)):
        assert index.dtype == torch.long
        assert index.shape == (counts.total,)
        assert 0 <= index.min() <= index.max() < size


@few
@given(grid=grids(frames=9, side=5), seed=seeds, retention=retentions, config=configs)
def test_columns_that_are_not_compared_are_merged_by_the_plan_of_the_compared_columns(grid, seed, retention, config):
    """Merging is linear in the tokens, so it commutes with a linear map of their columns."""
    features, *scores = video(seed, grid)
    mixing = torch.randn(features.shape[2], 5, generator=torch.Generator().manual_seed(seed))
    settings = {"grid": grid, "retention": retention, "config": config}
    alone = reduce_video(features, *scores, **settings)
    both = reduce_video(
        torch.cat((features, features @ mixing), dim=2), *scores, compared=features.shape[2], **settings
    )
    assert torch.equal(both.frames, alone.frames)
    assert torch.equal(both.rows * grid.cols + both.cols, alone.rows * grid.cols + alone.cols)
    torch.testing.assert_close(both.tokens[:, : features.shape[2]], alone.tokens, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both.tokens[:, features.shape[2] :], alone.tokens @ mixing, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compared", [0, -1, 5])
def test_a_number_of_compared_columns_outside_the_width_is_refused(compared):
    grid = VideoGrid(2, 2, 2)
    with pytest.raises(ShapeError, match=rf"compared must be in \[1, 4\], the width of features, got {compared}"):
        reduce_video(*video(0, grid, width=4), grid=grid, retention=0.5, compared=compared)


@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 31, 257, 768])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 7), (6, 6), (5, 9)])
def test_videos_of_any_length_and_shape_meet_their_count(frames, rows, cols):
    grid = VideoGrid(frames, rows, cols)
    inputs = video(frames, grid, width=2)
    for retention, emit in product((0.05, 0.3), ("both", "compact")):
        reduced = reduce_video(*inputs, grid=grid, retention=retention, config=AOTConfig(emit=emit))
        assert len(reduced.tokens) == max(frames, round(retention * grid.tokens))


@few
@given(grid=grids(frames=9, side=5), seed=seeds, config=configs)
def test_retention_1_is_the_identity(grid, seed, config):
    inputs = video(seed, grid)
    reduced = reduce_video(*inputs, grid=grid, retention=1, config=config)
    assert torch.equal(reduced.tokens, inputs[0].flatten(0, 1))
    cells = [(t, r, c) for t in range(grid.frames) for r in range(grid.rows) for c in range(grid.cols)]
    assert list(zip(reduced.frames.tolist(), reduced.rows.tolist(), reduced.cols.tolist(), strict=True)) == cells
    assert reduced.unconverged == 0


@few
@given(grid=grids(frames=12, side=6), seed=seeds, retention=retentions, config=configs)
def test_the_same_video_gives_the_same_bits_again(grid, seed, retention, config):
    inputs = video(seed, grid)
    first, again = (reduce_video(*inputs, grid=grid, retention=retention, config=config) for _ in range(2))
    assert same_bits(first, again)


@few
@given(grid=grids(frames=12, side=6), seed=seeds, retention=retentions, kappa=st.floats(0, 1))
def test_in_the_compact_layout_tokens_come_in_the_order_of_the_video(grid, seed, retention, kappa):
    reduced = reduce_video(*video(seed, grid), grid=grid, retention=retention, config=AOTConfig(kappa=kappa))
    places = (reduced.frames * grid.rows + reduced.rows) * grid.cols + reduced.cols
    assert (places.diff() > 0).all()


@few
@given(grid=grids(frames=12, side=6), seed=seeds)
def test_a_merged_token_lies_between_the_tokens_it_came_from(grid, seed):
    inputs = video(seed, grid)
    reduced = reduce_video(*inputs, grid=grid, retention=0.3)
    low, high = inputs[0].amin((0, 1)), inputs[0].amax((0, 1))
    assert (reduced.tokens >= low - 1e-4).all()
    assert (reduced.tokens <= high + 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_precision_and_close_to_float32(dtype):
    grid = VideoGrid(18, 9, 11)
    features, local, glob = video(1, grid, width=32)
    features = features.to(dtype)
    half = reduce_video(features, local, glob, grid=grid, retention=0.2)
    full = reduce_video(features.float(), local, glob, grid=grid, retention=0.2)
    assert half.tokens.dtype == dtype
    # Rounding between the two phases may change which of two nearly equal tokens is kept.
    moved = (half.frames != full.frames) | (half.rows != full.rows) | (half.cols != full.cols)
    assert moved.float().mean() < 0.02
    error = (half.tokens.float() - full.tokens)[~moved].abs()
    assert error.mean() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("fill", [0.0, 1.0, 65504.0])
def test_constant_videos_keep_their_count_and_value(fill):
    grid = VideoGrid(11, 5, 7)
    scores = torch.zeros(11, 35)
    reduced = reduce_video(torch.full((11, 35, 8), fill), scores, scores, grid=grid, retention=0.3)
    assert len(reduced.tokens) == budget(grid, retention=0.3).total
    torch.testing.assert_close(reduced.tokens, torch.full_like(reduced.tokens, fill))


def test_zero_vectors_among_others_give_finite_tokens():
    grid = VideoGrid(10, 6, 6)
    features, local, glob = video(2, grid)
    features[:, ::3] = 0
    features[4] = 0
    assert reduce_video(features, local, glob, grid=grid, retention=0.25).tokens.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinite_scores_do_not_change_the_count(value):
    grid = VideoGrid(10, 6, 6)
    features, local, glob = video(3, grid)
    local[2], glob[5], local[7, 4], glob[7, 4] = value, value, value, value
    reduced = reduce_video(features, local, glob, grid=grid, retention=0.25)
    assert tuple(reduced.frames.bincount().tolist()) == reduced.budget.per_frame
    assert reduced.tokens.isfinite().all()


def test_features_with_nan_do_not_change_the_count():
    grid = VideoGrid(10, 6, 6)
    features, local, glob = video(3, grid)
    features[3, 5] = math.nan
    reduced = reduce_video(features, local, glob, grid=grid, retention=0.25)
    assert tuple(reduced.frames.bincount().tolist()) == reduced.budget.per_frame


def test_memory_layout_and_the_default_type_do_not_matter():
    grid = VideoGrid(9, 4, 5)
    inputs = video(5, grid)
    plain = reduce_video(*inputs, grid=grid, retention=0.4)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs]
    assert same_bits(reduce_video(*strided, grid=grid, retention=0.4), plain)
    torch.set_default_dtype(torch.float16)
    try:
        fresh = VideoGrid(9, 5, 4)
        reduced = reduce_video(*inputs, grid=fresh, retention=0.4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(reduced, reduce_video(*inputs, grid=fresh, retention=0.4))


def test_solves_that_ran_out_of_iterations_are_counted():
    grid = VideoGrid(16, 4, 5)
    inputs = video(6, grid)
    config = AOTConfig(mass=0.2, kappa=0.3, iterations=1, tolerance=0)
    hasty = reduce_video(*inputs, grid=grid, retention=0.3, config=config)
    assert hasty.unconverged == len(hasty.converged) == len(hasty.iterations) >= 9
    assert reduce_video(*inputs, grid=grid, retention=0.3, config=AOTConfig.paper()).unconverged == 0


def test_tensors_that_do_not_fit_the_grid_are_refused():
    grid = VideoGrid(2, 3, 3)
    features, scores = torch.ones(2, 9, 4), torch.ones(2, 9)
    with pytest.raises(ShapeError, match=r"features must have shape \(2, 9, width\), got \(2, 8, 4\)"):
        reduce_video(features[:, :8], scores, scores, grid=grid, retention=0.5)
    with pytest.raises(ShapeError, match=r"local_scores must have shape \(2, 9\), got \(1, 9\)"):
        reduce_video(features, scores[:1], scores, grid=grid, retention=0.5)
    with pytest.raises(ShapeError, match="global_scores"):
        reduce_video(features, scores, scores[..., None], grid=grid, retention=0.5)
    with pytest.raises(ShapeError, match="floating-point"):
        reduce_video(features.long(), scores, scores, grid=grid, retention=0.5)


@pytest.mark.parametrize("retention", [0, 1.5, math.nan, math.inf, "0.5", None, True])
def test_a_retention_outside_its_range_is_refused(retention):
    scores = torch.ones(1, 4)
    with pytest.raises(SettingError, match="retention"):
        reduce_video(torch.ones(1, 4, 2), scores, scores, grid=VideoGrid(1, 2, 2), retention=retention)


@pytest.mark.parametrize(
    ("config", "retention", "needed"),
    [
        (AOTConfig(), 0.3, False),
        (AOTConfig.preset("transport"), 0.3, False),
        (AOTConfig.paper(), 0.3, True),
        (AOTConfig.paper(), 0.999, False),  # rounds to all tokens
        (AOTConfig.paper(), 1, False),
    ],
)
def test_scores_are_needed_for_anchors_by_attention_unless_every_token_survives(config, retention, needed):
    grid = VideoGrid(9, 5, 6)
    features, local, glob = video(8, grid)
    assert needs_scores(grid, retention=retention, config=config) is needed
    arguments = {"grid": grid, "retention": retention, "config": config}
    if needed:
        with pytest.raises(ShapeError, match="local_scores and global_scores must be tensors"):
            reduce_video(features, None, None, **arguments)
    else:
        assert same_bits(
            reduce_video(features, None, None, **arguments), reduce_video(features, local, glob, **arguments)
        )


def test_both_scores_are_needed_for_anchors_by_attention():
    grid = VideoGrid(9, 5, 6)
    features, local, _ = video(8, grid)
    with pytest.raises(ShapeError, match="local_scores and global_scores must be tensors"):
        reduce_video(features, local, None, grid=grid, retention=0.3, config=AOTConfig.paper())
