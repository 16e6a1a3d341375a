"""Multidimensional rotary positions (M-RoPE) of a reduced prompt. Every token has its position in the unreduced prompt.

The position of a token is (time, row, column). In a reduced video, only the rows and columns of kept tokens depend on
pixels. All other positions follow from sizes: those of text, the time of each kept token, the start of the answer. So
they are exact when a prompt arrives, and stay exact under chunked prefill, prefix caching and preemption. Rows and
columns travel with the embeddings and are filled in when the embeddings reach the language model.

Dimensions: N tokens of a prompt, K kept tokens, W columns of an embedding, D digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BITS, DIGITS = 8, 3  # bfloat16 holds every integer up to 256
"""A coordinate travels as digits to the base 256 in columns of an embedding. Every type of embedding holds them
exactly."""


@dataclass(frozen=True)
class VisionRun:
    """Consecutive placeholder tokens in a prompt: those of an image, of a video, or of one frame of a video."""

    offset: int
    """Index of the first token in the prompt."""
    times: Sequence[int]
    """The time of each frame, counted from the first frame, ascending."""
    rows: int
    cols: int
    kept: Sequence[int]
    """Number of tokens of each frame in the prompt: rows * cols each if nothing was dropped."""

    @property
    def tokens(self) -> int:
        """Number of tokens in the prompt."""
        return sum(self.kept)

    @property
    def extent(self) -> int:
        """Distance from the start of the run to the text after it: one more than the largest coordinate."""
        return max(self.times[-1] + 1, self.rows, self.cols)

    def coordinates(self) -> NDArray[np.int64]:
        """Return (3, tokens), counted from the start. Rows and columns are 0 if they depend on pixels."""
        coordinates = np.zeros((3, self.tokens), dtype=np.int64)
        coordinates[0] = np.repeat(np.asarray(self.times, dtype=np.int64), self.kept)
        if self.tokens == len(self.times) * self.rows * self.cols:
            grid = np.indices((len(self.times), self.rows, self.cols)).reshape(3, -1)
            coordinates[1:] = grid[1:]
        return coordinates


def prompt_positions(num_tokens: int, runs: Iterable[VisionRun]) -> tuple[Tensor, int]:
    """Return the positions (3, N) of a prompt and their delta. An index after the prompt plus delta is its position.

    `runs` are in the order of the prompt. Kept tokens of a reduced video have their own time. Until `settle`, they have
    the row and the column of the first cell.
    """
    positions = np.empty((3, num_tokens), dtype=np.int64)
    token = position = 0
    for run in runs:
        text = run.offset - token
        positions[:, token : run.offset] = np.arange(position, position + text)
        position += text
        token = run.offset + run.tokens
        positions[:, run.offset : token] = run.coordinates() + position
        position += run.extent
    text = num_tokens - token
    positions[:, token:] = np.arange(position, position + text)
    return torch.from_numpy(positions), position + text - num_tokens


def settle(
    positions: Tensor, token_ids: Tensor, coordinates: Tensor, *, video_token_id: int, num_computed_tokens: int
) -> Tensor:
    """Return positions (3, N) with the rows and columns of the next K video tokens filled in.

    `coordinates` (K, 3) are the times, rows and columns of these tokens, counted from the start of their run. The start
    of a run follows from the position and the time of a token. Both never change, so tokens may be settled again. The
    host does not wait for the device.
    """
    tail = positions[:, num_computed_tokens:]
    is_video = token_ids[num_computed_tokens:] == video_token_id
    rank = is_video.cumsum(0) - 1
    mine = is_video & (rank < len(coordinates))
    times, rows, cols = coordinates[rank.clamp_(0, len(coordinates) - 1)].unbind(1)
    starts = tail[0] - times
    settled = positions.clone()
    settled[1, num_computed_tokens:] = torch.where(mine, starts + rows, tail[1])
    settled[2, num_computed_tokens:] = torch.where(mine, starts + cols, tail[2])
    return settled


def position_delta(positions: Tensor) -> int:
    """Return the delta of a prompt from its positions (3, N). The last token must be text.

    Every chat template ends in text. If a prompt ended in a reduced video, its answer would start after the last kept
    token instead of after the whole video.
    """
    return max(positions[:, -1].tolist()) + 1 - positions.shape[1]


def with_coordinates(embeddings: Tensor, coordinates: Tensor) -> Tensor:
    """Return embeddings (K, W) followed by their coordinates (K, 3), as digits in further columns."""
    digits_K3D = (coordinates.unsqueeze(2) >> _shifts(coordinates.device)) & (2**BITS - 1)
    return torch.cat((embeddings, digits_K3D.flatten(1).to(embeddings.dtype)), dim=1)


def coordinates_of(embeddings: Tensor, *, width: int) -> Tensor:
    """Return the coordinates (K, 3) that `with_coordinates` put after the first `width` columns."""
    digits_K3D = embeddings[:, width:].long().unflatten(1, (3, DIGITS))
    return (digits_K3D << _shifts(embeddings.device)).sum(dim=2)


def _shifts(device: torch.device) -> Tensor:
    """Return how many bits each digit stands above the lowest, (D,)."""
    return torch.arange(0, BITS * DIGITS, BITS, device=device)
