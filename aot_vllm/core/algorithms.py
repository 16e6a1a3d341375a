"""The parts of the reduction that other code may compute: they take nearly all of its time."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from aot_vllm.core.anchors import select_diverse_anchors
from aot_vllm.core.attention import attention_received
from aot_vllm.core.calibration import token_weights
from aot_vllm.core.coverage import select_covering_anchors
from aot_vllm.core.transport import FrameTokens, absorb_frames


@dataclass(frozen=True, kw_only=True)
class Algorithms:
    """One function for each part. Each has the arguments, the result and the errors of the function it stands for."""

    select_diverse_anchors: Callable[..., Tensor] = select_diverse_anchors
    select_covering_anchors: Callable[..., Tensor] = select_covering_anchors
    token_weights: Callable[..., Tensor | None] = token_weights
    absorb_frames: Callable[..., FrameTokens] = absorb_frames
    attention_received: Callable[..., Tensor] = attention_received


TORCH = Algorithms()
"""PyTorch alone, on any device."""
