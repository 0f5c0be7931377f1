"""Who imports whom when a module is loaded: no circle, and each room only from rooms below it.

A room is a folder of the package, or a file beside the folders.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mtprune"

# From the bottom up. A room imports from itself, from rooms before it in this list, and from rooms
# that are not in it.
ORDER = (
    "metrics",
    "model",
    "selection",
    "holding",
    "methods",
    "observing",
    "affinity",
    "compression",
    "showing",
    "integrations",
    "testing",
)


def modules(package: Path) -> dict[str, Path]:
    """All modules of a package by name, itself too."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """For each module the others that loading it asks for, but for the packages it lies in."""
    every = modules(package)
    graph = {}
    for name, path in every.items():
        asked = set()
        for statement in _loaded(ast.parse(path.read_text()).body):
            if isinstance(statement, ast.Import):
                targets = [alias.name for alias in statement.names]
            else:
                assert not statement.level, f"{path}: imports are absolute"
                inner = [f"{statement.module}.{alias.name}" for alias in statement.names]
                targets = [i if i in every else str(statement.module) for i in inner]
            for target in targets:
                parts = target.split(".")
                asked |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        graph[name] = {a for a in asked & set(every) if not f"{name}.".startswith(f"{a}.")}
    return graph


def _loaded(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that are carried out, in order: not those of functions, nor those for types."""
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield statement
        elif isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test):
            yield from _loaded(statement.orelse)
        elif isinstance(statement, ast.If | ast.Try | ast.With | ast.ClassDef):
            for part in ("body", "handlers", "orelse", "finalbody"):
                yield from _loaded(getattr(statement, part, []))
        elif isinstance(statement, ast.ExceptHandler):
            yield from _loaded(statement.body)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in turn, the first again as the last; empty if none do."""
    done: set[str] = set()

    def walk(path: list[str]) -> list[str]:
        for target in sorted(graph[path[-1]] - done):
            if target in path:
                return [*path[path.index(target) :], target]
            if found := walk([*path, target]):
                return found
        done.add(path[-1])
        return []

    return next((found for name in sorted(graph) if (found := walk([name]))), [])


def upward(graph: dict[str, set[str]], order: tuple[str, ...]) -> list[str]:
    """The imports that lead from a room to one above it."""

    def height(module: str) -> int:
        room = (*module.split("."), "")[1]
        return order.index(room) if room in order else -1

    return [
        f"{module} imports {target}"
        for module, targets in sorted(graph.items())
        for target in sorted(targets)
        if -1 < height(module) < height(target)
    ]


def test_no_module_imports_in_a_circle():
    assert circle(imports(PACKAGE)) == []


def test_each_room_imports_only_from_rooms_below_it():
    graph = imports(PACKAGE)
    assert {module.split(".")[1] for module in graph if "." in module} >= set(ORDER)
    assert upward(graph, ORDER) == []


def test_the_imports_of_the_package_are_seen():
    """So that the two above do not hold for want of a graph."""
    graph = imports(PACKAGE)
    assert "mtprune.methods" in graph["mtprune.pruner"]
    assert sum(map(len, graph.values())) > len(graph) > 50


@pytest.fixture
def toy(tmp_path):
    def write(**files: str) -> Path:
        package = tmp_path / "toy"
        for name, text in {"__init__": "", **files}.items():
            path = package / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return package

    return write


def test_a_circle_is_found_and_named(toy):
    package = toy(
        a="from toy import b",
        b="try:\n    import toy.c\nexcept ImportError:\n    pass",
        c="import torch\nif torch:\n    from toy.a import x",
    )
    assert circle(imports(package)) == ["toy.a", "toy.b", "toy.c", "toy.a"]


def test_what_is_imported_later_or_for_types_is_no_circle(toy):
    package = toy(
        a="from toy.b import y",
        b="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy.a import x",
        c="def f():\n    from toy.c import f",
    )
    assert circle(imports(package)) == []
    assert imports(package)["toy.a"] == {"toy.b"}


def test_a_package_is_loaded_with_its_modules(toy):
    """Whoever imports from a folder runs that folder's own file first."""
    package = toy(
        a="from toy.low.one import x", low__in____init__="from toy import a", low__in__one=""
    )
    assert circle(imports(package)) == ["toy.a", "toy.low", "toy.a"]


def test_what_leads_upwards_is_named(toy):
    package = toy(
        low__in__one="import toy.high.two\nimport toy.beside",
        high__in__two="",
        beside="import toy.high.two",
    )
    assert upward(imports(package), ("low", "high")) == ["toy.low.one imports toy.high.two"]
    assert upward(imports(package), ("high", "low")) == []
    assert upward(imports(package), ("low", "beside", "high")) == [
        "toy.beside imports toy.high.two",
        "toy.low.one imports toy.beside",
        "toy.low.one imports toy.high.two",
    ]
