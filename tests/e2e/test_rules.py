"""What an engine tells on `/v1/aot/engine`, evaluated in plain Python, is what its processor does. No engine runs."""

import contextlib
import itertools
import json

import numpy as np
import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
from vllm.multimodal.video_decoders import VideoSourceMetadata, VideoTargetMetadata

from aot_vllm import AOTConfig
from aot_vllm.adapters import activation, compat
from aot_vllm.adapters.description import describe_engine
from aot_vllm.adapters.telemetry import LEDGER
from aot_vllm.presets import DEFAULTS
from demo.tiny_checkpoints import checkpoint
from tests.frames.rules import handed_over_size, sampled, tokens_of

pytestmark = pytest.mark.any_runner

MODELS = {
    "tiny": "LlavaOnevisionForConditionalGeneration",
    "tiny-384": "LlavaOnevisionForConditionalGeneration",
    "qwen2.5-vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3-vl": "Qwen3VLForConditionalGeneration",
    "qwen3-vl-moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3.5": "Qwen3_5ForConditionalGeneration",
    "qwen3.5-moe": "Qwen3_5MoeForConditionalGeneration",
}
FRAMES = [1, 2, 3, 5, 8, 32, 33]
SIZES = [(84, 84), (384, 384), (61, 97), (7, 5), (540, 960), (33, 1500), (1500, 33), (4, 700), (4, 900)]
MOST_PIXELS = 2**22
"""Larger videos are left out: there are long ones and large ones besides."""
RETENTIONS = [1, 0.5, 0.1]


def configuration(name, **arguments):
    """Return the configuration of an engine, as the plugin leaves it."""
    compat.after_engine_config(activation.activate)
    settings = {"dtype": "auto", "max_model_len": 8192, "enforce_eager": True, **arguments}
    return EngineArgs(model=str(checkpoint(name)), **settings).create_engine_config()


def told(config):
    """Return what the engine tells, as JSON carries it."""
    described = describe_engine(config, models=["m"], request_kwargs_trusted=True, prompt_tokens_details=True)
    return json.loads(json.dumps(described))


def pictures(frames, height, width):
    return np.zeros((frames, height, width, 3), np.uint8)


def given(frames):
    """Return the metadata with which a gateway hands over these frames."""
    return {
        "total_num_frames": len(frames),
        "fps": 8.0,
        "duration": len(frames) / 8,
        "video_backend": "aot_frames",
        "frames_indices": list(range(len(frames))),
        "do_sample_frames": False,
    }


class Processor:
    """A model's processor on its own."""

    def __init__(self, config):
        self.config = config.model_config
        self.processor = MULTIMODAL_REGISTRY.create_processor(self.config)
        self.prompt = (
            "<video>"
            if "Llava" in self.config.hf_config.model_type.title()
            else ("<|vision_start|><|video_pad|><|vision_end|>")
        )

    def __call__(self, frames, **kwargs):
        items = self.processor.info.parse_mm_data({"video": [(frames, given(frames))]})
        return self.processor(self.prompt, items, None, hf_processor_mm_kwargs=kwargs)

    def tokens(self, rendered):
        return rendered["mm_placeholders"]["video"][0].get_num_embeds()

    def size(self, rendered):
        """Return the size (height, width) that the processor gave to the frames."""
        item = rendered["mm_kwargs"]["video"][0]
        if "video_grid_thw" in item:
            patch = self.config.hf_config.vision_config.patch_size
            return tuple(patch * side for side in item["video_grid_thw"].data.tolist()[1:])
        return tuple(item["pixel_values_videos"].data.shape[-2:])


@pytest.mark.parametrize("name", MODELS)
def test_sizes_and_tokens_are_those_of_the_processor_and_of_the_headers(name):
    config = configuration(name, video_pruning_rate=0.8)
    engine, process = told(config), Processor(config)
    checked = 0
    few = name in ("tiny-384", "qwen3-vl-moe", "qwen3.5-moe")
    for frames, (height, width) in itertools.product([2, 5] if few else FRAMES, SIZES):
        if frames * height * width > MOST_PIXELS:
            continue
        video = pictures(frames, height, width)
        try:
            size = handed_over_size(engine["size"], frames=frames, height=height, width=width)
        except ValueError:
            with pytest.raises(ValueError, match=r"aspect ratio|temporal_factor|t:1|Failed to apply"):
                process(video)
            continue
        for retention in RETENTIONS:
            rendered = process(video, aot_retention=retention)
            before, after = tokens_of(engine, frames=frames, height=height, width=width, retention=retention)
            savings = LEDGER.read(rendered["mm_hashes"]["video"][0])
            assert (savings.before, savings.after) == (before, after), (frames, height, width, retention)
            assert process.tokens(rendered) == after
            checked += 1
        assert process.size(rendered) == size, (frames, height, width)
    assert checked >= 3 * len(FRAMES) * (len(SIZES) - 4) or few
    whole = process(pictures(8, 84, 84))
    assert process.tokens(whole) == tokens_of(engine, frames=8, height=84, width=84)[1]


@pytest.mark.parametrize("name", ["tiny", "qwen2.5-vl", "qwen3-vl", "qwen3.5"])
def test_without_a_rate_everything_is_told_all_the_same(name):
    config = configuration(name)
    engine, process = told(config), Processor(config)
    reduced = told(configuration(name, video_pruning_rate=0.8))
    assert engine["reduction"] == {
        "active": False,
        "retention": 1.0,
        "preset": None,
        "settings": None,
        "presets": [],
    }
    assert reduced["reduction"]["active"] is True
    assert reduced["reduction"]["retention"] == 0.2
    preset = DEFAULTS[MODELS[name]].preset
    assert reduced["reduction"]["preset"] == preset
    assert reduced["reduction"]["settings"] == AOTConfig.preset(preset).in_effect()
    assert reduced["reduction"]["presets"] == [preset]
    assert {**engine, "reduction": 0} == {**reduced, "reduction": 0}
    for frames, (height, width) in [(2, (61, 97)), (5, (384, 384)), (33, (84, 84))]:
        before, after = tokens_of(engine, frames=frames, height=height, width=width)
        assert before == after == process.tokens(process(pictures(frames, height, width)))


NO_TEXT = {"text_per_video": 0, "text_per_unit": 0}
MARKS = {"text_per_video": 2, "text_per_unit": 0}
TIME = ["<", "1", "0", ".", "0", " se", "c", "on", "d", "s", ">"]  # in the words of the tiny checkpoints
MARKS_AND_TIMES = {"text_per_video": 0, "text_per_unit": 2 + len(TIME)}
QWEN_SAMPLING = {"fps": 2, "min_frames": 4, "max_frames": 768}
TOLD = {
    "tiny": {
        "sampling": {"rule": "uniform", "num_frames": 32, "fps": None},
        "max_frames": 16,
        "size": {"rule": "fixed", "height": 84, "width": 84},
        "tokens": {"rule": "constant", "frames_per_unit": 1, "per_unit": 9, "extra": 1} | NO_TEXT,
    },
    "tiny-384": {
        "sampling": {"rule": "uniform", "num_frames": 32, "fps": None},
        "max_frames": 16,
        "size": {"rule": "fixed", "height": 384, "width": 384},
        "tokens": {"rule": "constant", "frames_per_unit": 1, "per_unit": 196, "extra": 1} | NO_TEXT,
    },
    "qwen2.5-vl": {
        "sampling": {"rule": "qwen2_vl", **QWEN_SAMPLING, "frame_factor": 2},
        "max_frames": 14,
        "size": {
            "rule": "smart_resize",
            "factor": 28,
            "min_pixels": 56 * 56,
            "max_pixels": 28 * 28 * 64,
            "over": "frame",
            "temporal_factor": 2,
        },
        "tokens": {"rule": "grid", "frames_per_unit": 2, "cell": 28, "extra": 0} | MARKS,
    },
    "qwen3-vl": {
        "sampling": {"rule": "qwen3_vl", **QWEN_SAMPLING},
        "max_frames": 2048,
        "size": {
            "rule": "smart_resize",
            "factor": 32,
            "min_pixels": 64 * 64,
            "max_pixels": 32 * 32 * 64 * 32,
            "over": "video",
            "temporal_factor": 2,
        },
        "tokens": {"rule": "grid", "frames_per_unit": 2, "cell": 32, "extra": 0} | MARKS_AND_TIMES,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_an_engine_tells_its_rules_its_limits_and_who_it_is(name):
    engine = told(configuration(name, limit_mm_per_prompt={"video": 3}))
    rules = TOLD.get(name, TOLD["qwen3-vl"])
    assert {field: engine[field] for field in rules} == rules
    assert engine["architecture"] == MODELS[name]
    assert (engine["object"], engine["frames_format"], engine["models"]) == ("aot.engine", 1, ["m"])
    assert engine["context_length"] == 8192
    assert engine["limits"] == {"videos": 3, "media_decode_bytes": None}
    assert engine["versions"]["vllm"] == vllm.__version__.partition("+")[0]
    assert engine["versions"]["aot_vllm"]


def test_a_model_that_is_not_known_has_no_rules():
    engine = told(configuration("qwen2"))
    assert engine["architecture"] == "Qwen2ForCausalLM"
    assert [engine[name] for name in ("sampling", "max_frames", "size", "tokens")] == [None] * 4
    assert engine["limits"]["videos"] == 0


@pytest.mark.parametrize(
    ("name", "video", "changed"),
    [
        ("tiny", {"num_frames": 8}, {"num_frames": 8}),
        ("tiny", {"num_frames": -1, "fps": 4}, {"num_frames": None, "fps": 4}),
        ("tiny", {"video_backend": "qwen3_vl"}, {"rule": "qwen3_vl", "fps": 2}),
        ("tiny", {"video_backend": "pynvvideocodec"}, {"rule": "uniform", "num_frames": 32}),
        ("qwen3-vl", {"fps": 4, "num_frames": 8}, {"rule": "qwen3_vl", "fps": 4}),
        ("qwen3-vl", {"fps": 60, "min_frames": 2, "max_frames": 1000}, {"fps": 30, "min_frames": 2, "max_frames": 768}),
        ("qwen2.5-vl", {"max_frames": 64, "temporal_patch_size": 4}, {"max_frames": 64, "frame_factor": 4}),
        ("qwen2.5-vl", {"video_backend": "opencv", "fps": 1}, {"rule": "uniform", "num_frames": 32, "fps": 1}),
        ("qwen2.5-vl", {"video_backend": "opencv_dynamic"}, None),
    ],
)
def test_sampling_has_in_it_what_media_io_kwargs_change(name, video, changed):
    rule = told(configuration(name, media_io_kwargs={"video": video}))["sampling"]
    if changed is None:
        assert rule is None
        return
    assert {field: rule[field] for field in changed} == changed
    loader = VIDEO_LOADER_REGISTRY.load(video.get("video_backend") or (rule["rule"].replace("uniform", "opencv")))
    kwargs = {field: value for field, value in video.items() if field not in ("video_backend", "num_frames", "fps")}
    target = VideoTargetMetadata(video.get("num_frames", 32), video.get("fps", rule["fps"] or -1), 300)
    for total, fps in itertools.product((5, 8, 33, 100, 1000), (1.0, 8.0, 23.976, 29.97, 60.0)):
        source = VideoSourceMetadata(total, fps, total / fps)
        indices = loader.compute_frames_index_to_sample(source, target, **kwargs)
        counted = sampled(rule, total=total, fps=fps, duration=total / fps)
        assert counted == len(indices) or (abs(counted - len(indices)) == 1 and rule["rule"] == "qwen2_vl")


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"min_pixels": 80000, "max_pixels": 160000},
        {"size": {"shortest_edge": 80000, "longest_edge": 160000}},
        {"videos_kwargs": {"size": {"shortest_edge": 80000, "longest_edge": 160000}}},
    ],
)
def test_sizes_have_in_them_what_mm_processor_kwargs_change(name, kwargs):
    config = configuration(name, mm_processor_kwargs=kwargs, video_pruning_rate=0.5)
    engine, process = told(config), Processor(config)
    assert (engine["size"]["min_pixels"], engine["size"]["max_pixels"]) == (80000, 160000)
    for frames, (height, width) in itertools.product((2, 5, 8), ((61, 97), (720, 1280), (33, 1500))):
        rendered = process(pictures(frames, height, width))
        assert process.size(rendered) == handed_over_size(engine["size"], frames=frames, height=height, width=width)
        after = tokens_of(engine, frames=frames, height=height, width=width)[1]
        assert process.tokens(rendered) == after


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("tiny", {"do_resize": False}),
        ("tiny", {"size": {"height": 42, "width": 42}}),
        ("qwen2.5-vl", {"cap_pixels_per_frame": True}),
        ("qwen3-vl", {"videos_kwargs": {"do_sample_frames": True}}),
    ],
)
def test_settings_that_the_rules_do_not_know_leave_no_rule_for_sizes(name, kwargs):
    assert told(configuration(name, mm_processor_kwargs=kwargs))["size"] is None


def test_with_the_pruning_of_stock_vllm_tokens_are_not_told():
    engine = told(configuration("qwen3-vl", video_pruning_rate=0.5, additional_config={"aot": {"enabled": False}}))
    assert engine["reduction"]["active"] is False
    assert engine["tokens"] is None
    assert engine["size"] is not None


@pytest.mark.parametrize("name", ["tiny", "qwen2.5-vl", "qwen3-vl"])
def test_frames_handed_over_in_another_size_are_counted_by_the_size_that_they_are_handed_over_in(name):
    """In the size that a rule gives, frames stay as they are with all rules but those over a whole video."""
    config = configuration(name, video_pruning_rate=0.5)
    engine, process = told(config), Processor(config)
    for frames, (height, width) in itertools.product((2, 3, 8), SIZES):
        with contextlib.suppress(ValueError):
            size = handed_over_size(engine["size"], frames=frames, height=height, width=width)
            again = handed_over_size(engine["size"], frames=frames, height=size[0], width=size[1])
            assert process.size(process(pictures(frames, *size))) == again
            assert again == size or engine["size"]["over"] == "video"


def test_a_rule_over_a_whole_video_may_change_a_size_of_its_own():
    """Documents transformers 5.19: a gateway must not resize frames to a size that the rule would change again."""
    config = configuration("qwen3-vl", mm_processor_kwargs={"min_pixels": 128 * 32**2, "max_pixels": 768 * 32**2})
    engine, process = told(config), Processor(config)
    size = handed_over_size(engine["size"], frames=3, height=1102, width=190)
    assert size == process.size(process(pictures(3, 1102, 190))) == (1216, 192)
    again = handed_over_size(engine["size"], frames=3, height=1216, width=192)
    assert again == process.size(process(pictures(3, 1216, 192))) == (1280, 192)
