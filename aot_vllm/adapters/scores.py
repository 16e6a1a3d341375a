"""Attention received by each token, read out of two layers of a vision tower while it runs its own fast attention.

Fast kernels return no attention maps. For the two scoring layers alone, softmax(Q K^T) is computed again from the
queries and keys the layer hands to its attention module, a few frames at a time, and summed away at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aot_vllm.config import AOTConfig
from aot_vllm.errors import SettingError

MAP_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
"""Most memory for attention maps at a time; a SigLIP-so400m frame takes 34 MB (16 heads, 729 x 729, float32). On a CPU
maps that stay near its caches take less than half the time; a GPU would rather be launched less often."""

PAPER_LOCAL_DEPTH = 5 / 26
"""The released code scores locally in layer 5 of the 26 that LLaVA-OneVision executes."""


def scoring_layers(config: AOTConfig, *, num_layers: int) -> tuple[int, int]:
    """Return the indices of the local and the global scoring layer in a tower that executes `num_layers`.

    A `local_layer` of None is the layer as deep, relative to the tower, as the released code's.

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
    return local % num_layers, global_ % num_layers


def attention_received(query: Tensor, key: Tensor, *, num_heads: int, scale: float) -> Tensor:
    """Return the attention each token receives, summed over queries and heads: (frames, tokens), float32.

    `query`, `key`: (frames, tokens, num_heads * head_size), as they enter the attention module. Attention is within a
    frame. At most `MAP_BYTES` of maps exist at a time, and never less than one frame's.
    """
    frames, tokens, _ = query.shape
    map_bytes = MAP_BYTES.get(query.device.type, MAP_BYTES["cuda"])
    block = max(1, map_bytes // (num_heads * tokens * tokens * 4))
    received = torch.empty(frames, tokens, dtype=torch.float32, device=query.device)
    for start in range(0, frames, block):
        queries, keys = (
            part[start : start + block].unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key)
        )
        logits = torch.matmul(queries * scale, keys.transpose(-1, -2))
        received[start : start + block] = logits.softmax(dim=-1, dtype=torch.float32).sum(dim=(1, 2))
    return received


class AttentionScores:
    """Records the attention received in two layers of a vision tower, block of frames by block of frames.

    `modules`: the two attention modules, each with `num_heads` (of this rank) and `scale`, called with q, k, v.
    `total_heads`: heads of a layer on all ranks; where this rank has fewer, `sum_over_ranks` adds the others', so that
    every rank ranks the tokens alike.
    """

    def __init__(
        self, modules: tuple[nn.Module, nn.Module], *, total_heads: int, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """Hook both modules; the hooks do nothing until `recording`."""
        self._total_heads = total_heads
        self._sum_over_ranks = sum_over_ranks
        self._blocks: dict[int, list[Tensor]] | None = None
        for slot, module in enumerate(modules):
            module.register_forward_pre_hook(self._hook(slot))

    def _hook(self, slot: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self._blocks is None:
                return
            query, key = inputs[0], inputs[1]
            received = attention_received(query, key, num_heads=module.num_heads, scale=module.scale)
            if module.num_heads < self._total_heads:
                received = self._sum_over_ranks(received)
            self._blocks[slot].append(received / self._total_heads)

        return record

    @contextmanager
    def recording(self) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
        """Record while the tower runs; the value, called afterwards, returns local and global (frames, tokens)."""
        blocks: dict[int, list[Tensor]] = {0: [], 1: []}
        self._blocks = blocks
        try:
            yield lambda: (torch.cat(blocks[0]), torch.cat(blocks[1]))
        finally:
            self._blocks = None
