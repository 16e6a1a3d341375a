"""What an engine measures of its own prefill before it serves."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest

from aot_vllm.adapters import prefill
from aot_vllm.adapters.prefill import measure_prefill

MARKS = {3, 7}


class Tokenizer:
    vocab_size = 20
    all_special_ids = (3,)

    def get_added_vocab(self):
        return {"<video>": 7, "<image>": 50}


class Engine:
    """The part of vLLM's engine client that is used. Its time passes as prompts say, and not otherwise."""

    def __init__(self, monkeypatch, *, seconds, max_model_len=1000, first_extra=0.0):
        self.model_config = SimpleNamespace(max_model_len=max_model_len)
        self.renderer = SimpleNamespace(get_tokenizer=Tokenizer)
        self.prompts, self.ids = [], []
        self._now, self._seconds, self._first_extra = 100.0, seconds, first_extra
        monkeypatch.setattr(prefill.time, "perf_counter", lambda: self._now)

    async def generate(self, prompt, sampling, request_id):
        tokens = prompt["prompt_token_ids"]
        assert sampling.max_tokens == 1
        is_new = len(tokens) not in map(len, self.prompts)
        self.prompts.append(tokens)
        self.ids.append(request_id)
        self._now += self._seconds(len(tokens)) + (self._first_extra if is_new else 0.0)
        yield "first"
        self._now += 1000.0  # whatever follows the first token is not measured


async def test_each_length_is_measured_up_to_three_times_and_the_quickest_counts(monkeypatch):
    engine = Engine(monkeypatch, seconds=lambda tokens: tokens / 1000, first_extra=0.2)
    assert await measure_prefill(engine) == {
        "tokens": [64, 128, 256, 512, 999],
        "seconds": [0.064, 0.128, 0.256, 0.512, 1.199],
    }
    counts = Counter(map(len, engine.prompts))
    # one to begin with; 512 took 1.224 seconds after two prompts, 999 as long after one
    assert counts == {64: 1 + 3, 128: 3, 256: 3, 512: 2, 999: 1}
    assert len(set(engine.ids)) == len(engine.ids)


async def test_a_slow_engine_is_measured_as_far_as_it_is_quick(monkeypatch):
    engine = Engine(monkeypatch, seconds=lambda tokens: tokens / 100, max_model_len=100_000)
    measured = await measure_prefill(engine)
    assert measured["tokens"] == [64, 128, 256, 512]
    assert measured["seconds"][-1] == 5.12


@pytest.mark.parametrize(
    ("longest", "tokens"), [(65, [64]), (64, [63]), (2, [1]), (129, [64, 128]), (130, [64, 128, 129])]
)
async def test_no_prompt_is_longer_than_a_prompt_can_be(monkeypatch, longest, tokens):
    engine = Engine(monkeypatch, seconds=lambda tokens: tokens / 1000, max_model_len=longest)
    assert (await measure_prefill(engine))["tokens"] == tokens


async def test_prompts_are_of_text_and_no_two_are_the_same(monkeypatch):
    engine = Engine(monkeypatch, seconds=lambda tokens: tokens / 1000)
    await measure_prefill(engine)
    assert set().union(*engine.prompts) == set(range(20)) - MARKS
    assert len({tuple(prompt[:32]) for prompt in engine.prompts}) == len(engine.prompts)


async def test_an_engine_that_fails_or_hangs_starts_all_the_same(monkeypatch, lines):
    def fail(tokens):
        raise RuntimeError("secret words")

    assert await measure_prefill(Engine(monkeypatch, seconds=fail)) is None

    class Hanging(Engine):
        async def generate(self, *_):
            await asyncio.Event().wait()
            yield None

    monkeypatch.setattr(prefill, "TIMEOUT_SECONDS", 0.05)
    assert await measure_prefill(Hanging(monkeypatch, seconds=None)) is None
    assert lines == [
        "AOT: the cost of prefill could not be measured: RuntimeError",
        "AOT: the cost of prefill could not be measured: TimeoutError",
    ]
