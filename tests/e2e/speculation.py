"""Answers of an engine that looks drafts up in the prompt, and how many it accepted; one JSON line on stdout.

In a process of its own: no further engine starts in one in which vLLM 0.32 has loaded its n-gram proposer on a CPU.
"""

import json
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))


def main():
    from demo.tiny_checkpoints import checkpoint
    from tests.e2e.engines import Engine
    from tests.e2e.qwen import made, qwen_request

    name, *requests = json.load(sys.stdin)
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    engine = Engine(checkpoint(name), video_pruning_rate=0.75, speculative_config=drafts, disable_log_stats=False)
    answers = [engine.ask(qwen_request(*made(parts)), max_tokens=24)[0] for parts in requests]
    accepted = next(m.value for m in engine.llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")
    print(json.dumps({"answers": [[a.tokens, a.logprobs] for a in answers], "accepted": accepted}), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
