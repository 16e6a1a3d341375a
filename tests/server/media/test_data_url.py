import base64
import os
import re
import textwrap
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import MediaRefused
from server.media.data_url import PIECE_CHARACTERS, decode, read_head
from server.media.file import in_memory
from tests.server.clips import clip, data_url, picture, sound
from tests.server.harness import CHAT, ask, ask_about, error_of, gateway

GIF = picture(kind="GIF")


def base64_of(content):
    return base64.b64encode(content).decode()


def decoded(text):
    """The content of the base64, and whether every decoder reads it alike."""
    with in_memory(max_bytes=2**26) as file:
        is_strict = decode(text, 0, file, "video")
        return os.pread(file.descriptor(), 2**26, 0), is_strict


@pytest.mark.parametrize(
    ("head", "label"),
    [
        ("data:video/webm;codecs=vp9,opus;base64,", "video/webm"),
        ('data:video/mp4;codecs="avc1.42E01E, mp4a.40.2";base64,', "video/mp4"),
        ("data:image/png;charset=utf-8;name=a%20b.png;base64,", "image/png"),
        ("DATA:Video/MP4;BASE64,", "video/mp4"),
        ("data:video/mp4; base64,", "video/mp4"),
        ("data:video/mp4;charset=utf-8; base64 ,", "video/mp4"),
        ("data:;base64,", ""),
        ("data:;charset=utf-8;base64,", ""),
        ("data:text/plain;charset=US-ASCII;base64,", ""),
        ("data:application/octet-stream;base64,", ""),
        ("data:binary/octet-stream;base64,", ""),
        ("data:undefined;base64,", ""),
    ],
)
def test_the_head_of_a_data_url_is_read_as_it_is_written(head, label):
    found = read_head(head + "AAAA", "video")
    assert (found.label, found.begin) == (label, len(head))


@pytest.mark.parametrize(
    "url", ["data:,", "data:video/mp4,AAAA", "data:video/mp4;base64", "data:base64,AAAA", "data:" + ";" * 10**6]
)
def test_a_data_url_without_base64_is_refused(url):
    with pytest.raises(MediaRefused, match=re.escape("must begin with data:video/<type>;base64,")):
        read_head(url, "video")


CONTENT = bytes(range(256)) * 3 + b"x"


@pytest.mark.parametrize(
    "text",
    [
        textwrap.fill(base64_of(CONTENT), 76),
        textwrap.fill(base64_of(CONTENT), 64).replace("\n", "\r\n") + "\r\n",
        " " + base64_of(CONTENT) + "\t",
        base64_of(CONTENT).rstrip("="),
        base64_of(CONTENT)[:-1],
        quote(base64_of(CONTENT), safe=""),
        base64.urlsafe_b64encode(CONTENT).decode(),
        base64.urlsafe_b64encode(CONTENT).decode().rstrip("="),
    ],
)
def test_base64_is_read_in_the_ways_in_which_it_is_written(text):
    assert decoded(text) == (CONTENT, False)
    assert decoded(base64_of(CONTENT)) == (CONTENT, True)


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(PIECE_CHARACTERS // 4 * 3 - 5, PIECE_CHARACTERS // 4 * 3 + 5) | st.integers(0, 10),
    step=st.sampled_from([1, 3, 4, 76, 2**20 - 1]),
    space=st.sampled_from(["\n", "\r\n", " ", "%0A", "%0D%0A"]),
    padded=st.booleans(),
    as_view=st.booleans(),
)
def test_where_the_pieces_meet_changes_nothing(size, step, space, padded, as_view):
    content = bytes(size)
    text = base64_of(content) if padded else base64_of(content).rstrip("=")
    if size < 10 or step > 70:
        text = space.join(text[i : i + step] for i in range(0, len(text), step))
    assert decoded(memoryview(text.encode()) if as_view else text)[0] == content


@pytest.mark.parametrize(
    "text",
    [
        *("A", "AAAAA", "QUFB====QUFB", "QUE=QUFB", "QUFB====", "====", "AA$A", "ÄÖÜ=", "AAAA\0", "AAAA%", "AAAA%4"),
        "QUFB" * 300_000 + "QUE=" + "QUFB" * 300_000,
        "QUFB\n" * 250_000 + "QUE=\n" + "QUFB",
        "A" * 2_000_001,
    ],
)
def test_what_is_not_base64_is_refused(text):
    with pytest.raises(MediaRefused, match="not valid base64"):
        decoded(text)


def part(key, url):
    return {"type": key, key: {"url": url}}


def ask_with(*parts):
    return ask(messages=[{"role": "user", "content": list(parts)}])


def wrapped(content):
    return textwrap.fill(base64_of(content), 76) + "\n"


@pytest.mark.parametrize(
    ("key", "content", "mime"),
    [
        ("video_url", clip(), "video/mp4"),
        ("video_url", clip("webm", "vp8"), "video/webm"),
        ("video_url", GIF, "image/gif"),
        ("image_url", picture(), "image/png"),
        ("audio_url", sound(), "audio/wav"),
    ],
)
async def test_the_engine_gets_the_gateways_head_and_the_content_that_was_examined(engine, key, content, mime):
    kind, plain = key.partition("_")[0], base64_of(content)
    urls = [
        *(f"data:{mime};codecs=vp9,opus;base64,{plain}", f"DATA:{mime.upper()};BASE64,{plain}"),
        *(
            f"data:;base64,{plain}",
            f"data:application/octet-stream;base64,{plain}",
            f"data:{kind}/x-any;base64,{plain}",
        ),
        *(f"data:{mime};base64,{wrapped(content)}", f"data:{mime};base64,{plain.rstrip('=')}"),
        f"data:{mime};base64,{quote(plain, safe='')}",
    ]
    async with gateway(engine) as client:
        for url in urls:
            answer = await client.post(CHAT, json=ask_with(part(key, url)))
            assert answer.status_code == 200, answer.text
            (sent,) = engine.requests[-1]["messages"][0]["content"]
            assert sent[key]["url"] == data_url(content, mime)


@pytest.mark.parametrize("form", ["{}", "{}\n", "{};"])
async def test_large_media_with_odd_heads_arrive_whole_too(engine, form):
    filling = bytes(range(256)) * 2**13
    content = clip() + (len(filling) + 8).to_bytes(4, "big") + b"free" + filling
    head = "data:video/mp4;codecs=avc1,mp4a;base64,"
    body = form.format(base64_of(content)).rstrip(";")
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask_about(head + body))
        assert answer.status_code == 200, answer.text
    assert engine.requests[-1]["messages"][0]["content"][0]["video_url"]["url"] == data_url(content)


async def test_sound_in_base64_alone_is_sent_on_as_every_decoder_reads_it(engine):
    async with gateway(engine) as client:
        for text in (base64_of(sound()), wrapped(sound()), base64_of(sound()).rstrip("=")):
            sent = {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}}
            assert (await client.post(CHAT, json=ask_with(sent))).status_code == 200
            (got,) = engine.requests[-1]["messages"][0]["content"]
            assert got["input_audio"] == {"data": base64_of(sound()), "format": "wav"}


@pytest.mark.parametrize(
    ("key", "url", "words", "code"),
    [
        ("video_url", data_url(clip(), "image/png"), ["says image/png", "a video (video/mp4)"], "invalid_media_url"),
        ("image_url", data_url(clip(), "image/png"), ["is a video (video/mp4)", "says image/png"], "invalid_media"),
        (
            "image_url",
            data_url(picture(), "video/mp4"),
            ["says video/mp4", "an image (image/png)"],
            "invalid_media_url",
        ),
        ("video_url", data_url(picture(), "video/mp4"), ["a picture (image/png)", "says video/mp4"], "invalid_media"),
        (
            "audio_url",
            data_url(sound(), "image/png"),
            ["says image/png", "an audio clip (audio/wav)"],
            "invalid_media_url",
        ),
        ("video_url", data_url(clip(), "application/pdf"), ["says application/pdf", "video/mp4"], "invalid_media_url"),
    ],
)
async def test_a_label_of_another_kind_than_the_content_is_an_error_that_says_so(engine, key, url, words, code):
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask_with(part(key, url)))
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["code"], error["param"]) == (code, f"messages[0].content[0].{key}.url")
    assert all(word in error["message"] for word in words), error["message"]
    assert engine.requests == []
