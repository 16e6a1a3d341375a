import io
from collections import Counter, defaultdict
from dataclasses import replace

import av
import numpy as np
import pytest

from demo.h264 import through_h264, write_h264
from demo.task import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    GRID,
    HELD_OUT,
    HISTORY_CLASSES,
    KINDS,
    MARKS,
    NO_THING,
    NUM_FRAMES,
    SHAPES,
    SIZE,
    cell_labels,
    history_labels,
    questions,
    render,
    scene,
)

SEEDS = range(120)


def pairs(made):
    return {(thing.colour, shape) for thing in made.things for shape in thing.shapes}


def test_a_seed_gives_the_same_clip_and_questions_again():
    first, again, other = (scene(seed, split="train") for seed in (5, 5, 6))
    assert questions(first) == questions(again)
    assert np.array_equal(render(first)[0], render(again)[0])
    assert not np.array_equal(render(first)[0], render(other)[0])


def test_the_splits_differ_for_the_same_seed():
    assert questions(scene(5, split="train")) != questions(scene(5, split="test"))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split must be one of .*, got 'dev'"):
        scene(0, split="dev")


def test_held_out_pairs_are_in_every_test_clip_and_in_no_training_clip():
    assert len(HELD_OUT) == len(COLOURS)
    for seed in SEEDS:
        assert not pairs(scene(seed, split="train")) & HELD_OUT
        assert pairs(scene(seed, split="test")) & HELD_OUT


def test_training_shows_every_other_pair_and_each_background():
    made = [scene(seed, split="train") for seed in range(400)]
    assert set.union(*map(pairs, made)) == {(c, s) for c in COLOURS for s in SHAPES} - HELD_OUT
    assert {style for one in made for style in one.backgrounds} == set(BACKGROUNDS)


def test_things_stay_inside_the_frame_and_a_colour_names_one():
    for seed in SEEDS:
        made = scene(seed, split="test")
        colours = [thing.colour for thing in made.things]
        assert len(set(colours)) == len(colours)
        for thing in made.things:
            seen = slice(thing.appears, thing.leaves)
            assert np.all(thing.path[seen] > thing.radii[seen, None])
            assert np.all(thing.path[seen] < SIZE - thing.radii[seen, None])


def test_a_clip_asks_no_question_twice_and_most_clips_ask_every_kind():
    kinds = Counter()
    for seed in SEEDS:
        asked = questions(scene(seed, split="test"))
        assert len({question.text for question in asked}) == len(asked)
        kinds.update({question.kind for question in asked})
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 0.5 * len(SEEDS)


def test_no_answer_to_a_question_can_be_had_without_the_clip():
    answers = defaultdict(Counter)
    for seed in range(600):
        for question in questions(scene(seed, split="train")):
            form = " ".join(word for word in question.text.split() if word.rstrip("?.,") not in (*COLOURS, *SHAPES))
            answers[form][question.answer] += 1
    for form, counts in answers.items():
        assert counts.most_common(1)[0][1] < 0.65 * counts.total(), (form, counts)


@pytest.mark.parametrize("seed", range(12))
def test_answers_agree_with_what_the_pixels_show(seed):
    """Read direction, order, number and place off the rendered owners alone."""
    made = scene(seed, split="test")
    _, owners = render(made)
    centres = []
    for index in range(len(made.things)):
        shown = [(frame, np.argwhere(owners[frame] == index)) for frame in range(NUM_FRAMES)]
        centres.append([(frame, where.mean(0)) for frame, where in shown if len(where)])
    for question in questions(made):
        by_name = [i for i, thing in enumerate(made.things) if f"the {thing.colour} one" in question.text]
        if question.text == "How many things are there?":
            assert int(question.answer) == len(centres)
        elif question.text.startswith("Which came first"):
            first = min(by_name, key=lambda index: centres[index][0][0])
            assert question.answer == made.things[first].colour
        elif question.kind == "where":
            _, (row, column) = centres[by_name[0]][0 if question.text.endswith("first?") else -1]
            assert question.answer.split() == [
                "top" if row < SIZE / 2 else "bottom",
                "left" if column < SIZE / 2 else "right",
            ]
        elif question.kind == "direction":
            down, right = centres[by_name[0]][-1][1] - centres[by_name[0]][0][1]
            moves = {"down": down, "right": right, "up": -down, "left": -right, "nowhere": 9}
            assert question.answer == max(moves, key=moves.get)


def test_cells_are_labelled_with_what_they_show():
    made = scene(1, split="train")
    pictures, owners = render(made, frames=[8])
    labels = cell_labels(made, 8, owners[0])
    thing = next(thing for thing in made.things if thing.visible(8))
    column, row = (thing.path[8] // CELL).astype(int)
    assert labels.colour[row, column] == list(COLOURS).index(thing.colour) + 1
    assert labels.shape[row, column] == SHAPES.index(thing.shapes[8]) + 1
    assert labels.mark[row, column] == MARKS.index(thing.mark) + 1
    assert np.allclose((np.array([column, row]) + 0.5 + labels.centre[row, column]) * CELL, thing.path[8])
    assert (labels.row[row, column], labels.column[row, column]) == (row + 1, column + 1)
    assert (labels.colour.shape, pictures.shape) == ((GRID, GRID), (1, SIZE, SIZE, 3))
    empty = replace(made, things=(), speck=None)
    nothing = cell_labels(empty, 8, np.full((SIZE, SIZE), NO_THING))
    assert not nothing.colour.any()
    assert not nothing.speck.any()
    assert nothing.background.all()


def history(made, frames=range(NUM_FRAMES)):
    """What `history_labels` says, by name and thing: its last cell that tells something, None if none does."""
    _, owners = render(made, frames=frames)
    colours = np.stack([cell_labels(made, frame, owner).colour for frame, owner in zip(frames, owners, strict=True)])
    labels = history_labels(made, frames, colours)
    told = {}
    for name, classes in HISTORY_CLASSES.items():
        for thing in made.things:
            here = labels[name][colours == 1 + list(COLOURS).index(thing.colour)]
            told[name, thing.colour] = classes[here[-1] - 1] if here.size and here[-1] else None
    return labels, told


@pytest.mark.parametrize("seed", range(40))
def test_what_a_whole_clip_has_shown_is_what_is_answered_of_it(seed):
    made = scene(seed, split="test")
    labels, told = history(made)
    for thing in made.things:
        assert told["direction", thing.colour] == thing.direction
        assert told["change", thing.colour] == thing.change
        assert told["before", thing.colour] == sum(other.appears < thing.appears for other in made.things)
    for question in questions(made):
        named = [thing for thing in made.things if f"the {thing.colour} one" in question.text]
        if question.text.endswith("first?") and question.kind == "where":
            assert told["first place", named[0].colour] == question.answer
    assert set(labels["count"][-1].flat) == {1 + len(made.things)}
    assert set(labels["cut"][-1].flat) == {1 + made.cut}
    speck = "none" if made.speck is None else made.speck.colour
    assert set(labels["speck seen"][-1].flat) == {1 + HISTORY_CLASSES["speck seen"].index(speck)}


def test_what_has_been_seen_is_counted_frame_by_frame():
    made = scene(
        next(s for s in range(99) if len({t.appears for t in scene(s, split="test").things}) > 2), split="test"
    )
    labels, _ = history(made)
    for frame in range(NUM_FRAMES):
        assert set(labels["count"][frame].flat) == {1 + sum(thing.appears <= frame for thing in made.things)}


def test_of_one_frame_nothing_can_have_moved_or_changed():
    made = scene(3, split="test")
    labels, told = history(made, frames=[8])
    seen = [thing.colour for thing in made.things if thing.visible(8)]
    assert {told["direction", colour] for colour in seen} == {"nowhere"}
    assert {told["change", colour] for colour in seen} == {"nothing"}
    assert set(labels["cut"].flat) == {1}


def test_a_clip_comes_back_from_h264_nearly_as_it_was():
    pictures, _ = render(scene(2, split="test"))
    file = io.BytesIO()
    write_h264(file, pictures)
    with av.open(io.BytesIO(file.getvalue())) as container:
        assert container.streams.video[0].codec_context.name == "h264"
    back = through_h264(pictures)
    assert back.shape == pictures.shape
    assert np.abs(back.astype(int) - pictures).mean() < 6
