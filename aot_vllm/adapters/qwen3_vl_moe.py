"""Qwen3-VL with a mixture of experts: its tower, videos and deepstack are those of Qwen3-VL."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from aot_vllm.adapters.processing import WithoutRetention
from aot_vllm.adapters.qwen3_vl import AOTQwen3VLProcessor, ReducedFramedQwenVL


class AOTQwen3VLMoeProcessingInfo(WithoutRetention, Qwen3VLMoeProcessingInfo):
    """Sizes of Qwen3-VL's inputs, from the configuration of the variant with experts."""


@MULTIMODAL_REGISTRY.register_processor(
    AOTQwen3VLProcessor,
    info=AOTQwen3VLMoeProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class AOTQwen3VLMoe(ReducedFramedQwenVL, Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL with experts that reduces each video between its vision tower and its language model."""
