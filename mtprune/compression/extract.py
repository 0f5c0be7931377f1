"""Extraction: of a model for many tasks, what some of them need.

The rule is the vote's own, counted again with fewer voters: a weight stays if one of the chosen
tasks would keep it alone. Other tasks' outputs are dropped, and with them the modules that serve
nothing else. Which those are is not guessed: one is left out, the model runs on the example inputs,
and the outputs that stay must be bitwise the same.
"""

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from mtprune.bits import zeroed
from mtprune.compression.running import call, named_tensors, run
from mtprune.model.graph import reachable
from mtprune.model.names import own_name
from mtprune.model.running import untouched
from mtprune.model.task_masks import TaskMasks, recall_task_masks

__all__ = ["Absent", "Place", "Places", "Subnetwork", "cut", "extract"]

Place = str | int
"""A key, field or index of what a model returns."""

Places = Mapping[str, Place | Collection[Place]]
"""For each task, where its outputs are."""


@dataclass(frozen=True)
class Subnetwork:
    """What was taken out of a model, for whom.

    Attributes:
        tasks: The tasks it is for.
        outputs: What is left of the model's outputs; None if all of it is.
        absent: Modules that were left out, because only other tasks need them.
        weights: How many prunable weights these tasks use.
        before: How many of them were not zero, for all tasks.
        kept: How many of them are not zero now.

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
        """The same in the model for all tasks."""
        return 1 - self.before / max(1, self.weights)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Subnetwork":
        """From plain data, as JSON holds it."""
        outputs = None if data["outputs"] is None else tuple(data["outputs"])
        names = {"tasks": tuple(data["tasks"]), "absent": tuple(data["absent"])}
        return cls(**{**data, **names, "outputs": outputs})

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
    """In place of a module that was left out: takes anything, returns None.

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
    """A dense copy with what some tasks need: other weights are zero, other outputs gone.

    Args:
        model: The model, finalized.
        batches: Example inputs.
        tasks: The tasks.
        task_masks: What each task alone would keep; what the model's pruner left, unless given.
        outputs: Which of the outputs belong to each task; found out unless given.

    Raises:
        ValueError: If it is unknown who voted for what, or which outputs belong to whom.
    """
    wishes = recall_task_masks(model) if task_masks is None else task_masks
    if wishes is None:
        raise ValueError(
            "`tasks` needs to know what each task voted for, and no pruner has left that for this "
            "model: it is a copy, was loaded, or its last update was before a checkpoint. Give "
            "task_masks=pruner.task_masks."
        )
    chosen = _chosen(tasks, wishes)
    work = copy.deepcopy(model).eval()
    run(work, batches)  # says what is wrong with the inputs
    reached = _reached(work, batches)
    places = None
    if set(chosen) != set(wishes):
        places = _places(chosen, wishes, {k: v for k, (v, _) in reached.items()}, outputs)
    weights, before, kept = _zero(work, chosen, wishes)
    part = Subnetwork(chosen, places, (), weights, before, kept)
    if places is None:
        return work, part
    needed = {i for place in places for i in reached[place][1]}
    cut(work, part)
    absent = _leave_out(work, needed, batches)
    return work, dataclasses.replace(part, absent=tuple(absent))


def cut(model: nn.Module, part: Subnetwork) -> None:
    """Leave modules out and drop outputs, in place.

    Raises:
        ValueError: If the model has no such modules.
    """
    known = dict(model.named_modules())
    for name in part.absent:
        if name not in known:
            raise ValueError(f"The plan is for another model: this one has no module '{name}'.")
        _hang(model, known[name], Absent())
    if part.outputs is not None:
        model.register_forward_hook(_Keep(part.outputs))


class _Keep:
    """Forward hook: some of the outputs. A hook, so that class and names stay the model's own."""

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
    """What a model returned, one level deep."""
    if isinstance(outputs, Mapping):
        yield from outputs.items()
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        for field in dataclasses.fields(outputs):
            yield field.name, getattr(outputs, field.name)
    elif hasattr(outputs, "_fields"):
        yield from zip(outputs._fields, outputs, strict=True)
    elif isinstance(outputs, (list, tuple)):
        yield from enumerate(outputs)


def _chosen(tasks: Sequence[str], wishes: TaskMasks) -> tuple[str, ...]:
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"`tasks` must be a list of some of {list(wishes)}. Got {tasks!r}.")
    unknown = [task for task in tasks if task not in wishes]
    if unknown:
        raise ValueError(f"`tasks` names {unknown}. Known here: {list(wishes)}.")
    return tuple(dict.fromkeys(tasks))


def _reached(model: nn.Module, batches: Sequence[Any]) -> dict[Place, tuple[set[str], set[int]]]:
    """For each of the outputs, the parameters that its graph leads to: by name, and by id."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    names = {id(p): own_name(model, name) for name, p in model.named_parameters()}
    found: dict[Place, tuple[set[str], set[int]]] = {}
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter.is_floating_point())
        for batch in batches:
            with untouched(model), torch.enable_grad():
                outputs = call(model, batch)
            for place, value in _entries(outputs):
                led, ids = found.setdefault(place, (set(), set()))
                for _, tensor in named_tensors(value):
                    reached = reachable(tensor) & names.keys()
                    led |= {names[i] for i in reached}
                    ids |= reached
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return found


def _places(
    chosen: Sequence[str],
    wishes: TaskMasks,
    led: Mapping[Place, Collection[str]],
    outputs: Places | None,
) -> tuple[Place, ...]:
    """The outputs that belong to the chosen tasks: as told, by name, or by what they depend on."""
    if outputs is not None:
        given = {t: (p,) if isinstance(p, (str, int)) else tuple(p) for t, p in outputs.items()}
        lacking = [task for task in chosen if not given.get(task)]
        wrong = [p for task in chosen for p in given.get(task, ()) if p not in led]
        if lacking or wrong:
            what = f"does not say for {lacking}" if lacking else f"names {wrong}"
            raise ValueError(f"`outputs` {what}. The model returns {list(led)}.")
        return tuple(dict.fromkeys(p for task in chosen for p in given[task]))
    if all(task in led for task in chosen):
        return tuple(place for place in led if place in chosen)
    owners = {place: _owners(names, wishes) for place, names in led.items()}
    unclear = {place: tasks for place, tasks in owners.items() if len(tasks) != 1}
    missing = [task for task in chosen if [task] not in owners.values()]
    if unclear or missing or not led:
        seen = {place: f"depends on weights of {tasks} alone" for place, tasks in owners.items()}
        raise ValueError(
            f"Which outputs belong to {list(chosen)} is unclear: the model returns "
            + (f"{seen}" if led else "one tensor")
            + ". Let it return something for each task, and say which is whose: "
            f"outputs={{{chosen[0]!r}: ...}}."
        )
    return tuple(place for place, tasks in owners.items() if tasks[0] in chosen)


def _owners(names: Collection[str], wishes: TaskMasks) -> list[str]:
    """The tasks of whose private layers some are among the names."""
    users = {name: [t for t, masks in wishes.items() if name in masks] for name in names}
    private = {tasks[0] for tasks in users.values() if len(tasks) == 1}
    return [task for task in wishes if task in private]


@torch.no_grad()
def _zero(model: nn.Module, chosen: Sequence[str], wishes: TaskMasks) -> tuple[int, int, int]:
    """Zero what none of the chosen tasks would keep; how many weights they use, had, and have."""
    parameters = {own_name(model, name): p for name, p in model.named_parameters()}
    weights = before = kept = 0
    for name in dict.fromkeys(name for masks in wishes.values() for name in masks):
        asked = [wishes[task][name] for task in chosen if name in wishes[task]]
        shape = tuple(next(masks[name] for masks in wishes.values() if name in masks).shape)
        weight = parameters.get(name)
        if weight is None or tuple(weight.shape) != shape:
            got = "no such parameter" if weight is None else f"shape {tuple(weight.shape)}"
            raise ValueError(
                f"`task_masks` are of another model: they have '{name}' with shape {shape}, and "
                f"this model has {got}."
            )
        mask = torch.zeros(shape, dtype=torch.bool)
        for wish in asked:
            mask |= wish.to(mask.device)
        if asked:
            weights += weight.numel()
            before += int(weight.count_nonzero())
        weight.copy_(zeroed(weight.detach(), mask.to(weight.device)))
        if asked:
            kept += int(weight.count_nonzero())
    return weights, before, kept


def _leave_out(model: nn.Module, needed: Collection[int], batches: Sequence[Any]) -> list[str]:
    """Replace modules that the outputs do not need by `Absent`; their names."""
    expected = run(model, batches)
    called = _called(model, batches)

    def same() -> bool:
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

    return list(_attempts(model, "", needed, called, same))


def _attempts(
    module: nn.Module,
    prefix: str,
    needed: Collection[int],
    called: Collection[nn.Module],
    same: Callable[[], bool],
    root: nn.Module | None = None,
) -> Iterator[str]:
    """Leave out the largest modules that can be."""
    root = module if root is None else root
    for attribute, child in list(module.named_children()):
        name = f"{prefix}{attribute}"
        ids = [id(parameter) for parameter in child.parameters()]
        if all(i in needed for i in ids):
            continue
        if child in called and not any(i in needed for i in ids):
            absent = Absent()
            _hang(root, child, absent)
            if same():
                yield name
                continue
            _hang(root, absent, child)
        yield from _attempts(child, name + ".", needed, called, same, root)


def _called(model: nn.Module, batches: Sequence[Any]) -> set[nn.Module]:
    """The modules that are called when the model runs."""
    found: set[nn.Module] = set()
    handles = [
        module.register_forward_pre_hook(partial(_note, found)) for module in model.modules()
    ]
    try:
        run(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _note(found: set[nn.Module], module: nn.Module, args: Any) -> None:
    found.add(module)


def _hang(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module wherever another one hangs."""
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if child is old:
                parent._modules[attribute] = new


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
