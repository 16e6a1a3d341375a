"""What the tests of the adapters share: the lines that the plugin logs, and vLLM as it was before each."""

import logging

import pytest


@pytest.fixture(autouse=True)
def unwrapped(monkeypatch):
    """Take back what an activation wraps for the whole process."""
    from vllm.multimodal import video

    while hasattr(video.decode_video, "__wrapped__"):
        video.decode_video = video.decode_video.__wrapped__
    monkeypatch.setattr(video, "decode_video", video.decode_video)


@pytest.fixture
def lines():
    """Return the list of lines that the plugin logs during the test."""
    import vllm.logger  # noqa: F401  whose import replaces existing handlers

    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logger = logging.getLogger("vllm.aot")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)  # which also forgets what a logger remembers of its level
    yield logged
    logger.setLevel(level)
    logger.removeHandler(handler)
