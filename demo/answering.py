"""Ask a LLaVA-OneVision many questions about one video in one pass, each independently of the others.

The video's tokens stand once at the front; every question with its answer is a block behind them that sees the video
and itself alone, at the positions it would have right behind the video. Training shares the cost of a video this way,
and evaluation too: an answer whose every token is the likeliest after those before it is what greedy decoding gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from demo.task import Question

HEAD = "<|im_start|>user "
BETWEEN = "<|im_end|><|im_start|>assistant\n"
END = "<|im_end|>"
IGNORED = -100
BLOCKS = "video_then_blocks"
ROWS_AT_ONCE = 144  # of the video's own attention, which is causal: later keys are left out by slices of this size


@dataclass(frozen=True)
class Blocks:
    """Blocks of questions and answers for a batch of videos, B rows of L tokens."""

    ids: Tensor  # (B, L)
    offsets: Tensor  # (B, L) position in the own block
    owner: Tensor  # (B, L) which question a token belongs to, -1 for padding
    labels: Tensor  # (B, L) the answer's token that comes next, else IGNORED
    never_shown: Tensor  # (K, 3) row, column and a token that training never has there


def pack(tokenizer: Any, asked: Sequence[Sequence[Question]]) -> Blocks:
    """Return the blocks of each video's questions."""
    rows = []
    never_shown = []
    for row, questions in enumerate(asked):
        ids: list[int] = []
        offsets: list[int] = []
        owner: list[int] = []
        labels: list[int] = []
        for index, question in enumerate(questions):
            prompt = tokenizer(f"\n{question.text}{BETWEEN}", add_special_tokens=False)["input_ids"]
            answer = tokenizer(question.answer + END, add_special_tokens=False)["input_ids"]
            block = [*prompt, *answer[:-1]]
            first = len(ids) + len(prompt) - 1
            never_shown += [(row, first, tokenizer(other)["input_ids"][0]) for other in question.never_shown]
            ids += block
            offsets += range(len(block))
            owner += [index] * len(block)
            labels += [IGNORED] * (len(prompt) - 1) + answer
        rows.append((ids, offsets, owner, labels))
    length = max(len(row[0]) for row in rows)
    fills = (0, 0, -1, IGNORED)
    columns = (
        torch.stack([pad(torch.tensor(row[field]), (0, length - len(row[field])), value=fill) for row in rows])
        for field, fill in enumerate(fills)
    )
    return Blocks(*columns, torch.tensor(never_shown, dtype=torch.long).reshape(-1, 3))


def normalise(pictures: np.ndarray) -> Tensor:
    """Return frames, (..., H, W, 3) uint8, as the processor gives them to the model: (..., 3, H, W) float32."""
    pixels = torch.from_numpy(pictures).float() / 255
    pixels = (pixels - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)
    return pixels.movedim(-1, -3)


def frame_features(model: Any, pixels: Tensor) -> Tensor:
    """Return the video tokens of frames (F, 3, H, W), after projection and pooling: (F, tokens, width)."""
    features = model.model.get_video_features(
        pixels[None].to(model.dtype), vision_feature_layer=-1, vision_feature_select_strategy="full"
    ).pooler_output[0, :-1]
    return features.reshape(len(pixels), -1, features.shape[-1])


def without_never_shown(logits: Tensor, blocks: Blocks) -> Tensor:
    """Return the logits, minus infinity for tokens that training never shows, so that no loss depends on them."""
    wanted = blocks.labels != IGNORED
    number = (wanted.flatten().cumsum(0) - 1).reshape(wanted.shape)
    rows, columns, tokens = blocks.never_shown.unbind(-1)
    ruled_out = torch.zeros(logits.shape, dtype=torch.bool)
    ruled_out[number[rows, columns], tokens] = True
    return logits.masked_fill(ruled_out.to(logits.device), -torch.inf)


def answer_logits(model: Any, tokenizer: Any, features: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Return logits (N, vocabulary) where an answer's token comes next and those tokens (N,).

    `features` are those of the videos' frames, (B, T, tokens, width).
    """
    batch, device = len(features), features.device
    embed = model.model.language_model.embed_tokens
    head = embed(torch.tensor(tokenizer(HEAD, add_special_tokens=False)["input_ids"], device=device)).expand(
        batch, -1, -1
    )
    newline = model.model.image_newline.expand(batch, 1, -1)
    video = torch.cat([head, features.flatten(1, 2).to(head.dtype), newline], dim=1)
    prefix, length = video.shape[1], blocks.ids.shape[1]

    same = (blocks.owner[:, :, None] == blocks.owner[:, None]) & torch.ones(length, length, dtype=torch.bool).tril()
    seen = torch.cat([torch.ones(batch, length, prefix, dtype=torch.bool), same], dim=-1).to(device)
    mask = torch.zeros(seen.shape, dtype=head.dtype, device=device).masked_fill(~seen, -1e9)[:, None]
    positions = torch.cat([torch.arange(prefix).expand(batch, -1), prefix + blocks.offsets], dim=1).to(device)
    states = model.model.language_model(
        inputs_embeds=torch.cat([video, embed(blocks.ids.to(device))], dim=1),
        attention_mask={"full_attention": mask},
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state[:, prefix:]
    labels = blocks.labels.to(device)
    wanted = labels != IGNORED
    return model.lm_head(states[wanted]).float(), labels[wanted]


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    if mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(-1), value)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Return attention over everything without a mask, else over a causal video and the blocks that the mask is for.

    On CPUs plain products are faster than PyTorch's fused kernel at these sizes, 2 to 4 times with the gradient.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attention_mask is None:
        return _softmax_attention(query, key, value, scaling, None).transpose(1, 2).contiguous(), None
    prefix = query.shape[2] - attention_mask.shape[2]
    pieces = []
    for low in range(0, prefix, ROWS_AT_ONCE):
        high = min(low + ROWS_AT_ONCE, prefix)
        later = torch.full((high - low, high), -1e9, dtype=query.dtype, device=query.device).triu(low + 1)
        rows = slice(low, high), slice(0, high)
        rows, keys, values = query[:, :, low:high], key[:, :, :high], value[:, :, :high]
        pieces.append(_softmax_attention(rows, keys, values, scaling, later))
    pieces.append(_softmax_attention(query[:, :, prefix:], key, value, scaling, attention_mask))
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(BLOCKS, _attend)
