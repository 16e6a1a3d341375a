import pytest

from server.errors import ForbiddenField, InvalidRequest
from server.requests.parameters import DEEPEST, OPERATOR_FIELDS, Bounds, check_parameters
from tests.server.engine_double import EngineDouble
from tests.server.harness import CHAT, ask, error_of, gateway

BOUNDS = Bounds(max_choices=4, max_output_tokens=100, chat_template_kwargs=frozenset({"enable_thinking"}))


def nested(depth):
    value = {"type": "string"}
    for _ in range(depth):
        value = {"properties": value}
    return value


@pytest.mark.parametrize("name", OPERATOR_FIELDS)
def test_what_only_the_operator_sets_is_refused_by_name_whatever_its_value(name):
    for value in ({}, "", 0, False, [1], "x"):
        with pytest.raises(ForbiddenField, match=name) as caught:
            check_parameters({name: value}, BOUNDS)
        assert caught.value.param == name
    check_parameters({name: None}, BOUNDS)


@pytest.mark.parametrize("fields", [{"truncate_prompt_tokens": 20}, {"truncation_side": "left"}])
@pytest.mark.parametrize("kind", ["video", "image"])
async def test_what_engines_cant_combine_with_media_is_refused_beside_media_alone(engine, fields, kind):
    (name,) = fields
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": "https://example.com/medium"}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    async with gateway(engine) as client:
        answer = await client.post(CHAT, json=ask(messages=messages, **fields))
        assert answer.status_code == 400
        assert error_of(answer)["param"] == name
        assert (await client.post(CHAT, json=ask(**fields))).status_code == 200
    assert len(engine.requests) == 1


def test_template_switches_outside_the_list_are_refused_and_those_on_it_pass():
    with pytest.raises(ForbiddenField) as caught:
        check_parameters({"chat_template_kwargs": {"enable_thinking": False, "tools": []}}, BOUNDS)
    assert caught.value.param == "chat_template_kwargs.tools"
    check_parameters({"chat_template_kwargs": {"enable_thinking": False}}, BOUNDS)
    with pytest.raises(InvalidRequest, match="must be an object"):
        check_parameters({"chat_template_kwargs": 3}, BOUNDS)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 5}, "n"),
        ({"n": 0}, "n"),
        ({"n": 1e300}, "n"),
        ({"n": "9999"}, "n"),
        ({"best_of": 5}, "best_of"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 101}, "max_completion_tokens"),
        ({"max_output_tokens": 10**18}, "max_output_tokens"),
        ({"min_tokens": 101}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"messages": [{}] * 2049}, "messages"),
        ({"tools": [{}] * 129}, "tools"),
        ({"tools": [{"description": "x" * 600_000}]}, "tools"),
        ({"tools": [{"parameters": nested(DEEPEST)}]}, "tools"),
        ({"tools": [{"parameters": {"enum": [0] * 600_000}}]}, "tools"),
        ({"response_format": {"json_schema": {"x" * 70_000: {}}}}, "response_format"),
        ({"response_format": nested(DEEPEST)}, "response_format"),
        ({"structured_outputs": {"grammar": "x" * 70_000}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["x"] * 70_000}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a" * 4097}}, "structured_outputs.regex"),
        ({"structured_outputs": {"whitespace_pattern": "a" * 4097}}, "structured_outputs.whitespace_pattern"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 5000}, "stop"),
        ({"bad_words": ["a"] * 129}, "bad_words"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"allowed_token_ids": list(range(1025))}, "allowed_token_ids"),
        ({"repetition_detection": {"max_pattern_size": 10**6}}, "repetition_detection.max_pattern_size"),
    ],
)  # fmt: skip
def test_what_is_too_much_is_refused_by_name(fields, param):
    with pytest.raises(InvalidRequest, match=param.partition(".")[0]) as caught:
        check_parameters(fields, BOUNDS)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 4, "max_tokens": 100, "min_tokens": 0, "logprobs": True, "top_logprobs": 20},
        {"n": None, "max_tokens": None, "stop": None, "tools": None, "structured_outputs": None},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(DEEPEST - 5)}}] * 128},
        {"structured_outputs": {"regex": "a{1,9}"}, "stop": ["a", "b"], "logit_bias": {"7": -100}},
        {"stop": 7, "tools": "wrong", "structured_outputs": [1]},
    ],
)
def test_what_is_within_the_bounds_passes_and_types_are_left_to_the_engine(fields):
    check_parameters(fields, BOUNDS)


async def test_an_answer_without_a_limit_gets_the_operators(engine):
    async with gateway(engine, max_output_tokens=64, max_choices=2) as client:
        for fields in ({}, {"max_tokens": 5}, {"max_completion_tokens": 64}, {"max_tokens": None}):
            assert (await client.post(CHAT, json=ask(**fields))).status_code == 200
        refused = await client.post(CHAT, json=ask(max_tokens=65))
        assert (refused.status_code, error_of(refused)["param"]) == (400, "max_tokens")
        refused = await client.post(CHAT, json=ask(n=3))
        assert (refused.status_code, error_of(refused)["param"]) == (400, "n")
    limits = [(r.get("max_completion_tokens"), r.get("max_tokens")) for r in engine.requests]
    assert limits == [(64, None), (None, 5), (64, None), (64, None)]


async def test_without_the_operators_limit_requests_go_out_as_they_came(engine: EngineDouble):
    async with gateway(engine) as client:
        await client.post(CHAT, json=ask(max_tokens=10**6, unknown={"a": [1]}, cache_salt="mine"))
    assert engine.requests == [ask(max_tokens=10**6, unknown={"a": [1]}, cache_salt="mine")]
