"""Attention received: exact, in bounded memory, and the same on every rank."""

import pytest
import torch
from torch import nn

from aot_vllm import AOTConfig
from aot_vllm.adapters.scores import AttentionScores, scoring_layers, scoring_modules
from aot_vllm.core import attention
from aot_vllm.core.attention import attention_received
from aot_vllm.errors import SettingError

FRAMES, TOKENS, HEADS, SIZE = 7, 9, 4, 8


class Attention(nn.Module):
    """An attention module as in a vision tower, called with q, k and v of this rank's heads."""

    def __init__(self, num_heads=HEADS):
        super().__init__()
        self.num_heads, self.scale = num_heads, SIZE**-0.5

    def forward(self, query, key, value):
        return value


def queries_and_keys(heads=HEADS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, FRAMES, TOKENS, heads * SIZE, generator=generator)


def received_in_loops(query, key, heads):
    received = torch.zeros(FRAMES, TOKENS, dtype=torch.float64)
    for frame in range(FRAMES):
        for head in range(heads):
            part = slice(head * SIZE, (head + 1) * SIZE)
            logits = query[frame, :, part].double() @ key[frame, :, part].double().T * SIZE**-0.5
            received[frame] += logits.softmax(-1).sum(0)
    return received


def test_attention_received_is_the_column_sum_of_the_maps():
    query, key = queries_and_keys()
    received = attention_received(query, key, num_heads=HEADS, scale=SIZE**-0.5)
    torch.testing.assert_close(received.double(), received_in_loops(query, key, HEADS), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(received.sum(1), torch.full((FRAMES,), float(HEADS * TOKENS)))


@pytest.mark.parametrize("map_bytes", [0, 1, HEADS * TOKENS * TOKENS * 4 * 3, 2**40])
def test_the_memory_bound_does_not_change_the_scores(monkeypatch, map_bytes):
    query, key = queries_and_keys()
    whole = attention_received(query, key, num_heads=HEADS, scale=0.3)
    monkeypatch.setitem(attention.MAP_BYTES, "cpu", map_bytes)
    torch.testing.assert_close(attention_received(query, key, num_heads=HEADS, scale=0.3), whole)


def test_no_more_maps_exist_at_a_time_than_the_bound_allows(monkeypatch):
    copies = 3 * TOKENS * HEADS * SIZE * 4
    monkeypatch.setitem(attention.MAP_BYTES, "cpu", 2 * (HEADS * TOKENS * TOKENS * 4 + copies))
    largest = []
    original = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda a, b: largest.append(original(a, b).numel()) or original(a, b))
    attention_received(*queries_and_keys(), num_heads=HEADS, scale=0.3)
    assert max(largest) == 2 * HEADS * TOKENS * TOKENS


def test_a_frame_whose_maps_exceed_the_bound_is_processed_in_groups_of_queries(monkeypatch):
    query, key = queries_and_keys()
    whole = attention_received(query, key, num_heads=HEADS, scale=0.3)
    monkeypatch.setitem(attention.MAP_BYTES, "cpu", 2 * HEADS * TOKENS * 4)
    largest = []
    original = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda a, b: largest.append(original(a, b).numel()) or original(a, b))
    torch.testing.assert_close(attention_received(query, key, num_heads=HEADS, scale=0.3), whole)
    assert max(largest) == 2 * HEADS * TOKENS


def test_frames_in_one_sequence_passed_by_name_have_the_same_scores():
    class ByName(Attention):
        def forward(self, *, query, key, value):
            return value

    query, key = queries_and_keys()
    laid_out = {name: part.reshape(1, -1, HEADS, SIZE) for name, part in (("query", query), ("key", key))}
    layer = ByName()
    recorder = AttentionScores((layer, layer), total_heads=HEADS, sum_over_ranks=lambda received: received)
    with recorder.recording(tokens_per_frame=TOKENS) as recorded:
        layer(value=None, **laid_out)
    expected = attention_received(query, key, num_heads=HEADS, scale=SIZE**-0.5) / HEADS
    torch.testing.assert_close(recorded()[0], expected)


def test_half_precision_is_summed_in_float32():
    query, key = queries_and_keys()
    received = attention_received(query.bfloat16(), key.bfloat16(), num_heads=HEADS, scale=SIZE**-0.5)
    assert received.dtype == torch.float32
    assert (received - received_in_loops(query, key, HEADS).float()).abs().max() < 0.1


def test_nothing_is_recorded_outside_of_recording():
    layers = Attention(), Attention()
    recorder = AttentionScores(layers, total_heads=HEADS, sum_over_ranks=lambda received: received)
    query, key = queries_and_keys()
    layers[0](query, key, key)
    with recorder.recording() as recorded:
        for frames in (slice(0, 3), slice(3, 7)):  # the tower works through a video in blocks
            layers[0](query[frames], key[frames], key[frames])
            layers[1](key[frames], query[frames], key[frames])
    layers[1](query, key, key)
    local, global_ = recorded()
    torch.testing.assert_close(local.double(), received_in_loops(query, key, HEADS) / HEADS, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(global_.double(), received_in_loops(key, query, HEADS) / HEADS, rtol=1e-5, atol=1e-6)


def test_an_error_ends_the_recording():
    layer = Attention()
    recorder = AttentionScores((layer, layer), total_heads=HEADS, sum_over_ranks=lambda received: received)
    with pytest.raises(RuntimeError, match="tower"), recorder.recording():
        raise RuntimeError("tower")
    layer(*queries_and_keys(), None)
    with recorder.recording() as recorded:
        layer(*queries_and_keys(), None)
    assert recorded()[0].shape == (FRAMES, TOKENS)


def test_ranks_with_half_of_the_heads_add_up_to_all_of_them():
    query, key = queries_and_keys()
    halves = [
        attention_received(query[..., part], key[..., part], num_heads=HEADS // 2, scale=SIZE**-0.5)
        for part in (slice(0, 2 * SIZE), slice(2 * SIZE, 4 * SIZE))
    ]
    layers = Attention(HEADS // 2), Attention(HEADS // 2)
    recorder = AttentionScores(layers, total_heads=HEADS, sum_over_ranks=lambda received: received + halves[1])
    part = slice(0, 2 * SIZE)
    with recorder.recording() as recorded:
        for layer in layers:
            layer(query[..., part], key[..., part], None)
    torch.testing.assert_close(
        recorded()[0].double(), received_in_loops(query, key, HEADS) / HEADS, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("num_layers", "expected"), [(26, (5, 24)), (27, (5, 25)), (12, (2, 10)), (8, (2, 6)), (2, (0, 0)), (1, (0, 0))]
)
def test_by_default_the_layers_have_the_relative_depth_of_the_released_code(num_layers, expected):
    assert scoring_layers(AOTConfig(), num_layers=num_layers) == expected


def test_with_windowed_attention_the_nearest_layers_that_attend_to_whole_frames_score():
    whole_frame = [7, 15, 23, 31]  # of the 32 layers of Qwen2.5-VL
    assert scoring_layers(AOTConfig(), num_layers=32, whole_frame=whole_frame) == (7, 31)
    named = AOTConfig(local_layer=12, global_layer=-10)
    assert scoring_layers(named, num_layers=32, whole_frame=whole_frame) == (15, 23)
    assert scoring_layers(AOTConfig(local_layer=11), num_layers=32, whole_frame=whole_frame)[0] == 15


def test_named_layers_count_from_either_end_and_must_exist():
    config = AOTConfig(local_layer=-12, global_layer=11)
    assert scoring_layers(config, num_layers=12) == (0, 11)
    with pytest.raises(SettingError, match=r"local_layer must be in \[-11, 10\].*executes 11 layers, got -12"):
        scoring_layers(config, num_layers=11)
    with pytest.raises(SettingError, match="local_layer must be in"):
        scoring_layers(AOTConfig.paper(), num_layers=2)


def test_calibrated_anchors_are_scored_by_the_global_layer_alone_and_only_if_they_need_scores():
    layers = [Attention() for _ in range(8)]
    calibrated = AOTConfig.preset("calibrated")
    assert scoring_modules(calibrated, layers) == (layers[-2],)
    assert scoring_modules(AOTConfig.paper(), layers) == (layers[5], layers[-2])
    for config in (AOTConfig.preset("coverage"), AOTConfig(anchors="calibrated", by_attention=False)):
        assert scoring_modules(config, layers) == ()


def test_one_layer_gives_both_scores():
    layer = Attention()
    scores = AttentionScores([layer], total_heads=HEADS, sum_over_ranks=torch.Tensor.clone)
    query, key = queries_and_keys()
    with scores.recording() as recorded:
        layer(query, key, key)
    local, global_ = recorded()
    assert torch.equal(local, global_)
    torch.testing.assert_close(local.double() * HEADS, received_in_loops(query, key, HEADS), rtol=1e-5, atol=1e-6)
