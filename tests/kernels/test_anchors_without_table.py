"""Without a table of products the anchors are still those of `core`, whether one program chooses or several do."""

import inspect
import math
import threading

import pytest
import torch

from aot_vllm import VideoGrid
from aot_vllm.core import anchors, distances
from tests.strategies import noise, video

tl = pytest.importorskip("triton.language")  # the interpreter looks for it beside the functions that it runs
kernel = pytest.importorskip("aot_vllm.kernels.anchors")


@pytest.fixture(autouse=True)
def no_table(monkeypatch):
    monkeypatch.setattr(distances, "TABLE_BYTES", 1)


def both(kernels, device, features, **arguments):
    chosen = kernels.select_diverse_anchors(features.to(device), **arguments)
    return chosen.cpu(), anchors.select_diverse_anchors(features, **arguments)


@pytest.mark.parametrize(
    ("frames", "positions", "width", "count"),
    [(1, 1, 4, 1), (3, 1, 4, 1), (4, 3, 2, 3), (3, 63, 16, 9), (3, 196, 24, 5), (2, 729, 16, 3), (1, 2000, 8, 2)],
)
def test_the_choice_is_that_of_core(kernels, device, frames, positions, width, count, monkeypatch):
    monkeypatch.setattr(kernel, "TOKENS", 16 if positions < 729 else 256)
    features = video(positions, VideoGrid(frames, positions, 1), width)[0]
    keep = [count - frame % 2 for frame in range(frames)]
    chosen, expected = both(kernels, device, features, count=count, keep=keep)
    assert torch.equal(chosen, expected)


def test_with_a_table_and_without_the_choice_is_the_same(kernels, device, monkeypatch):
    features = video(9, VideoGrid(4, 6, 6), 16)[0]
    without = kernels.select_diverse_anchors(features.to(device), count=7, keep=[7, 0, 3, 5])
    monkeypatch.undo()
    assert torch.equal(kernels.select_diverse_anchors(features.to(device), count=7, keep=[7, 0, 3, 5]), without)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_give_the_choice_of_core(kernels, device, dtype):
    features = video(1, VideoGrid(3, 7, 7), 16)[0].to(dtype)
    chosen, expected = both(kernels, device, features, count=6)
    assert torch.equal(chosen, expected)


def test_a_token_is_read_in_several_runs_of_columns(kernels, device, monkeypatch):
    monkeypatch.setattr(kernel, "COLUMNS", 16)
    chosen, expected = both(kernels, device, video(2, VideoGrid(2, 5, 5), 40)[0], count=6)
    assert torch.equal(chosen, expected)


def test_ties_go_to_the_lowest_position(kernels, device):
    """Lengths are whole numbers, and products of them are exact. So equal distances are equal bits."""
    axes = torch.eye(4).repeat(10, 1) * torch.arange(1, 4).repeat(14)[:40, None]
    chosen, expected = both(kernels, device, torch.stack([axes, axes.flip(0), axes.flip(0)]), count=14)
    assert torch.equal(chosen, expected)


def test_constant_frames_give_every_position_once(kernels, device):
    chosen, expected = both(kernels, device, torch.ones(3, 20, 4), count=20)
    assert torch.equal(chosen, expected)
    assert (chosen.sort(dim=1).values == torch.arange(20)).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which computes with NumPy
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nan_changes_neither_the_count_nor_the_choice(kernels, device, value):
    features = noise(6, 3, 30, 8)
    features[1, 7, 2] = value
    chosen, expected = both(kernels, device, features, count=8)
    assert (chosen.sort(dim=1).values.diff(dim=1) > 0).all()
    assert torch.equal(chosen, expected)


def test_strided_features_are_read_as_they_lie(kernels, device):
    features = video(8, VideoGrid(3, 4, 5), 16)[0]
    strided = features.transpose(0, 1).contiguous().transpose(0, 1)
    chosen, expected = both(kernels, device, strided[:, :, ::2], count=5)
    assert torch.equal(chosen, expected)


@pytest.fixture
def side_by_side(monkeypatch):
    """Let the interpreter run the programs of a launch in threads, instead of one after the other."""
    from triton.runtime import interpreter

    builder, here = interpreter.interpreter_builder, threading.local()

    def program_id(axis):
        return interpreter.TensorHandle(interpreter.np.array([here.place[axis]], dtype=interpreter.np.int32), tl.int32)

    class SideBySide(interpreter.GridExecutor):
        def __call__(self, *arguments, **options):
            program, threads, failed = self.fn, [], []

            def run(place, named):
                here.place = place
                try:
                    program(**named)
                except BaseException as error:
                    failed.append(error)

            def begin(**named):
                threads.append(threading.Thread(target=run, args=(builder.grid_idx, named), daemon=True))
                if len(threads) == math.prod(builder.grid_dim):
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join(60)
                    assert not any(thread.is_alive() for thread in threads)

            begin.__signature__ = inspect.signature(program)
            self.fn = begin
            super().__call__(*arguments, **options)
            assert not failed

    monkeypatch.setattr(builder, "create_get_program_id", program_id)
    monkeypatch.setattr(interpreter, "GridExecutor", SideBySide)


@pytest.mark.parametrize("programs", [2, 3])
def test_programs_that_run_at_once_agree_on_the_choice_of_core(kernels, device, programs, side_by_side, monkeypatch):
    if device.type == "cuda":
        pytest.skip("a GPU runs several programs in every test above")
    monkeypatch.setattr(kernel, "programs_at_once", lambda device: programs)
    monkeypatch.setattr(kernel, "TOKENS", 8)
    features = video(4, VideoGrid(3, 7, 7), 12)[0]
    features[2, 11] = features[2, 30]
    chosen, expected = both(kernels, device, features, count=6, keep=[4, 0, 6])
    assert torch.equal(chosen, expected)


@pytest.mark.parametrize("memory", ["previous", "carried", "all"])
def test_weights_distance_and_memory_have_the_meaning_of_core(kernels, device, memory, monkeypatch):
    monkeypatch.setattr(kernel, "TOKENS", 32)
    features, weights = video(9, VideoGrid(4, 5, 6), 16)[0], noise(10, 4, 30).exp()
    arguments = {"count": 4, "keep": [0, 3, 4, 2], "distance": "cosine", "memory": memory}
    expected = anchors.select_diverse_anchors(features, weights=weights, **arguments)
    chosen = kernels.select_diverse_anchors(features.to(device), weights=weights.to(device), **arguments)
    assert torch.equal(chosen.cpu(), expected)
