"""The API reference: which names are public, and a page of each module that has some."""

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias
from typing import Any

import mtprune

ROOT = Path(mtprune.__file__).parent
# What architecture.md calls "what all of these use", and the folders that nobody imports from.
INTERNAL = {
    *("bits", "census", "checkpoint", "checks", "distributed", "facts", "files"),
    *("progress", "reading", "results", "text", "trials"),
    *("model", "observing", "showing", "__main__"),
}
# Folders are read from their __init__; these have public modules inside.
INSIDE = (
    "compression.forms",
    *(f"integrations.{name}" for name in ("dcp", "hub", "lightning", "peft", "transformers")),
)


@dataclass(frozen=True)
class Name:
    """A public object, under the shortest name it can be imported by."""

    path: str
    value: Any

    @property
    def kind(self) -> str:
        """The directive that documents it."""
        if isinstance(self.value, GenericAlias):  # which Python 3.10 takes for a class
            return "data"
        if inspect.isclass(self.value):
            return "autoexception" if issubclass(self.value, BaseException) else "autoclass"
        return "autofunction" if inspect.isroutine(self.value) else "data"

    @property
    def doc(self) -> str:
        """Its docstring; of a value or a type, the string below its assignment."""
        if self.kind != "data":
            return inspect.getdoc(self.value) or ""
        module, _, name = self.path.rpartition(".")
        return doc_of_value(module, name)

    def directive(self) -> list[str]:
        """What documents it, in reStructuredText."""
        if self.kind == "data":
            module, _, name = self.path.rpartition(".")
            doc = [f"   {line}" for line in self.doc.split("\n")]
            return [f".. py:data:: {name}", f"   :module: {module}", "", *doc]
        options = ["   :members:"] * (self.kind == "autoclass")
        bases = getattr(self.value, "__bases__", (object,))
        if any(base.__name__.startswith("_") for base in bases):
            options.append("   :inherited-members:")  # it is the only place for them
        elif bases != (object,):
            options.append("   :show-inheritance:")
        return [f".. {self.kind}:: {self.path}", *options]


@dataclass(frozen=True)
class Page:
    """A public module with its names."""

    module: str
    names: tuple[Name, ...]

    @property
    def file(self) -> str:
        """Its file in the reference."""
        return self.module.removeprefix("mtprune.").replace(".", "-") + ".rst"

    @property
    def title(self) -> str:
        """The module's name, as in an import."""
        return self.module

    @property
    def summary(self) -> str:
        """The first sentence of the module's docstring."""
        doc = inspect.getdoc(importlib.import_module(self.module)) or ""
        return doc.split("\n\n")[0].replace("\n", " ")

    def text(self) -> str:
        """The page, in reStructuredText."""
        lines = [f"``{self.title}``", "=" * (len(self.title) + 4), ""]
        lines += [f".. automodule:: {self.module}", "   :no-members:", ""]
        for name in self.names:
            lines += [*name.directive(), ""]
        return "\n".join(lines)


def modules() -> Iterator[str]:
    """Every module that users import from, in the order of their names."""
    found = {path.stem for path in ROOT.glob("*.py")}
    found |= {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for name in sorted({*found, *INSIDE} - INTERNAL - {"__init__"}):
        yield f"mtprune.{name}"


def members(module: str) -> dict[str, Any]:
    """What a module offers: its ``__all__``, or the public names that are defined in it."""
    loaded = importlib.import_module(module)
    listed = getattr(loaded, "__all__", None)
    if listed is None:
        listed = [
            name
            for name, value in vars(loaded).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module
        ]
    values = {name: getattr(loaded, name) for name in listed}
    return {name: value for name, value in values.items() if not inspect.ismodule(value)}


def doc_of_value(module: str, name: str) -> str:
    """The string below the assignment of a value, where it is assigned."""
    importlib.import_module(module)
    body = ast.parse(inspect.getsource(sys.modules[module])).body
    for statement, below in zip(body, [*body[1:], ast.Pass()], strict=True):
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            is_doc = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            return inspect.cleandoc(below.value.value) if is_doc else ""
    for statement in ast.walk(ast.Module(body, [])):  # those for types, too
        names = statement.names if isinstance(statement, ast.ImportFrom) else []
        if any(name == (alias.asname or alias.name) for alias in names):
            return doc_of_value(str(statement.module), name)
    return ""


def pages() -> list[Page]:
    """The reference. An object is documented once: where its own module is, if that is public."""
    top = members("mtprune")
    found: dict[str, dict[str, Name]] = {}
    seen: set[object] = set()
    public = list(modules())
    for module in sorted(public, key=lambda name: -name.count(".")):
        for name, value in members(module).items():
            path = f"{'mtprune' if top.get(name) is value else module}.{name}"
            home = getattr(value, "__module__", None)
            elsewhere = home != module and home in public and name in members(home)
            made = inspect.isclass(value) or inspect.isroutine(value)
            identity = id(value) if made else path
            if elsewhere or identity in seen:
                continue
            seen.add(identity)
            found.setdefault(module, {})[name] = Name(path, value)
    return [Page(module, tuple(found[module].values())) for module in public if module in found]


def contents() -> str:
    """The first page of the reference: the modules, with what each is about."""
    lines = ["Reference", "=========", ""]
    lines += ["Every public name, from the docstrings. Names without a module before them, such as"]
    lines += [
        "`Vote`, are imported from `mtprune` itself.",
        "",
        ".. list-table::",
        "   :widths: 1 3",
        "",
    ]
    for page in pages():
        lines += [f"   * - :doc:`{page.module} <{page.file.removesuffix('.rst')}>`"]
        lines += [f"     - {page.summary}"]
    lines += ["", ".. toctree::", "   :hidden:", ""]
    lines += [f"   {page.file.removesuffix('.rst')}" for page in pages()]
    return "\n".join(lines) + "\n"


def public_names() -> set[str]:
    """Every name that the reference must have."""
    return {name.path for page in pages() for name in page.names}
