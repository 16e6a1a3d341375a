"""The `vllm.general_plugins` entry point.

If a plugin fails to *import*, vLLM logs it and serves without it, so videos would stay unreduced. If `register()`
raises, vLLM stops. So this module imports nothing before `register()` runs.
"""


def register() -> None:
    """Register AOT's model classes in this process, and activate AOT in engines that set `--video-pruning-rate`.

    Runs in every vLLM process (API server, engine core, workers, the model inspector), possibly more than once. No
    in-tree model is replaced. Without a pruning rate, vLLM behaves as if the plugin were not installed, except that it
    reads the frames files that a gateway hands over.

    Raises:
        UnsupportedError: vLLM lacks a function that the plugin needs.
    """
    from aot_vllm.adapters.activation import activate
    from aot_vllm.adapters.compat import after_engine_config, let_engine_report_statistics, load_frames_files
    from aot_vllm.adapters.registry import register_models

    register_models()
    load_frames_files()
    let_engine_report_statistics()
    after_engine_config(activate)
