"""Positions on their way through the stages of a pipeline (pipeline parallelism).

Each stage has some of the layers, and each layer rotates queries and keys by position. The rows and columns of kept
tokens are known only where the vision tower ran, on the first stage. A later stage would make positions of its own,
without them. So positions travel from stage to stage beside the hidden states.

Dimensions: N tokens of a step, 3 coordinates of a position (time, row, column).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.sequence import IntermediateTensors

POSITIONS = "aot_positions"
"""Name of the positions (N, 3) among the tensors that one stage sends to the next."""

_EmptyTensors = Callable[[int, torch.dtype, torch.device], IntermediateTensors]


class PositionsThroughPipeline:
    """A mix-in before a model with multidimensional positions: each stage uses the positions of the stage before it."""

    make_empty_intermediate_tensors: _EmptyTensors

    def receive_positions(self) -> None:
        """Give the model runner of a later stage room for the positions that arrive with the hidden states."""
        make_without_positions = self.make_empty_intermediate_tensors

        def make_empty_intermediate_tensors(
            batch_size: int, dtype: torch.dtype, device: torch.device
        ) -> IntermediateTensors:
            made = make_without_positions(batch_size, dtype, device)
            made[POSITIONS] = torch.zeros(batch_size, 3, dtype=torch.int64, device=device)
            return made

        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        """Return hidden states, or what the next stage needs: hidden states, residual, and `positions` (3, N).

        Positions from the stage before overwrite `positions` in place. So CUDA graphs and speculative decoding, which
        read that tensor of the runner too, have the right ones. The runner fills it anew in every step.
        """
        if intermediate_tensors is not None:
            positions.copy_(intermediate_tensors[POSITIONS].T)
        made: Tensor | IntermediateTensors = super().forward(  # type: ignore[misc]
            input_ids, positions, intermediate_tensors=intermediate_tensors, inputs_embeds=inputs_embeds, **kwargs
        )
        if isinstance(made, IntermediateTensors):
            # a copy, because sending ends after the runner has begun to prepare the next step
            made[POSITIONS] = positions.T.clone(memory_format=torch.contiguous_format)
        return made
