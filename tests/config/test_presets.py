"""The presets, what single settings may change of them, and what of it a cache key holds."""

import dataclasses
from itertools import product

import pytest

from aot_vllm import AOTConfig
from aot_vllm.adapters.registry import ARCHITECTURES
from aot_vllm.config import USED_WITH
from aot_vllm.errors import SettingError
from aot_vllm.presets import DEFAULTS, PRESETS, STANDARD

EVERY = {field.name for field in dataclasses.fields(AOTConfig)}
RELEASED = {
    "anchors": "attention",
    "without_sinks": False,
    "global_ratio": 0.5,
    "window": 9,
    "epsilon": 0.1,
    "iterations": 100,
    "tolerance": 0.01,
    "spatial_weight": 0.5,
    "mass": 1.0,
    "nearest_weight": 0.1,
    "temporal_sigma": 1.5,
    "clips": 8,
    "kappa": 0.3,
    "emit": "both",
    "local_layer": 5,
    "global_layer": -2,
}
"""The released code, setting by setting."""


def test_paper_is_the_released_code():
    assert AOTConfig.preset("paper") == AOTConfig.paper() == AOTConfig(**RELEASED)
    assert AOTConfig.paper().in_effect() == RELEASED


def test_diverse_moves_nothing_and_is_what_the_defaults_say():
    diverse = AOTConfig.preset("diverse")
    assert diverse == AOTConfig() == AOTConfig.preset(STANDARD)
    assert (diverse.anchors, diverse.mass, diverse.nearest_weight, diverse.kappa) == ("diverse", 0, 0, 1)


def test_transport_moves_as_released_from_anchors_by_diversity_and_emits_each_once():
    transport, paper = AOTConfig.preset("transport").in_effect(), AOTConfig.paper().in_effect()
    moving = ("mass", "nearest_weight", "kappa", "clips", "epsilon", "spatial_weight", "temporal_sigma", "tolerance")
    assert {name: transport[name] for name in moving} == {name: paper[name] for name in moving}
    assert (transport["anchors"], transport["emit"]) == ("diverse", "compact")


@pytest.mark.parametrize("name", ["released", "", None, 3, ["paper"], "Paper"])
def test_a_preset_that_there_is_not_is_refused_with_those_that_there_are(name):
    with pytest.raises(SettingError) as error:
        AOTConfig.preset(name)
    assert str(error.value) == f"preset must be one of {', '.join(PRESETS)}, got {name!r}"
    with pytest.raises(SettingError, match=r"^preset must be one of "):
        AOTConfig.from_mapping({"preset": name})


@pytest.mark.parametrize("name", PRESETS)
def test_a_mapping_names_a_preset_and_the_settings_that_it_changes(name):
    assert AOTConfig.from_mapping({"preset": name}) == AOTConfig.preset(name)
    changed = AOTConfig.from_mapping({"preset": name, "mass": 0.7, "emit": "both"})
    assert changed == dataclasses.replace(AOTConfig.preset(name), mass=0.7, emit="both")
    assert AOTConfig.from_mapping({"preset": name} | AOTConfig.preset(name).in_effect()) == AOTConfig.preset(name)


ALL_THAT_MOVE = ", ".join(name for name in PRESETS if AOTConfig.preset(name).kappa < 1)
ALL_THAT_SCORE_LOCALLY = ", ".join(name for name in PRESETS if AOTConfig.preset(name).anchors == "attention")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"window": 3},
            'window takes no effect with preset diverse, because it needs anchors "attention" and a global_ratio '
            f"below 1; presets that use it: {ALL_THAT_SCORE_LOCALLY}",
        ),
        (
            {"preset": "diverse", "clips": 8},  # also at the value that it has
            "clips takes no effect with preset diverse, because it needs a kappa below 1; "
            f"presets that use it: {ALL_THAT_MOVE}",
        ),
        (
            {"preset": "transport", "kappa": 1, "clips": 4, "window": 3},
            "clips takes no effect with preset transport, because it needs a kappa below 1; "
            f"presets that use it: {ALL_THAT_MOVE}; "
            'window takes no effect with preset transport, because it needs anchors "attention" and a global_ratio '
            f"below 1; presets that use it: {ALL_THAT_SCORE_LOCALLY}",
        ),
    ],
)
def test_a_setting_that_takes_no_effect_is_refused_by_name_with_the_presets_that_use_it(given, message):
    with pytest.raises(SettingError) as error:
        AOTConfig.from_mapping(given)
    assert str(error.value) == message


def test_presets_that_use_a_setting_are_told_by_name():
    assert {"paper", "transport"} <= set(ALL_THAT_MOVE.split(", "))
    assert "diverse" not in ALL_THAT_MOVE
    assert ALL_THAT_SCORE_LOCALLY == "paper"


def test_whether_a_setting_takes_effect_is_asked_after_all_single_settings():
    assert AOTConfig.from_mapping({"clips": 4, "kappa": 0.5}) == AOTConfig(clips=4, kappa=0.5)
    assert AOTConfig.from_mapping({"window": 7, "anchors": "attention"}).window == 7
    with pytest.raises(SettingError, match=r"^clips takes no effect with preset paper"):
        AOTConfig.from_mapping({"preset": "paper", "kappa": 1, "clips": 4})
    with pytest.raises(SettingError, match=r"^local_layer takes no effect .* a global_ratio below 1"):
        AOTConfig.from_mapping({"preset": "paper", "global_ratio": 1, "local_layer": 5})


GREEDY = {"distance", "memory"}
CALIBRATED = {"by_attention", "by_relevance"}
LOCAL = {"global_ratio", "window", "local_layer"}
MOVING = {"spatial_weight", "temporal_sigma", "clips", "epsilon", "iterations", "tolerance"}


@pytest.mark.parametrize(
    ("preset", "idle"),
    [
        ("paper", GREEDY | CALIBRATED),
        ("diverse", set(USED_WITH) - GREEDY),
        ("calibrated", LOCAL | MOVING),
        ("coverage", set(USED_WITH) - GREEDY),
        ("transport", LOCAL | CALIBRATED | {"global_layer", "without_sinks"}),
    ],
)
def test_what_is_in_effect_are_the_settings_that_change_something(preset, idle):
    assert AOTConfig.preset(preset).in_effect().keys() == EVERY - idle


OTHER = {
    "distance": "cosine",
    "memory": "all",
    "by_attention": False,
    "by_relevance": False,
    "without_sinks": True,
    "global_ratio": 0.25,
    "global_layer": 3,
    "window": 4,
    "local_layer": 3,
    "spatial_weight": 0.25,
    "temporal_sigma": 2.0,
    "clips": 3,
    "epsilon": 0.2,
    "iterations": 7,
    "tolerance": 0.5,
}
"""Another value for each setting that does not always take effect."""


def test_the_digest_changes_with_what_takes_effect_and_with_nothing_else():
    ways = product(("diverse", "attention", "calibrated", "coverage"), (0.0, 1.0), (0.3, 1.0))
    for anchors, mass, kappa in ways:
        config = AOTConfig(anchors=anchors, mass=mass, kappa=kappa)
        for name in USED_WITH:
            changed = dataclasses.replace(config, **{name: OTHER[name]})
            assert (changed.digest() != config.digest()) == config.uses(name), (name, config)
    always = {"anchors": "attention", "mass": 0.25, "nearest_weight": 0.25, "kappa": 0.25, "emit": "both"}
    assert always.keys() | USED_WITH.keys() == EVERY
    digests = {AOTConfig(**{name: value}).digest() for name, value in always.items()}
    assert len(digests | {AOTConfig().digest()}) == len(always) + 1


def test_presets_have_digests_of_their_own_that_are_the_same_in_every_process():
    assert len({AOTConfig.preset(name).digest() for name in PRESETS}) == len(PRESETS)
    assert AOTConfig.paper().digest() == "5cab99c6f3f6a4c3"


def test_every_architecture_has_a_default_with_evidence():
    assert DEFAULTS.keys() == ARCHITECTURES.keys()
    for default in DEFAULTS.values():
        assert default.preset in PRESETS
        assert all(dataclasses.astuple(one) and all(dataclasses.astuple(one)) for one in default.evidence)
        assert default.evidence


def test_transport_runs_within_and_across_frames_on_the_papers_own_model_and_nothing_moves_on_qwens():
    for architecture, default in DEFAULTS.items():
        config = AOTConfig.preset(default.preset)
        if architecture.startswith("Llava"):
            assert config.mass > 0
            assert config.kappa < 1
        else:
            assert (config.mass, config.nearest_weight, config.kappa) == (0, 0, 1)
