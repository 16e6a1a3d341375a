"""Engines whose vision tower runs otherwise than in most: not at all, or, for images, in CUDA graphs."""

import pytest

from tests.e2e.engines import prompt
from tests.e2e.qwen import qwen_request

QUESTION = "What is a video?"


def text_alone(name):
    return qwen_request(QUESTION) if name.startswith("qwen") else {"prompt": prompt(question=QUESTION)}


@pytest.mark.parametrize("name", ["tiny", "qwen2.5-vl"])
def test_an_engine_without_a_tower_answers_text(start_engine, name):
    """As a language model alone, whose tower has no weights. Videos it refuses, as vLLM does without AOT."""
    arguments = {"language_model_only": True, "limit_mm_per_prompt": {}}
    (expected,) = start_engine(name, **arguments).ask(text_alone(name))
    (answer,) = start_engine(name, video_pruning_rate=0.75, **arguments).ask(text_alone(name))
    assert answer == expected


@pytest.mark.parametrize("name", ["qwen2.5-vl", pytest.param("qwen3-vl", marks=pytest.mark.slow)])
def test_graphs_of_the_tower_are_for_images_alone(start_engine, name):
    """A CPU has no graphs; what vLLM asks a model before it captures any is the same everywhere."""
    engine = start_engine(name, video_pruning_rate=0.75)
    (config,) = engine.llm.apply_model(lambda model: model.get_encoder_cudagraph_config())
    assert config.modalities == ["image"]
    assert config.max_frames_per_video == 1
