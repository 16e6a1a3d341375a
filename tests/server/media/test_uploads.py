"""The files API: over the ASGI app, over sockets with the SDK, and on the store itself."""

import asyncio
import io
import json
import os
import time
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry

from server.errors import InvalidRequest, MediaRefused, UnknownFile
from server.keys import digest_of, new_key
from server.media.examine import Examiner
from server.media.readers import Reader
from server.media.uploads import ABANDONED_SECONDS, FileStore
from server.observe.metrics import Metrics
from server.reader.facts import Limits
from server.settings import Settings
from tests.server.clips import clip
from tests.server.harness import gateway, served, until

FILES = "/v1/files"
ACME, GLOBEX = new_key(), new_key()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "gateway.yaml"
    path.write_text(
        f"tenants:\n"
        f"  acme: {{keys: [{{sha256: {digest_of(ACME.encode())}}}]}}\n"
        f"  globex: {{keys: [{{sha256: {digest_of(GLOBEX.encode())}}}]}}\n"
    )
    return path


@pytest.fixture
def directory(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def upload(client, content=None, *, name="clip.mp4", headers=None, **fields):
    files = {"file": (name, clip() if content is None else content, "video/mp4")}
    return client.post(FILES, files=files, data={"purpose": "video", **fields}, headers=headers)


def left_in(directory):
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


async def test_the_openai_sdk_uploads_lists_reads_and_deletes(engine, config, directory):
    video = clip()
    settings = Settings(engines=(engine.url,), config=config, files_dir=directory)
    async with (
        served(settings) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=ACME, max_retries=0) as client,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=GLOBEX, max_retries=0) as other,
    ):
        file = await client.files.create(
            file=("Ein Clip.mp4", io.BytesIO(video)),
            purpose="video",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert file.id.startswith("file-")
        assert file.object == "file"
        assert file.bytes == len(video)
        assert file.filename == "Ein Clip.mp4"
        assert file.purpose == "video"
        assert file.status == "processed"
        assert file.expires_at == file.created_at + 3600
        assert file.aot["duration_seconds"] == pytest.approx(2)
        assert file.aot["media_type"] == "video/mp4"
        more = [await client.files.create(file=(f"{i}.mp4", video), purpose="video") for i in range(2)]
        assert more[0].expires_at is None
        newest_first = [more[1].id, more[0].id, file.id]
        assert [listed.id async for listed in client.files.list()] == newest_first
        assert [listed.id async for listed in client.files.list(order="asc", limit=1)] == newest_first[::-1]
        page = await client.files.list(limit=2, purpose="video")
        assert (page.has_more, len(page.data)) == (True, 2)
        assert await client.files.retrieve(file.id) == file
        assert (await client.files.content(file.id)).content == video
        assert [listed async for listed in other.files.list()] == []
        for call in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError) as caught:
                await call(file.id)
            assert caught.value.code == "file_not_found"
        deleted = await client.files.delete(file.id)
        assert deleted.deleted
        assert deleted.id == file.id
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)
    assert len(left_in(directory)) == 4


async def test_files_outlast_a_restart(engine, config, directory):
    async with gateway(engine, config=config, files_dir=directory) as client:
        file = (await upload(client, headers=bearer(ACME))).json()
    async with gateway(engine, config=config, files_dir=directory) as client:
        assert (await client.get(f"{FILES}/{file['id']}", headers=bearer(ACME))).json() == file
        content = await client.get(f"{FILES}/{file['id']}/content", headers=bearer(ACME))
    assert content.content == clip()
    assert content.headers["content-type"] == "video/mp4"
    assert content.headers["content-disposition"] == 'attachment; filename="clip.mp4"'


async def test_content_comes_whole_whatever_range_is_asked_for(engine, directory):
    async with gateway(engine, files_dir=directory) as client:
        file_id = (await upload(client)).json()["id"]
        for wanted in ("bytes=0-3", "bytes=999999999-", "bytes=x"):
            answer = await client.get(f"{FILES}/{file_id}/content", headers={"range": wanted})
            assert answer.status_code == 200
            assert answer.content == clip()
            assert "accept-ranges" not in answer.headers


async def test_a_file_that_is_deleted_while_it_is_asked_for_is_a_404(engine, directory, monkeypatch):
    async with gateway(engine, files_dir=directory) as client:
        file_id = (await upload(client)).json()["id"]
        path_of = FileStore.path_of

        async def path_then_gone(self, *arguments, **named):
            path = await path_of(self, *arguments, **named)
            path.unlink()
            return path

        monkeypatch.setattr(FileStore, "path_of", path_then_gone)
        answer = await client.get(f"{FILES}/{file_id}/content")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "file_not_found"


async def test_without_a_directory_there_are_no_files_and_the_message_says_why(engine):
    async with gateway(engine) as client:
        answers = [await upload(client), await client.get(FILES), await client.delete(f"{FILES}/file-1")]
    for answer in answers:
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "files_disabled"
        assert "AOT_GATEWAY_FILES_DIR" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_media"),
        (b"\x89PNG\r\n\x1a\n", "invalid_media"),
        (b"#EXTM3U\nhttp://10.0.0.1/x.ts\n", "invalid_media"),
        (clip()[:700], "invalid_video"),
        (clip(frames=24), "video_too_long"),
        (clip() + b"\0" * 60_000, "media_too_large"),
    ],
)
async def test_what_is_no_video_that_requests_may_use_is_a_400_and_leaves_nothing(engine, directory, content, code):
    async with gateway(engine, files_dir=directory, media_max_seconds=3, media_max_bytes=50_000) as client:
        answer = await upload(client, content)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["param"] == "file"
    assert left_in(directory) == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "fine-tune"}, "purpose"),
        ({"purpose": ""}, "purpose"),
        ({"expires_after[anchor]": "created_at"}, "expires_after.seconds"),
        ({"expires_after[seconds]": "3600"}, "expires_after.anchor"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after.anchor"),
        *(
            ({"expires_after[anchor]": "created_at", "expires_after[seconds]": seconds}, "expires_after.seconds")
            for seconds in ("3599", "2592001", "-1", "1e9", "3600.5", "9" * 900, "", "٣٦٠٠")
        ),
        ({"colour": "blue"}, None),
        ({"purpose": "x" * 1025}, "purpose"),
        ({f"f{i}": "" for i in range(16)}, None),
    ],
)
async def test_a_bad_field_is_a_400_that_names_it_and_leaves_nothing(engine, directory, fields, param):
    async with gateway(engine, files_dir=directory) as client:
        answer = await upload(client, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert left_in(directory) == []


BOUNDARY = "multipart/form-data; boundary=b"


def part(disposition, content=b"x", more=b""):
    return b"--b\r\ncontent-disposition: form-data; " + disposition + b"\r\n" + more + b"\r\n" + content + b"\r\n"


PURPOSE = part(b'name="purpose"', b"video")
FILE = part(b'name="file"; filename="c.mp4"', clip())


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", PURPOSE),
        (f"multipart/form-data; boundary={'b' * 300}", b""),
        (BOUNDARY, b""),
        (BOUNDARY, b"garbage"),
        (BOUNDARY, PURPOSE + b"--b--\r\n"),
        (BOUNDARY, PURPOSE + FILE),
        (BOUNDARY, PURPOSE + FILE[:-20]),
        (BOUNDARY, PURPOSE + FILE + FILE + b"--b--\r\n"),
        (BOUNDARY, PURPOSE + PURPOSE + FILE + b"--b--\r\n"),
        (BOUNDARY, PURPOSE + part(b'name="image"; filename="c.mp4"') + b"--b--\r\n"),
        (BOUNDARY, PURPOSE + part(b'filename="c.mp4"') + b"--b--\r\n"),
        (BOUNDARY, PURPOSE + part(b'name="file"; filename="c.mp4"', more=b"a: b\r\n" * 9) + b"--b--\r\n"),
        (BOUNDARY, PURPOSE + part(b'name="file"; filename="c.mp4"', more=b"a: " + b"b" * 5000) + b"--b--\r\n"),
    ],
)
async def test_what_is_no_such_form_is_a_400_and_leaves_nothing(engine, directory, kind, body):
    async with gateway(engine, files_dir=directory) as client:
        answer = await client.post(FILES, content=body, headers={"content-type": kind})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert left_in(directory) == []


async def test_a_form_in_any_order_and_any_pieces_is_read(engine, directory):
    body = FILE + PURPOSE + b"--b--\r\n"

    async def pieces():
        for at in range(0, len(body), 7):
            yield body[at : at + 7]

    async with gateway(engine, files_dir=directory) as client:
        answer = await client.post(FILES, content=pieces(), headers={"content-type": BOUNDARY})
        assert answer.status_code == 200
        content = await client.get(f"{FILES}/{answer.json()['id']}/content")
    assert content.content == clip()


async def test_names_are_kept_without_folders_and_unprintable_characters(engine, directory):
    names = {
        "../../etc/passwd": "passwd",
        "C:\\videos\\clip.mp4": "clip.mp4",
        "a\u202eb.mp4": "ab.mp4",
        "Hündchen 🐕.mp4": "Hündchen 🐕.mp4",
        "x" * 300: "x" * 255,
        "/": "video",
    }
    async with gateway(engine, files_dir=directory) as client:
        for name, kept in names.items():
            answer = await upload(client, name=name)
            assert answer.json()["filename"] == kept
            assert (await client.get(f"{FILES}/{answer.json()['id']}/content")).status_code == 200


@pytest.mark.parametrize("file_id", ["file-1", "file-" + "0" * 32, "..", "%2e%2e%2fgateway.yaml", "file-" + "A" * 32])
async def test_an_id_that_is_none_is_a_404(engine, directory, file_id):
    async with gateway(engine, files_dir=directory) as client:
        answers = [await client.get(f"{FILES}/{file_id}"), await client.delete(f"{FILES}/{file_id}")]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert all(answer.json()["error"]["code"] in ("file_not_found", "not_found") for answer in answers)


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "limit=x", "order=up", "after=x"])
async def test_a_bad_parameter_of_a_list_is_a_400_that_names_it(engine, directory, query):
    async with gateway(engine, files_dir=directory) as client:
        answer = await client.get(f"{FILES}?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.partition("=")[0]


async def test_the_purpose_that_was_sent_comes_back_and_lists_can_be_limited_to_it(engine, directory):
    async with gateway(engine, files_dir=directory) as client:
        for purpose in ("video", "user_data", "vision"):
            answer = await upload(client, purpose=purpose)
            assert answer.json()["purpose"] == purpose
            assert (await client.get(f"{FILES}/{answer.json()['id']}")).json()["purpose"] == purpose
            assert [file["id"] for file in (await client.get(f"{FILES}?purpose={purpose}")).json()["data"]] == [
                answer.json()["id"]
            ]
        assert len((await client.get(FILES)).json()["data"]) == 3
        assert (await client.get(f"{FILES}?purpose=fine-tune")).json()["data"] == []
        refused = await upload(client, purpose="fine-tune")
    message = "purpose must be one of video, user_data, vision, got 'fine-tune'"
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, message)


async def test_files_that_an_older_gateway_wrote_are_still_there(engine, directory):
    async with gateway(engine, files_dir=directory) as client:
        file = (await upload(client, purpose="vision")).json()
        (description,) = directory.rglob("*.json")
        older = json.loads(description.read_text())
        del older["purpose"], older["aot"]["codec"]
        description.write_text(json.dumps(older))
        assert (await client.get(f"{FILES}/{file['id']}")).json() == {
            **file,
            "purpose": "video",
            "aot": {**file["aot"], "codec": ""},
        }
    assert file["aot"]["codec"] == "mpeg4"


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        (b"name=\"file\"; filename*=UTF-8''B%C3%A4r%20%F0%9F%90%95.mp4", "Bär 🐕.mp4"),
        (b"name=file; FileName*=utf-8'en'a.mp4", "a.mp4"),
        (b"name=\"file\"; filename*=iso-8859-1''B%E4r.mp4", "Bär.mp4"),
        (b"filename*=UTF-8''a.mp4; name=\"file\"", "a.mp4"),
        (b'name="file"; filename="fallback.mp4"; filename*=UTF-8\'\'B%C3%A4r.mp4', "Bär.mp4"),
        (b"name=\"file\"; filename*=nonsense''B%C3%A4r.mp4", "Bär.mp4"),
        (b"name=\"file\"; filename*=UTF-8''..%2F..%2Fpasswd", "passwd"),
    ],
)
async def test_an_upload_whose_name_comes_encoded_is_taken(engine, directory, disposition, name):
    body = PURPOSE + part(disposition, clip()) + b"--b--\r\n"
    async with gateway(engine, files_dir=directory) as client:
        answer = await client.post(FILES, content=body, headers={"content-type": BOUNDARY})
    assert (answer.status_code, answer.json().get("filename")) == (200, name), answer.text


async def test_a_tenants_files_have_a_limit_together_and_deleting_makes_room(engine, config, directory):
    size = len(clip()) + 700  # including the form around the file
    async with gateway(engine, config=config, files_dir=directory, files_tenant_bytes=2 * size) as client:
        first = await upload(client, headers=bearer(ACME))
        assert (await upload(client, headers=bearer(ACME))).status_code == 200
        refused = await upload(client, headers=bearer(ACME))
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "file_quota_exceeded"
        assert (await upload(client, headers=bearer(GLOBEX))).status_code == 200
        await client.delete(f"{FILES}/{first.json()['id']}", headers=bearer(ACME))
        assert (await upload(client, headers=bearer(ACME))).status_code == 200


async def test_uploads_at_a_time_share_the_room(engine, directory):
    size = len(clip()) + 700
    async with gateway(engine, files_dir=directory, files_tenant_bytes=2 * size) as client:
        answers = await asyncio.gather(*(upload(client) for _ in range(5)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses[0] == 200
    assert statuses.count(200) <= 2
    assert len(left_in(directory)) == 2 * statuses.count(200)


async def test_an_upload_that_breaks_off_leaves_nothing_and_frees_its_room(engine, directory):
    settings = Settings(engines=(engine.url,), files_dir=directory, files_tenant_bytes=2**20, media_max_bytes=2**20)
    async with served(settings) as url:
        _, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        head = f"POST {FILES} HTTP/1.1\r\nhost: x\r\ncontent-type: {BOUNDARY}\r\ncontent-length: 1000000\r\n\r\n"
        writer.write(head.encode() + FILE)
        await writer.drain()
        await until(lambda: left_in(directory))
        writer.close()
        await until(lambda: not left_in(directory))
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            assert (await upload(client)).status_code == 200


async def test_a_body_larger_than_any_file_may_be_is_a_413(engine, directory):
    async with gateway(engine, files_dir=directory, media_max_bytes=1024, files_tenant_bytes=2**30) as client:
        answer = await client.post(FILES, content=b"x", headers={"content-type": BOUNDARY, "content-length": "9" * 12})
    assert answer.status_code == 413


@asynccontextmanager
async def store(directory, **settings):
    limits = Limits(max_seconds=60, max_pixels=2**23, max_frames=100_000, sampled_frames=32)
    reader = Reader(limits=limits, seconds=10)
    bounds = {"max_bytes": 2**20, "tenant_bytes": 2**30}
    try:
        yield FileStore(
            directory, examiner=Examiner(reader, metrics=Metrics(CollectorRegistry())), **{**bounds, **settings}
        )
    finally:
        reader.close()


async def added(files, tenant="acme", expires_after_seconds=None):
    async with files.incoming(tenant=tenant, size_bytes=None) as incoming:
        await incoming.write(clip())
        return await files.keep(
            incoming, tenant=tenant, filename="clip.mp4", expires_after_seconds=expires_after_seconds
        )


async def test_the_path_of_a_file_is_its_tenants_only(directory):
    async with store(directory) as files:
        file = await added(files)
        assert (await files.path_of(file.id, tenant="acme")).read_bytes() == clip()
        for file_id, tenant in [(file.id, "globex"), (file.id, ""), ("file-" + "0" * 32, "acme"), ("../acme", "acme")]:
            with pytest.raises(UnknownFile):
                await files.path_of(file_id, tenant=tenant)


async def test_an_expired_file_is_gone_at_its_moment_and_its_bytes_with_the_next_sweep(directory):
    now = 1_800_000_000.0
    async with store(directory, clock=lambda: now) as files:
        file, other = await added(files, expires_after_seconds=60), await added(files)
        now += 59.9
        assert await files.path_of(file.id, tenant="acme")
        now += 0.1
        for call in (files.path_of, files.get, files.delete):
            with pytest.raises(UnknownFile):
                await call(file.id, tenant="acme")
        page = await files.page(tenant="acme", after=None, limit=10, order="asc")
        assert [listed.id for listed in page.data] == [other.id]
        assert len(left_in(directory)) == 4
        await files.sweep()
    assert left_in(directory) == [f"{other.id}.json", f"{other.id}.video"]


async def test_what_a_crash_has_left_is_swept_once_no_upload_can_be_at_it(directory):
    async with store(directory) as files:
        file = await added(files)
        folder = directory / "acme"
        for name in (".incoming-abc", "file-" + "0" * 32 + ".video"):
            (folder / name).write_bytes(b"half")
        await files.sweep()
        assert len(left_in(directory)) == 4
        long_ago = time.time() - ABANDONED_SECONDS - 1
        for path in folder.iterdir():
            os.utime(path, (long_ago, long_ago))
        (directory / "gateway.yaml").write_text("not ours")
        await files.sweep()
        assert (await files.get(file.id, tenant="acme")) == file
    assert left_in(directory) == [f"{file.id}.json", f"{file.id}.video", "gateway.yaml"]


async def test_a_description_that_can_not_be_read_is_a_file_that_is_not_there(directory):
    async with store(directory) as files:
        file = await added(files)
        (directory / "acme" / f"{file.id}.json").write_text("{")
        with pytest.raises(UnknownFile):
            await files.path_of(file.id, tenant="acme")
        assert (await files.page(tenant="acme", after=None, limit=10, order="desc")).data == []


async def test_pages_follow_each_other_in_both_orders(directory):
    now = 1_800_000_000.0
    async with store(directory, clock=lambda: now) as files:
        ids = []
        for _ in range(5):
            now += 0.01
            ids.append((await added(files)).id)
        for order, expected in (("asc", ids), ("desc", ids[::-1])):
            seen, after, more = [], None, True
            while more:
                page = await files.page(tenant="acme", after=after, limit=2, order=order)
                assert (page.first_id, page.last_id) == (page.data[0].id, page.data[-1].id)
                seen += [file.id for file in page.data]
                after, more = page.last_id, page.has_more
            assert seen == expected
        empty = await files.page(tenant="nobody", after=None, limit=2, order="asc")
    assert (empty.data, empty.first_id, empty.last_id, empty.has_more) == ([], None, None, False)


async def test_what_does_not_fit_is_refused_while_it_arrives_and_its_room_is_free_again(directory):
    async with store(directory, max_bytes=1000, tenant_bytes=1500) as files:
        async with files.incoming(tenant="acme", size_bytes=None) as incoming:
            await incoming.write(b"x" * 1000)
            with pytest.raises(MediaRefused, match="larger than 1000 bytes"):
                await incoming.write(b"x")
        async with files.incoming(tenant="acme", size_bytes=1000):
            with pytest.raises(InvalidRequest, match="delete some"):
                async with files.incoming(tenant="acme", size_bytes=600):
                    pass
            async with files.incoming(tenant="acme", size_bytes=500), files.incoming(tenant="b", size_bytes=1000):
                pass
    assert left_in(directory) == []
