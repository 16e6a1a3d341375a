"""Which folders outside the two packages import which: the contracts in pyproject.toml hold what is inside them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def imported(file):
    """Return the first names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("folder", ["aot_vllm", "server", "bench", "demo", "loadtest", "deploy"])
def test_nothing_but_tests_imports_tests(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [str(file.relative_to(ROOT)) for file in files if "tests" in imported(file)] == []
