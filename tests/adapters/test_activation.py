"""The decision at start, on configurations as vLLM hands them over. Nothing is started."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from vllm.config import CompilationConfig, LoRAConfig, ParallelConfig
from vllm.config.multimodal import MultiModalConfig

from aot_vllm import AOTConfig
from aot_vllm.adapters import activation, compat, guards
from aot_vllm.adapters.activation import WORKER_EXTENSION, activate
from aot_vllm.adapters.registry import ARCHITECTURES, reduced_architecture
from aot_vllm.adapters.settings import Reduction
from aot_vllm.errors import SettingError, UnsupportedError
from aot_vllm.presets import DEFAULTS

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
            model_impl="auto",
            multimodal_config=MultiModalConfig(),
            _model_info=SimpleNamespace(supported_video_pruning_methods=stock_pruning),
        ),
        parallel_config=ParallelConfig(worker_extension_cls=extension),
        compilation_config=CompilationConfig(),
        lora_config=None,
    )


def assert_untouched(config, architecture=LLAVA):
    assert config.model_config.hf_config.architectures == [architecture]
    assert config.parallel_config.worker_extension_cls == ""
    with pytest.raises(SettingError, match="carries no AOT settings"):
        Reduction.of(config.model_config.multimodal_config)


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
    config = configuration(architecture)
    activate(config, 0.9)
    preset = DEFAULTS[architecture].preset
    assert config.model_config.hf_config.architectures == [reduced_architecture(architecture)]
    reduction = Reduction.of(config.model_config.multimodal_config)
    assert reduction == Reduction(retention=0.1, method=AOTConfig.preset(preset), preset=preset)
    assert config.parallel_config.worker_extension_cls == WORKER_EXTENSION
    (line,) = lines
    shown = json.dumps(AOTConfig.preset(preset).in_effect())
    assert line == f"AOT is active on {architecture}: retention 0.1, preset {preset}, settings {shown}."


def test_the_line_names_the_preset_with_what_changes_it(lines):
    config = configuration(aot={"preset": "paper", "clips": 4, "allowed_presets": ["diverse"]})
    activate(config, 0.9)
    assert Reduction.of(config.model_config.multimodal_config) == Reduction(
        retention=0.1, method=replace(AOTConfig.paper(), clips=4), preset="paper", allowed_presets=("diverse",)
    )
    (line,) = lines
    assert line.startswith(f"AOT is active on {LLAVA}: retention 0.1, preset paper with clips 4, settings {{")


def test_a_checkpoint_names_its_own_preset(lines):
    config = configuration()
    config.model_config.hf_config.aot = {"preset": "diverse", "mass": 0.2}
    activate(config, 0.9)
    assert Reduction.of(config.model_config.multimodal_config).method == AOTConfig(mass=0.2)
    assert "preset diverse with mass 0.2, settings" in lines[0]


def test_a_setting_that_takes_no_effect_does_not_start():
    config = configuration("Qwen3VLForConditionalGeneration", aot={"clips": 4})
    with pytest.raises(SettingError, match=r"^clips takes no effect with preset diverse, because it needs a kappa"):
        activate(config, 0.9)
    assert_untouched(config, "Qwen3VLForConditionalGeneration")


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
        "aot_engine_reduction_seconds, aot_engine_tower_seconds and aot_engine_unconverged_solves stay at 0."
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
    assert Reduction.of(config.model_config.multimodal_config).retention == round(1 - rate, 6)


def test_settings_are_taken_out_of_what_the_compile_hash_covers_and_those_of_others_stay():
    given = {"aot": {"preset": "paper", "kernels": "torch"}, "other": 1}
    config = configuration(**given)
    activate(config, 0.9)
    assert config.additional_config == {"other": 1}
    assert given == {"aot": {"preset": "paper", "kernels": "torch"}, "other": 1}
    reduction = Reduction.of(config.model_config.multimodal_config)
    assert reduction == Reduction(retention=0.1, method=AOTConfig.paper(), preset="paper", kernels="torch")


def test_what_only_the_api_server_reads_stays():
    config = configuration(aot={"measure_prefill": False, "kernels": "torch"})
    activate(config, 0.9)
    assert config.additional_config == {"aot": {"measure_prefill": False}}


def with_tower_lora(config):
    config.lora_config = LoRAConfig(enable_tower_connector_lora=True)


def with_compiled_tower(config):
    config.compilation_config.compile_mm_encoder = True


def with_stock_method(config):
    config.model_config.multimodal_config.video_pruning_method = "vidcom2"


def with_model_of_transformers(config):
    config.model_config.model_impl = "transformers"


BY_ATTENTION = {"aot": {"anchors": "attention"}}
ON_REQUEST = {"aot": {"preset": "diverse", "allowed_presets": ["paper"]}}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("mode", "settings", "message"),
    [
        (with_tower_lora, {}, r"LoRA adapters on the vision tower: .* Drop --enable-tower-connector-lora"),
        (with_compiled_tower, BY_ATTENTION, r'"anchors": "attention".*compiled encoder, .* Drop compile_mm_encoder'),
        (with_compiled_tower, ON_REQUEST, r'"anchors": "attention".*compiled encoder'),
        (with_stock_method, {}, r"^--video-pruning-method vidcom2 .* ignored while AOT is active\. Drop it"),
        (with_model_of_transformers, {}, r"--model-impl transformers, .* Drop --model-impl"),
    ],
)
def test_a_mode_in_which_a_reduction_would_be_wrong_is_refused(architecture, mode, settings, message):
    config = configuration(architecture, **settings)
    mode(config)
    with pytest.raises(UnsupportedError, match=message):
        activate(config, 0.9)
    assert_untouched(config, architecture)
    activate(config, None)  # without a rate the mode is vLLM's own affair


def test_the_rust_frontend_is_refused(monkeypatch):
    monkeypatch.setattr(guards.envs, "VLLM_USE_RUST_FRONTEND", True, raising=False)
    config = configuration()
    with pytest.raises(UnsupportedError, match=r"Rust frontend, .* Unset VLLM_USE_RUST_FRONTEND"):
        activate(config, 0.9)
    assert_untouched(config)


def test_modes_that_do_no_harm_start(lines):
    for mode, settings in ((with_compiled_tower, {}), (lambda config: None, BY_ATTENTION)):
        config = configuration(**settings)
        mode(config)
        activate(config, 0.9)
    language_lora = configuration()
    language_lora.lora_config = LoRAConfig()
    activate(language_lora, 0.9)
    assert len(lines) == 3


@pytest.mark.parametrize("limits", [{"language_model_only": True}, {"limit_per_prompt": {"video": 0, "image": 4}}])
def test_an_engine_that_takes_no_videos_starts_and_a_line_says_that_nothing_is_reduced(lines, limits):
    config = configuration()
    config.model_config.multimodal_config = MultiModalConfig(**limits)
    with_tower_lora(config)  # harmless, for images are never reduced
    activate(config, 0.9)
    assert lines[1:] == ["AOT: this engine takes no videos, so there is nothing to reduce; its limit for them is 0."]
