"""The gateway: an OpenAI-compatible front for vLLM engines that reports what token reduction saved."""


def __getattr__(name: str) -> str:
    """Return `__version__`, the installed package's. It is looked up late: the probe's process never needs it."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("aot-vllm")
