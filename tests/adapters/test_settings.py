"""Settings, on their way from the operator's command line to every process."""

import json
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest

from aot_vllm import AOTConfig
from aot_vllm.adapters.settings import PluginSettings, Reduction, from_ppm, to_ppm
from aot_vllm.errors import SettingError
from aot_vllm.presets import DEFAULTS


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, {"aot": None}, {"aot": {}}])
def test_without_aot_settings_all_settings_are_defaults(additional):
    assert PluginSettings.from_additional_config(additional) == PluginSettings()


def test_switches_of_the_plugin_and_settings_of_the_method_are_given_side_by_side():
    settings = PluginSettings.from_additional_config({"aot": {"enabled": False, "kappa": 0.5, "clips": 2}})
    assert settings == PluginSettings(enabled=False, method={"kappa": 0.5, "clips": 2})


@pytest.mark.parametrize("name", [field.name for field in fields(PluginSettings) if field.name != "method"])
def test_every_setting_of_the_plugin_can_be_given(name):
    default = getattr(PluginSettings(), name)
    given = {"kernels": "torch", "allowed_presets": ("paper",)}.get(name, not default)
    assert given != default
    assert PluginSettings.from_additional_config({"aot": {name: given}}) == PluginSettings(**{name: given})


def test_who_computes_is_a_setting_of_the_plugin_and_not_of_the_method():
    settings = PluginSettings.from_additional_config({"aot": {"kernels": "torch", "mass": 0.1}})
    assert settings == PluginSettings(kernels="torch", method={"mass": 0.1})
    with pytest.raises(SettingError, match="kernels must be one of auto, triton, torch, got 'cuda'"):
        PluginSettings.from_additional_config({"aot": {"kernels": "cuda"}})


def test_an_attached_reduction_is_read_back():
    multimodal_config = SimpleNamespace()
    reduction = Reduction(
        retention=0.125,
        method=AOTConfig(kappa=0.5, local_layer=3),
        preset="transport",
        allowed_presets=("paper",),
        kernels="torch",
    )
    reduction.attach(multimodal_config)
    assert Reduction.of(multimodal_config) == reduction
    json.dumps(vars(multimodal_config))


def test_a_model_configuration_without_a_reduction_says_how_to_get_one():
    with pytest.raises(SettingError, match="carries no AOT settings; start vLLM with --video-pruning-rate"):
        Reduction.of(SimpleNamespace())


@pytest.mark.parametrize("hundredths", range(1, 101))
def test_a_retention_in_hundredths_comes_back_from_millionths_unchanged(hundredths):
    assert from_ppm(to_ppm(hundredths / 100)) == hundredths / 100


def test_a_retention_below_one_millionth_becomes_one_millionth():
    assert to_ppm(1e-9) == 1


@pytest.mark.parametrize("millionths", [0, -1, 1_000_001])
def test_millionths_out_of_range_are_refused(millionths):
    with pytest.raises(SettingError, match="retention must be in"):
        from_ppm(millionths)


LLAVA, QWEN = "LlavaOnevisionForConditionalGeneration", "Qwen3VLForConditionalGeneration"


def chosen(architecture, checkpoint=None, **given):
    """Return what an engine runs if its operator gives these settings, and its checkpoint these."""
    hf_config = SimpleNamespace() if checkpoint is None else SimpleNamespace(aot=checkpoint)
    settings = PluginSettings.from_additional_config({"aot": given})
    return Reduction.chosen(settings, retention=0.1, architecture=architecture, hf_config=hf_config)


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_without_a_word_an_engine_runs_the_default_of_its_architecture(architecture):
    preset = DEFAULTS[architecture].preset
    expected = Reduction(retention=0.1, method=AOTConfig.preset(preset), preset=preset)
    assert chosen(architecture) == expected
    assert expected.description == preset


@pytest.mark.parametrize("architecture", [LLAVA, QWEN])
def test_the_operator_wins_over_the_checkpoint_and_the_checkpoint_over_the_architecture(architecture):
    named = {"preset": "diverse", "mass": 0.2}
    by_checkpoint = chosen(architecture, named)
    assert (by_checkpoint.preset, by_checkpoint.method) == ("diverse", AOTConfig(mass=0.2))
    assert by_checkpoint.description == "diverse with mass 0.2"
    by_operator = chosen(architecture, named, preset="paper")
    assert (by_operator.preset, by_operator.method) == ("paper", AOTConfig.paper())


def test_single_settings_of_the_operator_change_whichever_preset_it_is():
    assert chosen(LLAVA, mass=0.5).method == replace(AOTConfig.preset(DEFAULTS[LLAVA].preset), mass=0.5)
    assert chosen(QWEN, mass=0.5).method == AOTConfig(mass=0.5)
    assert chosen(QWEN, {"mass": 0.2}, nearest_weight=0.5).method == AOTConfig(mass=0.2, nearest_weight=0.5)
    assert chosen(QWEN, {"mass": 0.2}, preset="transport", clips=4).method == replace(
        AOTConfig.preset("transport"), clips=4
    )
    assert chosen(LLAVA, {"kappa": 0.5, "clips": 4}, kappa=1.0).method.kappa == 1.0


def test_a_setting_that_the_preset_of_the_model_does_not_use_is_refused():
    assert chosen(LLAVA, spatial_weight=0.25).method.spatial_weight == 0.25
    with pytest.raises(SettingError, match=r"^clips takes no effect with preset within, .* paper, transport"):
        chosen(LLAVA, clips=4)
    with pytest.raises(SettingError, match=r"^clips takes no effect with preset diverse, .* paper, transport"):
        chosen(QWEN, clips=4)
    with pytest.raises(SettingError, match=r"^clips takes no effect with preset diverse, "):
        chosen(LLAVA, {"preset": "diverse"}, clips=4)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("paper", r"must be a JSON object, got 'paper'"),
        ({"preset": "newest"}, r"preset must be one of .*, got 'newest'"),
        ({"kapa": 1}, r"unknown AOT settings: kapa; "),
        ({"mass": -1}, r"mass must be a finite number of at least 0, got -1"),
        ({"preset": "diverse", "clips": 3}, r"clips takes no effect with preset diverse"),
    ],
)
def test_what_a_checkpoint_says_wrongly_is_refused_with_its_place(checkpoint, message):
    with pytest.raises(SettingError, match=rf"^aot in the checkpoint's config.json: {message}"):
        chosen(LLAVA, checkpoint)
    assert chosen(LLAVA, checkpoint, preset="diverse").preset == "diverse"


def test_changes_are_told_beside_the_preset():
    solved = {"epsilon": 0.1, "iterations": 20, "tolerance": 0.01, "spatial_weight": 0.5}
    reduction = chosen(QWEN, mass=0.2, nearest_weight=0.1)
    assert reduction.changes == {"mass": 0.2, "nearest_weight": 0.1}
    assert reduction.description == "diverse with mass 0.2, nearest_weight 0.1"
    assert solved.keys() <= reduction.method.in_effect().keys()  # which the change brings in, with their defaults
    assert chosen(QWEN, mass=0.2, epsilon=0.3).changes == {"mass": 0.2, "epsilon": 0.3}
    assert chosen(LLAVA, preset="paper", kappa=1).changes == {"kappa": 1.0}
    assert chosen(LLAVA, preset="paper", mass=1).changes == {}


@pytest.mark.parametrize("value", ["paper", {"paper": 1}, ["newest"], [["paper"]], [1], None])
def test_presets_that_there_are_not_cannot_be_allowed(value):
    with pytest.raises(SettingError, match=r"^allowed_presets must be a list of presets, paper, diverse, .*, got "):
        PluginSettings.from_additional_config({"aot": {"allowed_presets": value}})


def test_a_request_gets_the_preset_that_it_names_if_the_engine_allows_it():
    reduction = chosen(QWEN, allowed_presets=["transport", "paper"])
    assert reduction.presets == ("diverse", "transport", "paper")
    asked = [None, "diverse", "transport", "paper"]
    methods = [AOTConfig(), AOTConfig(), AOTConfig.preset("transport"), AOTConfig.paper()]
    assert [reduction.methods[reduction.preset_number(name)] for name in asked] == methods


@pytest.mark.parametrize("name", ["paper", "newest", "", 1, ["diverse"], {"preset": "diverse"}])
def test_a_preset_that_the_engine_does_not_allow_is_refused_with_those_that_it_does(name):
    with pytest.raises(SettingError) as error:
        chosen(QWEN, allowed_presets=["transport"]).preset_number(name)
    assert str(error.value) == (
        f"aot_preset must be one of the presets that this engine allows, diverse, transport, got {name!r}; "
        "its operator lists them under allowed_presets in the aot settings"
    )


def test_a_changed_preset_is_not_the_preset():
    reduction = chosen(QWEN, mass=0.2)
    assert reduction.presets == ()
    with pytest.raises(SettingError, match=r"allows, none but its own, diverse with mass 0.2, .*, got 'diverse'"):
        reduction.preset_number("diverse")
    listed = chosen(QWEN, mass=0.2, allowed_presets=["diverse"])
    assert listed.methods[listed.preset_number("diverse")] == AOTConfig.preset("diverse")
    assert listed.methods[listed.preset_number(None)] == AOTConfig(mass=0.2)
