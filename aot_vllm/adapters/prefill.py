"""What prefill costs on this engine: seconds by the number of prompt tokens, measured before the engine serves.

A reduction saves what the language model would have spent on the tokens that it did not get. The vision tower runs all
the same, so the time of a whole request says too much. Prompts of text have no vision tower. With their times, a
gateway knows what a prompt costs, and what it would have cost with all tokens of its videos.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.logger import init_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.engine.protocol import EngineClient

logger = init_logger("vllm.aot")

SHORTEST_TOKENS = 64
LONGEST_PROMPT_SECONDS = 4.0
"""No prompt is tried after one that took this long: twice as many tokens take more than twice as long."""
MOST_REPEATS = 3
REPEATED_WITHIN_SECONDS = 1.0
"""Prompts of one length are asked until they took this long, and the quickest counts. The first also pays for what is
done once, and others may have waited for something else on the machine."""
TIMEOUT_SECONDS = 60.0


async def measure_prefill(engine: EngineClient) -> dict[str, list[Any]] | None:
    """Return `tokens` and `seconds`: lengths of prompts, each twice the one before, and the time to their first token.

    The longest is as long as a prompt can be, or took LONGEST_PROMPT_SECONDS. None if the engine did not answer.
    """
    longest = engine.model_config.max_model_len - 1
    lengths = [length for length in (SHORTEST_TOKENS << power for power in range(32)) if length < longest] + [longest]
    measured: dict[str, list[Any]] = {"tokens": [], "seconds": []}
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            words = _words(engine)
            await _seconds(engine, words, length=lengths[0])  # what only the very first prompt of an engine pays for
            for length in lengths:
                taken = [await _seconds(engine, words, length=length)]
                while sum(taken) < REPEATED_WITHIN_SECONDS and len(taken) < MOST_REPEATS:
                    taken.append(await _seconds(engine, words, length=length))
                measured["tokens"].append(length)
                measured["seconds"].append(round(min(taken), 6))
                if min(taken) > LONGEST_PROMPT_SECONDS:
                    break
    except Exception as exc:  # an engine serves without these numbers too
        logger.warning("AOT: the cost of prefill could not be measured: %s", type(exc).__name__)
        return None
    logger.info("AOT: prefill of %d tokens takes %.3g s.", measured["tokens"][-1], measured["seconds"][-1])
    return measured


def _words(engine: EngineClient) -> Sequence[int]:
    """Return tokens that are text: marks for media would be looked for in the prompt."""
    tokenizer: Any = engine.renderer.get_tokenizer()
    marks = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return [token for token in range(min(tokenizer.vocab_size, 32000)) if token not in marks]


async def _seconds(engine: EngineClient, words: Sequence[int], *, length: int) -> float:
    """Return the time to the first token after a prompt of random text, which no cache knows."""
    prompt = tokens_input(random.choices(words, k=length))  # noqa: S311 - no secret
    one = SamplingParams(max_tokens=1, temperature=0.0)
    started = time.perf_counter()
    async for _ in engine.generate(prompt, one, f"aot-prefill-{uuid4().hex}"):
        break
    return time.perf_counter() - started
