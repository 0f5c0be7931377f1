"""What is tried with each model, cell by cell. A cell never passes by doing nothing.

A model is pruned for two tasks. Its outputs under masks must be those of plain modules bitwise, and
those of a smaller copy within the tolerance of `compress`, on other inputs than it was made with.
"""

import copy
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

import mtprune
from mtprune import Grouped, LowRank, MultitaskPruner, Vote, patterns
from mtprune.compression.mixtures import experts_in
from mtprune.compression.running import call, named_tensors
from mtprune.compression.verify import difference
from mtprune.integrations.pretrained import save_pretrained
from tests.compression.fakes import prefer
from tests.matrix.models import TRANSFORMERS, Entry

YES, NO, NONE, WRONG = "yes", "no", "none", "wrong"
UNITS = ("heads", "neurons", "experts", "channels")
TOLERANCE = 1e-5


class NothingError(Exception):
    """There is nothing of the kind in this model."""


@dataclass
class Cell:
    """The result of one trial.

    Attributes:
        state: `YES`; `NO` if it was refused or failed with an error; `NONE` if there is nothing of
            the kind; `WRONG` if it went through with another result.
        why: The reason, or a number worth telling.
    """

    state: str
    why: str = ""


def loss(factor: int) -> Callable[[Any, Any], Tensor]:
    """A task: some function of all outputs."""

    def of(outputs: Any, _: Any) -> Tensor:
        tensors = [t for _, t in named_tensors(outputs) if t.is_floating_point() and t.grad_fn]
        return torch.stack([(factor * tensor).sin().mean() for tensor in tensors]).sum()

    return of


TASKS = {"a": loss(1), "b": loss(2)}


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """All tensors that a model gives."""
    torch.manual_seed(0)  # some draw masks
    return dict(named_tensors(call(model, inputs)))


def check_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str) -> None:
    """Bitwise the same."""
    assert a.keys() == b.keys(), f"{what}: other outputs"
    assert all(torch.equal(a[k], b[k]) for k in a), f"{what}: outputs differ"


def check_close(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str, tolerance: float = TOLERANCE
) -> None:
    """The same within the tolerance."""
    assert a.keys() == b.keys(), f"{what}: other outputs"
    off = max(difference(a[k], b[k]) for k in a)
    assert off <= tolerance, f"{what}: outputs differ by {off:.1e}"


def check_alike(model: nn.Module, other: nn.Module, inputs: Any, what: str) -> None:
    """The same within the tolerance; where a model rounds more than that itself, in float64.

    Then weights that were rounded to float32 may differ by a few times what the model rounds.
    """
    a, b = outputs(model, inputs), outputs(other, inputs)
    if a.keys() == b.keys() and max(difference(a[k], b[k]) for k in a) > TOLERANCE:
        exact = [copy.deepcopy(net).double() for net in (model, other)]
        given, (a, b) = a, (outputs(net, _doubled(inputs)) for net in exact)
        rounded = max(difference(a[k], given[k].to(a[k].dtype)) for k in a)
        check_close(a, b, what, max(TOLERANCE, 4 * rounded))
    else:
        check_close(a, b, what)


def _doubled(inputs: Any) -> Any:
    return tree_map(lambda x: x.double() if torch.is_floating_point(x) else x, inputs)


@dataclass
class Trial:
    """One model, and what has been made of it so far.

    Attributes:
        entry: The model's entry.
        small: The smaller copies, by the kind of units that they lack.
        pruned: The models that these were made of.
    """

    entry: Entry
    small: dict[str, nn.Module] = field(default_factory=dict)
    pruned: dict[str, nn.Module] = field(default_factory=dict)

    @cached_property
    def model(self) -> nn.Module:
        """The dense model."""
        return self.entry.build()

    @property
    def inputs(self) -> Any:
        """What everything is made with."""
        return self.entry.inputs(self.model, 0, 2)

    @property
    def others(self) -> Any:
        """What everything is judged on."""
        return self.entry.inputs(self.model, 1, 3)

    def prune(self, method: Any, exact: bool = True) -> tuple[nn.Module, MultitaskPruner]:
        """A pruned copy with plain modules, which gives what it gave under masks."""
        model = copy.deepcopy(self.model)
        # What computes its weight from others cannot hold a mask.
        computed = [m for m in model.modules() if parametrize.is_parametrized(m)]
        pruner = MultitaskPruner(model, TASKS, method=method, exclude=computed)

        def forward(net: nn.Module, inputs: Any) -> Any:
            torch.manual_seed(0)
            return call(net, inputs)

        pruner.prune([self.inputs, self.inputs], forward=forward, progress=False)
        assert 0 < pruner.sparsity < 1, "nothing was pruned"
        masked = outputs(model, self.others)
        pruner.finalize()
        check = check_same if exact else check_close
        check(masked, outputs(model, self.others), "finalized")
        dense = outputs(self.model, self.others)
        if all(torch.equal(v, dense[name]) for name, v in masked.items()):
            raise ValueError("the outputs of this model hardly depend on its weights")
        return model, pruner

    def elements(self) -> str:
        """Single weights, half of them, to the weight."""
        model, pruner = self.prune(Vote(0.5, allocation="global"))
        total = sum(mask.numel() for mask in pruner.masks.values())
        gone = sum(int((~mask).sum()) for mask in pruner.masks.values())
        assert gone == round(0.5 * total), f"{gone} of {total} zeros"
        self.pruned["elements"] = model
        return f"{100 * pruner.report().coverage:.0f} %"

    def heads(self) -> str:
        """Half of all heads."""
        return self._units("heads", lambda: _found(patterns.heads, self))

    def neurons(self) -> str:
        """Half of all neurons between the layers of a feed-forward block."""
        return self._units("neurons", lambda: _found(patterns.neurons, self))

    def experts(self) -> str:
        """Half of all experts."""
        find = getattr(patterns, "experts", None)
        if find is None:
            raise NothingError
        return self._units("experts", lambda: _found(find, self))

    def channels(self) -> str:
        """Half of all channels of a convolutional network."""
        if sum(isinstance(m, nn.Conv2d) for m in self.model.modules()) < 4:
            raise NothingError
        return self._units(
            "channels", lambda: list(mtprune.Channel(self.inputs).groups(self.model, []))
        )

    def _units(self, kind: str, find: Callable[[], list[Any]]) -> str:
        groups = find()
        model, _ = self.prune(Vote(0.5, granularity=Grouped(groups), min_keep=1))
        fast = mtprune.compress(model, self.inputs, groups=groups, measure=prefer("dense"))
        sizes = [sum(p.numel() for p in net.parameters()) for net in (fast, self.model)]
        assert sizes[0] < sizes[1], "nothing was removed"
        check_alike(model, fast, self.others, "smaller copy")
        self.small[kind], self.pruned[kind] = fast, model
        return f"{len(groups)} x {groups[0].size}, {sizes[0] / sizes[1]:.0%}"

    def ranks(self) -> str:
        """Less than full rank."""
        model, _ = self.prune(LowRank(0.2), exact=False)
        fast = mtprune.compress(model, self.inputs, groups=(), measure=prefer("rank"))
        check_alike(model, fast, self.others, "two layers for one")
        self._check_form(fast, "rank")
        return ""

    def sparse(self) -> str:
        """Layers in sparse forms."""
        model, _ = self.prune(Vote(0.9))
        fast = mtprune.compress(model, self.inputs, groups=(), measure=prefer("csr"))
        check_alike(model, fast, self.others, "sparse forms")
        self._check_form(fast, "csr")
        stacked = experts_in(fast)
        if stacked:
            raise ValueError(f"the experts of '{stacked[0]}' stay in stacks")
        self.small["sparse"] = fast
        return ""

    @staticmethod
    def _check_form(fast: nn.Module, choice: str) -> None:
        if all(row.choice != choice for row in mtprune.plan_of(fast).rows):
            raise ValueError(f"compress knows no layer here that could take the form '{choice}'")

    @property
    def smallest(self) -> tuple[str, nn.Module]:
        """A smaller copy, of units if there are any."""
        kind = next((kind for kind in (*UNITS, "sparse") if kind in self.small), None)
        if kind is None:
            raise NothingError
        return kind, self.small[kind]

    def saved(self) -> str:
        """Saved and loaded."""
        kind, fast = self.smallest
        with tempfile.TemporaryDirectory() as folder:
            mtprune.save(fast, folder)
            loaded = mtprune.load(folder, self.entry.build())
        check_same(outputs(fast, self.others), outputs(loaded, self.others), "loaded")
        return f"without {kind}" if kind != "sparse" else ""

    def from_pretrained(self) -> str:
        """Saved and loaded by transformers alone."""
        if not self.entry.auto:
            raise NothingError
        _, fast = self.smallest
        cls = getattr(import_module("transformers"), f"AutoModelFor{self.entry.auto}")
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(fast, folder)
            self.loaded = cls.from_pretrained(folder)
        check_same(outputs(fast, self.others), outputs(self.loaded, self.others), "loaded")
        return ""

    def generate(self) -> str:
        """The tokens of the pruned model, from the smaller copy."""
        can = getattr(self.model, "can_generate", lambda: False)
        if not can():
            raise NothingError
        kind, fast = self.smallest
        given = {k: v for k, v in self.inputs.items() if not k.startswith("decoder")}

        def tokens(model: Any) -> Any:
            return model.generate(**given, max_new_tokens=4, do_sample=False).tolist()

        if kind in self.pruned:
            assert tokens(fast) == tokens(self.pruned[kind]), "other tokens"
        else:
            tokens(fast)
        return ""

    def onnx(self) -> str:
        """Exported, and run by another runtime."""
        runtime = import_module("onnxruntime")
        kinds = (kind for kind in UNITS if kind in self.small)
        fast = next((self.small[kind] for kind in kinds), self.model)
        if hasattr(fast, "set_experts_implementation"):
            fast.set_experts_implementation("batched_mm")  # ONNX has no grouped products
        inputs = self.inputs
        if isinstance(inputs, Mapping):
            names, given = list(inputs), tuple(inputs.values())
            net: nn.Module = _Named(fast, names)
        else:
            names, given, net = ["x"], (inputs,), _Tensors(fast)
        file = Path(tempfile.mkdtemp()) / "model.onnx"
        expected = [t.detach() for t in net(*given)]
        others = [t for _ in range(9) for t in net(*given)]
        if not all(map(torch.equal, others, expected * 9)):
            raise ValueError("it draws random numbers, and a runtime would draw others")
        torch.onnx.export(net, given, str(file), input_names=names, dynamo=True, verbose=False)
        session = runtime.InferenceSession(str(file))
        feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=True)}
        for a, b in zip(expected, session.run(None, feed), strict=True):
            off = difference(a, torch.from_numpy(b))
            assert off <= 1e-4, f"the runtime's outputs differ by {off:.1e}"
        return ""


class _Tensors(nn.Module):
    """A model that returns its tensors of numbers as a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        return self._tensors(self.model(*args))

    @staticmethod
    def _tensors(out: Any) -> tuple[Tensor, ...]:
        return tuple(t for _, t in named_tensors(out) if t.is_floating_point())[:1]


class _Named(_Tensors):
    """The same for a model that is called with named arguments."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__(model)
        self.names = names

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        options = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        given = dict(zip(self.names, args, strict=True))
        return self._tensors(self.model(**given, **options))


COLUMNS = {
    "elements": Trial.elements,
    "heads": Trial.heads,
    "neurons": Trial.neurons,
    "experts": Trial.experts,
    "channels": Trial.channels,
    "ranks": Trial.ranks,
    "compress": Trial.sparse,
    "save, load": Trial.saved,
    "from_pretrained": Trial.from_pretrained,
    "generate": Trial.generate,
    "ONNX": Trial.onnx,
}
"""The columns of the table, in the order in which they are tried: later ones use earlier ones."""


def _found(find: Callable[..., list[Any]], trial: Trial) -> list[Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Models of transformers tell themselves what they are called with.
            inputs = None if trial.entry.library == TRANSFORMERS else trial.inputs
            return find(trial.model, example_inputs=inputs)
    except ValueError as error:
        if "where the patterns look" in str(error):
            raise NothingError from error
        raise


def try_(trial: Trial, column: str) -> Cell:
    """One cell."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Cell(YES, COLUMNS[column](trial))
    except NothingError:
        return Cell(NONE)
    except AssertionError as error:
        return Cell(WRONG, _short(error))
    except Exception as error:
        return Cell(NO, _short(error))


def _short(error: BaseException) -> str:
    text = re.sub(r"\x1b\[\d+m", "", str(error))  # colours
    text = " ".join(text.split()) or type(error).__name__
    inner = re.search(
        r"Failed to convert the exported program.*?(No ONNX function.*|<class.*)", text
    )
    text = text if inner is None else f"cannot be exported: {inner.group(1)}"
    refused = re.search(r"cannot be removed: .*?': (.*?)(?:\. Prune its .*)?$", text)
    text = text if refused is None else f"cannot be removed: {refused.group(1)}"
    return text if len(text) < 240 else f"{text[:236]} ..."


def try_all(entry: Entry, columns: list[str], note: Callable[[dict[str, Any]], None]) -> None:
    """All cells of a row.

    Args:
        entry: The model.
        columns: The columns.
        note: Takes what is known of the row so far, after each cell.
    """
    trial, row = Trial(entry), {"name": entry.name, "library": entry.library, "cells": {}}
    start = time.perf_counter()
    try:
        row["parameters"] = sum(p.numel() for p in trial.model.parameters())
        outputs(trial.model, trial.inputs)
        outputs(trial.model, trial.others)
    except Exception as error:
        row["broken"] = _short(error)
        note(row)
        return
    for column in columns:
        with torch.random.fork_rng(devices=[]):
            cell = try_(trial, column)
        row["cells"][column] = {"state": cell.state, "why": cell.why}
        row["seconds"] = round(time.perf_counter() - start, 1)
        note(row)


__all__ = ["COLUMNS", "NO", "NONE", "WRONG", "YES", "try_all"]
