"""Extraction: the part of a multitask model that some of its tasks need.

The rule is the vote's own, counted again with fewer voters: a weight stays if one of the chosen
tasks would keep it alone. Other tasks' outputs are dropped, and with them the modules that serve
no chosen task. These are found by trial: a module is left out, the model runs on the example
inputs, and the remaining outputs must be bitwise the same.
"""

import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from mtprune.bits import zeroed
from mtprune.compression.running import call, named_tensors, run
from mtprune.compression.switching import whole
from mtprune.model.graph import reachable
from mtprune.model.names import own_name
from mtprune.model.running import untouched
from mtprune.model.task_masks import (
    TaskMasks,
    check_tasks,
    masked_parameters,
    merged_task_masks,
    recall_task_masks,
)
from mtprune.reading import Entry

__all__ = ["Absent", "Place", "Places", "Subnetwork", "cut", "extract"]

Place = str | int
"""A key, field or index of a model's outputs."""

Places = Mapping[str, Place | Collection[Place]]
"""The places of each task's outputs."""


@dataclass(frozen=True)
class Subnetwork:
    """The part of a model that some tasks need.

    Attributes:
        tasks: The tasks.
        outputs: The places of the outputs that stay; None if all stay.
        absent: Modules that were left out, because only other tasks need them.
        weights: The number of prunable weights that these tasks use.
        before: How many of these weights were not zero in the model for all tasks.
        kept: How many of these weights are not zero in the part.

    Example:
        >>> part = Subnetwork(("seg",), ("seg",), ("heads.depth",), 1000, 200, 150)
        >>> part.sparsity, part.sparsity_before
        (0.85, 0.8)
        >>> print(part)
        for seg: 150 of the 1,000 weights it uses, 85.00 % zeros; in the whole model 200, 80.00 %
        left out: heads.depth
    """

    tasks: tuple[str, ...]
    outputs: tuple[Place, ...] | None
    absent: tuple[str, ...]
    weights: int
    before: int
    kept: int

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights that these tasks use."""
        return 1 - self.kept / max(1, self.weights)

    @property
    def sparsity_before(self) -> float:
        """Share of zeros among the same weights in the model for all tasks."""
        return 1 - self.before / max(1, self.weights)

    @classmethod
    def read(cls, entry: Entry) -> "Subnetwork":
        """From plain data, as JSON holds it.

        Raises:
            ValueError: If it is not that of a part.
        """
        parts = entry.fields([field.name for field in dataclasses.fields(cls)])
        weights = parts["weights"].whole()

        def place(key: Entry) -> Place:
            return key.text() if isinstance(key.value, str) else key.whole()

        return cls(
            tasks=tuple(task.text() for task in parts["tasks"].items()),
            outputs=parts["outputs"].optional(lambda keys: tuple(map(place, keys.items()))),
            absent=tuple(name.text() for name in parts["absent"].items()),
            weights=weights,
            before=parts["before"].whole(most=weights),
            kept=parts["kept"].whole(most=weights),
        )

    def __str__(self) -> str:
        """One or two lines."""
        users = "it uses" if len(self.tasks) == 1 else "they use"
        line = (
            f"for {', '.join(self.tasks)}: {self.kept:,} of the {self.weights:,} weights {users}, "
            f"{100 * self.sparsity:.2f} % zeros; in the whole model {self.before:,}, "
            f"{100 * self.sparsity_before:.2f} %"
        )
        return line + (f"\nleft out: {', '.join(self.absent)}" if self.absent else "")


class Absent(nn.Module):
    """Stands in the place of a module that was left out: takes any arguments, returns None.

    Example:
        >>> Absent()(torch.ones(2)) is None
        True
    """

    @override
    def forward(self, *args: Any, **kwargs: Any) -> None:
        return None


def extract(
    model: nn.Module,
    batches: Sequence[Any],
    tasks: Sequence[str],
    task_masks: TaskMasks | None = None,
    outputs: Places | None = None,
) -> tuple[nn.Module, Subnetwork]:
    """A dense copy for some tasks: other weights are zero, other outputs are dropped.

    Args:
        model: The model, finalized.
        batches: Example inputs.
        tasks: The tasks.
        task_masks: The weights that each task alone would keep; remembered by the model's pruner
            unless given.
        outputs: The places of each task's outputs; found unless given.

    Raises:
        ValueError: If the votes of the tasks are unknown, or the places of their outputs.
    """
    masks = recall_task_masks(model) if task_masks is None else task_masks
    if masks is None:
        raise ValueError(
            "`tasks` needs to know what each task voted for, and no pruner has left that for this "
            "model: it is a copy, was loaded, or its last update was before a checkpoint. Give "
            "task_masks=pruner.task_masks."
        )
    chosen = check_tasks(tasks, masks)
    with whole(model):
        work = copy.deepcopy(model).eval()
    run(work, batches)  # raises if the inputs do not fit the model
    reached = _reached(work, batches)
    places = None
    if set(chosen) != set(masks):
        names = {place: parameters.names for place, parameters in reached.items()}
        places = _places(chosen, masks, names, outputs)
    weights, before, kept = _zero(work, chosen, masks)
    part = Subnetwork(chosen, places, (), weights, before, kept)
    if places is None:
        return work, part
    needed = {i for place in places for i in reached[place].ids}
    cut(work, part)
    absent = _leave_out(work, needed, batches)
    return work, dataclasses.replace(part, absent=tuple(absent))


def cut(model: nn.Module, part: Subnetwork) -> None:
    """Leave out the absent modules of a part and drop other outputs, in place.

    Raises:
        ValueError: If the model does not have the absent modules.
    """
    known = dict(model.named_modules())
    for name in part.absent:
        if name not in known:
            raise ValueError(f"The plan is for another model: this one has no module '{name}'.")
        _substitute(model, known[name], Absent())
    if part.outputs is not None:
        model.register_forward_hook(_KeepOutputs(part.outputs))


class _KeepOutputs:
    """A forward hook that drops outputs. With a hook the model keeps its class and its names."""

    def __init__(self, places: tuple[Place, ...]) -> None:
        self.places = places

    def __call__(self, module: nn.Module, args: Any, outputs: Any) -> Any:
        if isinstance(outputs, Mapping) and not dataclasses.is_dataclass(outputs):
            return {key: value for key, value in outputs.items() if key in self.places}
        if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
            fields = [field.name for field in dataclasses.fields(outputs)]
            return dataclasses.replace(
                outputs, **{name: None for name in fields if name not in self.places}
            )
        if hasattr(outputs, "_fields"):
            return outputs._replace(**{n: None for n in outputs._fields if n not in self.places})
        return type(outputs)(value for i, value in enumerate(outputs) if i in self.places)


def _entries(outputs: Any) -> Iterator[tuple[Place, Any]]:
    """The outputs of a model by their places, one level deep."""
    if isinstance(outputs, Mapping):
        yield from outputs.items()
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        for field in dataclasses.fields(outputs):
            yield field.name, getattr(outputs, field.name)
    elif hasattr(outputs, "_fields"):
        yield from zip(outputs._fields, outputs, strict=True)
    elif isinstance(outputs, (list, tuple)):
        yield from enumerate(outputs)


class _Parameters(NamedTuple):
    """The parameters that an output depends on, by name and by id."""

    names: set[str]
    ids: set[int]


def _reached(model: nn.Module, batches: Sequence[Any]) -> dict[Place, _Parameters]:
    """The parameters that the graph of each output leads to."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    names = {id(p): own_name(model, name) for name, p in model.named_parameters()}
    reached: dict[Place, _Parameters] = {}
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter.is_floating_point())
        for batch in batches:
            with untouched(model), torch.enable_grad():
                outputs = call(model, batch)
            for place, value in _entries(outputs):
                parameters = reached.setdefault(place, _Parameters(set(), set()))
                for _, tensor in named_tensors(value):
                    ids = reachable(tensor) & names.keys()
                    parameters.names.update(names[i] for i in ids)
                    parameters.ids.update(ids)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return reached


def _places(
    chosen: Sequence[str],
    masks: TaskMasks,
    reached: Mapping[Place, Collection[str]],
    outputs: Places | None,
) -> tuple[Place, ...]:
    """The places of the chosen tasks' outputs: as given, by name, or by the weights they need.

    Args:
        chosen: The tasks.
        masks: The weights that each task alone would keep.
        reached: The names of the parameters that each output depends on.
        outputs: The places as given by the user, or None.
    """
    if outputs is not None:
        given = {t: (p,) if isinstance(p, (str, int)) else tuple(p) for t, p in outputs.items()}
        missing = [task for task in chosen if not given.get(task)]
        wrong = [p for task in chosen for p in given.get(task, ()) if p not in reached]
        if missing or wrong:
            what = f"does not say for {missing}" if missing else f"names {wrong}"
            raise ValueError(f"`outputs` {what}. The model returns {list(reached)}.")
        return tuple(dict.fromkeys(p for task in chosen for p in given[task]))
    if all(task in reached for task in chosen):
        return tuple(place for place in reached if place in chosen)
    owners = {place: _owners(names, masks) for place, names in reached.items()}
    unclear = {place: tasks for place, tasks in owners.items() if len(tasks) != 1}
    missing = [task for task in chosen if [task] not in owners.values()]
    if unclear or missing or not reached:
        known = {place: f"depends on weights of {tasks} alone" for place, tasks in owners.items()}
        raise ValueError(
            f"Which outputs belong to {list(chosen)} is unclear: the model returns "
            + (f"{known}" if reached else "one tensor")
            + ". Let it return something for each task, and say which is whose: "
            f"outputs={{{chosen[0]!r}: ...}}."
        )
    return tuple(place for place, tasks in owners.items() if tasks[0] in chosen)


def _owners(names: Collection[str], masks: TaskMasks) -> list[str]:
    """The tasks that have a private layer among the names."""
    users = {name: [task for task, own in masks.items() if name in own] for name in names}
    owners = {tasks[0] for tasks in users.values() if len(tasks) == 1}
    return [task for task in masks if task in owners]


@torch.no_grad()
def _zero(model: nn.Module, chosen: Sequence[str], masks: TaskMasks) -> tuple[int, int, int]:
    """Zero the weights that none of the chosen tasks would keep.

    Returns:
        The number of weights that these tasks use, of those not zero before, and of those kept.
    """
    parameters = masked_parameters(model, masks)
    weights = before = kept = 0
    for name, mask in merged_task_masks(masks, chosen).items():
        weight = parameters[name]
        used = any(name in masks[task] for task in chosen)
        weights += weight.numel() * used
        before += int(weight.count_nonzero()) * used
        weight.copy_(zeroed(weight.detach(), mask.to(weight.device)))
        kept += int(weight.count_nonzero()) * used
    return weights, before, kept


def _leave_out(model: nn.Module, needed: Collection[int], batches: Sequence[Any]) -> list[str]:
    """Replace modules that the outputs do not need by `Absent`, and return their names.

    Args:
        model: The model, changed in place.
        needed: The ids of the parameters that the outputs depend on.
        batches: Example inputs.
    """
    expected = run(model, batches)
    called = _called(model, batches)

    def unchanged() -> bool:
        try:
            got = run(model, batches)
        except ValueError:
            return False
        return all(
            a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
            for a, b in (
                (dict(named_tensors(x)), dict(named_tensors(y)))
                for x, y in zip(expected, got, strict=True)
            )
        )

    def attempts(module: nn.Module, prefix: str) -> Iterator[str]:
        """Leave out the largest modules that can be left out."""
        for attribute, child in list(module.named_children()):
            name = f"{prefix}{attribute}"
            ids = [id(parameter) for parameter in child.parameters()]
            if all(i in needed for i in ids):
                continue
            if child in called and not any(i in needed for i in ids):
                absent = Absent()
                _substitute(model, child, absent)
                if unchanged():
                    yield name
                    continue
                _substitute(model, absent, child)
            yield from attempts(child, name + ".")

    return list(attempts(model, ""))


def _called(model: nn.Module, batches: Sequence[Any]) -> set[nn.Module]:
    """The modules that are called when the model runs."""
    called: set[nn.Module] = set()

    def record(module: nn.Module, args: Any) -> None:
        called.add(module)

    handles = [module.register_forward_pre_hook(record) for module in model.modules()]
    try:
        run(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    return called


def _substitute(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in all places of another one."""
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if child is old:
                parent._modules[attribute] = new


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN to NaN too."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
