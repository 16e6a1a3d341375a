"""Sizes of published models, and the work that follows from them. A multiplication with its addition is 2 FLOPs."""

from dataclasses import dataclass

from aot_vllm import VideoGrid, budget

RETENTIONS = (1.0, 0.25, 0.10, 0.05)
TEXT_TOKENS = 30
"""Tokens of a prompt that are not the video's: the chat template and a short question."""


@dataclass(frozen=True)
class Tower:
    """A vision tower. A frame has `rows` x `cols` patches; `merge` x `merge` of them become one token.

    With a `merge` of 1 the features are pooled instead. In every `whole_every`-th layer a patch attends to the whole
    frame, in the others to its window. `outputs`: features of a token, side by side (deepstack has several).
    """

    layers: int
    width: int
    heads: int
    mlp: int
    gated: bool
    pixels: int
    merge: int
    out: int
    outputs: int = 1
    whole_every: int = 1
    window: int = 8

    def windows(self, rows: int, cols: int) -> int:
        """Return the number of windows of a frame. Here all have the mean size; in the model the last are smaller."""
        return -(-rows // self.window) * -(-cols // self.window)

    def flops(self, rows: int, cols: int) -> int:
        """Return the work on one frame."""
        patches = rows * cols
        layer = 2 * patches * (4 * self.width**2 + (3 if self.gated else 2) * self.width * self.mlp)
        whole = self.layers // self.whole_every
        context = whole * patches + (self.layers - whole) * patches // self.windows(rows, cols)
        wide = self.width * self.merge**2
        hidden = wide if self.merge > 1 else self.out
        head = 2 * patches // self.merge**2 * (wide * hidden + hidden * self.out) * self.outputs
        return 2 * patches * self.pixels * self.width + self.layers * layer + 4 * patches * context * self.width + head


@dataclass(frozen=True)
class Text:
    """A decoder with gated MLPs and heads of `width / heads`."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int

    def flops(self, tokens: int) -> int:
        """Return the work of a prefill. A token attends to those before it, half of all on average."""
        head = self.width // self.heads
        weights = self.width * (2 * self.heads + 2 * self.kv_heads) * head + 3 * self.width * self.mlp
        return self.layers * (2 * tokens * weights + 2 * tokens**2 * self.width)


@dataclass(frozen=True)
class Case:
    """A video to a model: the patches of a frame, and the tokens that the model makes of it."""

    name: str
    tower: Tower
    text: Text
    patches: tuple[int, int]
    grid: VideoGrid

    def kept(self, retention: float) -> int:
        """Return how many of the video's tokens are left."""
        return budget(self.grid, retention=retention).total

    def tower_flops(self) -> int:
        """Return the work of the tower on the video."""
        return self.grid.frames * self.tower.flops(*self.patches)

    def prefill_flops(self, retention: float) -> int:
        """Return the work of the prefill."""
        return self.text.flops(self.kept(retention) + TEXT_TOKENS)

    def limit(self, retention: float) -> float:
        """Return how many times less work the tower and the reduced prefill are than the tower and the whole one."""
        tower = self.tower_flops()
        return (tower + self.prefill_flops(1.0)) / (tower + self.prefill_flops(retention))


SIGLIP = Tower(26, 1152, 16, 4304, gated=False, pixels=588, merge=1, out=3584)
"""SigLIP so400m has 27 layers; LLaVA-OneVision runs 26 of them."""
QWEN25_TOWER = Tower(32, 1280, 16, 3420, gated=True, pixels=1176, merge=2, out=3584, whole_every=8)
QWEN3_TOWER = Tower(27, 1152, 16, 4304, gated=False, pixels=1536, merge=2, out=4096, outputs=4)
QWEN2_7B = Text(28, 3584, 28, 4, 18944)
QWEN3_8B = Text(36, 4096, 32, 8, 12288)
CASES = (
    Case("LLaVA-OneVision-7B", SIGLIP, QWEN2_7B, (27, 27), VideoGrid(32, 14, 14)),
    Case("Qwen2.5-VL-7B", QWEN25_TOWER, QWEN2_7B, (30, 40), VideoGrid(64, 15, 20)),
    Case("Qwen3-VL-8B", QWEN3_TOWER, QWEN3_8B, (30, 40), VideoGrid(64, 15, 20)),
    Case("Qwen3-VL-8B", QWEN3_TOWER, QWEN3_8B, (20, 20), VideoGrid(384, 10, 10)),
)
TINY_TEXT = Text(2, 32, 4, 2, 64)
TINY = (
    Case("tiny, pooled", Tower(4, 32, 4, 48, False, 12, 1, 32), TINY_TEXT, (9, 9), VideoGrid(4, 5, 5)),
    Case("tiny, merged", Tower(4, 32, 4, 48, True, 12, 2, 32, 2, 2, 4), TINY_TEXT, (8, 12), VideoGrid(5, 4, 6)),
)
