"""Import hook: call a function as soon as a module is imported, without importing it.

transformers must know the format of compressed models before ``from_pretrained`` reads one, and
``import mtprune`` must not import transformers, which takes seconds. So ``import mtprune`` puts a
finder at the front of `sys.meta_path`. It waits for one module,
``transformers.quantizers.auto``, which keeps the list of formats. The other finders load that
module as ever; after its first import `mtprune.integrations.pretrained` registers the format, and
the finder removes itself. If transformers is never imported, the finder does nothing.

``import mtprune.integrations.transformers`` imports transformers and registers the format at once.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["when_imported"]


class _Finder(MetaPathFinder):
    """Lets the other finders find one module, and calls a function after its first import."""

    def __init__(self, name: str, function: Callable[[], object]) -> None:
        self._name = name
        self._function = function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            exec_module = spec.loader.exec_module

            def exec_and_call(module: ModuleType) -> None:
                exec_module(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self._function()

            spec.loader.exec_module = exec_and_call  # type: ignore[method-assign]
        return spec


def when_imported(name: str, function: Callable[[], object]) -> None:
    """Call a function now if a module is imported already, or else after its first import.

    Example:
        >>> when_imported("sys", lambda: print("sys is imported"))
        sys is imported
        >>> when_imported("never.imported", lambda: print("never printed"))
        >>> _ = sys.meta_path.pop(0)
    """
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Finder(name, function))
