"""What travels from the operator's command line to every process."""

from types import SimpleNamespace

import pytest

from aot_vllm import AOTConfig
from aot_vllm.adapters.settings import PluginSettings, Reduction, from_ppm, to_ppm
from aot_vllm.errors import SettingError


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, {"aot": None}, {"aot": {}}])
def test_without_aot_settings_everything_is_default(additional):
    assert PluginSettings.from_additional_config(additional) == PluginSettings()


def test_switches_and_method_settings_stand_side_by_side():
    settings = PluginSettings.from_additional_config({"aot": {"enabled": False, "kappa": 0.5, "clips": 2}})
    assert settings == PluginSettings(enabled=False, method=AOTConfig(kappa=0.5, clips=2))


def test_what_is_attached_is_read_back():
    hf_config = SimpleNamespace()
    reduction = Reduction(retention=0.125, method=AOTConfig(emit="compact", local_layer=3))
    reduction.attach(hf_config)
    assert Reduction.of(hf_config) == reduction


@pytest.mark.parametrize("hundredths", range(1, 101))
def test_a_retention_comes_back_from_millionths_unchanged(hundredths):
    assert from_ppm(to_ppm(hundredths / 100)) == hundredths / 100


def test_a_retention_too_small_for_millionths_is_still_one():
    assert to_ppm(1e-9) == 1


@pytest.mark.parametrize("millionths", [0, -1, 1_000_001])
def test_millionths_out_of_range_are_refused(millionths):
    with pytest.raises(SettingError, match="retention must be in"):
        from_ppm(millionths)
