"""Defects of vLLM 0.32's own pruning that AOT must not inherit: each shown on the stock path, then absent from ours.

The stock half documents vLLM: where it fails after an upgrade, vLLM has mended something. On a CPU, stock Model Runner
V1 ends at the first pruned video, so all other defects are shown on V2.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.checkpoints import checkpoint
from tests.e2e.engines import image, video
from tests.e2e.qwen import qwen_request

RATE = 0.75
CLOSE = {"rel": 0, "abs": 2e-4}
CLIP, OTHER, PICTURE = ["video", 9, 1], ["video", 6, 2], ["image", 0, 3]
CHUNKED = {"max_num_batched_tokens": 16, "max_num_seqs": 4}


def stock(name, *requests, **arguments):
    """Return what vLLM as it ships makes of requests with pruning on, up to the one that ends it."""
    spec = {
        "model": str(checkpoint(name)),
        "arguments": {"video_pruning_rate": RATE, **arguments},
        "requests": [[parts, options] for parts, options in requests],
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("stock_pruning.py"))],
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-3000:]
    return lines


def ours(engine, parts, **options):
    media = [
        part
        if isinstance(part, str)
        else image(seed=part[2])
        if part[0] == "image"
        else video(part[1], side=168, seed=part[2])[:, :112]
        for part in parts
    ]
    (answer,) = engine.ask(qwen_request(*media, **options))
    return answer


@pytest.mark.only_on("v1")
@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_stock_v1_on_a_cpu_dies_of_the_first_pruned_video_and_ours_does_not(start_engine, name):
    assert "error" in stock(name, ([CLIP, "?"], {}))[0]
    assert ours(start_engine(name, video_pruning_rate=RATE), [CLIP, "?"]).tokens


@pytest.mark.only_on("v2")
@pytest.mark.parametrize("parts", [[CLIP, OTHER, "?"], [CLIP, PICTURE, "?"]], ids=["two videos", "video, then image"])
def test_stock_dies_of_a_second_item_after_a_video_and_ours_does_not(start_engine, parts):
    """Qwen2.5-VL: all elements of broadcast shape must be non-negative."""
    assert "non-negative" in stock("qwen2.5-vl", (parts, {}))[-1]["error"]
    assert ours(start_engine("qwen2.5-vl", video_pruning_rate=RATE), parts).tokens


@pytest.mark.only_on("v2")
def test_stock_answers_the_same_request_otherwise_out_of_the_prefix_cache_and_ours_does_not(start_engine):
    settings = {"enable_prefix_caching": True, "block_size": 32}
    parts = [CLIP, "What happens here?"]
    first, second = stock("qwen3-vl", (parts, {}), (parts, {}), **settings)
    assert second["logprobs"] != pytest.approx(first["logprobs"], **CLOSE)
    engine = start_engine("qwen3-vl", video_pruning_rate=RATE, **settings)
    assert ours(engine, parts).logprobs == pytest.approx(ours(engine, parts).logprobs, **CLOSE)


@pytest.mark.only_on("v2")
def test_stock_answers_otherwise_in_chunks_and_ours_does_not(start_engine):
    parts = [CLIP, "?"]
    whole, chunked = stock("qwen3-vl", (parts, {})), stock("qwen3-vl", (parts, {}), **CHUNKED)
    assert chunked[0]["logprobs"] != pytest.approx(whole[0]["logprobs"], **CLOSE)
    answers = [ours(start_engine("qwen3-vl", video_pruning_rate=RATE, **cut), parts) for cut in ({}, CHUNKED)]
    assert answers[0].logprobs == pytest.approx(answers[1].logprobs, **CLOSE)


@pytest.mark.only_on("v2")
def test_stock_fails_without_a_system_message_and_ours_does_not(start_engine):
    """Qwen3-VL: the marker before the whole video is taken for that of a frame."""
    parts = [CLIP, "?"]
    assert "RuntimeError" in stock("qwen3-vl", (parts, {"system": False}))[0]["error"]
    assert ours(start_engine("qwen3-vl", video_pruning_rate=RATE), parts, system=False).tokens


@pytest.mark.only_on("v2")
def test_stock_drops_a_token_at_a_rate_of_next_to_nothing_and_ours_does_not(start_engine):
    parts, rate = [CLIP, "?"], 1e-6
    whole = len(ours(start_engine("qwen2.5-vl"), parts).prompt)
    assert len(stock("qwen2.5-vl", (parts, {}), video_pruning_rate=rate)[0]["prompt"]) == whole - 1
    assert len(ours(start_engine("qwen2.5-vl", video_pruning_rate=rate), parts).prompt) == whole
