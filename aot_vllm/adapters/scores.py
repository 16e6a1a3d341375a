"""Attention received by each token, read out of two layers of a vision tower while it runs its own fast attention.

Fast kernels return no attention maps. For the two scoring layers alone, softmax(Q K^T) is computed again from the
queries and keys the layer hands to its attention module, a few frames at a time, and summed away at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aot_vllm.config import AOTConfig
from aot_vllm.errors import SettingError

MAP_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
"""Most memory for attention maps at a time; a SigLIP-so400m frame takes 34 MB (16 heads, 729 x 729, float32). On a CPU
maps that stay near its caches take less than half the time; a GPU would rather be launched less often."""

QUERIES_OF_MAPS = 2
"""Nor do maps, with the copies they are made from, take more memory than so many tensors of queries: a layer's MLP, for
which memory was profiled, needs more than its attention by 2.5 (SigLIP-so400m, Qwen3-VL) or 3 (Qwen2.5-VL) of them."""

PAPER_LOCAL_DEPTH = 5 / 26
"""The released code scores locally in layer 5 of the 26 that LLaVA-OneVision executes."""


def scoring_layers(config: AOTConfig, *, num_layers: int, whole_frame: Sequence[int] | None = None) -> tuple[int, int]:
    """Return the indices of the local and the global scoring layer in a tower that executes `num_layers`.

    A `local_layer` of None is the layer as deep, relative to the tower, as the released code's. In a tower where only
    some layers attend to the `whole_frame`, the nearest of these (of two, the deeper): attention inside a window says
    nothing about which of a frame's tokens matter.

    Raises:
        SettingError: a layer named in the settings does not exist.
    """
    local = config.local_layer
    if local is None:
        local = min(int(PAPER_LOCAL_DEPTH * num_layers + 0.5), num_layers - 1)
    global_ = -1 if num_layers == 1 and config.global_layer == -2 else config.global_layer
    for name, layer in (("local_layer", local), ("global_layer", global_)):
        if not -num_layers <= layer < num_layers:
            raise SettingError(
                f"{name} must be in [{-num_layers}, {num_layers - 1}], for this vision tower executes {num_layers} "
                f"layers, got {layer}"
            )
    local, global_ = local % num_layers, global_ % num_layers
    if whole_frame is None:
        return local, global_
    return _nearest(whole_frame, local), _nearest(whole_frame, global_)


def _nearest(layers: Sequence[int], layer: int) -> int:
    """Return the one of `layers` that is nearest to `layer`, the deeper one of two."""
    return min(layers, key=lambda candidate: (abs(candidate - layer), -candidate))


def attention_received(query: Tensor, key: Tensor, *, num_heads: int, scale: float) -> Tensor:
    """Return the attention each token receives, summed over queries and heads: (frames, tokens), float32.

    `query`, `key`: (frames, tokens, num_heads * head_size), as they enter the attention module. Attention is within a
    frame. At most `MAP_BYTES` of maps exist at a time, and `QUERIES_OF_MAPS`, but never less than the map of one query.
    """
    frames, tokens, _ = query.shape
    map_bytes = min(MAP_BYTES.get(query.device.type, MAP_BYTES["cuda"]), QUERIES_OF_MAPS * query.nbytes)
    # logits of half precision are there together with their copy in float32, which becomes the map
    query_bytes = num_heads * tokens * (4 if query.dtype == torch.float32 else 4 + query.itemsize)
    copies_bytes = 3 * query[0].nbytes  # queries twice, for they are scaled, and keys
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

    The softmax is taken in place, its denominators go into the sum over queries: there is one map, not three.
    """
    maps = torch.matmul(queries, keys.transpose(-1, -2)).float()
    maps.sub_(maps.amax(dim=-1, keepdim=True)).exp_()
    shares = maps.sum(dim=-1, keepdim=True).reciprocal_()
    return torch.matmul(shares.transpose(-1, -2), maps).sum(dim=(1, 2))


def scoring_modules(
    config: AOTConfig, modules: Sequence[nn.Module], *, whole_frame: Sequence[int] | None = None
) -> tuple[nn.Module, ...]:
    """Return the local and the global scoring layer's module, none where anchors aren't chosen by attention.

    Raises `SettingError` like `scoring_layers`.
    """
    layers = scoring_layers(config, num_layers=len(modules), whole_frame=whole_frame)
    return tuple(modules[layer] for layer in layers) if config.anchors == "attention" else ()


class AttentionScores:
    """Records the attention received in two layers of a vision tower, block of frames by block of frames.

    `modules`: the two attention modules, or none for nothing to be recorded; each with `num_heads` (of this rank) and
    `scale`, called with query, key and value: (frames, tokens, heads * size), or all frames one after the other,
    (1, frames * tokens, heads, size). `total_heads`: heads of a layer on all ranks; where this rank has fewer,
    `sum_over_ranks` adds the others', so that every rank ranks the tokens alike.
    """

    def __init__(
        self, modules: Sequence[nn.Module], *, total_heads: int, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """Hook the modules; the hooks do nothing until `recording`."""
        self._slots = range(len(modules))
        self._total_heads = total_heads
        self._sum_over_ranks = sum_over_ranks
        self._blocks: dict[int, list[Tensor]] | None = None
        self._tokens_per_frame: int | None = None
        for slot, module in enumerate(modules):
            module.register_forward_pre_hook(self._hook(slot), with_kwargs=True)

    def _hook(self, slot: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if self._blocks is None:
                return
            query, key = inputs[:2] if inputs else (named["query"], named["key"])
            if self._tokens_per_frame is not None:
                query, key = (part.reshape(-1, self._tokens_per_frame, part[0, 0].numel()) for part in (query, key))
            received = attention_received(query, key, num_heads=module.num_heads, scale=module.scale)
            if module.num_heads < self._total_heads:
                received = self._sum_over_ranks(received)
            self._blocks[slot].append(received / self._total_heads)

        return record

    @contextmanager
    def recording(self, *, tokens_per_frame: int | None = None) -> Iterator[Callable[[], Sequence[Tensor | None]]]:
        """Record while the tower runs; the value, called afterwards, returns local and global (frames, tokens).

        Both are None where nothing is recorded.

        `tokens_per_frame`: where to cut the sequence of a tower that lays frames one after the other.
        """
        blocks: dict[int, list[Tensor]] = {slot: [] for slot in self._slots}
        self._blocks, self._tokens_per_frame = blocks, tokens_per_frame
        try:
            yield lambda: [torch.cat(recorded) for recorded in blocks.values()] or (None, None)
        finally:
            self._blocks = None
