"""The architectures that AOT serves, and the vLLM releases it was tested with. Strings only: nothing is imported."""

TESTED_VLLM_RELEASES = ("0.32", "0.33")
"""Releases of vLLM that the adapters were tested with, as `major.minor`."""

ARCHITECTURES = {
    "LlavaOnevisionForConditionalGeneration": "aot_vllm.adapters.llava_onevision:AOTLlavaOnevision",
    "Qwen2_5_VLForConditionalGeneration": "aot_vllm.adapters.qwen2_5_vl:AOTQwen2_5_VL",
    "Qwen3VLForConditionalGeneration": "aot_vllm.adapters.qwen3_vl:AOTQwen3VL",
    "Qwen3VLMoeForConditionalGeneration": "aot_vllm.adapters.qwen3_vl_moe:AOTQwen3VLMoe",
    "Qwen3_5ForConditionalGeneration": "aot_vllm.adapters.qwen3_5:AOTQwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "aot_vllm.adapters.qwen3_5:AOTQwen3_5Moe",
}
"""The class that serves each in-tree architecture with AOT."""


def reduced_architecture(architecture: str) -> str:
    """Return the name of AOT's class for an in-tree `architecture` in vLLM's model registry."""
    return f"AOT{architecture}"


def original_architecture(architecture: str) -> str:
    """Return the in-tree architecture behind one of AOT's names, any other name as it is."""
    return next((name for name in ARCHITECTURES if reduced_architecture(name) == architecture), architecture)


def register_models() -> None:
    """Register AOT's classes under names of their own, so that no in-tree model is replaced."""
    from vllm.model_executor.models import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture, qualified_class in ARCHITECTURES.items():
        name = reduced_architecture(architecture)
        if name not in known:
            ModelRegistry.register_model(name, qualified_class)
