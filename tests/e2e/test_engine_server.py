"""`vllm serve` with the plugin: what a request saved, in its response headers and on /metrics."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from demo.clip import write_clip
from demo.tiny_checkpoints import checkpoint
from tests.e2e.engines import free_port, process, serve_command

FRAMES = 32
BEFORE, AFTER = FRAMES * 9 + 1, 72 + 1


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Data URLs of H.264 clips, by seed."""
    folder = tmp_path_factory.mktemp("clips")
    urls = []
    for seed in range(3):
        path = folder / f"{seed}.mp4"
        write_clip(path, frames=40, height=120, width=160, seed=seed)
        urls.append("data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode())
    return urls


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    port = free_port()
    command = serve_command(
        checkpoint("tiny"),
        port,
        "--video-pruning-rate=0.75",
        "--served-model-name=tiny",
        "--enable-prompt-tokens-details",
    )
    log = tmp_path_factory.mktemp("engine") / "log"
    address = f"http://127.0.0.1:{port}"
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # the engine in a process of its own, as in production
    with (
        process(command, health=f"{address}/health", log=log, environment=apart),
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


def body(*urls, **fields):
    media = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    text = {"type": "text", "text": "What happens?"}
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": [*media, text]}],
        "max_tokens": 3,
        "temperature": 0,
        **fields,
    }


def ask(server, *urls, **fields):
    response = server.post("/v1/chat/completions", json=body(*urls, **fields))
    assert response.status_code == 200, response.text
    return response


def savings(response):
    names = ("before", "after")
    return tuple(int(response.headers[f"x-aot-video-tokens-{name}"]) for name in names)


def counters(server):
    text = server.get("/metrics").text
    return {
        sample.name + "".join(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("aot_engine_") and sample.name.endswith("_total")
    }


def test_headers_and_usage_agree_also_when_everything_is_cached(server, clips):
    for _ in range(3):
        response = ask(server, clips[0])
        assert savings(response) == (BEFORE, AFTER)
        assert response.headers["x-aot-video-retention"] == "0.25"
        assert response.json()["usage"]["prompt_tokens_details"]["multimodal_tokens"]["video"] == AFTER


def test_several_videos_are_summed_and_the_same_twice_counts_twice(server, clips):
    assert savings(ask(server, clips[0], clips[1], clips[0])) == (3 * BEFORE, 3 * AFTER)


def test_a_request_may_name_its_retention(server, clips):
    response = ask(server, clips[0], mm_processor_kwargs={"aot_retention": 0.5})
    assert savings(response) == (BEFORE, 144 + 1)
    assert response.headers["x-aot-video-retention"] == "0.5"
    everything = ask(server, clips[0], mm_processor_kwargs={"aot_retention": 1})
    assert savings(everything) == (BEFORE, BEFORE)


def test_a_stream_has_the_headers_before_its_first_byte(server, clips):
    fields = {"stream": True, "stream_options": {"include_usage": True}}
    with server.stream("POST", "/v1/chat/completions", json=body(clips[2], **fields)) as response:
        assert savings(response) == (BEFORE, AFTER)
        events = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["prompt_tokens_details"]["multimodal_tokens"]["video"] == AFTER


def test_text_alone_has_no_savings_and_other_paths_are_left_alone(server):
    assert not [name for name in ask(server).headers if name.startswith("x-aot")]
    assert server.get("/v1/models").status_code == 200


def test_concurrent_requests_never_see_each_others_savings(server, clips):
    wanted = [(1, 0.1), (2, 0.25), (3, 0.5), (1, 1.0), (0, 0.3)] * 4

    def one(case):
        videos, retention = case
        return ask(server, *clips[:videos], mm_processor_kwargs={"aot_retention": retention})

    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(one, wanted))
    for (videos, retention), response in zip(wanted, responses, strict=True):
        if videos:
            assert savings(response) == (
                videos * BEFORE,
                videos * (max(FRAMES, round(288 * retention)) + 1),
            )  # at least one a frame
        else:
            assert "x-aot-video-tokens-before" not in response.headers


def test_a_bad_retention_is_a_client_error(server, clips):
    for bad in (0, 2, "half", True):
        response = server.post("/v1/chat/completions", json=body(clips[0], mm_processor_kwargs={"aot_retention": bad}))
        assert response.status_code == 400, response.text
        assert "retention must be in (0, 1]" in response.text
    assert savings(ask(server, clips[0])) == (BEFORE, AFTER)


def test_counters_grow_by_what_was_served(server, clips):
    before = counters(server)
    ask(server, clips[0], clips[1])
    ask(server, clips[0])
    ask(server, clips[0], mm_processor_kwargs={"aot_retention": 0.77})
    ask(server, clips[0], mm_processor_kwargs={"aot_retention": 1})
    ask(server)
    grown = {name: value - before.get(name, 0) for name, value in counters(server).items()}
    assert grown["aot_engine_video_tokens_totalbefore"] == 5 * BEFORE
    assert grown["aot_engine_video_tokens_totalafter"] == 3 * AFTER + round(288 * 0.77) + 1 + BEFORE
    assert grown["aot_engine_videos_reduced_total"] == 4
    assert grown["aot_engine_reductions_total"] == 1  # 0.77 was new, the others lay in the caches
    assert grown["aot_engine_reduction_seconds_total"] > 0
    assert grown["aot_engine_tower_seconds_total"] > 0
    assert "aot_engine_unconverged_solves_total" in grown


@pytest.mark.any_runner
def test_it_tells_what_prefill_and_reductions_cost(server, clips):
    ask(server, clips[0])
    server.get("/metrics")  # which asks the workers
    told = server.get("/v1/aot/engine").json()["prefill"]
    assert told["tokens"] == [64, 128, 256, 512, 1024, 2048, 4096, 8191][: len(told["tokens"])]
    assert len(told["tokens"]) == len(told["seconds"]) >= 2
    assert all(seconds > 0 for seconds in told["seconds"])
    assert told["reduction_seconds_per_token"] > 0


@pytest.fixture(scope="module")
def qwen_server(tmp_path_factory):
    port = free_port()
    address, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("qwen") / "log"
    command = serve_command(checkpoint("qwen3-vl"), port, "--video-pruning-rate=0.75", "--served-model-name=tiny")
    with process(command, health=f"{address}/health", log=log), httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.mark.any_runner
def test_qwens_timestamps_and_markers_are_counted_neither_before_nor_after(qwen_server, clips):
    def counted(response):
        return response.json()["usage"]["prompt_tokens_details"]["multimodal_tokens"]["video"]

    whole = ask(qwen_server, clips[0], mm_processor_kwargs={"aot_retention": 1})
    before, after = savings(whole)
    assert before == after < counted(whole)
    for _ in range(2):  # and again out of the caches
        response = ask(qwen_server, clips[0])
        assert savings(response) == (before, round(0.25 * before))
        assert counted(whole) - counted(response) == before - round(0.25 * before)
    assert savings(ask(qwen_server, clips[0], clips[1])) == (2 * before, 2 * round(0.25 * before))
