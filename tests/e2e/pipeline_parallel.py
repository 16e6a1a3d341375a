"""Answers of two stages on two CPU processes; one JSON line on stdout for the checkpoint named on stdin."""

import json
import os
import sys

os.environ.update(VLLM_CPU_OMP_THREADS_BIND="0|1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])


def main():
    from demo.tiny_checkpoints import checkpoint
    from tests.e2e.engines import Engine
    from tests.e2e.stages import settings_of, steps_of

    name = json.load(sys.stdin)
    engine = Engine(
        checkpoint(name), pipeline_parallel_size=2, worker_extension_cls="tests.e2e.stages.Stage", **settings_of(name)
    )
    engine.llm.collective_rpc("get_ready")
    answers = [engine.ask(*step) for step in steps_of(name)]
    print(json.dumps({"answers": [[[a.prompt_tokens, a.tokens, a.logprobs] for a in step] for step in answers]}))
    engine.close()


if __name__ == "__main__":
    main()
