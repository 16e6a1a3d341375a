"""Attention received without a map is that of `core`, for every head size and memory layout of a vision tower."""

import pytest
import torch

from aot_vllm.core import attention
from tests.strategies import noise


def check(kernels, device, query, key, heads, *, rtol=2e-6):
    size = query.shape[-1] // heads
    made = kernels.attention_received(query.to(device), key.to(device), num_heads=heads, scale=size**-0.5)
    expected = attention.attention_received(query.float(), key.float(), num_heads=heads, scale=size**-0.5)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.cpu(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    ("frames", "tokens", "heads", "size"),
    [
        (1, 1, 1, 64),
        (2, 63, 2, 72),
        (3, 196, 2, 80),
        (1, 729, 1, 64),
        pytest.param(1, 2000, 1, 72, marks=pytest.mark.slow),
        (2, 65, 1, 128),
        (2, 33, 3, 8),
    ],
)
def test_the_scores_are_those_of_core(kernels, device, frames, tokens, heads, size):
    query, key = noise(tokens, 2, frames, tokens, heads * size)
    check(kernels, device, query, key, heads)


# Triton's interpreter, which runs kernels on CPUs, has no products of bfloat16.
HALVES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_summed_in_float32(kernels, device, dtype):
    query, key = noise(1, 2, 2, 70, 2 * 72).to(dtype)
    check(kernels, device, query, key, 2, rtol=1e-4)


def test_parts_of_a_packed_qkv_are_read_as_they_lie(kernels, device):
    packed = noise(2, 2, 50, 3 * 2 * 64).to(device)
    query, key, _ = packed.chunk(3, dim=-1)
    check(kernels, device, query, key, 2)


def test_the_frames_of_one_sequence_are_read_as_they_lie(kernels, device):
    """A tower that takes all frames in one sequence gives (1, frames * tokens, heads, size)."""
    query, key = (part.reshape(3, 40, 2 * 64) for part in noise(3, 2, 1, 120, 2, 64))
    check(kernels, device, query, key, 2)


def test_large_logits_do_not_overflow(kernels, device):
    query, key = noise(4, 2, 1, 66, 64) * 30
    check(kernels, device, query, key, 1, rtol=1e-3)


def test_heads_that_are_too_large_are_left_to_pytorch(kernels, device):
    query, key = noise(5, 2, 2, 9, 300)
    check(kernels, device, query, key, 1)
