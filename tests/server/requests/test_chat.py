import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.aliases import Alias, Target
from server.errors import ForbiddenField, InvalidRequest, RetentionRefused
from server.requests.chat import parse_chat_request
from server.requests.fields import parse_json_object
from server.requests.parameters import OPERATOR_FIELDS
from tests.server.clips import data_url
from tests.server.harness import ask, ask_about

VIDEO = data_url(b"not looked at here")


def parse(fields):
    return parse_chat_request(json.dumps(fields).encode())


def sent(fields, alias=None):
    chat = parse(fields)
    chat.address_to((alias or Alias("llava", "llava")).target(chat.asked))
    return json.loads(b"".join(chat.serialise()))


text = st.text(st.characters(codec="utf-8"), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
READ = {"model", "messages", "stream", "stream_options", "aot", "chat_template_kwargs", *OPERATOR_FIELDS}


@given(st.dictionaries(text.filter(lambda name: name not in READ), json_values, max_size=5))
def test_unknown_fields_pass_untouched(extra):
    assert sent(ask(**extra)) == ask(**extra)


def test_a_lone_surrogate_is_refused():
    with pytest.raises(InvalidRequest, match="character"):
        sent(ask(user="\ud800"))


def test_the_alias_becomes_the_engines_model_and_aot_disappears():
    parsed = sent(ask(aot={"retention": 0.2}), Alias("fast", "llava-7b"))
    assert parsed["model"] == "llava-7b"
    assert "aot" not in parsed
    assert "mm_processor_kwargs" not in parsed


@pytest.mark.parametrize(
    ("asked", "default", "given_"),
    [(None, None, None), (None, 0.1, 0.1), (0.2, None, 0.2), (0.2, 0.1, 0.2), (0.123, None, 0.12), (1, None, 1.0)],
)
def test_the_retention_reaches_the_engine_if_anybody_named_one(asked, default, given_):
    fields = ask_about(VIDEO) if asked is None else ask_about(VIDEO, aot={"retention": asked})
    parsed = sent(fields, Alias("a", "llava", default))
    if given_ is None:
        assert "mm_processor_kwargs" not in parsed
    else:
        assert parsed["mm_processor_kwargs"] == {"aot_retention": given_}


numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-3, 3)
not_numbers = st.booleans() | st.text() | st.lists(st.floats(), max_size=2) | st.dictionaries(st.text(), numbers)


@given(numbers | not_numbers)
def test_a_retention_is_a_number_above_0_up_to_1_or_refused(value):
    body = json.dumps(ask_about(VIDEO, aot={"retention": value})).encode()
    is_good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
    if is_good:
        chat = parse_chat_request(body)
        assert chat.asked.retention == value
    else:
        with pytest.raises(RetentionRefused) as caught:
            parse_chat_request(body)
        assert caught.value.param == "aot.retention"


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-Infinity", "1e999", "true", '"0.1"', "[0.1]", "{}", "0", "1.01", "-1", "9" * 400]
)
def test_each_wrong_spelling_of_a_retention_names_the_parameter(text):
    body = b'{"model":"m","messages":[],"aot":{"retention":%s}}' % text.encode()
    with pytest.raises(RetentionRefused) as caught:
        parse_chat_request(body)
    assert caught.value.param == "aot.retention"


def test_an_unknown_key_of_aot_is_refused():
    with pytest.raises(InvalidRequest, match="'epsilon'") as caught:
        parse(ask(aot={"retention": 0.1, "epsilon": 1}))
    assert caught.value.param == "aot.epsilon"
    assert caught.value.code == "invalid_aot"


@pytest.mark.parametrize("value", ["fast", 0.1, [], True])
def test_aot_is_an_object(value):
    with pytest.raises(RetentionRefused, match="must be an object"):
        parse(ask(aot=value))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_embeds", "video_embeds": "AAAA"},
        {"type": "image_embeds", "image_embeds": None},
        {"type": "prompt_embeds", "data": "AAAA"},
        {"image_embeds": "AAAA"},
        {"type": "video_url", "video_url": {"url": VIDEO}, "uuid": "another-tenants"},
        {"type": "video_url", "video_url": {"url": VIDEO, "uuid": "another-tenants"}},
        {"type": "video_url", "video_url": None, "uuid": "another-tenants"},
    ],
)
@pytest.mark.parametrize("role", ["user", "tool", "system"])
def test_embeddings_and_cache_keys_in_parts_are_refused(part, role):
    with pytest.raises(ForbiddenField) as caught:
        parse({"model": "m", "messages": [{"role": role, "content": [part]}]})
    assert caught.value.param.startswith("messages[0].content[0]")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": VIDEO}},
        {"type": "video_url", "video_url": VIDEO},
        {"video_url": VIDEO},
        {"video_url": {"url": VIDEO}},
    ],
)
def test_media_is_found_in_every_form_an_engine_takes(part):
    chat = parse({"model": "m", "messages": [{"role": "user", "content": [part]}]})
    assert [(media.kind, media.source, media.value) for media in chat.media] == [("video", "url", VIDEO)]
    chat.media[0].replace("data:video/mp4;base64,AAAA", uuid="u")
    (sent_part,) = json.loads(b"".join(chat.serialise()))["messages"][0]["content"]
    assert sent_part == {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}, "uuid": "u"}


@pytest.mark.parametrize(
    ("part", "kind", "source", "value"),
    [
        ({"type": "file", "file": {"file_id": "file-1"}}, "video", "upload", "file-1"),
        ({"type": "file", "file": {"file_data": "AAAA", "filename": "a.mp4"}}, "video", "base64", "AAAA"),
        ({"type": "file", "file": {"file_data": VIDEO, "file_id": None}}, "video", "url", VIDEO),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "audio", "base64", "AAAA"),
        ({"type": "image_url", "image_url": "https://a/"}, "image", "url", "https://a/"),
        ({"type": "input_image", "image_url": "https://a/"}, "image", "url", "https://a/"),
    ],
)
def test_files_sounds_and_images_are_found_too(part, kind, source, value):
    (media,) = parse({"model": "m", "messages": [{"role": "user", "content": [part]}]}).media
    assert (media.kind, media.source, media.value) == (kind, source, value)


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "file", "file": {}}, "file"),
        ({"type": "file", "file": "file-1"}, "file"),
        ({"type": "file", "file": {"file_id": "file-1", "file_data": VIDEO}}, "file"),
        ({"type": "file", "file": {"file_id": 7}}, "file.file_id"),
        ({"type": "file", "file": {"file_data": ["AAAA"]}}, "file.file_data"),
        ({"type": "input_audio", "input_audio": "AAAA"}, "input_audio.data"),
        ({"type": "input_audio", "input_audio": {"data": "data:audio/wavx;base64,AAAA"}}, "input_audio.data"),
        ({"type": "input_audio", "input_audio": {"data": f"data:audio/wav;base64,{'A' * 70_000}"}}, "input_audio.data"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "input_audio.data"),
        ({"type": "video_url", "video_url": {}}, "video_url.url"),
        ({"type": "video_url", "video_url": [VIDEO]}, "video_url.url"),
        ({"type": "video_url", "video_url": {"url": VIDEO}, "image_url": {"url": VIDEO}}, None),
        ({"type": "text", "text": "hi", "video_url": {"url": VIDEO}}, None),
        ({"type": "image_url", "video_url": {"url": VIDEO}}, None),
    ],
)
def test_a_part_that_could_be_read_in_two_ways_or_none_is_refused_by_its_place(part, param):
    with pytest.raises(InvalidRequest) as caught:
        parse({"model": "m", "messages": [{"role": "user", "content": ["ignored", part]}]})
    assert caught.value.param == "messages[0].content[1]" + (f".{param}" if param else "")


def test_of_a_videos_part_the_engine_gets_nothing_but_the_video():
    part = {"type": "video_url", "video_url": {"url": VIDEO, "format": "x"}, "image_pil": "x", "tool_reference": "y"}
    chat = parse({"model": "m", "messages": [{"role": "user", "content": [part]}]})
    chat.media[0].replace(VIDEO, uuid="u")
    (sent_part,) = json.loads(b"".join(chat.serialise()))["messages"][0]["content"]
    assert sent_part == {"type": "video_url", "video_url": {"url": VIDEO}, "uuid": "u"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "model"),
        ({"model": "", "messages": []}, "model"),
        ({"model": 3, "messages": []}, "model"),
        ({"model": "m"}, "messages"),
        ({"model": "m", "messages": "hi"}, "messages"),
        (ask(stream="yes"), "stream"),
        (ask(stream=1), "stream"),
        (ask(stream_options=[]), "stream_options"),
        (ask_about(7), "messages[0].content[0].video_url.url"),
    ],
)
def test_a_malformed_field_is_refused_by_name(fields, param):
    with pytest.raises(InvalidRequest) as caught:
        parse(fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"model":"m","messages":[],"temperature":NaN}',
        b'{"model":"m","messages":[],"seed":-Infinity}',
        b'{"n":' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(InvalidRequest, match="request body"):
        parse_chat_request(body)


def test_a_number_too_large_for_json_is_refused():
    with pytest.raises(InvalidRequest, match="JSON can't represent"):
        parse_chat_request(b'{"model":"m","messages":[],"temperature":1e999}')


@pytest.mark.parametrize(
    "text", ["18446744073709551616", "-9223372036854775809", "1" * 60, "1e22", "5e-324", "0.1", "-0.0", '"\\u0000 é"']
)
def test_values_reach_the_engine_as_they_were_sent(text):
    body = b'{"model":"m","messages":[],"value":%s}' % text.encode()
    sent = b"".join(parse_chat_request(body).serialise())
    assert json.dumps(json.loads(sent)["value"]) == json.dumps(json.loads(text))


def test_half_a_surrogate_pair_is_refused_when_it_is_passed_on():
    chat = parse_chat_request(b'{"model":"m","messages":[],"stop":"\\ud800"}')
    with pytest.raises(InvalidRequest, match="JSON can't represent"):
        chat.serialise()


def test_of_a_key_given_twice_the_engine_sees_the_one_that_was_checked():
    body = b'{"model":"m","messages":[],"mm_processor_kwargs":{"aot_retention":1},"mm_processor_kwargs":null}'
    chat = parse_chat_request(body)
    chat.address_to(Target("m", None))
    assert b"mm_processor_kwargs" not in b"".join(chat.serialise())


@pytest.mark.parametrize(
    ("options", "upstream"),
    [
        (None, {"include_usage": True}),
        (
            {"include_usage": True, "continuous_usage_stats": True},
            {"include_usage": True, "continuous_usage_stats": True},
        ),
        ({"include_usage": False, "continuous_usage_stats": True}, {"include_usage": True}),
        ({"include_obfuscation": False}, {"include_usage": True, "include_obfuscation": False}),
    ],
)
def test_streams_always_ask_for_usage_and_keep_the_other_options(options, upstream):
    assert sent(ask(stream=True, stream_options=options))["stream_options"] == upstream


def test_without_streaming_the_options_are_left_alone():
    assert "stream_options" not in sent(ask())
    assert sent(ask(stream_options={"include_usage": True}))["stream_options"] == {"include_usage": True}


@given(st.integers(65_536, 70_000), st.booleans())
def test_large_urls_are_joined_in_exactly_as_they_came(size, plain):
    url = "data:video/mp4;base64," + "QUJD" * (size // 4)
    fields = ask_about(url, note='ünïcode "quoted"', temperature=math.pi)
    chat = parse(fields)
    chat.media[0].is_plain = plain
    chat.fields["messages"].append({"role": "user", "content": "later"})
    fields["messages"].append({"role": "user", "content": "later"})
    assert json.loads(b"".join(chat.serialise())) == fields


LARGE = "data:video/mp4;base64," + "QUJD" * 20_000


@pytest.mark.parametrize(
    "fields",
    [
        ask_about(LARGE, user=LARGE),
        ask(user=f"say {LARGE}", metadata={LARGE: LARGE}),
        ask(user=f'say "{LARGE}"'),
        ask(user=LARGE + "\\n" + LARGE),
        ask(user="data:video/mp4;base64," + "ä" * 70_000),
        ask_about("https://a/", user=LARGE + " aot-" + "0" * 32),
        ask(messages=[*ask_about(LARGE)["messages"], *ask_about(LARGE)["messages"]]),
    ],
)
def test_what_looks_like_a_large_medium_anywhere_arrives_as_it_came(fields):
    assert json.loads(b"".join(parse(fields).serialise())) == fields


@pytest.mark.parametrize(
    "head",
    [
        *("data:video/webm;codecs=vp9,opus;base64,", "DATA:VIDEO/MP4;BASE64,", "data:;base64,"),
        *("data:video/mp4;charset=utf-8;base64,", "data:application/octet-stream;base64,"),
    ],
)
def test_a_large_medium_is_set_aside_whatever_its_head(head):
    url = head + LARGE.partition(",")[2]
    chat = parse(ask_about(url))
    assert bytes(chat.media[0].payload).decode() == LARGE.partition(",")[2]
    chat.media[0].replace("data:video/mp4;base64," + chat.media[0].value.removeprefix(head))
    (sent_part, _) = json.loads(b"".join(chat.serialise()))["messages"][0]["content"]
    assert sent_part["video_url"]["url"] == LARGE


def test_of_a_large_medium_only_the_base64_is_set_aside_and_a_new_url_forgets_it():
    chat = parse(ask_about(LARGE))
    assert bytes(chat.media[0].payload).decode() == LARGE.partition(",")[2]
    chat.media[0].replace("file:///a.mp4", uuid="u")
    assert b"file:///a.mp4" in b"".join(chat.serialise())
    assert len(b"".join(chat.serialise())) < 1000


@pytest.mark.parametrize("inside", ["\n", "\x00", "\x7f\x1f"])
def test_a_control_character_in_a_large_string_that_is_no_medium_is_no_json(inside):
    body = json.dumps(ask(user=LARGE + "@")).replace("@", inside).encode()
    with pytest.raises(InvalidRequest, match="JSON"):
        parse_chat_request(body)


def test_of_a_url_given_twice_the_engine_sees_the_one_that_was_checked():
    other = LARGE.replace("QUJD", "REVG")
    body = json.dumps(ask_about(LARGE)).replace('"url": ', f'"url": "{other}", "url": ').encode()
    chat = parse_chat_request(body)
    assert chat.media[0].payload is None
    assert json.loads(b"".join(chat.serialise())) == ask_about(LARGE)


def test_a_body_of_very_many_values_is_refused_before_it_is_parsed():
    with pytest.raises(InvalidRequest, match="500000 values"):
        parse_json_object(b'{"model": [' + b"[]," * 400_000 + b"[]]}")
    assert parse_json_object(b'{"a": "' + b"x" * 600_000 + b'"}')
