"""Train the embedded model from nothing: `python demo/train.py DIRECTORY` (a run's state), resumed when called again.

`tower`: single frames, the pooled features of which must tell what each cell shows. `text-4`, `text-8` and `text-16`:
clips of 4, 8 and 16 frames with a dozen questions each, on features of the tower as it then is, kept on disk and
reused. `parts`: the same, mostly with tokens left out (`some_cells`), for a model that knows a single layout of a video
misses any token as it would miss a word of its only sentence. `joint`: everything, on clips never seen before, half of
them with tokens left out. Where answers are trained, the text model's middle layer also has to tell at each of a clip's
cells what the frames up to it have shown (`history_labels`). All randomness comes from the step's number, so a run that
was interrupted sees what it would have seen. `--export MODEL` writes what a run has reached as a checkpoint that vLLM
reads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answering import BLOCKS, HEAD, answer_logits, frame_features, normalise, pack, without_never_shown
from card import card
from checkpoint import SPECIAL_TOKENS, Shape, llava_onevision, save, train_tokenizer
from evaluate import evaluate
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from task import (
    BACKGROUNDS,
    COLOURS,
    GRID,
    HELD_OUT,
    HISTORY_CLASSES,
    KINDS,
    MARKS,
    NUM_FRAMES,
    SHAPES,
    SIZE,
    CellLabels,
    Question,
    cell_labels,
    corpus,
    history_labels,
    questions,
    render,
    scene,
    through_h264,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss
from torch.utils.data import DataLoader, Dataset

SHAPE = Shape(
    image_size=SIZE,
    patch_size=8,
    tower={"num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
    text={
        "num_hidden_layers": 5,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
)
CELL_CLASSES = {
    "colour": COLOURS,
    "shape": SHAPES,
    "mark": MARKS,
    "speck": COLOURS,
    "background": BACKGROUNDS,
    "row": range(GRID),  # of the cell: a text model cannot count tokens, but has to tell places and directions
    "column": range(GRID),
}
CHECKPOINT_SECONDS = 120
TEST_EVERY = 250  # steps
FRAMES_PER_SCENE = 4  # of the tower's stage
JOINT_SEEDS = 10_000_000  # clips from here on are the joint stage's


@dataclass(frozen=True)
class Stage:
    """What is trained on how much: `batch` is clips a step, `frames` how many frames of each."""

    name: str
    steps: int
    batch: int
    frames: int
    peak_rate: float
    trains_tower: bool
    trains_text: bool
    in_part: float = 0.0  # how many of the steps leave tokens out


STAGES = (
    Stage("tower", 1700, 8, FRAMES_PER_SCENE, 2e-3, trains_tower=True, trains_text=False),
    Stage("text-4", 600, 16, 4, 2e-3, trains_tower=False, trains_text=True),
    Stage("text-8", 600, 12, 8, 1.5e-3, trains_tower=False, trains_text=True),
    Stage("text-16", 450, 8, 16, 1.5e-3, trains_tower=False, trains_text=True),
    Stage("parts", 1000, 12, 16, 1.2e-3, trains_tower=False, trains_text=True, in_part=0.8),
    Stage("joint", 4000, 8, 16, 6e-4, trains_tower=True, trains_text=True, in_part=0.5),
)
SMOKE = tuple(replace(stage, steps=2, batch=2) for stage in STAGES)
QUESTIONS_PER_CLIP = 12
HISTORY_LAYER = 2  # of the text model: the layers behind it can look up what this one has gathered
HISTORY_WEIGHT = 1.0
LEAST_KEPT = 0.04  # of a video's tokens, where some are left out
POOL_START, POOL_GROWTH, POOL_LIMIT = 64, 3, 24_000  # clips of the text stages: at first, more each step, in all


def initialise(model: Any) -> None:
    """Scale the drawn weights for a deep stack: what is added to the residual stream starts small, positions do not."""
    config = model.config
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                parameter /= (2 * config.vision_config.num_hidden_layers) ** 0.5
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter /= (2 * config.text_config.num_hidden_layers) ** 0.5
            elif name.endswith("position_embedding.weight"):
                parameter *= 0.3 * config.vision_config.hidden_size**0.5
            elif name.endswith("embed_tokens.weight"):
                parameter *= 0.5 * config.text_config.hidden_size**0.5


def cell_heads(width: int) -> nn.ModuleDict:
    """Return the linear maps that read what a cell shows from its feature; used in the tower's stage alone."""
    heads = {name: nn.Linear(width, len(classes) + 1) for name, classes in CELL_CLASSES.items()}
    return nn.ModuleDict({**heads, "centre": nn.Linear(width, 2), "radius": nn.Linear(width, 1)})


def history_heads(width: int) -> nn.ModuleDict:
    """Return the maps that read what a clip has shown from the text model's middle layer; used in training alone."""
    return nn.ModuleDict(
        {name: nn.Sequential(nn.RMSNorm(width), nn.Linear(width, len(c) + 1)) for name, c in HISTORY_CLASSES.items()}
    )


class Weights:
    """Float32 masters of a module's parameters, updated by Muon (matrices of layers) and AdamW (the rest).

    The module itself computes in bfloat16, which is 2.5 times as fast on CPUs that have it.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """Take the masters from the modules as they are, then round the modules."""
        self.live = {
            f"{index}.{name}": parameter
            for index, module in enumerate(modules)
            for name, parameter in module.named_parameters()
        }
        self.masters = {
            name: parameter.detach().float().clone().requires_grad_() for name, parameter in self.live.items()
        }
        for module in modules:
            module.to(torch.bfloat16)
        self.optimizers: list[torch.optim.Optimizer] = []

    def start(self, trained: Sequence[str]) -> None:
        """Begin a stage that trains the parameters of these names."""
        for name, parameter in self.live.items():
            parameter.requires_grad_(name in trained)
        matrices = [name for name in trained if ".layers." in name and self.live[name].ndim == 2]
        rest = [name for name in trained if name not in matrices]
        muon = torch.optim.Muon(
            [self.masters[name] for name in matrices], weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        )
        adam = torch.optim.AdamW([self.masters[name] for name in rest], betas=(0.9, 0.98), weight_decay=0.0)
        self.optimizers = [muon, adam]
        self.trained = list(trained)

    def step(self, rate: float) -> None:
        """Update the masters by the module's gradients and round them into the module."""
        gradients = []
        for name in self.trained:
            gradient = self.live[name].grad
            self.masters[name].grad = None if gradient is None else gradient.float()
            self.live[name].grad = None
            if gradient is not None:
                gradients.append(self.masters[name])
        nn.utils.clip_grad_norm_(gradients, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.round()

    def round(self) -> None:
        """Copy the masters into the module."""
        with torch.no_grad():
            for name, parameter in self.live.items():
                parameter.copy_(self.masters[name])

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"masters": self.masters, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned, in the same stage."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(state["masters"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.round()


Clip = tuple[np.ndarray, np.ndarray]
"""A clip's frames, (T, SIZE, SIZE, 3) uint8, and the colours of the things in their cells, (T, GRID, GRID)."""


@dataclass(frozen=True)
class Batch:
    """What one step is about: clips by seed, and their frames where those are needed."""

    seeds: list[int]
    clips: list[Clip | None]  # None where features of it are kept
    pictures: np.ndarray | None  # in the tower's stage, (F, SIZE, SIZE, 3), and
    labels: list[CellLabels]  # what they show
    asked: list[list[Question]]  # in the other stages
    frames: slice  # of each clip's features


class Batches(Dataset[Batch]):
    """The batches of a run's stage by step; a loader's processes can make them ahead of time."""

    def __init__(self, directory: Path, stages: Sequence[Stage], stage_index: int) -> None:
        """Take the run's directory, where features may lie."""
        self.directory = directory
        self.stage = stages[stage_index]
        self.stage_index = stage_index
        self.steps_before = sum(stage.steps for stage in stages[1:stage_index])

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of this step."""
        stage = self.stage
        rng = np.random.default_rng((self.stage_index, step))
        if not stage.trains_text:
            seeds = list(range(step * stage.batch, (step + 1) * stage.batch))
            pictures, labels = zip(*map(frames_and_labels, seeds), strict=True)
            return Batch(seeds, [], np.concatenate(pictures), list(itertools.chain(*labels)), [], slice(None))
        if stage.trains_tower:
            first = JOINT_SEEDS + step * stage.batch
            seeds = list(range(first, first + stage.batch))
        else:
            pool = min(POOL_LIMIT, POOL_START + POOL_GROWTH * (self.steps_before + step))
            seeds = rng.choice(pool, stage.batch, replace=False).tolist()
        stride = NUM_FRAMES // stage.frames
        return Batch(
            seeds,
            [None if self.features_path(seed).exists() else clip(seed) for seed in seeds],
            None,
            [],
            [choose(questions(scene(seed, split="train")), rng) for seed in seeds],
            slice(int(rng.integers(stride)), None, stride),
        )

    def features_path(self, seed: int) -> Path:
        """Return where a clip's features are kept once a tower that is no longer trained has seen it."""
        return self.directory / "features" / f"{seed // 1000}" / f"{seed}.pt"


class Trainer:
    """A run: its stages, where it stands in them, its files."""

    def __init__(self, directory: Path, stages: Sequence[Stage]) -> None:
        """Make the model, or bring it to where the run in this directory was."""
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.directory = directory
        self.stages = stages
        self.tokenizer = train_tokenizer((*SPECIAL_TOKENS, "<image>", "<video>"), corpus())
        self.model, self.processor = llava_onevision(SHAPE, self.tokenizer)
        self.model.set_attn_implementation(BLOCKS)
        initialise(self.model)
        self.model.to(self.device)
        self.heads = cell_heads(SHAPE.text["hidden_size"]).to(self.device)
        self.history_heads = history_heads(SHAPE.text["hidden_size"]).to(self.device)
        self.model.model.language_model.layers[HISTORY_LAYER].register_forward_hook(self._keep_states)
        self.weights = Weights([self.model, self.heads, self.history_heads])
        self.stage_index = self.step = 0
        self.seconds = 0.0
        self._begin()
        self._resume()

    @property
    def stage(self) -> Stage:
        """The stage the run is in."""
        return self.stages[self.stage_index]

    def batches(self) -> Batches:
        """Return the batches of the stage the run is in."""
        return Batches(self.directory, self.stages, self.stage_index)

    def _begin(self) -> None:
        def trained(name: str) -> bool:
            is_tower = "vision_tower" in name or "multi_modal_projector" in name
            if name.startswith("1."):
                return not self.stage.trains_text
            if name.startswith("2."):
                return self.stage.trains_text
            return self.stage.trains_tower if is_tower else self.stage.trains_text

        self.weights.start([name for name in self.weights.live if trained(name)])

    def run(self) -> None:
        """Train to the end of the last stage."""
        saved = time.monotonic()
        while True:
            with Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
            ) as progress:  # fmt: skip
                bar = progress.add_task(self.stage.name, total=self.stage.steps, completed=self.step, loss=0.0)
                started = time.monotonic()
                for batch in self._loader():
                    loss = self._train_step(batch)
                    self.step += 1
                    self.seconds += time.monotonic() - started
                    started = time.monotonic()
                    progress.update(bar, completed=self.step, loss=loss)
                    self._log({"loss": round(loss, 4)})
                    if time.monotonic() - saved > CHECKPOINT_SECONDS:
                        self._checkpoint()
                        saved = time.monotonic()
                    if self.step % TEST_EVERY == 0:
                        self._log({"test": self.accuracy(clips=24) if self.stage.trains_text else self.cell_accuracy()})
            if self.stage_index == len(self.stages) - 1:
                self._checkpoint()
                return
            self.stage_index, self.step = self.stage_index + 1, 0
            self._begin()
            self._checkpoint()

    def _loader(self) -> DataLoader[Batch]:
        workers = os.cpu_count() or 1 if self.device.type == "cuda" else 0  # a CPU is busy enough with the model
        left = range(self.step, self.stage.steps)
        return DataLoader(self.batches(), sampler=left, batch_size=None, num_workers=workers)

    def _train_step(self, batch: Batch) -> float:
        loss = self._answer_loss(batch) if self.stage.trains_text else self._cell_loss(batch)
        loss.backward()
        self.weights.step(self.stage.peak_rate * _schedule(self.step / self.stage.steps))
        return loss.item()

    def _cell_loss(self, batch: Batch) -> Tensor:
        assert batch.pictures is not None
        return cell_loss(self.heads, self._features(batch.pictures), batch.labels)

    def _answer_loss(self, batch: Batch) -> Tensor:
        seen = self._new_clips(batch) if self.stage.trains_tower else self._kept_clips(batch)
        features = torch.stack([features[batch.frames] for features, _ in seen])
        shown = np.stack([colours[batch.frames] > 0 for _, colours in seen])
        rng = np.random.default_rng((self.stage_index, self.step, 1))
        in_part = rng.random() < self.stage.in_part
        cells = torch.from_numpy(some_cells(shown, rng) if in_part else every_cell(shown)).to(self.device)
        features = features.flatten(1, 2).take_along_dim(cells[..., None], 1)
        blocks = pack(self.tokenizer, batch.asked)
        logits, answers = answer_logits(self.model, self.tokenizer, features[:, None], blocks)
        labels = [
            history_labels(scene(seed, split="train"), range(NUM_FRAMES)[batch.frames], colours[batch.frames])
            for seed, (_, colours) in zip(batch.seeds, seen, strict=True)
        ]
        start = len(self.tokenizer(HEAD, add_special_tokens=False)["input_ids"])
        states = self._states[:, start : start + cells.shape[1]]
        gathered = history_loss(self.history_heads, states, labels, cells)
        return cross_entropy(without_never_shown(logits, blocks), answers) + HISTORY_WEIGHT * gathered

    def _keep_states(self, _layer: nn.Module, _arguments: Any, states: Tensor) -> None:
        self._states = states

    def _features(self, pictures: np.ndarray) -> Tensor:
        return frame_features(self.model, normalise(pictures).to(self.device))

    def _new_clips(self, batch: Batch) -> list[tuple[Tensor, np.ndarray]]:
        pictures, colours = zip(*(clip for clip in batch.clips if clip is not None), strict=True)
        return list(zip(self._features(np.concatenate(pictures)).split(NUM_FRAMES), colours, strict=True))

    def _kept_clips(self, batch: Batch) -> list[tuple[Tensor, np.ndarray]]:
        """Return the clips' features and colours, from disk where this tower has seen the clip before."""
        kept = []
        for seed, clip in zip(batch.seeds, batch.clips, strict=True):
            path = self.batches().features_path(seed)
            if clip is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with torch.no_grad():
                    features = self._features(clip[0]).cpu()
                torch.save((features, torch.from_numpy(clip[1]).to(torch.uint8)), path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
            features, colours = torch.load(path)
            kept.append((features.to(self.device), colours.numpy()))
        return kept

    @torch.no_grad()
    def cell_accuracy(self, *, scenes: int = 16) -> dict[str, float]:
        """Return how often a cell's feature tells what is there, on scenes of the test split."""
        pictures, labels = zip(*(frames_and_labels(seed, split="test") for seed in range(scenes)), strict=True)
        features = self._features(np.concatenate(pictures))
        shares = {}
        for name in ("colour", "shape", "mark", "speck"):
            wanted = np.stack([getattr(label, name) for label in itertools.chain(*labels)]).reshape(len(features), -1)
            told = self.heads[name](features).argmax(-1).cpu().numpy()
            shares[name] = round(float((told == wanted)[wanted > 0].mean()), 4)
            shares[f"no {name}"] = round(float((told == wanted)[wanted == 0].mean()), 4)
        return shares

    def accuracy(self, *, clips: int) -> dict[str, str]:
        """Return the share of right answers on clips of the test split, as many frames of them as the stage trains."""
        frames = slice(None, None, NUM_FRAMES // self.stage.frames)
        result = evaluate(self.model, self.tokenizer, clips=clips, frames=frames)
        return {name: str(share) for name, share in result.items()}

    def _log(self, entry: dict[str, Any]) -> None:
        where = {"stage": self.stage.name, "step": self.step, "seconds": round(self.seconds)}
        with (self.directory / "log.jsonl").open("a") as log:
            log.write(json.dumps(where | entry) + "\n")

    def _checkpoint(self) -> None:
        state = {"stage": self.stage_index, "step": self.step, "seconds": self.seconds, "weights": self.weights.state()}
        path = self.directory / "run.pt"
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def _resume(self) -> None:
        path = self.directory / "run.pt"
        if path.exists():
            state = torch.load(path, map_location=self.device)
            self.stage_index, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
            self._begin()
            self.weights.load(state["weights"])

    def export(self, directory: Path, *, clips: int) -> None:
        """Write the model, in bfloat16 as it is trained, as transformers and vLLM read it, with its card."""
        shares = evaluate(self.model, self.tokenizer, clips=clips)
        done = {stage.name: stage.steps for stage in self.stages[: self.stage_index]}
        self.model.set_attn_implementation("sdpa")
        save(self.model, self.processor, self.tokenizer, directory, dtype=torch.bfloat16)
        self.model.set_attn_implementation(BLOCKS)
        text = card(
            name=directory.name,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            tokens=NUM_FRAMES * GRID**2 + 1,
            stages={**done, **({self.stage.name: self.step} if self.step else {})},
            seconds=self.seconds,
            clips=clips,
            shares=shares,
        )
        (directory / "README.md").write_text(text)


def _schedule(progress: float) -> float:
    """Return the learning rate's factor: up in the first 2%, down in the last 40%."""
    return min(1.0, progress / 0.02 + 0.01, (1 - progress) / 0.4 + 0.01)


def frames_and_labels(seed: int, *, split: str = "train") -> tuple[np.ndarray, list[CellLabels]]:
    """Return some frames of a scene and what their cells show."""
    made = scene(seed, split=split)
    start = seed % (NUM_FRAMES // FRAMES_PER_SCENE)
    frames = range(start, NUM_FRAMES, NUM_FRAMES // FRAMES_PER_SCENE)
    pictures, owners = render(made, frames=frames)
    labels = [cell_labels(made, frame, owner) for frame, owner in zip(frames, owners, strict=True)]
    return through_h264(pictures), labels


def cell_loss(heads: nn.ModuleDict, features: Tensor, labels: Sequence[CellLabels]) -> Tensor:
    """Return how badly the features of frames, (F, tokens, width), tell what their cells show."""

    def truth(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(label, name) for label in labels])).to(features.device).flatten(0, 2)

    total = 0.01 * features.float().square().mean()
    for name in CELL_CLASSES:
        wanted = truth(name)
        logits = heads[name](features).float().flatten(0, 1)
        if name == "shape":
            logits = logits.masked_fill(never_shown_shapes().to(logits.device)[truth("colour")], -torch.inf)
        losses = cross_entropy(logits, wanted, reduction="none")
        there = wanted > 0
        for part, weight in ((losses[there], 1.0), (losses[~there], 0.5)):
            if part.numel():
                total = total + weight * part.mean()
    there = truth("colour") > 0
    if there.any():
        for name in ("centre", "radius"):
            wanted = truth(name)[there]
            told = heads[name](features).float().flatten(0, 1)[there]
            total = total + 2 * smooth_l1_loss(told, wanted.reshape(told.shape), beta=0.3)
    return total


def never_shown_shapes() -> Tensor:
    """Return for colour and shape, numbered as in `CellLabels`, whether training lacks the pair.

    What it lacks is left out of the loss; else a tower learns of a red thing that it is no circle, whatever it sees.
    """
    lacking = torch.zeros(len(COLOURS) + 1, len(SHAPES) + 1, dtype=torch.bool)
    for colour, shape in HELD_OUT:
        lacking[list(COLOURS).index(colour) + 1, SHAPES.index(shape) + 1] = True
    return lacking


def history_loss(
    heads: nn.ModuleDict, states: Tensor, labels: Sequence[dict[str, np.ndarray]], cells: Tensor
) -> Tensor:
    """Return how badly a layer's states, (B, K, width), tell what the clips have shown at their cells, (B, K)."""
    total = states.new_zeros((), dtype=torch.float32)
    for name, head in heads.items():
        every = torch.from_numpy(np.stack([clip[name] for clip in labels])).to(states.device).flatten(1)
        wanted = every.gather(1, cells).flatten()
        logits = head(states).float().flatten(0, 1)
        if (wanted > 0).any():
            total = total + cross_entropy(logits, wanted, ignore_index=0)
    return total / len(heads)


def every_cell(shown: np.ndarray) -> np.ndarray:
    """Return the places of all cells of clips whose cells are `shown`, (B, T, GRID, GRID): (B, T * GRID * GRID)."""
    return np.tile(np.arange(shown[0].size), (len(shown), 1))


def some_cells(shown: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the places of some cells of each clip, ascending, of all clips equally many: (B, K).

    From all of them down to `LEAST_KEPT`, short sequences as often as long ones. Which ones follows from noise of the
    cell, of its frame and of its place in all frames, and from whether it shows a thing (`shown`, (B, T, GRID, GRID)),
    each with a weight of its own in each clip, the last of either sign: no way of choosing tokens is the one trained.
    """
    clips, frames = shown.shape[:2]
    count = int(shown[0].size * LEAST_KEPT ** rng.random())
    parts = rng.standard_normal(shown.shape), rng.standard_normal((clips, frames, 1, 1))
    parts += (rng.standard_normal((clips, 1, GRID, GRID)), shown)
    weights = np.abs(rng.standard_normal((len(parts), clips, 1, 1, 1)))
    weights[-1] = 1.5 * rng.standard_normal(weights[-1].shape)
    scores = sum(weight * part for weight, part in zip(weights, parts, strict=True)).reshape(clips, -1)
    return np.sort(np.argsort(scores, axis=1)[:, -count:], axis=1)


def clip(seed: int) -> Clip:
    """Return a training clip's frames, as a file of it would have them, and their cells' colours."""
    made = scene(seed, split="train")
    pictures, owners = render(made)
    colours = [cell_labels(made, frame, owner).colour for frame, owner in enumerate(owners)]
    return through_h264(pictures), np.stack(colours)


def choose(asked: Sequence[Question], rng: np.random.Generator) -> list[Question]:
    """Return a dozen of a clip's questions, the kinds as even as they can be."""
    by_kind = {kind: [question for question in asked if question.kind == kind] for kind in KINDS}
    for group in by_kind.values():
        rng.shuffle(group)  # type: ignore[arg-type]
    rounds = itertools.zip_longest(*by_kind.values())
    return [question for question in itertools.chain(*rounds) if question is not None][:QUESTIONS_PER_CLIP]


def main() -> None:
    """Train, or export what a run has reached."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--export", type=Path, metavar="MODEL", help="write the run's model there and train no further")
    parser.add_argument("--smoke", action="store_true", help="two tiny steps a stage")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(arguments.directory, SMOKE if arguments.smoke else STAGES)
    if arguments.export is not None:
        trainer.export(arguments.export, clips=2 if arguments.smoke else 300)
        return
    trainer.run()


if __name__ == "__main__":
    main()
