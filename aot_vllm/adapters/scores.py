"""Attention received by each token, from two layers of a vision tower that runs its own fast attention.

Fast kernels return no attention maps. So hooks take the queries and keys of the two scoring layers and compute
softmax(Q K^T) again, see `aot_vllm.core.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aot_vllm.config import AOTConfig
from aot_vllm.errors import SettingError
from aot_vllm.kernels.dispatch import Kernels, algorithms_for

PAPER_LOCAL_DEPTH = 5 / 26
"""Relative depth of the local scoring layer in the released code: layer 5 of the 26 that LLaVA-OneVision executes."""


def scoring_layers(config: AOTConfig, *, num_layers: int, whole_frame: Sequence[int] | None = None) -> tuple[int, int]:
    """Return the indices of the local and the global scoring layer in a tower that executes `num_layers`.

    A `local_layer` of None chooses the layer at the same relative depth as in the released code.

    `whole_frame`: the layers that attend to a whole frame, by default all. Attention within a window does not tell
    which tokens of a frame matter. So each scoring layer is moved to the nearest of these layers, the deeper of two.

    Raises:
        SettingError: the tower does not have a layer that the settings name.
    """
    local = config.local_layer
    if local is None:
        local = min(int(PAPER_LOCAL_DEPTH * num_layers + 0.5), num_layers - 1)
    global_ = -1 if num_layers == 1 and config.global_layer == -2 else config.global_layer
    for name, layer in (("local_layer", local), ("global_layer", global_)):
        if not -num_layers <= layer < num_layers:
            raise SettingError(
                f"{name} must be in [{-num_layers}, {num_layers - 1}], because this vision tower executes {num_layers} "
                f"layers, got {layer}"
            )
    local, global_ = local % num_layers, global_ % num_layers
    if whole_frame is None:
        return local, global_
    return _nearest(whole_frame, local), _nearest(whole_frame, global_)


def _nearest(layers: Sequence[int], layer: int) -> int:
    """Return the nearest of `layers` to `layer`, the deeper of two at the same distance."""
    return min(layers, key=lambda candidate: (abs(candidate - layer), -candidate))


def scoring_modules(
    config: AOTConfig, modules: Sequence[nn.Module], *, whole_frame: Sequence[int] | None = None
) -> tuple[nn.Module, ...]:
    """Return the modules of the local and the global scoring layer, the global one alone, or none: those that are used.

    Raises `SettingError` like `scoring_layers`.
    """
    if not config.uses("global_layer"):
        return ()
    local, global_ = scoring_layers(config, num_layers=len(modules), whole_frame=whole_frame)
    return (modules[local], modules[global_]) if config.uses("local_layer") else (modules[global_],)


class AttentionScores:
    """Records the attention received in two layers of a vision tower, one block of frames at a time.

    `modules`: the local and the global attention module, one for both scores, or none if nothing will be recorded. Each
    has `num_heads` (on this rank) and `scale`. Each is called with query, key and value, shaped (frames, tokens,
    heads * size), or (1, frames * tokens, heads, size) with all frames in one sequence.

    `total_heads`: heads of a layer on all ranks. If this rank has fewer, `sum_over_ranks` adds those of the other
    ranks, so that every rank has the same scores.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        *,
        total_heads: int,
        sum_over_ranks: Callable[[Tensor], Tensor],
        kernels: Kernels = "auto",
    ) -> None:
        """Hook the modules. Outside of `recording` the hooks do nothing. `kernels`: see `PluginSettings`."""
        self._kernels: Kernels = kernels
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
            received = algorithms_for(query.device, kernels=self._kernels).attention_received(
                query, key, num_heads=module.num_heads, scale=module.scale
            )
            if module.num_heads < self._total_heads:
                received = self._sum_over_ranks(received)
            self._blocks[slot].append(received / self._total_heads)

        return record

    @contextmanager
    def recording(self, *, tokens_per_frame: int | None = None) -> Iterator[Callable[[], Sequence[Tensor]]]:
        """Record while the tower runs. The value is a function that returns local and global scores, (frames, tokens).

        `tokens_per_frame`: where to cut the sequence of a tower that takes all frames in one sequence.
        """
        blocks: dict[int, list[Tensor]] = {slot: [] for slot in self._slots}
        self._blocks, self._tokens_per_frame = blocks, tokens_per_frame
        try:
            yield lambda: [torch.cat(recorded) for recorded in blocks.values()] * (2 if len(blocks) == 1 else 1)
        finally:
            self._blocks = None


def scores_of_methods(
    methods: Sequence[AOTConfig],
    modules: Sequence[nn.Module],
    *,
    total_heads: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
    kernels: Kernels,
    whole_frame: Sequence[int] | None = None,
) -> tuple[AttentionScores, ...]:
    """Return one recorder for each of the settings that requests may get, see `Reduction.methods`.

    `modules` are the attention modules of all layers of the tower. Raises `SettingError` like `scoring_layers`.
    """
    return tuple(
        AttentionScores(
            scoring_modules(method, modules, whole_frame=whole_frame),
            total_heads=total_heads,
            sum_over_ranks=sum_over_ranks,
            kernels=kernels,
        )
        for method in methods
    )
