"""Fixed values of the rules; tests/e2e/test_sampling_rules.py compares them with vLLM's own."""

import pytest

from server.reader.sampling import Clip, Qwen2VL, Qwen3VL, Uniform, sampling_from


def clip(num_frames, fps=24.0):
    return Clip(num_frames, fps, num_frames / fps)


@pytest.mark.parametrize(
    ("rule", "video", "indices"),
    [
        (Uniform(4), clip(10), [0, 3, 6, 9]),
        (Uniform(8), clip(100), [0, 14, 28, 42, 56, 70, 84, 99]),
        (Uniform(32), clip(3), [0, 1, 2]),
        (Uniform(-1), clip(3), [0, 1, 2]),
        (Uniform(1), clip(50), [0]),
        (Uniform(32, fps=1), clip(96), [0, 31, 63, 95]),
        (Uniform(32, fps=1), clip(10), [0]),
        (Uniform(32), clip(1), [0]),
        (Qwen2VL(), clip(96), [0, 12, 24, 36, 48, 60, 72, 84]),
        (Qwen2VL(), clip(7), [0, 1, 3, 5]),
        (Qwen2VL(), clip(3), [0, 1]),
        (Qwen2VL(), clip(2), [0, 1]),
        (Qwen2VL(), clip(1), [0, 0]),
        (Qwen2VL(frame_factor=4), clip(3), [0, 1, 2, 2]),
        (Qwen2VL(max_frames=1), clip(50), [0, 1]),
        (Qwen3VL(), clip(96), [0, 14, 27, 41, 54, 68, 81, 95]),
        (Qwen3VL(), clip(3), [0, 1, 2]),
        (Qwen3VL(), clip(1), [0, 0]),
        (Qwen3VL(max_frames=5), clip(1000), [0, 250, 500, 749, 999]),
    ],
)
def test_a_rule_names_frames(rule, video, indices):
    assert rule.indices(video) == indices


@pytest.mark.parametrize(
    ("total", "count", "place", "index"),
    [(145, 66, 6, 13), (100_000, 768, 500, 65104), (451, 450, 449, 449)],
)
def test_the_rounding_is_that_of_float32(total, count, place, index):
    rule = Qwen2VL(min_frames=count, max_frames=count)
    indices = rule.indices(clip(total))
    assert indices[place] == index
    assert all(0 <= found < total for found in indices)


def test_no_loader_takes_more_than_768_frames_by_rate():
    assert len(Qwen2VL(max_frames=5000).indices(clip(100_000))) == 768
    assert len(Qwen3VL(max_frames=5000).indices(clip(100_000))) == 768


@pytest.mark.parametrize("rule", [Uniform(32), Qwen2VL(), Qwen3VL()])
def test_a_number_or_a_rate_of_frames_goes_before_the_rules_own(rule):
    assert len(rule.with_num_frames(10).indices(clip(480))) == 10
    assert len(rule.with_fps(0.5).indices(clip(480))) == 10


def test_a_rule_is_read_from_what_an_engine_tells():
    assert sampling_from({"rule": "uniform", "num_frames": 32}) == Uniform(32)
    told = {"rule": "qwen2_vl", "fps": 2, "min_frames": 4, "max_frames": 768, "frame_factor": 2}
    assert sampling_from(told) == Qwen2VL()
    assert sampling_from({"rule": "qwen3_vl", "fps": 2, "min_frames": 4, "max_frames": 768}) == Qwen3VL()
    with pytest.raises(ValueError, match="rule must be one of uniform, qwen2_vl, qwen3_vl, got molmo"):
        sampling_from({"rule": "molmo"})
    with pytest.raises(ValueError, match="unexpected keyword argument 'tempo'"):
        sampling_from({"rule": "uniform", "num_frames": 4, "tempo": 3})
