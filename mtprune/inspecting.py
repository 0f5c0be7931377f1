"""Inspecting: what a file says about pruning, without the model that it is of.

Three kinds of files tell something: the ``state_dict()`` of a pruner, alone or beside others in one
file; the state of a model, which has zeros; and the folder of a compressed model. Files are read as
tensors, numbers, strings and containers. Code is never run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtprune import checkpoint
from mtprune.bits import unpack_bits
from mtprune.compression.plan import Plan
from mtprune.compression.storage import META, PRETRAINED, read
from mtprune.facts import Count, Facts
from mtprune.files import read_json, read_torch
from mtprune.model.names import strip
from mtprune.reading import Entry
from mtprune.report import Report, make_report
from mtprune.text import columns

__all__ = ["Comparison", "Found", "LayerPair", "compare", "inspect"]

CHECKPOINT = "checkpoint of a pruner"
STATE = "state of a model"
COMPRESSED = "compressed model"

_MATRICES = (
    "All tensors of two or more dimensions are counted, embeddings too: a state does not say which "
    "of them may be pruned, nor which task uses them."
)


@dataclass(frozen=True)
class Found:
    """What a file says.

    Attributes:
        path: The file or folder.
        kind: What it holds.
        report: What is pruned, for whom; None of a compressed model. Its coverage is not known.
        masks: ``{layer: mask}``, True = keep, as far as the file has them.
        plan: The plan of a compressed model.
        notes: What to know besides.
    """

    path: str
    kind: str
    report: Report | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    plan: Plan | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All but the masks, as dicts, lists, numbers and strings."""
        return {
            "path": self.path,
            "kind": self.kind,
            "report": None if self.report is None else self.report.to_dict(),
            "plan": None if self.plan is None else self.plan.to_dict(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """Tables of components and layers, or the plan."""
        lines = [f"{self.path}: {self.kind}"]
        if self.report is not None:
            if self.report.step is not None:
                lines += ["", self.report.table(layers=True).split("\ntotal")[0], ""]
            lines.append(str(self.report))
        if self.plan is not None:
            lines += ["", str(self.plan)]
        return "\n".join([*lines, *self.notes])


def inspect(path: str | PathLike[str], part: str | None = None) -> Found:
    """What a file or folder says about pruning.

    Args:
        path: A file that ``torch.save`` or safetensors wrote, or the folder of a compressed model.
        part: The key of the state to look at, where a file holds several. The pruner's unless
            given.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is damaged, holds objects other than tensors and containers, or is of no
            kind that tells something.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "model.pt"
        ...     torch.save({"trunk.weight": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}, file)
        ...     found = inspect(file)
        >>> found.kind, found.report.sparsity
        ('state of a model', 0.75)
    """
    target = Path(path)
    if not target.exists():
        raise FileNotFoundError(f"'{path}' does not exist.")
    if target.is_dir():
        return Found(str(path), COMPRESSED, **_compressed(target))
    value = _loaded(target)
    name, state = _chosen(value, str(path), part)
    beside = f"Part '{name}' of the file." if name else ""
    if checkpoint.is_one(state):
        found = _of_pruner(state)
    else:
        found = _of_state({key: v for key, v in state.items() if isinstance(v, Tensor)}, str(path))
    notes = (*([beside] if beside else []), *found.pop("notes", ()))
    kind = CHECKPOINT if checkpoint.is_one(state) else STATE
    return Found(str(path), kind, notes=notes, **found)


# What a file holds.


def _loaded(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return read_torch(path, "cpu")
    try:
        safetensors = import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            f"'{path}' needs safetensors. Install the extra: pip install 'mtprune[safetensors]'."
        ) from error
    try:
        return safetensors.load(path.read_bytes())
    except Exception as error:  # of its own kinds, which differ between versions
        raise ValueError(f"'{path}' is damaged: {error}") from error


def _chosen(value: object, path: str, part: str | None) -> tuple[str, Mapping[str, Any]]:
    """The state to look at, and its key in the file; empty if the file is that state."""
    states = _states(value)
    if part is not None:
        if part not in states:
            raise ValueError(
                f"'{path}' holds no state under '{part}'. It has {sorted(filter(None, states))}."
            )
        return part, states[part]
    pruners = {name: state for name, state in states.items() if checkpoint.is_one(state)}
    found = pruners or states
    if "" in found:
        return "", found[""]
    if len(found) == 1:
        return next(iter(found.items()))
    if not found:
        what = "an empty file" if value in ({}, []) else f"a {type(value).__name__}"
        raise ValueError(
            f"'{path}' holds {what}, and no state of a pruner or of a model. Give what "
            "torch.save(pruner.state_dict(), ...) or torch.save(model.state_dict(), ...) wrote."
        )
    raise ValueError(f"'{path}' holds several states: name one of {sorted(found)}, as --part NAME.")


def _states(value: object) -> dict[str, Mapping[str, Any]]:
    """The states of a pruner or a model in a file, by key; that of the file itself as ''."""
    found: dict[str, Mapping[str, Any]] = {}
    if isinstance(value, Mapping):
        if checkpoint.is_one(value) or _is_state(value):
            found[""] = value
        for name, inner in value.items():
            if isinstance(name, str) and (checkpoint.is_one(inner) or _is_state(inner)):
                found[name] = inner
    return found


def _is_state(value: object) -> bool:
    """Whether a value looks like a module's state: names and tensors, a matrix among them."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(tensor, Tensor) and tensor.dim() >= 2 for tensor in value.values())
    )


# A pruner's checkpoint.


def _of_pruner(state: Mapping[str, Any]) -> dict[str, Any]:
    entries = checkpoint.parsed(state)
    shapes = {
        name: tuple(size.whole() for size in shape.items())
        for name, shape in entries["shapes"].mapping().items()
    }
    tasks = [task.text() for task in entries["tasks"].items()]
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    facts = Facts.read(entries["facts"], sizes, tasks)
    masks = _masks(entries["hold"]["masks"], shapes)
    done = entries["done"].whole(least=-1)
    checkpoint.check_seal(entries)
    if len({count.name for count in facts.counts}) < len(facts.counts):
        raise entries["facts"]["counts"].wrong("must tell of each layer once")
    if not facts.counts:
        facts = Facts(tuple(Count(name, "", n, n, {}, n) for name, n in sizes.items()))
    for count in facts.counts:
        if count.name in masks and int(masks[count.name].count_nonzero()) != count.kept:
            part = entries["hold"]["masks"][count.name]
            raise part.wrong(f"must keep {count.kept} weights, as the last update did")
    # Which share of all multiply-adds these are, a checkpoint does not say.
    counts = tuple(_without_cost(count) for count in facts.counts)
    weights = dict(facts.history[-1].weights) if facts.history else {}
    report = make_report(
        Facts(**{**vars(facts), "counts": counts}),
        step=done if done >= 0 else None,
        tasks=tasks,
        left_alone={},
        method=entries["method"].text(),
        weights=weights if len(set(weights.values())) > 1 else {},
        coverage=None,
    )
    return {"report": report, "masks": masks}


def _without_cost(count: Count) -> Count:
    return Count(**{**vars(count), "cost": None})


def _masks(entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    masks = {}
    for name, part in entry.mapping(shapes).items():
        bits = part.tensor((-(-prod(shapes[name]) // 8),), torch.uint8)
        masks[name] = unpack_bits(bits, shapes[name])
    return masks


# A model's state.


def _of_state(state: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    dense = {name: tensor for name, tensor in state.items() if _is_dense(tensor)}
    masks = {
        strip(name): tensor != 0
        for name, tensor in _effective(dense).items()
        if tensor.dim() >= 2 and tensor.numel()
    }
    if not masks:
        raise ValueError(
            f"'{path}' holds no dense tensor of two or more dimensions: nothing is pruned."
        )
    counts = tuple(_count(name, mask) for name, mask in masks.items())
    report = make_report(Facts(counts), step=0, tasks=[], left_alone={}, coverage=None)
    others = [name for name in state if name not in dense]
    passed_over = [f"Not dense, and not counted: {', '.join(others[:8])}."] if others else []
    return {"report": report, "masks": masks, "notes": (_MATRICES, *passed_over)}


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has its numbers: one of stride 0 may claim any size."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _effective(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that modules compute with: those that `torch.nn.utils.prune` masks are products.

    Raises:
        ValueError: If a mask is not of the shape of its weight.
    """
    found = {}
    for name, tensor in state.items():
        bare = name.removesuffix("_orig")
        mask = state.get(f"{bare}_mask") if bare != name else None
        if name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state:
            continue
        if mask is None:
            found[name] = tensor
        elif mask.shape != tensor.shape:
            raise ValueError(
                f"'{bare}_mask' must have the shape of '{name}', {tuple(tensor.shape)}. Got "
                f"{tuple(mask.shape)}."
            )
        else:
            found[bare] = tensor * mask
    return found


def _count(name: str, mask: Tensor) -> Count:
    kept = int(mask.count_nonzero())
    return Count(name, name.partition(".")[0], mask.numel(), kept, {}, kept)


# A compressed model.


def _compressed(folder: Path) -> dict[str, Any]:
    if (folder / PRETRAINED).exists() and not (folder / META).exists():
        advice = "Take the folder as mtprune's save_pretrained wrote it."
        config = Entry(read_json(folder / PRETRAINED), f"'{folder / PRETRAINED}'", advice)
        return {"plan": Plan.read(config["quantization_config"]["plan"])}
    saved = read(folder)
    return {"plan": saved.plan, "notes": (f"A {saved.made[0].partition(':')[2]}.",)}


# Two files.


@dataclass(frozen=True)
class LayerPair:
    """One layer of two files.

    Attributes:
        name: The layer.
        first: The share that the first keeps; None if it has no such layer.
        second: The same of the second.
        overlap: Intersection over union of what they keep; None if that is not known.
    """

    name: str
    first: float | None
    second: float | None
    overlap: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What two files say of the same layers.

    Attributes:
        first: The first.
        second: The second.
        layers: One for each layer that either has.
        overlap: Intersection over union of what they keep, over all layers that both have; None if
            there is none.
        notes: What differs besides.
    """

    first: Found
    second: Found
    layers: tuple[LayerPair, ...]
    overlap: float | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As dicts, lists, numbers and strings."""
        return {
            "first": {"path": self.first.path, "kind": self.first.kind},
            "second": {"path": self.second.path, "kind": self.second.kind},
            "layers": [vars(layer) for layer in self.layers],
            "overlap": self.overlap,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """A table of layers."""
        rows = [
            [pair.name, *map(_share, (pair.first, pair.second)), _number(pair.overlap)]
            for pair in self.layers
        ]
        whole = [_sparsity(found) for found in (self.first, self.second)]
        rows.append(["total", *whole, _number(self.overlap)])
        head = ["layer", "kept in A", "kept in B", "overlap"]
        lines = [f"A: {self.first.path}: {self.first.kind}"]
        lines += [f"B: {self.second.path}: {self.second.kind}", "", *columns([head, *rows])]
        return "\n".join([*lines, *self.notes])


def compare(first: Found, second: Found) -> Comparison:
    """What two files keep of the same layers.

    Raises:
        ValueError: If one is a compressed model, whose layers are no longer those of the other, or
            they have no layer in common.
    """
    for found in (first, second):
        if found.report is None:
            raise ValueError(
                f"'{found.path}' is a {found.kind}: its layers have other forms. Compare what was "
                "saved before: the checkpoint of the pruner, or the state of the model."
            )
    kept = [_kept(found) for found in (first, second)]
    names = list(dict.fromkeys([*kept[0], *kept[1]]))
    if not kept[0].keys() & kept[1].keys():
        raise ValueError(
            f"'{first.path}' and '{second.path}' have no layer in common: the first has "
            f"{list(kept[0])[:3]}, the second {list(kept[1])[:3]}."
        )
    both = unions = 0
    pairs, odd = [], []
    for name in names:
        overlap, masks = None, [found.masks.get(name) for found in (first, second)]
        if masks[0] is not None and masks[1] is not None:
            if masks[0].shape == masks[1].shape:
                inner = int((masks[0] & masks[1]).count_nonzero())
                union = int((masks[0] | masks[1]).count_nonzero())
                both, unions = both + inner, unions + union
                overlap = inner / union if union else None
            else:
                odd.append(name)
        pairs.append(LayerPair(name, kept[0].get(name), kept[1].get(name), overlap))
    notes = [f"Of other shapes: {', '.join(odd)}."] if odd else []
    return Comparison(first, second, tuple(pairs), both / unions if unions else None, tuple(notes))


def _kept(found: Found) -> dict[str, float]:
    rows = () if found.report is None else found.report.layers
    return {row.name: row.kept / row.parameters for row in rows}


def _sparsity(found: Found) -> str:
    return "-" if found.report is None else _share(1.0 - found.report.sparsity)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
