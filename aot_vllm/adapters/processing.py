"""The half of the reduction that runs in the API server: how long a video's placeholder is, and under which hash.

A request names its retention in `mm_processor_kwargs`; it goes on to the worker as a field of the video item, so the
length laid out here and the rows made there follow from the same number.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import BatchFeature
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem, MultiModalKwargsItems
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptUpdate
from vllm.multimodal.processing.inputs import ProcessorInputs

from aot_vllm.adapters.settings import Reduction, from_ppm, to_ppm
from aot_vllm.adapters.telemetry import LEDGER, VideoSavings
from aot_vllm.config import quantise_retention
from aot_vllm.core.budget import budget
from aot_vllm.core.grid import VideoGrid

RETENTION = "aot_retention"
"""Key of `mm_processor_kwargs` a request may name its retention under, and name of the field that carries it."""


def without_retention(kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return processor keyword arguments without ours, which a Hugging Face processor doesn't know."""
    return {name: value for name, value in kwargs.items() if name != RETENTION}


class ReducedVideoProcessor(BaseMultiModalProcessor[Any]):
    """Mixed in before a model's own processor, it shortens videos and leaves every other modality as it was.

    A model's subclass says how large a video's grid is (`video_grid`), how many tokens its placeholder has besides the
    grid's (`extra_video_tokens`), and builds the placeholder in `_get_prompt_updates` from `kept_video_tokens`.
    """

    extra_video_tokens = 0

    @abstractmethod
    def video_grid(
        self, videos: ModalityDataItems[Any, Any], item_idx: int, processed: MultiModalKwargsItem | None
    ) -> VideoGrid | None:
        """Return the grid of tokens of one video before the reduction, None where its size can't be told.

        `processed` is the video as it goes to the worker, None where the worker has it already.
        """

    def reduction(self) -> Reduction:
        """Return what this engine was started with."""
        return Reduction.of(self.info.get_hf_config())

    def retention_of(self, kwargs: Mapping[str, object]) -> float:
        """Return the retention a request asks for, rounded to hundredths, or the engine's.

        Raises:
            SettingError: not a number in (0, 1].
        """
        if kwargs.get(RETENTION) is None:
            return self.reduction().retention
        return quantise_retention(kwargs[RETENTION])

    def kept_video_tokens(self, grid: VideoGrid, retention: float) -> int:
        """Return the placeholder length of a video after the reduction."""
        kept = budget(grid, retention=retention, config=self.reduction().method)
        return kept.total + self.extra_video_tokens

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        data = super()._apply_hf_processor_main(mm_items, without_retention(hf_kwargs))
        if num_videos := mm_items.get_count("video", strict=False):
            carried = to_ppm(self.retention_of(hf_kwargs))
            data[RETENTION] = torch.full((num_videos,), carried, dtype=torch.int64)
        return data

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, without_retention(hf_processor_mm_kwargs))
        return {**fields, RETENTION: MultiModalFieldConfig.batched("video", keep_on_cpu=True)}

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, list[bool]]
    ) -> Mapping[str, object]:
        asked = inputs.hf_processor_mm_kwargs
        plain = replace(inputs, hf_processor_mm_kwargs=without_retention(asked))
        own = {name: asked[name] for name in (RETENTION,) if name in asked}
        return {**super()._get_cache_missing_processor_kwargs(plain, mm_is_cached), **own}

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Mapping[str, list[str]]:
        plain = replace(inputs, hf_processor_mm_kwargs=without_retention(inputs.hf_processor_mm_kwargs))
        hashes = dict(super()._get_mm_hashes(plain))
        if "video" in hashes:
            reduction, retention = self.reduction(), self.retention_of(inputs.hf_processor_mm_kwargs)
            algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
            hashes["video"] = [
                MultiModalHasher.hash_kwargs(
                    algorithm, video=video_hash, aot=reduction.method.digest(), retention=to_ppm(retention)
                )
                for video_hash in hashes["video"]
            ]
        return hashes

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """Process a prompt as the model's processor does, and write down what each of its videos saves.

        Counted are the tokens that stand for the video's content. Timestamps and markers, which some models put between
        frames, are text and in neither count; vLLM's `prompt_tokens_details` has them among its video tokens.
        """
        rendered = super().apply(inputs, timing_ctx)
        if videos := inputs.mm_data_items.get("video"):
            retention = self.retention_of(inputs.hf_processor_mm_kwargs)
            for item_idx, (mm_hash, placeholder, processed) in enumerate(
                zip(
                    rendered["mm_hashes"]["video"],
                    rendered["mm_placeholders"]["video"],
                    rendered["mm_kwargs"]["video"],
                    strict=True,
                )
            ):
                if grid := self.video_grid(videos, item_idx, processed):
                    before = grid.tokens + self.extra_video_tokens
                    LEDGER.write(mm_hash, VideoSavings(before, placeholder.get_num_embeds(), retention))
                elif known := LEDGER.read(mm_hash):
                    LEDGER.write(mm_hash, known)  # written down when its size was here; now the latest again
        return rendered

    @staticmethod
    def carried_retention(out_mm_kwargs: MultiModalKwargsItems, item_idx: int) -> float:
        """Return the retention that travels with a processed video item."""
        return from_ppm(int(out_mm_kwargs["video"][item_idx][RETENTION].data))

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        return super()._get_prompt_updates(mm_items, without_retention(hf_processor_mm_kwargs), out_mm_kwargs)
