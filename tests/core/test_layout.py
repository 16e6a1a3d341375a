import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aot_vllm import AOTConfig, VideoGrid, budget
from aot_vllm.core import layout
from aot_vllm.core.layout import copied, counts_on
from tests.strategies import many, retentions

CPU = torch.device("cpu")


@many
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_any_counts_arrive_as_they_are(counts):
    on_device = counts_on(counts, CPU)
    assert on_device.dtype == torch.long
    assert on_device.tolist() == counts


@many
@given(grid=st.builds(VideoGrid, st.integers(1, 400), st.integers(1, 20), st.integers(1, 20)), retention=retentions)
def test_the_counts_of_a_default_budget_are_computed_on_the_device(grid, retention):
    per_frame = budget(grid, retention=retention).per_frame
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "copied", None)  # a call would fail
        assert counts_on(per_frame, CPU).tolist() == list(per_frame)


def test_the_layout_of_clips_is_one_copy(monkeypatch):
    copies = []
    monkeypatch.setattr(layout, "copied", lambda values, device: copies.append(1) or copied(values, device))
    counts = budget(VideoGrid(29, 3, 5), retention=0.4, config=AOTConfig(kappa=0.3, emit="both"))
    made = layout.clip_layout(counts.clip_lengths, counts.keep_per_frame, counts.originals_per_clip, 9, CPU)
    assert len(copies) == 1
    assert made.key_frames.tolist() == [0, 4, 8, 12, 16, 20, 23, 26]
    assert [step.frames[0].item() for step in made.steps] == [1, 2, 3]
