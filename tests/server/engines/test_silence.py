"""An engine that stops leaves no request open, and an answer that it did not finish is not passed as complete."""

import asyncio
import contextlib
import json
import socket
import time

import pytest

from server.engines import silence
from server.engines.session import LOST_AFTER_SECONDS, EngineSession
from server.engines.silence import refuses
from server.engines.streams import ChatStream
from tests.server.engine_double import COMPLETION, DONE, ROLE, TEXT, EngineDouble, chunk
from tests.server.harness import CHAT, ask, error_of, free_port, gateway, until, value

ABORTED = chunk(choices=[{"index": 0, "delta": {"content": "Ein"}, "finish_reason": "abort"}])
GONE_SECONDS = 5


@contextlib.asynccontextmanager
async def asked_then_stopped(double, **fields):
    """A request that an engine has when it closes its port; its task, and the gateway's client."""
    async with double.serving(), gateway(double, engine_health_seconds=60) as client:
        asking = asyncio.create_task(client.post(CHAT, json=ask(**fields)))
        await until(lambda: double.running)
        await asyncio.sleep(0.1)
        await double.site.stop()
        yield asking, client
        if double.hold is not None:
            double.hold.set()


@pytest.fixture
def impatient(monkeypatch):
    """Let silence be long sooner."""
    monkeypatch.setattr(silence, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(silence, "SILENT_SECONDS", 0.5)


async def test_a_stream_of_an_engine_that_is_gone_ends_within_five_seconds():
    async with asked_then_stopped(EngineDouble(hold=asyncio.Event()), stream=True) as (asking, _):
        begin = time.monotonic()
        assert (await asking).content.startswith(ROLE + TEXT[0] + b'data: {"error":')
        assert time.monotonic() - begin < GONE_SECONDS


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("double", "fields"),
    [
        (lambda: EngineDouble(hold=asyncio.Event()), {"stream": True}),
        (lambda: EngineDouble(delay_seconds=60), {"stream": True}),
        (lambda: EngineDouble(hold=asyncio.Event()), {}),
    ],
    ids=["in a stream", "before a stream", "before a whole answer"],
)
async def test_a_silent_engine_that_refuses_connections_is_given_up(double, fields):
    async with asked_then_stopped(double(), **fields) as (asking, client):
        answer = await asking
        assert json.loads(answer.content.rpartition(b"data: ")[2])["error"]["code"] == "engine_failed"
        assert b"[DONE]" not in answer.content
        assert value(client, "rejections_total", reason="engine_failed") == 1
        assert value(client, "rejections_total", reason="client_gone") == 0
        assert value(client, "engine_up", engine="engine-0") == 0


@pytest.mark.usefixtures("impatient")
async def test_a_stream_that_an_engine_is_still_finishing_goes_on():
    double = EngineDouble(gap_seconds=0.2)  # seven pieces
    async with asked_then_stopped(double, stream=True) as (asking, _):
        assert (await asking).content == b"".join([ROLE, *TEXT, DONE])


@pytest.mark.usefixtures("impatient")
async def test_a_stream_goes_on_however_long_its_engine_is_silent_while_it_takes_connections(engine):
    engine.hold = asyncio.Event()
    async with gateway(engine, engine_health_seconds=60) as client:
        asking = asyncio.create_task(client.post(CHAT, json=ask(stream=True)))
        await until(lambda: engine.running)
        await asyncio.sleep(1)
        engine.hold.set()
        assert (await asking).content == b"".join([ROLE, *TEXT, DONE])
        assert value(client, "engine_up", engine="engine-0") == 1


async def test_a_port_refuses_that_nobody_listens_on_and_no_other():
    assert await refuses(f"http://127.0.0.1:{free_port()}")
    assert await refuses(f"http://localhost:{free_port()}")  # on all its addresses
    async with EngineDouble().serving() as double:
        assert not await refuses(double.url)
    assert not await refuses("http://no-such-host.invalid:80")
    with socket.socket() as full:  # takes no connections, and refuses none
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with contextlib.ExitStack() as waiting:
            for _ in range(4):
                knock = waiting.enter_context(socket.socket())
                knock.setblocking(False)
                knock.connect_ex(full.getsockname())
            assert not await refuses("http://{}:{}".format(*full.getsockname()))


async def test_connections_whose_other_end_vanishes_break_in_time(engine):
    engine.hold = asyncio.Event()
    async with (
        EngineSession(connect_seconds=1) as session,
        session.http.post(f"{engine.url}{CHAT}", json={"stream": True}) as answer,
    ):
        kernel = answer.connection.transport.get_extra_info("socket")
        idle, interval, probes = (
            kernel.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}"))
            for name in ("IDLE", "INTVL", "CNT")
        )
        assert kernel.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert idle + interval * probes == LOST_AFTER_SECONDS < GONE_SECONDS


BODY = json.dumps(COMPLETION).encode()
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


def chunked(body):
    return b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(body), body)


SHORT = {
    "announced": HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY[:-20],
    "chunked": HEAD + chunked(BODY),
    "neither": HEAD + b"connection: close\r\n\r\n" + BODY[:-20],
}
WHOLE = {
    "announced": HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY,
    "chunked": HEAD + chunked(BODY) + b"0\r\n\r\n",
    "neither": HEAD + b"connection: close\r\n\r\n" + BODY,
}


@contextlib.asynccontextmanager
async def answering(double, raw):
    """The URL of a server that answers chats with these bytes and closes, and else as the double does."""

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"POST"):
            writer.write(raw)
        else:
            theirs, ours = await asyncio.open_connection("127.0.0.1", int(double.url.rpartition(":")[2]))
            ours.write(head.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
            writer.write(await theirs.read())
            ours.close()
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("framed", SHORT)
async def test_a_body_shorter_than_announced_is_an_engine_that_failed(engine, framed):
    async with (
        answering(engine, SHORT[framed]) as url,
        gateway(engines=(url,), engine_health_seconds=60) as client,
    ):
        for _ in range(3):
            answer = await client.post(CHAT, json=ask())
            assert answer.status_code == 502
            assert error_of(answer)["code"] == "engine_failed"
        assert value(client, "engine_breaker_open", engine="engine-0") == 1


@pytest.mark.parametrize("framed", WHOLE)
async def test_a_whole_body_is_whole_however_its_end_is_told(engine, framed):
    async with answering(engine, WHOLE[framed]) as url, gateway(engines=(url,)) as client:
        answer = await client.post(CHAT, json=ask())
    assert (answer.status_code, answer.json()) == (200, COMPLETION)


async def test_a_stream_without_done_counts_as_an_engine_that_failed(engine):
    engine.pieces = [ROLE, *TEXT]
    async with gateway(engine, engine_health_seconds=60) as client:
        for _ in range(3):
            answer = await client.post(CHAT, json=ask(stream=True))
            assert json.loads(answer.content.rpartition(b"data: ")[2])["error"]["code"] == "engine_failed"
        assert value(client, "engine_breaker_open", engine="engine-0") == 1


async def test_what_an_engine_aborts_as_it_stops_is_not_passed_as_complete(engine):
    engine.pieces = [ROLE, *TEXT[:2], ABORTED, DONE]
    aborted = {**COMPLETION, "choices": [{**COMPLETION["choices"][0], "finish_reason": "abort"}]}
    engine.completion = json.dumps(aborted).encode()
    async with gateway(engine, engine_health_seconds=60) as client:
        stream = await client.post(CHAT, json=ask(stream=True))
        begin = b"".join([ROLE, *TEXT[:2]])
        assert stream.content.startswith(begin)
        assert json.loads(stream.content.removeprefix(begin + b"data: "))["error"]["code"] == "engine_failed"
        whole = await client.post(CHAT, json=ask())
        assert (whole.status_code, error_of(whole)["code"]) == (502, "engine_failed")


async def test_a_text_about_an_abort_is_none(engine):
    text = '{"finish_reason":"abort"}'
    engine.pieces = [ROLE, chunk(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}]), DONE]
    told = {**COMPLETION, "choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}]}
    engine.completion, engine.headers = json.dumps(told).encode(), {}
    async with gateway(engine) as client:
        assert (await client.post(CHAT, json=ask(stream=True))).content == b"".join(engine.pieces)
        assert (await client.post(CHAT, json=ask())).json() == told


async def test_a_whole_answer_has_a_largest_size(engine, monkeypatch):
    monkeypatch.setattr("server.engines.exchange.LONGEST_ANSWER_BYTES", len(BODY) - 1)
    engine.completion = BODY
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask())
        assert (answer.status_code, error_of(answer)["code"]) == (502, "engine_failed")
        assert str(len(BODY) - 1) in error_of(answer)["message"]


def test_a_long_event_in_many_pieces_is_searched_once():
    """With a search of all that has arrived for each piece, this takes minutes."""
    event = chunk(choices=[{"index": 0, "delta": {"content": "x" * 15 * 2**20}}])
    stream = ChatStream(savings=None, usage_wanted=False)
    passed = b"".join(stream.feed(event[begin : begin + 1024]) for begin in range(0, len(event), 1024))
    assert passed == event
    assert (stream.failure, stream.tokens) == (None, 1)
