"""The gateway: an OpenAI-compatible front for vLLM engines that reports what token reduction saved."""

__version__ = "0.1.0"
