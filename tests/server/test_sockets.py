"""The gateway under uvicorn, over real sockets."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry

from server.settings import Settings
from tests.server.clips import clip, data_url
from tests.server.engine_double import DONE, ROLE, TEXT
from tests.server.harness import CHAT, ROOT, GatewayProcess, ask, ask_about, served, until

VIDEO = data_url(clip())


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture(params=["httptools", "h11"])
async def url(engine, request, registry):
    async with served(Settings(engines=(engine.url,)), registry, request.param) as url:
        yield url


async def test_the_openai_sdk_gets_answers_streams_and_savings(engine, url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        assert [model.id async for model in await client.models.list()] == ["llava"]
        messages = ask_about(VIDEO)["messages"]
        extra = {"aot": {"retention": 0.15}}
        answer = await client.chat.completions.create(model="llava", messages=messages, extra_body=extra)
        assert answer.choices[0].message.content.startswith("Ein Hund")
        assert answer.usage.video_tokens == {"before": 6272, "after": 627, "retention": 0.1}
        assert answer._request_id.startswith("req_")
        stream = await client.chat.completions.create(
            model="llava", messages=messages, stream=True, stream_options={"include_usage": True}, extra_body=extra
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).endswith("\n\n.")
        assert chunks[-1].usage.video_tokens["after"] == 627
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="gpt-9", messages=[])
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="llava", messages=messages, extra_body={"aot": {"retention": 7}})
        assert caught.value.param == "aot.retention"
        engine.dies_after = 2
        with pytest.raises(openai.APIError, match="broke off"):
            [c async for c in await client.chat.completions.create(model="llava", messages=messages, stream=True)]
    assert all(r["mm_processor_kwargs"] == {"aot_retention": 0.15} for r in engine.requests[:2])


async def test_the_sdk_does_not_repeat_a_prefill_that_failed(engine, url):
    engine.error = (500, b"{}", "application/json")
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=2) as client:
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="llava", messages=[])
    assert len(engine.requests) == 1


async def test_pieces_arrive_as_the_engine_sends_them(engine, url):
    engine.gap_seconds = 0.1
    async with httpx.AsyncClient() as client, client.stream("POST", url + CHAT, json=ask(stream=True)) as answer:
        arrivals = [(time.monotonic(), piece) async for piece in answer.aiter_raw()]
    assert b"".join(piece for _, piece in arrivals) == b"".join([ROLE, *TEXT, DONE])
    assert arrivals[-1][0] - arrivals[0][0] > 0.3
    assert len(arrivals) >= 5


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_before_the_first_token_aborts_the_engine(engine, url, stream):
    engine.delay_seconds = 30
    async with httpx.AsyncClient() as client:
        asking = asyncio.create_task(client.post(url + CHAT, json=ask(stream=stream)))
        await until(lambda: engine.running)
        asking.cancel()
        await asyncio.wait_for(engine.aborted.wait(), 5)


async def test_a_client_that_leaves_in_the_middle_aborts_the_engine(engine, url, registry):
    engine.hold = asyncio.Event()
    async with httpx.AsyncClient() as client, client.stream("POST", url + CHAT, json=ask(stream=True)) as answer:
        async for _ in answer.aiter_raw():
            break
    await asyncio.wait_for(engine.aborted.wait(), 5)
    await until(lambda: not engine.running)
    labels = {"route": CHAT, "model": "llava", "status_class": "4xx", "stream": "true"}
    await until(lambda: registry.get_sample_value("aot_gateway_requests_total", labels) == 1)
    assert registry.get_sample_value("aot_gateway_rejections_total", {"reason": "client_gone"}) == 1
    assert registry.get_sample_value("aot_gateway_inflight_requests") == 0


async def test_a_connection_serves_one_request_after_another(engine, url):
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=1)) as client:
        for i in range(6):
            answer = await client.post(url + CHAT, json=ask(stream=i % 2 == 0))
            assert answer.status_code == 200


async def test_many_requests_at_once_all_get_their_own_answer(engine, url):
    async with httpx.AsyncClient() as client:
        ids = [f"r-{i}" for i in range(40)]
        answers = await asyncio.gather(
            *(client.post(url + CHAT, json=ask(stream=True), headers={"x-request-id": id_}) for id_ in ids)
        )
    assert [answer.headers["x-request-id"] for answer in answers] == ids
    assert all(answer.content == b"".join([ROLE, *TEXT, DONE]) for answer in answers)


async def test_a_chunked_body_over_the_limit_gets_its_413(engine):
    async with served(Settings(engines=(engine.url,), max_body_bytes=5000)) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(10):
            writer.write(b"400\r\n" + b" " * 1024 + b"\r\n")
        await writer.drain()
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        writer.close()
        await writer.wait_closed()
    assert b" 413 " in head.splitlines()[0]


async def test_on_sigterm_running_streams_finish_and_everybody_else_is_told(engine):
    engine.hold = asyncio.Event()
    async with GatewayProcess(engine.url) as gateway, httpx.AsyncClient() as client:
        async with client.stream("POST", gateway.url + CHAT, json=ask(stream=True)) as answer:
            pieces = answer.aiter_raw()
            got = await anext(pieces)
            gateway.drain()
            async with asyncio.timeout(5):
                while (ready := await client.get(f"{gateway.url}/health/ready")).status_code != 503:
                    pass
            assert ready.json() == {"status": "draining"}
            assert (await client.get(f"{gateway.url}/health/live")).status_code == 200
            assert (await client.get(f"{gateway.url}/metrics")).status_code == 200
            refused = await client.post(gateway.url + CHAT, json=ask())
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert refused.headers["retry-after"]
            engine.hold.set()
            got += b"".join([piece async for piece in pieces])
        assert got == b"".join([ROLE, *TEXT, DONE])
        code, output = await gateway.ended()
    assert code == 0, output
    assert all(json.loads(line)["level"] in ("info", "warning") for line in output.splitlines()), output


async def test_a_stream_that_outlasts_the_drain_is_told_so(engine):
    engine.hold = asyncio.Event()
    async with GatewayProcess(engine.url, DRAIN_SECONDS="0.5") as gateway, httpx.AsyncClient() as client:
        async with client.stream("POST", gateway.url + CHAT, json=ask(stream=True)) as answer:
            pieces = answer.aiter_raw()
            got = await anext(pieces)
            gateway.drain()
            got += b"".join([piece async for piece in pieces])
        assert got.endswith(b"\n\n")
        assert json.loads(got.rpartition(b"data: ")[2])["error"]["code"] == "draining"
        code, output = await gateway.ended()
    assert code == 0, output
    await asyncio.wait_for(engine.aborted.wait(), 5)


async def test_with_nothing_to_finish_sigterm_ends_it_at_once(engine):
    async with GatewayProcess(engine.url) as gateway:
        begin = time.monotonic()
        gateway.drain()
        code, output = await gateway.ended()
    assert code == 0, output
    assert time.monotonic() - begin < 5
    assert "OPEN TO EVERYONE" not in output


async def test_a_hangup_ends_nothing(engine):
    async with GatewayProcess(engine.url) as gateway, httpx.AsyncClient(timeout=20) as client:
        assert (await client.post(gateway.url + CHAT, json=ask_about(VIDEO))).status_code == 200
        workers = gateway.children()
        for process in (*workers, gateway.process.pid):  # a closing terminal tells all of them
            os.kill(process, signal.SIGHUP)
        await asyncio.sleep(0.2)
        assert gateway.process.poll() is None
        assert gateway.children() == workers
        assert (await client.post(gateway.url + CHAT, json=ask_about(VIDEO))).status_code == 200
        gateway.drain()
        assert (await gateway.ended())[0] == 0


async def test_off_loopback_the_start_says_that_the_gateway_is_open(engine):
    async with GatewayProcess(engine.url, HOST="0.0.0.0", ALLOW_OPEN="true") as gateway:
        gateway.drain()
        _, output = await gateway.ended()
    assert "OPEN TO EVERYONE WHO CAN REACH IT" in output


async def test_a_taken_port_is_an_error_code(engine):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = {"AOT_GATEWAY_PORT": str(taken.getsockname()[1]), "AOT_GATEWAY_ENGINES": engine.url}
        process = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-m", "server"], cwd=ROOT, env=environment, capture_output=True, timeout=30
        )
    assert process.returncode not in (0, 2)
    assert b"address already in use" in process.stdout


async def test_the_gateway_uses_one_process_and_leaves_none_behind(engine):
    async with GatewayProcess(engine.url) as gateway, httpx.AsyncClient() as client:
        assert (await client.post(gateway.url + CHAT, json=ask_about(VIDEO))).status_code == 200
        (worker,) = gateway.children()  # the probe's worker
        gateway.drain()
        await gateway.ended()
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
