"""The half of the reduction that runs in the API server: the length of a video's placeholder, and its hash.

A request may name its retention and its preset in `mm_processor_kwargs`. Both travel to the worker as fields of the
video item. So the placeholder laid out here and the rows made in the worker follow from the same numbers.
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
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptReplacement, PromptUpdate
from vllm.multimodal.processing.inputs import ProcessorInputs

from aot_vllm.adapters.settings import Reduction, from_ppm, to_ppm
from aot_vllm.adapters.telemetry import LEDGER, VideoSavings
from aot_vllm.config import quantise_retention
from aot_vllm.core.budget import Budget, budget
from aot_vllm.core.grid import VideoGrid
from aot_vllm.errors import UnsupportedError

RETENTION = "aot_retention"
"""Name of the retention in a request's `mm_processor_kwargs`, and of the field that carries it to the worker."""

PRESET = "aot_preset"
"""Name of the preset in a request's `mm_processor_kwargs`, and of the field that carries its number to the worker."""

_OURS = (RETENTION, PRESET)


def without_ours(kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return processor keyword arguments without retention and preset, which no Hugging Face processor accepts."""
    return {name: value for name, value in kwargs.items() if name not in _OURS}


def carried_retention(item: MultiModalKwargsItem) -> float:
    """Return the retention that travels with a processed video.

    Raises:
        UnsupportedError: the video came without one.
    """
    return from_ppm(int(_carried(item).data))


def carried_retentions(kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the retentions in millionths, (videos,), among the keyword arguments of `embed_multimodal`.

    Raises:
        UnsupportedError: the videos came without them.
    """
    retentions: torch.Tensor = _carried(kwargs)
    return retentions


def _carried(fields: Mapping[str, Any]) -> Any:
    if RETENTION not in fields:
        raise UnsupportedError(
            "a video came without its retention; AOT must be active in the API server too, with the same "
            "--video-pruning-rate and --additional-config as in this engine"
        )
    return fields[RETENTION]


def carried_preset(item: MultiModalKwargsItem) -> int:
    """Return the number of the preset that travels with a processed video, see `Reduction.methods`."""
    return int(item[PRESET].data)


class WithoutRetention:
    """A mix-in before a model's processing info: it hides retention and preset from the Hugging Face processor."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        """Return the Hugging Face processor for these arguments without retention and preset."""
        return super().get_hf_processor(**without_ours(kwargs))  # type: ignore[misc]


class ReducedVideoProcessor(BaseMultiModalProcessor[Any]):
    """A mix-in before a model's own processor: it shortens videos and leaves every other modality unchanged.

    A subclass for a model gives the grid of a video (`video_grid`), its placeholder (`video_placeholder`), and the
    number of placeholder tokens beyond the grid (`extra_video_tokens`).
    """

    extra_video_tokens = 0

    @abstractmethod
    def video_grid(
        self, videos: ModalityDataItems[Any, Any], item_idx: int, processed: MultiModalKwargsItem | None
    ) -> VideoGrid | None:
        """Return the grid of tokens of one video before the reduction, None if its size is unknown here.

        `processed` is the video as it goes to the worker, None if the worker has it already.
        """

    @abstractmethod
    def video_placeholder(self, counts: Budget, processed: MultiModalKwargsItem) -> Any:
        """Return the placeholder of a video with these token counts, as vLLM's prompt updates take it."""

    def reduction(self) -> Reduction:
        """Return the retention and the settings that this engine was started with."""
        return Reduction.of(self.info.ctx.get_mm_config())

    def retention_of(self, kwargs: Mapping[str, object]) -> float:
        """Return the retention that a request names, rounded to hundredths, or the engine's if it names none.

        Raises:
            SettingError: not a number in (0, 1].
        """
        if kwargs.get(RETENTION) is None:
            return self.reduction().retention
        return quantise_retention(kwargs[RETENTION])

    def preset_of(self, kwargs: Mapping[str, object]) -> int:
        """Return the number of the preset that a request names, 0 for the engine's own settings if it names none.

        Raises:
            SettingError: the engine doesn't allow this preset.
        """
        return self.reduction().preset_number(kwargs.get(PRESET))

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        data = super()._apply_hf_processor_main(mm_items, without_ours(hf_kwargs))
        if num_videos := mm_items.get_count("video", strict=False):
            carried = {RETENTION: to_ppm(self.retention_of(hf_kwargs)), PRESET: self.preset_of(hf_kwargs)}
            for name, number in carried.items():
                data[name] = torch.full((num_videos,), number, dtype=torch.int64)
        return data

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, without_ours(hf_processor_mm_kwargs))
        return {**fields, **{name: MultiModalFieldConfig.batched("video", keep_on_cpu=True) for name in _OURS}}

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, list[bool]]
    ) -> Mapping[str, object]:
        asked = inputs.hf_processor_mm_kwargs
        plain = replace(inputs, hf_processor_mm_kwargs=without_ours(asked))
        own = {name: asked[name] for name in _OURS if name in asked}
        return {**super()._get_cache_missing_processor_kwargs(plain, mm_is_cached), **own}

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Mapping[str, list[str]]:
        plain = replace(inputs, hf_processor_mm_kwargs=without_ours(inputs.hf_processor_mm_kwargs))
        hashes = dict(super()._get_mm_hashes(plain))
        if "video" in hashes:
            asked = inputs.hf_processor_mm_kwargs
            method, retention = self.reduction().methods[self.preset_of(asked)], self.retention_of(asked)
            algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
            hashes["video"] = [
                MultiModalHasher.hash_kwargs(
                    algorithm, video=video_hash, aot=method.digest(), retention=to_ppm(retention)
                )
                for video_hash in hashes["video"]
            ]
        return hashes

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        def replacement(item_idx: int) -> Any:
            processed = out_mm_kwargs["video"][item_idx]
            grid = self.video_grid(mm_items["video"], item_idx, processed)
            assert grid is not None, "the size of a processed video is known"  # noqa: S101
            method = self.reduction().methods[carried_preset(processed)]
            counts = budget(grid, retention=carried_retention(processed), config=method)
            return self.video_placeholder(counts, processed)

        updates = super()._get_prompt_updates(mm_items, without_ours(hf_processor_mm_kwargs), out_mm_kwargs)
        return [
            PromptReplacement(modality="video", target=update.target, replacement=replacement)
            if update.modality == "video"
            else update
            for update in updates
        ]

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """Process a prompt as the model's processor does, and record the savings of each video in the ledger.

        The savings count tokens that stand for the content of a video. Some models put timestamps and markers between
        frames. These are text and are not counted, though vLLM's `prompt_tokens_details` counts them as video tokens.
        """
        rendered = super().apply(inputs, timing_ctx)
        if videos := inputs.mm_data_items.get("video"):
            self._record_savings(videos, rendered, self.retention_of(inputs.hf_processor_mm_kwargs))
        return rendered

    def _record_savings(self, videos: ModalityDataItems[Any, Any], rendered: Any, retention: float) -> None:
        items = zip(
            rendered["mm_hashes"]["video"],
            rendered["mm_placeholders"]["video"],
            rendered["mm_kwargs"]["video"],
            strict=True,
        )
        for item_idx, (mm_hash, placeholder, processed) in enumerate(items):
            if grid := self.video_grid(videos, item_idx, processed):
                before = grid.tokens + self.extra_video_tokens
                LEDGER.write(mm_hash, VideoSavings(before, placeholder.get_num_embeds(), retention))
            elif known := LEDGER.read(mm_hash):
                LEDGER.write(mm_hash, known)  # an old entry becomes the latest
