"""What a pipeline's stages are asked, and a worker extension for them."""

from tests.e2e.engines import image, interpolate_natively, request, video
from tests.e2e.qwen import qwen_request

SETTINGS = {"video_pruning_rate": 0.75, "enable_prefix_caching": True, "max_num_seqs": 4}
CHUNKED = {"max_num_batched_tokens": 64}
"""For engines without a hybrid model, whose linear layers need larger steps."""


def settings_of(name):
    """Return the arguments of an engine that prefills in chunks and caches prefixes."""
    if name.startswith("qwen3.5"):
        return {**SETTINGS, "max_num_batched_tokens": 128}
    return {**SETTINGS, **CHUNKED, "block_size": 32}


def steps_of(name):
    """Return what is asked one after the other: lists of requests that are handed over at once.

    The prefix of the second begins like the first and ends amid its video.
    """
    ask = asked_of_qwen if name.startswith("qwen") else asked_of_llava
    first, second, picture = clip(name, 33, 1), clip(name, 9, 2), image(seed=3)
    return [
        [ask(first, "What happens?")],
        [ask(first, "And then?")],
        [ask(first, "What happens?", retention=0.1)],
        [ask(second, first, "Which is longer?")],
        [ask(second, picture, "Which is brighter?")],
        [ask(picture, second, "Which is brighter?", retention=0.1), ask(first, "Why?"), ask(second, "Why?")],
    ]


def clip(name, frames, seed):
    return video(frames, side=168, seed=seed)[:, :112] if name.startswith("qwen") else video(frames, seed=seed)


def asked_of_qwen(*parts, retention=None):
    return qwen_request(*parts, retention=retention)


def asked_of_llava(*parts, retention=None):
    *media, question = parts
    return request(*media, question=question, retention=retention)


class Stage:
    def get_ready(self):
        """Do in this process what `Engine` does in its own, and what Model Runner V1 does for later stages on a GPU."""
        from vllm.distributed import get_pp_group

        interpolate_natively()
        runner = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )
