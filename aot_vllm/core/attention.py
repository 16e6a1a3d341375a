"""Attention received by each token of a frame: the column sums of softmax(Q K^T). Maps are summed at once."""

import torch
from torch import Tensor

MAP_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
"""Most memory for attention maps at a time. A frame of SigLIP-so400m takes 34 MB (16 heads, 729 x 729, float32). On a
CPU, maps that nearly fit the caches take less than half the time. On a GPU, larger blocks mean fewer launches."""

QUERIES_OF_MAPS = 2
"""Second bound on that memory, in multiples of the layer's queries; it includes the copies that maps are made from.
An engine profiles its memory with the MLP of the layer. The MLP needs more than the attention, by 2.5 (SigLIP-so400m,
Qwen3-VL) or 3 (Qwen2.5-VL) times the memory of the queries."""


def attention_received(query: Tensor, key: Tensor, *, num_heads: int, scale: float) -> Tensor:
    """Return the attention that each token receives, summed over queries and heads: (frames, tokens), float32.

    `query`, `key`: (frames, tokens, num_heads * head_size), as they enter the attention module. Tokens attend within
    their frame. `MAP_BYTES` and `QUERIES_OF_MAPS` bound the memory of maps, down to the map of a single query.
    """
    frames, tokens, _ = query.shape
    map_bytes = min(MAP_BYTES.get(query.device.type, MAP_BYTES["cuda"]), QUERIES_OF_MAPS * query.nbytes)
    # half-precision logits exist together with their float32 copy, which becomes the map
    query_bytes = num_heads * tokens * (4 if query.dtype == torch.float32 else 4 + query.itemsize)
    copies_bytes = 3 * query[0].nbytes  # keys, queries, and scaled queries
    frames_at_once = max(1, map_bytes // (query_bytes * tokens + copies_bytes))
    queries_at_once = min(tokens, max(1, map_bytes // query_bytes))
    received = torch.zeros(frames, tokens, dtype=torch.float32, device=query.device)
    for frame in range(0, frames, frames_at_once):
        block = slice(frame, frame + frames_at_once)
        queries, keys = (part[block].unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key))
        for some in queries.split(queries_at_once, dim=2):
            received[block] += _received_from(some * scale, keys)
    return received


def _received_from(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the attention that some queries give, (frames, tokens), from (frames, heads, queries or tokens, size).

    The softmax is computed in place, and its denominators are applied in the sum over queries. So there is one map in
    memory instead of three.
    """
    maps = torch.matmul(queries, keys.transpose(-1, -2)).float()
    maps.sub_(maps.amax(dim=-1, keepdim=True)).exp_()
    shares = maps.sum(dim=-1, keepdim=True).reciprocal_()
    return torch.matmul(shares.transpose(-1, -2), maps).sum(dim=(1, 2))
