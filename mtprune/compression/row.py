"""Rows: the forms that a layer was timed in, the one it takes, and a table of them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from mtprune.compression.forms import CHOICES
from mtprune.reading import Entry
from mtprune.text import columns

__all__ = ["LARGEST", "Measured", "Row", "milliseconds", "shape_in", "table", "time_in"]

LARGEST = 1 << 40
"""The largest size that a tensor is believed to have."""


@dataclass(frozen=True)
class Measured:
    """The cost of one form of one layer.

    Attributes:
        choice: The form.
        ms: Milliseconds for all calls of the layer on the example inputs; None if not timed.
        bytes: The bytes that the form stores.
    """

    choice: str
    ms: float | None
    bytes: int


@dataclass(frozen=True)
class Row:
    """One layer of a plan.

    Attributes:
        layer: The layer's name.
        shape: The shape of its weight.
        choice: The form that the layer takes.
        measured: The cost of each of its forms, ``"dense"`` first.
        note: Why the layer had no choice, if it had none.
    """

    layer: str
    shape: tuple[int, ...]
    choice: str
    measured: tuple[Measured, ...]
    note: str = ""

    @property
    def dense(self) -> Measured:
        """The cost of the dense form."""
        return self.measured[0]

    @property
    def chosen(self) -> Measured | None:
        """The cost of the chosen form; None if it was chosen by hand and never measured."""
        return next((m for m in self.measured if m.choice == self.choice), None)

    @classmethod
    def read(cls, entry: Entry) -> "Row":
        """From plain data, as JSON holds it.

        Raises:
            ValueError: If it is not that of a row.
        """
        parts = entry.fields(["layer", "shape", "choice", "measured"], optional=["note"])
        measured = []
        for part in parts["measured"].items():
            cost = part.fields(["choice", "ms", "bytes"])
            ms, size = time_in(cost["ms"]), cost["bytes"].whole()
            measured.append(Measured(cost["choice"].text(CHOICES), ms, size))
        return cls(
            parts["layer"].text(),
            shape_in(parts["shape"]),
            parts["choice"].text(CHOICES),
            tuple(measured),
            parts["note"].text() if "note" in parts else "",
        )


def table(rows: Iterable[Row]) -> list[str]:
    """The lines of a table, with the note of each row at its end."""
    rows = _folded(rows)
    head = ("layer", "shape", "choice", "dense ms", "chosen ms", "dense bytes", "bytes")
    lines = columns([head, *(_cells(row) for row in rows)], left=3)
    notes = ["", *(row.note for row in rows)]
    return [f"{line}  {note}".rstrip() for line, note in zip(lines, notes, strict=True)]


def _folded(rows: Iterable[Row]) -> list[Row]:
    """The rows, those of experts that follow each other and are alike as one, with their sums."""
    found: list[tuple[Any, list[Row]]] = []
    for row in rows:
        stack, _, number = row.layer.rpartition(".")
        folds = number.isdigit() and stack.endswith((".ups", ".downs"))
        key = (stack if folds else row.layer, row.shape, row.choice, row.note)
        if not found or found[-1][0] != key:
            found.append((key, []))
        found[-1][1].append(row)
    return [_sum(alike) if len(alike) > 1 else alike[0] for _, alike in found]


def _sum(rows: list[Row]) -> Row:
    first, last = rows[0], rows[-1].layer.rpartition(".")[2]
    measured = [_added("dense", [row.dense for row in rows])]
    chosen = [row.chosen for row in rows if row.chosen is not None]
    if first.choice != "dense" and len(chosen) == len(rows):
        measured.append(_added(first.choice, chosen))
    return replace(first, layer=f"{first.layer}-{last}", measured=tuple(measured))


def _added(choice: str, costs: list[Measured]) -> Measured:
    times = [cost.ms for cost in costs if cost.ms is not None]
    ms = sum(times) if len(times) == len(costs) else None
    return Measured(choice, ms, sum(cost.bytes for cost in costs))


def shape_in(entry: Entry) -> tuple[int, ...]:
    """The shape that an entry holds."""
    return tuple(size.whole(most=LARGEST) for size in entry.items())


def time_in(entry: Entry) -> float | None:
    """The milliseconds that an entry holds, or None."""
    return entry.optional(lambda value: value.number(least=0.0))


def _cells(row: Row) -> tuple[str, ...]:
    chosen = row.chosen
    return (
        row.layer,
        "x".join(str(size) for size in row.shape),
        row.choice,
        milliseconds(row.dense.ms),
        milliseconds(None if chosen is None else chosen.ms),
        f"{row.dense.bytes:,}",
        "-" if chosen is None else f"{chosen.bytes:,}",
    )


def milliseconds(value: float | None) -> str:
    """A time as tables print it."""
    return "-" if value is None else f"{value:.2f}"
