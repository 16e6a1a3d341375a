import asyncio
import base64
import contextlib
import hashlib
import json

import pytest

from server.keys import digest_of, new_key
from server.media.intake import Intake
from server.media.uploads import FileStore
from tests.server.clips import clip, data_url, picture, sound
from tests.server.harness import CHAT, ask, ask_about, error_of, gateway, until, value

SECRET = "a secret of the operator"
URL = "http://media.example"


def fetching(internet, **settings):
    return {"network": internet.network, "media_allow_http": True, **settings}


def padded(size_bytes):
    """A clip, made longer by a number of meaningless bytes."""
    return clip() + size_bytes.to_bytes(4, "big") + b"free" + b"\0" * (size_bytes - 8)


def ask_with(*parts, **fields):
    return ask(messages=[{"role": "user", "content": list(parts)}], **fields)


def sent_parts(engine):
    return engine.requests[-1]["messages"][0]["content"]


def file_part(**file):
    return {"type": "file", "file": file}


@pytest.fixture
def files_dir(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


async def upload(client, content):
    """Upload a video; return its id."""
    answer = await client.post("/v1/files", files={"file": ("clip.mp4", content)}, data={"purpose": "video"})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


async def refusal(client, url):
    answer = await client.post(CHAT, json=ask_about(url))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "messages[0].content[0].video_url.url"
    assert error["type"] == "invalid_request_error"
    return error


async def test_a_video_on_a_public_host_reaches_the_engine_as_a_data_url(engine, internet, host):
    async with gateway(engine, **fetching(internet)) as client:
        for name, mime in (("clip.mp4", "video/mp4"), ("clip.webm", "video/webm")):
            answer = await client.post(CHAT, json=ask_about(f"{URL}/{name}", aot={"retention": 0.2}))
            assert answer.status_code == 200, answer.text
            (part, _) = sent_parts(engine)
            assert part.pop("uuid")
            assert part == {"type": "video_url", "video_url": {"url": data_url(host.files[f"/{name}"], mime)}}
            assert engine.requests[-1]["mm_processor_kwargs"] == {"aot_retention": 0.2}
        assert client.registry.get_sample_value("aot_gateway_overhead_seconds_count", {"phase": "fetch"}) == 2
        assert client.registry.get_sample_value("aot_gateway_video_duration_seconds_count") == 2


async def test_images_and_audio_on_a_public_host_reach_the_engine_as_data_urls(engine, internet):
    parts = [
        {"type": "image_url", "image_url": {"url": f"{URL}/a.png", "detail": "low"}},
        {"type": "audio_url", "audio_url": {"url": f"{URL}/a.wav"}},
        {"image_url": f"{URL}/a.png"},
    ]
    async with gateway(engine, **fetching(internet)) as client:
        assert (await client.post(CHAT, json=ask_with(*parts, aot={"retention": 0.1}))).status_code == 200
    png, wav = data_url(picture(), "image/png"), data_url(sound(), "audio/wav")
    assert sent_parts(engine) == [
        {"type": "image_url", "image_url": {"url": png, "detail": "low"}},
        {"type": "audio_url", "audio_url": {"url": wav}},
        {"image_url": png},
    ]
    assert "mm_processor_kwargs" not in engine.requests[0]


async def test_the_images_of_responses_are_fetched_here_too(engine, internet, host):
    async with gateway(engine, **fetching(internet)) as client:
        content = [{"type": "input_image", "image_url": f"{URL}/a.png", "detail": "auto"}]
        answer = await client.post(
            "/v1/responses", json={"model": "llava", "input": [{"role": "user", "content": content}]}
        )
    assert answer.status_code == 200, answer.text
    assert engine.requests[0]["input"][0]["content"] == [{**content[0], "image_url": data_url(picture(), "image/png")}]
    assert host.asked == ["/a.png"]


async def test_images_and_audio_in_the_request_and_text_pass_untouched(engine):
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(picture(), "image/png")}},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound()).decode(), "format": "wav"}},
        {"type": "text", "text": "file:///etc/passwd http://127.0.0.1 <|video_pad|>"},
    ]
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask_with(*parts))
        assert answer.status_code == 200, answer.text
    assert sent_parts(engine) == parts


@pytest.mark.parametrize(
    ("part", "code", "param"),
    [
        ({"image_url": {"url": "data:image/png;base64,AAAA"}}, "invalid_media", "image_url.url"),
        ({"image_url": {"url": data_url(picture()[:20], "image/png")}}, "invalid_image", "image_url.url"),
        ({"image_url": {"url": data_url(clip(), "image/png")}}, "invalid_media", "image_url.url"),
        ({"image_url": {"url": data_url(picture(), "video/mp4")}}, "invalid_media_url", "image_url.url"),
        ({"audio_url": {"url": data_url(sound()[:30], "audio/wav")}}, "invalid_audio", "audio_url.url"),
        ({"input_audio": {"data": "!", "format": "wav"}}, "invalid_media_url", "input_audio.data"),
        ({"input_audio": {"data": "AAAA", "format": "wav"}}, "invalid_media", "input_audio.data"),
        (file_part(file_data="AAAA"), "invalid_media", "file.file_data"),
        (file_part(file_data=data_url(clip()[:-300])), "invalid_video", "file.file_data"),
        (file_part(file_data=data_url(b"%PDF-1.7", "application/pdf")), "invalid_media", "file.file_data"),
        (file_part(file_id="file-1"), None, "file.file_id"),
    ],
)
async def test_a_medium_that_is_none_is_refused_by_its_place(engine, part, code, param):
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask_with(part))
    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (
        code,
        f"messages[0].content[0].{param}",
    )
    assert engine.requests == []


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "FILE:///etc/passwd", "ftp://a/b", "rtsp://a/b", "concat:a|b", "subfile:,,a"),
        *("ms://file-1", "", "/etc/passwd", " http://a", "javascript:1"),
    ],
)
@pytest.mark.parametrize("key", ["video_url", "image_url", "audio_url"])
async def test_every_other_scheme_is_refused(engine, url, key):
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask_with({"type": key, key: {"url": url}}))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == f"messages[0].content[0].{key}.url"
    assert engine.requests == []


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (data_url(clip()[:-300]), "invalid_video"),
        (data_url(b"\x89PNG\r\n\x1a\n" + b"\0" * 100), "invalid_media"),
        (data_url(b"#EXTM3U\n"), "invalid_media"),
        ("data:video/mp4;base64,", "invalid_media"),
        ("data:video/mp4;base64,AAA", "invalid_media"),
        ("data:video/mp4;base64,AA AA", "invalid_media"),
        ("data:video/mp4;base64,AAAAA", "invalid_media_url"),
        ("data:video/mp4;base64,QUFB====QUFB", "invalid_media_url"),
        ("data:video/mp4;base64," + "QUFB" * 300_000 + "QUE=" + "QUFB" * 300_000, "invalid_media_url"),
        ("data:video/mp4;base64," + "QUFB" * (2**18 - 1) + "QUE=" + "QUFB", "invalid_media_url"),
        ("data:video/mp4;base64,ÄÖÜ=", "invalid_media_url"),
        ("data:video/mp4,AAAA", "invalid_media_url"),
        ("data:video/mp4;codecs=avc1;base64,AAAA", "invalid_media"),
        ("data:image/png;base64,AAAA", "invalid_media"),
        ("data:video/jpeg;base64,/9j/" + ",/9j/" * 100_000, "invalid_media_url"),
        ("data:video/JPEG;base64,/9j/", "invalid_media_url"),
        (data_url(clip(), "video/jpeg"), "invalid_media_url"),
        ("data:,", "invalid_media_url"),
    ],
)
async def test_a_data_url_that_is_no_video_is_refused(engine, url, code):
    async with gateway(engine) as client:
        assert (await refusal(client, url))["code"] == code
        assert client.registry.get_sample_value("aot_gateway_rejections_total", {"reason": "media"}) == 1
    assert engine.requests == []


async def test_lists_of_frames_are_refused_by_name(engine):
    async with gateway(engine) as client:
        error = await refusal(client, "data:video/jpeg;base64,/9j/,/9j/")
    assert "lists of frames" in error["message"]


async def test_videos_that_last_too_long_are_refused_however_they_come(engine, internet):
    async with gateway(engine, **fetching(internet), media_max_seconds=1.5) as client:
        for url in (data_url(clip()), f"{URL}/clip.mp4"):
            error = await refusal(client, url)
            assert error["code"] == "video_too_long"
            assert "2 seconds, at most 1.5" in error["message"]
        assert (await client.post(CHAT, json=ask_about(data_url(clip(frames=6))))).status_code == 200


async def test_videos_that_are_too_large_are_refused_however_they_come(engine, internet):
    async with gateway(engine, **fetching(internet), media_max_bytes=1024) as client:
        for url in (data_url(clip()), f"{URL}/clip.mp4"):
            assert (await refusal(client, url))["code"] == "media_too_large"


@pytest.mark.parametrize(
    "settings", [{"media_max_bytes": 2 * len(clip())}, {"media_max_decoded_bytes": 2 * 12 * 64 * 48 * 3}]
)
async def test_the_media_of_a_request_are_bounded_together(engine, internet, settings):
    part = {"type": "video_url", "video_url": {"url": f"{URL}/clip.mp4"}}
    async with gateway(engine, **fetching(internet), **settings) as client:
        for number, status in ((2, 200), (3, 400)):
            answer = await client.post(CHAT, json=ask_with(*[part] * number))
            assert answer.status_code == status
    assert answer.json()["error"]["code"] == "media_too_large"
    assert answer.json()["error"]["param"] == "messages[0].content[2].video_url.url"


async def test_only_the_frames_that_an_engine_looks_at_count_as_decoded(engine):
    bound = {"media_sampled_frames": 4, "media_max_decoded_bytes": 4 * 64 * 48 * 3}
    async with gateway(engine, **bound) as client:
        assert (await client.post(CHAT, json=ask_about(data_url(clip())))).status_code == 200


@pytest.mark.parametrize(
    ("part", "allowed"),
    [
        ({"type": "video_url", "video_url": {"url": data_url(clip())}}, 16),
        ({"type": "image_url", "image_url": {"url": data_url(picture(), "image/png")}}, 64),
    ],
)
async def test_more_media_than_a_request_may_have_are_refused(engine, part, allowed):
    async with gateway(engine) as client:
        for number, status in ((allowed, 200), (allowed + 1, 400)):
            answer = await client.post(CHAT, json=ask_with(*[part] * number))
            assert answer.status_code == status
    assert answer.json()["error"]["param"] == f"messages[0].content[{allowed}].{part['type']}.url"


async def test_what_a_host_sends_must_be_a_video(engine, internet, host):
    async with gateway(engine, **fetching(internet)) as client:
        assert (await refusal(client, f"{URL}/a.png"))["code"] == "invalid_media"
        host.files["/page"] = b"<!doctype html><html><title>Sign in</title>"
        error = await refusal(client, f"{URL}/page")
        assert error["message"].startswith("the file at the URL is a web page, not a video of a type")
        assert error["message"].endswith(": the URL must lead to the file itself")
        error = await refusal(client, f"{URL}/none")
        assert error["code"] == "media_fetch_failed"
        assert "9.9.9.9" not in error["message"]


async def test_a_large_video_is_handled_off_the_loop_and_arrives_whole_under_the_same_name(engine, internet, host):
    filling = bytes(range(256)) * 2**14
    host.files["/large.mp4"] = clip() + (len(filling) + 8).to_bytes(4, "big") + b"free" + filling
    url = data_url(host.files["/large.mp4"])
    of_data, of_url = await uuids(engine, ask_about(url), ask_about(f"{URL}/large.mp4"), **fetching(internet))
    assert [request["messages"][0]["content"][0]["video_url"]["url"] for request in engine.requests[-2:]] == [url, url]
    assert of_data == of_url


async def test_videos_are_handed_over_as_files_however_they_come(engine, internet, tmp_path, files_dir):
    store = tmp_path / "store"
    store.mkdir()
    settings = {"media_handoff": "file", "media_dir": store, "files_dir": files_dir}
    async with gateway(engine, **fetching(internet), **settings) as client:
        file_id = await upload(client, clip())
        for part in (
            {"type": "video_url", "video_url": {"url": f"{URL}/clip.mp4"}},
            {"type": "video_url", "video_url": {"url": data_url(clip())}},
            file_part(file_data=base64.b64encode(clip()).decode()),
            file_part(file_id=file_id),
        ):
            answer = await client.post(CHAT, json=ask_with(part))
            assert answer.status_code == 200, answer.text
    (file,) = store.iterdir()
    assert file.read_bytes() == clip()
    assert file.name == hashlib.sha256(clip()).hexdigest() + ".mp4"
    assert file.stat().st_mode & 0o777 == 0o644
    assert [request["messages"][0]["content"][0]["video_url"]["url"] for request in engine.requests] == [
        file.as_uri()
    ] * 4
    assert len({request["messages"][0]["content"][0]["uuid"] for request in engine.requests}) == 1


async def test_files_that_were_uploaded_or_come_with_the_request_are_videos_to_the_engine(engine, files_dir):
    async with gateway(engine, files_dir=files_dir) as client:
        parts = [
            file_part(file_id=await upload(client, clip())),
            file_part(file_data=base64.b64encode(clip()).decode(), filename="a.mp4"),
            file_part(file_data=data_url(clip())),
        ]
        answer = await client.post(CHAT, json=ask_with(*parts, aot={"retention": 0.2}))
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["video_tokens"]
    for part in sent_parts(engine):
        assert part.pop("uuid")
        assert part == {"type": "video_url", "video_url": {"url": data_url(clip())}}
    assert engine.requests[0]["mm_processor_kwargs"] == {"aot_retention": 0.2}


async def test_a_file_is_there_for_its_own_tenant_alone(engine, files_dir, tmp_path):
    keys = {name: new_key() for name in ("acme", "globex")}
    tenants = {name: {"keys": [{"sha256": digest_of(key.encode())}]} for name, key in keys.items()}
    config = tmp_path / "gateway.yaml"
    config.write_text(json.dumps({"tenants": tenants}))
    async with gateway(engine, files_dir=files_dir, config=config) as client:
        client.headers["authorization"] = f"Bearer {keys['acme']}"
        request = ask_with(file_part(file_id=await upload(client, clip())))
        assert (await client.post(CHAT, json=request)).status_code == 200
        client.headers["authorization"] = f"Bearer {keys['globex']}"
        answer = await client.post(CHAT, json=request)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "file_not_found"
    assert answer.json()["error"]["param"] == "messages[0].content[0].file.file_id"
    assert len(engine.requests) == 1


async def test_a_file_that_is_deleted_while_it_is_asked_about_is_a_refusal(engine, files_dir, monkeypatch):
    path_of = FileStore.path_of

    async def found_and_gone(store, file_id, *, tenant):
        path = await path_of(store, file_id, tenant=tenant)
        path.unlink()
        return path

    async with gateway(engine, files_dir=files_dir) as client:
        request = ask_with(file_part(file_id=await upload(client, clip())))
        monkeypatch.setattr(FileStore, "path_of", found_and_gone)
        answer = await client.post(CHAT, json=request)
    assert answer.status_code == 400
    assert "deleted" in answer.json()["error"]["message"]
    assert str(files_dir) not in answer.text


async def uuids(engine, *requests, **settings):
    async with gateway(engine, **settings) as client:
        for request in requests:
            answer = await client.post(CHAT, json=request)
            assert answer.status_code == 200, answer.text
    sent = engine.requests[-len(requests) :]
    return [request["messages"][0]["content"][0]["uuid"] for request in sent]


async def test_a_video_has_one_name_at_the_engine_however_it_comes_and_another_video_another(engine, internet):
    of_url, of_data, of_other = await uuids(
        engine,
        ask_about(f"{URL}/clip.mp4"),
        ask_about(data_url(clip(), "video/x-unknown"), aot={"retention": 0.3}),
        ask_about(data_url(clip(frames=6))),
        **fetching(internet),
    )
    assert of_url == of_data != of_other
    assert hashlib.sha256(clip()).hexdigest() not in of_url


async def test_gateways_agree_on_a_videos_name_only_if_they_share_a_secret(engine):
    request = ask_about(data_url(clip()))
    alone = [*await uuids(engine, request), *await uuids(engine, request)]
    together = [*await uuids(engine, request, media_secret=SECRET), *await uuids(engine, request, media_secret=SECRET)]
    assert len({*alone, *together}) == 3
    assert together[0] == together[1]


@pytest.fixture
def all_taken(monkeypatch):
    """The summaries of the media that gateways took in, one per request."""
    taken, all_taken = Intake.taken, []

    @contextlib.asynccontextmanager
    async def noted(self, media, **who):
        async with taken(self, media, **who) as what:
            all_taken.append(what)
            yield what

    monkeypatch.setattr(Intake, "taken", noted)
    return all_taken


async def test_what_was_taken_in_says_what_the_videos_are_and_how_long(engine, all_taken):
    video = [{"type": "video_url", "video_url": {"url": data_url(clip(frames=n))}} for n in (12, 6)]
    image = {"type": "image_url", "image_url": {"url": data_url(picture(), "image/png")}}
    async with gateway(engine) as client:
        for parts in ([video[0]], [image, video[0]], video, video[::-1], video, [image]):
            assert (await client.post(CHAT, json=ask_with(*parts))).status_code == 200
    keys = [taken.key for taken in all_taken]
    assert keys[0] == keys[1] == hashlib.sha256(clip()).hexdigest()
    assert keys[2] == keys[4] != keys[3]
    assert keys[5] is None
    assert len({*keys}) == 4
    longest = [taken.longest_video and taken.longest_video.frames for taken in all_taken]
    assert longest == [12, 12, 12, 12, 12, None]
    assert [taken.video_seconds for taken in all_taken] == pytest.approx([2, 2, 3, 3, 3, 0], abs=0.01)


async def test_a_video_that_was_seen_before_is_not_probed_again(engine, internet):
    async with gateway(engine, **fetching(internet)) as client:
        for url in (data_url(clip()), f"{URL}/clip.mp4", data_url(clip())):
            assert (await client.post(CHAT, json=ask_about(url))).status_code == 200
        for _ in range(2):  # a refusal is not cached: the video is probed again
            await refusal(client, data_url(clip()[:-300]))
        assert client.registry.get_sample_value("aot_gateway_probes_total") == 3


async def test_requests_for_one_url_at_one_time_share_a_download(engine, internet, host):
    host.gate = asyncio.Event()
    async with gateway(engine, **fetching(internet)) as client:
        asking = [asyncio.create_task(client.post(CHAT, json=ask_about(f"{URL}/clip.mp4"))) for _ in range(5)]
        await until(lambda: client.registry.get_sample_value("aot_gateway_inflight_requests") == 5)
        await asyncio.sleep(0.05)
        asking[0].cancel()  # the first request may leave without harm to the others
        host.gate.set()
        answers = await asyncio.gather(*asking[1:])
    assert [answer.status_code for answer in answers] == [200] * 4
    assert host.asked == ["/clip.mp4"]
    assert len(engine.requests) == 4


async def test_when_nobody_waits_for_a_download_any_more_it_ends(engine, internet, host):
    host.gate = asyncio.Event()
    async with gateway(engine, **fetching(internet)) as client:
        asking = [asyncio.create_task(client.post(CHAT, json=ask_about(f"{URL}/clip.mp4"))) for _ in range(2)]
        await until(lambda: host.asked)
        for request in asking:
            assert host.left == 0
            request.cancel()
            await asyncio.sleep(0.05)
        await until(lambda: host.left == 1)


ROOM = {"max_buffered_bytes": 500_000, "max_body_bytes": 500_000, "media_max_bytes": 300_000}


async def test_media_that_are_fetched_to_stand_in_requests_take_memory_that_is_bounded(engine, internet, host):
    host.files["/large.mp4"] = padded(250_000)
    engine.delay_seconds = 0.5
    async with gateway(engine, **ROOM, **fetching(internet)) as client:
        first = asyncio.create_task(client.post(CHAT, json=ask_about(f"{URL}/large.mp4")))
        await until(lambda: engine.running)
        assert value(client, "buffered_bytes") > 250_000
        second = await client.post(CHAT, json=ask_about(f"{URL}/large.mp4"))
        assert (second.status_code, error_of(second)["code"]) == (429, "rate_limit_exceeded")
        assert (await first).status_code == 200
        assert value(client, "buffered_bytes") == 0
        assert (await client.post(CHAT, json=ask_about(f"{URL}/large.mp4"))).status_code == 200


async def test_media_that_are_handed_over_as_files_take_no_memory_any_more(engine, tmp_path):
    engine.delay_seconds = 0.5
    async with gateway(engine, **ROOM, media_handoff="file", media_dir=tmp_path) as client:
        asking = asyncio.create_task(client.post(CHAT, json=ask_about(data_url(padded(250_000)))))
        await until(lambda: engine.running)
        assert value(client, "buffered_bytes") == 0
        assert (await asking).status_code == 200
