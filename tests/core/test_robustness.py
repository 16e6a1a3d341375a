"""No selection but the released one falls for tokens of extreme length, or for attention that persists over frames."""

import dataclasses

import pytest
import torch

from aot_vllm import AOTConfig, VideoGrid, reduce_video
from tests.strategies import noise

GRID = VideoGrid(24, 10, 10)
SELECTIONS = {
    "diverse": AOTConfig.preset("diverse"),
    "calibrated": AOTConfig.preset("calibrated"),
    "calibrated, previous": dataclasses.replace(AOTConfig.preset("calibrated"), memory="previous"),
    "coverage": AOTConfig.preset("coverage"),
    "coverage, euclidean": dataclasses.replace(AOTConfig.preset("coverage"), distance="euclidean"),
    "transport": AOTConfig.preset("transport"),
}
ATTENTION = {"attention": AOTConfig(anchors="attention", without_sinks=True)}


def clip(kind):
    """Return features (T, P, 32): every frame another one, one scene that changes slowly, or a scene that stands still.

    Tokens have a direction in common, as those of vision towers.
    """
    scene, change = noise(1, 1, GRID.positions, 32), noise(2, GRID.frames, GRID.positions, 32)
    features = {"new": change, "slow": scene + 0.3 * change.cumsum(0), "still": scene + 0.05 * change}[kind]
    return features + noise(3, 32)


def kept(features, scores, config, retention=0.1):
    reduced = reduce_video(features, scores, scores, grid=GRID, retention=retention, config=config)
    return reduced.frames, reduced.rows * GRID.cols + reduced.cols


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("kind", ["new", "slow", "still"])
@pytest.mark.parametrize("place", ["same", "another"])
def test_2_percent_of_tokens_with_30_times_the_length_take_at_most_6_percent(name, kind, place):
    features, is_long = clip(kind), torch.zeros(GRID.frames, GRID.positions, dtype=torch.bool)
    if place == "same":
        is_long[:, [23, 71]] = True
    else:
        order = torch.rand(is_long.shape, generator=torch.Generator().manual_seed(4)).argsort(1)
        is_long.scatter_(1, order[:, :2], True)
    features[is_long] *= 30
    frames, cells = kept(features, noise(5, GRID.frames, GRID.positions).exp(), SELECTIONS[name])
    assert is_long[frames, cells].float().mean() <= 0.06


@pytest.mark.parametrize("name", [*SELECTIONS, *ATTENTION])
@pytest.mark.parametrize("kind", ["new", "slow", "still"])
@pytest.mark.parametrize("noisy", [0.0, 0.3, 1.0])
def test_a_position_that_receives_50_times_the_attention_everywhere_is_kept_in_at_most_half_of_the_frames(
    name, kind, noisy
):
    scores = noise(6, GRID.frames, GRID.positions).mul(noisy).exp()
    scores[:, 37] *= 50
    frames, cells = kept(clip(kind), scores, (SELECTIONS | ATTENTION)[name])
    assert len(frames[cells == 37].unique()) <= GRID.frames / 2


def test_plain_attention_keeps_a_sink_in_every_frame():
    """So the test above can fail."""
    scores = noise(6, GRID.frames, GRID.positions).exp()
    scores[:, 37] *= 50
    frames, cells = kept(clip("slow"), scores, AOTConfig(anchors="attention"))
    assert len(frames[cells == 37].unique()) > 0.9 * GRID.frames


def test_without_its_correction_the_calibrated_choice_keeps_a_sink():
    scores = noise(6, GRID.frames, GRID.positions).exp()
    scores[:, 37] *= 50
    config = dataclasses.replace(AOTConfig.preset("calibrated"), without_sinks=False, memory="previous")
    frames, cells = kept(clip("new"), scores, config)
    assert len(frames[cells == 37].unique()) > GRID.frames / 2
