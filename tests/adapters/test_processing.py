"""The processor of a real, tiny LLaVA-OneVision checkpoint: placeholders, carried retentions, hashes and savings."""

import numpy as np
import pytest
import torch

from aot_vllm import AOTConfig, VideoGrid, budget
from aot_vllm.adapters.processing import RETENTION, without_retention
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


def make_processor(model_config, method):
    """Return the processor of an engine that was started with a retention of 0.25 and these settings."""
    from vllm.multimodal.processing import InputProcessingContext
    from vllm.tokenizers import cached_tokenizer_from_config

    from aot_vllm.adapters import llava_onevision as adapter

    Reduction(retention=ENGINE_RETENTION, method=method).attach(model_config.multimodal_config)
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


def test_the_hugging_face_processor_never_sees_a_retention(processor):
    assert without_retention({RETENTION: 0.5, "do_resize": False}) == {"do_resize": False}
    assert processor.info.get_hf_processor(aot_retention=0.5) is processor.info.get_hf_processor()


def test_a_video_given_as_embeddings_is_refused(processor):
    from vllm.multimodal.parse import VideoEmbeddingItems

    width = processor.info.get_hf_config().text_config.hidden_size
    videos = VideoEmbeddingItems([torch.zeros(FRAMES * SIDE**2 + 1, width)], width)
    with pytest.raises(ValueError, match=r"^LLaVA-OneVision takes videos as frames$"):
        processor.video_grid(videos, 0, None)
