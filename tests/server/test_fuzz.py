"""Fuzzing with malformed bodies: the answer is always either the engine's or a 4xx with OpenAI's error object."""

import asyncio
import json

from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from server.aliases import Alias
from server.errors import GatewayError, answer_to
from server.requests.chat import parse_chat_request
from server.requests.parameters import OPERATOR_FIELDS
from tests.server.clips import clip, data_url
from tests.server.harness import CHAT, gateway

DEEP = 100_000

scalars = st.sampled_from(
    [
        *("null", "true", "false", "0", "-0", "1", "-1", "0.15", "1e-400", "1e999", "-1e999", "9" * 400, "9" * 5000),
        *("NaN", "Infinity", "-Infinity", '""', '"llava"', '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"\\uFFFF"'),
        *(
            '"video_url"',
            '"image_embeds"',
            '"https://10.0.0.1/x"',
            '"file:///etc/passwd"',
            '"data:video/mp4;base64,AA=="',
        ),
        *(json.dumps(data_url(clip())), json.dumps("x" * 3000), "[]", "{}"),
    ]
)
names = st.sampled_from(
    [
        *(
            "model",
            "messages",
            "stream",
            "stream_options",
            "aot",
            "retention",
            "chat_template_kwargs",
            "content",
            "type",
        ),
        *("enable_thinking", "include_usage", "video_url", "image_url", "audio_url", "file", "file_id", "url", "uuid"),
        *("role", "n", "max_tokens", "user", "\\ud800", "", "usage", "x" * 300, *OPERATOR_FIELDS),
    ]
)


def array(items):
    return f"[{','.join(items)}]"


def an_object(pairs):
    """A JSON object of key-value pairs, in which a key may occur twice."""
    return "{" + ",".join(f'"{name}":{value}' for name, value in pairs) + "}"


values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3).map(array) | st.lists(st.tuples(names, inner), max_size=4).map(an_object),
    max_leaves=8,
)
parts = st.lists(
    st.tuples(st.sampled_from(["type", "video_url", "image_url", "file", "text", "uuid"]), values), max_size=3
)
messages = st.lists(
    st.tuples(st.just("content"), st.lists(parts.map(an_object), max_size=3).map(array) | values).map(
        lambda content: an_object([("role", '"user"'), content])
    ),
    max_size=3,
).map(array)
requests = st.builds(
    lambda given_messages, more: an_object([("model", '"llava"'), ("messages", given_messages), *more]),
    messages | values,
    st.lists(st.tuples(names, values), max_size=4),
)


def nested(text, depth, brackets):
    return brackets[0] * depth + text + brackets[1] * depth


wrapped = st.builds(nested, values, st.sampled_from([1, 50, 900, 1100]), st.sampled_from([("[", "]"), ('{"a":', "}")]))
in_a_field = st.builds(
    lambda name, value: an_object([("model", '"llava"'), ("messages", "[]"), (name, value)]), names, wrapped
)


def broken(body, at, rubbish):
    at %= len(body) + 1
    return body[:at] + rubbish + body[at + len(rubbish) :]


rubbish = st.sampled_from([b"", b"\xff", b"\xed\xa0\x80", b"\x00", b'"', b"\\", b"}", b"\xef\xbb\xbf", b"\xf0\x9f"])
whole = (requests | values | in_a_field).map(str.encode)
bodies = whole | st.builds(broken, whole, st.integers(0, 5000), rubbish) | st.binary(max_size=60)

thoroughly = settings(
    max_examples=1000,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def assert_is_a_refusal(status, body):
    assert 400 <= status < 500
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert len(body["error"]["message"]) < 1000
    assert body["error"]["type"] == "invalid_request_error"


def outcome(body):
    """The processing of a body before it is sent to the engine."""
    try:
        chat = parse_chat_request(body)
        chat.address_to(Alias("llava", "engine-llava").target(chat.asked))
        return chat, b"".join(chat.serialise())
    except GatewayError as exc:
        answer = answer_to(exc)
        assert_is_a_refusal(answer.status, json.loads(answer.body()))
        return None, b""


def as_a_value(text):
    return f'{{"model":"llava","messages":[],"x":{text}}}'.encode()


@thoroughly
@given(bodies)
@example(b"")
@example(b"[" * DEEP)
@example(b"[" * DEEP + b"]" * DEEP)
@example(b'{"a":' * DEEP)
@example(as_a_value("[" * DEEP + "]" * DEEP))
@example(as_a_value("9" * DEEP))
@example(as_a_value("-" + "9" * DEEP + "." + "9" * DEEP + "e" + "9" * DEEP))
@example(as_a_value('"\\ud800"'))
@example(b'{"model":"llava","messages":[' + b"{}," * DEEP + b"{}]}")
@example(b'{"model":"llava","messages":[],"model":7}')
@example(b'{"model":7,"messages":[],"model":"llava"}')
@example(b'{"model":"llava","messages":[],"mm_processor_kwargs":{"a":1},"mm_processor_kwargs":null}')
@example(b'{"model":"llava","messages":[],"aot":{"retention":7},"aot":{"retention":0.5}}')
def test_whatever_is_parsed_goes_on_clean_or_is_refused(body):
    chat, sent = outcome(body)
    if chat is None:
        return
    fields = json.loads(sent)
    assert fields["model"] == "engine-llava"
    assert "aot" not in fields
    assert set(fields) & set(OPERATOR_FIELDS) <= {"mm_processor_kwargs"}
    assert set(fields.get("mm_processor_kwargs") or ()) <= {"aot_retention"}
    assert isinstance(fields["messages"], list)
    assert sent == json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()  # no key occurs twice


async def sent_to(client, path, content_type, bodies, *examples, num):
    """Send `num` random bodies and the examples; return the statuses of the answers."""
    statuses = []
    loop = asyncio.get_running_loop()

    async def post(body):
        answer = await client.post(path, content=body, headers={"content-type": content_type})
        statuses.append(answer.status_code)
        if answer.status_code != 200:
            assert_is_a_refusal(answer.status_code, answer.json())

    @settings(thoroughly, max_examples=num)
    @given(bodies)
    def send(body):
        asyncio.run_coroutine_threadsafe(post(body), loop).result(30)

    for body in examples:
        send = example(body)(send)
    await asyncio.to_thread(send)
    assert (await client.get("/health/live")).status_code == 200
    return statuses


async def test_whatever_is_sent_to_chat_gets_an_answer_or_a_refusal(engine):
    deep = [b"[" * DEEP, as_a_value("[" * DEEP + "]" * DEEP), as_a_value("9" * DEEP)]
    async with gateway(engine) as client:
        statuses = await sent_to(client, CHAT, "application/json", bodies, *deep, num=100)
    assert {200, 400} <= set(statuses)


FORM = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvideo\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="c.mp4"\r\nContent-Type: video/mp4\r\n\r\n'
    + clip()
    + b"\r\n--b--\r\n"
)
pieces = st.sampled_from([b"", b"\r\n", b"--b", b"--b--", b"\xff", b"\x00", b'"', b":", b";", b"name=", b"x" * 5000])
in_the_headers = st.integers(0, 200) | st.integers(len(FORM) - 20, len(FORM))


async def test_whatever_is_uploaded_becomes_a_file_or_is_refused_and_leaves_nothing(engine, tmp_path):
    forms = st.builds(broken, st.just(FORM), in_the_headers | st.integers(0, len(FORM)), pieces)
    cut = forms.flatmap(lambda form: st.integers(0, len(form)).map(lambda end: form[:end]))
    async with gateway(engine, files_dir=tmp_path) as client:
        kind = "multipart/form-data; boundary=b"
        statuses = await sent_to(client, "/v1/files", kind, forms | cut, FORM, num=80)
    assert {200, 400} <= set(statuses)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2 * statuses.count(200)
