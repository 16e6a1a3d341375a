"""What vLLM's own pruning makes of requests, one JSON line each: an answer, or the error that ended the engine."""

import json
import os
import sys

os.environ["VLLM_PLUGINS"] = ""
sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))


def main():
    from aot_vllm.adapters.compat import let_cpu_runner_recompute_positions
    from tests.e2e.engines import Engine
    from tests.e2e.qwen import made, qwen_request, watch_positions, watch_recomputations

    spec = json.load(sys.stdin)
    engine = Engine(spec["model"], **spec["arguments"])
    if spec["as_on_a_gpu"]:
        let_cpu_runner_recompute_positions()
    steps, recomputations = [], []
    engine.llm.apply_model(lambda model: watch_positions(model, steps) and watch_recomputations(model, recomputations))
    for parts, options in spec["requests"]:
        steps.clear()
        recomputations.clear()
        try:
            (answer,) = engine.ask(qwen_request(*made(parts), **options))
        except BaseException as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
            os._exit(0)  # an engine that failed amid a step may never end
        seen = {
            "prompt": answer.prompt,
            "logprobs": answer.logprobs,
            "times": [time for step in steps for time in step[0].tolist()],
            "recomputations": recomputations,
        }
        print(json.dumps(seen), flush=True)
    os._exit(0)


main()
