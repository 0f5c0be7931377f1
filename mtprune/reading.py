"""Reading: what comes from a file is looked at entry by entry, before any of it is used.

An `Entry` is one value and where it stood. It gives its value only as what the reader expects, and
otherwise raises one kind of error, which names file, entry, what came and what to do. Whoever reads
something makes new objects from entries, and assigns them when all is read.
"""

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mtprune import checks

__all__ = ["Entry"]

T = TypeVar("T")

_MOST = (1 << 63) - 1
_LARGEST = sys.float_info.max
_DEEPEST = 32  # containers in containers: what refers to itself has no end


class Entry:
    """One value of something that was read.

    Args:
        value: The value.
        source: What was read, as the subject of a sentence: ``"This checkpoint"``.
        advice: What to do if it is wrong.
        path: The keys that lead to the value.

    Example:
        >>> checkpoint = Entry({"step": -3}, "The state", "Take another.")
        >>> checkpoint["step"].whole()
        Traceback (most recent call last):
        ValueError: The state: 'step' must be a whole number, at least 0. Got -3. Take another.
    """

    def __init__(self, value: object, source: str, advice: str, path: tuple[str, ...] = ()) -> None:
        self.value = value
        self._source = source
        self._advice = advice
        self._path = path

    def wrong(self, must: str) -> ValueError:
        """The error for a value that is not what it must be.

        Args:
            must: The rule, as the end of a sentence: ``"must be a list"``.
        """
        path = self._path if len(self._path) < 9 else (*self._path[:7], "…")
        subject = f"'{'.'.join(map(_short, path))}'" if path else "it"
        return ValueError(
            f"{self._source}: {subject} {must}. Got {_shown(self.value)}. {self._advice}"
        )

    def __getitem__(self, key: str) -> "Entry":
        """The entry of a mapping under a key.

        Raises:
            ValueError: If there is none.
        """
        if not isinstance(self.value, Mapping) or key not in self.value:
            raise self.wrong(f"must be a mapping that has '{key}'")
        return self._part(key, self.value[key])

    def fields(self, names: Collection[str], optional: Collection[str] = ()) -> dict[str, "Entry"]:
        """The entries of a mapping with exactly these keys.

        Args:
            names: The keys.
            optional: Further keys that it may have.
        """
        entries = self.mapping()
        missing, extra = set(names) - set(entries), set(entries) - set(names) - set(optional)
        if missing or extra:
            lacks = f" {_few(sorted(missing))} besides" if missing else ""
            has = f" none of {_few(sorted(extra))}" if extra else ""
            raise self.wrong("must have" + " and".join(part for part in (lacks, has) if part))
        return entries

    def mapping(self, among: Collection[str] | None = None) -> dict[str, "Entry"]:
        """The entries of a mapping whose keys are strings.

        Args:
            among: The keys that it may have; None for any.
        """
        if not isinstance(self.value, Mapping) or not all(type(k) is str for k in self.value):
            raise self.wrong("must be a mapping with strings for keys")
        unknown = [] if among is None else [key for key in self.value if key not in among]
        if unknown:
            raise self.wrong(f"must have keys among {_few(list(among or ()))}, not {_few(unknown)}")
        return {key: self._part(key, value) for key, value in self.value.items()}

    def numbered(self) -> dict[int, "Entry"]:
        """The entries of a mapping whose keys are whole numbers, at least 0."""
        value = self.value
        if not isinstance(value, Mapping) or not all(
            checks.is_whole(key) and 0 <= key <= _MOST for key in value
        ):
            raise self.wrong("must be a mapping with whole numbers for keys")
        return {key: self._part(str(key), part) for key, part in value.items()}

    def plain(self) -> Any:
        """Containers of strings, numbers, True, False, None and dense tensors, whatever they say.

        Containers are new ones, and tensors copies.
        """
        value = self.value
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            return self.tensor(finite=False).clone()
        if isinstance(value, Mapping) and all(isinstance(key, (int, str)) for key in value):
            return {key: self._part(str(key), part).plain() for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(entry.plain() for entry in self.items())
        raise self.wrong("must be made of containers, tensors, numbers and strings")

    def items(self, length: int | None = None) -> list["Entry"]:
        """The entries of a list or tuple.

        Args:
            length: How many there must be; None for any number.
        """
        value = self.value
        if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
            raise self.wrong("must be a list" + ("" if length is None else f" of {length}"))
        return [self._part(str(place), part) for place, part in enumerate(value)]

    def optional(self, read: Callable[["Entry"], T]) -> T | None:
        """The value as `read` gives it, or None if it is None."""
        return None if self.value is None else read(self)

    def whole(self, least: int = 0, most: int = _MOST) -> int:
        """A whole number within bounds."""
        value = self.value
        if not isinstance(value, int) or not checks.is_whole(value) or not least <= value <= most:
            bounds = f"at least {least}" if most == _MOST else f"from {least} to {most}"
            raise self.wrong(f"must be a whole number, {bounds}")
        return int(value)

    def number(self, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number within bounds."""
        value = self.value
        # Compared and not converted, because a whole number may be too large for a float.
        inside = (
            isinstance(value, (int, float))
            and checks.is_number(value)
            and max(least, -_LARGEST) <= value <= min(most, _LARGEST)
        )
        if not inside:
            free = (least, most) == (-math.inf, math.inf)
            raise self.wrong(
                "must be a finite number" + ("" if free else f" in [{least:g}, {most:g}]")
            )
        assert isinstance(value, (int, float))
        return float(value)

    def flag(self) -> bool:
        """True or False."""
        if not isinstance(self.value, bool):
            raise self.wrong("must be True or False")
        return self.value

    def text(self, among: Collection[str] | None = None) -> str:
        """A string.

        Args:
            among: What it may be; None for anything.
        """
        if not isinstance(self.value, str):
            raise self.wrong("must be a string")
        if among is not None and self.value not in among:
            raise self.wrong(f"must be one of {_few(list(among))}")
        return self.value

    def tensor(
        self,
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | Collection[torch.dtype] | None = None,
        *,
        finite: bool = True,
    ) -> Tensor:
        """A dense tensor.

        Args:
            shape: Its shape; None for any.
            dtype: Its type, or the types it may have; None for any.
            finite: Whether its numbers must be.
        """
        value = self.value
        kinds = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        if not (
            isinstance(value, Tensor)
            and value.layout == torch.strided
            and not value.is_meta
            # Strides of 0 could claim any size, and a copy would need it.
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
            and shape in (None, tuple(value.shape))
            and (kinds is None or value.dtype in kinds)
        ):
            names = "" if kinds is None else " or ".join(_type(kind) for kind in kinds) + " "
            of = "" if shape is None else f" of shape {shape}"
            raise self.wrong(f"must be a dense {names}tensor{of}")
        if finite and value.is_floating_point() and not bool(value.isfinite().all()):
            raise self.wrong("must be finite in every entry")
        return value

    def size(self) -> int:
        """The length of a tensor's one dimension."""
        value = self.value
        if not isinstance(value, Tensor) or value.dim() != 1:
            raise self.wrong("must be a tensor of one dimension")
        return len(value)

    def _part(self, key: str, value: object) -> "Entry":
        if len(self._path) == _DEEPEST:
            raise self.wrong(f"must not lie deeper than in {_DEEPEST} containers")
        return Entry(value, self._source, self._advice, (*self._path, key))


def _shown(value: object) -> str:
    """A value in a few words, however large it is."""
    if isinstance(value, Tensor):
        inner = f"{_type(value.dtype)} tensor of shape {tuple(value.shape)}"
        return f"a {inner}" if value.layout == torch.strided else f"a sparse {inner}"
    if isinstance(value, Mapping):
        return f"a mapping with {_few([str(key) for key in value])}"
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 256:  # writing it out may take minutes
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:100]}… ({type(value).__name__})"


def _few(names: Sequence[str]) -> str:
    """The first of many names."""
    short = [_short(name) for name in names[:6]]
    return f"{short}" if len(names) <= 6 else f"{short} and {len(names) - 6} more"


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:60]}…"


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
