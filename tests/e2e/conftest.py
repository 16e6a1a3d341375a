"""Engines are started one at a time in this process; a test that asks for another one closes the last."""

import json

import pytest

from demo.tiny_checkpoints import checkpoint


def pytest_collection_modifyitems(config, items):
    runner = config.getoption("--runner")
    others = [item for item in items if left_to_another(item, runner)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.engine)
            # vLLM and transformers warn about their own insides
            item.add_marker(pytest.mark.filterwarnings("default"))


def left_to_another(item, runner):
    """Return whether a test runs with the other model runner only."""
    mark = item.get_closest_marker("only_on")
    return mark.args != (runner,) if mark else runner == "v1" and item.get_closest_marker("any_runner") is not None


class EngineHolder:
    def __init__(self):
        self.key, self.engine = None, None

    def get(self, name, **arguments):
        from tests.e2e.engines import Engine

        key = json.dumps([name, arguments], sort_keys=True)
        if key != self.key:
            self.close()
            self.engine, self.key = Engine(checkpoint(name), **arguments), key
        return self.engine

    def close(self):
        if self.engine is not None:
            self.engine.close()
        self.key, self.engine = None, None


@pytest.fixture(scope="session")
def engine_holder():
    holder = EngineHolder()
    yield holder
    holder.close()


@pytest.fixture
def start_engine(engine_holder):
    """Return the engine with a checkpoint and arguments, the running one if it is the same."""
    return engine_holder.get
