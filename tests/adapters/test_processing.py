"""The processor of a real, tiny LLaVA-OneVision checkpoint: placeholders, carried retentions, hashes and savings."""

import numpy as np
import pytest
import torch

from aot_vllm import AOTConfig, VideoGrid, budget
from aot_vllm.adapters.processing import PRESET, RETENTION, without_ours
from aot_vllm.adapters.settings import Reduction
from aot_vllm.adapters.telemetry import LEDGER, VideoSavings
from aot_vllm.errors import SettingError

ENGINE_RETENTION = 0.25
FRAMES, SIDE = 8, 3


@pytest.fixture(scope="module")
def model_config():
    from vllm.config import ModelConfig

    from demo.tiny_checkpoints import checkpoint

    return ModelConfig(model=str(checkpoint("tiny")), dtype="float32", max_model_len=2048)


@pytest.fixture
def processor(model_config):
    return make_processor(model_config, AOTConfig())


def make_processor(model_config, method, **rest):
    """Return the processor of an engine that was started with a retention of 0.25 and these settings."""
    from vllm.multimodal.processing import InputProcessingContext
    from vllm.tokenizers import cached_tokenizer_from_config

    from aot_vllm.adapters import llava_onevision as adapter

    Reduction(retention=ENGINE_RETENTION, method=method, **rest).attach(model_config.multimodal_config)
    context = InputProcessingContext(model_config, cached_tokenizer_from_config(model_config))
    info = adapter.AOTLlavaOnevisionProcessingInfo(context)
    return adapter.AOTLlavaOnevisionProcessor(info, adapter.LlavaOnevisionDummyInputsBuilder(info))


def clip(seed=0, frames=FRAMES):
    return np.random.default_rng(seed).integers(0, 255, (frames, 84, 84, 3), dtype=np.uint8)


def render(processor, *videos, images=(), cache=None, uuids=None, **kwargs):
    """Return the engine input for a prompt with these videos and images, and these processor arguments."""
    data = {"video": list(videos), "image": list(images)}
    items = processor.info.parse_mm_data({kind: given for kind, given in data.items() if given})
    prompt = "<video>" * len(videos) + "<image>" * len(images) + "What happens?"
    return processor(prompt, items, uuids, hf_processor_mm_kwargs=kwargs, cache=cache)


def placeholder_lengths(rendered, kind="video"):
    return [placeholder.length for placeholder in rendered["mm_placeholders"][kind]]


def carried(rendered):
    return [int(item[RETENTION].data) for item in rendered["mm_kwargs"]["video"]]


def kept(retention, frames=FRAMES):
    return budget(VideoGrid(frames, SIDE, SIDE), retention=retention).total + 1  # and the newline


def test_without_a_retention_of_its_own_a_request_gets_that_of_the_engine(processor):
    for rendered in (render(processor, clip()), render(processor, clip(), aot_retention=None)):
        assert placeholder_lengths(rendered) == [kept(ENGINE_RETENTION)] == [18 + 1]
        assert carried(rendered) == [250_000]


@pytest.mark.parametrize(
    ("asked", "retention"), [(0.5, 0.5), (0.504, 0.5), (0.506, 0.51), (1e-6, 0.01), (1, 1.0), (np.float32(0.3), 0.3)]
)
def test_the_retention_of_a_request_is_rounded_to_hundredths_and_travels_to_the_worker(processor, asked, retention):
    rendered = render(processor, clip(0), clip(1, frames=5), aot_retention=asked)
    assert placeholder_lengths(rendered) == [kept(retention), kept(retention, frames=5)]
    assert carried(rendered) == [round(retention * 1_000_000)] * 2


@pytest.mark.parametrize("bad", [0, 1.5, -0.1, float("nan"), "half", True])
def test_a_retention_outside_its_range_is_refused_with_value_and_range(processor, bad):
    with pytest.raises(SettingError) as error:
        render(processor, clip(), aot_retention=bad)
    assert str(error.value) == f"retention must be in (0, 1], got {bad!r}"


def test_images_are_as_long_with_any_retention_and_carry_none(processor):
    (image,) = clip(9, frames=1)
    alone, beside = render(processor, images=[image]), render(processor, clip(), images=[image], aot_retention=0.1)
    assert placeholder_lengths(alone, "image") == placeholder_lengths(beside, "image")
    for rendered in (alone, beside):
        assert RETENTION not in rendered["mm_kwargs"]["image"][0]


def hashes(rendered, kind="video"):
    return rendered["mm_hashes"][kind]


def test_the_hash_of_a_video_changes_with_the_retention_and_that_of_an_image_does_not(processor):
    (image,) = clip(9, frames=1)
    rendered = [
        render(processor, clip(), images=[image], **({"aot_retention": asked} if asked else {}))
        for asked in (None, 0.25, 0.254, 0.5, 1.0)
    ]
    by_engine, same, rounded, half, whole = (hashes(one) for one in rendered)
    assert by_engine == same == rounded
    assert len({*by_engine, *half, *whole}) == 3
    assert len({hash_ for one in rendered for hash_ in hashes(one, "image")}) == 1


def test_the_hash_of_a_video_changes_with_the_settings_of_the_method(model_config):
    settings = [AOTConfig(), AOTConfig(), AOTConfig(mass=0.3), AOTConfig.paper()]
    first, again, mass, paper = (hashes(render(make_processor(model_config, one), clip())) for one in settings)
    assert first == again
    assert len({*first, *mass, *paper}) == 3


@pytest.fixture
def with_presets(model_config):
    return make_processor(model_config, AOTConfig(), allowed_presets=("paper", "transport"))


def numbers(rendered):
    return [int(item[PRESET].data) for item in rendered["mm_kwargs"]["video"]]


def test_the_preset_of_a_request_travels_to_the_worker_by_its_number(with_presets):
    asked = [{}, {"aot_preset": None}, *({"aot_preset": name} for name in ("diverse", "paper", "transport"))]
    rendered = [render(with_presets, clip(0), clip(1), **one) for one in asked]
    assert [numbers(one) for one in rendered] == [[0, 0], [0, 0], [0, 0], [1, 1], [2, 2]]


def test_the_hash_of_a_video_changes_with_the_preset_and_that_of_an_image_does_not(with_presets, model_config):
    (image,) = clip(9, frames=1)
    asked = ({}, {"aot_preset": "diverse"}, {"aot_preset": "paper"}, {"aot_preset": "transport"})
    rendered = [render(with_presets, clip(), images=[image], **one) for one in asked]
    own, named, paper, transport = map(hashes, rendered)
    assert own == named
    assert len({*own, *paper, *transport}) == 3
    assert len({hash_ for one in rendered for hash_ in hashes(one, "image")}) == 1
    for preset, expected in (("diverse", own), ("paper", paper), ("transport", transport)):
        alone = make_processor(model_config, AOTConfig.preset(preset), preset=preset)
        assert hashes(render(alone, clip())) == expected


@pytest.mark.parametrize("preset", ["diverse", "paper", "transport"])
@pytest.mark.parametrize("retention", [0.12, 0.5, 1])
def test_the_placeholder_of_a_preset_is_as_long_as_that_of_any_other(with_presets, preset, retention):
    rendered = render(with_presets, clip(), aot_preset=preset, aot_retention=retention)
    assert placeholder_lengths(rendered) == [kept(retention)]
    assert LEDGER.read(*hashes(rendered)) == VideoSavings(FRAMES * SIDE**2 + 1, kept(retention), retention)


def test_a_video_out_of_the_cache_keeps_to_its_preset(with_presets, model_config):
    from vllm.multimodal.cache import MultiModalProcessorOnlyCache

    cache, presets = MultiModalProcessorOnlyCache(model_config), ("diverse", "paper", "transport", "paper", "diverse")
    rendered = [render(with_presets, clip(), cache=cache, aot_preset=preset) for preset in presets]
    assert [numbers(one) for one in rendered] == [[0], [1], [2], [1], [0]]
    assert hashes(rendered[1]) == hashes(rendered[3])


@pytest.mark.parametrize("bad", ["coverage of all", "", 3, True, ["paper"]])
def test_a_preset_that_the_engine_does_not_allow_is_refused_by_name(with_presets, bad):
    with pytest.raises(SettingError, match=r"^aot_preset must be one of .* diverse, paper, transport, got "):
        render(with_presets, clip(), aot_preset=bad)


def test_without_allowed_presets_only_the_engines_own_is_taken(processor):
    assert numbers(render(processor, clip(), aot_preset="diverse")) == [0]
    with pytest.raises(SettingError, match=r"^aot_preset must be one of .* allows, diverse, got 'paper'; "):
        render(processor, clip(), aot_preset="paper")


def test_different_videos_have_different_hashes(processor):
    first, second, third = hashes(render(processor, clip(0), clip(1), clip(0)))
    assert first == third != second


def test_a_video_out_of_the_cache_has_its_retention_placeholder_and_savings_again(processor, model_config):
    from vllm.multimodal.cache import MultiModalProcessorOnlyCache

    cache = MultiModalProcessorOnlyCache(model_config)
    first = render(processor, clip(), cache=cache, aot_retention=0.5)
    LEDGER.write(*hashes(first), VideoSavings(0, 0, 0.0))
    again = render(processor, clip(), cache=cache, aot_retention=0.5)
    assert hashes(again) == hashes(first)
    assert carried(again) == carried(first) == [500_000]
    assert placeholder_lengths(again) == placeholder_lengths(first) == [kept(0.5)]
    assert LEDGER.read(*hashes(again)) == VideoSavings(FRAMES * SIDE**2 + 1, kept(0.5), 0.5)


def test_a_video_that_is_known_by_its_uuid_alone_keeps_its_savings(processor, model_config):
    from vllm.multimodal.cache import MultiModalProcessorOnlyCache

    cache, uuids = MultiModalProcessorOnlyCache(model_config), {"video": ["clip-7"]}
    first = render(processor, clip(), cache=cache, uuids=uuids)
    again = render(processor, None, cache=cache, uuids=uuids)
    assert hashes(again) == hashes(first)
    assert placeholder_lengths(again) == placeholder_lengths(first)
    assert LEDGER.read(*hashes(again)) == VideoSavings(FRAMES * SIDE**2 + 1, kept(ENGINE_RETENTION), ENGINE_RETENTION)


def test_each_video_of_a_request_has_its_savings_in_the_ledger(processor):
    rendered = render(processor, clip(2), clip(3, frames=5), aot_retention=0.4)
    assert [LEDGER.read(mm_hash) for mm_hash in hashes(rendered)] == [
        VideoSavings(FRAMES * SIDE**2 + 1, kept(0.4), 0.4),
        VideoSavings(5 * SIDE**2 + 1, kept(0.4, frames=5), 0.4),
    ]


def test_at_retention_1_the_placeholder_is_that_of_stock_vllm(processor):
    info = processor.info
    stock = info.get_num_video_tokens(image_width=84, image_height=84, num_frames=FRAMES)
    assert placeholder_lengths(render(processor, clip(), aot_retention=1)) == [stock]


def test_memory_is_profiled_with_unreduced_videos(processor):
    most = processor.info.get_mm_max_tokens_per_item(2048, {"video": 1})
    assert most["video"] == 16 * SIDE**2 + 1


def test_the_hugging_face_processor_never_sees_a_retention_or_a_preset(processor):
    assert without_ours({RETENTION: 0.5, PRESET: "paper", "do_resize": False}) == {"do_resize": False}
    own = processor.info.get_hf_processor()
    assert processor.info.get_hf_processor(aot_retention=0.5, aot_preset="paper") is own


def test_a_video_given_as_embeddings_is_refused(processor):
    from vllm.multimodal.parse import VideoEmbeddingItems

    width = processor.info.get_hf_config().text_config.hidden_size
    videos = VideoEmbeddingItems([torch.zeros(FRAMES * SIDE**2 + 1, width)], width)
    with pytest.raises(ValueError, match=r"^LLaVA-OneVision takes videos as frames$"):
        processor.video_grid(videos, 0, None)
