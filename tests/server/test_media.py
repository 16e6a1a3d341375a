import asyncio
import contextlib
import os
import signal
import time

import pytest
from aiohttp import web

from server.errors import MediaRefused
from server.media.fetch import Fetcher
from server.media.identify import identify
from server.media.intake import Shared
from server.media.probe import ProbeError, Prober, in_memory
from server.media.store import MediaStore
from tests.server.clips import clip, data_url
from tests.server.harness import CHAT, ask, ask_about, gateway, until

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 100
WAV = b"RIFF\x24\0\0\0WAVEfmt " + b"\0" * 40


class MediaHost:
    """A host with media, on loopback."""

    def __init__(self):
        self.files = {"/clip.mp4": clip(), "/clip.webm": clip("webm", "vp8"), "/a.png": PNG, "/a.wav": WAV}
        self.redirects = {}
        self.asked = []
        self.gate = None
        self.headers = {}

    @contextlib.asynccontextmanager
    async def serving(self):
        app = web.Application()
        app.router.add_get("/{path:.*}", self._get)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.2)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.host = f"127.0.0.1:{runner.addresses[0][1]}"
        self.url = f"http://{self.host}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _get(self, request):
        self.asked.append(request.path)
        if self.gate is not None:
            await self.gate.wait()
        if request.path in self.redirects:
            return web.Response(status=302, headers={"location": self.redirects[request.path]})
        if request.path == "/drip":
            answer = web.StreamResponse()
            await answer.prepare(request)
            for _ in range(200):
                await answer.write(b"x")
                await asyncio.sleep(0.05)
            return answer
        if request.path == "/endless":
            answer = web.StreamResponse()
            await answer.prepare(request)
            while True:
                await answer.write(b"x" * 65536)
        if request.path not in self.files:
            return web.Response(status=404)
        return web.Response(body=self.files[request.path], content_type="text/html", headers=self.headers)


@pytest.fixture
async def host():
    async with MediaHost().serving() as host:
        yield host


def allowed(host, **settings):
    return {"media_allow_hosts": (host.host,), "media_allow_http": True, **settings}


async def refusal(client, url):
    answer = await client.post(CHAT, json=ask_about(url))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "messages[0].content[0].video_url.url"
    assert error["type"] == "invalid_request_error"
    return error


async def test_a_video_on_an_allowed_host_reaches_the_engine_as_a_data_url(engine, host):
    async with gateway(engine, **allowed(host)) as client:
        for name, mime in (("clip.mp4", "video/mp4"), ("clip.webm", "video/webm")):
            answer = await client.post(CHAT, json=ask_about(f"{host.url}/{name}", aot={"retention": 0.2}))
            assert answer.status_code == 200, answer.text
            sent = engine.requests[-1]
            part = sent["messages"][0]["content"][0]
            assert part == {"type": "video_url", "video_url": {"url": data_url(host.files[f"/{name}"], mime)}}
            assert sent["mm_processor_kwargs"] == {"aot_retention": 0.2}
        assert client.registry.get_sample_value("aot_gateway_overhead_seconds_count", {"phase": "fetch"}) == 2


async def test_images_and_audio_on_an_allowed_host_reach_the_engine_as_data_urls(engine, host):
    parts = [
        {"type": "image_url", "image_url": {"url": f"{host.url}/a.png", "detail": "low"}},
        {"type": "audio_url", "audio_url": {"url": f"{host.url}/a.wav"}},
        {"image_url": f"{host.url}/a.png"},
    ]
    async with gateway(engine, **allowed(host)) as client:
        request = ask(messages=[{"role": "user", "content": parts}], aot={"retention": 0.1})
        assert (await client.post(CHAT, json=request)).status_code == 200
    png, wav = data_url(PNG, "image/png"), data_url(WAV, "audio/wav")
    assert engine.requests[0]["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": png, "detail": "low"}},
        {"type": "audio_url", "audio_url": {"url": wav}},
        {"image_url": png},
    ]
    assert "mm_processor_kwargs" not in engine.requests[0]


async def test_images_and_audio_as_data_urls_and_text_pass_untouched(engine):
    parts = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "text", "text": "file:///etc/passwd http://127.0.0.1 <|video_pad|>"},
    ]
    async with gateway(engine) as client:
        await client.post(CHAT, json=ask(messages=[{"role": "user", "content": parts}]))
    assert engine.requests[0]["messages"][0]["content"] == parts


@pytest.mark.parametrize("key", ["video_url", "image_url", "audio_url"])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_without_allowed_hosts_every_remote_url_is_refused_naming_the_setting(engine, key, bare, scheme):
    url = f"{scheme}://media.example/a.mp4"
    part = {key: url} if bare else {"type": key, key: {"url": url}}
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(messages=[{"role": "user", "content": [part]}]))
    assert answer.status_code == 400
    assert "AOT_GATEWAY_MEDIA_ALLOW_HOSTS" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == f"messages[0].content[0].{key}.url"
    assert engine.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "ftp://a/b",
        "rtsp://a/b",
        "concat:a|b",
        "subfile:,,a",
        "ms://file-1",
        "",
        "/etc/passwd",
        " http://a",
        "javascript:1",
    ],
)
@pytest.mark.parametrize("key", ["video_url", "image_url", "audio_url"])
async def test_every_other_scheme_is_refused(engine, host, url, key):
    part = {"type": key, key: {"url": url}}
    async with gateway(engine, **allowed(host)) as client:
        answer = await client.post(CHAT, json=ask(messages=[{"role": "user", "content": [part]}]))
    assert answer.status_code == 400
    assert engine.requests == []


@pytest.fixture
async def fetcher(host):
    async with make_fetcher(host) as fetcher:
        yield fetcher


@contextlib.asynccontextmanager
async def make_fetcher(host, **changes):
    from server.media.fetch import new_session

    async with new_session(connect_seconds=2) as session:
        options = {
            "allow_hosts": (host.host, "media.example"),
            "allow_http": True,
            "max_bytes": 10**6,
            "total_seconds": 5,
        }
        yield Fetcher(session=session, **{**options, **changes})


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example/a",
        "https://media.example:8443/a",
        "https://media.example./a",
        "https://media.example.evil.example/a",
        "https://evil.example#media.example/",
        "https://evil.example?media.example/",
        "https://media.example@evil.example/",
        "https://evil.example\\@media.example/",
        "https://media.example\\.evil.example/",
        "https://user:pass@media.example/a",
        "https://user@media.example/a",
        "https://media.example/a b",
        "https://media.example/a\n",
        "https://127.0.0.1/a",
        "https://2130706433/a",
        "https://0x7f.1/a",
        "https://[::ffff:127.0.0.1]/a",
        "https://ⓜedia.example.evil/a",
        "https:///a",
        "https://",
        "https://media.example:99999/",
        "https://[::1/",
        "ftp://media.example/a",
    ],
)
async def test_a_url_that_is_not_on_an_allowed_host_is_not_dialled(fetcher, url):
    with pytest.raises(MediaRefused):
        fetcher.check(url)


@pytest.mark.parametrize(
    "url",
    ["https://media.example/a?b#c", "HTTPS://MEDIA.example:443/", "http://media.example/", "http://media.example:80"],
)
async def test_a_url_on_an_allowed_host_is_taken(fetcher, url):
    assert fetcher.check(url).raw_host == "media.example"


async def test_plain_http_is_refused_unless_it_is_allowed(host):
    async with make_fetcher(host, allow_http=False) as fetcher:
        with pytest.raises(MediaRefused, match="AOT_GATEWAY_MEDIA_ALLOW_HTTP"):
            fetcher.check("http://media.example/")


async def test_redirects_are_followed_on_allowed_hosts(fetcher, host):
    host.redirects = {"/1": "/2", "/2": f"{host.url}/3", "/3": "clip.mp4"}
    assert await fetcher.fetch(f"{host.url}/1") == clip()
    assert host.asked == ["/1", "/2", "/3", "/clip.mp4"]


@pytest.mark.parametrize(
    ("redirects", "code", "asked"),
    [
        ({"/1": "http://127.0.0.1:1/clip.mp4"}, "media_host_not_allowed", 1),
        ({"/1": "http://169.254.169.254/latest"}, "media_host_not_allowed", 1),
        ({"/1": "file:///etc/passwd"}, "invalid_media_url", 1),
        ({"/1": "//evil.example/"}, "media_host_not_allowed", 1),
        ({"/1": "http://[::1"}, "media_fetch_failed", 1),
        ({"/1": "/1"}, "media_fetch_failed", 4),
    ],
)
async def test_redirects_out_and_round_in_circles_are_refused(fetcher, host, redirects, code, asked):
    host.redirects = redirects
    with pytest.raises(MediaRefused) as caught:
        await fetcher.fetch(f"{host.url}/1")
    assert caught.value.code == code
    assert len(host.asked) == asked


@pytest.mark.parametrize(
    ("path", "code"),
    [("/none", "media_fetch_failed"), ("/endless", "media_too_large"), ("/drip", "media_timeout")],
)
async def test_missing_endless_and_dripping_media_are_refused(host, path, code):
    begin = time.monotonic()
    async with make_fetcher(host, total_seconds=0.5) as fetcher:
        with pytest.raises(MediaRefused) as caught:
            await fetcher.fetch(host.url + path)
    assert caught.value.code == code
    assert host.host not in caught.value.message
    assert time.monotonic() - begin < 3


async def test_media_that_says_it_is_too_large_is_refused_unread(host):
    async with make_fetcher(host, max_bytes=1000) as fetcher:
        with pytest.raises(MediaRefused) as caught:
            await fetcher.fetch(f"{host.url}/clip.mp4")
    assert caught.value.code == "media_too_large"


async def test_compressed_media_is_refused(host, fetcher):
    host.headers = {"content-encoding": "gzip"}
    with pytest.raises(MediaRefused, match="compressed"):
        await fetcher.fetch(f"{host.url}/clip.mp4")


async def test_a_host_that_is_not_there_is_a_refusal_without_its_address(host):
    async with make_fetcher(host, allow_hosts=("127.0.0.1:1",)) as fetcher:
        with pytest.raises(MediaRefused) as caught:
            await fetcher.fetch("http://127.0.0.1:1/x")
    assert "127.0.0.1" not in caught.value.message


async def test_requests_for_one_url_at_one_time_share_a_download(engine, host):
    host.gate = asyncio.Event()
    async with gateway(engine, **allowed(host)) as client:
        asking = [asyncio.create_task(client.post(CHAT, json=ask_about(f"{host.url}/clip.mp4"))) for _ in range(5)]
        await until(lambda: client.registry.get_sample_value("aot_gateway_inflight_requests") == 5)
        await asyncio.sleep(0.05)
        asking[0].cancel()  # the first to ask may leave without harm to the others
        host.gate.set()
        answers = await asyncio.gather(*asking[1:])
    assert [answer.status_code for answer in answers] == [200] * 4
    assert host.asked == ["/clip.mp4"]
    assert len(engine.requests) == 4


async def test_a_shared_call_ends_when_its_last_waiter_leaves():
    shared, ended = Shared(), asyncio.Event()

    async def call():
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    waiters = [asyncio.create_task(shared.run("k", call)) for _ in range(2)]
    await asyncio.sleep(0)
    waiters[0].cancel()
    await asyncio.sleep(0.01)
    assert not ended.is_set()
    waiters[1].cancel()
    await asyncio.wait_for(ended.wait(), 1)


async def test_a_shared_call_that_fails_fails_for_all_and_is_made_anew():
    shared, calls = Shared(), 0

    async def call():
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        raise MediaRefused("no")

    results = await asyncio.gather(*(shared.run("k", call) for _ in range(3)), return_exceptions=True)
    assert [str(result) for result in results] == ["no"] * 3
    assert calls == 1
    with pytest.raises(MediaRefused):
        await shared.run("k", call)
    assert calls == 2


@pytest.mark.parametrize(
    ("head", "kind", "mime"),
    [
        (clip(), "video", "video/mp4"),
        (clip("mov"), "video", "video/quicktime"),
        (clip("webm", "vp8"), "video", "video/webm"),
        (clip("matroska"), "video", "video/x-matroska"),
        (clip("avi"), "video", "video/x-msvideo"),
        (clip("mpegts", "mpeg2video", fps=25), "video", "video/mp2t"),
        (b"\0\0\0\x08wide\0\0", "video", "video/quicktime"),
        (PNG, "image", "image/png"),
        (b"\xff\xd8\xff\xe0", "image", "image/jpeg"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "image", "image/webp"),
        (WAV, "audio", "audio/wav"),
        (b"ID3\x04", "audio", "audio/mpeg"),
        (b"\0\0\0\x20ftypM4A ", "audio", "audio/mp4"),
        (PNG, "video", None),
        (WAV, "video", None),
        (clip(), "image", None),
        (clip(), "audio", None),
        (b"\0\0\0\x20ftypheic", "video", None),
        (b"\0\0\0\x20ftypM4A ", "video", None),
        (b"#EXTM3U\n#EXT-X-VERSION:3\n", "video", None),
        (b"ffconcat version 1.0\nfile /etc/passwd", "video", None),
        (b"<html>", "video", None),
        (b"GIF89a", "video", None),
        (b"", "video", None),
    ],
)
def test_files_are_known_by_their_first_bytes(head, kind, mime):
    found = identify(head[:512], kind)
    assert (found and found.mime) == mime


@pytest.fixture
async def prober():
    prober = Prober(seconds=5)
    yield prober
    await prober.close()


async def probe(prober, data, demuxer=None):
    with in_memory(data) as descriptor:
        return await prober.probe(descriptor, demuxer or identify(data[:512], "video").demuxer)


@pytest.mark.parametrize(
    ("data", "container", "codec"),
    [
        (clip(), "mp4", "mpeg4"),
        (clip("mov"), "mov", "mpeg4"),
        (clip("webm", "vp8"), "webm", "vp8"),
        (clip("matroska"), "matroska", "mpeg4"),
        (clip("avi"), "avi", "mpeg4"),
    ],
)
async def test_a_probe_finds_a_videos_facts(prober, data, container, codec):
    facts = await probe(prober, data)
    assert (facts.container, facts.width, facts.height, facts.frames) == (container, 64, 48, 12)
    assert codec in facts.codec
    assert facts.duration_seconds == pytest.approx(2.0, abs=0.2)
    assert facts.fps == pytest.approx(6.0, abs=0.6)


@pytest.mark.parametrize(
    "data",
    [
        clip()[: len(clip()) // 2],
        clip("webm", "vp8")[:300],
        b"\0\0\0\x20ftypisom" + b"\0" * 5000,
        b"\x1a\x45\xdf\xa3" + os.urandom(5000),
        b"RIFF\0\0\0\0AVI " + b"LIST" * 500,
    ],
)
async def test_truncated_and_broken_videos_are_refused_and_the_worker_lives(prober, data):
    await probe(prober, clip())
    before = prober.process_ids
    with pytest.raises(ProbeError):
        await probe(prober, data)
    assert prober.process_ids == before
    assert (await probe(prober, clip())).frames == 12


async def test_a_playlist_is_not_opened_even_if_it_got_this_far(prober):
    with pytest.raises(ProbeError):
        await probe(prober, b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "mp4")


async def test_a_probe_that_is_killed_costs_only_its_own_request(prober):
    await probe(prober, clip())
    (worker,) = prober.process_ids
    os.kill(worker, signal.SIGSTOP)
    asking = asyncio.create_task(probe(prober, clip()))
    await asyncio.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(ProbeError, match="broke its reader"):
        await asking
    assert (await probe(prober, clip())).frames == 12


async def test_a_worker_that_died_idle_costs_no_request(prober):
    await probe(prober, clip())
    os.kill(prober.process_ids[0], signal.SIGKILL)
    await asyncio.sleep(0.1)
    assert (await probe(prober, clip())).frames == 12


async def test_a_probe_that_hangs_is_ended():
    prober = Prober(seconds=0.2)
    try:
        await probe(prober, clip())
        (stuck,) = prober.process_ids
        os.kill(stuck, signal.SIGSTOP)
        with pytest.raises(ProbeError, match=r"within 0\.2 seconds"):
            await probe(prober, clip())
        with pytest.raises(ProcessLookupError):
            os.kill(stuck, 0)
        assert (await probe(prober, clip())).frames == 12
    finally:
        await prober.close()


async def test_probes_do_not_exceed_their_processes():
    prober = Prober(seconds=5, num_workers=2)
    try:
        facts = await asyncio.gather(*(probe(prober, clip()) for _ in range(6)))
        assert {fact.frames for fact in facts} == {12}
        assert len(prober.process_ids) == 2
    finally:
        await prober.close()


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (data_url(clip()[:-300]), "invalid_video"),
        (data_url(b"GIF89a" + b"\0" * 100), "invalid_media"),
        (data_url(b"#EXTM3U\n"), "invalid_media"),
        ("data:video/mp4;base64,", "invalid_media"),
        ("data:video/mp4;base64,AAA", "invalid_media_url"),
        ("data:video/mp4;base64,AA AA", "invalid_media_url"),
        ("data:video/mp4;base64,QUFB====QUFB", "invalid_media_url"),
        ("data:video/mp4;base64,ÄÖÜ=", "invalid_media_url"),
        ("data:video/mp4,AAAA", "invalid_media_url"),
        ("data:video/mp4;codecs=avc1;base64,AAAA", "invalid_media_url"),
        ("data:image/png;base64,AAAA", "invalid_media_url"),
        ("data:video/jpeg;base64,/9j/,/9j/", "invalid_media_url"),
        ("data:video/jpeg;base64,/9j/", "invalid_media"),
        ("data:,", "invalid_media_url"),
    ],
)
async def test_a_data_url_that_is_no_video_is_refused(engine, url, code):
    async with gateway(engine) as client:
        assert (await refusal(client, url))["code"] == code
        assert client.registry.get_sample_value("aot_gateway_rejections_total", {"reason": "media"}) == 1
    assert engine.requests == []


async def test_videos_that_last_too_long_are_refused_however_they_come(engine, host):
    async with gateway(engine, **allowed(host), media_max_seconds=1.5) as client:
        for url in (data_url(clip()), f"{host.url}/clip.mp4"):
            error = await refusal(client, url)
            assert error["code"] == "video_too_long"
            assert "2 seconds, at most 1.5" in error["message"]
        assert (await client.post(CHAT, json=ask_about(data_url(clip(frames=6))))).status_code == 200


async def test_videos_that_are_too_large_are_refused_however_they_come(engine, host):
    async with gateway(engine, **allowed(host), media_max_bytes=1024) as client:
        for url in (data_url(clip()), f"{host.url}/clip.mp4"):
            assert (await refusal(client, url))["code"] == "media_too_large"


async def test_what_is_fetched_for_a_request_is_bounded_together(engine, host):
    part = {"type": "video_url", "video_url": {"url": f"{host.url}/clip.mp4"}}
    async with gateway(engine, **allowed(host), media_max_bytes=2 * len(clip())) as client:
        for number, status in ((2, 200), (3, 400)):
            answer = await client.post(CHAT, json=ask(messages=[{"role": "user", "content": [part] * number}]))
            assert answer.status_code == status
    assert answer.json()["error"]["code"] == "media_too_large"


async def test_more_than_sixteen_videos_are_refused(engine):
    part = {"type": "video_url", "video_url": {"url": data_url(clip())}}
    async with gateway(engine) as client:
        for number, status in ((16, 200), (17, 400)):
            answer = await client.post(CHAT, json=ask(messages=[{"role": "user", "content": [part] * number}]))
            assert answer.status_code == status
    assert answer.json()["error"]["param"] == "messages[0].content[16].video_url.url"


async def test_what_an_allowed_host_sends_must_be_a_video(engine, host):
    async with gateway(engine, **allowed(host)) as client:
        assert (await refusal(client, f"{host.url}/a.png"))["code"] == "invalid_media"
        error = await refusal(client, f"{host.url}/none")
        assert error["code"] == "media_fetch_failed"
        assert "127.0.0.1" not in error["message"]


async def test_a_large_video_is_handled_off_the_loop_and_arrives_whole(engine):
    padded = clip() + (3 * 2**20).to_bytes(4, "big") + b"free" + b"\0" * (3 * 2**20 - 8)
    url = data_url(padded)
    async with gateway(engine) as client:
        assert (await client.post(CHAT, json=ask_about(url))).status_code == 200
    assert engine.requests[0]["messages"][0]["content"][0]["video_url"]["url"] == url


async def test_a_fetched_video_is_handed_over_as_a_file(engine, host, tmp_path):
    async with gateway(engine, **allowed(host), media_handoff="file", media_dir=tmp_path) as client:
        for _ in range(2):
            assert (await client.post(CHAT, json=ask_about(f"{host.url}/clip.mp4"))).status_code == 200
        assert (await client.post(CHAT, json=ask_about(data_url(clip())))).status_code == 200
    (file,) = tmp_path.iterdir()
    assert file.read_bytes() == clip()
    assert file.suffix == ".mp4"
    assert file.stat().st_mode & 0o777 == 0o644
    urls = [request["messages"][0]["content"][0]["video_url"]["url"] for request in engine.requests]
    assert urls == [file.as_uri(), file.as_uri(), data_url(clip())]


async def keep(store, data, digest):
    async with store.held(data, digest=digest * 64, suffix=".mp4") as path:
        return path


async def test_the_store_makes_room_by_dropping_what_was_used_longest_ago(tmp_path):
    store = MediaStore(tmp_path, max_bytes=250, max_age_seconds=1000)
    paths = []
    for age, digest in enumerate("ab"):
        paths.append(await keep(store, b"x" * 100, digest))
        os.utime(paths[-1], (time.time() - 10 + age,) * 2)
    await keep(store, b"x" * 100, "a")  # used again: now younger than b
    await keep(store, b"x" * 100, "c")
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["a", "c"]


async def test_the_store_never_drops_what_a_request_holds(tmp_path):
    from server.errors import Overloaded

    store = MediaStore(tmp_path, max_bytes=150, max_age_seconds=0.01)
    async with store.held(b"x" * 100, digest="a" * 64, suffix=".mp4") as path:
        with pytest.raises(Overloaded):
            await keep(store, b"y" * 100, "b")
        await asyncio.sleep(0.02)
        await store.sweep()
        assert path.exists()
    await store.sweep()
    assert list(tmp_path.iterdir()) == []


async def test_the_store_drops_what_is_too_old_and_nothing_that_is_not_its_own(tmp_path):
    store = MediaStore(tmp_path, max_bytes=10_000, max_age_seconds=50)
    old = await keep(store, b"x", "a")
    young = await keep(store, b"x", "b")
    foreign = tmp_path / "holiday.mp4"
    foreign.write_bytes(b"x")
    leftover = tmp_path / ".incoming-xyz"
    leftover.write_bytes(b"x")
    for path in (old, foreign, leftover):
        os.utime(path, (0, 0))
    await store.sweep()
    assert sorted(tmp_path.iterdir()) == sorted([young, foreign])


async def test_a_file_cut_short_by_a_crash_is_written_anew(tmp_path):
    store = MediaStore(tmp_path, max_bytes=1000, max_age_seconds=50)
    (tmp_path / ("a" * 64 + ".mp4")).write_bytes(b"x" * 3)
    path = await keep(store, b"x" * 10, "a")
    assert path.read_bytes() == b"x" * 10
    assert len(list(tmp_path.iterdir())) == 1
