"""The reduction in the Qwen vision-language models, whose towers take the frames of a video end to end.

The file of each model gives the order in which its tower works, the layout of a video in the prompt, and the layers
that can score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.v1.worker.encoder_cudagraph_defs import EncoderCudaGraphConfig

from aot_vllm.adapters.blocks import frames_at_once, in_blocks
from aot_vllm.adapters.compat import let_cpu_runner_recompute_positions, let_proposer_know_reduced_models
from aot_vllm.adapters.processing import PRESET, carried_retentions
from aot_vllm.adapters.qwen_positions import PositionedQwenVL
from aot_vllm.adapters.scores import AttentionScores, scores_of_methods
from aot_vllm.adapters.settings import Reduction, from_ppm
from aot_vllm.adapters.telemetry import METER
from aot_vllm.core.attention import attention_received
from aot_vllm.core.grid import VideoGrid
from aot_vllm.core.reduce import ReducedVideo, needs_scores, reduce_video
from aot_vllm.kernels.dispatch import Kernels, algorithms_for


class ReducedQwenVL(PositionedQwenVL):
    """A mix-in before a Qwen model: it reduces each video between the vision tower and the language model."""

    scores: tuple[AttentionScores, ...]
    """One recorder for each of `methods`."""
    kernels: Kernels

    def set_up_reduction(self, *, whole_frame: Sequence[int] | None = None) -> None:
        """Prepare the model runner. If a request may get anchors by attention, hook the two scoring layers.

        `whole_frame`: the layers of the tower that attend to a whole frame, by default all.

        Raises:
            SettingError: the tower does not have a scoring layer that the settings name.
        """
        self.kernels = Reduction.of(self.multimodal_config).kernels
        let_cpu_runner_recompute_positions()
        let_proposer_know_reduced_models()
        self.receive_positions()
        blocks = self.visual.blocks
        self.scores = scores_of_methods(
            self.methods,
            [block.attn.attn for block in blocks],
            whole_frame=whole_frame,
            total_heads=self.config.vision_config.num_heads,
            sum_over_ranks=tensor_model_parallel_all_reduce,
            kernels=self.kernels,
        )

    def get_encoder_cudagraph_config(self) -> EncoderCudaGraphConfig:
        """Return vLLM's own configuration, with graphs for images alone.

        A graph returns what the tower computes. Of an image this is all that enters the language model. vLLM's own
        pruning adds coordinates to images too, so with a rate vLLM would capture graphs and use them for nothing.
        """
        config: EncoderCudaGraphConfig = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        return replace(config, modalities=["image"])

    def row_major(self, scores: Tensor, grid: VideoGrid) -> Tensor:
        """Return scores (frames, tokens) in the order of the tower's output, given the order in which it works."""
        return scores

    def embed_multimodal(self, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return the embeddings of each image and of each video. Those of videos carry their coordinates."""
        embeddings: list[Tensor] = []
        parsed = self._parse_and_validate_multimodal_inputs(**kwargs)  # type: ignore[attr-defined]
        for modality, inputs in parsed.items():
            if modality == "image":
                embeddings.extend(self._process_image_input(inputs))  # type: ignore[attr-defined]
            else:
                retentions, presets = carried_retentions(kwargs).tolist(), kwargs[PRESET].tolist()
                embeddings.extend(self._embed_videos(inputs, retentions, presets))
        return tuple(embeddings)

    def _embed_videos(self, inputs: Any, retentions: Sequence[int], presets: Sequence[int]) -> Iterator[Tensor]:
        """Yield the rows of one video at a time: all together could need more memory than was profiled."""
        merge = self.config.vision_config.spatial_merge_size
        sizes = inputs["video_grid_thw"].tolist()
        embedded = inputs["type"] == "video_embeds"
        parts = inputs[inputs["type"]].split([t * h * w // (merge**2 if embedded else 1) for t, h, w in sizes])
        seconds = inputs.get("second_per_grid_ts")
        videos = zip(sizes, parts, retentions, presets, strict=True)
        for index, ((t, h, w), part, millionths, preset) in enumerate(videos):
            grid = VideoGrid(frames=t, rows=h // merge, cols=w // merge)
            reduced = self._reduce(part, grid, retention=from_ppm(millionths), preset=preset, embedded=embedded)
            times = self.frame_times(t, 1.0 if seconds is None else seconds[index].item())
            yield self.positioned_rows(reduced, grid, times)

    def _reduce(self, part: Tensor, grid: VideoGrid, *, retention: float, preset: int, embedded: bool) -> ReducedVideo:
        """Return one reduced video, given as the tower's input, or as its output if `embedded`."""
        method = self.methods[preset]
        scored = needs_scores(grid, retention=retention, config=method)
        local_scores = global_scores = None
        if embedded:
            features = part.to(self.visual.dtype).view(grid.frames, grid.positions, -1)
            if scored:
                local_scores = global_scores = self._mutual_scores(features)
        elif scored:
            features, local_scores, global_scores = self._scored_tower(part, grid, self.scores[preset])
        else:
            features = self._tower(part, grid)
        with METER.timing("reduction", features.device):
            reduced = reduce_video(
                features,
                local_scores,
                global_scores,
                grid=grid,
                retention=retention,
                config=method,
                compared=self._main_width,
                algorithms=algorithms_for(features.device, kernels=self.kernels),
            )
        METER.add(reduced, tokens=grid.tokens)
        return reduced

    def _mutual_scores(self, features: Tensor) -> Tensor:
        """Return scores (frames, tokens) of features that a client computed.

        No tower of this engine attended to them. So each token attends to the others by its features.
        """
        main = torch.nn.functional.normalize(features[..., : self._main_width].float(), dim=-1)
        return attention_received(main, main, num_heads=1, scale=1.0)

    def _scored_tower(self, patches: Tensor, grid: VideoGrid, scores: AttentionScores) -> tuple[Tensor, Tensor, Tensor]:
        """Return features (frames, tokens, width), and local and global scores (frames, tokens).

        The score of a token is the mean over the patches that are merged into it.
        """
        merged = self.config.vision_config.spatial_merge_size**2
        with scores.recording(tokens_per_frame=grid.positions * merged) as recorded:
            features = self._tower(patches, grid)
        local_scores, global_scores = (
            self.row_major(received.unflatten(1, (-1, merged)).mean(2), grid) for received in recorded()
        )
        return features, local_scores, global_scores

    def _tower(self, patches: Tensor, grid: VideoGrid) -> Tensor:
        """Return features (frames, tokens, width), computed in blocks of frames: no frame depends on another.

        Each rank computes the whole video, even where vLLM would give each rank whole items
        (`--mm-encoder-tp-mode data`): scores and plans need the video in one place.
        """
        vision = self.config.vision_config
        merge = vision.spatial_merge_size
        patches_per_frame = grid.positions * merge**2
        activations = merge**2 * (2 * vision.intermediate_size + vision.hidden_size)
        at_once = frames_at_once(
            grid.frames, profiled=self._tower_tokens / grid.positions, waiting_share=self._width / activations
        )

        def tower(block: Tensor) -> Tensor:
            size = [len(block) // patches_per_frame, grid.rows * merge, grid.cols * merge]
            return self.visual(block, grid_thw=[size]).view(-1, grid.positions, self._width)

        with METER.timing("tower", patches.device):
            return in_blocks(tower, patches.split(at_once * patches_per_frame), frames=grid.frames)

    @cached_property
    def _main_width(self) -> int:
        """Columns of an embedding that enter the language model's first layer. The columns of deepstack follow them."""
        return int(self.config.vision_config.out_hidden_size)

    @cached_property
    def _tower_tokens(self) -> int:
        """Most tokens that the tower computes at a time: those of the largest video that vLLM profiles memory with."""
        model_config = self.model_config  # type: ignore[attr-defined]
        info = MULTIMODAL_REGISTRY.get_processing_info(model_config)
        videos = model_config.get_multimodal_config().get_limit_per_prompt("video")
        return int(info.get_max_video_tokens(model_config.max_model_len, {"video": videos}))
