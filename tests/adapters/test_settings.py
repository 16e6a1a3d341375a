"""Settings, on their way from the operator's command line to every process."""

from types import SimpleNamespace

import pytest

from aot_vllm import AOTConfig
from aot_vllm.adapters.settings import PluginSettings, Reduction, from_ppm, to_ppm
from aot_vllm.errors import SettingError


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, {"aot": None}, {"aot": {}}])
def test_without_aot_settings_all_settings_are_defaults(additional):
    assert PluginSettings.from_additional_config(additional) == PluginSettings()


def test_switches_of_the_plugin_and_settings_of_the_method_are_given_side_by_side():
    settings = PluginSettings.from_additional_config({"aot": {"enabled": False, "kappa": 0.5, "clips": 2}})
    assert settings == PluginSettings(enabled=False, method=AOTConfig(kappa=0.5, clips=2))


def test_who_computes_is_a_setting_of_the_plugin_and_changes_no_cache_key():
    settings = PluginSettings.from_additional_config({"aot": {"kernels": "torch", "mass": 0.1}})
    assert settings == PluginSettings(kernels="torch", method=AOTConfig(mass=0.1))
    assert settings.method.digest() == AOTConfig(mass=0.1).digest()
    with pytest.raises(SettingError, match="kernels must be one of auto, triton, torch, got 'cuda'"):
        PluginSettings.from_additional_config({"aot": {"kernels": "cuda"}})


def test_an_attached_reduction_is_read_back():
    multimodal_config = SimpleNamespace()
    reduction = Reduction(retention=0.125, method=AOTConfig(emit="compact", local_layer=3), kernels="torch")
    reduction.attach(multimodal_config)
    assert Reduction.of(multimodal_config) == reduction


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
