"""Answers on two CPU processes, and what each rank kept; one JSON line on stdout for each engine asked for."""

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
    from tests.e2e.ranks import requests_to

    for name, mode, settings in json.load(sys.stdin):
        engine = Engine(
            checkpoint(name),
            video_pruning_rate=0.75,
            tensor_parallel_size=2,
            mm_encoder_tp_mode=mode,
            additional_config={"aot": settings},
            worker_extension_cls="tests.e2e.ranks.RankProbe",
        )
        engine.llm.collective_rpc("probe_kept_cells")
        answers = [engine.ask(asked)[0] for asked in requests_to(name)]
        ranks = engine.llm.collective_rpc("read_kept_cells")
        engine.close()
        seen = {"answers": [[a.prompt_tokens, a.tokens, a.logprobs] for a in answers], "ranks": ranks}
        print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
