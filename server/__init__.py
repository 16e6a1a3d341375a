"""The gateway: an OpenAI-compatible proxy in front of vLLM engines that reports how many tokens were saved."""


def __getattr__(name: str) -> str:
    """Return the installed package's version for `__version__`.

    The look-up happens on first use because it is slow, and the probe's worker processes never need the version.
    """
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("aot-vllm")
