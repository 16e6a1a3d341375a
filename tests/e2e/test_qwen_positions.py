"""Qwen's vision models in a real engine: every token stands, exactly, where it stood in the unreduced prompt."""

import itertools

import pytest
import torch
import transformers

from demo.tiny_checkpoints import checkpoint
from tests.e2e.engines import EAGER, agree, image, rounding, video
from tests.e2e.qwen import Probe, qwen_request, survivors

RATE = 0.75
MODELS = ("qwen2.5-vl", "qwen3-vl")
LONG = "What happens? " * 300
"""More than 3,000 tokens, and few enough for the context."""


def wide(frames, seed):
    """Return a video whose frames have 4 rows and 6 columns of tokens (Qwen2.5-VL), so that no axis passes for another.

    Its 6 columns are more than one window of the tower.
    """
    return video(frames, side=168, seed=seed)[:, :112]


def cases(seed):
    """Return what requests ask about; every video is new, so that each is reduced where it can be watched."""
    seeds = itertools.count(1000 * seed)

    def first():
        return wide(9, next(seeds))

    def second():
        return video(6, seed=next(seeds))

    return {
        "one video": ([wide(8, next(seeds)), "What?"], {}),
        "an odd number of frames": (["Look: ", first(), "What?"], {}),
        "two frames": (["Look: ", wide(2, next(seeds)), "What?"], {}),
        "two videos": ([first(), " and ", second(), "What?"], {}),
        "a video next to a video": ([second(), first(), "What?"], {}),
        "video, then image": ([first(), image(), "What?"], {}),
        "image, then video": (["See ", image(), " and ", first(), "What?"], {}),
        "no system message": ([first(), "What?"], {"system": False}),
        "behind 3,000 tokens": ([LONG, first(), "What?", second(), "Why?"], {}),
    }


CHUNKS = {
    "one piece": {"block_size": 32},
    "chunks of 16": {"block_size": 32, "max_num_batched_tokens": 16, "max_num_seqs": 4},
    "chunks of 17": {"block_size": 32, "max_num_batched_tokens": 17, "max_num_seqs": 4},
    "chunks of 64": {"block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 4},
}


AGAIN = ("chunks of 16", "chunks of 64")
"""Left to one runner: interpreted kernels make the other one slow, and 17 cuts videos elsewhere in every chunk."""


def first_runner_alone(*values, **options):
    return pytest.param(*values, marks=pytest.mark.only_on("v1"), **options)


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def transformers_model(name):
    return transformers.AutoModelForImageTextToText.from_pretrained(checkpoint(name), dtype=torch.float32)


@pytest.fixture
def probed(start_engine, monkeypatch):
    """Return a function that starts an engine and watches it."""
    probes = []

    def start(name, **arguments):
        engine = start_engine(name, video_pruning_rate=RATE, **EAGER, **arguments)
        probes.append(Probe(engine, monkeypatch))
        return engine, probes[-1]

    yield start
    for probe in probes:
        probe.close()


def positions_by_transformers(model, prompt, features):
    """Return the positions of an unreduced prompt, (3, tokens), by transformers' own function."""
    config = model.config
    ids = torch.tensor([prompt])
    grids = {kind: [] for kind in ("image", "video")}
    seconds = []
    for feature in features:
        grids[feature.modality].append(feature.data[f"{feature.modality}_grid_thw"].data)
        if "second_per_grid_ts" in feature.data:
            seconds.append(feature.data["second_per_grid_ts"].data)
    positions, _ = model.model.get_rope_index(
        ids,
        (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int(),
        image_grid_thw=torch.stack(grids["image"]) if grids["image"] else None,
        video_grid_thw=torch.stack(grids["video"]) if grids["video"] else None,
        **({"second_per_grid_ts": torch.stack(seconds)} if seconds else {}),
    )
    return positions[:, 0]


def positions_by_stock_vllm(engine, prompt, features):
    """Return the positions of an unreduced prompt, (3, tokens), by the method of vLLM's own model class."""

    def positions_of(model):
        stock = next(cls for cls in type(model).__mro__ if cls.__module__.startswith("vllm."))
        return stock.get_mrope_input_positions(model, list(prompt), features)[0]

    (positions,) = engine.llm.apply_model(positions_of)
    return positions


def ask_whole_and_reduced(engine, probe, request_for):
    """Return the whole prompt, its features, and the reduced one's answer, positions and surviving indices.

    Positions are those of what was computed: all from somewhere before the first video on.
    """
    (whole,) = engine.ask(request_for(1.0), max_tokens=1)
    features = probe.features
    probe.positions(), probe.kept_cells()
    (reduced,) = engine.ask(request_for(None), max_tokens=4)
    positions = probe.positions()
    video_token_id = engine.llm.llm_engine.model_config.hf_config.video_token_id
    left = survivors(whole.prompt, features, probe.kept_cells(), video_token_id=video_token_id)
    return whole.prompt, features, reduced, positions, left


@pytest.mark.parametrize("chunks", [first_runner_alone(chunks) if chunks in AGAIN else chunks for chunks in CHUNKS])
def test_every_token_stands_where_transformers_puts_it_in_the_unreduced_prompt(
    probed, name, transformers_model, chunks
):
    """fps 8, so that a video's time passes more slowly than its space: see the next test."""
    asked = cases(seed=list(CHUNKS).index(chunks))
    assert all(prefixes_found_again(*probed(name, **CHUNKS[chunks]), transformers_model, asked))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3.5"], indirect=True, scope="module")
@pytest.mark.parametrize("chunks", [first_runner_alone("one piece"), "chunks of 17"])
def test_every_token_of_a_hybrid_stands_where_transformers_puts_it(probed, name, transformers_model, chunks):
    """Positions are those of Qwen3-VL; steps are others, for they end where a linear layer's state is to be kept.

    Only there a prefix is found again, and few prompts here share one that is long enough.
    """
    every = cases(seed=0)
    asked = {case: every[case] for case in ("two videos", "video, then image")}
    assert any(prefixes_found_again(*probed(name, **CHUNKS[chunks]), transformers_model, asked))


def prefixes_found_again(engine, probe, transformers_model, asked):
    """Return for each case whether, asked something else, the engine found what it had computed; check positions."""
    found = []
    for case, (parts, options) in asked.items():
        whole, features, reduced, positions, left = ask_whole_and_reduced(
            engine, probe, lambda retention, p=parts, o=options: qwen_request(*p, retention=retention, fps=8.0, **o)
        )
        expected = positions_by_transformers(transformers_model, whole, features)
        assert torch.equal(expected, positions_by_stock_vllm(engine, whole, features)), case
        assert [whole[index] for index in left] == list(reduced.prompt), case
        assert len(left) < len(whole), case
        assert same_from_behind(positions, expected[:, left]), case
        assert positions.shape[1] > len(reduced.prompt) - first_video_token(engine, reduced.prompt), case

        # asked something else, the engine finds a prefix in its cache that ends amid a video or behind it
        (again,) = engine.ask(qwen_request(*parts[:-1], "And then?", fps=8.0, **options), max_tokens=4)
        common = next(i for i, pair in enumerate(zip(again.prompt, reduced.prompt, strict=False)) if len({*pair}) > 1)
        rest = expected[:, left[common - 1 :][:1]] + torch.arange(1, len(again.prompt) - common + 1)
        positions = probe.positions()
        found.append(positions.shape[1] < len(again.prompt) + 3)
        assert same_from_behind(positions, torch.cat((expected[:, left[:common]], rest), dim=1)), case
    return found


def same_from_behind(positions, prompt):
    """Return whether positions are the last of a prompt's, and go on counting in the three steps of its answer."""
    answer = prompt.max() + 1 + torch.arange(3).expand(3, 3)
    return torch.equal(positions, torch.cat((prompt, answer), dim=1)[:, -positions.shape[1] :])


def first_video_token(engine, prompt):
    return prompt.index(engine.llm.llm_engine.model_config.hf_config.video_token_id)


@pytest.mark.parametrize("chunks", ["one piece", "chunks of 17"])
def test_times_beyond_256_and_3000_are_exact(probed, name, chunks):
    """Where a video's time runs ahead of its space, transformers 5.19 lets the text after it begin within the video.

    vLLM begins it behind, as transformers 4 did when the models were published; then that is what ours has to meet.
    """
    engine, probe = probed(name, **CHUNKS[chunks])
    for index, fps in enumerate((0.0077, 0.0013)):  # 519 and 3,076 units of time a frame
        clip, other = (wide(14, 77 + 10 * index + len(chunks) + offset) for offset in (0, 40))
        whole, features, reduced, positions, left = ask_whole_and_reduced(
            engine,
            probe,
            lambda retention, c=clip, o=other, f=fps: qwen_request(c, " and ", o, "?", retention=retention, fps=f),
        )
        expected = positions_by_stock_vllm(engine, whole, features)
        assert [whole[index] for index in left] == list(reduced.prompt)
        assert same_from_behind(positions, expected[:, left])
        if name == "qwen2.5-vl":
            assert positions.max() > (3000, 18000)[index]


def mixed_requests(seed):
    clip, other = wide(9, seed), video(6, seed=seed + 1)
    return [
        qwen_request(clip, "What?"),
        qwen_request(clip, "Why?", retention=0.5),
        qwen_request(clip, "What?", retention=1.0),
        qwen_request(clip, other, "What?", retention=0.1),
        qwen_request("See ", image(), other, "What?"),
        qwen_request(other, image(), "What?", system=False),
        qwen_request("Nothing to see."),
        qwen_request(image(seed=3), "What?"),
    ]


@pytest.fixture(scope="module")
def plain_answers(name, engine_holder):
    engine = engine_holder.get(name, video_pruning_rate=RATE, enable_prefix_caching=False, mm_processor_cache_gb=0)
    return [engine.ask(one, max_tokens=24)[0] for one in mixed_requests(5)]


@pytest.mark.parametrize(
    "arguments",
    [
        first_runner_alone({"enable_prefix_caching": False, "mm_processor_cache_gb": 0}),
        {"enable_prefix_caching": True, "block_size": 32},
        {"enable_prefix_caching": True, "max_num_batched_tokens": 16, "max_num_seqs": 4, "block_size": 32},
        first_runner_alone({"enable_prefix_caching": False, "max_num_batched_tokens": 17, "max_num_seqs": 4}),
        first_runner_alone({"enable_prefix_caching": True, "max_num_batched_tokens": 64, "max_num_seqs": 8}),
    ],
    ids=["no cache", "prefix cache", "chunks of 16 and prefix cache", "chunks of 17", "chunks of 64 and prefix cache"],
)
def test_answers_are_the_same_again_together_and_with(start_engine, name, plain_answers, arguments):
    assert_the_same_again_and_together(start_engine(name, video_pruning_rate=RATE, **arguments), name, plain_answers)


@pytest.mark.only_on("v1")
@pytest.mark.parametrize("name", ["qwen3.5"], indirect=True, scope="module")
def test_answers_of_a_hybrid_are_the_same_again_together_and_with_chunks_and_prefix_cache(
    start_engine, name, plain_answers
):
    arguments = {"enable_prefix_caching": True, "max_num_batched_tokens": 17, "max_num_seqs": 4, "block_size": 32}
    assert_the_same_again_and_together(start_engine(name, video_pruning_rate=RATE, **arguments), name, plain_answers)


def assert_the_same_again_and_together(engine, name, plain_answers):
    """Twice in a row and all at once, with retentions mixed, as one by one without cache and chunks."""
    requests = mixed_requests(5)
    for round_of in (
        [engine.ask(one)[0] for one in requests],
        [engine.ask(one)[0] for one in reversed(requests)][::-1],
        engine.ask(*requests),
    ):
        for one, other in zip(round_of, plain_answers, strict=True):
            assert agree(one, other, within=rounding(name))


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_answers_survive_preemption(start_engine, name, plain_answers, prefix_caching, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    room = {"qwen2.5-vl": 256, "qwen3-vl": 512}[name]  # for the longest request and little more
    preempted = []
    preempt = Scheduler._preempt_request
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *a, **k: preempted.append(1) or preempt(*a, **k))
    engine = start_engine(
        name,
        video_pruning_rate=RATE,
        enable_prefix_caching=prefix_caching,
        max_model_len=room,
        max_num_batched_tokens=512,
        block_size=32,
        kv_cache_memory_bytes=(room + 64) * 2 * 2 * 32 * 4,  # tokens * layers * (key, value) * head size * float32
    )
    together = engine.ask(*mixed_requests(5), max_tokens=24)
    assert preempted
    for one, other in zip(together, plain_answers, strict=True):
        assert agree(one, other, within=rounding(name))


def test_a_decode_step_leaves_positions_untouched_and_looks_at_the_last_one_alone(start_engine, name):
    engine = start_engine(name, video_pruning_rate=RATE)
    positions = torch.arange(9).expand(3, 9).clone()

    def recompute(model):
        return model.recompute_mrope_positions(list(range(9)), [], positions, 9)

    ((embeddings, same, delta),) = engine.llm.apply_model(recompute)
    assert same is positions
    assert len(embeddings) == delta == 0
