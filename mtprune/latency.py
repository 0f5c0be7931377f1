"""Latency: a budget in time, and the timetable that says what takes how long.

A `Timetable` is a price list: for each layer the milliseconds at some shares of its weights, and
what the rest of the model takes. `timetable` measures one on this machine; it is plain data, can be
saved, and given again::

    table = mtprune.latency.timetable(model, example_inputs)
    table.save("times.json")
    Vote(latency=Latency(0.5, Timetable.load("times.json")))

``Vote(latency=0.5, example_inputs=...)`` measures its own, and measures its choice too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from mtprune import checks, files
from mtprune.reading import Entry

if TYPE_CHECKING:  # all of them look at this module
    from torch import nn

    from mtprune.granularity import Granularity

__all__ = ["SHARES", "Latency", "Pace", "Timetable", "Timing", "timetable"]

SHARES = (1.0, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.02)
"""The shares of weights, or of units, at which a model is timed."""

Measure = Callable[[Sequence[Callable[[], object]]], Sequence[float]]
"""How functions are timed: from functions to the milliseconds of each."""

Points = Sequence[Sequence[float]]
"""Pairs: a share of what there is, and its milliseconds."""


@dataclass(frozen=True)
class Timetable:
    """How long a model takes by how much of its layers stays.

    The time of a model is ``fixed_ms`` and what each layer takes at its share, interpolated between
    the points and as at the nearest one beyond them.

    Attributes:
        layers: For each layer, as masks name it, pairs of a share of its weights, rising up to 1,
            and milliseconds. Layers that are not there take no time of their own and stay dense.
        fixed_ms: The milliseconds of everything else.
        of: Which weights are gone at a share: ``"weights"``, single ones anywhere, or ``"units"``,
            whole rows and columns, so that layers are smaller.
        device: What was measured on.
        threads: The number of threads that torch used.

    Example:
        >>> table = Timetable({"up.weight": [(0.1, 1.0), (0.5, 4.0), (1.0, 4.0)]}, fixed_ms=2.0)
        >>> table.dense_ms, table.ms({"up.weight": 0.3})
        (6.0, 4.5)
    """

    layers: Mapping[str, Points]
    fixed_ms: float = 0.0
    of: Literal["weights", "units"] = "weights"
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        """Validate."""
        checks.mapping("layers", self.layers, "layer -> pairs of share and milliseconds")
        for name, points in self.layers.items():
            self._check(name, points)
        # In one form, so that what went through JSON is equal to what it was.
        same = {name: tuple((float(s), float(t)) for s, t in p) for name, p in self.layers.items()}
        object.__setattr__(self, "layers", same)
        checks.number("fixed_ms", self.fixed_ms)
        checks.inside("fixed_ms", self.fixed_ms, "[0, inf)")
        checks.either("of", self.of, ("weights", "units"))
        if self.dense_ms <= 0.0:
            raise ValueError("A timetable must tell of more than 0 ms. Got none in any layer.")

    @staticmethod
    def _check(name: str, points: Points) -> None:
        """Refuse what is no curve."""
        of, must = f" of layer '{name}'", "must be pairs (share, milliseconds)"
        pairs = isinstance(points, Sequence) and not isinstance(points, str)
        if not pairs or not all(isinstance(p, Sequence) and len(p) == 2 for p in points):
            raise TypeError(checks.message("layers", points, must, of))
        for share, ms in points:
            checks.number("layers", share, of=of, must=must)
            checks.number("layers", ms, of=of, must=must)
            checks.inside("layers", ms, "[0, inf)", of=of, must="must have times of at least 0 ms")
        shares = [share for share, _ in points]
        if not shares or shares[0] <= 0 or shares[-1] != 1 or sorted(set(shares)) != shares:
            must = "must have shares that rise from above 0 up to 1"
            raise ValueError(checks.message("layers", shares, must, of))

    @property
    def dense_ms(self) -> float:
        """The milliseconds of the dense model."""
        return self.ms({})

    def ms(self, shares: Mapping[str, float]) -> float:
        """The milliseconds with these shares of layers; 1 for those that are not named."""
        every = (self.layer_ms(name, [shares.get(name, 1.0)]) for name in self.layers)
        return float(self.fixed_ms + math.fsum(float(ms[0]) for ms in every))

    def layer_ms(self, name: str, shares: Sequence[float]) -> list[float]:
        """The milliseconds of a layer at each of some shares; 0 of one that is not there."""
        if name not in self.layers:
            return [0.0] * len(shares)
        known, times = zip(*self.layers[name], strict=True)
        return list(map(float, np.interp(shares, known, times)))

    def least(self, name: str) -> float:
        """The least share at which a layer was timed; 1 of one that is not there."""
        return float(self.layers[name][0][0]) if name in self.layers else 1.0

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON."""
        import json

        files.write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Timetable":
        """Read what `save` wrote.

        Raises:
            ValueError: If the file holds something else.
        """
        entry = Entry(files.read_json(path), f"'{path}'", "Take what Timetable.save() wrote.")
        parts = entry.fields(["layers"], optional=["fixed_ms", "of", "device", "threads"])
        layers = {
            name: tuple(tuple(n.number() for n in pair.items(2)) for pair in points.items())
            for name, points in parts.pop("layers").mapping().items()
        }
        try:
            return cls(layers, **{name: part.plain() for name, part in parts.items()})
        except (ValueError, TypeError) as error:
            raise ValueError(f"'{path}' holds a timetable that cannot be: {error}") from error


@dataclass(frozen=True)
class Latency:
    """A budget in time, from a timetable that is known: nothing is measured then.

    Attributes:
        share: The time of the compressed model as a share of the dense model's, in (0, 1].
        times: The timetable; None lets it be measured, and the choice too.
        measure: How functions are timed, as for `mtprune.compress`; None is as there.

    Example:
        >>> Latency(0.5)
        Latency(share=0.5)
    """

    share: float
    times: Timetable | None = field(default=None, repr=False)
    measure: Measure | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Validate."""
        checks.number("latency", self.share)
        must = "is what stays of the time, in (0, 1]"
        checks.share("latency", self.share, "(0, 1]", must=must)
        times: object = self.times
        if times is not None and not isinstance(times, Timetable):
            must = "must be a mtprune.latency.Timetable"
            raise TypeError(checks.message("times", times, must))
        if self.measure is not None:
            checks.function("measure", self.measure)

    @classmethod
    def of(cls, given: Any) -> "Latency":
        """The budget that is meant: one, or its share alone."""
        return given if isinstance(given, Latency) else cls(given)


@dataclass(frozen=True)
class Pace:
    """What is known of a model's time.

    Attributes:
        times: Its timetable.
        tried: From masks of layers, by name, to the time of the compressed model with them as a
            share of the dense model's, measured; None where nothing is to be measured.
    """

    times: Timetable
    tried: Callable[[Mapping[str, Tensor]], float] | None = None


@dataclass(frozen=True)
class Timing:
    """The time of a pruned model, for the report.

    Attributes:
        dense_ms: Milliseconds of the dense model.
        asked_ms: What was asked for.
        predicted_ms: What the timetable says of the masks.
        measured_ms: What the compressed model took with these masks; None if it was not tried.
        correction: By what the asked time was multiplied so that the measured one comes near it.
    """

    dense_ms: float
    asked_ms: float
    predicted_ms: float
    measured_ms: float | None = None
    correction: float = 1.0

    @property
    def share(self) -> float:
        """The share of the dense model's time: measured, or else predicted."""
        return (self.predicted_ms if self.measured_ms is None else self.measured_ms) / self.dense_ms

    @classmethod
    def read(cls, entry: Entry) -> "Timing":
        """From plain data, as a checkpoint holds it.

        Raises:
            ValueError: If it is not that of a timing.
        """
        names = ["dense_ms", "asked_ms", "predicted_ms", "measured_ms", "correction"]
        parts = entry.fields(names)
        measured = parts.pop("measured_ms").optional(lambda part: part.number(least=0.0))
        numbers = {name: part.number(least=0.0) for name, part in parts.items()}
        return cls(**numbers, measured_ms=measured)

    def __str__(self) -> str:
        """A sentence."""
        said = f"{self.predicted_ms:.3g} ms by the timetable"
        if self.measured_ms is not None:
            said = f"{self.measured_ms:.3g} ms measured with these masks, {said}"
        return f"Time: {self.asked_ms:.3g} ms asked of {self.dense_ms:.3g} ms dense, {said}."


def timetable(
    model: "nn.Module",
    example_inputs: Any,
    granularity: "Granularity | None" = None,
    *,
    exclude: Any = (),
    shares: Sequence[float] = SHARES,
    measure: Measure | None = None,
) -> Timetable:
    """Measure a timetable on this machine, with the threads that torch uses now.

    Copies of the model lose random weights, or units, down to each share, and are compressed as
    `mtprune.compress` does it. Each layer is timed on the inputs that it receives, and the model
    as a whole; what layers take is scaled so that all shares alike give the model's time.

    Args:
        model: The dense model.
        example_inputs: As for `mtprune.compress`.
        granularity: What will be pruned: single weights unless given, or units that span layers.
        exclude: What will not be pruned, as for `mtprune.MultitaskPruner`.
        shares: The shares at which to measure, between 0 and 1.
        measure: How functions are timed, as for `mtprune.compress`.
    """
    from mtprune.compression.pricing import price  # it needs more than most runs do
    from mtprune.compression.timing import interleaved
    from mtprune.granularity import Element
    from mtprune.model.covering import cover
    from mtprune.model.layers import find_layers
    from mtprune.model.names import unwrap

    for share in shares:
        checks.inside("shares", share, "(0, 1]")
    model = unwrap(model)
    covered = cover(granularity or Element(), model, find_layers(model, (), exclude))
    groups = () if covered.units is None else covered.units.groups
    return price(
        model,
        example_inputs,
        [x.name for x in covered.layers],
        groups,
        shares,
        measure or interleaved,
    )
