"""Arrival: something to do when a package is imported, if it ever is, and nothing before.

`import mtprune` must not import transformers, which takes seconds, and yet transformers must know
mtprune by the time it loads a model. So the import of the one module that keeps the list of such
plug-ins is waited for.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["when_imported"]


class _Watch(MetaPathFinder):
    """Finds one module as the others would, and sees to it that something follows its import."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self._name = name
        self._then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def and_then(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self._then()

            spec.loader.exec_module = and_then  # type: ignore[method-assign]
        return spec


def when_imported(name: str, then: Callable[[], object]) -> None:
    """Call a function as soon as a module has been imported: now, or when somebody imports it.

    Example:
        >>> when_imported("sys", lambda: print("here"))
        here
        >>> when_imported("never.imported", lambda: print("there"))
        >>> _ = sys.meta_path.pop(0)
    """
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Watch(name, then))
