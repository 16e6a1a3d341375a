"""What `--video-pruning-rate` does at start: AOT, vLLM's own pruning, or a refusal that says why and what to do."""

import importlib
import logging

import pytest

from aot_vllm.adapters import compat
from aot_vllm.adapters.registry import ARCHITECTURES, reduced_architecture
from aot_vllm.adapters.settings import Reduction
from aot_vllm.config import AOTConfig
from aot_vllm.errors import SettingError, UnsupportedError
from demo.tiny_checkpoints import checkpoint

pytestmark = pytest.mark.any_runner


@pytest.fixture
def lines(monkeypatch):
    """Return the lines the plugin logs, as they come."""
    configure()  # what vLLM imports and registers for it would throw out handlers that are there before
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("vllm.aot")
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "level", logging.INFO)
    yield said
    logger.removeHandler(handler)


def configure(name="tiny", *, dtype="float32", **arguments):
    """Return the engine configuration for a checkpoint and arguments; nothing is started from it."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(checkpoint(name)), enforce_eager=True, dtype=dtype, max_model_len=2048, **arguments
    ).create_engine_config()


def test_without_a_rate_the_configuration_is_untouched_and_nothing_is_said(lines):
    for rate in (None, 0.0):
        config = configure(video_pruning_rate=rate)
        assert config.model_config.hf_config.architectures == ["LlavaOnevisionForConditionalGeneration"]
        assert not config.parallel_config.worker_extension_cls
        with pytest.raises(SettingError, match="carries no AOT settings"):
            Reduction.of(config.model_config.multimodal_config)
        assert lines == []


def test_settings_without_a_rate_are_checked_and_said_to_do_nothing(lines):
    configure(additional_config={"aot": {"clips": 4}})
    assert lines == ["AOT is off: aot settings are given, but --video-pruning-rate is not set or 0."]
    with pytest.raises(SettingError, match="clips must be an integer of at least 1, got 0"):
        configure(additional_config={"aot": {"clips": 0}})


def test_with_a_rate_one_line_says_what_is_active(lines):
    config = configure(video_pruning_rate=0.9, additional_config={"aot": {"preset": "transport", "clips": 4}})
    reduction = Reduction.of(config.model_config.multimodal_config)
    method = AOTConfig.from_mapping({"preset": "transport", "clips": 4})
    assert reduction == Reduction(retention=0.1, method=method, preset="transport")
    (line,) = lines
    for said in ("LlavaOnevisionForConditionalGeneration", "retention 0.1", "transport with clips 4", '"clips": 4'):
        assert said in line


def test_a_server_without_the_endpoint_plugin_is_told_what_it_misses(lines, monkeypatch):
    from vllm import envs

    envs.disable_envs_cache()  # which an engine that ran in this process has filled
    monkeypatch.delenv("VLLM_PLUGINS")
    configure(video_pruning_rate=0.9)
    assert lines[-1].endswith("set VLLM_PLUGINS=aot.")


@pytest.mark.parametrize("name", ["tiny", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "qwen3.5", "qwen3.5-moe"])
def test_a_rate_changes_nothing_that_vllm_settles_by_the_name_of_an_architecture(name):
    """For hybrid models that is how their states are kept: in blocks of which size, of which type, and when at all."""
    stock, ours = (configure(name, dtype="bfloat16", video_pruning_rate=rate) for rate in (None, 0.9))
    assert reduced_architecture(ours.model_config.architecture) in ours.model_config.hf_config.architectures
    assert ours.cache_config == stock.cache_config
    assert ours.scheduler_config == stock.scheduler_config
    for settled in ("architecture", "architectures", "is_hybrid", "is_moe", "uses_mrope", "has_inner_state"):
        assert getattr(ours.model_config, settled) == getattr(stock.model_config, settled), settled


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3.5-moe"])
def test_the_states_of_a_hybrid_have_the_type_that_its_checkpoint_names(name):
    other = {"text_config": {"mamba_ssm_dtype": "bfloat16"}}
    for overrides, expected in (({}, "float32"), (other, "bfloat16")):
        config = configure(name, dtype="bfloat16", video_pruning_rate=0.9, hf_overrides=overrides)
        assert config.cache_config.mamba_ssm_cache_dtype == expected


@pytest.mark.parametrize(("architecture", "reduced_by"), ARCHITECTURES.items())
def test_a_proposer_takes_a_reduced_model_for_the_one_it_is_made_of(architecture, reduced_by):
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    compat.let_proposer_know_reduced_models()
    module, name = reduced_by.split(":")
    reduced = getattr(importlib.import_module(module), name)
    for model_class in (reduced, next(cls for cls in reduced.__mro__ if cls.__name__ == architecture)):
        model = model_class.__new__(model_class)
        assert SpecDecodeBaseProposer.get_model_name(None, model) == architecture


@pytest.mark.parametrize("rate", [0.125, 0.3, 0.75, 0.9, 0.95, 0.999])
def test_retention_is_one_minus_the_rate_without_float_dust(rate):
    config = configure(video_pruning_rate=rate)
    assert Reduction.of(config.model_config.multimodal_config).retention == round(1 - rate, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -1}, r"epsilon must be a finite number above 0, got -1"),
        ({"epsilon": "0.1"}, r"epsilon must be a finite number above 0, got '0.1'"),
        ({"kappa": 1.5}, r"kappa must be in \[0, 1\], got 1.5"),
        ({"window": 0}, r"window must be an integer of at least 1, got 0"),
        ({"clips": True}, r"clips must be an integer of at least 1, got True"),
        ({"emit": "all"}, r"emit must be 'both' or 'compact', got 'all'"),
        ({"enabled": "no"}, r"enabled must be true or false, got 'no'"),
        ({"kapa": 0.3}, r"unknown aot settings \['kapa'\]; allowed are .*'kappa'"),
        ([], r"additional_config\['aot'\] must be a JSON object, got \[\]"),
    ],
)
def test_bad_settings_do_not_start_and_name_setting_value_and_range(settings, message):
    with pytest.raises(SettingError, match=message):
        configure(video_pruning_rate=0.9, additional_config={"aot": settings})


def test_a_scoring_layer_the_tower_lacks_does_not_start(start_engine):
    settings = {"anchors": "attention", "global_layer": 7}
    with pytest.raises(SettingError, match=r"global_layer must be in \[-2, 1\].* executes 2 layers, got 7"):
        start_engine("tiny", video_pruning_rate=0.9, additional_config={"aot": settings})


STOCK_ONLY = {"hf_overrides": {"architectures": ["OpenCUAForConditionalGeneration"]}}
"""A relative of Qwen2.5-VL that vLLM's own pruning serves and AOT does not."""


def test_a_model_only_stock_pruning_knows_keeps_it_and_a_line_says_that_it_is_not_aot(lines):
    config = configure("qwen2.5-vl", video_pruning_rate=0.5, **STOCK_ONLY)
    assert config.model_config.hf_config.architectures == ["OpenCUAForConditionalGeneration"]
    (line,) = lines
    assert line.startswith("This is not AOT: it does not support OpenCUAForConditionalGeneration")


def test_settings_for_aot_on_a_model_it_does_not_support_do_not_start():
    with pytest.raises(UnsupportedError, match=r"AOT does not support OpenCUA.*Drop the aot settings"):
        configure("qwen2.5-vl", video_pruning_rate=0.5, additional_config={"aot": {"clips": 4}}, **STOCK_ONLY)


def test_aot_switched_off_leaves_the_rate_to_stock_pruning(lines):
    config = configure("qwen2.5-vl", video_pruning_rate=0.5, additional_config={"aot": {"enabled": False}})
    assert config.model_config.multimodal_config.get_video_pruning_spec() == ("evs", 0.5)
    assert lines == ["This is not AOT: it is switched off, so vLLM's own video pruning takes the rate 0.5."]


@pytest.mark.parametrize(
    ("name", "additional"), [("qwen2", {}), ("tiny", {"aot": {"enabled": False}})], ids=["no video", "switched off"]
)
def test_a_model_that_would_ignore_the_rate_in_silence_does_not_start(name, additional):
    with pytest.raises(UnsupportedError, match=r"--video-pruning-rate 0.5 would be ignored.*Drop the rate"):
        configure(name, video_pruning_rate=0.5, additional_config=additional)


def test_an_untested_vllm_does_not_start_unless_told_to(lines, monkeypatch):
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.34.1")
    with pytest.raises(
        UnsupportedError, match=r"tested with vLLM 0.32.\*, 0.33.\*, this is 0.34.1.*allow_untested_vllm"
    ):
        configure(video_pruning_rate=0.9)
    configure(video_pruning_rate=0.9, additional_config={"aot": {"allow_untested_vllm": True}})
    assert "this is 0.34.1; starting because allow_untested_vllm is set" in lines[0]
    configure()  # without a rate any version starts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_lora": True, "enable_tower_connector_lora": True}, "LoRA adapters on the vision tower"),
        ({"video_pruning_method": "vidcom2"}, "--video-pruning-method vidcom2 names a method of vLLM's own"),
        ({"model_impl": "transformers"}, "does not work with --model-impl transformers"),
        (
            {
                "compilation_config": {"compile_mm_encoder": True},
                "additional_config": {"aot": {"anchors": "attention"}},
            },
            "does not work with a compiled encoder",
        ),
    ],
)
def test_modes_in_which_a_reduction_would_be_wrong_do_not_start(arguments, message):
    with pytest.raises(UnsupportedError, match=message):
        configure("qwen3-vl", video_pruning_rate=0.9, **arguments)


def test_the_rust_frontend_does_not_start(monkeypatch):
    from vllm import envs

    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(UnsupportedError, match="does not work with vLLM's Rust frontend"):
        configure("qwen2.5-vl", video_pruning_rate=0.9)


def test_retentions_and_settings_share_what_vllm_compiles():
    """But not with an engine without a rate: for it, vLLM makes a smaller table of rotary positions."""
    settings = [(0.9, {}), (0.75, {}), (0.75, {"aot": {"anchors": "attention"}}), (0.75, {"aot": {"kernels": "torch"}})]
    for name in ("tiny", "qwen2.5-vl"):
        configs = [configure(name, video_pruning_rate=rate, additional_config=given) for rate, given in settings]
        assert len({config.compute_hash() for config in configs}) == 1
        assert configure(name).compute_hash() != configs[0].compute_hash()


def test_registering_twice_changes_nothing():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import ModelRegistry

    from aot_vllm.plugin import register

    register()
    models, hooked = dict(ModelRegistry.models), EngineArgs.create_engine_config
    register()
    assert ModelRegistry.models == models
    assert EngineArgs.create_engine_config is hooked


@pytest.mark.parametrize("owner", ["vllm.engine.arg_utils.EngineArgs.create_engine_config"])
def test_a_vllm_without_what_the_plugin_builds_on_is_refused_at_registration(monkeypatch, owner):
    monkeypatch.delattr(owner)
    with pytest.raises(UnsupportedError, match=r"has no EngineArgs\.create_engine_config"):
        compat.after_engine_config(lambda *_: None)


def test_a_vllm_that_does_not_tell_its_pruning_methods_is_refused():
    with pytest.raises(UnsupportedError, match=r"_model_info\.supported_video_pruning_methods"):
        compat.stock_pruning_methods(object())


def test_a_vllm_without_a_chat_renderer_is_refused():
    with pytest.raises(UnsupportedError, match=r"online_renderer\.render_chat"):
        compat.observe_rendered_chats(object(), lambda _: None)


def test_a_vllm_that_tells_models_apart_in_another_way_is_refused(monkeypatch):
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    monkeypatch.delattr(SpecDecodeBaseProposer, "get_model_name")
    with pytest.raises(UnsupportedError, match=r"has no SpecDecodeBaseProposer\.get_model_name"):
        compat.let_proposer_know_reduced_models()
