"""The report of what differs between two releases of vLLM, on two small ones made here."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLD = {
    "__init__.py": "",
    "config/__init__.py": "from vllm.config.model import ModelConfig\nfrom .vllm import VllmConfig\n",
    "config/model.py": "class ModelConfig:\n    size = 1  # in bytes\n",
    "config/vllm.py": "class Base:\n    pass\n\n\nclass VllmConfig(Base):\n    pass\n",
    "distributed/__init__.py": "from .operations import *\n",
    "distributed/operations.py": "def tensor_model_parallel_all_reduce(x):\n    return x\n",
    "envs.py": "A = 1\n",
    "logger.py": "try:\n    import fast\nexcept ImportError:\n    pass\n\n\ndef init_logger(name):\n    return name\n",
}


def release(folder, **changed):
    for name, text in {**OLD, **{key.replace("__", "/") + ".py": value for key, value in changed.items()}}.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def report(old, new, *more):
    done = subprocess.run(
        [sys.executable, ".ci/touched.py", str(old), str(new), *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"config__model": "class ModelConfig:\n    size = 1\n"}, []),  # comments don't count
        ({"config__model": "class ModelConfig:\n    size = 2\n"}, ["changed  vllm.config.ModelConfig"]),
        (
            {"config__vllm": "class Base:\n    x = 1\n\n\nclass VllmConfig(Base):\n    pass\n"},
            ["changed  vllm.config.vllm.Base"],
        ),
        ({"envs": "A = 2\n"}, ["changed  vllm.envs"]),
        (
            {"distributed__operations": "def tensor_model_parallel_all_reduce(x):\n    return -x\n"},
            ["changed  vllm.distributed.tensor_model_parallel_all_reduce"],
        ),
        ({"logger": "def init_logger(name, /):\n    return name\n"}, ["changed  vllm.logger.init_logger"]),
        ({"unrelated": "x = 1\n"}, []),
    ],
)
def test_each_symbol_that_differs_is_named(tmp_path, changed, told):
    old, new = release(tmp_path / "old"), release(tmp_path / "new", **changed)
    code, lines, _ = report(old, new)
    assert (code, lines[:-1]) == (0, told)
    assert lines[-1].endswith(f"{len(told)} changed, 0 gone")


def test_a_symbol_that_is_gone_ends_it_with_1(tmp_path):
    old, new = release(tmp_path / "old"), release(tmp_path / "new", logger="")
    code, lines, _ = report(old, new)
    assert code == 1
    assert lines[0] == "gone     vllm.logger.init_logger"


def test_a_symbol_that_moved_and_is_imported_where_it_was_is_the_same(tmp_path):
    moved = {"logger": "from vllm.logs import init_logger\n", "logs": OLD["logger.py"]}
    assert report(release(tmp_path / "old"), release(tmp_path / "new", **moved))[:2] == (
        0,
        [report(release(tmp_path / "old"), tmp_path / "old")[1][-1]],
    )


def test_the_difference_is_shown_on_demand(tmp_path):
    new = release(tmp_path / "new", config__model="class ModelConfig:\n    size = 2\n")
    _, lines, _ = report(release(tmp_path / "old"), new, "--diff")
    assert {"-    size = 1", "+    size = 2"} <= set(lines)


def test_a_directory_without_vllm_is_an_error(tmp_path):
    code, _, error = report(release(tmp_path / "old"), tmp_path)
    assert code == 2
    assert f"{tmp_path} holds no package vllm" in error
