"""LLaVA-OneVision in a real engine: exact prompt lengths, and answers that no cache, chunk or neighbour changes."""

import json

import pytest

from aot_vllm import VideoGrid, budget
from demo.tiny_checkpoints import checkpoint
from tests.e2e.engines import BY_ATTENTION, Answer, agree, image, in_float32, request, rounding, video
from tests.e2e.forks import run_stock

RATE = 0.75
TEXT_TOKENS = 23
"""Of `request`'s prompt besides its placeholders; the tests find it again with the stock model."""
NEWLINE = 1

WITHIN = rounding("tiny")
"""Other batch shapes sum in another order."""


def kept(frames, retention, *, side=3):
    return budget(VideoGrid(frames=frames, rows=side, cols=side), retention=retention).total + NEWLINE


MIXED = [
    {"media": [["video", 8, 1]]},
    {"media": [["video", 5, 2], ["video", 5, 3]]},
    {"media": [["video", 4, 4], ["image", 0, 5]]},
    {"media": [["image", 0, 6], ["video", 6, 7]]},
    {"media": [["image", 0, 8]]},
    {"media": []},
]


def made(spec, **kwargs):
    return request(
        *(video(frames, seed=seed) if kind == "video" else image(seed=seed) for kind, frames, seed in spec["media"]),
        **kwargs,
    )


UNEQUAL = {"media": [["video", 5, 2], ["video", 9, 3]]}


@pytest.fixture(scope="module")
def runs_of_stock():
    """Return what vLLM as it ships makes of requests: three engines."""
    specs = {
        "mixed": {"requests": MIXED, "arguments": {}},
        "unequal": {"requests": [UNEQUAL], "arguments": {}},
        "with a rate": {"requests": MIXED[:1], "arguments": {"video_pruning_rate": RATE}},
    }
    return dict(zip(specs, run_stock("stock", list(specs.values())), strict=True))


def answers_in(run):
    assert run.returncode == 0, run.stderr[-3000:]
    return [Answer(*others, prompt=tuple(prompt)) for *others, prompt in json.loads(run.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def stock(runs_of_stock):
    return answers_in(runs_of_stock["mixed"])


def test_installed_but_off_it_serves_the_stock_class_and_the_stock_answers(start_engine, stock):
    engine = start_engine("tiny")
    assert engine.llm.apply_model(lambda model: type(model).__module__) == [
        "vllm.model_executor.models.llava_onevision"
    ]
    for spec, expected in zip(MIXED, stock, strict=True):
        (answer,) = engine.ask(made(spec))
        assert [*answer.tokens] == expected.tokens
        assert agree(answer, expected, within=0)


def test_a_request_for_everything_gets_the_stock_answer_from_a_reducing_engine(start_engine, stock):
    engine = start_engine("tiny", video_pruning_rate=RATE)
    for spec, expected in zip(MIXED, stock, strict=True):
        (answer,) = engine.ask(made(spec, retention=1.0))
        assert agree(answer, expected, within=WITHIN)


def test_images_and_text_are_never_touched(start_engine, stock):
    engine = start_engine("tiny", video_pruning_rate=RATE)
    for index in (4, 5):
        (answer,) = engine.ask(made(MIXED[index]))
        assert agree(answer, stock[index], within=WITHIN)


EVERY_SO_MANY_FRAMES = (1, 2, 3, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64)


@pytest.mark.parametrize(
    "all_frames",
    [
        pytest.param(EVERY_SO_MANY_FRAMES, marks=pytest.mark.only_on("v1")),
        pytest.param((1, 2, 7, 16, 17, 64), marks=pytest.mark.only_on("v2")),
    ],
    ids=["every number of frames", "some numbers of frames"],
)
def test_a_prompt_is_as_long_as_the_budget_says_for(start_engine, all_frames):
    """Lengths are settled before a runner comes into it: the second has some run through it."""
    engine = start_engine("tiny", video_pruning_rate=RATE)
    for frames in all_frames:
        for retention in (None, 0.1, 0.5, 0.99):
            (answer,) = engine.ask(request(video(frames), retention=retention), max_tokens=1)
            assert answer.prompt_tokens == TEXT_TOKENS + kept(frames, retention or 1 - RATE), (frames, retention)


@pytest.mark.only_on("v1")
def test_the_published_geometry_keeps_a_tenth_of_196_tokens_a_frame(start_engine):
    engine = start_engine("tiny-384", video_pruning_rate=0.9)
    for frames in (1, 16, 32):
        (answer,) = engine.ask(request(video(frames, side=384)), max_tokens=1)
        assert answer.prompt_tokens == TEXT_TOKENS + round(0.1 * frames * 196) + NEWLINE


def test_several_videos_and_images_in_a_prompt_each_keep_their_own_count(start_engine, stock):
    engine = start_engine("tiny", video_pruning_rate=RATE)
    for spec, whole in zip(MIXED, stock, strict=True):
        saved = sum(
            frames * 9 + NEWLINE - kept(frames, 1 - RATE) for kind, frames, _ in spec["media"] if kind == "video"
        )
        (answer,) = engine.ask(made(spec))
        assert answer.prompt_tokens == whole.prompt_tokens - saved


def test_stock_vllm_dies_of_two_videos_of_unequal_length(runs_of_stock):
    """Documents vLLM 0.32: each video's rows come back three-dimensional, and the engine's own check ends it."""
    assert runs_of_stock["unequal"].returncode != 0
    assert "Expected multimodal embeddings to be a sequence of 2D tensors" in runs_of_stock["unequal"].stderr


@pytest.mark.parametrize("retention", [None, 1.0])
def test_two_videos_of_unequal_length_are_answered(start_engine, retention):
    engine = start_engine("tiny", video_pruning_rate=RATE)
    (answer,) = engine.ask(made(UNEQUAL, retention=retention))
    rho = retention or 1 - RATE
    assert answer.prompt_tokens == TEXT_TOKENS + kept(5, rho) + kept(9, rho)


def test_the_retention_of_a_request_is_its_own_in_one_batch_and_in_the_caches(start_engine):
    engine = start_engine("tiny", video_pruning_rate=RATE)
    clip = video(12, seed=3)
    retentions = [None, 0.1, 0.5, 1.0, 0.1, 0.504, None]
    together = engine.ask(*(request(clip, retention=retention) for retention in retentions))
    expected = [TEXT_TOKENS + kept(12, retention) for retention in (0.25, 0.1, 0.5, 1.0, 0.1, 0.5, 0.25)]
    assert [answer.prompt_tokens for answer in together] == expected
    alone = [engine.ask(request(clip, retention=retention))[0] for retention in retentions]
    for one, other in zip(together, alone, strict=True):
        assert agree(one, other, within=WITHIN)


@pytest.mark.parametrize("retention", [0, -0.1, 1.5, "0.5", True, float("nan"), [0.5]])
def test_a_retention_out_of_range_is_refused_and_the_engine_goes_on(start_engine, retention):
    engine = start_engine("tiny", video_pruning_rate=RATE)
    with pytest.raises(ValueError, match=r"retention must be in \(0, 1\]"):
        engine.ask(request(video(2), retention=retention))
    assert engine.ask(request(video(2)))[0].prompt_tokens == TEXT_TOKENS + kept(2, 1 - RATE)


def test_embeddings_for_a_video_are_refused_and_the_engine_goes_on(start_engine):
    """vLLM's LLaVA-OneVision takes videos as frames alone."""
    import torch

    engine = start_engine("tiny", video_pruning_rate=RATE, enable_mm_embeds=True)
    embedded = {**request(video(2)), "multi_modal_data": {"video": [torch.randn(18, 64)]}}
    with pytest.raises(ValueError, match="LLaVA-OneVision takes videos as frames"):
        engine.ask(embedded)
    assert engine.ask(request(video(2)))[0].prompt_tokens == TEXT_TOKENS + kept(2, 1 - RATE)


def test_stock_vllm_ignores_a_rate(runs_of_stock, stock):
    """Documents vLLM 0.32: its LLaVA-OneVision has no pruning, and takes a rate that asks for it."""
    (answer,) = answers_in(runs_of_stock["with a rate"])
    assert answer.prompt_tokens == stock[0].prompt_tokens == TEXT_TOKENS + 8 * 9 + NEWLINE


def answers_with(start_engine, **arguments):
    engine = start_engine("tiny", video_pruning_rate=RATE, **arguments)
    requests = [made(spec) for spec in MIXED] + [request(video(64, seed=9))]
    first = [engine.ask(one)[0] for one in requests]
    again = [engine.ask(one)[0] for one in requests]
    for one, other in zip(first, again, strict=True):
        assert agree(one, other, within=WITHIN)
    together = engine.ask(*requests)
    for one, other in zip(first, together, strict=True):
        assert agree(one, other, within=WITHIN)
    return first


@pytest.fixture(scope="module")
def plain_answers(engine_holder):
    return answers_with(engine_holder.get, enable_prefix_caching=False, mm_processor_cache_gb=0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"enable_prefix_caching": True, "mm_processor_cache_gb": 0},
        {"enable_prefix_caching": False, "mm_processor_cache_gb": 1},
        pytest.param({"enable_prefix_caching": True, "mm_processor_cache_gb": 1}, marks=pytest.mark.only_on("v1")),
        {"max_num_batched_tokens": 16, "max_num_seqs": 4},
        {"max_num_batched_tokens": 64, "max_num_seqs": 4, "enable_prefix_caching": True},
    ],
    ids=["prefix cache", "processor cache", "both caches", "chunks of 16", "chunks of 64"],
)
def test_answers_are_the_same_again_together_and_with(start_engine, plain_answers, arguments):
    """Twice in a row, all at once, and with these settings as with no cache and no chunks."""
    for one, other in zip(answers_with(start_engine, **arguments), plain_answers, strict=True):
        assert agree(one, other, within=WITHIN)


def test_the_tower_never_sees_more_frames_than_memory_was_profiled_for(start_engine):
    engine = start_engine("tiny", video_pruning_rate=RATE)
    seen = []

    def watch(model):
        model.vision_tower.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))

    engine.llm.apply_model(watch)
    engine.ask(request(video(64, seed=21)), request(video(33, seed=22)), max_tokens=1)
    assert max(seen) <= 16
    assert sum(seen) == 64 + 33


def test_the_tower_attends_as_fast_as_before_and_returns_the_same_features(start_engine):
    """Scores are computed beside the tower's own attention, which runs once a layer and block, hooked or not."""
    engine = start_engine("tiny", video_pruning_rate=RATE, additional_config=BY_ATTENTION)

    def compare(model):
        import torch

        calls = []
        layers = model.vision_tower.vision_model.encoder.layers
        hooks = [layer.self_attn.attn.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
        pixels = torch.randn(3, 3, 84, 84)
        with torch.inference_mode():
            plain = model._tower(pixels)
            with model.scores[0].recording():
                recorded = model._tower(pixels)
        for hook in hooks:
            hook.remove()
        return torch.equal(plain, recorded), len(calls), len(layers)

    ((same, calls, layers),) = engine.llm.apply_model(compare)
    assert same
    assert calls == 2 * layers


@in_float32
def test_scores_are_the_attention_that_transformers_reports(start_engine):
    engine = start_engine("tiny", video_pruning_rate=RATE, additional_config=BY_ATTENTION)

    def scores_of(model):
        import torch

        pixels = torch.randn(5, 3, 84, 84, generator=torch.Generator().manual_seed(4))
        with torch.inference_mode(), model.scores[0].recording() as recorded:
            model._tower(pixels)
            return pixels, recorded()

    ((pixels, (local, global_)),) = engine.llm.apply_model(scores_of)

    import torch
    import transformers

    reference = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        checkpoint("tiny"), attn_implementation="eager"
    )
    with torch.inference_mode():
        maps = reference.model.vision_tower(pixels, output_attentions=True).attentions
    layer = maps[0].mean(dim=1).sum(dim=1)  # (frames, heads, queries, keys): mean over heads, sum over queries
    for scores in (local, global_):  # both layers of a tower of two: int(0.38 + 0.5) and -2
        torch.testing.assert_close(scores, layer, rtol=1e-4, atol=1e-5)
