"""Qwen3.5, dense and with experts: videos as in Qwen3-VL but for deepstack, before linear and full attention mixed."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeProcessingInfo,
    Qwen3_5ProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from aot_vllm.adapters.qwen3_vl import AOTQwen3VLProcessor, ReducedFramedQwenVL
from aot_vllm.adapters.qwen_vl import WithoutRetention


class AOTQwen3_5ProcessingInfo(WithoutRetention, Qwen3_5ProcessingInfo):  # noqa: N801
    """Sizes of Qwen3.5's inputs; budgets stay those of unreduced videos, for a request may ask for all."""


class AOTQwen3_5MoeProcessingInfo(WithoutRetention, Qwen3_5MoeProcessingInfo):  # noqa: N801
    """Sizes of Qwen3.5's inputs, read from the configuration of its variant with experts."""


@MULTIMODAL_REGISTRY.register_processor(
    AOTQwen3VLProcessor,
    info=AOTQwen3_5ProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class AOTQwen3_5(ReducedFramedQwenVL, Qwen3_5ForConditionalGeneration):  # noqa: N801
    """Qwen3.5 that reduces each video between its vision tower and its language model."""


@MULTIMODAL_REGISTRY.register_processor(
    AOTQwen3VLProcessor,
    info=AOTQwen3_5MoeProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class AOTQwen3_5Moe(ReducedFramedQwenVL, Qwen3_5MoeForConditionalGeneration):  # noqa: N801
    """Qwen3.5 with experts that reduces each video between its vision tower and its language model."""
