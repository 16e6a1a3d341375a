"""Engines are started one at a time in a process; a test that asks for another one closes the last.

Tests with engines run side by side in two processes. Those that share engines stay together, and the longest come
first, so that both processes end at about the same time.
"""

import json
from pathlib import Path

import pytest

LONGEST_FIRST = ("test_qwen_in_vllm", "test_qwen_positions", "with_gateway", "test_reduction_in_vllm")
"""Of what stays together. Next are other files, and then the tests that start processes of their own."""
ON_THEIR_OWN = {"test_accuracy", "test_as_composed", "test_demo", "test_fidelity", "test_loadtest"}


def pytest_collection_modifyitems(config, items):
    runner = config.getoption("--runner")
    others = [item for item in items if left_to_another(item, runner)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    items.sort(key=turn)
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.engine)
            # vLLM and transformers warn about their own insides
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give what stays together to one process; pytest-xdist 3.8 reads no group of a test under pytest 9.2."""
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return together(nodeid) or nodeid

    return Together(config, log)


def together(nodeid):
    """Return the name of what must run in the same process as a test, or None."""
    file, _, test = nodeid.partition("::")
    path = Path(file)
    if path.stem in ON_THEIR_OWN:
        return None
    if path.parent.name == "with_gateway":
        return "with_gateway"
    if path.stem == "test_qwen_positions":  # whose models share no engine
        return f"{path.stem} of {'Qwen2.5-VL' if 'qwen2.5-vl' in test else 'others'}"
    return path.stem


def turn(item):
    """Return the place of a test among those with engines; the others keep theirs."""
    if "e2e" not in item.path.parts:
        return -1
    if (group := together(item.nodeid)) is None:
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
            model = name if Path(name).is_absolute() else checkpoint(name)
            self.engine, self.key = Engine(model, **arguments), key
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
