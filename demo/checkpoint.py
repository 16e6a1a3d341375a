"""Make a LLaVA-OneVision checkpoint with random weights: real architecture, no download.

`python -m demo.checkpoint DIRECTORY [--preset demo|tiny|small]`. The answers of such a model mean nothing; what it does
to prompt lengths, caches and time is what a trained one of its size does.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_MERGES = 300

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% if message['content'] is string %}{{ '\n' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: `tower` and `text` go to the SigLIP and the Qwen2 configuration."""

    image_size: int
    tower: dict[str, int]
    text: dict[str, int] = field(default_factory=dict)
    patch_size: int = 14


def _tower(layers: int, width: int, heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": heads,
    }


def _text(layers: int, width: int, heads: int, kv_heads: int, mlp: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


PRESETS = {
    # 9 tokens a frame, the quickest to start: tests
    "tiny": Shape(84, _tower(2, 64, 2), _text(2, 64, 2, 1, 128)),
    # 27x27 patches pooled to 196 tokens a frame like the published models, and a text model in which prefill is felt
    "demo": Shape(384, _tower(8, 96, 3), _text(6, 512, 8, 2, 1408)),
    # the text shape of Qwen2-0.5B: prefill dominates
    "small": Shape(384, _tower(8, 192, 6), _text(24, 896, 14, 2, 4864)),
}


def prose() -> list[str]:
    """Return some of the standard library's own prose."""
    return [topics[name] for name in sorted(topics)[:40]]


def train_tokenizer(special_tokens: tuple[str, ...], texts: list[str] | None = None) -> Any:
    """Return a byte-level BPE tokenizer with at most a few hundred merges, trained on these texts or on some prose."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + NUM_MERGES, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(prose() if texts is None else texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    trained = transformers.Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        model_max_length=32768,
    )
    added = [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    trained.add_tokens(added, special_tokens=True)
    return trained


def text_config(tokenizer: Any, **sizes: int) -> dict[str, Any]:
    """Return the arguments of a Qwen2-like text configuration for this tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **sizes,
    }


def randomise(model: torch.nn.Module, *, seed: int = 0) -> None:
    """Draw weights N(0, 1 / fan_in), large enough that the answer depends on the input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("image_newline"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def hide_unprintable(model: Any, tokenizer: Any) -> None:
    """Keep what is no visible text from ever being the likeliest token."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    with torch.no_grad():
        for token in range(len(tokenizer)):
            if token in special or not tokenizer.decode([token]).isprintable() or "\ufffd" in tokenizer.decode([token]):
                model.lm_head.weight[token] = 0


def save(model: Any, processor: Any, tokenizer: Any, directory: Path, *, dtype: torch.dtype) -> None:
    """Write a checkpoint as vLLM reads it."""
    directory.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(dtype).save_pretrained(directory)
    processor.save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    # transformers 5 writes vision_tower.*, vLLM reads vision_tower.vision_model.* as the published checkpoints have it
    prefix = "vision_tower."
    renamed = {
        f"{prefix}vision_model.{name.removeprefix(prefix)}"
        if name.startswith(prefix) and not name.startswith(f"{prefix}vision_model.")
        else name: tensor
        for name, tensor in weights.items()
    }
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})


def llava_onevision(shape: Shape, tokenizer: Any) -> tuple[Any, Any]:
    """Return a LLaVA-OneVision of this shape and its processor: SigLIP, pooled to half the side, and Qwen2."""
    size, patch = shape.image_size, shape.patch_size
    pinpoints = [[size * rows, size * cols] for rows in (1, 2) for cols in (1, 2)]
    config = transformers.LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": size,
            "patch_size": patch,
            "vision_use_head": False,
            **shape.tower,
        },
        text_config={"model_type": "qwen2", **text_config(tokenizer, **shape.text)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config)
    randomise(model)
    square = {"height": size, "width": size}
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=pinpoints),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=square),
        tokenizer=tokenizer,
        num_image_tokens=(size // patch) ** 2,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
    )
    return model, processor


def make_llava_onevision(directory: Path, shape: Shape, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a LLaVA-OneVision checkpoint of this shape with random weights."""
    tokenizer = train_tokenizer((*SPECIAL_TOKENS, "<image>", "<video>"))
    model, processor = llava_onevision(shape, tokenizer)
    hide_unprintable(model, tokenizer)
    save(model, processor, tokenizer, directory, dtype=dtype)


def main() -> None:
    """Write the checkpoint that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    make_llava_onevision(arguments.directory, PRESETS[arguments.preset], dtype=getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
