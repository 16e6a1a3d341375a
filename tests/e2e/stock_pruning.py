"""What vLLM's own pruning makes of requests, one JSON line each: an answer, or the error that ended the engine."""

import json
import os
import sys

os.environ["VLLM_PLUGINS"] = ""
sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))


def main():
    from tests.e2e.engines import Engine, image, video
    from tests.e2e.qwen import qwen_request

    spec = json.load(sys.stdin)
    engine = Engine(spec["model"], **spec["arguments"])
    for parts, options in spec["requests"]:
        media = [
            part
            if isinstance(part, str)
            else image(seed=part[2])
            if part[0] == "image"
            else video(part[1], side=168, seed=part[2])[:, :112]
            for part in parts
        ]
        try:
            (answer,) = engine.ask(qwen_request(*media, **options))
        except BaseException as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
            os._exit(0)  # an engine that failed amid a step may never end
        print(json.dumps({"prompt": answer.prompt, "logprobs": answer.logprobs}), flush=True)
    os._exit(0)


main()
