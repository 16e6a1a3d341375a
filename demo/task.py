"""Make the demo's task: clips whose questions have known answers, each the same for the same seed.

A clip is 16 frames of 96 x 96 pixels. One to five things (a colour, a shape, a mark on it) stand or move before one of
six backgrounds; they appear, leave, pass behind each other and change in size, shape or speed; a speck may show up for
a few frames, and the scene may be cut. No two things of a clip share a colour, so a colour names a thing.

Each colour has one shape that it never has in a clip of the `train` split (`HELD_OUT`); every clip of the `test` split
has at least one such pair. `python -m demo.task FILE --seed N` writes a clip of it and prints its questions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo.h264 import write_h264

NUM_FRAMES = 16
SIZE = 96
CELL = 16  # pixels of a video token's side: patches of 8, pooled by 2
GRID = SIZE // CELL

COLOURS = {
    "red": (215, 35, 40),
    "green": (40, 165, 60),
    "blue": (55, 90, 230),
    "yellow": (235, 220, 60),
    "purple": (150, 60, 200),
    "orange": (240, 135, 25),
    "white": (245, 245, 245),
    "cyan": (50, 205, 220),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
MARKS = ("none", "dot", "line", "ring")
DIRECTIONS = {"nowhere": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CHANGES = ("nothing", "size", "shape", "speed")
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = ("gradient", "noise", "stripes", "checks", "waves", "flicker")
SPLITS = ("train", "test")
KINDS = ("what", "where", "how many", "direction", "first", "changed", "detail")
HELD_OUT = frozenset((colour, SHAPES[index % len(SHAPES)]) for index, colour in enumerate(COLOURS))

LARGE, SMALL = 14.0, 9.0  # radii before and after a change of size
SPECK_RADIUS = 3.0
NO_THING = -1


@dataclass(frozen=True)
class Thing:
    """A coloured shape with a mark on it; `path` is its centre (x, y), `radii` its radius, a row for every frame."""

    colour: str
    shapes: tuple[str, ...]  # one for every frame
    mark: str
    direction: str
    change: str
    appears: int  # first frame
    leaves: int  # frame after the last
    path: np.ndarray
    radii: np.ndarray

    def visible(self, frame: int) -> bool:
        """Return whether the thing is there in this frame."""
        return self.appears <= frame < self.leaves

    @property
    def shape(self) -> str | None:
        """The shape it has throughout, None if that changes."""
        return self.shapes[0] if self.shapes[0] == self.shapes[-1] else None


@dataclass(frozen=True)
class Speck:
    """A small coloured disc that stays where it is."""

    colour: str
    x: float
    y: float
    appears: int
    leaves: int

    def visible(self, frame: int) -> bool:
        """Return whether the speck is there in this frame."""
        return self.appears <= frame < self.leaves


@dataclass(frozen=True)
class Scene:
    """The content of a clip; earlier objects in `things` pass behind later ones."""

    seed: tuple[int, int]
    things: tuple[Thing, ...]
    speck: Speck | None
    backgrounds: tuple[str, ...]  # one for every frame

    @property
    def cut(self) -> bool:
        """Whether the background changes."""
        return self.backgrounds[0] != self.backgrounds[-1]


@dataclass(frozen=True)
class Question:
    """A question about a clip, its answer and its kind, one of `KINDS`.

    `never_shown` are the answers that it never has in training because their pair is held out. That they are wrong
    there must not be taught: it says nothing about shapes and colours.
    """

    kind: str
    text: str
    answer: str
    never_shown: tuple[str, ...] = ()


# ---- scenes


def scene(seed: int, *, split: str) -> Scene:
    """Return the scene of this seed in `train` or `test`."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    entropy = (SPLITS.index(split), seed)
    rng = np.random.default_rng(entropy)
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))]
    wanted = int(rng.integers(1, 6))
    things: list[Thing] = []
    for colour in colours[:wanted]:
        held_out = split == "test" and (not things or rng.random() < 0.25)
        for _ in range(30):
            favoured = things[0].shape if things else None
            thing = _thing(rng, colour, split=split, favoured=favoured, held_out=held_out)
            if all(_apart(thing, other) for other in things):
                things.append(thing)
                break
    speck = _speck(rng, things) if rng.random() < 0.8 else None
    first, second = (str(style) for style in rng.choice(BACKGROUNDS, 2, replace=False))
    cut = int(rng.integers(4, NUM_FRAMES - 3)) if rng.random() < 0.5 else NUM_FRAMES
    backgrounds = tuple(first if frame < cut else second for frame in range(NUM_FRAMES))
    order = rng.permutation(len(things))
    return Scene(entropy, tuple(things[index] for index in order), speck, backgrounds)


def _shape(
    rng: np.random.Generator, colour: str, *, split: str, favoured: str | None = None, other_than: str | None = None
) -> str:
    choices = [s for s in SHAPES if s != other_than and (split == "test" or (colour, s) not in HELD_OUT)]
    if favoured in choices and rng.random() < 0.35:
        return favoured
    return str(rng.choice(choices))


def _thing(rng: np.random.Generator, colour: str, *, split: str, favoured: str | None, held_out: bool) -> Thing:
    """Return a thing that moves and changes as the generator will have it, of the favoured shape more often."""
    pair = next(shape for name, shape in HELD_OUT if name == colour)
    shape = pair if held_out else _shape(rng, colour, split=split, favoured=favoured)
    appears, leaves = 0, NUM_FRAMES
    presence = rng.random()
    if presence < 0.35:
        appears = int(rng.integers(2, NUM_FRAMES - 7))
    elif presence < 0.55:
        leaves = int(rng.integers(8, NUM_FRAMES - 1))
    change = str(rng.choice(CHANGES, p=(0.4, 0.2, 0.2, 0.2)))
    moving = ("left", "right", "up", "down")
    direction = str(rng.choice(moving)) if change == "speed" or rng.random() < 0.8 else "nowhere"

    length = leaves - appears
    middle = int(rng.integers(length // 2 - 1, length // 2 + 2))  # the change's frame, counted from its appearance
    steps = np.arange(length)
    changed = steps >= middle
    radius = rng.uniform(10.0, 12.5)
    radii = np.full(length, radius)
    shapes = [shape] * length
    progress = steps / (length - 1)
    if change == "size":
        before, after = (LARGE, SMALL) if rng.random() < 0.5 else (SMALL, LARGE)
        radii = np.where(changed, after, before)
    elif change == "shape":
        other = _shape(rng, colour, split=split, other_than=shape)
        shapes = [other if late else shape for late in changed]
    elif change == "speed":  # it stops, or starts, in the middle
        moves = np.clip(steps / middle, 0, 1), np.clip((steps - middle) / (length - 1 - middle), 0, 1)
        progress = moves[int(rng.integers(2))]

    margin = radii.max() + 1
    span = SIZE - 2 * margin
    travel = rng.uniform(32, min(span, 60)) * np.array(DIRECTIONS[direction])
    low = margin + np.maximum(-travel, 0)
    high = SIZE - margin - np.maximum(travel, 0)
    start = rng.uniform(low, high)
    path = np.zeros((NUM_FRAMES, 2))
    path[appears:leaves] = start + progress[:, None] * travel
    every_radius = np.zeros(NUM_FRAMES)
    every_radius[appears:leaves] = radii
    every_shape = (shapes[0],) * appears + tuple(shapes) + (shapes[-1],) * (NUM_FRAMES - leaves)
    mark = str(rng.choice(MARKS))
    return Thing(colour, every_shape, mark, direction, change, appears, leaves, path, every_radius)


def _apart(one: Thing, other: Thing) -> bool:
    """Return whether two things hide each other for four frames at most, none of them their first or last two."""
    met = 0
    for frame in range(NUM_FRAMES):
        if not (one.visible(frame) and other.visible(frame)):
            continue
        if np.linalg.norm(one.path[frame] - other.path[frame]) >= 0.9 * (one.radii[frame] + other.radii[frame]):
            continue
        met += 1
        if any(not (thing.appears + 2 <= frame < thing.leaves - 2) for thing in (one, other)):
            return False
    return met <= 4


def _speck(rng: np.random.Generator, things: Sequence[Thing]) -> Speck | None:
    """Return a speck that no object hides, or None if a few tries find no place for it."""
    appears = int(rng.integers(0, NUM_FRAMES - 3))
    leaves = min(NUM_FRAMES, appears + int(rng.integers(4, 8)))
    colour = str(rng.choice(list(COLOURS)))
    for _ in range(30):
        x, y = rng.uniform(6, SIZE - 6, 2)
        free = all(
            np.linalg.norm(thing.path[frame] - (x, y)) > thing.radii[frame] + SPECK_RADIUS + 3
            for thing in things
            for frame in range(appears, leaves)
            if thing.visible(frame)
        )
        if free:
            return Speck(colour, float(x), float(y), appears, leaves)
    return None


# ---- pixels

ROWS, COLS = (axis + 0.5 for axis in np.mgrid[0:SIZE, 0:SIZE].astype(np.float32))


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return how far outside a shape of radius 1 the points (u right, v down) are, negative inside."""
    if shape == "circle":
        return np.hypot(u, v) - 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.86
    if shape == "triangle":
        return np.maximum(v - 0.75, 0.894 * abs(u) - 0.447 * (v + 1.1))
    if shape == "star":
        return np.hypot(u, v) - 0.75 - 0.32 * np.cos(5 * (np.arctan2(v, u) + np.pi / 2))
    if shape == "cross":
        return np.minimum(np.maximum(abs(u) - 0.38, abs(v) - 1), np.maximum(abs(v) - 0.38, abs(u) - 1))
    return (abs(u) + abs(v) - 1.15) / 1.414  # diamond


def _mark_distance(mark: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return how far outside a mark the points (pixels right and down of its centre) are, negative inside."""
    if mark == "dot":
        return np.hypot(x, y) - 2.7
    if mark == "line":
        return np.maximum(abs(x) - 4.6, abs(y) - 1.1)
    return abs(np.hypot(x, y) - 3.4) - 1.0  # ring


def _background(style: str, frame: int, rng: np.random.Generator) -> np.ndarray:
    """Return a frame's background, (SIZE, SIZE, 3) float in about 30 to 130, muted; same generator, same texture."""
    x, y = COLS / SIZE, ROWS / SIZE
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    if style == "gradient":
        texture = along
    elif style == "noise":
        coarse = rng.uniform(-1, 1, (SIZE // 4, SIZE // 4))
        texture = np.kron(coarse, np.ones((4, 4)))
    elif style == "stripes":
        texture = np.sign(np.sin(2 * np.pi * along * rng.uniform(4, 9)))
    elif style == "checks":
        side = int(rng.integers(6, 14))
        texture = np.where((COLS // side + ROWS // side) % 2 == 0, 1.0, -1.0)
    elif style == "waves":  # drifts
        waves = [rng.uniform(-7, 7, 2) for _ in range(3)]
        phases = rng.uniform(0, 2 * np.pi, 3)
        texture = (
            sum(
                np.sin(2 * np.pi * (a * x + b * y) + phase + 0.5 * frame)
                for (a, b), phase in zip(waves, phases, strict=True)
            )
            / 1.5
        )
    else:  # flicker: new in every frame
        rng.bit_generator.advance(1000 * frame)
        texture = np.kron(rng.uniform(-1, 1, (SIZE // 2, SIZE // 2)), np.ones((2, 2)))
    generator_tint = np.random.default_rng(int(1e6 * angle))
    tint = generator_tint.uniform(0.8, 1.15, 3)
    brightness = generator_tint.uniform(60, 100)
    return np.asarray((brightness + 22 * texture)[..., None] * tint, np.float32)


def _blend(picture: np.ndarray, distance: np.ndarray, colour: Sequence[float]) -> np.ndarray:
    """Paint a colour where the distance in pixels is negative, edges smoothed; return where it was painted."""
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]
    picture += coverage * (np.asarray(colour, np.float32) - picture)
    painted: np.ndarray = distance < 0
    return painted


def render(scene: Scene, *, frames: Sequence[int] = range(NUM_FRAMES)) -> tuple[np.ndarray, np.ndarray]:
    """Return these frames, (T, SIZE, SIZE, 3) uint8, and the thing each pixel shows, (T, SIZE, SIZE), or NO_THING."""
    pictures, owners = [], []
    for frame in frames:
        style = scene.backgrounds[frame]
        texture = np.random.default_rng((*scene.seed, BACKGROUNDS.index(style), 1))
        picture = _background(style, frame, texture)
        owner = np.full((SIZE, SIZE), NO_THING)
        for index, thing in enumerate(scene.things):
            if thing.visible(frame):
                x, y = COLS - thing.path[frame, 0], ROWS - thing.path[frame, 1]
                radius = thing.radii[frame]
                outside = radius * _distance(thing.shapes[frame], x / radius, y / radius)
                owner[_blend(picture, outside, COLOURS[thing.colour])] = index
                if thing.mark != "none":
                    _blend(picture, _mark_distance(thing.mark, x, y), (0, 0, 0))
        if scene.speck is not None and scene.speck.visible(frame):
            away = np.hypot(COLS - scene.speck.x, ROWS - scene.speck.y) - SPECK_RADIUS
            _blend(picture, away, COLOURS[scene.speck.colour])
        grain = np.random.default_rng((*scene.seed, frame, 2)).normal(0, 3, picture.shape)
        pictures.append(np.clip(picture + grain, 0, 255).astype(np.uint8))
        owners.append(owner)
    return np.stack(pictures), np.stack(owners)


@dataclass(frozen=True)
class CellLabels:
    """The content of a frame's cells, each (GRID, GRID): indices into the lists above plus one, 0 for none."""

    colour: np.ndarray
    shape: np.ndarray
    mark: np.ndarray  # index into MARKS plus one
    speck: np.ndarray  # its colour
    background: np.ndarray
    row: np.ndarray  # of the cell, plus one
    column: np.ndarray
    centre: np.ndarray  # (GRID, GRID, 2) from the cell's centre to the thing's, in cells
    radius: np.ndarray  # in cells


def cell_labels(scene: Scene, frame: int, owner: np.ndarray) -> CellLabels:
    """Return the object that covers most of each cell, at least an eighth of it; `owner` comes from `render`."""
    cells = owner.reshape(GRID, CELL, GRID, CELL).swapaxes(1, 2).reshape(GRID, GRID, -1)
    shares = np.stack([(cells == index).mean(-1) for index in range(len(scene.things))] or [np.zeros((GRID, GRID))])
    most = np.where(shares.max(0) >= 0.125, shares.argmax(0), NO_THING)
    labels = {name: np.zeros((GRID, GRID), np.int64) for name in ("colour", "shape", "mark", "speck")}
    centre, radius = np.zeros((GRID, GRID, 2), np.float32), np.zeros((GRID, GRID), np.float32)
    middles = (np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), -1) + 0.5) * CELL
    for index, thing in enumerate(scene.things):
        here = most == index
        labels["colour"][here] = list(COLOURS).index(thing.colour) + 1
        labels["shape"][here] = SHAPES.index(thing.shapes[frame]) + 1
        labels["mark"][here] = MARKS.index(thing.mark) + 1
        centre[here] = (thing.path[frame] - middles[here]) / CELL
        radius[here] = thing.radii[frame] / CELL
    speck = scene.speck
    if speck is not None and speck.visible(frame):
        labels["speck"][int(speck.y) // CELL, int(speck.x) // CELL] = list(COLOURS).index(speck.colour) + 1
    background = np.full((GRID, GRID), BACKGROUNDS.index(scene.backgrounds[frame]) + 1)
    row, column = np.mgrid[1 : GRID + 1, 1 : GRID + 1]
    return CellLabels(**labels, background=background, row=row, column=column, centre=centre, radius=radius)


SIZES = ("small", "medium", "large")
NO_YES = ("no", "yes")
HISTORY_CLASSES: dict[str, Sequence[Any]] = {
    # of the thing in the cell
    "direction": tuple(DIRECTIONS),  # from where it was first seen
    "change": CHANGES,  # that it has been seen to make
    "first place": PLACES,
    "first shape": SHAPES,
    "first size": SIZES,
    "moves": NO_YES,  # since the last frame seen
    "moved": NO_YES,  # at any time
    "stood": NO_YES,
    "before": range(6),  # things that came before it
    "alike": range(6),  # things seen so far whose shape is that of this one
    # of the clip
    "count": range(6),  # things seen so far
    "cut": NO_YES,  # whether the background has changed
    "speck seen": ("none", *COLOURS),
    **{f"{colour} seen": NO_YES for colour in COLOURS},
}


def history_labels(scene: Scene, frames: Sequence[int], colours: np.ndarray) -> dict[str, np.ndarray]:
    """Return labels of the frames up to each one: for each of `HISTORY_CLASSES` an index plus one, (T, GRID, GRID).

    `frames` are those that are seen, `colours`, (T, GRID, GRID), what `CellLabels` has of each. 0 where there is
    nothing to tell: no thing in the cell, or a close call.
    """
    labels = {name: np.zeros(colours.shape, np.int64) for name in HISTORY_CLASSES}

    def tell(name: str, where: tuple[Any, ...], value: object) -> None:
        if value is not None:
            labels[name][where] = 1 + list(HISTORY_CLASSES[name]).index(value)

    seen: dict[int, list[int]] = {}  # things by index, and the frames they were seen in
    speck = "none"
    for t, frame in enumerate(frames):
        for index, thing in enumerate(scene.things):
            if thing.visible(frame):
                seen.setdefault(index, []).append(frame)
        if scene.speck is not None and scene.speck.visible(frame):
            speck = scene.speck.colour
        tell("count", (t,), len(seen))
        tell("cut", (t,), NO_YES[scene.backgrounds[frame] != scene.backgrounds[frames[0]]])
        tell("speck seen", (t,), speck)
        for colour in COLOURS:
            tell(f"{colour} seen", (t,), NO_YES[any(scene.things[index].colour == colour for index in seen)])
        for index, thing in enumerate(scene.things):
            if not thing.visible(frame):
                continue
            here = t, colours[t] == 1 + list(COLOURS).index(thing.colour)
            first, shape = seen[index][0], thing.shapes[frame]
            steps = np.abs(np.diff(thing.path[seen[index]], axis=0)).sum(1)
            tell("direction", here, _moved(thing.path[first], thing.path[frame]))
            tell("change", here, _change_seen(thing, seen[index]))
            tell("first place", here, _place(thing, first))
            tell("first shape", here, thing.shapes[first])
            tell("first size", here, _size(thing.radii[first]))
            tell("moves", here, NO_YES[bool(len(steps) and steps[-1] > 0)])
            tell("moved", here, NO_YES[bool((steps > 0).any())])
            tell("stood", here, NO_YES[bool((steps == 0).any())])
            tell("before", here, sum(earlier[0] < first for earlier in seen.values()))
            tell("alike", here, sum(scene.things[other].shapes[seen[other][-1]] == shape for other in seen))
    return labels


def _size(radius: float) -> str:
    """Return which of `SIZES` a radius in pixels is."""
    return SIZES[int(radius > SMALL) + int(radius >= LARGE)]


def _moved(start: np.ndarray, end: np.ndarray) -> str:
    """Return the direction from one place to another, in pixels, "nowhere" if they are half a cell apart or less."""
    x, y = end - start
    if max(abs(x), abs(y)) <= CELL / 2:
        return "nowhere"
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def _change_seen(thing: Thing, frames: Sequence[int]) -> str:
    """Return the changes that these frames of an object, in order, show."""
    last = frames[-1]
    if thing.shapes[frames[0]] != thing.shapes[last]:
        return "shape"
    if thing.change == "size" and thing.radii[frames[0]] != thing.radii[last]:
        return "size"
    steps = np.abs(np.diff(thing.path[list(frames)], axis=0)).sum(1)
    if thing.change == "speed" and (steps > 0).any() and (steps == 0).any():
        return "speed"
    return "nothing"


# ---- questions


def _place(thing: Thing, frame: int) -> str | None:
    """Return the quarter of the frame a thing's centre is in, None when that is a close call."""
    x, y = thing.path[frame] - SIZE / 2
    if min(abs(x), abs(y)) < 6:
        return None
    return PLACES[2 * (y > 0) + (x > 0)]


def _about_one(thing: Thing, things: Sequence[Thing]) -> list[Question]:
    """Return the questions about one thing."""
    name = f"the {thing.colour} one"
    asked = [
        Question("direction", f"Which way does {name} move?", thing.direction),
        Question("changed", f"What changes about {name}?", thing.change),
        Question("detail", f"Which mark is on {name}?", thing.mark),
    ]
    for when, frame in (("first", thing.appears), ("last", thing.leaves - 1)):
        place = _place(thing, frame)
        if place is not None:
            asked.append(Question("where", f"Where is {name} {when}?", place))
    if thing.shape is not None:
        held_out = tuple(shape for colour, shape in sorted(HELD_OUT) if colour == thing.colour)
        asked.append(Question("what", f"Which shape is {name}?", thing.shape, held_out))
        if not any(thing.shape in other.shapes for other in things if other is not thing):
            held_out = tuple(colour for colour, shape in sorted(HELD_OUT) if shape == thing.shape)
            asked.append(Question("what", f"Which colour is the {thing.shape}?", thing.colour, held_out))
    return asked


def questions(scene: Scene) -> list[Question]:
    """Return every question that this scene answers without doubt."""
    things = scene.things
    asked = [
        Question("how many", "How many things are there?", str(len(things))),
        Question("changed", "Does the scene change?", "yes" if scene.cut else "no"),
        Question("detail", "Which colour is the speck?", "none" if scene.speck is None else scene.speck.colour),
    ]
    absent = [shape for shape in SHAPES if not any(shape in thing.shapes for thing in things)]
    absent = absent[scene.seed[1] % max(len(absent), 1) :][:1]
    for shape in sorted({*absent, *(thing.shapes[0] for thing in things)}):
        if all(thing.shape is not None or shape not in thing.shapes for thing in things):
            count = sum(thing.shape == shape for thing in things)
            asked.append(Question("how many", f"How many of shape {shape} are there?", str(count)))
    for thing in things:
        asked += _about_one(thing, things)
    for one in things:
        for other in things:
            if one.appears <= other.appears - 2:
                for names in ((one.colour, other.colour), (other.colour, one.colour)):
                    text = "Which came first, the {} one or the {} one?".format(*names)
                    asked.append(Question("first", text, one.colour))
    arrivals = sorted(things, key=lambda thing: thing.appears)
    if len(arrivals) > 1 and arrivals[-2].appears <= arrivals[-1].appears - 2:
        asked.append(Question("first", "Which one comes last?", arrivals[-1].colour))
    return asked


def corpus() -> list[str]:
    """Return the words of all questions and answers, for a tokenizer to learn."""
    texts = []
    for seed in range(200):
        for question in questions(scene(seed, split="train")):
            texts += [question.text, question.answer]
    return texts + [*COLOURS, *SHAPES] * 20


def main() -> None:
    """Write the clip that the command line asks for and print its questions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="test")
    arguments = parser.parse_args()
    made = scene(arguments.seed, split=arguments.split)
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    write_h264(arguments.file, render(made)[0])
    for question in questions(made):
        print(f"{question.text}  {question.answer}")


if __name__ == "__main__":
    main()
