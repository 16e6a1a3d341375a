"""What `embed_multimodal` needs at most: never more than stock vLLM, which is what memory is profiled for.

Widths are a quarter of published models' and of the published proportions, for these decide which part needs most; one
layer after the other needs the same memory, so there are few. Neither runner has a part in it.
"""

from types import MethodType

import pytest
import torch

from tests.e2e.memory import peak_bytes

pytestmark = pytest.mark.any_runner

CHECKPOINTS = {"llava-onevision": "tiny", "qwen2.5-vl": "qwen2.5-vl", "qwen3-vl": "qwen3-vl"}
WIDTHS = {
    "llava-onevision": {
        "text_config": {"hidden_size": 896, "num_attention_heads": 28, "num_key_value_heads": 4},
        "vision_config": {"hidden_size": 288, "num_attention_heads": 4, "intermediate_size": 1076},
    },
    "qwen2.5-vl": {
        "text_config": {"hidden_size": 896, "num_attention_heads": 28, "num_key_value_heads": 4},
        "vision_config": {"hidden_size": 320, "num_heads": 4, "intermediate_size": 856, "out_hidden_size": 896},
    },
    "qwen3-vl": {
        "text_config": {"hidden_size": 640, "num_attention_heads": 20, "num_key_value_heads": 4},
        "vision_config": {"hidden_size": 288, "num_heads": 4, "intermediate_size": 1076, "out_hidden_size": 640},
    },
}
SMALLER_FRAMES = {"size": {"shortest_edge": 64 * 64, "longest_edge": 2 * 256 * 32 * 32}}
"""For Qwen3-VL, which profiles memory with two frames as large as a whole video may be: 256 tokens each, for time."""
DUST = 1.005
"""Index tensors and the like."""


@pytest.fixture(params=[(name, anchors) for name in CHECKPOINTS for anchors in ("diverse", "attention")], ids="-".join)
def model(request, start_engine):
    """Return a model, without weights that mean anything, and one video as large as memory is profiled with."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    name, anchors = request.param
    engine = start_engine(
        CHECKPOINTS[name],
        video_pruning_rate=0.75,
        load_format="dummy",
        hf_overrides=WIDTHS[name],
        mm_processor_kwargs=SMALLER_FRAMES if name == "qwen3-vl" else None,
        limit_mm_per_prompt={"image": 0, "video": 3},
        additional_config={"aot": {"anchors": anchors}},
    )
    budget = MultiModalBudget(engine.llm.llm_engine.vllm_config, MULTIMODAL_REGISTRY, enable_cache=False)
    (largest,) = budget.get_dummy_encoder_profile_inputs("video", 1)
    (model,) = engine.llm.apply_model(lambda model: model)
    return model, largest


def batch_of(*items, retention=None, longer=1):
    """Return the arguments of `embed_multimodal` for videos, each with `longer` times the patches it has.

    Of a Qwen model's video each frame has a quarter of its patches then: the tower can't look at less than a frame, and
    Qwen3-VL profiles memory with a single one.
    """
    from vllm.multimodal.utils import group_and_batch_mm_kwargs

    ((_, _, batch),) = group_and_batch_mm_kwargs(items, device=torch.device("cpu"))
    if longer > 1:
        pixels = batch["pixel_values_videos"]
        if "video_grid_thw" in batch:
            batch["pixel_values_videos"] = pixels.repeat(longer, 1)
            batch["video_grid_thw"] = (
                batch["video_grid_thw"] * torch.tensor([4 * longer, 1, 1]) // torch.tensor([1, 2, 2])
            )
            batch["timestamps"] = [times * 4 * longer for times in batch.get("timestamps", ())]
        else:
            batch["pixel_values_videos"] = pixels.repeat(1, longer, 1, 1, 1)
    if retention is not None:
        batch["aot_retention"] = torch.full_like(batch["aot_retention"], round(retention * 10**6))
    return batch


@torch.inference_mode()
def ours(model, batch):
    peak, rows = least_peak(lambda: model.embed_multimodal(**batch))
    return peak, sum(part.untyped_storage().nbytes() for part in rows)


@torch.inference_mode()
def stock(model, batch):
    """Return what the in-tree class needs for the same without pruning, run on the same weights."""
    in_tree = next(parent for parent in type(model).__mro__ if parent.__module__.startswith("vllm."))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "is_multimodal_pruning_enabled", False, raising=False)
        if hasattr(in_tree, "_process_video_pixels"):
            patch.setattr(model, "_process_video_pixels", MethodType(in_tree._process_video_pixels, model))
        return least_peak(lambda: in_tree.embed_multimodal(model, **batch))[0]


def least_peak(work):
    """Return the smaller peak of two runs: in some, a buffer of the run before is still counted."""
    return min((peak_bytes(work) for _ in range(2)), key=lambda measured: measured[0])


def test_no_video_and_no_batch_of_videos_needs_more_than_the_largest_video_needs_in_stock(model):
    model, largest = model
    ours(model, batch_of(largest))  # fills caches that stay
    profiled = stock(model, batch_of(largest))
    allowed = profiled * DUST
    for retention in (None, 0.99):
        assert ours(model, batch_of(largest, retention=retention))[0] <= allowed, retention

    together, returned = ours(model, batch_of(largest, largest))
    assert together <= allowed + returned
    assert stock(model, batch_of(largest, largest)) > 1.9 * profiled

    assert ours(model, batch_of(largest, longer=2))[0] <= allowed
    assert stock(model, batch_of(largest, longer=2)) > 1.9 * profiled
