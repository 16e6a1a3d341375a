"""Attacks through media on a running gateway: each ends in a clear error and leaves nothing behind."""

import asyncio
import base64
import gzip
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.clips import clip, data_url, growing, picture
from tests.server.harness import CHAT, ask, ask_about, children
from tests.server.media.hosts import PUBLIC
from tests.server.media.site import Site, response
from tests.server.reader import lies

FETCH_SECONDS = 1
MAX_BYTES = 2**20


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    limits = {"media_fetch_seconds": FETCH_SECONDS, "media_max_bytes": MAX_BYTES, "media_read_seconds": 3}
    with Site(tmp_path_factory.mktemp("site"), **limits) as site:
        yield site


@pytest.fixture
def site(running):
    """A gateway that, after each attack, must still serve requests and hold no more resources than before."""
    running.internet.names.answers = {"media.example": [PUBLIC]}
    running.internet.names.asked.clear()
    running.internet.dialled.clear()
    running.engine.requests.clear()
    yield running
    running.still_serves()


def refused(site, request):
    """Send a request that must be refused; return the error's code."""
    answer = site.post(ask_about(request) if isinstance(request, str) else request)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith("messages[0].content[0]")
    assert not re.search(r"\d+\.\d+\.\d+|:\d|//|/[a-z]+/|\.example|\.trap|Traceback", error["message"]), error[
        "message"
    ]
    assert site.engine.requests == []
    return error["code"]


def served(site, answer, path="/evil"):
    site.host.answers[path] = answer
    return f"http://media.example{path}"


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1/", "http://2130706433/", "http://0x7f.1/", "http://0177.0.0.1/", "http://127.1/"),
        *("http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://[64:ff9b::7f00:1]/", "http://[fe80::1%25lo]/"),
        *("http://169.254.169.254/latest/meta-data/", "http://[fd00:ec2::254]/", "http://168.63.129.16/"),
        *("http://127.0.0.1./", "http://①②⑦.⓪.⓪.①/", "http://%31%32%37.0.0.1/", "http://localhost/"),
        *("http://media.example@127.0.0.1/", "http://127.0.0.1\\@media.example/", "http://127.0.0.1#@media.example/"),
        *("http://local.trap/", "http://LOCAL.trap./", "http://mixed.trap/", "http://mapped.trap:22/"),
        *("file:///etc/passwd", "ftp://media.example/", "rtsp://media.example/", "concat:a|b", "subfile:,,start,0:/a"),
    ],
)
def test_no_url_leads_inside(site, url):
    site.internet.names.answers |= {
        "localhost": ["127.0.0.1"],
        "local.trap": ["10.0.0.1"],
        "mixed.trap": [PUBLIC, "10.0.0.1"],
        "mapped.trap": ["::ffff:10.0.0.1"],
    }
    assert refused(site, url) in ("invalid_media_url", "media_host_not_allowed")
    assert site.internet.dialled == []


@pytest.mark.parametrize("to", ["http://169.254.169.254/", "http://local.trap/", "file:///etc/passwd", "//[::1]/"])
def test_no_redirect_leads_inside(site, to):
    site.internet.names.answers["local.trap"] = ["10.0.0.1"]
    for hop in range(3):
        site.host.answers[f"/{hop}"] = response(b"", f"location: /{hop + 1}", "content-length: 0", status="302 Found")
    site.host.answers["/3"] = response(b"", f"location: {to}", "content-length: 0", status="307 There")
    for first in (1, 3):
        assert refused(site, f"http://media.example/{first}") in ("invalid_media_url", "media_host_not_allowed")
    assert {address for address, _ in site.internet.dialled} == {PUBLIC}


def test_no_change_of_a_names_answers_leads_inside(site):
    site.internet.names.answers["rebinding.trap"] = ([PUBLIC], ["127.0.0.1"])
    site.host.answers["/again"] = response(b"", "location: /clip.mp4", "content-length: 0", status="302 Found")
    assert refused(site, "http://rebinding.trap/again") == "media_host_not_allowed"
    assert site.internet.dialled == [(PUBLIC, 80)]


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b'<?xml version="1.0"?><MPD><BaseURL>http://127.0.0.1/</BaseURL></MPD>',
        b"RIFF\0\0\0\0RMP3",
        b"\0\0\0\x14ftypqt  \0\0\0\0qt  \0\0\0\x3cmoov\0\0\0\x34rmra\0\0\0\x2crmda\0\0\0\x24rdrf\0\0\0\0url \0\0\0\x10file:///etc/pas",
    ],
)
def test_no_playlist_is_followed(site, content):
    assert refused(site, served(site, response(content, "content-type: video/mp4"))) in (
        "invalid_media",
        "invalid_video",
    )
    assert refused(site, data_url(content)) in ("invalid_media", "invalid_video")
    assert len(site.internet.dialled) == 1


async def endless(writer):
    writer.write(response(b"", "content-type: video/mp4"))
    while True:
        writer.write(b"\0" * 65536)
        await writer.drain()


async def endless_chunks(writer):
    writer.write(response(b"", "transfer-encoding: chunked"))
    while True:
        writer.write(b"10000\r\n" + b"\0" * 65536 + b"\r\n")
        await writer.drain()


async def endless_headers(writer):
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x-filler: " + b"x" * 4096 + b"\r\n")
        await writer.drain()


async def endless_header(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nx-filler: ")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


async def endless_continues(writer):
    while True:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
        await writer.drain()
        await asyncio.sleep(0.001)


async def drip(writer):
    writer.write(response(b"", "content-length: 100000"))
    while True:
        writer.write(b"\0")
        await writer.drain()
        await asyncio.sleep(0.02)


async def header_drip(writer):
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x: y\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)


async def silence(writer):
    await asyncio.sleep(60)


async def reset(writer):
    writer.write(response(clip()[:100], f"content-length: {len(clip())}"))
    await writer.drain()
    writer.transport.abort()


@pytest.mark.parametrize(
    ("answer", "codes"),
    [
        (endless, ["media_too_large"]),
        (endless_chunks, ["media_too_large"]),
        (endless_headers, ["media_fetch_failed"]),
        (endless_header, ["media_fetch_failed"]),
        (endless_continues, ["media_timeout", "media_fetch_failed"]),
        (drip, ["media_timeout"]),
        (header_drip, ["media_timeout", "media_fetch_failed"]),
        (silence, ["media_timeout"]),
        (reset, ["media_fetch_failed"]),
        (response(clip(), "content-length: 100"), ["media_fetch_failed", "invalid_video"]),
        (response(clip(), "content-length: 99999"), ["media_fetch_failed"]),
        (response(clip(), "content-length: 999999999999999"), ["media_too_large"]),
        (response(clip(), "content-length: -1"), ["media_fetch_failed"]),
        (response(clip(), "content-length: 1, 2"), ["media_fetch_failed"]),
        (response(clip(), "content-length: 10", "content-length: 20"), ["media_fetch_failed"]),
        (response(b"FFFFFFFFFFFFFFFF\r\n", "transfer-encoding: chunked"), ["media_fetch_failed"]),
        (response(b"-1\r\n", "transfer-encoding: chunked"), ["media_fetch_failed"]),
        (response(b"", "content-length: 0"), ["invalid_media"]),
        (response(clip(), status="206 Partial Content"), ["media_fetch_failed"]),
        (response(clip(), status="500 Oops"), ["media_fetch_failed"]),
        (response(b"", "content-length: 0", status="302 Found"), ["media_fetch_failed"]),
        (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n", ["media_fetch_failed"]),
        (b"HTTP/1.1 200 OK\r\nx: a\0b\r\n\r\n" + clip(), ["media_fetch_failed"]),
        (b"SSH-2.0-OpenSSH_9.6\r\n", ["media_fetch_failed"]),
        (b"", ["media_fetch_failed"]),
        (b"\0" * 100_000, ["media_fetch_failed"]),
    ],
)
def test_no_answer_of_a_host_holds_the_gateway_up(site, answer, codes):
    begin = time.monotonic()
    assert refused(site, served(site, answer)) in codes
    assert time.monotonic() - begin < FETCH_SECONDS + 5


def bomb():
    return gzip.compress(b"\0" * 2**26)


@pytest.mark.parametrize(
    "headers",
    [
        ["content-encoding: gzip"],
        ["content-encoding: gzip, gzip"],
        ["content-encoding: br"],
        ["content-encoding: zstd"],
        ["content-type: application/gzip"],
        ["transfer-encoding: gzip"],
    ],
)
def test_nothing_is_unpacked(site, headers):
    url = served(site, response(bomb(), *headers, f"content-length: {len(bomb())}"))
    assert refused(site, url) in ("media_fetch_failed", "invalid_media")


def test_a_video_whose_length_nobody_says_is_taken(site):
    assert site.ask(served(site, response(clip(), "content-type: video/mp4"))).status_code == 200
    as_of_old = b"HTTP/1.0 200 OK\r\ncontent-type: video/mp4\r\n\r\n" + clip()
    assert site.ask(served(site, as_of_old)).status_code == 200


def part(url, key="video_url"):
    return {"type": key, key: {"url": url}}


@pytest.mark.parametrize(
    "parts",
    [
        [part("data:video/jpeg;base64,/9j/" + ",/9j/" * 100_000)],
        [part("data:video/mp4;base64," + "=" * 1_000_000)],
        [part("data:video/mp4;base64," + "A" * 2_000_001)],
        [part("data:video/mp4;base64," + "QUFB====" * 100_000)],
        [part(data_url(b"\0" * (MAX_BYTES + 1)))],
        [part(data_url(clip("mp4", "libx264", frames=1, size=(7680, 4320))))],
        [part(data_url(clip("matroska", "mpeg4", frames=1, size=(7680, 4320))))],
        [part(data_url(growing("mpegts", "libx264", (64, 48), (4096, 2400), (64, 48), each=2), "video/mp2t"))],
        [part(data_url(lies.with_edits(clip(frames=60), [(10_000, 0)] * 20_000)))],
        [part(data_url(lies.claims_frames(clip(), 2**32 - 1)))],
        [part(data_url(lies.claims_rate(clip(), 10**9)))],
        [part(data_url(picture(), "image/png"))],
        [part(data_url(clip()), "image_url")],
        [part(data_url(b"\xff\xd8\xff" + os.urandom(1000), "image/jpeg"), "image_url")],
        [{"type": "input_audio", "input_audio": {"data": "A" * 1000 + "=", "format": "wav"}}],
        [{"type": "file", "file": {"file_data": base64.b64encode(b"%PDF-1.7" * 100).decode()}}],
        [{"type": "file", "file": {"file_id": "../../etc/passwd"}}],
        [{"type": "video_url", "video_url": {"url": data_url(clip())}, "uuid": "another-tenants"}],
        [{"type": "video_url", "video_url": {"url": data_url(clip()), "uuid": "another-tenants"}}],
        [{"type": "video_url", "video_url": None, "uuid": "another-tenants"}],
        [{"type": "video_embeds", "video_embeds": "AAAA"}],
        [{"type": "video_url", "video_url": {"url": data_url(clip())}, "image_url": {"url": "http://127.0.0.1/"}}],
    ],
)
def test_no_medium_in_a_request_reaches_the_engine_unless_it_is_one(site, parts):
    refused(site, ask(messages=[{"role": "user", "content": parts}]))


def test_no_number_of_videos_is_worth_more_than_the_limit(site):
    many = [part(served(site, response(clip())))] * 1000
    answer = site.post(ask(messages=[{"role": "user", "content": many}]))
    assert answer.status_code == 400
    assert len(site.internet.dialled) == 16


def test_a_reader_that_is_killed_at_work_costs_one_request(site):
    outcomes = {signal.SIGKILL: "broke its reader", signal.SIGSEGV: "broke its reader", signal.SIGXCPU: "within"}
    for signal_number, outcome in outcomes.items():
        workers = children(os.getpid())
        assert workers
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        with ThreadPoolExecutor() as pool:
            asking = pool.submit(site.ask, data_url(clip(frames=9 + signal_number)))
            time.sleep(0.3)
            for worker in workers:
                os.kill(worker, signal_number)
                os.kill(worker, signal.SIGCONT)
            answer = asking.result(10)
        assert answer.status_code == 400
        assert outcome in answer.json()["error"]["message"]
        site.still_serves()


@pytest.mark.parametrize("answer", [drip, response(clip("mp4", "libx264", frames=400))])
def test_clients_that_leave_take_their_work_with_them(site, answer):
    url = served(site, answer)
    body = b'{"model":"llava","messages":[{"role":"user","content":[{"video_url":"%s"}]}]}' % url.encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    host, port = site.url.removeprefix("http://").split(":")
    site.host.asked.clear()
    connections = []
    for pause in (0, 0.01, 0.05, 0.1):
        connection = socket.create_connection((host, int(port)))
        connection.sendall(head + body)
        connections.append(connection)
        time.sleep(pause)
    for connection in connections:
        connection.close()
    assert len(site.host.asked) <= len(connections)


def test_hosts_that_drip_do_not_keep_others_from_being_fetched_from(site):
    with ThreadPoolExecutor(20) as pool:
        dripping = [pool.submit(site.ask, served(site, drip, f"/drip{number}")) for number in range(20)]
        time.sleep(0.3)
        assert site.ask("http://media.example/clip.mp4").status_code == 200
        assert [asking.result().status_code for asking in dripping] == [400] * 20


@pytest.fixture
def storing(tmp_path):
    room = {"media_store_bytes": 2 * MAX_BYTES, "media_max_bytes": MAX_BYTES, "media_fetch_seconds": FETCH_SECONDS}
    site = Site(tmp_path, **room, media_handoff="file", media_dir=tmp_path / "store")
    with site:
        yield site


def test_a_store_is_filled_by_nothing_that_is_refused_and_never_beyond_its_bytes(storing):
    for answer in (drip, endless, reset, response(clip(), "content-length: 99999"), response(b"x" * 1000)):
        refused_at = storing.ask(served(storing, answer))
        assert refused_at.status_code == 400
    assert len(os.listdir(storing.store)) == 1  # the video from the start of the test
    for frames in range(10, 20):
        padding = (500_000).to_bytes(4, "big") + b"free" + b"\0" * 499_992
        assert storing.ask(data_url(clip(frames=frames) + padding)).status_code == 200
        assert sum(path.stat().st_size for path in storing.store.iterdir()) <= 2 * MAX_BYTES
    assert storing.ask("http://media.example/clip.mp4").status_code == 200
    storing.still_serves()
