"""Train the embedded model from nothing: `python -m demo.train DIRECTORY` (a run's state), resumed when called again.

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from demo.answering import BLOCKS, HEAD, answer_logits, frame_features, normalise, pack, without_never_shown
from demo.batches import FRAMES_PER_SCENE, Batch, Batches, Stage, frames_and_labels
from demo.card import card
from demo.checkpoint import SPECIAL_TOKENS, Shape, llava_onevision, save, train_tokenizer
from demo.evaluate import evaluate
from demo.lessons import cell_heads, cell_loss, every_cell, history_heads, history_loss, some_cells
from demo.task import GRID, NUM_FRAMES, SIZE, corpus, history_labels, scene

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
CHECKPOINT_SECONDS = 120
TEST_EVERY = 250  # steps


STAGES = (
    Stage("tower", 1700, 8, FRAMES_PER_SCENE, 2e-3, trains_tower=True, trains_text=False),
    Stage("text-4", 600, 16, 4, 2e-3, trains_tower=False, trains_text=True),
    Stage("text-8", 600, 12, 8, 1.5e-3, trains_tower=False, trains_text=True),
    Stage("text-16", 450, 8, 16, 1.5e-3, trains_tower=False, trains_text=True),
    Stage("parts", 1000, 12, 16, 1.2e-3, trains_tower=False, trains_text=True, in_part=0.8),
    Stage("joint", 4000, 8, 16, 6e-4, trains_tower=True, trains_text=True, in_part=0.5),
)
SMOKE = tuple(replace(stage, steps=2, batch=2) for stage in STAGES)
OWN_PRESET = {"preset": "diverse", "mass": 0.2}
"""What the plugin runs on this model: the attention of its small tower does not find what questions are about."""
HISTORY_LAYER = 2  # of the text model: the later layers can read what this layer has gathered
HISTORY_WEIGHT = 1.0


def initialise(model: Any) -> None:
    """Scale the drawn weights for a deep stack: additions to the residual stream start small, positions do not."""
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
        self.model.config.aot = OWN_PRESET
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


def main() -> None:
    """Train, or export the current state of a run."""
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
