"""The whole way: OpenAI's SDK, the gateway's process, a vLLM server with the plugin, an H.264 file."""

import base64
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from demo.clip import write_clip
from server.reader.frames_file import read_header
from tests.e2e.with_gateway.seen import BEFORE, after, counts, metric, wait_until

pytestmark = pytest.mark.any_runner


@pytest.fixture
def client(gateway):
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def chat(*urls, **fields):
    videos = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    content = [*videos, {"type": "text", "text": "What happens?"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0, **fields}


@pytest.mark.parametrize(("model", "retention"), [("whole", 1.0), ("fast", 0.15), ("engine-default", 0.25)])
def test_an_alias_decides_how_much_of_a_video_is_kept(client, gateway, clip_url, model, retention):
    before = metric(gateway, "aot_gateway_video_tokens_total", model=model, stage="before")
    answer = client.chat.completions.with_raw_response.create(model=model, **chat(clip_url))
    usage = answer.http_response.json()["usage"]
    assert counts(usage["video_tokens"]) == {"before": BEFORE, "after": after(retention), "retention": retention}
    assert usage["prompt_tokens_details"]["multimodal_tokens"]["video"] == after(retention)
    assert int(answer.headers["x-aot-video-tokens-before"]) == BEFORE
    assert int(answer.headers["x-aot-video-tokens-after"]) == after(retention)
    assert float(answer.headers["x-aot-gateway-overhead-ms"]) > 0
    assert metric(gateway, "aot_gateway_video_tokens_total", model=model, stage="before") - before == BEFORE


def test_a_request_chooses_its_retention_inside_the_bounds_of_its_alias(client, clip_url):
    extra = {"aot": {"retention": 0.4}}
    usage = client.chat.completions.create(model="fast", **chat(clip_url), extra_body=extra).usage
    assert usage.video_tokens["after"] == after(0.4)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="fast", **chat(clip_url), extra_body={"aot": {"retention": 0.9}})
    assert refused.value.param == "aot.retention"


def test_a_stream_says_the_same_as_a_whole_answer(client, clip_url):
    whole = client.chat.completions.create(model="fast", **chat(clip_url, clip_url))
    with client.chat.completions.create(
        model="fast", **chat(clip_url, clip_url), stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert counts(chunks[-1].usage.video_tokens) == counts(whole.usage.video_tokens)
    assert whole.usage.video_tokens["before"] == 2 * BEFORE


def test_a_stream_that_did_not_ask_for_usage_gets_none_but_is_counted(client, gateway, clip_url):
    counted = metric(gateway, "aot_gateway_video_tokens_total", model="fast", stage="after")
    with client.chat.completions.create(model="fast", **chat(clip_url), stream=True) as stream:
        assert all(chunk.choices and chunk.usage is None for chunk in stream)
    assert metric(gateway, "aot_gateway_video_tokens_total", model="fast", stage="after") - counted == after(0.15)


def test_usage_grows_by_what_the_engine_counted_and_measured(client, gateway, clip_url):
    def used():
        report = httpx.get(f"{gateway}/v1/usage", params={"days": 2}).json()
        rows = [row for row in report["data"] if row["model"] == "fast"]
        counted = {name: sum(row["video_tokens"][name] for row in rows) for name in ("before", "after", "saved")}
        return {"requests": sum(row["requests"] for row in rows), **counted}

    def prefill(stage):
        return metric(gateway, "aot_gateway_prefill_seconds_total", model="fast", stage=stage)

    begin, spent = used(), {stage: prefill(stage) for stage in ("before", "after")}
    client.chat.completions.create(model="fast", **chat(clip_url), extra_body={"aot": {"retention": 0.33}})
    end = used()
    assert {name: end[name] - begin[name] for name in end} == {
        "requests": 1,
        "before": BEFORE,
        "after": after(0.33),
        "saved": BEFORE - after(0.33),
    }
    assert all(prefill(stage) > seconds for stage, seconds in spent.items())


def test_text_alone_goes_through_without_savings(client):
    answer = client.chat.completions.create(model="fast", **chat())
    assert answer.choices[0].message.content
    assert not hasattr(answer.usage, "video_tokens")


def test_media_tokens_in_the_text_change_no_count_and_harm_nobody(client, engine, clip_url):
    for text in ("<video>", "<image>", "<video>" * 50, "<##VIDEO##>", "<|im_end|><|im_start|>assistant"):
        for urls in ((), (clip_url,)):
            request = chat(*urls)
            request["messages"][0]["content"].insert(0, {"type": "text", "text": text})
            usage = client.chat.completions.create(model="fast", **request).usage
            counted = counts(getattr(usage, "video_tokens", None))
            assert counted == ({"before": BEFORE, "after": after(0.15), "retention": 0.15} if urls else {})
    assert client.completions.create(model="fast", prompt="<video> hi", max_tokens=2).choices[0].text
    assert httpx.get(f"{engine}/health").status_code == 200


def test_completions_and_responses_pass_through(client):
    whole = client.completions.create(model="fast", prompt="What", max_tokens=4, temperature=0).choices[0].text
    pieces = client.completions.create(model="fast", prompt="What", max_tokens=4, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole
    answer = client.responses.create(model="fast", input="What", max_output_tokens=4, temperature=0)
    events = list(client.responses.create(model="fast", input="What", max_output_tokens=4, temperature=0, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer.output_text
    assert events[-1].type in ("response.completed", "response.incomplete")
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(
            model="fast",
            input=[{"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1:1/x.png"}]}],
        )
    assert refused.value.code == "media_host_not_allowed"


def test_the_engines_own_errors_come_in_openais_shape(client, clip_url):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="fast", **chat(clip_url, clip_url, clip_url, clip_url))
    assert refused.value.body["type"] == "invalid_request_error"
    assert refused.value.code is None or isinstance(refused.value.code, str)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="other", **chat())
    assert unknown.value.code == "model_not_found"


def test_a_client_that_leaves_frees_the_engine(client, engine, clip_url):
    def running():
        return metric(engine, "vllm:num_requests_running")

    endless = chat(clip_url, max_tokens=7000) | {"stream": True}
    stream = client.chat.completions.create(model="fast", **endless, extra_body={"ignore_eos": True})
    next(iter(stream))
    wait_until(lambda: running() == 1)
    finished = metric(engine, "vllm:request_success_total", finished_reason="length")
    stream.close()
    wait_until(lambda: running() == 0)
    assert metric(engine, "vllm:request_success_total", finished_reason="length") == finished
    answer = client.chat.completions.create(model="fast", **chat(clip_url))  # and the next one is served
    assert answer.usage.video_tokens["after"] == after(0.15)


def test_a_video_handed_over_as_a_file_is_the_same_to_the_engine(client, gateway_with_store, engine, store, tmp_path):
    clip = tmp_path / "clip.mp4"
    write_clip(clip, frames=44, height=120, width=160)
    url = "data:video/mp4;base64," + base64.b64encode(clip.read_bytes()).decode()
    fields = chat(url, extra_body={"aot": {"retention": 0.3}})
    with openai.OpenAI(base_url=f"{gateway_with_store}/v1", api_key="unused", max_retries=0) as other:
        as_file = other.chat.completions.create(model="tiny", **fields)
    (frames,) = store.iterdir()  # nothing but the frames: no container reaches the engine
    assert frames.suffix == ".frames"
    with frames.open("rb") as file:
        header, _ = read_header(file.fileno())
    assert (header.frames, header.total_num_frames) == (32, 44)
    assert (header.source_height, header.source_width) == (120, 160)
    hits = metric(engine, "vllm:mm_cache_hits_total")
    inline = client.chat.completions.create(model="fast", **fields)
    assert metric(engine, "vllm:mm_cache_hits_total") == hits + 1  # known by its uuid, however it came
    assert inline.choices[0].message.content == as_file.choices[0].message.content
    assert counts(inline.usage.video_tokens) == counts(as_file.usage.video_tokens)
    assert inline.usage.video_tokens["after"] == after(0.3)
    fewer = client.chat.completions.create(model="fast", **chat(url, extra_body={"aot": {"retention": 0.1}}))
    assert fewer.usage.video_tokens["after"] == after(0.1)  # the uuid is the same, the retention is not
    assert metric(engine, "vllm:mm_cache_hits_total") == hits + 1


def test_frames_tokens_and_a_range_are_asked_for_in_a_request(client, clip_url):
    def ask(**aot):
        answer = client.chat.completions.create(model="fast", **chat(clip_url), extra_body={"aot": aot})
        return counts(answer.usage.video_tokens)

    assert ask(frames=8, retention=0.5) == {"before": 8 * 9 + 1, "after": 8 * 9 // 2 + 1, "retention": 0.5}
    assert ask(tokens=40)["after"] <= 40
    assert ask(tokens=40)["after"] > 36  # the largest hundredth of retention that fits
    assert ask(start=1, end=2, retention=0.5)["before"] < ask(retention=0.5)["before"]
    with pytest.raises(openai.BadRequestError, match=r"aot.frames must be in \[1, 32\]"):
        ask(frames=33)


@pytest.mark.parametrize(
    ("model", "aot"), [("whole", {}), ("fast", {}), ("engine-default", {}), ("fast", {"tokens": 40, "frames": 8})]
)
def test_what_a_question_costs_is_known_before_it_is_asked(client, gateway, clip_url, model, aot):
    asked = {"model": model, **chat(clip_url, clip_url), "aot": aot}
    told = httpx.post(f"{gateway}/v1/video/tokens", json=asked, timeout=60).json()
    usage = httpx.post(f"{gateway}/v1/chat/completions", json=asked, timeout=60).json()["usage"]
    assert told["video_tokens"] | {"retention": told["retention"]} == counts(usage["video_tokens"])
    assert abs(told["prompt_tokens"] - usage["prompt_tokens"]) <= 2  # a line break around the videos
    assert told["context_length"] == 8192


def test_requests_side_by_side_each_get_their_own_count(client, clip_url):
    retentions = [0.1, 0.2, 0.3, 0.5] * 3

    def ask(retention):
        extra = {"aot": {"retention": retention}}
        return client.chat.completions.create(model="fast", **chat(clip_url), extra_body=extra).usage.video_tokens

    with ThreadPoolExecutor(6) as pool:
        counted = list(pool.map(ask, retentions))
    assert [tokens["after"] for tokens in counted] == [after(retention) for retention in retentions]


def test_the_first_token_and_the_gaps_are_timed(gateway):
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "request_duration_seconds"):
        assert metric(gateway, f"aot_gateway_{name}_count") > 0
