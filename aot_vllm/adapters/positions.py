"""Multidimensional rotary positions (M-RoPE) of a reduced prompt: those its tokens have in the unreduced one.

A token's position is (time, row, column). Of a reduced video only the rows and columns of the tokens it keeps depend on
pixels. Everything else - where text stands, the time of each kept token, where the answer starts - follows from sizes,
so it is exact from the moment a prompt arrives, whatever of it is computed, cached or taken up again later. Rows and
columns travel with the embeddings, and are filled in when these reach the language model.

Dimensions: N tokens of a prompt, K kept tokens, W columns of an embedding, D digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BASE, DIGITS = 256, 3
"""A coordinate travels as digits in columns of an embedding: up to 256 every type an embedding has is exact."""


@dataclass(frozen=True)
class VisionRun:
    """Placeholder tokens that follow each other in a prompt, of an image, of a video or of one frame of it."""

    offset: int
    """Where the first one is in the prompt."""
    times: Sequence[int]
    """The time of each frame, counted from the first, ascending."""
    rows: int
    cols: int
    kept: Sequence[int]
    """How many tokens each frame has in the prompt; rows * cols each where nothing was dropped."""

    @property
    def tokens(self) -> int:
        """Tokens in the prompt."""
        return sum(self.kept)

    @property
    def extent(self) -> int:
        """How far the text after the run is from its start: beyond the largest coordinate."""
        return max(self.times[-1] + 1, self.rows, self.cols)

    def coordinates(self) -> NDArray[np.int64]:
        """Return (3, tokens), counted from the start; rows and columns are 0 where it takes pixels to know them."""
        coordinates = np.zeros((3, self.tokens), dtype=np.int64)
        coordinates[0] = np.repeat(np.asarray(self.times, dtype=np.int64), self.kept)
        if self.tokens == len(self.times) * self.rows * self.cols:
            grid = np.indices((len(self.times), self.rows, self.cols)).reshape(3, -1)
            coordinates[1:] = grid[1:]
        return coordinates


def prompt_positions(num_tokens: int, runs: Iterable[VisionRun]) -> tuple[Tensor, int]:
    """Return the positions (3, N) of a prompt, and what to add to an index behind it to get the position there.

    `runs` in the order of the prompt. Kept tokens of a reduced video have their time, and the row and column of its
    first cell until `settle`.
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
    """Return positions (3, N) with the rows and columns of the K video tokens next to be computed filled in.

    `coordinates` (K, 3) are those tokens' times, rows and columns, counted from the start of their run. Tokens that are
    settled already may be settled again: a token's time never changes, and it tells where its run starts. Nothing waits
    for the device.
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
    """Return what to add to an index behind a prompt, from its positions (3, N); its last token is text.

    Every chat template ends in text. After a prompt that ends in a reduced video, an answer would start behind the last
    kept token.
    """
    return max(positions[:, -1].tolist()) + 1 - positions.shape[1]


def with_coordinates(embeddings: Tensor, coordinates: Tensor) -> Tensor:
    """Return embeddings (K, W) with their coordinates (K, 3) behind them, as digits in further columns."""
    digits_K3D = torch.stack([coordinates // BASE**digit % BASE for digit in range(DIGITS)], dim=2)
    return torch.cat((embeddings, digits_K3D.flatten(1).to(embeddings.dtype)), dim=1)


def coordinates_of(embeddings: Tensor, *, width: int) -> Tensor:
    """Return the coordinates (K, 3) behind the first `width` columns, which `with_coordinates` put there."""
    digits_K3D = embeddings[:, width:].long().unflatten(1, (3, DIGITS))
    return sum(digits_K3D[:, :, digit] * BASE**digit for digit in range(DIGITS))
