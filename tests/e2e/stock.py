"""Answers of vLLM as it ships: the plugin is kept out by VLLM_PLUGINS. Requests come on stdin, answers go to stdout."""

import json
import os
import sys

os.environ["VLLM_PLUGINS"] = ""
sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))


def main():
    from tests.e2e.engines import Engine, image, request, video

    engine = Engine(sys.argv[1], **json.loads(sys.argv[2]))
    answers = []
    for spec in json.load(sys.stdin):
        media = [
            video(frames, seed=seed) if kind == "video" else image(seed=seed) for kind, frames, seed in spec["media"]
        ]
        (answer,) = engine.ask(request(*media))
        answers.append([answer.prompt_tokens, answer.tokens, answer.logprobs, answer.prompt])
    engine.close()
    assert "aot_vllm" not in sys.modules
    print(json.dumps(answers))


main()
