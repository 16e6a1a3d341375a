"""Answers on two CPU processes, and what each rank kept; one JSON line on stdout."""

import json
import os
import sys

os.environ.update(VLLM_CPU_OMP_THREADS_BIND="0|1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])


def main():
    from tests.e2e.engines import Engine, request, video

    engine = Engine(
        sys.argv[1],
        video_pruning_rate=0.75,
        tensor_parallel_size=2,
        worker_extension_cls="tests.e2e.ranks.RankProbe",
    )
    engine.llm.collective_rpc("probe_kept_cells")
    answers = [engine.ask(request(video(frames, seed=frames)))[0] for frames in (1, 8, 33)]
    ranks = engine.llm.collective_rpc("read_kept_cells")
    print(json.dumps({"answers": [[a.prompt_tokens, a.tokens, a.logprobs] for a in answers], "ranks": ranks}))
    engine.close()


if __name__ == "__main__":
    main()
