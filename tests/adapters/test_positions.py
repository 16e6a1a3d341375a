"""M-RoPE positions of reduced prompts: exact for all sizes and for every part of a prompt."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aot_vllm.adapters.positions import (
    VisionRun,
    coordinates_of,
    position_delta,
    prompt_positions,
    settle,
    with_coordinates,
)
from tests.strategies import many

VIDEO, TEXT = 7, 1


def unreduced(parts):
    """Return the positions of a sequence of text lengths and (times, rows, cols) grids, computed in plain loops."""
    columns, position = [], 0
    for part in parts:
        if isinstance(part, int):
            columns += [(position + i,) * 3 for i in range(part)]
            position += part
        else:
            times, rows, cols = part
            columns += [
                (position + t, position + r, position + c) for t in times for r in range(rows) for c in range(cols)
            ]
            position += max(times[-1] + 1, rows, cols)
    return columns, position


@st.composite
def prompts(draw):
    """Draw text and videos in turn, and the cells that each frame of each video keeps."""
    parts = [draw(st.integers(1, 400))]
    kept = []
    for _ in range(draw(st.integers(1, 3))):
        frames, rows, cols = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
        gap = draw(st.integers(0, 1500))
        parts += [([gap * frame for frame in range(frames)], rows, cols), draw(st.integers(1, 5))]
        cells = st.lists(st.integers(0, rows * cols - 1), min_size=1, max_size=rows * cols)
        kept.append([sorted(draw(cells)) for _ in range(frames)])
    return parts, kept


@many
@given(prompt=prompts(), chunk=st.integers(1, 50))
def test_in_prefill_chunks_of_any_size_every_kept_token_has_the_position_of_its_cell(prompt, chunk):
    parts, kept = prompt
    whole, end = unreduced(parts)
    expected, ids, runs, coordinates, cursor = [], [], [], [], 0
    videos = iter(kept)
    for part in parts:
        if isinstance(part, int):
            expected += whole[cursor : cursor + part]
            ids += [TEXT] * part
            cursor += part
            continue
        times, rows, cols = part
        frames = next(videos)
        runs.append(VisionRun(len(ids), times, rows, cols, [len(cells) for cells in frames]))
        for frame, cells in enumerate(frames):
            expected += [whole[cursor + frame * rows * cols + cell] for cell in cells]
            ids += [VIDEO] * len(cells)
            coordinates += [(times[frame], cell // cols, cell % cols) for cell in cells]
        cursor += len(times) * rows * cols

    positions, delta = prompt_positions(len(ids), runs)
    assert delta == end - len(ids) == position_delta(positions)
    expected = torch.tensor(expected).T
    text = torch.tensor(ids) == TEXT
    assert torch.equal(positions[:, text], expected[:, text])
    assert torch.equal(positions[0], expected[0])

    embeddings = with_coordinates(torch.zeros(len(coordinates), 2, dtype=torch.bfloat16), torch.tensor(coordinates))
    for _ in range(2):  # the second pass is like a resumed prompt after a preemption
        taken = 0
        for start in range(0, len(ids), chunk):
            count = ids[start : start + chunk].count(VIDEO)
            rows = embeddings[taken : taken + count]
            taken += count
            if count:
                positions = settle(
                    positions,
                    torch.tensor(ids),
                    coordinates_of(rows, width=2),
                    video_token_id=VIDEO,
                    num_computed_tokens=start,
                )
                assert position_delta(positions) == delta
            window = slice(start, start + chunk)
            assert torch.equal(positions[:, window], expected[:, window])


def test_a_video_that_keeps_every_token_has_exact_positions_without_embeddings():
    positions, _ = prompt_positions(17, [VisionRun(3, (0, 2), 2, 3, (6, 6))])
    assert positions.T.tolist() == [list(column) for column in unreduced([3, ([0, 2], 2, 3), 2])[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_coordinates_survive_every_type_of_embedding(dtype):
    numbers = torch.tensor([0, 1, 255, 256, 257, 511, 2049, 3001, 65535, 65536, 2**24 - 1])
    coordinates = torch.stack((numbers, numbers.flip(0), numbers), dim=1)
    embeddings = torch.randn(len(numbers), 5).to(dtype)
    carried = with_coordinates(embeddings, coordinates)
    assert carried.dtype == dtype
    assert torch.equal(carried[:, :5], embeddings)
    assert torch.equal(coordinates_of(carried, width=5), coordinates)


def test_a_placeholder_token_written_by_a_user_after_the_videos_is_left_alone():
    ids = torch.tensor([TEXT, VIDEO, VIDEO, TEXT, VIDEO, TEXT])
    positions, _ = prompt_positions(6, [VisionRun(1, (0,), 3, 3, (2,))])
    settled = settle(positions, ids, torch.tensor([[0, 1, 2], [0, 2, 0]]), video_token_id=VIDEO, num_computed_tokens=0)
    assert settled.T.tolist() == [[0, 0, 0], [1, 2, 3], [1, 3, 1], [4, 4, 4], [5, 5, 5], [6, 6, 6]]
    assert np.array_equal(settled[:, 3:], positions[:, 3:])
