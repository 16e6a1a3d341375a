"""The decision at start, on configurations as vLLM hands them over. Nothing is started."""

from types import SimpleNamespace

import pytest
from vllm.config import ParallelConfig

from aot_vllm import AOTConfig
from aot_vllm.adapters import activation, compat
from aot_vllm.adapters.activation import WORKER_EXTENSION, activate
from aot_vllm.adapters.registry import ARCHITECTURES, reduced_architecture
from aot_vllm.adapters.settings import Reduction
from aot_vllm.errors import SettingError, UnsupportedError

LLAVA = "LlavaOnevisionForConditionalGeneration"


@pytest.fixture(autouse=True)
def named_in_vllm_plugins(monkeypatch):
    monkeypatch.setattr(activation.envs, "VLLM_PLUGINS", ["aot"], raising=False)


def configuration(architecture=LLAVA, *, stock_pruning=(), extension="", **additional):
    """Return the parts of an engine configuration that activation reads; `additional` is its additional_config."""
    return SimpleNamespace(
        additional_config=additional,
        model_config=SimpleNamespace(
            model="some/model",
            hf_config=SimpleNamespace(architectures=architecture and [architecture]),
            _model_info=SimpleNamespace(supported_video_pruning_methods=stock_pruning),
        ),
        parallel_config=ParallelConfig(worker_extension_cls=extension),
    )


def assert_untouched(config, architecture=LLAVA):
    assert config.model_config.hf_config.architectures == [architecture]
    assert config.parallel_config.worker_extension_cls == ""
    with pytest.raises(SettingError, match="carries no AOT settings"):
        Reduction.of(config.model_config.hf_config)


@pytest.mark.parametrize("rate", [None, 0, 0.0])
def test_without_a_rate_the_configuration_is_untouched(lines, rate):
    config = configuration()
    activate(config, rate)
    assert_untouched(config)
    assert lines == []


def test_settings_without_a_rate_are_checked_and_a_line_says_that_aot_is_off(lines):
    config = configuration(aot={"clips": 4})
    activate(config, None)
    assert_untouched(config)
    assert lines == ["AOT is off: aot settings are given, but --video-pruning-rate is not set or 0."]
    with pytest.raises(SettingError, match=r"^clips must be an integer of at least 1, got 0$"):
        activate(configuration(aot={"clips": 0}), None)


@pytest.mark.parametrize("rate", [None, 0.9])
def test_an_unknown_setting_is_refused_by_name_with_and_without_a_rate(rate):
    config = configuration(aot={"kapa": 0.3})
    with pytest.raises(SettingError, match=r"^unknown aot settings \['kapa'\]; allowed are .*'kappa'"):
        activate(config, rate)
    assert_untouched(config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_a_rate_every_supported_architecture_is_replaced_by_its_reduced_class(lines, architecture):
    config = configuration(architecture, aot={"clips": 4})
    activate(config, 0.9)
    hf_config = config.model_config.hf_config
    assert hf_config.architectures == [reduced_architecture(architecture)]
    assert Reduction.of(hf_config) == Reduction(retention=0.1, method=AOTConfig(clips=4))
    assert config.parallel_config.worker_extension_cls == WORKER_EXTENSION
    (line,) = lines
    assert line.startswith(f"AOT is active on {architecture}: retention 0.1, settings {{")
    assert '"clips": 4' in line


@pytest.mark.parametrize("additional", [{}, {"aot": {}}, {"aot": {"clips": 4}}])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", None])
def test_a_model_that_would_ignore_the_rate_does_not_start(architecture, additional):
    config = configuration(architecture, **additional)
    with pytest.raises(UnsupportedError) as error:
        activate(config, 0.5)
    message = str(error.value)
    name = architecture or "some/model"
    assert message.startswith(f"--video-pruning-rate 0.5 would be ignored: {name} has no video pruning in vLLM. ")
    assert message.endswith(f"Drop the rate, or serve one of {sorted(ARCHITECTURES)} with AOT enabled.")


def test_a_supported_model_without_stock_pruning_does_not_start_with_aot_switched_off():
    with pytest.raises(UnsupportedError, match=r'ignored: .* and \{"aot": \{"enabled": false\}\} switches AOT off'):
        activate(configuration(aot={"enabled": False}), 0.5)


def test_a_model_that_only_stock_pruning_supports_keeps_it_and_a_line_says_that_it_is_not_aot(lines):
    config = configuration("OpenCUAForConditionalGeneration", stock_pruning=("evs",))
    activate(config, 0.5)
    assert_untouched(config, "OpenCUAForConditionalGeneration")
    assert lines == [
        "This is not AOT: it does not support OpenCUAForConditionalGeneration, "
        "so vLLM's own video pruning takes the rate 0.5."
    ]


def test_aot_settings_for_a_model_that_only_stock_pruning_supports_are_refused():
    config = configuration("OpenCUAForConditionalGeneration", stock_pruning=("evs", "vidcom2"), aot={"clips": 4})
    with pytest.raises(UnsupportedError) as error:
        activate(config, 0.5)
    assert str(error.value) == (
        "aot settings were given, but AOT does not support OpenCUAForConditionalGeneration; it would be pruned by "
        f"vLLM's own evs or vidcom2. Drop the aot settings, or serve one of {sorted(ARCHITECTURES)}."
    )


def test_aot_switched_off_leaves_the_rate_to_stock_pruning(lines):
    config = configuration("Qwen3VLForConditionalGeneration", stock_pruning=("evs",), aot={"enabled": False})
    activate(config, 0.5)
    assert_untouched(config, "Qwen3VLForConditionalGeneration")
    assert lines == ["This is not AOT: it is switched off, so vLLM's own video pruning takes the rate 0.5."]


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.320.0", "1.0"])
def test_an_untested_vllm_is_refused_unless_the_settings_allow_it(lines, monkeypatch, version):
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    config = configuration()
    with pytest.raises(UnsupportedError) as error:
        activate(config, 0.9)
    assert str(error.value) == (
        f"AOT was tested with vLLM 0.32.*, 0.33.*, this is {version}. Install a tested release, or start anyway with "
        '--additional-config \'{"aot": {"allow_untested_vllm": true}}\'.'
    )
    assert_untouched(config)

    allowed = configuration(aot={"allow_untested_vllm": True})
    activate(allowed, 0.9)
    assert allowed.model_config.hf_config.architectures == [reduced_architecture(LLAVA)]
    warning, _ = lines
    assert warning == (
        f"AOT was tested with vLLM 0.32.*, 0.33.*, this is {version}; starting because allow_untested_vllm is set."
    )


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7", "0.32.1rc1", "0.33.0"])
def test_every_patch_of_a_tested_release_starts(monkeypatch, version):
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    activate(configuration(), 0.9)


def test_an_untested_vllm_without_a_rate_starts(monkeypatch):
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.33.0")
    config = configuration()
    activate(config, None)
    assert_untouched(config)


def test_a_worker_extension_of_the_operator_stays_and_a_line_says_what_is_missing(lines):
    config = configuration(extension="theirs.Extension")
    activate(config, 0.9)
    assert config.parallel_config.worker_extension_cls == "theirs.Extension"
    assert config.model_config.hf_config.architectures == [reduced_architecture(LLAVA)]
    warning, _ = lines
    assert warning == (
        "AOT: --worker-extension-cls is taken by theirs.Extension, so aot_engine_reductions, "
        "aot_engine_reduction_seconds and aot_engine_unconverged_solves stay at 0."
    )


@pytest.mark.parametrize("plugins", [None, [], ["other"]])
def test_without_aot_in_vllm_plugins_a_line_says_what_responses_lack(lines, monkeypatch, plugins):
    monkeypatch.setattr(activation.envs, "VLLM_PLUGINS", plugins, raising=False)
    activate(configuration(), 0.9)
    assert lines[1:] == [
        "AOT: VLLM_PLUGINS does not name aot, so responses carry no x-aot-* headers and /metrics no aot_engine_*; "
        "set VLLM_PLUGINS=aot."
    ]


@pytest.mark.parametrize("rate", [0.125, 0.3, 0.9, 0.95, 0.999])
def test_the_retention_is_one_minus_the_rate_without_rounding_errors(rate):
    config = configuration()
    activate(config, rate)
    assert Reduction.of(config.model_config.hf_config).retention == round(1 - rate, 6)
