"""Qwen's vision models in a real engine: the stock model at retention 1, exact counts below, scores as defined."""

import importlib

import pytest
import torch
import transformers

from aot_vllm import VideoGrid, budget
from demo.tiny_checkpoints import checkpoint
from tests.e2e.engines import BY_ATTENTION, Answer, agree, image, in_float32, rounding, video
from tests.e2e.qwen import Probe, metadata, qwen_request

RATE = 0.75
TOWERS = ("qwen2.5-vl", "qwen3-vl")
"""Qwen3.5, and what has experts, has the tower of Qwen3-VL."""
EXPERTS = ("qwen3-vl-moe", "qwen3.5-moe")


@pytest.fixture(scope="module")
def name(request):
    return request.param


def models(*names):
    return pytest.mark.parametrize("name", names, indirect=True, scope="module")


def wide(frames, seed):
    """Return a video whose frames have more columns of tokens than rows, and more than a window of Qwen2.5-VL's."""
    return video(frames, side=168, seed=seed)[:, :112]


MIXED = [
    [wide(8, 1), "What?"],
    ["See ", wide(5, 2), " and ", video(4, seed=3), "?"],
    [wide(4, 4), image(), "?"],
    ["First ", image(seed=2), wide(6, 5), "?"],
    [image(seed=3), "?"],
    ["Nothing to see."],
]


@pytest.fixture(scope="module")
def stock(name, engine_holder):
    """Questions, and answers of vLLM's own class, which serves where no rate is set."""
    engine = engine_holder.get(name)
    (module,) = engine.llm.apply_model(lambda model: type(model).__module__)
    assert module.startswith("vllm.")
    asked = MIXED if name in TOWERS else MIXED[1:3] + MIXED[4:]
    return [(parts, engine.ask(qwen_request(*parts), max_tokens=8)[0]) for parts in asked]


@models(*TOWERS, "qwen3.5")
def test_a_request_for_everything_gets_the_stock_answer_from_a_reducing_engine(start_engine, name, stock):
    engine = start_engine(name, video_pruning_rate=RATE)
    for parts, expected in stock:
        (answer,) = engine.ask(qwen_request(*parts, retention=1.0), max_tokens=8)
        assert agree(answer, expected, within=rounding(name))


@models(*TOWERS, "qwen3.5")
def test_images_and_text_are_never_touched(start_engine, name, stock):
    engine = start_engine(name, video_pruning_rate=RATE)
    for parts, expected in stock[-2:]:
        (answer,) = engine.ask(qwen_request(*parts), max_tokens=8)
        assert agree(answer, expected, within=rounding(name))


@models(*EXPERTS)
def test_with_experts_everything_is_the_stock_answer_and_less_is_what_the_budget_says(start_engine, name):
    parts = MIXED[2]
    (expected,) = start_engine(name).ask(qwen_request(*parts), max_tokens=4)
    engine = start_engine(name, video_pruning_rate=RATE)
    (whole,) = engine.ask(qwen_request(*parts, retention=1.0), max_tokens=4)
    (reduced,) = engine.ask(qwen_request(*parts), max_tokens=4)
    assert agree(whole, expected, within=rounding(name))
    pad = engine.llm.llm_engine.model_config.hf_config.video_token_id
    tokens = whole.prompt.count(pad)
    assert len(whole.prompt) - len(reduced.prompt) == tokens - reduced.prompt.count(pad) == tokens - round(tokens / 4)


@models("qwen3.5")
def test_a_hybrid_answers_requests_of_different_retentions_together_as_one_by_one(start_engine, name):
    """Linear attention keeps one state for each request, which grows by what the request kept."""
    engine = start_engine(name, video_pruning_rate=RATE)
    requests = [qwen_request(wide(8, 1), "What?", retention=retention) for retention in (None, 0.5, 1.0)]
    requests.append(qwen_request(wide(8, 1), image(), "?"))
    one_by_one = [engine.ask(one, max_tokens=3)[0] for one in requests]
    assert len({len(answer.prompt) for answer in one_by_one}) == len(requests)
    for together, alone in zip(engine.ask(*requests, max_tokens=3), one_by_one, strict=True):
        assert agree(together, alone, within=rounding(name))


@models(*TOWERS, "qwen3.5")
def test_at_retention_1_the_answer_is_that_of_transformers(start_engine, name):
    """Prompt, first logprob and eight greedy tokens; fps 8, for which positions agree, see test_qwen_positions.

    transformers calculates in float32 here.
    """
    clip = wide(8, 11)
    asked = qwen_request("Look: ", clip, "What?", retention=1.0, fps=8.0)
    engine = start_engine(name, video_pruning_rate=RATE)
    (answer,) = engine.ask(asked, max_tokens=8)

    directory = checkpoint(name)
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    about = metadata(len(clip), 8.0)
    about.pop("do_sample_frames")
    inputs = transformers.AutoProcessor.from_pretrained(directory)(
        text=[asked["prompt"]],
        videos=[clip],
        video_metadata=[about],
        do_sample_frames=False,
        return_tensors="pt",
    )
    with torch.inference_mode():
        made = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    tokens = tuple(made.sequences[0, inputs["input_ids"].shape[1] :].tolist())
    logprobs = tuple(step[0].log_softmax(-1).max().item() for step in made.logits)
    expected = Answer(inputs["input_ids"].shape[1], tokens, logprobs, prompt=tuple(inputs["input_ids"][0].tolist()))
    assert agree(answer, expected, within=rounding(name))


@pytest.mark.parametrize(
    "all_frames",
    [
        pytest.param((1, 2, 3, 5, 8, 17, 33), marks=pytest.mark.only_on("v1"), id="every number of frames"),
        pytest.param((1, 2, 33), marks=pytest.mark.only_on("v2"), id="some numbers of frames"),
    ],
)
@models(*TOWERS, "qwen3.5")
def test_a_prompt_has_the_tokens_the_budget_says_for(start_engine, name, all_frames):
    """Lengths are settled before a runner comes into it: the second has some run through it."""
    engine = start_engine(name, video_pruning_rate=RATE)
    config = engine.llm.llm_engine.model_config.hf_config
    for frames in all_frames:
        if frames == 1 and name != "qwen2.5-vl":
            continue  # the processor of Qwen3-VL and Qwen3.5 takes no single frame, in stock vLLM neither
        clip = video(frames, side=96)
        (whole,) = engine.ask(qwen_request(clip, "?", retention=1.0), max_tokens=1)
        units = -(-frames // 2)
        grid = VideoGrid(units, 3, whole.prompt.count(config.video_token_id) // units // 3)
        for retention in (0.01, 0.25, 0.5, 0.99):
            (answer,) = engine.ask(qwen_request(clip, "?", retention=retention), max_tokens=1)
            saved = grid.tokens - budget(grid, retention=retention).total
            assert len(answer.prompt) == len(whole.prompt) - saved, (frames, retention)
            assert answer.prompt.count(config.video_token_id) == grid.tokens - saved


def test_every_frame_of_qwen3_vl_keeps_its_timestamp_and_its_share(start_engine):
    engine = start_engine("qwen3-vl", video_pruning_rate=RATE)
    (whole,) = engine.ask(qwen_request(wide(9, 31), "?", retention=1.0), max_tokens=1)
    (answer,) = engine.ask(qwen_request(wide(9, 31), "?"), max_tokens=1)
    pad = engine.llm.llm_engine.model_config.hf_config.video_token_id
    assert [token for token in answer.prompt if token != pad] == [token for token in whole.prompt if token != pad]
    counts = budget(VideoGrid(5, *grid_of(engine, 9)), retention=1 - RATE)
    runs = "".join("x" if token == pad else " " for token in answer.prompt).split()
    assert tuple(len(run) for run in runs) == counts.per_frame


def grid_of(engine, frames):
    """Return rows and columns of tokens in a frame of `wide`, as the processor resized it."""
    processor = transformers.AutoProcessor.from_pretrained(engine.llm.llm_engine.model_config.model)
    made = processor.video_processor(videos=[wide(frames, 0)], do_sample_frames=False, return_tensors="pt")
    _, rows, cols = made["video_grid_thw"][0].tolist()
    return rows // 2, cols // 2


@in_float32
@models(*TOWERS)
def test_scores_are_the_attention_that_transformers_computes(start_engine, name, monkeypatch):
    engine = start_engine(name, video_pruning_rate=RATE, additional_config=BY_ATTENTION)
    probe = Probe(engine, monkeypatch)
    seen = []

    def watch(model):
        return model.visual.register_forward_pre_hook(
            lambda module, inputs, named: seen.append(
                (module.input_norm(inputs[0], module.dtype).float(), named["grid_thw"])
            ),
            with_kwargs=True,
        )

    (hook,) = engine.llm.apply_model(watch)
    engine.ask(qwen_request(wide(8, 21), "?"), max_tokens=1)
    hook.remove()
    probe.close()
    ((patches, grid_thw),) = seen
    (_, local, global_, settings, _) = probe.reductions[-1]
    width = settings["compared"]
    assert width == 64

    module = "qwen2_5_vl" if name == "qwen2.5-vl" else "qwen3_vl"
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    maps = []
    eager = modeling.eager_attention_forward

    def remember(*args, **kwargs):
        output, weights = eager(*args, **kwargs)
        maps.append(weights[0].mean(0).sum(0))
        return output, weights

    monkeypatch.setattr(modeling, "eager_attention_forward", remember)
    reference = transformers.AutoModelForImageTextToText.from_pretrained(
        checkpoint(name), dtype=torch.float32, attn_implementation="eager"
    ).model.visual
    grid = torch.tensor(grid_thw)
    with torch.inference_mode():
        reference(patches, grid_thw=grid)
    frame = settings["grid"].positions * 4
    layers, layer = [], []
    for received in maps:  # a call a frame, or a window
        layer.append(received)
        if sum(len(part) for part in layer) == frame * settings["grid"].frames:
            layers.append(torch.cat(layer).unflatten(0, (-1, 4)).mean(1))
            layer = []
    local_layer, global_layer = (1, 3) if name == "qwen2.5-vl" else (1, 1)
    for scores, index in ((local, local_layer), (global_, global_layer)):
        expected = layers[index]
        if name == "qwen2.5-vl":
            order, _ = modeling.get_vision_window_index(grid, 2, 112, 14)
            assert not torch.equal(order, order.sort().values)
            expected = torch.empty_like(expected).scatter_(0, order, expected)
        torch.testing.assert_close(scores.flatten(), expected, rtol=1e-4, atol=1e-5)


@in_float32
@models(*TOWERS)
def test_the_tower_sees_a_long_video_in_blocks_of_frames_and_makes_the_same_of_it(start_engine, name):
    engine = start_engine(
        name,
        video_pruning_rate=RATE,
        mm_processor_cache_gb=0,
        enable_prefix_caching=False,
        additional_config=BY_ATTENTION,
    )
    blocks = []

    def compare(model):
        grid = VideoGrid(7, 4, 6)
        patches = torch.randn(7 * 4 * 6 * 4, model.visual.patch_embed.proj.weight[0].numel())
        hook = model.visual.register_forward_pre_hook(lambda _, inputs: blocks.append(len(inputs[0]) // 96))
        features = []
        with torch.inference_mode():
            for tokens in (10**6, 75):  # 75 are 3.1 frames, less what the features take that wait
                model._tower_tokens = tokens
                with model.scores[0].recording(tokens_per_frame=96) as recorded:
                    features.append((model._tower(patches, grid), *recorded()))
        hook.remove()
        del model._tower_tokens
        return features, model._tower_tokens

    (((whole, parts), profiled),) = engine.llm.apply_model(compare)
    assert blocks == [7, 2, 2, 2, 1]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert profiled >= 64


@models(*TOWERS)
@pytest.mark.parametrize("anchors", ["diverse", "attention"])
def test_embeddings_that_a_client_made_are_reduced_without_a_tower(start_engine, name, anchors):
    """By attention they score each other, for no layer scores them. Whole ones get the answer of the stock model."""
    width = 64 if name == "qwen2.5-vl" else 3 * 64  # with those of deepstack
    data = {
        "video_embeds": torch.randn(4 * 4 * 6, width, generator=torch.Generator().manual_seed(3)),
        "video_grid_thw": torch.tensor([[4, 8, 12]]),
    }
    if name == "qwen3-vl":
        data["timestamps"] = [[0.5, 1.5, 2.5, 3.5]]

    def asked(retention=None):
        return {**qwen_request(wide(8, 41), "?", retention=retention), "multi_modal_data": {"video": data}}

    (stock,) = start_engine(name, enable_mm_embeds=True).ask(asked())
    settings = {"aot": {"anchors": anchors}}
    engine = start_engine(name, video_pruning_rate=RATE, enable_mm_embeds=True, additional_config=settings)
    pad = engine.llm.llm_engine.model_config.hf_config.video_token_id
    for retention, kept in ((1.0, 96), (0.5, 48), (None, 24)):
        answers = [engine.ask(asked(retention))[0] for _ in range(2)]
        assert answers[0].prompt.count(pad) == kept
        assert agree(*answers, within=rounding(name))
        if retention == 1.0:
            assert agree(answers[0], stock, within=rounding(name))
