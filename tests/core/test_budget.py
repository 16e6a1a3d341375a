import time
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aot_vllm import AOTConfig, VideoGrid, budget
from aot_vllm.errors import SettingError
from tests import reference
from tests.strategies import configs, many, retentions


def check(counts, grid, config, total):
    """Assert everything that a budget promises."""
    positions = grid.positions
    assert counts.total == total
    assert sum(counts.per_frame) == total
    assert len(counts.per_frame) == len(counts.keep_per_frame) == grid.frames
    assert min(counts.per_frame) >= 1
    assert sum(counts.clip_lengths) == grid.frames
    assert len(counts.clip_lengths) == (1 if config.kappa == 1 else min(config.clips, grid.frames))
    assert max(counts.clip_lengths) - min(counts.clip_lengths) <= 1
    assert max(counts.anchors_per_clip) - min(counts.anchors_per_clip) <= 1
    assert counts.anchors == min(counts.anchors_per_clip)
    assert counts.identity == (total == grid.tokens)
    frame, kept = 0, []
    for length, anchors, originals in zip(
        counts.clip_lengths, counts.anchors_per_clip, counts.originals_per_clip, strict=True
    ):
        assert 1 <= anchors <= positions
        assert 0 <= originals <= (anchors if config.emit == "both" and length > 1 else 0)
        assert counts.keep_per_frame[frame] == 0
        assert counts.per_frame[frame] == anchors + originals
        later = counts.keep_per_frame[frame + 1 : frame + length]
        assert all(1 <= keep <= anchors for keep in later)
        assert counts.per_frame[frame + 1 : frame + length] == later
        kept += later
        frame += length
    assert max(kept, default=0) - min(kept, default=0) <= 1
    assert counts.keep == min(kept, default=0)


@pytest.mark.parametrize("emit", ["both", "compact"])
@pytest.mark.parametrize("clips", [1, 3, 8])
def test_every_count_of_every_small_video_is_met_exactly(emit, clips):
    for frames, positions, kappa in product(range(1, 12), range(1, 9), (0.0, 0.3, 1.0)):
        grid, config = VideoGrid(frames, positions, 1), AOTConfig(emit=emit, clips=clips, kappa=kappa)
        for total in range(frames, grid.tokens + 1):
            check(budget(grid, retention=total / grid.tokens, config=config), grid, config, total)


@many
@given(
    grid=st.builds(VideoGrid, st.integers(1, 768), st.integers(1, 40), st.integers(1, 40)),
    retention=retentions,
    config=configs,
)
def test_every_count_of_large_videos_is_met_exactly(grid, retention, config):
    total = max(grid.frames, min(grid.tokens, round(retention * grid.tokens)))
    check(budget(grid, retention=retention, config=config), grid, config, total)


@many
@given(
    grid=st.builds(VideoGrid, st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    retention=retentions,
    config=configs,
)
def test_the_allocation_is_that_of_the_oracle(grid, retention, config):
    counts = budget(grid, retention=retention, config=config)
    expected = reference.budget(grid.frames, grid.positions, retention, config.settings())
    for name, value in expected.items():
        assert getattr(counts, name) == (tuple(value) if isinstance(value, list) else value), name


def test_the_papers_setting_gives_the_papers_anchors():
    counts = budget(VideoGrid(32, 27, 27), retention=0.10, config=AOTConfig.paper())
    assert counts.total == round(0.10 * 32 * 729) == 2333
    assert counts.clip_lengths == (4,) * 8
    assert 0.13 <= counts.anchors / 729 <= 0.14
    assert counts.keep / counts.anchors == pytest.approx(0.3, abs=0.02)


def test_by_default_all_frames_keep_equally_many():
    per_frame = budget(VideoGrid(33, 14, 14), retention=0.10).per_frame
    assert sum(per_frame) == round(0.10 * 33 * 196)
    assert max(per_frame) - min(per_frame) <= 1
    larger = [frame for frame, count in enumerate(per_frame) if count == max(per_frame)]
    assert max(b - a for a, b in pairwise(larger)) <= 2


def test_the_compact_layout_has_more_anchors_for_the_same_count():
    grid = VideoGrid(32, 27, 27)
    compact = budget(grid, retention=0.10, config=AOTConfig(kappa=0.3))
    assert compact.total == 2333
    assert compact.anchors > budget(grid, retention=0.10, config=AOTConfig.paper()).anchors
    assert set(compact.originals_per_clip) == {0}


def test_when_all_positions_are_anchors_later_frames_keep_more_than_kappa():
    counts = budget(VideoGrid(32, 14, 14), retention=0.9, config=AOTConfig.paper())
    assert counts.anchors == 196
    assert counts.keep > 0.3 * 196


def test_retention_1_keeps_everything():
    counts = budget(VideoGrid(5, 3, 4), retention=1)
    assert counts.identity
    assert counts.per_frame == (12,) * 5


def test_every_frame_keeps_at_least_one_token():
    assert budget(VideoGrid(768, 27, 27), retention=1e-9).per_frame == (1,) * 768


def test_videos_no_longer_than_the_number_of_clips_have_key_frames_only():
    counts = budget(VideoGrid(8, 14, 14), retention=0.1, config=AOTConfig(kappa=0.3))
    assert counts.per_frame == (20, 20, 20, 20, 20, 19, 19, 19)
    assert counts.originals_per_clip == counts.keep_per_frame == (0,) * 8


def test_a_budget_of_768_frames_takes_under_a_millisecond():
    fastest = float("inf")
    for total in range(20):
        start = time.perf_counter()
        budget(VideoGrid(768, 27, 27), retention=0.1 + total / 1000)
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 1e-3


@pytest.mark.parametrize("retention", [0, 1.5, float("nan"), "0.1", None, True])
def test_a_retention_outside_its_range_is_refused(retention):
    with pytest.raises(SettingError, match="retention"):
        budget(VideoGrid(2, 2, 2), retention=retention)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -1, 1), (1, 1, 2.0), (True, 1, 1), ("1", 1, 1), (None, 1, 1)])
def test_a_grid_of_anything_but_positive_integers_is_refused(sizes):
    with pytest.raises(SettingError, match="must be an integer of at least 1"):
        VideoGrid(*sizes)
