"""Reach: which task uses which layer, as seen in gradients.

The autograd graph alone does not tell: losses taken from a stack, or from a compiled model, lead
to every head. A task uses a layer if some gradient of its loss there was not zero. One observation
is enough where the graph says the same; where it does not, a second one is asked for. At the first
update the answer is settled, for good.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtprune.facts import Subject
from mtprune.model.components import assign
from mtprune.model.inventory import Inventory
from mtprune.model.layers import Layer
from mtprune.observing.evidence import Evidence
from mtprune.reading import Entry

__all__ = ["Reach", "Users"]

Users = Mapping[str, Tensor]
"""For each task, bool ``[layers]``: what it uses."""


class Reach:
    """Which task uses which layer: unknown, then settled.

    Args:
        inventory: What the model has to prune.

    Attributes:
        settled: What each task uses, or None while that is unknown.
        led: Where the graph of some loss led when that was settled, bool ``[layers]``, if known.
    """

    def __init__(self, inventory: Inventory) -> None:
        self._costs = inventory.costs
        self._layers = inventory.layers
        self._tasks = inventory.tasks
        self._declared = inventory.declared
        self._units = inventory.units
        self.settled: dict[str, Tensor] | None = None
        self.led: Tensor | None = None

    def is_clear(self, evidence: Evidence, task: str) -> bool:
        """Whether graph and gradients agree on what an observed task uses."""
        if self.settled is not None:
            return True
        return torch.equal(evidence.walked[task], self._reached(evidence, task))

    def now(self, evidence: Evidence) -> dict[str, Tensor]:
        """What each task uses, as far as the evidence goes."""
        if self.settled is not None:
            return self.settled
        reached = {task: self._reached(evidence, task) for task in self._tasks}
        return self._whole_units(reached, evidence.walked)

    def settle(self, evidence: Evidence) -> None:
        """Settle for good what each task uses.

        Raises:
            RuntimeError: If a module that was declared shared is not.

        Warns:
            UserWarning: If the graph leads where no gradient did.
        """
        if self.settled is not None:
            return
        reached = self.now(evidence)
        walked = {task: evidence.walked[task] for task in self._tasks}
        hidden = self._check_declared(reached, walked)
        reachable = torch.stack(list(walked.values())).any(0)
        lost = self._check_lost(reached, reachable)
        seen = torch.stack(list(reached.values())).any(0)
        if not bool(seen.any()):
            raise RuntimeError(
                "No task has a non-zero gradient in any prunable layer. Are the outputs detached, "
                "or all weights frozen or zero?"
            )
        hidden += [
            f"'{self._layers[i].name}'" for i in (reachable & ~seen).nonzero().flatten().tolist()
        ]
        hidden += self._undeclared(reached, walked, seen)
        self.settled, self.led = reached, reachable
        if lost:
            warnings.warn(
                f"No loss leads to {_few(lost)}, more weights than tasks share, so these do not "
                "take part. If the representation is detached there, observe losses whose graphs "
                "lead through it; if they are not in use, pass exclude=[...].",
                stacklevel=5,
            )
        if hidden:
            warnings.warn(
                f"The autograd graph leads to {', '.join(hidden)}, but no gradient there was other "
                "than zero, so these do not take part. A zero-initialised head hides the trunk at "
                "step 0: let the schedule begin a few steps later.",
                stacklevel=5,
            )

    def read(self, entry: Entry) -> dict[str, Tensor] | None:
        """What is settled, as a checkpoint holds it; nothing is changed.

        Raises:
            ValueError: If it is not that.
        """
        if entry.value is None:
            return None
        flags = {
            task: part.tensor((len(self._layers),), torch.bool).cpu().clone()
            for task, part in entry.fields(self._tasks).items()
        }
        if not any(bool(flag.any()) for flag in flags.values()):
            raise entry.wrong("must have a layer that some task uses")
        return {task: flags[task] for task in self._tasks}

    def read_led(self, entry: Entry, users: Users | None) -> Tensor | None:
        """Where graphs led, as a checkpoint holds it; nothing is changed.

        Args:
            entry: The entry.
            users: What the same checkpoint has settled.

        Raises:
            ValueError: If it is not that.
        """
        if entry.value is None:
            return None
        led = entry.tensor((len(self._layers),), torch.bool).cpu().clone()
        if users is None or any(bool((flags & ~led).any()) for flags in users.values()):
            raise entry.wrong("must have every layer that some task uses")
        return led

    def active(self, users: Users | None = None) -> list[tuple[int, Layer]]:
        """The layers that are pruned: all candidates until it is known who uses what."""
        users = self.settled if users is None else users
        if users is None:
            return list(enumerate(self._layers))
        used = torch.stack(list(users.values())).any(0)
        return [(i, layer) for i, layer in enumerate(self._layers) if used[i]]

    def subjects(self, users: Users) -> list[Subject]:
        """The layers that are pruned: component, tasks and cost of each."""
        using = {
            layer.name: [task for task in self._tasks if users[task][i]]
            for i, layer in enumerate(self._layers)
        }
        components = assign(list(using), using, self._declared, self._tasks)
        return [
            Subject(
                x.name,
                components[x.name],
                x.shape,
                tuple(using[x.name]),
                self._costs.get(x.name),
                x.layout,
            )
            for _, x in self.active(users)
        ]

    def left_alone(self) -> dict[str, str]:
        """Layers that are not pruned, and why."""
        if self.settled is None:
            return {}
        active = {layer.name for _, layer in self.active()}
        return {
            layer.name: self._why(i, layer)
            for i, layer in enumerate(self._layers)
            if layer.name not in active
        }

    def _why(self, index: int, layer: Layer) -> str:
        """Why a layer that no task has a gradient in is left alone."""
        if not layer.parameter.requires_grad:
            return "frozen"
        if self.led is not None and bool(self.led[index]):
            return "every gradient there was zero, though the graph of some loss leads there"
        return "no task uses it"

    def _reached(self, evidence: Evidence, task: str) -> Tensor:
        return evidence.reached(task, len(self._layers))

    def _whole_units(self, reached: Users, walked: Users) -> dict[str, Tensor]:
        """What tasks use, with the layers that take part for their units' sake.

        Where no task has a gradient yet, as behind a norm that starts at zero, a layer takes part
        if its units lie in layers that have one: a unit is kept or pruned as a whole.
        """
        completed = {task: flags.clone() for task, flags in reached.items()}
        if self._units is None or not self._units.spanning:
            return completed
        place = {layer.name: i for i, layer in enumerate(self._layers)}
        of_units = [place[layer.name] for layer in self._units.layers]
        unseen = ~torch.stack(list(reached.values())).any(0)
        for group in range(len(self._units.names)):
            members = [of_units[i] for i in self._units.holding(group)]
            waiting = [i for i in members if unseen[i]]
            for task, flags in reached.items():
                if task in walked and bool(flags[members].any()):
                    completed[task][waiting] = walked[task][waiting]
        return completed

    def _check_declared(self, reached: Users, walked: Users) -> list[str]:
        """Refuse what is not shared; name what the graph promises and no gradient bears out."""
        hidden = []
        for declared in self._declared:
            inside = torch.tensor([layer.name in declared.names for layer in self._layers])
            if not bool(inside.any()):
                continue  # no unit lies in it
            using = [task for task, flags in reached.items() if bool((flags & inside).any())]
            if len(using) < min(2, len(self._tasks)):
                leading = [task for task, flags in walked.items() if bool((flags & inside).any())]
                raise RuntimeError(_not_shared(declared.label, using, leading))
            hidden += [
                f"{declared.label} from task '{task}'"
                for task, flags in walked.items()
                if task not in using and bool((flags & inside).any())
            ]
        return hidden

    def _check_lost(self, reached: Users, reachable: Tensor) -> list[str]:
        """Layers that no loss leads to, if they are more than what tasks share.

        That is how a detached trunk looks. A layer that is not in use looks alike, but is smaller,
        as a rule.

        Raises:
            RuntimeError: If nothing was declared, tasks share nothing, and no loss leads to most of
                the weights that are trained.
        """
        sizes = [x.parameter.numel() * x.parameter.requires_grad for x in self._layers]
        several = min(2, len(reached))
        using = torch.stack(list(reached.values())).sum(0).tolist()
        led = [a or b for a, b in zip(reachable.tolist(), using, strict=True)]
        lost = [i for i, size in enumerate(sizes) if size and not led[i]]
        shared = sum(size for size, users in zip(sizes, using, strict=True) if users >= several)
        gone = sum(sizes[i] for i in lost)
        names = [f"'{self._layers[i].name}'" for i in lost]
        if not self._declared and several > 1 and not shared and 2 * gone > sum(sizes):
            raise RuntimeError(
                f"No task uses {_few(names)}, and tasks share nothing. Is the "
                "representation detached, as where its gradient is taken apart from that of the "
                "heads? Observe losses whose graphs lead through it; if it is not in use, pass "
                "exclude=[...]."
            )
        return names if gone > shared else []

    def _undeclared(self, reached: Users, walked: Users, seen: Tensor) -> list[str]:
        """Where a task's graph leads to others' weights, but no gradient of its own does."""
        first, *others = walked.values()
        if all(torch.equal(first, other) for other in others):
            return []  # losses from one stack, or a compiled graph: it leads everywhere
        declared = {name for d in self._declared for name in d.names}
        return [
            f"'{self._layers[i].name}' from task '{task}'"
            for task, flags in walked.items()
            for i in (flags & ~reached[task] & seen).nonzero().flatten().tolist()
            if self._layers[i].name not in declared
        ]


def _few(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _not_shared(label: str, using: Sequence[str], leading: Sequence[str]) -> str:
    """The message for a module that was declared shared and is not.

    Args:
        label: The module.
        using: The tasks that use it.
        leading: The tasks whose graphs lead there.
    """
    if using:
        start = f"Shared {label} is used by task '{using[0]}' alone: no other task has a "
        end = " If it is private, leave it out of `shared_modules`."
        if set(leading) <= set(using):
            return (
                f"{start}loss whose graph leads there. Are the others' representations detached? "
                f"Their heads, if zero-initialised, would not cut the graph.{end}"
            )
        return (
            f"{start}non-zero gradient there, though graphs lead there. Are the others' "
            f"representations detached in a compiled graph, or their heads zero-initialised?{end}"
        )
    start = f"Shared {label} is used by no task: "
    if not leading:
        return (
            f"{start}no loss has a graph that leads there. Is the representation detached, or the "
            "module not in use? Heads, if zero-initialised, would not cut the graph."
        )
    return (
        f"{start}every gradient there is zero, though graphs lead there. Is the representation "
        "detached in a compiled graph, or are all heads zero-initialised (then let the schedule "
        "begin a few steps later)?"
    )
