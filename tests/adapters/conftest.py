"""What the tests of the adapters share: the lines that the plugin logs."""

import logging

import pytest


@pytest.fixture
def lines(monkeypatch):
    """Return the list of lines that the plugin logs during the test."""
    import vllm.logger  # noqa: F401  whose import replaces existing handlers

    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logger = logging.getLogger("vllm.aot")
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "level", logging.INFO)
    yield logged
    logger.removeHandler(handler)
