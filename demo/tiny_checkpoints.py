"""Tiny checkpoints with random weights, for tests and benchmarks. Each is made once, and again if its maker changes."""

from __future__ import annotations

import fcntl
import hashlib
import os
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from demo import checkpoint as maker

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "checkpoints"
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def _tiny(directory):
    maker.make_llava_onevision(directory, maker.PRESETS["tiny"])


def _tiny_384(directory):
    tiny = maker.PRESETS["tiny"]
    maker.make_llava_onevision(directory, maker.Shape(384, tiny.tower, tiny.text))


def _coarse_384(directory):
    """The frames of published checkpoints, in patches so large that the tower has little to do."""
    tiny = maker.PRESETS["tiny"]
    maker.make_llava_onevision(directory, maker.Shape(384, tiny.tower, tiny.text, patch_size=48))


QWEN_SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen_parts(*, mrope_section, **text):
    """Return a tokenizer with the special tokens of Qwen's vision models, and the configuration that names them."""
    tokenizer = maker.train_tokenizer((*maker.SPECIAL_TOKENS, *QWEN_SPECIALS))
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": mrope_section, **text.pop("rope", {})}
    settings = {
        "text_config": maker.text_config(tokenizer, rope_parameters=rope, **{**TEXT, **text}),
        "tie_word_embeddings": False,
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }
    return tokenizer, settings


TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}


def _qwen2_5_vl(directory):
    """Windows of 4x4 tokens in two layers, attention to whole frames in the two others."""
    tokenizer, settings = _qwen_parts(mrope_section=[4, 6, 6])
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "patch_size": 14,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            **TOWER,
        },
        **settings,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    maker.randomise(model)
    pixels = {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}, "patch_size": 14, "merge_size": 2}
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(temporal_patch_size=2, **pixels),
        video_processor=transformers.Qwen2VLVideoProcessor(temporal_patch_size=2, **pixels),
        tokenizer=tokenizer,
        chat_template=QWEN_TEMPLATE,
    )
    maker.hide_unprintable(model, tokenizer)
    maker.save(model, processor, tokenizer, directory, dtype=torch.float32)


def _qwen3_vl(directory, **text):
    """Three layers in the tower, the first two of which feed deepstack."""
    _framed(
        directory,
        transformers.Qwen3VLConfig,
        transformers.Qwen3VLForConditionalGeneration,
        tower={"deepstack_visual_indexes": [0, 1]},
        text=text,
    )


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}


def _qwen3_vl_moe(directory, **text):
    """The same with experts instead of an MLP in each layer, laid out as in the published checkpoints."""
    _framed(
        directory,
        transformers.Qwen3VLMoeConfig,
        transformers.Qwen3VLMoeForConditionalGeneration,
        tower={"deepstack_visual_indexes": [0, 1]},
        text={**EXPERTS, "norm_topk_prob": True, **text},
    )
    file = directory / "model.safetensors"
    weights = {
        name: tensor.mT.contiguous() if ".mlp.experts." in name else tensor for name, tensor in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


HYBRID = {
    "rope": {"partial_rotary_factor": 0.25},
    "mrope_section": [3, 3, 2],
    "head_dim": 64,
    "num_key_value_heads": 2,  # so that 64 tokens' keys and values take no less room than the linear layer's state
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 1,
    "mamba_ssm_dtype": "float32",
}
"""One layer of linear and one of full attention. For the linear one vLLM's kernels for a CPU take heads of 64 or
128, and nothing but bfloat16."""


def _qwen3_5(directory, **text):
    """No deepstack, said as the published checkpoints say it: by an empty list."""
    _framed(
        directory,
        transformers.Qwen3_5Config,
        transformers.Qwen3_5ForConditionalGeneration,
        tower={"deepstack_visual_indexes": []},
        text={**HYBRID, **text},
        dtype=torch.bfloat16,
    )


def _qwen3_5_moe(directory, **text):
    """The same with experts, one of them shared, and deepstack not mentioned."""
    _framed(
        directory,
        transformers.Qwen3_5MoeConfig,
        transformers.Qwen3_5MoeForConditionalGeneration,
        text={**HYBRID, **EXPERTS, "shared_expert_intermediate_size": 64, **text},
        dtype=torch.bfloat16,
    )


def _framed(directory, config_class, model_class, *, tower=None, text=None, dtype=torch.float32):
    """Make a model of Qwen3-VL's kind, whose frames are set apart in the prompt."""
    text = {"mrope_section": [6, 5, 5], "head_dim": 32, **(text or {})}
    rope = {"mrope_interleaved": True, **text.pop("rope", {})}
    tokenizer, settings = _qwen_parts(rope=rope, **text)
    config = config_class(
        vision_config={"depth": 3, "patch_size": 16, "num_position_embeddings": 2304, **TOWER, **(tower or {})},
        **settings,
    )
    model = model_class(config)
    maker.randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:  # (experts, out, in), so what comes in is its last dimension alone
                parameter *= parameter.shape[1] ** 0.5
    pixels = {
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    largest = 32 * 32 * 64
    processor = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            size={"shortest_edge": 64 * 64, "longest_edge": largest}, **pixels
        ),
        # a video's edges are those of the whole of it, not of a frame
        video_processor=transformers.Qwen3VLVideoProcessor(
            size={"shortest_edge": 64 * 64, "longest_edge": largest * 32}, **pixels
        ),
        tokenizer=tokenizer,
        chat_template=QWEN_TEMPLATE,
    )
    maker.hide_unprintable(model, tokenizer)
    maker.save(model, processor, tokenizer, directory, dtype=dtype)


def _qwen2(directory):
    """A model without any video."""
    tokenizer = maker.train_tokenizer(maker.SPECIAL_TOKENS)
    config = transformers.Qwen2Config(**maker.text_config(tokenizer, **TEXT), tie_word_embeddings=False)
    model = transformers.Qwen2ForCausalLM(config)
    maker.randomise(model)
    maker.hide_unprintable(model, tokenizer)
    maker.save(model, tokenizer, tokenizer, directory, dtype=torch.float32)


FOUR_LAYERS = {"num_hidden_layers": 4}
FOUR_HYBRID_LAYERS = {**FOUR_LAYERS, "layer_types": 2 * HYBRID["layer_types"]}
"""For two stages of a pipeline: deepstack must end in the first one, and each needs attention of both kinds."""

MAKERS = {
    "tiny": _tiny,
    "tiny-384": _tiny_384,
    "coarse-384": _coarse_384,
    "qwen2.5-vl": _qwen2_5_vl,
    "qwen3-vl": _qwen3_vl,
    "qwen3-vl-moe": _qwen3_vl_moe,
    "qwen3.5": _qwen3_5,
    "qwen3.5-moe": _qwen3_5_moe,
    "qwen3-vl-4": partial(_qwen3_vl, **FOUR_LAYERS),
    "qwen3-vl-moe-4": partial(_qwen3_vl_moe, **FOUR_LAYERS),
    "qwen3.5-4": partial(_qwen3_5, **FOUR_HYBRID_LAYERS),
    "qwen3.5-moe-4": partial(_qwen3_5_moe, **FOUR_HYBRID_LAYERS),
    "qwen2": _qwen2,
}


def checkpoint(name: str) -> Path:
    """Return the directory of a tiny checkpoint, made now if it isn't there; safe across processes."""
    sources = Path(maker.__file__).read_bytes() + Path(__file__).read_bytes()
    digest = hashlib.sha256(sources + transformers.__version__.encode()).hexdigest()[:12]
    directory = CACHE / digest / name
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            unfinished = directory.with_name(f".{name}.{os.getpid()}")
            MAKERS[name](unfinished)
            unfinished.rename(directory)
    return directory
