"""Answers of vLLM as it ships to the requests of each spec on stdin, as a JSON line."""

import json
import sys

from demo.tiny_checkpoints import checkpoint
from tests.e2e.engines import Engine, image, request, video
from tests.e2e.forks import each_in_a_fork


def answer(spec):
    engine = Engine(checkpoint("tiny"), **spec["arguments"])
    answers = []
    for asked in spec["requests"]:
        media = [
            video(frames, seed=seed) if kind == "video" else image(seed=seed) for kind, frames, seed in asked["media"]
        ]
        (seen,) = engine.ask(request(*media))
        answers.append([seen.prompt_tokens, seen.tokens, seen.logprobs, seen.prompt])
    assert "aot_vllm" not in sys.modules
    print(json.dumps(answers))


if __name__ == "__main__":
    each_in_a_fork(answer)
