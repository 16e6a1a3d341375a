"""Requests of one engine with presets of their own: each gets its preset's answer, never another's out of a cache."""

import pytest

from aot_vllm.errors import SettingError
from demo.tiny_checkpoints import ROOT
from tests.e2e.engines import agree, request, rounding, video
from tests.e2e.qwen import made, qwen_request

RATE = 0.75
EMBEDDED, QWEN = str(ROOT / "demo" / "model"), "qwen3-vl"
"""A trained model, whose tower is deep enough for the layers of the paper, and one with text between its frames."""
ALLOWED = {
    EMBEDDED: ["paper", "diverse", "transport", "calibrated", "coverage"],
    QWEN: ["transport", "calibrated", "coverage"],
}
ARGUMENTS = {EMBEDDED: {"limit_mm_per_prompt": {"image": 0, "video": 2}, "max_model_len": 2048}, QWEN: {}}

pytestmark = pytest.mark.any_runner
models = pytest.mark.parametrize("name", [EMBEDDED, QWEN], ids=["embedded", "qwen3-vl"])


def start(start_engine, name, **settings):
    return start_engine(name, video_pruning_rate=RATE, additional_config={"aot": settings}, **ARGUMENTS[name])


def asked(name, preset=None, *, retention=None):
    """Return a request about one video with a preset, None for the engine's own settings."""
    if name == EMBEDDED:
        question = request(video(16, side=96, seed=1), retention=retention)
    else:
        question = qwen_request(*made([["video", 12, 1], "?"]), retention=retention)
    kwargs = question.get("mm_processor_kwargs", {}) | ({} if preset is None else {"aot_preset": preset})
    return question | {"mm_processor_kwargs": kwargs}


@models
def test_the_same_video_gets_the_answer_of_each_preset_whatever_lies_in_the_caches(start_engine, monkeypatch, name):
    engine, presets = start(start_engine, name, allowed_presets=ALLOWED[name]), [None, *ALLOWED[name]]
    (model,) = engine.llm.apply_model(lambda model: model)
    step = "_embed_video" if name == EMBEDDED else "_reduce"
    reduce, reduced = getattr(model, step), []
    monkeypatch.setattr(model, step, lambda *args, **kw: reduced.append(kw["preset"]) or reduce(*args, **kw))

    first = {preset: engine.ask(asked(name, preset))[0] for preset in presets}
    assert reduced == list(range(len(presets)))
    assert len({answer.prompt_tokens for answer in first.values()}) == 1
    assert len({answer.logprobs for answer in first.values()}) == len(presets)

    again = [*presets, *reversed(presets)]
    one_by_one = [engine.ask(asked(name, preset))[0] for preset in again]
    together = engine.ask(*(asked(name, preset) for preset in again))
    for answers in (one_by_one, together):
        for preset, answer in zip(again, answers, strict=True):
            assert agree(answer, first[preset], within=rounding(name)), preset
    assert len(reduced) == len(presets)


@pytest.mark.slow
@models
def test_a_preset_of_a_request_is_that_of_an_engine_started_with_it(start_engine, name):
    presets, retentions = ALLOWED[name], (None, 0.1, 1.0)
    engine = start(start_engine, name, allowed_presets=presets)
    answers = {
        (preset, retention): engine.ask(asked(name, preset, retention=retention))[0]
        for preset in presets
        for retention in retentions
    }
    for preset in presets:
        engine = start(start_engine, name, preset=preset)
        for retention in retentions:
            (own,) = engine.ask(asked(name, retention=retention))
            assert agree(answers[preset, retention], own, within=rounding(name)), (preset, retention)


def test_a_preset_that_an_engine_does_not_allow_is_refused_and_others_go_on(start_engine):
    engine = start(start_engine, EMBEDDED, allowed_presets=ALLOWED[EMBEDDED])
    (before,) = engine.ask(asked(EMBEDDED, "paper"))
    with pytest.raises(
        ValueError, match=r"must be one of .* allows, paper, diverse, transport, calibrated, coverage, got 'none'"
    ):
        engine.ask(asked(EMBEDDED, "none"))
    (after,) = engine.ask(asked(EMBEDDED, "paper"))
    assert agree(after, before, within=rounding(EMBEDDED))


def test_an_allowed_preset_whose_layers_the_tower_lacks_does_not_start(start_engine):
    with pytest.raises(SettingError, match=r"local_layer must be in \[-2, 1\].* executes 2 layers, got 5"):
        start_engine("tiny", video_pruning_rate=RATE, additional_config={"aot": {"allowed_presets": ["paper"]}})
