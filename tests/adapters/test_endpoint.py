"""The endpoint plugin on a real FastAPI app: savings in headers, and counters on /metrics."""

import asyncio
from argparse import Namespace
from contextlib import asynccontextmanager
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.datastructures import State
from vllm.config import ParallelConfig

from aot_vllm import AOTConfig
from aot_vllm.adapters import endpoint
from aot_vllm.adapters.activation import WORKER_EXTENSION
from aot_vllm.adapters.endpoint import AOTEndpoint
from aot_vllm.adapters.settings import Reduction
from aot_vllm.adapters.telemetry import INFO, LEDGER, VideoSavings

CHAT = "/v1/chat/completions"
REDUCTION = Reduction(retention=0.25, method=AOTConfig(mass=0.2, epsilon=0.2), preset="diverse")
SAVED = {"a": VideoSavings(289, 73, 0.25), "b": VideoSavings(100, 25, 0.25), "whole": VideoSavings(50, 50, 1.0)}


@pytest.fixture(autouse=True)
def known_videos():
    for mm_hash, savings in SAVED.items():
        LEDGER.write(mm_hash, savings)


@pytest.fixture(autouse=True)
def description(monkeypatch):
    """Let the engine tell what it was described with."""
    monkeypatch.setattr(endpoint, "describe_engine", lambda vllm_config, **told: told)
    monkeypatch.setattr(endpoint, "active_reduction", lambda vllm_config: REDUCTION)


MEASURED = {"tokens": [64, 128], "seconds": [0.1, 0.25]}


@pytest.fixture(autouse=True)
def prefill(monkeypatch):
    """Let the engines' prefill be measured at once; return the engines."""
    engines = []

    async def measure(engine):
        engines.append(engine)
        return dict(MEASURED)

    monkeypatch.setattr(endpoint, "measure_prefill", measure)
    return engines


class Engine:
    """The part of vLLM's engine client that the endpoint uses, with totals that a worker would report."""

    def __init__(self, *, extension=WORKER_EXTENSION, rank=0, additional_config=None):
        parallel = ParallelConfig(worker_extension_cls=extension, _api_process_count=2, _api_process_rank=rank)
        self.vllm_config = SimpleNamespace(parallel_config=parallel, additional_config=additional_config)
        self.engine_core = self
        self.others = []
        self.totals = {
            "reductions": 0,
            "reduced_tokens": 0,
            "reduction_seconds": 0.0,
            "tower_seconds": 0.0,
            "unconverged_solves": 0,
        }
        self.asked = []
        self.answer = self.report

    async def report(self):
        # of each data-parallel engine one answer for each of two tensor-parallel ranks
        return [[dict(totals)] * 2 for totals in (self.totals, *self.others)]

    async def call_utility_all_async(self, method):
        self.asked.append(method)
        return await self.answer()


@asynccontextmanager
async def server(engine=None, served_model_name=None):
    """Yield a client of an API server that renders chats as vLLM does: in a task of the handler's own."""
    app, state, plugin = FastAPI(), State(), AOTEndpoint()

    async def render_chat(videos):
        return "conversation", [{"mm_hashes": {"video": [mm_hash]}} for mm_hash in videos] + [{"prompt": "text"}]

    state.online_renderer = SimpleNamespace(render_chat=render_chat)

    async def chat(request: Request):
        body = await request.json()
        await asyncio.create_task(state.online_renderer.render_chat(body["videos"]))
        if not body.get("stream"):
            return JSONResponse({"answer": 1}, headers={"x-own": "kept"})
        return StreamingResponse((f"data: {event}\n\n" for event in (1, 2, "[DONE]")), media_type="text/event-stream")

    async def metrics():
        return Response(generate_latest())

    app.add_api_route(CHAT, chat, methods=["POST"], response_model=None)
    app.add_api_route("/metrics", metrics, response_model=None)
    app.add_api_route("/v1/models", lambda: {"data": []})
    plugin.attach_router(app)
    await plugin.init_state(engine, state, Namespace(served_model_name=served_model_name, **ARGUMENTS))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        yield client


ARGUMENTS = {"model": "org/model", "trust_request_mm_kwargs": True, "enable_prompt_tokens_details": False}


async def ask(client, *videos, **fields):
    response = await client.post(CHAT, json={"videos": videos, **fields})
    assert response.status_code == 200
    return response


def savings(response):
    return {name: value for name, value in response.headers.items() if name.startswith("x-aot-")}


def headers_of(before, after, retention):
    return {
        "x-aot-video-tokens-before": str(before),
        "x-aot-video-tokens-after": str(after),
        "x-aot-video-retention": retention,
    }


async def counters(client):
    response = await client.get("/metrics")
    assert response.status_code == 200
    return {
        sample.name.removeprefix("aot_engine_") + "".join(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if sample.name.startswith("aot_engine_") and sample.name.endswith("_total")
    }


def growth(before, after):
    return {name: round(after[name] - before.get(name, 0), 6) for name in after if after[name] != before.get(name, 0)}


async def test_a_whole_answer_carries_its_savings_and_keeps_its_own_headers():
    async with server() as client:
        response = await ask(client, "a")
    assert savings(response) == headers_of(289, 73, "0.25")
    assert response.headers["x-own"] == "kept"
    assert response.json() == {"answer": 1}


async def test_a_stream_carries_its_savings_in_its_headers():
    async with server() as client:
        response = await ask(client, "a", stream=True)
    assert savings(response) == headers_of(289, 73, "0.25")
    assert response.text == "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"


async def test_the_same_video_again_carries_the_same_savings():
    async with server() as client:
        assert [savings(await ask(client, "a")) for _ in range(3)] == [headers_of(289, 73, "0.25")] * 3


async def test_several_videos_are_summed_and_a_repeated_video_counts_each_time():
    async with server() as client:
        assert savings(await ask(client, "a", "b", "a")) == headers_of(2 * 289 + 100, 2 * 73 + 25, "0.25")


async def test_a_video_that_kept_every_token_says_so():
    async with server() as client:
        assert savings(await ask(client, "whole")) == headers_of(50, 50, "1")


async def test_requests_without_known_videos_and_other_paths_carry_no_savings():
    async with server() as client:
        assert savings(await ask(client)) == {}
        assert savings(await ask(client, "never seen")) == {}
        assert savings(await client.get("/v1/models")) == {}


async def test_concurrent_requests_do_not_see_the_savings_of_each_other():
    async with server() as client:
        responses = await asyncio.gather(*(ask(client, *videos) for videos in (["a"], ["b"], [], ["a", "b"]) * 5))
    expected = [headers_of(289, 73, "0.25"), headers_of(100, 25, "0.25"), {}, headers_of(389, 98, "0.25")] * 5
    assert list(map(savings, responses)) == expected


async def test_the_counters_grow_by_the_videos_that_were_served():
    async with server() as client:
        before = await counters(client)
        for videos in (["a", "b"], ["a"], ["whole"], [], ["never seen"]):
            await ask(client, *videos)
        assert growth(before, await counters(client)) == {
            "video_tokens_totalbefore": 2 * 289 + 100 + 50,
            "video_tokens_totalafter": 2 * 73 + 25 + 50,
            "videos_reduced_total": 3,
        }


async def test_a_scrape_adds_the_growth_of_the_workers_totals():
    engine = Engine()
    async with server(engine) as client:
        before = await counters(client)
        engine.totals |= {"reductions": 3, "reduction_seconds": 0.5, "tower_seconds": 4.0, "unconverged_solves": 2}
        after = await counters(client)
        assert growth(before, after) == {
            "reductions_total": 3,
            "reduction_seconds_total": 0.5,
            "tower_seconds_total": 4.0,
            "unconverged_solves_total": 2,
        }
        assert growth(after, await counters(client)) == {}
    assert set(engine.asked) == {"aot_reduction_statistics"}


async def test_a_scrape_adds_what_every_data_parallel_engine_has_reduced():
    engine = Engine()
    engine.others = [dict(engine.totals), dict(engine.totals)]
    async with server(engine) as client:
        before = await counters(client)
        for reductions in (1, 4):
            engine.totals["reductions"], engine.others[1]["reductions"] = reductions, 2 * reductions
            await counters(client)
        assert growth(before, await counters(client)) == {"reductions_total": 12}


@pytest.mark.parametrize("engine", [Engine(extension="theirs.Extension"), Engine(rank=1), None])
async def test_workers_without_the_extension_are_not_asked_nor_any_by_a_second_api_server(engine):
    async with server(engine) as client:
        await counters(client)
    assert engine is None or engine.asked == []


async def test_a_dead_engine_does_not_fail_a_scrape(lines):
    async def die():
        raise ConnectionError("the engine is gone")

    engine = Engine()
    engine.answer = die
    async with server(engine) as client:
        before = await counters(client)
        engine.totals["reductions"], engine.answer = 2, engine.report
        assert growth(before, await counters(client)) == {"reductions_total": 2}
    assert lines == ["AOT: the engine did not report its reductions: ConnectionError"]


async def test_a_busy_engine_does_not_hold_up_a_scrape_nor_is_it_asked_twice_at_once(monkeypatch):
    monkeypatch.setattr(endpoint, "STATISTICS_TIMEOUT_SECONDS", 0.2)

    async def hang():
        await asyncio.Event().wait()

    engine = Engine()
    engine.answer = hang
    async with server(engine) as client:
        async with asyncio.timeout(5):
            await asyncio.gather(*(counters(client) for _ in range(4)))
        assert len(engine.asked) == 1
        engine.answer = engine.report
        await counters(client)
        assert len(engine.asked) == 2


@pytest.mark.parametrize(("served", "models"), [(None, ["org/model"]), (["a", "b"], ["a", "b"])])
async def test_an_engine_tells_its_names_and_its_flags(served, models):
    async with server(Engine(extension="theirs.Extension"), served) as client:
        response = await client.get("/v1/aot/engine")
    assert response.status_code == 200
    assert response.json() == {"models": models, "request_kwargs_trusted": True, "prompt_tokens_details": False}


async def test_an_engine_tells_what_prefill_and_reductions_cost_it(prefill, monkeypatch):
    engine = Engine()

    async def told(client):
        return (await client.get("/v1/aot/engine")).json()["prefill"]

    async with server(engine) as client:
        assert await told(client) == {**MEASURED, "reduction_seconds_per_token": None}
        engine.totals |= {"reductions": 1, "reduced_tokens": 400, "reduction_seconds": 0.5}
        assert (await told(client))["reduction_seconds_per_token"] is None  # the workers have just been asked
        assert len(engine.asked) == 1
        monkeypatch.setattr(endpoint, "TOLD_AGAIN_SECONDS", 0.0)
        assert await told(client) == {**MEASURED, "reduction_seconds_per_token": 0.00125}
    assert prefill == [engine]


@pytest.mark.parametrize(
    "engine",
    [
        Engine(rank=1),
        Engine(extension="theirs.Extension"),
        Engine(additional_config={"aot": {"measure_prefill": False}}),
    ],
)
async def test_prefill_is_measured_once_where_videos_are_reduced_and_the_settings_allow_it(engine, prefill):
    async with server(engine) as client:
        assert "prefill" not in (await client.get("/v1/aot/engine")).json()
    assert prefill == []


async def test_a_server_without_an_engine_tells_nothing():
    async with server() as client:
        assert (await client.get("/v1/aot/engine")).status_code == 404


def test_the_plugin_loads_where_text_is_generated():
    assert AOTEndpoint.name == "aot"
    assert AOTEndpoint.required_tasks == ("generate",)


async def info(client):
    response = await client.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    return [(sample.labels, sample.value) for sample in families["aot_engine_info"].samples]


async def test_metrics_name_the_preset_with_what_changes_it():
    INFO.clear()
    async with server(Engine()) as client:
        labels = {"retention": "0.25", "preset": "diverse", "changes": "epsilon=0.2,mass=0.2"}
        assert await info(client) == [(labels, 1.0)]


async def test_metrics_name_no_preset_of_an_engine_without_aot(monkeypatch):
    INFO.clear()
    monkeypatch.setattr(endpoint, "active_reduction", lambda vllm_config: None)
    async with server(Engine()) as client:
        assert await info(client) == []
