"""The package: what it shows, and which of its files import which."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import mtprune

ROOT = Path(mtprune.__file__).parent


def test_dir_shows_the_api_and_nothing_else():
    assert dir(mtprune) == sorted([*mtprune.__all__, "__version__"])
    assert all(hasattr(mtprune, name) for name in dir(mtprune))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported(path: Path, modules: set[str]) -> set[str]:
    """The modules of the package that a file imports when it is imported itself."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            names |= submodules or {node.module}
    return names & modules


def test_no_file_imports_itself_by_way_of_others():
    files = {module_name(path): path for path in ROOT.rglob("*.py")}
    graph = {name: imported(path, set(files)) for name, path in files.items()}
    assert "mtprune.bits" in graph["mtprune.holding.base"]
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(files)
