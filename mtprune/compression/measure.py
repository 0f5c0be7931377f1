"""`measure`: parameters, multiply-adds, bytes and milliseconds of a model."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from mtprune import checks
from mtprune.compression.forms import Form
from mtprune.compression.running import call, check_devices, parse, run, unnested
from mtprune.compression.timing import sampled
from mtprune.compression.together import Together, separate
from mtprune.model.macs import MacCounter
from mtprune.model.names import unwrap
from mtprune.model.running import untouched
from mtprune.reading import Entry
from mtprune.text import columns

__all__ = ["Sizes", "measure", "sizes_of"]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, and its latency.

    Attributes:
        parameters: Numbers that the model stores as parameters.
        parameters_kept: Parameters that are not zero.
        macs: Multiply-adds of one pass over the example inputs, as torch's flop counter sees them;
            a sparse form multiplies once for each number that it stores.
        macs_kept: Multiply-adds in which no weight is zero.
        memory: Bytes of parameters and buffers, the indices of sparse weights among them.
        memory_kept: Bytes without parameters that are zero.
        disk: Bytes that ``torch.save(model.state_dict(), ...)`` writes; None if not measured.
        ms: Median milliseconds of one pass over the example inputs; None if not measured.
        spread: The quartiles of the milliseconds.
        rounds: How often the model was timed.
        device: The device that the model was timed on.
        threads: The number of threads that torch used.
        against: The sizes of the model that this one is compared with.

    Example:
        >>> dense = Sizes(1000, 100, 1000, 100, 4000, 400, ms=2.0)
        >>> small = Sizes(120, 110, 120, 110, 480, 440, ms=0.5, against=dense)
        >>> small.speedup
        4.0
        >>> small.sentence
        'parameters 1,000 -> 120, multiply-adds 1,000 -> 120, bytes 4,000 -> 480'
    """

    parameters: int
    parameters_kept: int
    macs: int
    macs_kept: int
    memory: int
    memory_kept: int
    disk: int | None = None
    ms: float | None = None
    spread: tuple[float, float] | None = None
    rounds: int = 0
    device: str = "cpu"
    threads: int = 1
    against: "Sizes | None" = None

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the model it is compared with; None if not known."""
        if self.against is None or not self.ms or self.against.ms is None:
            return None
        return self.against.ms / self.ms

    @property
    def sentence(self) -> str:
        """Parameters, multiply-adds and bytes in one line."""
        before = self.against
        pairs = (("parameters", "parameters"), ("multiply-adds", "macs"), ("bytes", "memory"))
        return ", ".join(
            f"{label} "
            + ("" if before is None else f"{getattr(before, name):,} -> ")
            + f"{getattr(self, name):,}"
            for label, name in pairs
        )

    @classmethod
    def read(cls, entry: Entry) -> "Sizes":
        """From plain data, as JSON holds it.

        Raises:
            ValueError: If it is not that of sizes.
        """
        parts = entry.fields([field.name for field in fields(cls)])
        dense = parts["against"]
        if dense.value is not None and dense["against"].value is not None:
            raise dense["against"].wrong("must be None: nothing is behind a dense model")
        whole = ("parameters", "parameters_kept", "macs", "macs_kept", "memory", "memory_kept")
        counts = {name: parts[name].whole() for name in whole}
        spread = None
        if parts["spread"].value is not None:
            low, high = parts["spread"].items(2)
            spread = low.number(least=0.0), high.number(least=0.0)
        return cls(
            **counts,
            disk=parts["disk"].optional(Entry.whole),
            ms=parts["ms"].optional(lambda value: value.number(least=0.0)),
            spread=spread,
            rounds=parts["rounds"].whole(),
            device=parts["device"].text(),
            threads=parts["threads"].whole(),
            against=parts["against"].optional(cls.read),
        )

    @property
    def rows(self) -> list[list[str]]:
        """The cells of a table, its head first; with three numbers a row if compared."""
        models = [self] if self.against is None else [self.against, self]
        head = ["", "size"] if self.against is None else ["", "before", "after", "ratio"]
        rows = [head]
        for label, name in _LINES:
            values = [getattr(model, name) for model in models]
            if None in values:
                continue
            cells = [_number(value) for value in values]
            if self.against is not None:
                cells.append(f"{values[0] / values[1]:.2f}x" if values[1] else "")
            rows.append([label, *cells])
        if all(model.spread is not None for model in models):
            spreads = [model.spread or (0.0, 0.0) for model in models]
            rows.append(["  quartiles", *(f"{low:.3f}-{high:.3f}" for low, high in spreads)])
        return rows

    @property
    def timed(self) -> str:
        """Where and how often it was timed; empty if it was not."""
        if self.ms is None:
            return ""
        return f"{self.device}, threads: {self.threads}, {self.rounds} rounds"

    def __str__(self) -> str:
        """A table; with two columns if the model is compared with another."""
        printed = columns(self.rows if self.against is not None else self.rows[1:])
        return "\n".join([*printed, *([f"({self.timed})"] if self.timed else [])])


_LINES = (
    ("parameters", "parameters"),
    ("  not zero", "parameters_kept"),
    ("multiply-adds", "macs"),
    ("  not with zeros", "macs_kept"),
    ("bytes in memory", "memory"),
    ("  without zeros", "memory_kept"),
    ("bytes on disk", "disk"),
    ("ms, median", "ms"),
)


_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def measure(
    model: nn.Module, example_inputs: Any, *, against: nn.Module | None = None, rounds: int = 21
) -> Sizes:
    """The sizes and the latency of a model in eval mode, alone or side by side with another.

    Two models are timed in turns, so that other load of the machine slows both alike.

    Args:
        model: Any model, dense or compressed. It is left as it is.
        example_inputs: A tensor, a tuple of arguments, a dict of keyword arguments, or a list of
            these. One pass over all of them is counted and timed.
        against: The model to compare with, usually the dense one.
        rounds: How often to time the models, at least 20.

    Raises:
        ValueError: If a model does not run on the inputs, or ``rounds`` is below 20.

    Example:
        >>> sizes = measure(nn.Linear(8, 4), torch.ones(2, 8))
        >>> sizes.parameters, sizes.macs, sizes.memory
        (36, 64, 144)
        >>> sizes.spread[0] <= sizes.ms <= sizes.spread[1]
        True
    """
    checks.whole("rounds", rounds, least=20, must="must be at least 20")
    models = [unwrap(model)] if against is None else [unwrap(against), unwrap(model)]
    batches = parse(example_inputs)
    with ExitStack() as stack:
        for each in models:
            if not isinstance(each, nn.Module):
                raise TypeError(f"`model` and `against` must be modules. Got {each!r}.")
            check_devices(each, batches)
            stack.enter_context(unnested(each))
            stack.callback(_restore, {module: module.training for module in each.modules()})
            each.eval()
            run(each, batches)
        counts = [replace(_counted(each, batches), disk=_on_disk(each)) for each in models]
        with torch.no_grad():
            # Not by `run`, which also copies buffers and random state.
            samples = sampled([partial(_pass, m, batches) for m in models], rounds, rounds)
    device = str(next((p.device for p in models[-1].parameters()), "cpu"))
    sizes: Sizes | None = None
    for count, times in zip(counts, samples, strict=True):
        low, _, high = quantiles(times, n=4, method="inclusive")
        sizes = replace(
            count,
            ms=median(times),
            spread=(low, high),
            rounds=rounds,
            device=device,
            threads=torch.get_num_threads(),
            against=sizes,
        )
    assert sizes is not None
    return sizes


def sizes_of(model: nn.Module, batches: Sequence[Any], against: nn.Module) -> Sizes:
    """The sizes of a model against another, without disk and latency.

    Args:
        model: The model, in eval mode.
        batches: The example inputs.
        against: The model that it was made from, in eval mode.
    """
    with unnested(model), unnested(against):
        return replace(_counted(model, batches), against=_counted(against, batches))


def _pass(model: nn.Module, batches: Sequence[Any]) -> None:
    """Run the model once over all batches."""
    for batch in batches:
        call(model, batch)


def _restore(modes: Mapping[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


def _counted(model: nn.Module, batches: Sequence[Any]) -> Sizes:
    """Parameters, multiply-adds and bytes of a model."""
    parameters = list(model.parameters())
    nbytes = {t.data_ptr(): t.nbytes for t in (*parameters, *model.buffers()) if t.numel()}
    zeros = [p.numel() - int(p.count_nonzero()) for p in parameters]
    zero_bytes = sum(n * p.element_size() for n, p in zip(zeros, parameters, strict=True))
    macs, macs_kept = _macs(model, batches)
    return Sizes(
        parameters=sum(p.numel() for p in parameters),
        parameters_kept=sum(p.numel() for p in parameters) - sum(zeros),
        macs=macs,
        macs_kept=macs_kept,
        memory=sum(nbytes.values()),
        memory_kept=sum(nbytes.values()) - zero_bytes,
    )


def _macs(model: nn.Module, batches: Sequence[Any]) -> tuple[int, int]:
    """Multiply-adds of a model, and multiply-adds in which no weight is zero."""
    counter = MacCounter(model.parameters())
    handles = []

    def enter(module: nn.Module, args: Any) -> None:
        counter.paused = True

    def leave(form: nn.Module, args: Any, out: Tensor) -> None:
        # Each stored number is multiplied once for each output position, whatever the form does.
        assert isinstance(form, Form)
        positions = out.numel() // max(1, form.weight_shape[0])
        counter.macs += positions * sum(part.numel() for part in form.stored)
        counter.kept += positions * sum(int(part.count_nonzero()) for part in form.stored)
        counter.paused = False

    for module in model.modules():
        if isinstance(module, Form):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
    joined = [module for module in model.modules() if isinstance(module, Together)]
    classes = [type(layer) for layer in joined]
    try:
        for layer in joined:  # native code is not seen, so its parts are called
            separate(layer)
        # With gradients only where torch's fast paths without gradients would hide products:
        # elsewhere gradients would only keep activations in memory.
        fused = any(isinstance(module, _FUSED) for module in model.modules())
        with untouched(model), torch.set_grad_enabled(fused), counter:
            _pass(model, batches)
    finally:
        for layer, cls in zip(joined, classes, strict=True):
            layer.__class__ = cls
        for handle in handles:
            handle.remove()
    return counter.macs, counter.kept


def _on_disk(model: nn.Module) -> int:
    with tempfile.TemporaryFile() as file:
        torch.save(model.state_dict(), file)
        return file.tell()


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
