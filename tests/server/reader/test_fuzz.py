"""Fuzzing with damaged files and made-up messages: the outcome is always either facts or a refusal."""

import asyncio
import json
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import InvalidRequest
from server.media.file import in_memory
from server.media.identify import identify
from server.media.readers import Reader
from server.reader.facts import Facts, Limits, ReadError
from server.requests.chat import parse_chat_request
from tests.server.clips import clip, data_url, picture, sound

LIMITS = Limits(max_seconds=600, max_pixels=3840 * 2160, max_frames=100_000, sampled_frames=32)
CASES_PER_FILE = 90
SEEDS = {
    "mp4": clip("mp4", "libx264"),
    "fragments": clip("mp4", "mpeg4", options=(("movflags", "frag_keyframe+empty_moov"),)),
    "mov": clip("mov", "mpeg4"),
    "webm": clip("webm", "vp8"),
    "mkv": clip("matroska", "libx264"),
    "avi": clip("avi", "mpeg4"),
    "ts": clip("mpegts", "libx264", fps=25),
    "mpg": clip("mpeg", "mpeg1video", fps=25),
    "png": picture(),
    "jpg": picture(kind="JPEG"),
    "gif": picture(kind="GIF"),
    "wav": sound(0.1),
}
KINDS = {"png": "image", "jpg": "image", "gif": "image", "wav": "audio"}
EXTREMES = (0, 1, 7, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
BOXES = (b"moov", b"trak", b"mdia", b"stbl", b"stsd", b"stts", b"stsz", b"stsc", b"stco", b"ctts", b"elst", b"mdhd")
BOXES += (b"mvhd", b"tkhd", b"avcC", b"moof", b"trun", b"tfhd", b"LIST", b"avih", b"strh", b"strf", b"idx1", b"IHDR")


def flip(data, chance):
    for _ in range(chance.choice((1, 1, 4, 32))):
        at = chance.randrange(len(data))
        data[at] ^= 1 << chance.randrange(8)


def truncate(data, chance):
    del data[chance.randrange(len(data)) :]


def overwrite(data, chance):
    at = chance.randrange(max(1, len(data) - 4))
    struct.pack_into(chance.choice("<>") + "I", data, min(at, len(data) - 4), chance.choice(EXTREMES))


def lie(data, chance):
    """Write an extreme number into a header or into its size field."""
    present = [box for box in BOXES if box in data]
    if not present:
        return overwrite(data, chance)
    at = data.index(chance.choice(present)) + chance.choice((-4, 4, 8, 12, 16, 20, 24, 28))
    if 0 <= at <= len(data) - 4:
        struct.pack_into(chance.choice("<>") + "I", data, at, chance.choice(EXTREMES))
    return None


def repeat(data, chance):
    begin = chance.randrange(len(data))
    piece = data[begin : begin + chance.choice((4, 64, 1024))]
    data[begin:begin] = piece * chance.choice((1, 10))


def remove(data, chance):
    begin = chance.randrange(len(data))
    del data[begin : begin + chance.choice((1, 4, 100))]


def damaged(seed, chance):
    data = bytearray(seed)
    for _ in range(chance.choice((1, 1, 2, 3))):
        if len(data) > 8:
            chance.choice((flip, flip, overwrite, lie, lie, truncate, repeat, remove))(data, chance)
    return bytes(data)


@pytest.mark.parametrize("name", SEEDS)
async def test_a_damaged_file_has_facts_or_is_refused(name):
    chance = random.Random(name)  # a fixed seed: the same files every time
    kind = KINDS.get(name, "video")
    demuxer = identify(SEEDS[name][:512], kind).demuxer
    reader = Reader(limits=LIMITS, seconds=3, num_workers=2)
    outcomes = []

    async def probe(data):
        with in_memory(max_bytes=10**7) as file:
            file.write(data)
            try:
                return await reader.examine(file.descriptor(), kind=kind, demuxer=demuxer)
            except ReadError as exc:
                return exc

    try:
        assert isinstance(await probe(SEEDS[name]), Facts)
        for _ in range(CASES_PER_FILE // 2):
            outcomes += await asyncio.gather(*(probe(damaged(SEEDS[name], chance)) for _ in range(2)))
        assert isinstance(await probe(SEEDS[name]), Facts)
    finally:
        reader.close()
    for facts in outcomes:
        if isinstance(facts, Facts):
            assert 0 <= facts.duration_seconds <= LIMITS.max_seconds
            assert facts.frames <= LIMITS.max_frames
            assert kind != "video" or 0 < facts.width * facts.height <= LIMITS.max_pixels
            assert facts.decoded_bytes >= 0
    assert {isinstance(outcome, Facts) for outcome in outcomes} == {True, False}


URLS = ["", "https://a/", "file:///etc/passwd", data_url(b"x"), "data:video/jpeg;base64,a,b", "\ud800", "a" * 70_000]
VALUES = [
    *URLS,
    None,
    True,
    7,
    [],
    ["https://a/"],
    {},
    {"url": None},
    {"url": {"url": "https://a/"}},
    [{"url": "https://a/"}],
]
KEYS = {"video_url": "url", "image_url": "url", "audio_url": "url", "input_audio": "data", "file": "file_data"}
NOISE = [{}] * 20 + [
    {"uuid": "u"},
    {"video_embeds": "x"},
    {"image_pil": "x"},
    {"type": 7},
    {"type": "text"},
    {"url": "x"},
]
NOISE += [
    {"file_id": "f"},
    {"detail": "low"},
    {"format": "wav"},
    {"uuid": None},
    *({key: {"url": "https://b/"}} for key in KEYS),
]


@st.composite
def media_parts(draw):
    """A part with a medium, or one that is nearly valid."""
    key = draw(st.sampled_from([*KEYS]))
    value = draw(st.sampled_from(URLS * 3 + VALUES))
    inner = value if draw(st.integers(0, 3)) == 0 else {KEYS[key]: value, **draw(st.sampled_from(NOISE))}
    named = {} if draw(st.booleans()) else {"type": key}
    return {**named, key: inner, **draw(st.sampled_from(NOISE))}


parts = media_parts() | media_parts() | st.just({"type": "text", "text": "<|video_pad|>"}) | st.sampled_from(VALUES)
contents = st.lists(parts, min_size=1, max_size=3) | st.sampled_from(VALUES)
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": contents})
messages = st.lists(message, min_size=1, max_size=2)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(messages)
def test_a_made_up_message_is_read_or_refused(content):
    body = json.dumps({"model": "m", "messages": content}).encode()
    try:
        chat = parse_chat_request(body)
        for medium in chat.media:
            assert medium.holder[medium.key] == medium.value
            medium.replace("data:video/mp4;base64,AAAA", uuid="u")
        sent = json.loads(b"".join(chat.serialise()))
    except InvalidRequest:
        return
    for message in sent["messages"]:
        if not isinstance(message, dict) or not isinstance(message.get("content"), list):
            continue
        for part in message["content"]:
            if isinstance(part, dict) and part.get("video_url") is not None:
                assert part == {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}, "uuid": "u"}
            assert not isinstance(part, dict) or part.get("file") is None
