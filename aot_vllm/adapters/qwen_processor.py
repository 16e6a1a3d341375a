"""The processors of the Qwen vision-language models: the grid of a video, from its grid of patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.parse import ModalityDataItems

from aot_vllm.adapters.processing import ReducedVideoProcessor
from aot_vllm.core.grid import VideoGrid


def token_grid(config: Any, item: Mapping[str, Any], modality: str) -> VideoGrid:
    """Return the grid of tokens of an image or a video before the reduction: its grid of patches, merged."""
    frames, rows, cols = item[f"{modality}_grid_thw"].data.tolist()
    merge = config.vision_config.spatial_merge_size
    return VideoGrid(frames=frames, rows=rows // merge, cols=cols // merge)


class ReducedQwenProcessor(ReducedVideoProcessor):
    """A mix-in before a Qwen model's processor. A subclass gives the placeholder of a video."""

    def video_grid(
        self, videos: ModalityDataItems[Any, Any], item_idx: int, processed: MultiModalKwargsItem | None
    ) -> VideoGrid | None:
        """Return temporal units x merged rows x merged columns, None if the worker has the video already."""
        return None if processed is None else token_grid(self.info.get_hf_config(), processed, "video")
