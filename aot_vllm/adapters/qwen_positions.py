"""Where the tokens of a reduced prompt stand, for the Qwen vision-language models (M-RoPE)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.utils.torch_utils import async_tensor_h2d

from aot_vllm.adapters.compat import let_rope_state_keep_known_deltas
from aot_vllm.adapters.pipeline import PositionsThroughPipeline
from aot_vllm.adapters.positions import (
    VisionRun,
    coordinates_of,
    position_delta,
    prompt_positions,
    settle,
    with_coordinates,
)
from aot_vllm.adapters.processing import carried_preset, carried_retention
from aot_vllm.adapters.qwen_processor import token_grid
from aot_vllm.adapters.settings import Reduction
from aot_vllm.config import AOTConfig
from aot_vllm.core.budget import budget
from aot_vllm.core.grid import VideoGrid
from aot_vllm.core.reduce import ReducedVideo


class PositionedQwenVL(PositionsThroughPipeline):
    """A mix-in before a Qwen model: it gives every token of a reduced prompt the position of the unreduced prompt.

    vLLM calls its hook for pruning models, `recompute_mrope_positions`, before every prefill step. Model Runner V1
    calls it before every decode step too, where it returns at once.
    """

    config: Any
    multimodal_config: Any
    visual: Any

    @cached_property
    def methods(self) -> tuple[AOTConfig, ...]:
        """The settings of the reduction that requests may get, by the number of their preset."""
        return Reduction.of(self.multimodal_config).methods

    @cached_property
    def _width(self) -> int:
        """Columns of an embedding, including those of deepstack."""
        return int(self.visual.out_hidden_size)

    def frame_times(self, frames: int, seconds_per_frame: float) -> Sequence[int]:
        """Return the time of each frame, counted from the first frame."""
        return range(frames)

    @abstractmethod
    def video_runs(
        self, feature: MultiModalFeatureSpec, grid: VideoGrid, kept_per_frame: Sequence[int]
    ) -> Iterable[VisionRun]:
        """Return the runs of tokens of a video in the prompt, in order."""

    def positioned_rows(self, reduced: ReducedVideo, grid: VideoGrid, times: Sequence[int]) -> Tensor:
        """Return the embeddings of a video, each followed by its coordinates, by frame, row and column."""
        frames = reduced.frames
        order = ((frames * grid.rows + reduced.rows) * grid.cols + reduced.cols).argsort(stable=True)
        times_of_frames = async_tensor_h2d(list(times), dtype=torch.long, device=frames.device)
        coordinates = torch.stack((times_of_frames[frames], reduced.rows, reduced.cols), dim=1)
        return with_coordinates(reduced.tokens, coordinates)[order]

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """Return the positions (3, N) of a prompt and their delta; rows and columns of kept tokens come later.

        See `aot_vllm.adapters.positions`.
        """
        return prompt_positions(len(input_tokens), self._runs(mm_features))

    def _runs(self, mm_features: list[MultiModalFeatureSpec]) -> Iterator[VisionRun]:
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            data = feature.data
            assert data is not None, "vLLM keeps a feature's sizes on the worker"  # noqa: S101
            grid = token_grid(self.config, data, feature.modality)
            if feature.modality == "image":
                yield VisionRun(feature.mm_position.offset, (0,), grid.rows, grid.cols, (grid.positions,))
            else:
                method = self.methods[carried_preset(data)]
                counts = budget(grid, retention=carried_retention(data), config=method)
                yield from self.video_runs(feature, grid, counts.per_frame)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int | None]:
        """Return embeddings without coordinates, positions (3, N) with these coordinates filled in, and their delta.

        `multimodal_embeddings` are those that enter the language model in this step. Those of videos carry coordinates.
        Those of images carry none, for their positions are already exact.

        Model Runner V2 holds prompts and positions on the device. It has the exact delta since the prompt arrived, so
        the delta is None here, and the host does not wait for the device. V1 holds both on the host, and waits.
        """
        if isinstance(input_ids, Tensor):
            let_rope_state_keep_known_deltas()  # not before: V2 loads that module after the model
            return *self._settled(input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens), None
        if not multimodal_embeddings:
            return multimodal_embeddings, mrope_positions, position_delta(mrope_positions)
        with gpu_sync_allowed():
            ids = torch.as_tensor(input_ids, device=mrope_positions.device)
            stripped, positions = self._settled(ids, multimodal_embeddings, mrope_positions, num_computed_tokens)
            return stripped, positions, position_delta(positions)

    def _settled(
        self, input_ids: Tensor, embeddings: Sequence[Tensor], positions: Tensor, num_computed_tokens: int
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Return embeddings without coordinates, and positions (3, N) with these coordinates filled in."""
        width = self._width
        carried = [coordinates_of(rows, width=width) for rows in embeddings if rows.shape[1] > width]
        if carried:
            positions = settle(
                positions,
                input_ids,
                torch.cat(carried).to(positions.device),
                video_token_id=self.config.video_token_id,
                num_computed_tokens=num_computed_tokens,
            )
        return [rows[:, :width] for rows in embeddings], positions
