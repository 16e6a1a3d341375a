"""Defects of vLLM 0.32's own pruning that AOT must not inherit: each shown on the stock path, then absent from ours.

The stock half documents vLLM: where it fails after an upgrade, vLLM has mended something. On a CPU, stock Model Runner
V1 ends at the first pruned video, so defects that come later are shown on V2, but for what V1 does in every step: there
the one flag is set that it forgets.
"""

import json

import pytest
import torch

from tests.e2e.forks import run_stock
from tests.e2e.qwen import Probe, made, qwen_request, watch_recomputations

pytestmark = pytest.mark.slow

RATE = 0.75
CLOSE = {"rel": 0, "abs": 2e-4}
CLIP, OTHER, PICTURE = ["video", 9, 1], ["video", 6, 2], ["image", 0, 3]
QUESTION = [CLIP, "What happens here?"]
CHUNKED = {"max_num_batched_tokens": 16, "max_num_seqs": 4}
PREFIX_CACHE = {"enable_prefix_caching": True, "block_size": 32}


def spec(name, *requests, as_on_a_gpu=False, **arguments):
    """Return a checkpoint, and requests up to the one that ends the engine, for vLLM as it ships with pruning on.

    `as_on_a_gpu`: set the flag that Model Runner V1 forgets on a CPU.
    """
    return {
        "model": name,
        "arguments": {"video_pruning_rate": RATE, **arguments},
        "requests": requests,
        "as_on_a_gpu": as_on_a_gpu,
    }


ONE_A_SECOND = {"dtype": "bfloat16", "hf_overrides": {"vision_config": {"tokens_per_second": 1}}}
"""Qwen2.5-VL with as many units of time between two frames as there are seconds, so that odd ones can be had."""
FAR_APART = [(171, 512), (1000, 3008)]
"""Seconds between two frames, which bfloat16 holds, for vLLM's processor casts them; and to what it rounds the fourth
frame's time, which it doesn't hold."""
METHODS = ("evs", "vidcom2")
SECOND_ITEMS = {"two videos": [CLIP, OTHER, "?"], "video, then image": [CLIP, PICTURE, "?"]}
NEXT_TO_NOTHING = 1e-6
FIRST_VIDEO = ([CLIP, "?"], {})
SPECS = {
    "v1": {
        **{name: spec(name, FIRST_VIDEO) for name in ("qwen2.5-vl", "qwen3-vl", "qwen3.5")},
        "as on a GPU": spec("qwen2.5-vl", FIRST_VIDEO, as_on_a_gpu=True),
    },
    "v2": {
        **{items: spec("qwen2.5-vl", (parts, {})) for items, parts in SECOND_ITEMS.items()},
        "next to nothing": spec("qwen2.5-vl", FIRST_VIDEO, video_pruning_rate=NEXT_TO_NOTHING),
        "far apart": spec("qwen2.5-vl", *(([CLIP, "?"], {"fps": 2 / apart}) for apart, _ in FAR_APART), **ONE_A_SECOND),
    },
}
for method in METHODS:
    questions = (QUESTION, {}), (QUESTION, {}), (QUESTION, {"system": False})
    pruned = {"video_pruning_method": method}
    SPECS["v2"][f"{method}, prefix cache"] = spec("qwen3-vl", *questions, **pruned, **PREFIX_CACHE)
    SPECS["v2"][f"{method}, in chunks"] = spec("qwen3-vl", questions[0], **pruned, **CHUNKED)


@pytest.fixture(scope="module")
def stock(request):
    """Return what vLLM as it ships makes of each spec for this model runner: an answer or an error for each request."""
    specs = SPECS[request.config.getoption("--runner")]
    seen = {}
    for name, run in zip(specs, run_stock("stock_pruning", list(specs.values())), strict=True):
        seen[name] = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        assert seen[name], run.stderr[-3000:]
    return seen


def ours(engine, parts, **options):
    (answer,) = engine.ask(qwen_request(*made(parts), **options))
    return answer


@pytest.mark.only_on("v1")
@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_stock_v1_on_a_cpu_dies_of_the_first_pruned_video_and_ours_does_not(start_engine, stock, name):
    assert "error" in stock[name][0]
    assert ours(start_engine(name, video_pruning_rate=RATE), [CLIP, "?"]).tokens


@pytest.mark.only_on("v2")
@pytest.mark.parametrize("items", SECOND_ITEMS)
def test_stock_dies_of_a_second_item_after_a_video_and_ours_does_not(start_engine, stock, items):
    """Qwen2.5-VL: all elements of broadcast shape must be non-negative."""
    assert "non-negative" in stock[items][-1]["error"]
    assert ours(start_engine("qwen2.5-vl", video_pruning_rate=RATE), SECOND_ITEMS[items]).tokens


@pytest.mark.only_on("v2")
@pytest.mark.parametrize("method", METHODS)
def test_stock_answers_otherwise_out_of_the_prefix_cache_and_in_chunks_and_fails_without_a_system_message(
    stock, method
):
    """Qwen3-VL, whichever method prunes; the marker before the whole video is taken for that of a frame."""
    asked, again, without_system = stock[f"{method}, prefix cache"]
    (in_chunks,) = stock[f"{method}, in chunks"]
    for other in (again, in_chunks):
        assert other["prompt"] == asked["prompt"]
        assert other["logprobs"] != pytest.approx(asked["logprobs"], **CLOSE)
    assert "RuntimeError" in without_system["error"]


@pytest.mark.only_on("v2")
def test_ours_answers_alike_out_of_the_prefix_cache_and_in_chunks_and_without_a_system_message(start_engine):
    in_chunks = ours(start_engine("qwen3-vl", video_pruning_rate=RATE, **CHUNKED), QUESTION)
    engine = start_engine("qwen3-vl", video_pruning_rate=RATE, **PREFIX_CACHE)
    asked, again = ours(engine, QUESTION), ours(engine, QUESTION)
    assert asked.logprobs == pytest.approx(again.logprobs, **CLOSE)
    assert asked.logprobs == pytest.approx(in_chunks.logprobs, **CLOSE)
    assert ours(engine, QUESTION, system=False).tokens


@pytest.mark.only_on("v2")
def test_stock_drops_a_token_at_a_rate_of_next_to_nothing_and_ours_does_not(start_engine, stock):
    whole = len(ours(start_engine("qwen2.5-vl"), [CLIP, "?"]).prompt)
    assert len(stock["next to nothing"][0]["prompt"]) == whole - 1
    engine = start_engine("qwen2.5-vl", video_pruning_rate=NEXT_TO_NOTHING)
    assert len(ours(engine, [CLIP, "?"]).prompt) == whole


def video_times(prompt, times):
    """Return the times of a prompt's video tokens, counted from that of the first."""
    of_video = [time for token, time in zip(prompt, times, strict=False) if token == max(prompt)]
    return {time - of_video[0] for time in of_video}


@pytest.mark.only_on("v2")
def test_stock_rounds_positions_to_what_bfloat16_holds(stock):
    for (apart, rounded), answer in zip(FAR_APART, stock["far apart"], strict=True):
        times = video_times(answer["prompt"], answer["times"])
        assert rounded in times
        assert 3 * apart not in times


def test_ours_keeps_positions_exact_in_bfloat16(start_engine, monkeypatch):
    engine = start_engine("qwen2.5-vl", video_pruning_rate=RATE, **ONE_A_SECOND)
    probe = Probe(engine, monkeypatch)
    for apart, _ in FAR_APART:
        answer = ours(engine, [["video", 9, apart], "?"], fps=2 / apart)
        *_, reduced = probe.reductions[-1]
        assert reduced.tokens.dtype == torch.bfloat16
        kept = sorted(zip(reduced.frames.tolist(), reduced.rows.tolist(), reduced.cols.tolist(), strict=True))
        assert any(frame == 3 for frame, _, _ in kept)
        positions = probe.positions()[:, : len(answer.prompt)]
        first = answer.prompt.index(max(answer.prompt))
        assert (positions[:, first : first + len(kept)] - first).T.tolist() == [[apart * t, r, c] for t, r, c in kept]
    probe.close()


@pytest.mark.only_on("v1")
def test_stock_works_through_the_whole_prompt_at_every_decoded_token_and_ours_does_not(start_engine, stock):
    (answer,) = stock["as on a GPU"]
    assert answer["recomputations"] == [[1, False], [0, False], [0, False], [0, False]]

    calls = []
    engine = start_engine("qwen2.5-vl", video_pruning_rate=RATE)
    engine.llm.apply_model(lambda model: watch_recomputations(model, calls))
    ours(engine, [CLIP, "?"])
    engine.llm.apply_model(lambda model: vars(model).pop("recompute_mrope_positions"))
    assert calls == [[1, False], [0, True], [0, True], [0, True]]


@pytest.mark.only_on("v1")
def test_stock_dies_of_qwen3_5_s_first_pruned_video_and_ours_does_not(start_engine, stock):
    """It asks the model for its pruning method, which only Qwen3-VL's own classes settle; on V2 too."""
    assert "no attribute 'video_pruning_method'" in stock["qwen3.5"][0]["error"]
    assert ours(start_engine("qwen3.5", video_pruning_rate=RATE), [CLIP, "?"]).tokens
