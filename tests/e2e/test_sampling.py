"""Frames that the processor samples: as many as in stock vLLM, and then the share of them that the budget says."""

import pytest

from aot_vllm import VideoGrid, budget
from tests.e2e.engines import video
from tests.e2e.qwen import metadata, qwen_request

RATE = 0.75
FRAMES = 24


def asked(sampling, retention=None):
    """Return a question about 24 frames, two a second, of which the processor is to take some."""
    clip = video(FRAMES, side=96)
    about = {**metadata(FRAMES, 2.0), "do_sample_frames": True}
    question = qwen_request(clip, "What happens?", retention=retention)
    kwargs = {**question.get("mm_processor_kwargs", {}), "do_sample_frames": True, **sampling}
    return {**question, "multi_modal_data": {"video": [(clip, about)]}, "mm_processor_kwargs": kwargs}


@pytest.mark.any_runner
@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_what_is_left_is_a_share_of_the_frames_that_a_request_has_sampled(start_engine, name):
    samplings = [{"fps": 1.0}, {"fps": 0.5}, {"num_frames": 8, "fps": None}]
    engine = start_engine(name)
    stock = [engine.ask(asked(sampling), max_tokens=1)[0].prompt for sampling in samplings]
    assert len({len(prompt) for prompt in stock}) > 1

    engine = start_engine(name, video_pruning_rate=RATE)
    pad = engine.llm.llm_engine.model_config.hf_config.video_token_id
    for sampling, prompt in zip(samplings, stock, strict=True):
        (whole,) = engine.ask(asked(sampling, retention=1.0), max_tokens=1)
        assert whole.prompt == prompt, sampling
        (reduced,) = engine.ask(asked(sampling), max_tokens=1)
        units = prompt.count(pad) // 9
        assert reduced.prompt.count(pad) == budget(VideoGrid(units, 3, 3), retention=1 - RATE).total, sampling
        others = [[token for token in tokens if token != pad] for tokens in (prompt, reduced.prompt)]
        assert others[0] == others[1], sampling  # timestamps among them
