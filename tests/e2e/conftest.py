"""Engines are started one at a time in a process; a test that asks for another one closes the last.

Tests with engines run side by side in two processes. Those that share engines stay together, and the longest come
first, so that both processes end at about the same time.
"""

import json

import pytest

LONGEST_FIRST = ("test_qwen_in_vllm", "test_qwen_positions", "with_gateway", "test_reduction_in_vllm")
"""Of what stays together. Next are other files, and then the tests that start processes of their own."""
ON_THEIR_OWN = {"test_accuracy", "test_as_composed", "test_demo", "test_fidelity", "test_loadtest"}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config, items):
    runner = config.getoption("--runner")
    others = [item for item in items if left_to_another(item, runner)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    items.sort(key=turn)
    for item in items:
        if "e2e" in item.path.parts:
            if group := together(item):
                item.add_marker(pytest.mark.xdist_group(group))
            item.add_marker(pytest.mark.engine)
            # vLLM and transformers warn about their own insides
            item.add_marker(pytest.mark.filterwarnings("default"))


def together(item):
    """Return the name of what must run in the same process as a test, or None."""
    if item.path.stem in ON_THEIR_OWN:
        return None
    if item.path.parent.name == "with_gateway":
        return "with_gateway"
    if item.path.stem == "test_qwen_positions":  # which start no engine twice
        return f"test_qwen_positions {item.callspec.params['name']}"
    return item.path.stem


def turn(item):
    """Return the place of a test among those with engines; the others keep theirs."""
    if "e2e" not in item.path.parts:
        return -1
    if (group := together(item)) is None:
        return len(LONGEST_FIRST) + 1
    name = group.partition(" ")[0]
    return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)


def left_to_another(item, runner):
    """Return whether a test runs with the other model runner only."""
    mark = item.get_closest_marker("only_on")
    return mark.args != (runner,) if mark else runner == "v1" and item.get_closest_marker("any_runner") is not None


class EngineHolder:
    def __init__(self):
        self.key, self.engine = None, None

    def get(self, name, **arguments):
        from demo.tiny_checkpoints import checkpoint  # not before: torch reads its environment as it is imported
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
