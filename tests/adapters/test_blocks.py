"""A tower's work in blocks: as many frames as memory was profiled with, fewer if features wait for the reduction."""

import pytest
import torch

from aot_vllm.adapters.blocks import frames_at_once, in_blocks


@pytest.mark.parametrize(
    ("frames", "at_once"),
    [(1, 16), (16, 16), (17, 14), (32, 12), (128, 3), (1000, 1)],
)
def test_a_longer_video_is_processed_in_smaller_blocks(frames, at_once):
    assert frames_at_once(frames, profiled=16, waiting_share=0.1) == at_once


def test_a_frame_larger_than_the_profiled_memory_is_processed_alone():
    assert frames_at_once(3, profiled=0.4, waiting_share=0.1) == 1


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 9])
def test_blocks_of_any_size_give_the_features_of_the_whole_video(at_once):
    frames = torch.randn(7, 3, 2).bfloat16()
    features = in_blocks(lambda block: block * 2, frames.split(at_once), frames=7)
    assert features.dtype == torch.bfloat16
    assert torch.equal(features, frames * 2)
