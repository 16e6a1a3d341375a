"""Qwen3-VL: one run of tokens per frame, between a timestamp and markers, and embeddings with deepstack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem

from aot_vllm.adapters.positions import VisionRun
from aot_vllm.adapters.processing import WithoutRetention
from aot_vllm.adapters.qwen_processor import ReducedQwenProcessor
from aot_vllm.adapters.qwen_vl import ReducedQwenVL
from aot_vllm.core.budget import Budget
from aot_vllm.core.grid import VideoGrid


class AOTQwen3VLProcessingInfo(WithoutRetention, Qwen3VLProcessingInfo):
    """Sizes of Qwen3-VL's inputs. They are those of unreduced videos, because a request may keep every token."""


class AOTQwen3VLProcessor(ReducedQwenProcessor, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's processor with shortened videos."""

    def video_placeholder(self, counts: Budget, processed: MultiModalKwargsItem) -> Any:
        """Return the timestamp, markers and kept tokens of every frame, in the model's own layout."""
        config = self.info.get_hf_config()
        return self.get_video_repl(
            tokens_per_frame=list(counts.per_frame),
            timestamps=processed["timestamps"].data,
            tokenizer=self.info.get_tokenizer(),
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
            video_token_id=config.video_token_id,
            select_token_id=True,
        )


class ReducedFramedQwenVL(ReducedQwenVL):
    """A mix-in before a model like Qwen3-VL: every layer attends to a whole frame, and text separates the frames."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        """Build the model and set up the reduction.

        Raises:
            SettingError: the tower does not have a scoring layer that the settings name.
        """
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.set_up_reduction()

    def frame_times(self, frames: int, seconds_per_frame: float) -> Sequence[int]:
        """Return 0 for every frame. Each frame is its own run, and the timestamps between the runs tell the time."""
        return [0] * frames

    def video_runs(
        self, feature: MultiModalFeatureSpec, grid: VideoGrid, kept_per_frame: Sequence[int]
    ) -> Iterable[VisionRun]:
        """Yield one run for each frame, at the offset of its first token."""
        place = feature.mm_position
        is_video = place.is_embed
        offsets = range(place.length) if is_video is None else is_video.nonzero().flatten().tolist()
        token = 0
        for kept in kept_per_frame:
            yield VisionRun(place.offset + offsets[token], (0,), grid.rows, grid.cols, (kept,))
            token += kept


@MULTIMODAL_REGISTRY.register_processor(
    AOTQwen3VLProcessor,
    info=AOTQwen3VLProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class AOTQwen3VL(ReducedFramedQwenVL, Qwen3VLForConditionalGeneration):
    """Qwen3-VL that reduces each video between its vision tower and its language model."""
