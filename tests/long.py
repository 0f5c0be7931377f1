"""What the long run alone tries: `python -m pytest -n 2 -m ""`, before a release.

Most of it are more parameters of a test, or more of the same kind of trouble.
"""

from collections.abc import Iterable
from typing import Any

import pytest

LONG = (pytest.mark.slow, pytest.mark.long)


def few(values: Iterable[Any], *named: Any) -> list[Any]:
    """Parameters of which every run tries some, and the long run all.

    Args:
        values: The parameters.
        named: Those of every run; the first unless given.
    """
    values = list(values)
    named = named or (values[0],)
    for value in named:
        assert value in values, f"{value!r} is none of the parameters."
    return [value if value in named else _marked(value) for value in values]


def _marked(value: Any) -> Any:
    together = isinstance(value, tuple)
    return pytest.param(*value, marks=LONG) if together else pytest.param(value, marks=LONG)
