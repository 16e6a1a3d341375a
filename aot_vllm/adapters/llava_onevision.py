"""LLaVA-OneVision: SigLIP on a square grid, pooled to half its side, one newline token after each video."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.models.llava_onevision import (
    _MAX_FRAMES_PER_VIDEO,
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
    LlavaOnevisionVideoPixelInputs,
)
from vllm.model_executor.models.siglip import SiglipVisionModel
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataItems, VideoProcessorItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate
from vllm.utils.tensor_schema import TensorShape

from aot_vllm.adapters.blocks import frames_at_once, in_blocks
from aot_vllm.adapters.processing import RETENTION, ReducedVideoProcessor, without_retention
from aot_vllm.adapters.scores import AttentionScores, scoring_modules
from aot_vllm.adapters.settings import Reduction, from_ppm
from aot_vllm.adapters.telemetry import METER
from aot_vllm.core.budget import budget
from aot_vllm.core.grid import VideoGrid
from aot_vllm.core.reduce import reduce_video
from aot_vllm.errors import UnsupportedError

TOWER_FRAMES = _MAX_FRAMES_PER_VIDEO
"""Most frames the vision tower sees at a time: as many as vLLM profiles the model's memory with."""


class ReducedVideoPixels(LlavaOnevisionVideoPixelInputs):
    """Video pixels, and the retention of each video in millionths."""

    retention: Annotated[Tensor, TensorShape("bn")]


class AOTLlavaOnevisionProcessingInfo(LlavaOnevisionProcessingInfo):
    """Sizes of LLaVA-OneVision's inputs; budgets stay those of unreduced videos, for a request may ask for all."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        """Return the Hugging Face processor, which knows nothing of a retention."""
        return super().get_hf_processor(**without_retention(kwargs))

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the most tokens an item can have: a video's at retention 1."""
        image = self.get_image_size_with_most_features()
        return {
            "image": self.get_num_image_tokens(image_width=image.width, image_height=image.height),
            "video": self.get_max_video_tokens(seq_len, mm_counts),
        }

    def pooled_side(self) -> int:
        """Return the side of the square grid of tokens the language model sees of a frame."""
        return math.isqrt(self._get_num_frame_tokens(image_width=0, image_height=0))


class AOTLlavaOnevisionProcessor(ReducedVideoProcessor, LlavaOnevisionMultiModalProcessor):
    """LLaVA-OneVision's processor with shortened videos."""

    extra_video_tokens = 1  # image_newline, one for a video

    def video_grid(
        self, videos: ModalityDataItems[Any, Any], item_idx: int, processed: MultiModalKwargsItem | None
    ) -> VideoGrid | None:
        """Return frames x pooled side x pooled side, None for a video known by its uuid alone."""
        if not isinstance(videos, VideoProcessorItems) or videos.get(item_idx) is None:
            return None
        side = self.info.pooled_side()
        return VideoGrid(frames=videos.get_num_frames(item_idx), rows=side, cols=side)

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        video_token = self.info.get_hf_config().video_token_index

        def replacement(item_idx: int) -> list[int]:
            grid = self.video_grid(mm_items["video"], item_idx, out_mm_kwargs["video"][item_idx])
            if grid is None:
                raise ValueError("LLaVA-OneVision takes videos as frames")
            retention = self.carried_retention(out_mm_kwargs, item_idx)
            return [video_token] * self.kept_video_tokens(grid, retention)

        return [
            *(update for update in updates if update.modality != "video"),
            PromptReplacement(modality="video", target=[video_token], replacement=replacement),
        ]


@MULTIMODAL_REGISTRY.register_processor(
    AOTLlavaOnevisionProcessor,
    info=AOTLlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class AOTLlavaOnevision(LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision that reduces each video between its vision tower and its language model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build the model and hook the two layers that score, where anchors are chosen by attention.

        Raises:
            UnsupportedError: the vision tower isn't SigLIP.
            SettingError: a scoring layer that the tower does not have.
        """
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not isinstance(self.vision_tower, SiglipVisionModel):
            raise UnsupportedError(
                "AOT reads its scores from a SigLIP vision tower, this checkpoint has "
                f"{type(self.vision_tower).__name__}; serve it without --video-pruning-rate"
            )
        self.method = Reduction.of(self.config).method
        layers = self.vision_tower.vision_model.encoder.layers
        self.scores = AttentionScores(
            scoring_modules(self.method, [layer.self_attn.attn for layer in layers]),
            total_heads=self.config.vision_config.num_attention_heads,
            sum_over_ranks=tensor_model_parallel_all_reduce,
        )

    def _parse_and_validate_video_input(self, **kwargs: object) -> ReducedVideoPixels | None:
        inputs = super()._parse_and_validate_video_input(**kwargs)
        if inputs is None:
            return None
        return ReducedVideoPixels(
            type=inputs["type"],
            pixel_values_videos=inputs["pixel_values_videos"],
            retention=kwargs[RETENTION],
            resolve_bindings=inputs._resolve_bindings,
        )

    def _process_video_pixels(self, inputs: ReducedVideoPixels) -> list[Tensor]:
        retentions = [from_ppm(millionths) for millionths in inputs["retention"].tolist()]
        return [
            self._embed_video(pixels, retention=retention)
            for pixels, retention in zip(inputs["pixel_values_videos"], retentions, strict=True)
        ]

    def _embed_video(self, pixels: Tensor, *, retention: float) -> Tensor:
        """Return the rows of one video, (kept + 1, hidden), from (frames, 3, height, width)."""
        grid = self._grid(len(pixels))
        if budget(grid, retention=retention, config=self.method).identity:
            tokens = self._tower(pixels).flatten(0, 1)
        else:
            with self.scores.recording() as recorded:
                features = self._tower(pixels)
            local_scores, global_scores = (None if scores is None else self._pool(scores) for scores in recorded())
            with METER.timing(features.device):
                reduced = reduce_video(
                    features, local_scores, global_scores, grid=grid, retention=retention, config=self.method
                )
            METER.add_unconverged(reduced.unconverged)
            tokens = reduced.tokens
        return torch.cat((tokens, self.image_newline[None]))

    def _tower(self, pixels: Tensor) -> Tensor:
        """Return pooled features (frames, side * side, hidden), a block of frames at a time."""
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        activations = patches * (2 * vision.intermediate_size + vision.hidden_size)
        features = self._grid(1).positions * self.config.text_config.hidden_size
        at_once = frames_at_once(len(pixels), profiled=TOWER_FRAMES, waiting_share=features / activations)

        def tower(block: Tensor) -> Tensor:
            return self._video_pixels_to_features(self.vision_tower, block)

        return in_blocks(tower, pixels.split(at_once), frames=len(pixels))

    def _grid(self, frames: int) -> VideoGrid:
        """Return the grid of tokens of a video, whose frames are pooled."""
        side = math.ceil(self.config.vision_config.image_size // self.config.vision_config.patch_size / 2)
        return VideoGrid(frames=frames, rows=side, cols=side)

    def _pool(self, scores: Tensor) -> Tensor:
        """Return scores (frames, tokens of the encoder) on the pooled grid, as the model pools its features."""
        return self.apply_pooling(scores[..., None]).squeeze(-1)
