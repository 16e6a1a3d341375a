"""Qwen3.5, dense and with experts: videos as in Qwen3-VL without deepstack, and linear beside full attention."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeProcessingInfo,
    Qwen3_5ProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from aot_vllm.adapters.processing import WithoutRetention
from aot_vllm.adapters.qwen3_vl import AOTQwen3VLProcessor, ReducedFramedQwenVL


class AOTQwen3_5ProcessingInfo(WithoutRetention, Qwen3_5ProcessingInfo):  # noqa: N801
    """Sizes of Qwen3.5's inputs. They are those of unreduced videos, because a request may keep every token."""


class AOTQwen3_5MoeProcessingInfo(WithoutRetention, Qwen3_5MoeProcessingInfo):  # noqa: N801
    """Sizes of Qwen3.5's inputs, from the configuration of the variant with experts."""


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
