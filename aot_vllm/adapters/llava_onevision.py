"""LLaVA-OneVision: SigLIP on a square grid, pooled to half its side, with one newline token after each video."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.parse import ModalityDataItems, VideoProcessorItems
from vllm.utils.tensor_schema import TensorShape

from aot_vllm.adapters.blocks import frames_at_once, in_blocks
from aot_vllm.adapters.processing import PRESET, ReducedVideoProcessor, WithoutRetention, carried_retentions
from aot_vllm.adapters.scores import scores_of_methods
from aot_vllm.adapters.settings import Reduction, from_ppm
from aot_vllm.adapters.telemetry import METER
from aot_vllm.core.budget import Budget
from aot_vllm.core.grid import VideoGrid
from aot_vllm.core.reduce import needs_scores, reduce_video
from aot_vllm.errors import UnsupportedError
from aot_vllm.kernels.dispatch import algorithms_for

TOWER_FRAMES = _MAX_FRAMES_PER_VIDEO
"""Most frames that the vision tower processes at a time. vLLM profiles the model's memory with as many."""


def token_grid(config: Any, *, frames: int) -> VideoGrid:
    """Return the grid of tokens of a video before the reduction: the encoder's patches pooled to half their side."""
    vision = config.vision_config
    side = math.ceil(vision.image_size // vision.patch_size / 2)
    return VideoGrid(frames=frames, rows=side, cols=side)


class ReducedVideoPixels(LlavaOnevisionVideoPixelInputs):
    """Pixels of videos, with the retention of each video in millionths, and the number of its preset."""

    retention: Annotated[Tensor, TensorShape("bn")]
    preset: Annotated[Tensor, TensorShape("bn")]


class AOTLlavaOnevisionProcessingInfo(WithoutRetention, LlavaOnevisionProcessingInfo):
    """Sizes of LLaVA-OneVision's inputs. They are those of unreduced videos, because a request may keep every token."""

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the most tokens that an item can have. For a video, these are its tokens at retention 1."""
        image = self.get_image_size_with_most_features()
        return {
            "image": self.get_num_image_tokens(image_width=image.width, image_height=image.height),
            "video": self.get_max_video_tokens(seq_len, mm_counts),
        }


class AOTLlavaOnevisionProcessor(ReducedVideoProcessor, LlavaOnevisionMultiModalProcessor):
    """LLaVA-OneVision's processor with shortened videos."""

    extra_video_tokens = 1  # image_newline, one for each video

    def video_grid(
        self, videos: ModalityDataItems[Any, Any], item_idx: int, processed: MultiModalKwargsItem | None
    ) -> VideoGrid | None:
        """Return frames x pooled side x pooled side, None for a video that is given by its uuid alone.

        Raises:
            ValueError: the video is given as embeddings, which have no known grid.
        """
        if not isinstance(videos, VideoProcessorItems):
            raise ValueError("LLaVA-OneVision takes videos as frames")
        if videos.get(item_idx) is None:
            return None
        return token_grid(self.info.get_hf_config(), frames=videos.get_num_frames(item_idx))

    def video_placeholder(self, counts: Budget, processed: MultiModalKwargsItem) -> list[int]:
        """Return one token for each that the video keeps, and one for the newline."""
        return [self.info.get_hf_config().video_token_index] * (counts.total + self.extra_video_tokens)


@MULTIMODAL_REGISTRY.register_processor(
    AOTLlavaOnevisionProcessor,
    info=AOTLlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class AOTLlavaOnevision(LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision that reduces each video between its vision tower and its language model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build the model. If a request may get anchors by attention, hook the two scoring layers.

        Raises:
            UnsupportedError: the vision tower is not SigLIP.
            SettingError: the tower does not have a scoring layer that the settings name.
        """
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        tower = self.vision_tower
        if isinstance(tower, StageMissingLayer):  # an engine or a stage that runs no tower has it without weights
            tower = tower.module
        if not isinstance(tower, SiglipVisionModel):
            raise UnsupportedError(
                f"the vision tower must be a SiglipVisionModel, got {type(tower).__name__}; "
                "serve this checkpoint without --video-pruning-rate"
            )
        reduction = Reduction.of(self.multimodal_config)
        self.methods, self.kernels = reduction.methods, reduction.kernels
        self.scores = scores_of_methods(
            self.methods,
            [layer.self_attn.attn for layer in tower.vision_model.encoder.layers],
            total_heads=self.config.vision_config.num_attention_heads,
            sum_over_ranks=tensor_model_parallel_all_reduce,
            kernels=self.kernels,
        )

    def _parse_and_validate_video_input(self, **kwargs: object) -> ReducedVideoPixels | None:
        inputs = super()._parse_and_validate_video_input(**kwargs)
        if inputs is None:
            return None
        return ReducedVideoPixels(
            type=inputs["type"],
            pixel_values_videos=inputs["pixel_values_videos"],
            retention=carried_retentions(kwargs),
            preset=kwargs[PRESET],
            resolve_bindings=inputs._resolve_bindings,
        )

    def _process_video_pixels(self, inputs: ReducedVideoPixels) -> list[Tensor]:
        retentions = [from_ppm(millionths) for millionths in inputs["retention"].tolist()]
        videos = zip(inputs["pixel_values_videos"], retentions, inputs["preset"].tolist(), strict=True)
        return [self._embed_video(pixels, retention=retention, preset=preset) for pixels, retention, preset in videos]

    def _embed_video(self, pixels: Tensor, *, retention: float, preset: int) -> Tensor:
        """Return the rows of one video, (kept + 1, hidden), from (frames, 3, height, width)."""
        method = self.methods[preset]
        grid = token_grid(self.config, frames=len(pixels))
        local_scores = global_scores = None
        if needs_scores(grid, retention=retention, config=method):
            with self.scores[preset].recording() as recorded:
                features = self._tower(pixels)
            local_scores, global_scores = map(self._pool, recorded())
        else:
            features = self._tower(pixels)
        with METER.timing("reduction", features.device):
            reduced = reduce_video(
                features,
                local_scores,
                global_scores,
                grid=grid,
                retention=retention,
                config=method,
                algorithms=algorithms_for(features.device, kernels=self.kernels),
            )
        METER.add(reduced, tokens=grid.tokens)
        return torch.cat((reduced.tokens, self.image_newline[None]))

    def _tower(self, pixels: Tensor) -> Tensor:
        """Return pooled features (frames, side * side, hidden), computed in blocks of frames."""
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        activations = patches * (2 * vision.intermediate_size + vision.hidden_size)
        features = token_grid(self.config, frames=1).positions * self.config.text_config.hidden_size
        at_once = frames_at_once(len(pixels), profiled=TOWER_FRAMES, waiting_share=features / activations)

        def tower(block: Tensor) -> Tensor:
            return self._video_pixels_to_features(self.vision_tower, block)

        with METER.timing("tower", pixels.device):
            return in_blocks(tower, pixels.split(at_once), frames=len(pixels))

    def _pool(self, scores: Tensor) -> Tensor:
        """Return scores (frames, patches) on the pooled grid, pooled as the model pools its features."""
        return self.apply_pooling(scores[..., None]).squeeze(-1)
