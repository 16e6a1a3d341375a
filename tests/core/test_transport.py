from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aot_vllm import AOTConfig, VideoGrid
from aot_vllm.core import transport
from aot_vllm.core.transport import merge_across_frames, merge_within_frames
from aot_vllm.errors import SettingError, ShapeError
from tests import reference
from tests.strategies import few, grids, noise, seeds, video

PAPER = AOTConfig.paper()


def draw_anchors(seed, grid, count):
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(grid.frames, grid.positions, generator=generator).argsort(1)
    return order[:, :count].sort(1).values


@few
@given(grid=grids(frames=4, side=5), seed=seeds, data=st.data())
def test_merging_within_frames_is_that_of_the_oracle(grid, seed, data):
    features, _, _ = video(seed, grid)
    anchors = draw_anchors(seed, grid, data.draw(st.integers(1, grid.positions)))
    merged = merge_within_frames(features, anchors, rows=grid.rows, cols=grid.cols, config=PAPER)
    expected, _ = reference.merge_within_frames(
        features.tolist(), anchors.tolist(), grid.rows, grid.cols, PAPER.settings()
    )
    torch.testing.assert_close(merged, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@few
@given(grid=grids(frames=3, side=5), seed=seeds, data=st.data())
def test_the_order_of_the_anchors_is_the_order_of_the_rows(grid, seed, data):
    features, _, _ = video(seed, grid)
    anchors = draw_anchors(seed, grid, data.draw(st.integers(1, grid.positions)))
    order = torch.randperm(anchors.shape[1], generator=torch.Generator().manual_seed(seed))
    arguments = {"rows": grid.rows, "cols": grid.cols, "config": PAPER}
    merged = merge_within_frames(features, anchors, **arguments)
    torch.testing.assert_close(merge_within_frames(features, anchors[:, order], **arguments), merged[:, order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_size_of_memory_blocks_changes_nothing(dtype, monkeypatch):
    grid = VideoGrid(7, 5, 6)
    features, _, _ = video(3, grid)
    anchors, features = draw_anchors(3, grid, 9), features.to(dtype)
    arguments = {"rows": grid.rows, "cols": grid.cols, "config": PAPER}
    whole = merge_within_frames(features, anchors, **arguments)
    monkeypatch.setattr(transport, "BLOCK_BYTES", 4 * features[0].numel() * 3)
    torch.testing.assert_close(merge_within_frames(features, anchors, **arguments), whole)
    monkeypatch.setattr(transport, "BLOCK_BYTES", 1)
    torch.testing.assert_close(merge_within_frames(features, anchors, **arguments), whole)


@few
@given(
    seed=seeds,
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    size=st.integers(1, 8),
    emit=st.sampled_from(["both", "compact"]),
    kappa=st.sampled_from([0.3, 1.0]),
    ragged=st.booleans(),
    data=st.data(),
)
def test_merging_across_frames_is_that_of_the_oracle(seed, lengths, size, emit, kappa, ragged, data):
    frames, config = sum(lengths), AOTConfig(emit=emit, kappa=kappa)
    tokens = noise(seed, 1, size, 16) + 0.5 * noise(seed + 1, frames, size, 16).cumsum(0)
    keep = data.draw(st.lists(st.integers(0, size), min_size=frames, max_size=frames)) if ragged else size // 3
    originals = data.draw(st.lists(st.integers(0, size), min_size=len(lengths), max_size=len(lengths)))
    originals = originals if ragged else None
    result = merge_across_frames(tokens, clip_lengths=lengths, keep=keep, config=config, originals=originals)
    survivors, taken = reference.merge_across_frames(
        tokens.tolist(),
        lengths,
        keep if ragged else [keep] * frames,
        originals or [size if emit == "both" else 0] * len(lengths),
        config.settings(),
    )
    assert result.frames.tolist() == [frame for _, frame, _ in survivors]
    assert result.slots.tolist() == [slot for _, _, slot in survivors]
    torch.testing.assert_close(result.tokens, torch.tensor([token for token, _, _ in survivors]), rtol=1e-4, atol=1e-5)
    # A frame that keeps every token needs no solve. It gets one if another frame of its step does.
    assert not Counter(taken) - Counter(result.iterations.tolist())


@few
@given(seed=seeds, lengths=st.lists(st.integers(1, 5), min_size=2, max_size=5), size=st.integers(1, 8))
def test_clips_together_are_the_clips_one_by_one(seed, lengths, size):
    tokens = noise(seed, sum(lengths), size, 16)
    together = merge_across_frames(tokens, clip_lengths=lengths, keep=size // 2, config=PAPER)
    parts = [
        merge_across_frames(clip, clip_lengths=[len(clip)], keep=size // 2, config=PAPER)
        for clip in tokens.split(lengths)
    ]
    torch.testing.assert_close(together.tokens, torch.cat([part.tokens for part in parts]))
    assert together.slots.tolist() == torch.cat([part.slots for part in parts]).tolist()


@few
@given(seed=seeds, length=st.integers(2, 4), size=st.integers(2, 8))
def test_renumbered_key_anchors_give_renumbered_merged_anchors(seed, length, size):
    tokens = noise(seed, length, size, 16)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    renumbered = torch.cat([tokens[:1, order], tokens[1:]])
    merged, permuted = (
        merge_across_frames(one, clip_lengths=[length], keep=1, config=PAPER).tokens[-size:]
        for one in (tokens, renumbered)
    )
    torch.testing.assert_close(permuted, merged[order])


def test_the_released_layout_emits_single_key_frames_twice_as_released():
    tokens = noise(1, 2, 3, 4)
    clips = merge_across_frames(tokens, clip_lengths=[1, 1], keep=2, config=PAPER)
    assert torch.equal(clips.tokens, torch.cat([tokens[0], tokens[0], tokens[1], tokens[1]]))
    assert clips.frames.tolist() == [0] * 6 + [1] * 6
    assert clips.slots.tolist() == [0, 1, 2] * 4


def test_keeping_everything_leaves_the_key_frame_as_it_was():
    tokens = noise(2, 3, 5, 4)
    clips = merge_across_frames(tokens, clip_lengths=[3], keep=5, config=AOTConfig(emit="compact"))
    assert torch.equal(clips.tokens, tokens.flatten(0, 1))


def test_at_kappa_1_nothing_is_merged_across_frames():
    tokens = noise(2, 3, 5, 4)
    ranks = torch.tensor([[0, 1, 2, 3, 4], [4, 0, 3, 1, 2], [1, 4, 0, 3, 2]])
    clips = merge_across_frames(tokens, clip_lengths=[3], keep=[0, 2, 1], ranks=ranks, config=AOTConfig(kappa=1))
    assert torch.equal(clips.tokens, torch.cat([tokens[0], tokens[1, [1, 3]], tokens[2, [2]]]))
    assert clips.iterations.numel() == 0


def test_a_token_unlike_every_key_token_is_the_one_kept():
    key = torch.eye(6)[:5].unsqueeze(0)
    later = key.clone()
    later[0, 2] = torch.eye(6)[5]
    clips = merge_across_frames(
        torch.cat([key, later]), clip_lengths=[2], keep=1, config=AOTConfig(emit="compact", temporal_sigma=0.5)
    )
    assert clips.slots[-1] == 2
    assert torch.equal(clips.tokens[-1], later[0, 2])


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 65504.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_constant_features_stay_what_they_are(value, dtype):
    features = torch.full((4, 12, 8), value, dtype=dtype)
    anchors = torch.arange(5).expand(4, 5)
    merged = merge_within_frames(features, anchors, rows=3, cols=4, config=PAPER)
    torch.testing.assert_close(merged, features[:, :5])
    clips = merge_across_frames(merged, clip_lengths=[3, 1], keep=2, config=PAPER)
    assert clips.tokens.shape == (24, 8)
    torch.testing.assert_close(clips.tokens, features[0, :1].expand(24, 8))


@pytest.mark.parametrize("scale", [1e-9, 1e15])
def test_scaled_features_give_scaled_tokens(scale):
    features = noise(4, 3, 20, 8)
    anchors = torch.arange(0, 20, 3).expand(3, 7)
    for merge in (
        lambda x: merge_within_frames(x, anchors, rows=4, cols=5, config=PAPER),
        lambda x: merge_across_frames(x, clip_lengths=[3], keep=6, config=PAPER).tokens,
    ):
        torch.testing.assert_close(merge(features * scale) / scale, merge(features), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nearest_weight", [0.0, 0.3])
def test_a_mass_of_0_costs_no_solve(nearest_weight, monkeypatch):
    def refuse(*args, **named):
        raise AssertionError("a transport problem is solved")

    monkeypatch.setattr(transport, "sinkhorn", refuse)
    features, anchors = noise(12, 2, 12, 5), torch.tensor([[0, 7], [3, 4]])
    config = AOTConfig(mass=0, nearest_weight=nearest_weight)
    found = transport.absorb_frames(features, anchors, rows=3, cols=4, config=config)
    assert len(found.iterations) == len(found.converged) == 0
    assert torch.equal(found.tokens, transport.rows_at(features, anchors)) == (nearest_weight == 0)
    with pytest.raises(AssertionError, match="is solved"):
        transport.absorb_frames(features, anchors, rows=3, cols=4, config=AOTConfig(mass=0.1))


@pytest.mark.parametrize("epsilon", [1e-6, 1e-3, 1e3])
def test_extreme_epsilons_give_finite_tokens(epsilon):
    config = AOTConfig(epsilon=epsilon, mass=0.2, kappa=0.5)
    features = noise(5, 4, 30, 8)
    merged = merge_within_frames(features, torch.arange(9).expand(4, 9), rows=5, cols=6, config=config)
    assert merged.isfinite().all()
    assert merge_across_frames(merged, clip_lengths=[4], keep=3, config=config).tokens.isfinite().all()


def test_without_mass_nothing_is_solved_and_the_nearest_tokens_are_merged():
    grid = VideoGrid(2, 3, 4)
    features, anchors = video(1, grid)[0], draw_anchors(1, grid, 3)
    merged = transport.absorb_frames(features, anchors, rows=3, cols=4, config=AOTConfig(mass=0, nearest_weight=1.0))
    assert merged.iterations.numel() == merged.converged.numel() == 0
    similarity = transport._similarity(features, transport.rows_at(features, anchors))
    nearest = similarity.argmax(2).scatter(1, anchors, torch.arange(3).expand(2, 3))
    expected = torch.stack(
        [torch.stack([f[n == j].mean(0) for j in range(3)]) for f, n in zip(features, nearest, strict=True)]
    )
    torch.testing.assert_close(merged.tokens, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_at_the_end(dtype):
    features = noise(6, 4, 30, 8).to(dtype)
    anchors = torch.arange(0, 30, 4).expand(4, 8)
    half = merge_within_frames(features, anchors, rows=5, cols=6, config=PAPER)
    full = merge_within_frames(features.float(), anchors, rows=5, cols=6, config=PAPER)
    assert torch.equal(half, full.to(dtype))


def test_inputs_are_not_modified():
    features, anchors = noise(7, 3, 12, 8), torch.arange(4).expand(3, 4)
    before = features.clone()
    merge_within_frames(features, anchors, rows=3, cols=4, config=PAPER)
    merge_across_frames(features, clip_lengths=[2, 1], keep=2, config=PAPER)
    assert torch.equal(features, before)


def test_tensors_that_do_not_fit_are_refused():
    features, anchors = torch.ones(2, 6, 3), torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(ShapeError, match=r"features must have shape \(frames, 9, width\), got \(2, 6, 3\)"):
        merge_within_frames(features, anchors, rows=3, cols=3, config=PAPER)
    with pytest.raises(ShapeError, match="anchors"):
        merge_within_frames(features, anchors[:1], rows=2, cols=3, config=PAPER)
    with pytest.raises(ShapeError, match="tokens"):
        merge_across_frames(features[0], clip_lengths=[2], keep=1, config=PAPER)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_lengths": [1]}, r"clip_lengths must sum to 2, the frames of tokens, got \(1,\)"),
        ({"clip_lengths": [2, 0]}, "a clip length must be an integer of at least 1, got 0"),
        ({"clip_lengths": []}, r"clip_lengths must sum to 2, the frames of tokens, got \(\)"),
        ({"keep": 7}, "keep must be at most 6, the anchors of a frame, got 7"),
        ({"keep": -1}, "keep must be an integer of at least 0, got -1"),
        ({"keep": True}, "keep must be an integer of at least 0, got True"),
        ({"keep": [1, 1, 1]}, "keep must have 2 counts, got 3"),
        ({"keep": 1.0}, r"keep must be an integer of at least 0, got 1\.0"),
        ({"originals": [7]}, "originals must be at most 6, the anchors of a frame, got 7"),
        ({"originals": [1, 1]}, "originals must have 1 counts, got 2"),
    ],
)
def test_counts_that_do_not_fit_are_refused_with_value_and_range(arguments, message):
    with pytest.raises(SettingError, match=message):
        merge_across_frames(torch.ones(2, 6, 3), **{"clip_lengths": [2], "keep": 1, "config": PAPER} | arguments)
