"""Attention received without a map in memory, see `aot_vllm.core.attention.attention_received`.

Two launches. The first computes the log-sum-exp of each query's logits by a running maximum. The second sums columns: a
program takes a block of keys of one frame and goes through all heads and queries. Sums have a fixed order, so equal
inputs give equal bits. Products of float32 are split into three of TF32, which keep 21 bits.

Dimensions: F frames, M queries and N keys of a frame (the same tokens), H heads, D size of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aot_vllm.core import attention
from aot_vllm.kernels.launch import launch, power_of_2

LARGEST_HEAD = 128
"""A larger head is left to PyTorch."""

LOG2_E = 1.4426950408889634


@triton.jit
def _rows(pointer, token, size, tokens, stride_token, stride_size, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Return some columns of some tokens, (tokens, WIDTH). Columns from `FIRST`, zeros beyond `size`."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = (token < tokens)[:, None] & (column < size)[None, :]
    offset = token.to(tl.int64)[:, None] * stride_token + column[None, :] * stride_size
    return tl.load(pointer + offset, mask=mask, other=0.0)


@triton.jit
def _heads(pointer, token, size, tokens, stride_token, stride_size, MAIN: tl.constexpr, REST: tl.constexpr):
    """Return the head of some tokens in two parts, see `head_blocks`. Without a rest the second part is the first."""
    main = _rows(pointer, token, size, tokens, stride_token, stride_size, 0, MAIN)
    rest = main
    if REST > 0:
        rest = _rows(pointer, token, size, tokens, stride_token, stride_size, MAIN, REST)
    return main, rest


@triton.jit
def _logits(q, q_rest, k, k_rest, REST: tl.constexpr):
    """Return the products of queries and keys, in two parts each."""
    logits = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    if REST > 0:
        logits = tl.dot(q_rest, tl.trans(k_rest), acc=logits, input_precision="tf32x3")
    return logits


@triton.jit
def _log_sums(
    query_ptr,
    key_ptr,
    log_sum_ptr,  # (F, H, M) out: base 2
    tokens,
    heads,
    size,
    q_frame,
    q_token,
    q_head,
    q_size,
    k_frame,
    k_token,
    k_head,
    k_size,
    scale,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    pieces = tl.cdiv(tokens, QUERIES)
    frame_head = (tl.program_id(0) // pieces).to(tl.int64)
    frame, head = frame_head // heads, frame_head % heads
    query_ptr += frame * q_frame + head * q_head
    key_ptr += frame * k_frame + head * k_head
    query = tl.program_id(0) % pieces * QUERIES + tl.arange(0, QUERIES)
    q, q_rest = _heads(query_ptr, query, size, tokens, q_token, q_size, MAIN, REST)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, tokens, KEYS):
        key = start + tl.arange(0, KEYS)
        k, k_rest = _heads(key_ptr, key, size, tokens, k_token, k_size, MAIN, REST)
        logits = _logits(q, q_rest, k, k_rest, REST) * scale
        logits = tl.where((key < tokens)[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(logits - higher[:, None]), axis=1)
        top = higher
    tl.store(log_sum_ptr + frame_head * tokens + query, top + tl.log2(total), mask=query < tokens)


@triton.jit
def _received(
    query_ptr,
    key_ptr,
    log_sum_ptr,
    received_ptr,  # (F, N) out
    tokens,
    heads,
    size,
    q_frame,
    q_token,
    q_head,
    q_size,
    k_frame,
    k_token,
    k_head,
    k_size,
    scale,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    pieces = tl.cdiv(tokens, KEYS)
    frame = (tl.program_id(0) // pieces).to(tl.int64)
    key = tl.program_id(0) % pieces * KEYS + tl.arange(0, KEYS)
    query_ptr += frame * q_frame
    key_ptr += frame * k_frame
    received = tl.zeros((KEYS,), tl.float32)
    for head in range(heads):
        k, k_rest = _heads(key_ptr, key, size, tokens, k_token, k_size, MAIN, REST)
        for start in range(0, tokens, QUERIES):
            query = start + tl.arange(0, QUERIES)
            q, q_rest = _heads(query_ptr, query, size, tokens, q_token, q_size, MAIN, REST)
            logits = _logits(q, q_rest, k, k_rest, REST)
            log_sum = tl.load(log_sum_ptr + (frame * heads + head) * tokens + query, mask=query < tokens, other=0.0)
            share = tl.exp2(logits * scale - log_sum[:, None])
            received += tl.sum(tl.where((query < tokens)[:, None], share, 0.0), axis=0)
        query_ptr += q_head
        key_ptr += k_head
    tl.store(received_ptr + frame * tokens + key, received, mask=key < tokens)


def attention_received(query: Tensor, key: Tensor, *, num_heads: int, scale: float) -> Tensor:
    """Return the attention that each token receives, summed over queries and heads: (frames, tokens), float32.

    Arguments and result are those of `aot_vllm.core.attention.attention_received`. Queries and keys may be views with
    any strides, such as parts of a packed QKV. Heads larger than `LARGEST_HEAD` are left to that function.
    """
    query_FMHD, key_FNHD = (part.unflatten(-1, (num_heads, -1)) for part in (query, key))
    frames, tokens, _, size = query_FMHD.shape
    if size > LARGEST_HEAD:
        return attention.attention_received(query, key, num_heads=num_heads, scale=scale)
    log_sum_FHM = torch.empty(frames, num_heads, tokens, dtype=torch.float32, device=query.device)
    received_FN = torch.empty(frames, tokens, dtype=torch.float32, device=query.device)
    shared = (tokens, num_heads, size, *query_FMHD.stride(), *key_FNHD.stride(), scale * LOG2_E)
    blocks = blocks_for(query.dtype, size)
    pieces = triton.cdiv(tokens, blocks["KEYS"])
    launch(_log_sums, (pieces * frames * num_heads,), query_FMHD, key_FNHD, log_sum_FHM, *shared, **blocks)
    launch(_received, (pieces * frames,), query_FMHD, key_FNHD, log_sum_FHM, received_FN, *shared, **blocks)
    return received_FN


def blocks_for(dtype: torch.dtype, size: int) -> dict[str, int]:
    """Return the sizes of a program for a type and a head size. As many queries as keys meet at a time.

    Float32 takes more registers and shared memory for each of them.
    """
    main, rest = head_blocks(size)
    block = 64 if dtype != torch.float32 else 32 if main < LARGEST_HEAD else 16
    warps = 4 if dtype != torch.float32 or main == LARGEST_HEAD else 8
    return {"MAIN": main, "REST": rest, "QUERIES": block, "KEYS": block, "num_warps": warps}


def head_blocks(size: int) -> tuple[int, int]:
    """Return the two powers of 2 that a head is split into, 72 into 64 and 16: padding to 128 would cost half of both.

    Each is at least 16, which tensor cores need. The second is 0 if the first holds the whole head.
    """
    main = max(16, 1 << (size.bit_length() - 1))
    return main, power_of_2(size - main, least=16) if size > main else 0
