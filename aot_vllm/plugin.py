"""The `vllm.general_plugins` entry point.

vLLM only logs a plugin that fails to *import*, and would then serve unreduced; an exception out of `register()` stops
it. So nothing is imported here before `register()` runs.
"""


def register() -> None:
    """Make AOT's model classes known to this process and watch for `--video-pruning-rate`.

    Runs in every vLLM process (API server, engine core, workers, the model inspector), possibly more than once.
    Nothing in-tree is overridden: until an engine is configured with a pruning rate, vLLM behaves as without it.

    Raises:
        UnsupportedError: vLLM lacks a function the plugin builds on.
    """
    from aot_vllm.adapters.activation import activate
    from aot_vllm.adapters.compat import after_engine_config
    from aot_vllm.adapters.registry import register_models

    register_models()
    after_engine_config(activate)
