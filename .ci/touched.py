"""Which symbols of vLLM that the plugin touches differ between two releases: what to read before one is taken up.

    python .ci/touched.py OLD NEW [--diff]

OLD and NEW are directories that hold the package `vllm`: the `site-packages` of two environments, or two unpacked
wheels. Nothing of them is imported. The classes from which touched ones derive are told of too. Exits with 1 if a
symbol is gone.
"""

import argparse
import ast
import difflib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PLUGIN = Path(__file__).resolve().parent.parent / "aot_vllm"

Symbol = tuple[str, str]
"""A module, and a name in it; no name is the module as a whole."""


def touched(plugin: Path) -> list[Symbol]:
    """Return what the plugin's code imports from vLLM, and what it looks up in modules by their names."""
    found: set[Symbol] = set()
    for path in plugin.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and _is_vllm(node.module):
                found |= {(str(node.module), alias.name) for alias in node.names}
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                found.update(_looked_up(function))
    return sorted(found)


def _is_vllm(name: str | None) -> bool:
    return name is not None and name.split(".")[0] == "vllm"


def _looked_up(function: ast.FunctionDef) -> Iterator[Symbol]:
    """Give the names that a function uses beside a module that it names in a string, if it imports none of it."""
    body = [node for statement in function.body for node in ast.walk(statement)]
    texts = [node.value for node in body if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    modules = [text for text in texts if _is_vllm(text) and all(part.isidentifier() for part in text.split("."))]
    names = {node.attr for node in body if isinstance(node, ast.Attribute)} | set(texts)
    for module in modules:
        for name in names:
            if name.isidentifier() and name[:1].isupper():  # a class
                yield module, name


@dataclass
class Release:
    """The code of one release."""

    site: Path
    parsed: dict[Path, ast.Module] = field(default_factory=dict)

    def source(self, symbol: Symbol) -> str | None:
        """Return the code of a symbol, without comments; None if it isn't there."""
        found = self.find(symbol)
        return None if found is None else ast.unparse(found[1])

    def bases(self, symbol: Symbol) -> list[Symbol]:
        """Return the classes of vLLM that a class names as its own."""
        found = self.find(symbol)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return []
        names = [base.id for base in found[1].bases if isinstance(base, ast.Name)]
        return [(found[0], name) for name in names if name != symbol[1] and self.find((found[0], name)) is not None]

    def find(self, symbol: Symbol) -> tuple[str, ast.AST] | None:
        """Return the module in which a symbol is defined, and what defines it there; a module defines itself."""
        module, name = symbol
        path = self._path(module)
        if path is None:
            return None
        tree = self._tree(path)
        if not name:
            return module, tree
        node = next((node for node in _statements(tree) if name in _names(node)), None)
        if isinstance(node, ast.ImportFrom):
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            return self.find((_origin(module, path, node), original))
        if node is not None:
            return module, node
        imports = [node for node in _statements(tree) if isinstance(node, ast.ImportFrom) and "*" in _names(node)]
        places = [(_origin(module, path, node), name) for node in imports]
        places.append((f"{module}.{name}", ""))  # or it is a module itself
        return next((found for place in places if (found := self.find(place)) is not None), None)

    def _path(self, module: str) -> Path | None:
        path = self.site.joinpath(*module.split("."))
        return next((it for it in (path.with_suffix(".py"), path / "__init__.py") if it.is_file()), None)

    def _tree(self, path: Path) -> ast.Module:
        if path not in self.parsed:
            self.parsed[path] = ast.parse(path.read_text())
        return self.parsed[path]


def _origin(module: str, path: Path, node: ast.ImportFrom) -> str:
    """Return the module from which a statement in another one imports."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*package, *([node.module] if node.module else [])])


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Give the statements of a module, those in its conditions too."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.If | ast.Try):
            waiting = [*node.body, *node.orelse, *waiting]
        else:
            yield node


@cache
def _names(node: ast.stmt) -> frozenset[str]:
    """Return the names that a statement gives a meaning to."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return frozenset({node.name})
    if isinstance(node, ast.ImportFrom):
        return frozenset(alias.asname or alias.name for alias in node.names)
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return frozenset(target.id for target in targets if isinstance(target, ast.Name))


def main() -> int:
    """Print a line for each symbol that differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", type=Path, help="the directory in which the tested release's vllm is")
    parser.add_argument("new", type=Path, help="the directory in which the next release's vllm is")
    parser.add_argument("--diff", action="store_true", help="also print how they differ")
    arguments = parser.parse_args()
    for site in (arguments.old, arguments.new):
        if not (site / "vllm" / "__init__.py").is_file():
            parser.error(f"{site} holds no package vllm")
    old, new = Release(arguments.old), Release(arguments.new)
    counts = {"same": 0, "changed": 0, "gone": 0}
    symbols = touched(PLUGIN)
    symbols += sorted({base for symbol in symbols for base in old.bases(symbol)}.difference(symbols))
    for symbol in symbols:
        before, after = old.source(symbol), new.source(symbol)
        if before is None:  # only a newer release has it
            continue
        outcome = "same" if before == after else "gone" if after is None else "changed"
        counts[outcome] += 1
        if outcome != "same":
            print(f"{outcome:8} {'.'.join(filter(None, symbol))}")
        if outcome == "changed" and arguments.diff:
            print("\n".join(difflib.unified_diff(before.split("\n"), str(after).split("\n"), lineterm="", n=2)))
    print(", ".join(f"{number} {outcome}" for outcome, number in counts.items()))
    return 1 if counts["gone"] else 0


if __name__ == "__main__":
    sys.exit(main())
