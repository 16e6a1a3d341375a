"""The models, of random weights, and the stages of a request to them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention, silu

from aot_vllm import AOTConfig, ReducedVideo, VideoGrid
from aot_vllm.adapters.scores import scoring_layers
from bench.on_gpu.paths import Implementation
from bench.on_gpu.sizes import TEXT_TOKENS, Case


class Layer(nn.Module):
    """A transformer layer. `seen` is called with its queries and keys, (batch, heads, tokens, size)."""

    def __init__(self, width: int, heads: int, kv_heads: int, mlp: int, *, gated: bool) -> None:
        super().__init__()
        self.heads, self.size, self.gated = (heads, kv_heads, kv_heads), width // heads, gated
        norm = nn.RMSNorm if gated else nn.LayerNorm
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv = nn.Linear(width, sum(self.heads) * self.size)
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, (1 + gated) * mlp), nn.Linear(mlp, width)

    def forward(self, x: Tensor, *, causal: bool, seen: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(2, (-1, self.size)).transpose(1, 2).split(self.heads, 1)
        if seen is not None:
            seen(query, key)
        grouped = self.heads[0] != self.heads[1]
        attended = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        hidden = self.up(self.norm2(x))
        if self.gated:
            gate, hidden = hidden.chunk(2, -1)
            return x + self.down(silu(gate) * hidden)
        return x + self.down(gelu(hidden, approximate="tanh"))


class TowerModel(nn.Module):
    """A tower with what joins it to the language model. Frames go through it in blocks, as in the plugin."""

    FRAMES_AT_ONCE = 16

    def __init__(self, case: Case) -> None:
        super().__init__()
        size = case.tower
        self.case, self.size = case, size
        wide = size.width * size.merge**2
        hidden = wide if size.merge > 1 else size.out
        self.embed = nn.Linear(size.pixels, size.width)
        self.layer = Layer(size.width, size.heads, size.heads, size.mlp, gated=size.gated)
        self.head = nn.Sequential(nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, size.out))
        whole = [index for index in range(size.layers) if (index + 1) % size.whole_every == 0]
        config = AOTConfig(anchors="attention")
        self.scored = scoring_layers(config, num_layers=size.layers, whole_frame=whole)

    def forward(self, pixels: Tensor, *, scored_by: Implementation | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return the features (T, P, D) of patches (T, patches, pixels), and both scores, (T, P), or none."""
        blocks = [self._block(block, scored_by) for block in pixels.split(self.FRAMES_AT_ONCE)]
        features, scores = zip(*blocks, strict=True)
        return torch.cat(features), [torch.cat(parts) for parts in zip(*scores, strict=True)]

    def _block(self, pixels: Tensor, scored_by: Implementation | None) -> tuple[Tensor, list[Tensor]]:
        size, scores = self.size, []

        def score(query: Tensor, key: Tensor) -> None:
            query, key = (part.transpose(1, 2).flatten(2) for part in (query, key))
            received = scored_by.attention_received(query, key, num_heads=size.heads, scale=self.layer.size**-0.5)
            scores.append(self._to_tokens(received[:, :, None])[:, :, 0] / size.heads)

        x = self.embed(pixels)
        windows = size.windows(*self.case.patches)
        for index in range(size.layers):
            if (index + 1) % size.whole_every:
                x = self.layer(x.reshape(-1, x.shape[1] // windows, size.width), causal=False).view(x.shape)
            else:
                x = self.layer(x, causal=False, seen=score if scored_by and index in self.scored else None)
        if size.merge == 1:
            return self._to_tokens(self.head(x)), scores
        x = x.unflatten(1, (-1, size.merge**2)).flatten(2)
        return torch.cat([self.head(x) for _ in range(size.outputs)], 2), scores

    def _to_tokens(self, values: Tensor) -> Tensor:
        """Return values of patches, (T, patches, C), as those of tokens: pooled, or the mean of those merged."""
        grid = self.case.grid
        if self.size.merge > 1:
            return values.unflatten(1, (-1, self.size.merge**2)).mean(2)
        image = values.unflatten(1, self.case.patches).movedim(3, 1)
        return interpolate(image, size=(grid.rows, grid.cols), mode="bilinear").flatten(2).movedim(1, 2)


class Request:
    """A video and a model on a device: the stages of a request, each to be called by itself or in turn."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        text, made = case.text, {"device": device, "dtype": torch.bfloat16}
        with device:
            self._tower = TowerModel(case).to(torch.bfloat16)
            self._layer = Layer(text.width, text.heads, text.kv_heads, text.mlp, gated=True).to(torch.bfloat16)
        self._pixels = torch.randn(case.grid.frames, case.patches[0] * case.patches[1], case.tower.pixels, **made)
        self._prompt = torch.randn(1, case.grid.tokens + TEXT_TOKENS, text.width, **made)
        self.features = slow_scene(case.grid, case.tower.out * case.tower.outputs, device)
        self.scores: list[Tensor] = []

    def tower(self, *, scored_by: Implementation | None = None) -> list[Tensor]:
        """Run the tower; return the two scores of each token, if they are asked for."""
        return self._tower(self._pixels, scored_by=scored_by)[1]

    def reduce(self, retention: float, anchors: str, path: Implementation) -> ReducedVideo:
        """Reduce a scene that changes slowly. The output of a tower of random weights is no video."""
        scores = self.scores if anchors == "attention" else (None, None)
        config, compared = AOTConfig(anchors=anchors, mass=0.2), self.case.tower.out
        sizes = {"grid": self.case.grid, "retention": retention, "config": config, "compared": compared}
        return path.reduce_video(self.features, *scores, **sizes)

    def prefill(self, video_tokens: int) -> None:
        """Run the language model's layers over so many tokens of the video and the text."""
        x = self._prompt[:, : video_tokens + TEXT_TOKENS]
        for _ in range(self.case.text.layers):
            x = self._layer(x, causal=True)

    def whole(self) -> None:
        """Run everything from the pixels to the first token, without a reduction."""
        self.tower()
        self.prefill(self.case.grid.tokens)

    def reduced(self, retention: float, anchors: str, path: Implementation) -> None:
        """Run everything from the pixels to the first token."""
        self.tower(scored_by=path if anchors == "attention" and retention < 1 else None)
        self.prefill(len(self.reduce(retention, anchors, path).tokens))


def slow_scene(grid: VideoGrid, width: int, device: torch.device) -> Tensor:
    """Return features (T, P, D), in bfloat16, of a scene that changes slowly, with noise."""
    noise = partial(torch.randn, grid.positions, width, device=device)
    scene, frames = noise(), []
    for _ in range(grid.frames):
        scene = scene * 0.95 + noise() * 0.3
        frames.append(scene.bfloat16())
    return torch.stack(frames)
