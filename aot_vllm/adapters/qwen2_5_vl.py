"""Qwen2.5-VL: a tower with windowed attention in most layers, and one run of tokens per video."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem
from vllm.utils.torch_utils import async_tensor_h2d

from aot_vllm.adapters.positions import VisionRun
from aot_vllm.adapters.processing import WithoutRetention
from aot_vllm.adapters.qwen_processor import ReducedQwenProcessor
from aot_vllm.adapters.qwen_vl import ReducedQwenVL
from aot_vllm.core.budget import Budget
from aot_vllm.core.grid import VideoGrid


class AOTQwen2_5_VLProcessingInfo(WithoutRetention, Qwen2_5_VLProcessingInfo):  # noqa: N801
    """Sizes of Qwen2.5-VL's inputs. They are those of unreduced videos, because a request may keep every token."""


class AOTQwen2_5_VLProcessor(ReducedQwenProcessor, Qwen2_5_VLMultiModalProcessor):  # noqa: N801
    """Qwen2.5-VL's processor with shortened videos."""

    def video_placeholder(self, counts: Budget, processed: MultiModalKwargsItem) -> list[int]:
        """Return one token for each that the video keeps."""
        return [self.info.get_hf_config().video_token_id] * counts.total


@MULTIMODAL_REGISTRY.register_processor(
    AOTQwen2_5_VLProcessor,
    info=AOTQwen2_5_VLProcessingInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class AOTQwen2_5_VL(ReducedQwenVL, Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """Qwen2.5-VL that reduces each video between its vision tower and its language model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build the model and set up the reduction. Only layers that attend to a whole frame can score.

        Raises:
            SettingError: the tower does not have a scoring layer that the settings name.
        """
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.set_up_reduction(whole_frame=self.visual.fullatt_block_indexes)

    def row_major(self, scores: Tensor, grid: VideoGrid) -> Tensor:
        """Return the scores by row and column. The tower works window by window, in the same order in every frame."""
        merge = self.visual.spatial_merge_size
        by_window, _ = self.visual.get_window_index_thw(1, grid.rows * merge, grid.cols * merge)
        return scores[:, async_tensor_h2d(by_window.argsort(), scores.device)]

    def frame_times(self, frames: int, seconds_per_frame: float) -> Sequence[int]:
        """Return the time of each frame in units of 1 / `tokens_per_second`, rounded down."""
        units_per_frame = seconds_per_frame * getattr(self.config.vision_config, "tokens_per_second", 1.0)
        return [int(time) for time in np.arange(frames) * units_per_frame]

    def video_runs(
        self, feature: MultiModalFeatureSpec, grid: VideoGrid, kept_per_frame: Sequence[int]
    ) -> Iterable[VisionRun]:
        """Return one run for the whole video."""
        seconds = (feature.data or {}).get("second_per_grid_ts")
        times = self.frame_times(grid.frames, 1.0 if seconds is None else seconds.data.item())
        return [VisionRun(feature.mm_position.offset, times, grid.rows, grid.cols, kept_per_frame)]
