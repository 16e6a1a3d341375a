"""What the Qwen vision-language models share: grids of merged patches, M-RoPE, towers that lay frames end to end.

A model's own file says in which order its tower works, how a video is laid out in the prompt, and which layers score.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, MultiModalKwargsItems
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.utils.torch_utils import async_tensor_h2d

from aot_vllm.adapters.blocks import frames_at_once, in_blocks
from aot_vllm.adapters.compat import let_cpu_runner_recompute_positions, let_proposer_know_reduced_models
from aot_vllm.adapters.positions import (
    VisionRun,
    coordinates_of,
    position_delta,
    prompt_positions,
    settle,
    with_coordinates,
)
from aot_vllm.adapters.processing import RETENTION, ReducedVideoProcessor, without_retention
from aot_vllm.adapters.scores import AttentionScores, attention_received, scoring_modules
from aot_vllm.adapters.settings import Reduction, from_ppm
from aot_vllm.adapters.telemetry import METER
from aot_vllm.config import AOTConfig
from aot_vllm.core.budget import Budget, budget
from aot_vllm.core.grid import VideoGrid
from aot_vllm.core.reduce import ReducedVideo, reduce_video


def token_grid(config: Any, item: Mapping[str, Any], modality: str) -> VideoGrid:
    """Return the grid of tokens of an image or video before the reduction, from its grid of patches."""
    frames, rows, cols = item[f"{modality}_grid_thw"].data.tolist()
    merge = config.vision_config.spatial_merge_size
    return VideoGrid(frames=frames, rows=rows // merge, cols=cols // merge)


class WithoutRetention:
    """Mixed in before a model's processing info, it keeps a retention from the Hugging Face processor."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        """Return the Hugging Face processor, which knows nothing of a retention."""
        return super().get_hf_processor(**without_retention(kwargs))  # type: ignore[misc]


class ReducedQwenProcessor(ReducedVideoProcessor):
    """Mixed in before a Qwen model's processor, it lays out the tokens that a video keeps."""

    def video_grid(
        self, videos: ModalityDataItems[Any, Any], item_idx: int, processed: MultiModalKwargsItem | None
    ) -> VideoGrid | None:
        """Return temporal units x merged rows x merged columns."""
        return None if processed is None else token_grid(self.info.get_hf_config(), processed, "video")

    @abstractmethod
    def video_placeholder(self, counts: Budget, item: MultiModalKwargsItem) -> Any:
        """Return what stands for a video in the prompt."""

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        def replacement(item_idx: int) -> Any:
            item = out_mm_kwargs["video"][item_idx]
            grid = token_grid(self.info.get_hf_config(), item, "video")
            retention = self.carried_retention(out_mm_kwargs, item_idx)
            return self.video_placeholder(budget(grid, retention=retention, config=self.reduction().method), item)

        return [
            PromptReplacement(modality="video", target=update.target, replacement=replacement)
            if update.modality == "video"
            else update
            for update in super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        ]


class ReducedQwenVL:
    """Mixed in before a Qwen model, it reduces each video between the tower and the language model.

    vLLM runs its hook for pruning models, `recompute_mrope_positions`, before every prefill step, on Model Runner V1
    before every decode step too: there it returns at once.
    """

    config: Any
    visual: Any
    method: AOTConfig
    scores: AttentionScores

    def score_by(self, whole_frame: Sequence[int] | None = None) -> None:
        """Hook the two layers that score, if any; `whole_frame`: the layers that attend to a whole frame, None for all.

        Raises:
            SettingError: a scoring layer that the tower does not have.
        """
        let_cpu_runner_recompute_positions()
        let_proposer_know_reduced_models()
        self.method = Reduction.of(self.config).method
        blocks = self.visual.blocks
        self.scores = AttentionScores(
            scoring_modules(self.method, [block.attn.attn for block in blocks], whole_frame=whole_frame),
            total_heads=self.config.vision_config.num_heads,
            sum_over_ranks=tensor_model_parallel_all_reduce,
        )

    def row_major(self, scores: Tensor, grid: VideoGrid) -> Tensor:
        """Return scores (frames, tokens), which come in the order in which the tower works, in that of its output."""
        return scores

    def frame_times(self, frames: int, seconds_per_frame: float) -> Sequence[int]:
        """Return the time of each frame, counted from that of the first."""
        return range(frames)

    @abstractmethod
    def video_runs(
        self, feature: MultiModalFeatureSpec, grid: VideoGrid, kept_per_frame: Sequence[int]
    ) -> Iterable[VisionRun]:
        """Return the runs of tokens that a video has in the prompt."""

    # What the tower makes of a video, and what is left of it

    def embed_multimodal(self, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return the rows of each image, and of each video with coordinates behind them."""
        embeddings: list[Tensor] = []
        parsed = self._parse_and_validate_multimodal_inputs(**kwargs)  # type: ignore[attr-defined]
        for modality, inputs in parsed.items():
            if modality == "image":
                embeddings.extend(self._process_image_input(inputs))  # type: ignore[attr-defined]
            else:
                embeddings.extend(self._embed_videos(inputs, kwargs[RETENTION].tolist()))
        return tuple(embeddings)

    def _embed_videos(self, inputs: Any, retentions: Sequence[int]) -> Iterator[Tensor]:
        """Yield the rows of one video after the other: together they could need more memory than was profiled."""
        merge = self.config.vision_config.spatial_merge_size
        sizes = inputs["video_grid_thw"].tolist()
        embedded = inputs["type"] == "video_embeds"
        parts = inputs[inputs["type"]].split([t * h * w // (merge**2 if embedded else 1) for t, h, w in sizes])
        seconds = inputs.get("second_per_grid_ts")
        for index, ((t, h, w), part, millionths) in enumerate(zip(sizes, parts, retentions, strict=True)):
            grid = VideoGrid(frames=t, rows=h // merge, cols=w // merge)
            reduced = self._reduce(part, grid, retention=from_ppm(millionths), embedded=embedded)
            times = self.frame_times(t, 1.0 if seconds is None else seconds[index].item())
            yield self._rows(reduced, grid, times)

    def _reduce(self, part: Tensor, grid: VideoGrid, *, retention: float, embedded: bool) -> ReducedVideo:
        """Return what is left of one video, given as the tower's input or, `embedded`, as its output."""
        if budget(grid, retention=retention, config=self.method).identity:
            features = self._embedded(part, grid) if embedded else self._tower(part, grid)
            local_scores = global_scores = None  # nobody looks at them
        elif embedded:
            features = self._embedded(part, grid)
            local_scores = global_scores = self._mutual_scores(features)
        else:
            merged = self.config.vision_config.spatial_merge_size**2
            with self.scores.recording(tokens_per_frame=grid.positions * merged) as recorded:
                features = self._tower(part, grid)
            local_scores, global_scores = (
                None if scores is None else self.row_major(scores.unflatten(1, (-1, merged)).mean(2), grid)
                for scores in recorded()
            )
        with METER.timing(features.device):
            reduced = reduce_video(
                features,
                local_scores,
                global_scores,
                grid=grid,
                retention=retention,
                config=self.method,
                compared=self._main_width,
            )
        METER.add_unconverged(reduced.unconverged)
        return reduced

    def _mutual_scores(self, features: Tensor) -> Tensor | None:
        """Return scores (frames, tokens) of features that no tower of this engine made, None where none are needed.

        There is no attention of a tower's own: tokens attend to each other as they are.
        """
        if self.method.anchors != "attention":
            return None
        main = torch.nn.functional.normalize(features[..., : self._main_width].float(), dim=-1)
        return attention_received(main, main, num_heads=1, scale=1.0)

    def _rows(self, reduced: ReducedVideo, grid: VideoGrid, times: Sequence[int]) -> Tensor:
        """Return a video's rows in the order of frames, rows and columns, each with its coordinates behind it."""
        frames = reduced.frames
        order = ((frames * grid.rows + reduced.rows) * grid.cols + reduced.cols).argsort(stable=True)
        times_of_frames = async_tensor_h2d(list(times), dtype=torch.long, device=frames.device)
        coordinates = torch.stack((times_of_frames[frames], reduced.rows, reduced.cols), dim=1)
        return with_coordinates(reduced.tokens, coordinates)[order]

    def _tower(self, patches: Tensor, grid: VideoGrid) -> Tensor:
        """Return features (frames, tokens, width), a block of frames at a time: the tower looks at each by itself.

        Each rank computes all of a video, also where vLLM would deal whole items out to ranks
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

        return in_blocks(tower, patches.split(at_once * patches_per_frame), frames=grid.frames)

    def _embedded(self, embeddings: Tensor, grid: VideoGrid) -> Tensor:
        return embeddings.to(self.visual.dtype).view(grid.frames, grid.positions, -1)

    @cached_property
    def _main_width(self) -> int:
        """Columns of an embedding that the language model takes in; those of deepstack come after them."""
        return int(self.config.vision_config.out_hidden_size)

    @cached_property
    def _width(self) -> int:
        """Columns of an embedding, with those of deepstack."""
        return int(self.visual.out_hidden_size)

    @cached_property
    def _tower_tokens(self) -> int:
        """Tokens the tower may make at a time: as many as the largest video vLLM profiles memory with."""
        model_config = self.model_config  # type: ignore[attr-defined]
        info = MULTIMODAL_REGISTRY.get_processing_info(model_config)
        videos = model_config.get_multimodal_config().get_limit_per_prompt("video")
        return int(info.get_max_video_tokens(model_config.max_model_len, {"video": videos}))

    # Where tokens stand

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """Return the positions of a prompt but for rows and columns of kept tokens; see `positions`."""
        return prompt_positions(len(input_tokens), self._runs(mm_features))

    def _runs(self, mm_features: list[MultiModalFeatureSpec]) -> Iterator[VisionRun]:
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            data = feature.data
            assert data is not None, "vLLM keeps a feature's sizes on the worker"  # noqa: S101
            grid = token_grid(self.config, data, feature.modality)
            if feature.modality == "image":
                yield VisionRun(feature.mm_position.offset, (0,), grid.rows, grid.cols, (grid.positions,))
            else:
                retention = from_ppm(int(data[RETENTION].data))
                counts = budget(grid, retention=retention, config=self.method)
                yield from self.video_runs(feature, grid, counts.per_frame)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Return embeddings without coordinates, positions (3, N) that these went into, and the delta behind them.

        `multimodal_embeddings` are those that go into the language model in this step. Videos carry coordinates,
        images don't, and stand where they always stood. On a GPU this waits for the device where there are videos in
        the step: Model Runner V1 holds positions, and both hold the delta, on the host.
        """
        if not multimodal_embeddings:
            return multimodal_embeddings, mrope_positions, position_delta(mrope_positions)
        width = self._width
        with gpu_sync_allowed():
            carried = [coordinates_of(rows, width=width) for rows in multimodal_embeddings if rows.shape[1] > width]
            if carried:
                device = mrope_positions.device
                mrope_positions = settle(
                    mrope_positions,
                    torch.as_tensor(input_ids, device=device),
                    torch.cat(carried).to(device),
                    video_token_id=self.config.video_token_id,
                    num_computed_tokens=num_computed_tokens,
                )
            stripped = [rows[:, :width] for rows in multimodal_embeddings]
            return stripped, mrope_positions, position_delta(mrope_positions)
