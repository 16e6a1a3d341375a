"""The reduction never waits for the device: it reads no value back, and no shape depends on data."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aot_vllm import AOTConfig, VideoGrid, reduce_video
from aot_vllm.core import sinkhorn
from tests.strategies import video

READING = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "histc",
    "repeat_interleave",
}
GEOMETRIES = [
    (VideoGrid(1, 1, 1), 0.5),
    (VideoGrid(1, 27, 27), 0.1),
    (VideoGrid(8, 14, 14), 0.1),
    (VideoGrid(9, 3, 40), 0.37),
    (VideoGrid(33, 27, 27), 0.1),
    (VideoGrid(40, 5, 7), 0.9),
    (VideoGrid(100, 2, 3), 0.5),
    (VideoGrid(5, 4, 4), 1.0),
]
CONFIGS = (AOTConfig(), AOTConfig.paper(), AOTConfig.preset("transport"), AOTConfig(mass=0.2, emit="both"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("grid", "retention"), GEOMETRIES)
def test_meta_tensors_pass_through_the_whole_reduction(grid, retention, config, dtype):
    features = torch.empty(grid.frames, grid.positions, 16, dtype=dtype, device="meta")
    scores = torch.empty(grid.frames, grid.positions, device="meta")
    reduced = reduce_video(
        features, scores, scores, grid=grid, retention=retention, config=dataclasses.replace(config, iterations=3)
    )
    for tensor in (reduced.tokens, reduced.frames, reduced.rows, reduced.cols, reduced.unconverged):
        assert tensor.device.type == "meta"
    assert reduced.tokens.shape == (reduced.budget.total, 16)
    assert reduced.tokens.dtype == dtype


class Recorder(TorchDispatchMode):
    """Records every operation that reads values back, or whose output shape depends on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8)
            for part in (args[1] if isinstance(args[1], (list, tuple)) else args[1:])
        )
        if name in READING or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("grid", "retention"), GEOMETRIES[:6])
def test_the_only_reads_are_those_that_end_a_solve_early_on_the_cpu(grid, retention, config):
    inputs = video(1, grid)
    with Recorder() as recorder:
        reduced = reduce_video(*inputs, grid=grid, retention=retention, config=config)
    # There is one read per iteration of each loop. The problems of a step share a loop, so reads are fewer.
    assert set(recorder.found) <= {"_local_scalar_dense", "is_nonzero"}
    assert len(recorder.found) <= 2 * reduced.iterations.sum()


def test_the_recorder_notices_every_kind_of_read():
    values = torch.arange(4.0)
    for reading in (lambda: values[0].item(), lambda: values[values > 1], lambda: bool(values.any()), values.nonzero):
        with Recorder() as recorder:
            reading()
        assert recorder.found


@pytest.mark.parametrize("joint", [True, False])
def test_ending_early_and_holding_the_solution_give_the_same_result(joint, monkeypatch):
    cost = torch.rand(5, 20, 9, generator=torch.Generator().manual_seed(1)) * 2
    arguments = {
        "row_mass": torch.full((5, 20), 0.05),
        "epsilon": 0.1,
        "iterations": 30,
        "tolerance": 1e-2,
        "joint": joint,
    }
    early = sinkhorn.sinkhorn(cost, **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "any", lambda tensor: True)
        held = sinkhorn.sinkhorn(cost, **arguments)
    assert early.iterations.max() < 30
    for name in ("plan", "iterations", "error", "converged"):
        assert torch.equal(getattr(early, name), getattr(held, name))
