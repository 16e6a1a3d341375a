"""What an engine tells a gateway about itself: how it samples, resizes and counts the videos of its model.

With these rules a gateway takes the frames of a video itself, and knows their tokens before it asks the engine. A rule
is None where none of the known ones is exact. The gateway then hands over the video as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.video import get_video_loader_backend_for_processor
from vllm.transformers_utils.processor import get_video_processor_cls_name

import aot_vllm
from aot_vllm.adapters.compat import vllm_version
from aot_vllm.adapters.registry import ARCHITECTURES, original_architecture
from aot_vllm.adapters.settings import Reduction
from aot_vllm.frames import FORMAT

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

Rule = dict[str, Any]

MOST_SAMPLED_FRAMES = 768
MOST_SAMPLED_FPS = 30
"""Bounds of vLLM's loaders for the Qwen models, in frames and in frames per second."""

_USUAL_TIMESTAMP = "<10.0 seconds>"
"""A timestamp as Qwen3-VL's processor writes it before a unit of frames. Others may take a token more or less."""

_SIZE_SETTINGS = frozenset({"size", "min_pixels", "max_pixels"})
_VALUE_SETTINGS = frozenset({"do_normalize", "do_rescale", "rescale_factor", "image_mean", "image_std"})
"""Settings of a processor, from `--mm-processor-kwargs` or vLLM's own, with which the rules of sizes hold: those that
the rule of the Qwen models takes into account, and those that change nothing but the values of pixels."""


def describe_engine(
    vllm_config: VllmConfig, *, models: list[str], request_kwargs_trusted: bool, prompt_tokens_details: bool
) -> dict[str, Any]:
    """Return what `GET /v1/aot/engine` answers.

    `models` are the names that the server answers to. `request_kwargs_trusted` and `prompt_tokens_details` are the
    server's flags `--trust-request-mm-kwargs` and `--enable-prompt-tokens-details`.
    """
    model_config = vllm_config.model_config
    reduction = _reduction(vllm_config)
    rules = _rules(model_config, active=reduction["active"])
    multimodal = model_config.multimodal_config
    return {
        "object": "aot.engine",
        "versions": {"aot_vllm": aot_vllm.__version__, "vllm": vllm_version()},
        "architecture": original_architecture(_architecture(model_config)),
        "models": models,
        "frames_format": FORMAT,
        "reduction": reduction,
        **rules,
        "context_length": model_config.max_model_len,
        "request_kwargs_trusted": request_kwargs_trusted,
        "prompt_tokens_details": prompt_tokens_details,
        "limits": {
            "videos": 0 if multimodal is None else multimodal.get_limit_per_prompt("video"),
            "media_decode_bytes": None,  # vLLM has no such limit
        },
    }


def _architecture(model_config: ModelConfig) -> str:
    return str((model_config.hf_config.architectures or [""])[0])


def active_reduction(vllm_config: VllmConfig) -> Reduction | None:
    """Return the reduction that an engine of this configuration was started with, None if AOT is not active."""
    model_config = vllm_config.model_config
    name = _architecture(model_config)
    return None if original_architecture(name) == name else Reduction.of(model_config.multimodal_config)


def _reduction(vllm_config: VllmConfig) -> dict[str, Any]:
    """Return whether AOT is active, with the retention, the preset and its settings; retention 1 if it is not.

    `presets` are the names that a request may give as its preset.
    """
    reduction = active_reduction(vllm_config)
    if reduction is None:
        return {"active": False, "retention": 1.0, "preset": None, "settings": None, "presets": []}
    return {
        "active": True,
        "retention": reduction.retention,
        "preset": reduction.description,
        "settings": reduction.method.in_effect(),
        "presets": list(reduction.presets),
    }


def _rules(model_config: ModelConfig, *, active: bool) -> dict[str, Any]:
    """Return the four rules of a model: `sampling`, `max_frames`, `size` and `tokens`."""
    rules: dict[str, Any] = dict.fromkeys(("sampling", "max_frames", "size", "tokens"))
    multimodal = model_config.multimodal_config
    if original_architecture(_architecture(model_config)) not in ARCHITECTURES or multimodal is None:
        return rules
    info = MULTIMODAL_REGISTRY.get_processing_info(model_config)
    processor = getattr(info.get_hf_processor(), "video_processor", None)
    rules["sampling"] = sampling_rule(multimodal.media_io_kwargs.get("video", {}), model_config)
    if type(processor).__name__ == "LlavaOnevisionVideoProcessor":
        rules["max_frames"], rules["size"], rules["tokens"] = _llava_onevision(info, processor)
    elif type(processor).__name__ in ("Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor"):
        rules["max_frames"], rules["size"], rules["tokens"] = _qwen_vl(info, processor)
    if multimodal.video_pruning_rate and not active:  # another method prunes, and its counts are not told here
        rules["tokens"] = None
    return rules


def sampling_rule(media_io_kwargs: Mapping[str, Any], model_config: ModelConfig) -> Rule | None:
    """Return how vLLM's loader takes frames from a video of this model.

    `media_io_kwargs` is the part for videos of `--media-io-kwargs`.
    """
    if "video_backend" in media_io_kwargs:
        loader = media_io_kwargs["video_backend"]
    else:
        loader = get_video_loader_backend_for_processor(get_video_processor_cls_name(model_config))
    loader = loader or envs.VLLM_VIDEO_LOADER_BACKEND
    if loader in ("opencv", "pynvvideocodec"):
        num_frames, fps = media_io_kwargs.get("num_frames", 32), media_io_kwargs.get("fps", -1)
        return {
            "rule": "uniform",
            "num_frames": num_frames if num_frames > 0 else None,
            "fps": fps if fps > 0 else None,
        }
    if loader not in ("qwen2_vl", "qwen3_vl"):
        return None
    rule = {
        "rule": loader,
        "fps": min(media_io_kwargs.get("fps", 2), MOST_SAMPLED_FPS),
        "min_frames": media_io_kwargs.get("min_frames", 4),
        "max_frames": min(media_io_kwargs.get("max_frames", MOST_SAMPLED_FRAMES), MOST_SAMPLED_FRAMES),
    }
    if loader == "qwen2_vl":
        rule["frame_factor"] = media_io_kwargs.get("temporal_patch_size", 2)
    return rule


def _size_settings(info: Any) -> Mapping[str, Any] | None:
    """Return the settings of the server that say to which size a video is resized; None if a rule may not hold."""
    settings = info._merge_and_resolve_mm_processor_kwargs({}).get("videos_kwargs") or {}
    sizes = {name: value for name, value in settings.items() if name not in _VALUE_SETTINGS}
    return sizes if sizes.keys() <= _SIZE_SETTINGS else None


def _llava_onevision(info: Any, processor: Any) -> tuple[int, Rule | None, Rule | None]:
    """Return the most frames that memory was profiled with, the rule of sizes and that of tokens."""
    max_frames = info.get_num_frames_with_most_features(info.ctx.model_config.max_model_len, {"video": 1})
    tokens = [info.get_num_video_tokens(image_width=1, image_height=1, num_frames=frames) for frames in (0, 1)]
    token_rule = {
        "rule": "constant",
        "frames_per_unit": 1,
        "per_unit": tokens[1] - tokens[0],
        "extra": tokens[0],
        "text_per_video": 0,
        "text_per_unit": 0,
    }
    side = info.get_hf_config().vision_config.image_size
    fixed = (
        _size_settings(info) == {}
        and processor.do_resize
        and not processor.do_center_crop
        and not processor.do_sample_frames
        and (processor.size.get("height"), processor.size.get("width")) == (side, side)
    )
    return max_frames, {"rule": "fixed", "height": side, "width": side} if fixed else None, token_rule


def _text_around(info: Any, *, whole: bool) -> dict[str, int]:
    """Return the numbers of text tokens around a video: two marks, or two marks and a timestamp for each unit."""
    if not whole:
        return {"text_per_video": 2, "text_per_unit": 0}
    timestamp = info.get_tokenizer().encode(_USUAL_TIMESTAMP, add_special_tokens=False)
    return {"text_per_video": 0, "text_per_unit": 2 + len(timestamp)}


def _qwen_vl(info: Any, processor: Any) -> tuple[int, Rule | None, Rule | None]:
    """Return the most frames that memory was profiled with, the rule of sizes and that of tokens.

    Where a size is found for a video as a whole (Qwen3-VL), memory is profiled with a number of pixels. Then these are
    as many frames as it allows in the smallest size.
    """
    whole = type(processor).__name__ == "Qwen3VLVideoProcessor"
    temporal = processor.temporal_patch_size
    factor = processor.patch_size * processor.merge_size
    length = info.ctx.model_config.max_model_len
    if whole:
        max_frames = info.get_max_video_tokens(length, {"video": 1}) * temporal
    else:
        max_frames = info.get_num_frames_with_most_features(length, {"video": 1})
    settings = _size_settings(info)
    # vLLM tells Qwen3-VL's processor for each video whether to sample; Qwen2.5-VL's decides by its own setting
    samples_again = not whole and processor.do_sample_frames
    if settings is None or not processor.do_resize or getattr(processor, "cap_pixels_per_frame", None) or samples_again:
        return max_frames, None, None
    size = info._get_vision_size(settings, default_size=processor.size)
    size_rule = {
        "rule": "smart_resize",
        "factor": factor,
        "min_pixels": size["shortest_edge"],
        "max_pixels": size["longest_edge"],
        "over": "video" if whole else "frame",
        "temporal_factor": temporal,
    }
    token_rule = {"rule": "grid", "frames_per_unit": temporal, "cell": factor, "extra": 0}
    return max_frames, size_rule, token_rule | _text_around(info, whole=whole)
