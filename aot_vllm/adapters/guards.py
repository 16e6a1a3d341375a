"""Modes of vLLM in which a reduction would be wrong, or absent, without a message. An engine does not start in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm import envs
from vllm.config.multimodal import MultiModalConfig

from aot_vllm.config import AOTConfig
from aot_vllm.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def takes_videos(vllm_config: VllmConfig) -> bool:
    """Return whether requests to this engine may carry a video."""
    multimodal = vllm_config.model_config.multimodal_config
    return multimodal is not None and multimodal.get_limit_per_prompt("video") > 0


def refuse_unsupported_modes(vllm_config: VllmConfig, methods: Sequence[AOTConfig]) -> None:
    """Raise if `vllm_config` asks for a mode in which AOT would give wrong answers or none.

    `methods`: the settings that requests may get.

    Raises:
        UnsupportedError: names the mode, the reason and what to do instead.
    """
    for reason in (
        _rust_frontend(),
        _other_implementation(vllm_config),
        _stock_method(vllm_config),
        _tower_lora(vllm_config),
        _hooks_in_compiled_tower(vllm_config, methods),
    ):
        if reason is not None:
            raise UnsupportedError(reason)


def _rust_frontend() -> str | None:
    """It lays out placeholders of whole videos and sends no retention to the worker."""
    if not envs.VLLM_USE_RUST_FRONTEND:
        return None
    return (
        "AOT does not work with vLLM's Rust frontend, because videos are shortened in the Python API server. "
        "Unset VLLM_USE_RUST_FRONTEND, or drop --video-pruning-rate."
    )


def _other_implementation(vllm_config: VllmConfig) -> str | None:
    """AOT derives from vLLM's own model classes."""
    implementation = str(getattr(vllm_config.model_config.model_impl, "value", vllm_config.model_config.model_impl))
    if implementation in ("auto", "vllm"):
        return None
    return (
        f"AOT does not work with --model-impl {implementation}, because it reduces videos in vLLM's own model classes. "
        "Drop --model-impl, or drop --video-pruning-rate."
    )


def _stock_method(vllm_config: VllmConfig) -> str | None:
    """The default can't be told from the same name given, so only other names are refused."""
    multimodal = vllm_config.model_config.multimodal_config
    named = MultiModalConfig.video_pruning_method if multimodal is None else multimodal.video_pruning_method
    if named == MultiModalConfig.video_pruning_method:
        return None
    return (
        f"--video-pruning-method {named} names a method of vLLM's own, and would be ignored while AOT is active. Drop "
        'it, or switch AOT off with --additional-config \'{"aot": {"enabled": false}}\'.'
    )


def _tower_lora(vllm_config: VllmConfig) -> str | None:
    """Adapters are assigned to the tower's tokens in order, and their number is taken from the rows that are kept."""
    lora = vllm_config.lora_config
    if lora is None or not lora.enable_tower_connector_lora or not takes_videos(vllm_config):
        return None
    return (
        "AOT does not work with LoRA adapters on the vision tower: vLLM computes the number of a video's patches from "
        "the tokens that are kept, so patches would get no adapter or that of another request. Drop "
        "--enable-tower-connector-lora (adapters on the language model work), or drop --video-pruning-rate."
    )


def _hooks_in_compiled_tower(vllm_config: VllmConfig, methods: Sequence[AOTConfig]) -> str | None:
    """A compiled encoder either lacks the hooks that record attention, or always runs them."""
    by_attention = any(method.anchors == "attention" for method in methods)
    if not by_attention or not vllm_config.compilation_config.compile_mm_encoder:
        return None
    return (
        'AOT with {"anchors": "attention"} does not work with a compiled encoder, because attention is recorded by '
        "hooks that a compiled encoder does not run. Drop compile_mm_encoder from --compilation-config, or leave "
        'anchors at "diverse".'
    )
