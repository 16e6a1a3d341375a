"""A function fits on a screen. How complex one may be is ruff's to say.

Left out are Triton's kernels: each is one launch, whose arguments alone fill half a screen.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 60


def functions(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
                yield node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def is_kernel(node):
    return any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)


def test_no_function_of_the_packages_is_longer_than_a_screen():
    found = [*functions("server"), *functions("aot_vllm")]
    assert len(found) > 500
    assert [name for lines, name in found if lines > MOST_LINES] == []
