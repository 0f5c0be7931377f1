"""Plan: the form that every layer takes, as a value that prints, can be edited, and is JSON."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from mtprune import checks
from mtprune.compression.cuts import Cut, Removal, Taken
from mtprune.compression.extract import Subnetwork
from mtprune.compression.forms import CHOICES
from mtprune.compression.measure import Sizes
from mtprune.compression.row import Measured, Row, milliseconds, table, time_in
from mtprune.reading import Entry

__all__ = ["Cut", "Joined", "Measured", "Plan", "Removal", "Row", "Taken", "joined", "seen_from"]


@dataclass(frozen=True)
class Joined:
    """An encoder layer whose parts run as one block of native code.

    Attributes:
        layer: The layer's name.
        apart_ms: Milliseconds for all its calls on the example inputs, part by part; None if not
            timed.
        ms: The same as one block.
    """

    layer: str
    apart_ms: float | None = None
    ms: float | None = None

    @classmethod
    def read(cls, entry: Entry) -> "Joined":
        """From plain data, as JSON holds it.

        Raises:
            ValueError: If it is not that of a block.
        """
        parts = entry.fields(["layer", "apart_ms", "ms"])
        apart, together = (time_in(parts[name]) for name in ("apart_ms", "ms"))
        return cls(parts["layer"].text(), apart, together)

    def __str__(self) -> str:
        """A line of the plan."""
        times = (
            f": {milliseconds(self.apart_ms)} ms part by part, {milliseconds(self.ms)} ms as one"
        )
        return f"block: {self.layer}{'' if self.ms is None else times}"


@dataclass(frozen=True)
class Plan:
    """The form that every prunable layer takes, and the units removed before.

    Attributes:
        rows: One for each prunable layer, in the order of the model's modules.
        device: The device that forms were timed on.
        threads: The number of threads that torch used.
        dense_ms: Milliseconds of the whole model as it was; None if not timed.
        ms: Milliseconds of the whole compressed model; None if not timed.
        note: A sentence on the whole plan.
        removal: The units removed before. Shapes of rows are those after removal.
        subnetwork: The part of the model that was taken before that, if it was for some tasks only.
        sizes: The sizes of the compressed model against the dense one; None if not counted.
        stayed: A sentence for each group of units of which some stay though they are pruned.
        blocks: The encoder layers that run as one block each.

    Example:
        >>> plan = Plan((Row("lin", (4, 8), "csr", (Measured("dense", 2.0, 128),
        ...                                         Measured("csr", 0.5, 60))),))
        >>> print(plan)
        layer  shape  choice  dense ms  chosen ms  dense bytes  bytes
        lin    4x8    csr         2.00       0.50          128     60
        >>> print(plan.replace("lin", "dense"))
        layer  shape  choice  dense ms  chosen ms  dense bytes  bytes
        lin    4x8    dense       2.00       2.00          128    128
        >>> Plan.from_dict(plan.to_dict()) == plan
        True
    """

    rows: tuple[Row, ...]
    device: str = "cpu"
    threads: int = 1
    dense_ms: float | None = None
    ms: float | None = None
    note: str = ""
    removal: Removal = field(default_factory=Removal)
    subnetwork: Subnetwork | None = None
    sizes: Sizes | None = None
    stayed: tuple[str, ...] = ()
    blocks: tuple[Joined, ...] = ()

    def __getitem__(self, layer: str) -> Row:
        """The row of a layer."""
        row = self._by_layer.get(layer)
        if row is None:
            names = [r.layer for r in self.rows]
            raise KeyError(f"The plan has no layer {layer!r}. It has {names}.")
        return row

    @cached_property
    def _by_layer(self) -> dict[str, Row]:
        """The rows by layer: experts make thousands of them."""
        return {row.layer: row for row in self.rows}

    def replace(self, layer: str, choice: str) -> "Plan":
        """The plan with another form for one layer, or for all with the layer ``"*"``.

        ``"dense"`` for the name of a block lets its parts run one by one, for ``"*"`` those of all.
        Times and sizes of the whole model are dropped, because they no longer hold.

        Raises:
            KeyError: If the plan has no such layer.
            ValueError: If no form has that name.
        """
        checks.one_of("choice", choice, CHOICES)
        blocks = self.blocks
        if choice == "dense":
            blocks = tuple(block for block in blocks if layer not in ("*", block.layer))
        if layer != "*" and blocks == self.blocks:
            self[layer]
        rows = tuple(
            replace(row, choice=choice) if layer in ("*", row.layer) else row for row in self.rows
        )
        return replace(self, rows=rows, blocks=blocks, dense_ms=None, ms=None, sizes=None)

    def part(self, module: str) -> "Plan":
        """The plan of one module, with names as seen from the module.

        Example:
            >>> plan = Plan((Row("encoder.up", (4, 8), "csr", ()), Row("head", (2, 4), "csr", ())))
            >>> [row.layer for row in plan.part("encoder").rows]
            ['up']
            >>> plan.part("encoder").under("bert").rows[0].layer
            'bert.up'
        """
        return self._renamed(lambda name: seen_from(module, name)) if module else self

    def under(self, module: str) -> "Plan":
        """The plan of a larger model, in which the plan's model is the module of that name."""
        return self._renamed(lambda name: joined(module, name)) if module else self

    def _renamed(self, rename: Callable[[str], str]) -> "Plan":
        """The plan with other names, without entries whose name is then empty.

        Times, sizes and notes of the whole model no longer hold and are dropped.
        """
        rows = (replace(row, layer=rename(row.layer)) for row in self.rows)
        removal = self.removal.renamed(rename)
        named_rows = tuple(row for row in rows if row.layer)
        blocks = (replace(block, layer=rename(block.layer)) for block in self.blocks)
        named_blocks = tuple(block for block in blocks if block.layer)
        return Plan(named_rows, self.device, self.threads, removal=removal, blocks=named_blocks)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data that JSON can hold; kept indices are the bits of a number."""
        return {**asdict(self), "removal": self.removal.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """The plan from the data that `to_dict` returned.

        Raises:
            ValueError: If the data is not that of a plan.
        """
        source = "This is not a plan as Plan.to_dict() gives it"
        return cls.read(Entry(data, source, "Take it unchanged, or edit it with Plan.replace()."))

    @classmethod
    def read(cls, entry: Entry) -> "Plan":
        """The plan from an entry of a file.

        Raises:
            ValueError: If it is not that of a plan.
        """
        names = [field.name for field in fields(cls)]
        parts = entry.fields(["rows"], optional=names)
        found: dict[str, Any] = {
            name: read(parts[name]) for name, read in _READERS.items() if name in parts
        }
        plan = cls(rows=tuple(Row.read(row) for row in parts["rows"].items()), **found)
        layers = [row.layer for row in plan.rows]
        if len(set(layers)) < len(layers):
            raise parts["rows"].wrong("must have one row for each layer")
        return plan

    def __str__(self) -> str:
        """A table of the layers, and lines on the whole model."""
        lines = [*table(self.rows), *map(str, self.blocks)]
        if self.dense_ms is not None and self.ms is not None:
            lines.append(
                f"whole model: {self.dense_ms:.2f} ms dense, {self.ms:.2f} ms compressed "
                f"({self.device}, threads: {self.threads})"
            )
        lines += [_sentence(cut) for cut in self.removal.cuts if len(cut.shape) > 1]
        lines += self.stayed
        if self.sizes is not None and self.sizes.against is not None:
            lines.append(f"whole model: {self.sizes.sentence}")
        if self.subnetwork is not None:
            lines.append(str(self.subnetwork))
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


_READERS: Mapping[str, Callable[[Entry], Any]] = {
    "device": Entry.text,
    "threads": lambda entry: entry.whole(least=1),
    "dense_ms": time_in,
    "ms": time_in,
    "note": Entry.text,
    "removal": Removal.read,
    "subnetwork": lambda entry: entry.optional(Subnetwork.read),
    "sizes": lambda entry: entry.optional(Sizes.read),
    "stayed": lambda entry: tuple(line.text() for line in entry.items()),
    "blocks": lambda entry: tuple(Joined.read(block) for block in entry.items()),
}
"""How the entries of a plan are read; those that are not there have their defaults."""


def seen_from(module: str, name: str) -> str:
    """A name as seen from a module; empty if it names nothing in the module.

    Example:
        >>> seen_from("encoder", "encoder.up.weight"), seen_from("encoder", "encoders.up")
        ('up.weight', '')
        >>> seen_from("", "up")
        'up'
    """
    if not module:
        return name
    return name.removeprefix(f"{module}.") if name.startswith(f"{module}.") else ""


def joined(module: str, name: str) -> str:
    """A name in a module as seen from the whole model."""
    return f"{module}.{name}" if module and name else name


def _sentence(cut: Cut) -> str:
    before, after = ("x".join(str(size) for size in shape) for shape in (cut.shape, cut.after))
    return f"removed: {cut.tensor.removesuffix('.weight')} {before} -> {after}"
