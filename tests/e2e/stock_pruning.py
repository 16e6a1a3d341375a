"""What vLLM's own pruning makes of the requests of each spec: an answer each, or the error that ended the engine."""

import json

from tests.e2e.forks import each_in_a_fork


def answer(spec):
    from aot_vllm.adapters.compat import let_cpu_runner_recompute_positions
    from demo.tiny_checkpoints import checkpoint
    from tests.e2e.engines import Engine
    from tests.e2e.qwen import made, qwen_request, watch_positions, watch_recomputations

    engine = Engine(checkpoint(spec["model"]), **spec["arguments"])
    if spec["as_on_a_gpu"]:
        let_cpu_runner_recompute_positions()
    steps, recomputations = [], []
    engine.llm.apply_model(lambda model: watch_positions(model, steps) and watch_recomputations(model, recomputations))
    for parts, options in spec["requests"]:
        steps.clear()
        recomputations.clear()
        try:
            (answered,) = engine.ask(qwen_request(*made(parts), **options))
        except BaseException as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
            return  # an engine that failed amid a step may never end
        seen = {
            "prompt": answered.prompt,
            "logprobs": answered.logprobs,
            "times": [time for step in steps for time in step[0].tolist()],
            "recomputations": recomputations,
        }
        print(json.dumps(seen))


if __name__ == "__main__":
    each_in_a_fork(answer)
