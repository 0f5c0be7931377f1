"""Cuts: what stays of a model when units are removed, as values that are JSON."""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from mtprune.compression.row import LARGEST, shape_in
from mtprune.reading import Entry

__all__ = ["Cut", "Removal", "Taken"]


@dataclass(frozen=True)
class Cut:
    """The part of one tensor that stays when units are removed.

    Attributes:
        tensor: The name of the parameter or buffer.
        shape: Its shape before.
        kept: For each dimension the indices that stay, or None if all do.

    Example:
        >>> cut = Cut("conv.weight", (4, 2, 3, 3), ((0, 3), None, None, None))
        >>> cut.after
        (2, 2, 3, 3)
    """

    tensor: str
    shape: tuple[int, ...]
    kept: tuple[tuple[int, ...] | None, ...]

    @property
    def after(self) -> tuple[int, ...]:
        """The shape after removal."""
        sizes = zip(self.shape, self.kept, strict=True)
        return tuple(size if kept is None else len(kept) for size, kept in sizes)

    @classmethod
    def read(cls, entry: Entry) -> "Cut":
        """From plain data, as JSON holds it.

        Raises:
            ValueError: If it is not that of a cut.
        """
        cut = entry.fields(["tensor", "shape", "kept"])
        shape = shape_in(cut["shape"])
        kept = [
            None if bits.value is None else _indices(bits, size)
            for bits, size in zip(cut["kept"].items(len(shape)), shape, strict=True)
        ]
        return cls(cut["tensor"].text(), shape, tuple(kept))


@dataclass(frozen=True)
class Taken:
    """The part of an argument that a module takes when units are removed.

    Attributes:
        module: The name of the module.
        argument: The name of the argument of its ``forward``.
        dim: The dimension along which the units lie.
        size: How many entries there are, again and again along the dimension.
        kept: The entries that the module takes.
    """

    module: str
    argument: str
    dim: int
    size: int
    kept: tuple[int, ...]

    @classmethod
    def read(cls, entry: Entry) -> "Taken":
        """From plain data, as JSON holds it.

        Raises:
            ValueError: If it is not that of a part of an argument.
        """
        parts = entry.fields(["module", "argument", "dim", "size", "kept"])
        size = parts["size"].whole(least=1, most=LARGEST)
        kept = _indices(parts["kept"], size)
        dim = parts["dim"].whole(most=63)
        return cls(parts["module"].text(), parts["argument"].text(), dim, size, kept)


@dataclass(frozen=True)
class Removal:
    """The removed units, as the part that stays of every tensor which held entries of them.

    Attributes:
        cuts: One for each tensor that got smaller.
        counts: Attributes of modules that count units, ``"attention.num_heads"`` for instance, and
            their new values.
        taken: One for each argument of which modules take a part.
    """

    cuts: tuple[Cut, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()
    taken: tuple[Taken, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything was removed."""
        return bool(self.cuts)

    def __getitem__(self, tensor: str) -> Cut | None:
        """The cut of a tensor; None if all of the tensor stays."""
        return next((cut for cut in self.cuts if cut.tensor == tensor), None)

    def renamed(self, rename: Callable[[str], str]) -> "Removal":
        """The removal with other names, without entries whose name is then empty."""
        cuts = (replace(cut, tensor=rename(cut.tensor)) for cut in self.cuts)
        counts = ((rename(path), count) for path, count in self.counts)
        # The module may be the whole model, so that its own name is empty.
        paths = ((part, rename(_dotted(part))) for part in self.taken)
        return Removal(
            tuple(cut for cut in cuts if cut.tensor),
            tuple(count for count in counts if count[0]),
            tuple(replace(p, module=path.rpartition(".")[0]) for p, path in paths if path),
        )

    def to_dict(self) -> dict[str, Any]:
        """The removal as plain data; kept indices are the bits of a number."""
        data = asdict(self)
        for cut in data["cuts"]:
            cut["kept"] = [None if kept is None else _bits(kept) for kept in cut["kept"]]
        for part in data["taken"]:
            part["kept"] = _bits(part["kept"])
        if not self.taken:  # so that versions that know of none read it
            del data["taken"]
        return data

    @classmethod
    def read(cls, entry: Entry) -> "Removal":
        """From plain data, as JSON holds it.

        Raises:
            ValueError: If it is not that of a removal.
        """
        removal = entry.fields(["cuts", "counts"], optional=["taken"])
        counts = [pair.items(2) for pair in removal["counts"].items()]
        taken = removal["taken"].items() if "taken" in removal else []
        return cls(
            tuple(Cut.read(part) for part in removal["cuts"].items()),
            tuple((name.text(), count.whole()) for name, count in counts),
            tuple(Taken.read(part) for part in taken),
        )


def _dotted(part: Taken) -> str:
    return f"{part.module}.{part.argument}" if part.module else part.argument


def _bits(indices: Iterable[int]) -> str:
    """The hexadecimal number whose set bits are these indices."""
    return hex(sum(1 << index for index in indices))


def _indices(entry: Entry, size: int) -> tuple[int, ...]:
    """The indices of the set bits of a hexadecimal number, all below ``size``."""
    digits = entry.text()
    # Looked at before it is made a number: that takes time in the square of a length.
    plain = re.fullmatch(r"0x[0-9a-f]+", digits) and len(digits) <= 3 + size // 4
    bits = format(int(digits, 16), "b")[::-1] if plain else ""
    if not plain or len(bits) > max(1, size):
        raise entry.wrong(f"must be a hexadecimal number of at most {size} bits")
    return tuple(index for index, bit in enumerate(bits) if bit == "1")
