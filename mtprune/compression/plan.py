"""Plans: which form every layer takes, as a value that prints, can be edited, and is JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["CHOICES", "Measured", "Plan", "Row"]

CHOICES = ("dense", "rows", "thin", "sparse", "csr", "2:4")
"""The forms a layer can take; ``"dense"`` is the layer as it is."""


@dataclass(frozen=True)
class Measured:
    """What one form of one layer costs.

    Attributes:
        choice: The form.
        ms: Milliseconds for all its calls on the example inputs; None if it was not timed.
        bytes: Of what it stores.
    """

    choice: str
    ms: float | None
    bytes: int


@dataclass(frozen=True)
class Row:
    """One layer of a plan.

    Attributes:
        layer: The layer's name.
        shape: Of its weight.
        choice: The form it takes.
        measured: What each of its forms costs, ``"dense"`` first.
        note: Why there was no choice, if there was none.
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
        """The cost of the chosen form; None if it was put there by hand and never measured."""
        return next((m for m in self.measured if m.choice == self.choice), None)


@dataclass(frozen=True)
class Plan:
    """Which form every prunable layer takes.

    Attributes:
        rows: One for each prunable layer, in the order of the model's modules.
        device: Where it was measured.
        threads: How many threads torch used.
        dense_ms: Milliseconds of the whole model as it was; None if it was not timed.
        ms: Milliseconds of the whole compressed model.
        note: What else there is to say.

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

    def __getitem__(self, layer: str) -> Row:
        """The row of a layer."""
        for row in self.rows:
            if row.layer == layer:
                return row
        raise KeyError(f"The plan has no layer {layer!r}. It has {[r.layer for r in self.rows]}.")

    def replace(self, layer: str, choice: str) -> "Plan":
        """The same plan with another form for one layer, or for all with the layer ``"*"``.

        Times of the whole model are dropped, because they no longer hold.

        Raises:
            KeyError: If there is no such layer.
            ValueError: If there is no such form.
        """
        if choice not in CHOICES:
            raise ValueError(f"`choice` must be one of {CHOICES}. Got {choice!r}.")
        if layer != "*":
            self[layer]
        rows = tuple(
            replace(row, choice=choice) if layer in ("*", row.layer) else row for row in self.rows
        )
        return replace(self, rows=rows, dense_ms=None, ms=None)

    def to_dict(self) -> dict[str, Any]:
        """As plain data that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """The plan that `to_dict` was called on.

        Raises:
            ValueError: If this is no plan.
        """
        try:
            rows = tuple(
                Row(
                    **{
                        **row,
                        "shape": tuple(row["shape"]),
                        "measured": tuple(Measured(**m) for m in row["measured"]),
                    }
                )
                for row in data["rows"]
            )
            plan = cls(**{**data, "rows": rows})
        except (KeyError, TypeError) as error:
            raise ValueError(f"This is not a plan as Plan.to_dict() gives it: {error}.") from error
        for row in rows:
            if row.choice not in CHOICES:
                raise ValueError(
                    f"Layer '{row.layer}' has choice {row.choice!r}. It must be one of {CHOICES}."
                )
        return plan

    def __str__(self) -> str:
        """A table, and what was measured of the whole."""
        head = ("layer", "shape", "choice", "dense ms", "chosen ms", "dense bytes", "bytes")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        printed = [
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        notes = [*("", *(row.note for row in self.rows))]
        printed = [f"{line}  {note}".rstrip() for line, note in zip(printed, notes, strict=True)]
        if self.dense_ms is not None and self.ms is not None:
            printed.append(
                f"whole model: {self.dense_ms:.2f} ms dense, {self.ms:.2f} ms compressed "
                f"({self.device}, threads: {self.threads})"
            )
        if self.note:
            printed.append(self.note)
        return "\n".join(printed)


def _cells(row: Row) -> tuple[str, ...]:
    chosen = row.chosen
    return (
        row.layer,
        "x".join(str(size) for size in row.shape),
        row.choice,
        _ms(row.dense.ms),
        _ms(None if chosen is None else chosen.ms),
        f"{row.dense.bytes:,}",
        "-" if chosen is None else f"{chosen.bytes:,}",
    )


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
