"""Qwen3-VL: each frame of a video has a run of tokens of its own, between its timestamp and markers, and deepstack."""

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
from aot_vllm.adapters.qwen_vl import ReducedQwenProcessor, ReducedQwenVL, WithoutRetention
from aot_vllm.core.budget import Budget
from aot_vllm.core.grid import VideoGrid


class AOTQwen3VLProcessingInfo(WithoutRetention, Qwen3VLProcessingInfo):
    """Sizes of Qwen3-VL's inputs; budgets stay those of unreduced videos, for a request may ask for all."""


class AOTQwen3VLProcessor(ReducedQwenProcessor, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's processor with shortened videos."""

    def video_placeholder(self, counts: Budget, item: MultiModalKwargsItem) -> Any:
        """Return every frame's timestamp, markers and kept tokens, as the model lays out whole frames."""
        config = self.info.get_hf_config()
        return self.get_video_repl(
            tokens_per_frame=list(counts.per_frame),
            timestamps=item["timestamps"].data,
            tokenizer=self.info.get_tokenizer(),
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
            video_token_id=config.video_token_id,
            select_token_id=True,
        )


class ReducedFramedQwenVL(ReducedQwenVL):
    """Mixed in before a model of Qwen3-VL's kind: every layer attends to a whole frame, and text sets frames apart."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        """Build the model and hook the two layers that score.

        Raises:
            SettingError: a scoring layer that the tower does not have.
        """
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.score_by()

    def frame_times(self, frames: int, seconds_per_frame: float) -> Sequence[int]:
        """Return 0 for every frame: each is a run of its own, and time is told by the timestamps between them."""
        return [0] * frames

    def video_runs(
        self, feature: MultiModalFeatureSpec, grid: VideoGrid, kept_per_frame: Sequence[int]
    ) -> Iterable[VisionRun]:
        """Yield one run for each frame, found where its first token is."""
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
