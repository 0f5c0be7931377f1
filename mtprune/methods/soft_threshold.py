r"""`SoftThreshold`: weights shrink by thresholds that are learned, to an exact sparsity.

A group of layers, a component or a single layer, has the threshold

.. math:: \tau_c = \rho_c \exp(b + \delta_c)

with :math:`\rho_c` the root mean square of its weights, one common level b and an offset
:math:`\delta_c`. The level decides how much is pruned. It belongs to the schedule, not to an
optimizer, so that neither learning rate nor weight decay moves it. The offsets decide where.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from mtprune import checks
from mtprune.allocation import Budget, ByComponent
from mtprune.census import Census
from mtprune.facts import Subject
from mtprune.holding import Hold, MaskHold, Masking, Phased
from mtprune.holding.soft import EDGE, SoftHold, SoftThresholds, Watch
from mtprune.holding.thresholds import nearest_threshold, shrinkage
from mtprune.methods.base import Ballot, Method, Needs
from mtprune.methods.controller import pi_step
from mtprune.model.inventory import Inventory
from mtprune.model.layers import Layer
from mtprune.reading import Entry
from mtprune.schedule import Cubic, Regrow, Rounds, Schedule
from mtprune.selection import Quota, waterline
from mtprune.statistics import PerWeight
from mtprune.weighting import PruningSensitivity, parse_weighting

__all__ = ["SoftThreshold"]

_FARTHEST = 2.5  # offsets stay within e^-2.5 .. e^2.5: a threshold at most 150 times another


def _sum(layer: Layer, score: Tensor) -> Tensor:
    """A layer's saliency as one number."""
    return score.sum().reshape(1)


def _growth(weight: Tensor, grad: Tensor) -> Tensor:
    """The part of each weight in the derivative of the loss in its layer's gain, times that."""
    return weight * grad


@dataclass(frozen=True)
class SoftThreshold(Method[SoftThresholds]):
    """Prune by soft thresholds that rise with the schedule, to an exact sparsity.

    While thresholds rise every weight is shrunk by its group's threshold, and is zero below it. At
    the last update what is below is pruned for good, and what is left stays as it is.

    After Xiang et al., "AdapMTL: adaptive pruning framework for multitask learning model", ACM MM
    2024, whose thresholds are weights of the optimizer, and whose sparsity is what comes out.

    Attributes:
        sparsity: Share of zeros in the end, in [0, 1).
        schedule: When thresholds change, and when they are fixed.
        per: What shares a threshold: a ``"component"`` or a ``"layer"``.
        allocation: Offsets of the log-thresholds: ``"uniform"`` (none), ``"learned"`` from the
            gradients (a weight at the edge should be worth the same everywhere), or a mapping
            component -> offset.
        grad_mode: Which gradient weights below the threshold get: ``"str"`` none, as published;
            ``"ste"`` all of it, so that they can come back; ``"anneal"`` ever less of it.
        control: ``"exact"`` sets the level by order statistic at every update; ``"pi"`` by a
            controller that only counts, and exactly at the last update.
        budget_unit: What ``sparsity`` is a share of: ``"params"``, ``"macs"`` (multiply-adds on
            ``example_inputs``), or a mapping component -> sparsity that refines it.
        example_inputs: What the model is called with to measure multiply-adds: a tensor, a tuple of
            arguments, or a dict of keyword arguments.
        max_sparsity: The most a component is pruned, one number or a mapping component -> number;
            unless given, every component keeps a tenth of the overall density.
        weighting: What `MultitaskPruner.weigh` does: ``"uniform"``, ``"noise"``,
            ``"pruning_sensitivity"``, ``"worst"``, any weighting (`mtprune.weighting`), or a module
            that makes one loss of a vector of losses, such as a scalarizer of torchjd.
        debias: Multiply what is left of every layer so that it is as large, in Euclidean norm, as
            before. A threshold shrinks all weights, the large ones too; without this a network that
            cannot grow them back, for lack of steps or learning rate, is damaged for good.
        scale: Thresholds in units of the group's root mean square, ``"rms"``, or plain, ``"none"``.
        rate: How fast offsets are learned, per update.
        observations: How many observations of every task an update needs.

    Example:
        >>> SoftThreshold(0.9, schedule=Cubic(begin=0, end=500, every=10)).max_of("shared")
        0.99
    """

    sparsity: float
    schedule: Schedule = field(default_factory=lambda: Cubic(begin=0, end=1_000, every=10))
    per: Literal["component", "layer"] = "component"
    allocation: Literal["uniform", "learned"] | Mapping[str, float] = "uniform"
    grad_mode: Literal["str", "ste", "anneal"] = "ste"
    control: Literal["exact", "pi"] = "exact"
    budget_unit: Literal["params", "macs"] | Mapping[str, float] = "params"
    example_inputs: Any = field(default=None, repr=False, compare=False)
    max_sparsity: float | Mapping[str, float] | None = None
    weighting: Any = "uniform"
    debias: bool = False
    scale: Literal["rms", "none"] = "rms"
    rate: float = 0.02
    observations: int = 1

    def __post_init__(self) -> None:
        """Validate."""
        checks.sparsity("sparsity", self.sparsity)
        must = "must be a schedule such as Cubic(...)"
        checks.object_with("schedule", self.schedule, "next_update", must=must)
        if isinstance(self.schedule, Rounds):
            raise ValueError(
                "Rounds prune before training, and thresholds rise while weights train. Take "
                "schedule=Cubic(begin=..., end=..., every=...)."
            )
        if isinstance(self.schedule, Regrow):
            raise ValueError(
                "Regrow is sparse training at constant sparsity. Thresholds need a schedule that "
                "ends: Cubic(...), Linear(...) or OneShot(...)."
            )
        checks.one_of("per", self.per, ("component", "layer"))
        checks.one_of("grad_mode", self.grad_mode, ("str", "ste", "anneal"))
        checks.one_of("control", self.control, ("exact", "pi"))
        checks.one_of("scale", self.scale, ("rms", "none"))
        if isinstance(self.allocation, Mapping):
            must = "must be a number, the offset of its log-threshold"
            why = "an offset of 1 makes a threshold 2.7 times as large"
            for component, offset in self.allocation.items():
                of = f" of '{component}'"
                checks.number("allocation", offset, of=of, must=must)
                checks.inside("allocation", offset, "[-20, 20]", of=of, why=why)
        else:
            other = "a mapping component -> offset"
            checks.either("allocation", self.allocation, ("uniform", "learned"), other)
        if isinstance(self.budget_unit, Mapping):
            for component, sparsity in self.budget_unit.items():
                checks.sparsity(f"budget_unit[{component!r}]", sparsity)
        else:
            other = "a mapping component -> sparsity"
            checks.either("budget_unit", self.budget_unit, ("params", "macs"), other)
        if self.budget_unit == "macs" and self.example_inputs is None:
            raise ValueError(
                "budget_unit='macs' needs `example_inputs`: what the model is called with."
            )
        caps = self.max_sparsity
        if isinstance(caps, Mapping):
            given = {component: cap for component, cap in caps.items() if cap is not None}
            for component, cap in given.items():
                checks.inside("max_sparsity", cap, "(0, 1]", of=f"[{component!r}]")
        elif caps is not None:
            checks.inside("max_sparsity", caps, "(0, 1]")
        if isinstance(caps, (int, float)) and self.budget_unit == "params" and caps < self.sparsity:
            raise ValueError(_unreachable(self.sparsity, caps))
        parse_weighting(self.weighting)
        checks.inside("rate", self.rate, "(0, 1)")
        checks.whole("observations", self.observations, least=1, must="must be at least 1")

    @override
    def needs(self, inventory: Inventory) -> Needs:
        statistics = {"saliency": PerWeight(shrinkage, _sum)} if self._weighs else {}
        if self._weighs and self.debias:
            statistics["growth"] = PerWeight(_growth, _sum)
        return Needs(
            statistics=statistics,
            observations=self.observations,
            macs=self.budget_unit == "macs",
            example_inputs=self.example_inputs,
        )

    @override
    def check(self, inventory: Inventory) -> None:
        known = inventory.components
        inventory.check_names("allocation", self.allocation, known)
        inventory.check_names("budget_unit", self.budget_unit, known)
        inventory.check_names("max_sparsity", self.max_sparsity, known)
        self._check_reach(*inventory.sizes())

    @override
    def needs_whole(self, inventory: Inventory) -> str:
        return ""

    @override
    def promised(self, subjects: Sequence[Subject], step: int) -> Sequence[Quota]:
        if self.budget_unit == "macs" or self.schedule.next_update(step) is not None:
            return ()
        total = sum(prod(subject.shape) for subject in subjects)
        keep = total - round(self.sparsity * self.schedule.progress(step) * total)
        return [Quota(tuple(range(len(subjects))), keep, (0,) * len(subjects))]

    @override
    def recall(self, memory: Entry, layers: Sequence[Layer]) -> Mapping[str, Any]:
        """See `Method`."""
        per_name = ("offsets", "first", "slopes", "thresholds", "gains")
        numbers = ("level", "trim", "smooth", "wanted")
        found: dict[str, Any] = {}
        for name, part in memory.mapping([*per_name, *numbers]).items():
            if name in per_name:
                found[name] = {key: value.number() for key, value in part.mapping().items()}
            else:
                found[name] = part.optional(Entry.number)
        if "wanted" in found:
            memory["wanted"].number(0.0, 1.0)
            memory["trim"].number()
        for name in ("thresholds", "gains"):
            for part in memory[name].mapping().values() if name in found else ():
                part.number(least=0.0)
        return found

    @override
    def hold(self, masks: Masking, optimizer: Optimizer | None) -> Hold[SoftThresholds]:
        return Phased(SoftHold(masks, self._watch), MaskHold(masks))

    @property
    def _weighs(self) -> bool:
        """Whether the losses are asked about thresholds, to weigh the tasks."""
        return isinstance(parse_weighting(self.weighting), PruningSensitivity)

    @property
    def _watch(self) -> Watch | None:
        """The gradients just above the thresholds, if offsets are learned."""
        return "edge" if self.allocation == "learned" else None

    @property
    def needs_costs(self) -> bool:
        """Whether the budget is one of multiply-adds."""
        return self.budget_unit == "macs"

    def max_of(self, component: str) -> float:
        """The most a component is pruned."""
        given = self.max_sparsity
        if isinstance(given, Mapping):
            given = given.get(component)
        return 1.0 - (1.0 - self.sparsity) / 10 if given is None else given

    def _check_reach(self, sizes: Mapping[str, int], others: int) -> None:
        """Refuse caps that leave the target out of reach, as far as components are known.

        Args:
            sizes: How many weights the known components have.
            others: How many there are in components not yet known.

        Raises:
            ValueError: If no distribution of the budget respects the caps.
        """
        if self.budget_unit != "params" or self.max_sparsity is None:
            return
        most = sum(math.floor(self.max_of(name) * n) for name, n in sizes.items())
        caps = self.max_sparsity.values() if isinstance(self.max_sparsity, Mapping) else ()
        most += math.floor(max([self.max_of(""), *caps]) * others)
        total = sum(sizes.values()) + others
        if round(self.sparsity * total) > most:
            raise ValueError(_unreachable(self.sparsity, most / total))

    @override
    def decide(self, ballot: Ballot, step: int) -> SoftThresholds:
        """The thresholds of the update of ``step``; in the end, also what is pruned for good."""
        progress = self.schedule.progress(step)
        settled = self.schedule.next_update(step) is None
        groups = ballot.components if self.per == "component" else ballot.names
        units = [self._unit(ballot, groups, group, progress > 0) for group in dict.fromkeys(groups)]
        unit = dict(zip(dict.fromkeys(groups), units, strict=True))
        memory = dict(ballot.memory)
        if self._watch:
            memory.update(self._learn(ballot, groups, unit, memory))
        offsets = memory.get("offsets", {})
        factors = []
        for component, group in zip(ballot.components, groups, strict=True):
            offset = offsets.get(group, 0.0)
            if isinstance(self.allocation, Mapping):
                offset = self.allocation.get(component, 0.0)
            factors.append(unit[group] * math.exp(offset))
        heights = [_heights(w, f) for w, f in zip(ballot.weights, factors, strict=True)]
        if self.control == "pi" and not settled:
            masks, level = self._steer(ballot, heights, progress, memory)
        else:
            masks = self._cut(ballot, heights, progress)
            under = [h[~m].amax().cpu() for h, m in zip(heights, masks, strict=True) if not m.all()]
            highest = torch.stack([*under, torch.zeros(())]).amax().to(heights[0].device)
            level = float(ballot.census.most(highest))
        memory["level"] = math.log(level) if level else None
        taus = [
            nearest_threshold(w.abs(), m, level * f, ballot.census)
            for w, m, f in zip(ballot.weights, masks, factors, strict=True)
        ]
        memory["slopes"] = self._sensitivities(ballot)
        memory["thresholds"] = dict(zip(ballot.names, map(float, taus), strict=True))
        leak = {"str": 0.0, "ste": 1.0, "anneal": 1.0 - progress}[self.grad_mode]
        gains = None
        if self.debias:
            gains = [_gain(w, t, ballot.census) for w, t in zip(ballot.weights, taus, strict=True)]
            memory["gains"] = dict(zip(ballot.names, map(float, gains), strict=True))
        return SoftThresholds(
            masks, thresholds=taus, leak=leak, gains=gains, final=settled, memory=memory
        )

    def _unit(self, ballot: Ballot, groups: Sequence[str], group: str, needed: bool) -> float:
        """What a group's thresholds are measured in: the root mean square of its weights."""
        weights = [w for w, g in zip(ballot.weights, groups, strict=True) if g == group]
        here = sum(float(w.to(torch.float32).square().sum(dtype=torch.float64)) for w in weights)
        squares = ballot.census.number(here, weights[0])
        shapes = [s for s, g in zip(ballot.shapes, groups, strict=True) if g == group]
        rms = math.sqrt(squares / sum(map(prod, shapes)))
        if not math.isfinite(rms):
            raise RuntimeError(
                f"Weights of '{group}' are not finite. Check the training; thresholds are "
                "unchanged."
            )
        if rms == 0.0 and needed:
            raise RuntimeError(
                f"Weights of '{group}' are all zero, so no threshold tells them apart. If they "
                "start at zero, let the schedule begin a few steps later."
            )
        return rms if self.scale == "rms" and rms else 1.0

    def _cut(self, ballot: Ballot, heights: Sequence[Tensor], progress: float) -> list[Tensor]:
        """What is above the level that prunes exactly what is due."""
        masks = [torch.ones_like(h, dtype=torch.bool) for h in heights]
        for layers, budget, costs in self._budgets(ballot, progress):
            groups, least = self._protected(ballot, layers)
            try:
                own = [heights[i] for i in layers]
                kept = waterline(own, budget, costs, groups, least, ballot.census)
            except ValueError:
                raise RuntimeError(self._out_of_reach(ballot)) from None
            for i, mask in zip(layers, kept, strict=True):
                masks[i] = mask
        return masks

    def _budgets(
        self, ballot: Ballot, progress: float
    ) -> list[tuple[Sequence[int], Fraction | int, Sequence[Fraction | int]]]:
        """Layers that share a level, what they may lose together, and what each weight counts."""
        everything = range(len(ballot.shapes))
        sizes = [prod(shape) for shape in ballot.shapes]
        if self.budget_unit == "macs":
            total = sum((n * c for n, c in zip(sizes, ballot.costs, strict=True)), Fraction(0))
            share = Fraction(self.sparsity * progress)
            return [(everything, round(share * total), list(ballot.costs))]
        zeros = round(self.sparsity * progress * sum(sizes))
        if not isinstance(self.budget_unit, Mapping):
            return [(everything, zeros, [1] * len(sizes))]
        quotas = (
            ByComponent(self.budget_unit)
            .at(progress)
            .quotas(Budget(ballot.shapes, ballot.components, sum(sizes) - zeros, sizes))
        )
        return [
            (q.layers, sum(sizes[i] for i in q.layers) - q.keep, [1] * len(q.layers))
            for q in quotas
        ]

    def _protected(
        self, ballot: Ballot, layers: Sequence[int]
    ) -> tuple[list[list[int]], list[int]]:
        """Sets of layers, by their place in ``layers``, and how many weights each must keep."""
        sizes = [prod(ballot.shapes[i]) for i in layers]
        groups, least = [], []
        named = isinstance(self.budget_unit, Mapping)
        for component in dict.fromkeys(ballot.components[i] for i in layers):
            members = [p for p, i in enumerate(layers) if ballot.components[i] == component]
            size = sum(sizes[p] for p in members)
            groups.append(members)
            # A component with a sparsity of its own is asked to be that sparse.
            cap = 1.0 if named else self.max_of(component)
            least.append(size - math.floor(Fraction(str(cap)) * size))
        if self.max_sparsity is None and sum(least) > sum(sizes) - round(
            self.sparsity * sum(sizes)
        ):
            # Nobody asked for caps: there are fewer weights to keep than components.
            least = [0] * len(least)
        if sum(sizes) - round(self.sparsity * sum(sizes)) >= len(sizes):
            groups += [[p] for p in range(len(sizes))]
            least += [1] * len(sizes)
        return groups, least

    def _out_of_reach(self, ballot: Ballot) -> str:
        sizes = [prod(shape) for shape in ballot.shapes]
        costs = list(ballot.costs) or [Fraction(1)] * len(sizes)
        most = 0.0
        for component in dict.fromkeys(ballot.components):
            own = [i for i, name in enumerate(ballot.components) if name == component]
            size = sum(sizes[i] for i in own)
            # Whole weights are pruned, the dear ones first.
            left = size - math.floor(Fraction(str(self.max_of(component))) * size)
            for i in sorted(own, key=lambda i: costs[i]):
                kept = min(left, sizes[i])
                most += float(costs[i]) * (sizes[i] - kept)
                left -= kept
        total = sum(float(c) * n for c, n in zip(costs, sizes, strict=True))
        return _unreachable(self.sparsity, most / total)

    def _steer(
        self,
        ballot: Ballot,
        heights: Sequence[Tensor],
        progress: float,
        memory: dict[str, Any],
    ) -> tuple[list[Tensor], float]:
        """What is above a level that a controller sets from counts alone."""
        wanted = self.sparsity * progress
        if wanted == 0.0:
            return [torch.ones_like(h, dtype=torch.bool) for h in heights], 0.0
        # Where the line would be if weights were normally distributed, and how far off that is.
        guess = torch.special.ndtri(torch.tensor((1 + wanted) / 2, dtype=torch.float64))
        trim = memory.get("trim", 0.0)
        if "wanted" in memory:
            costs = list(ballot.costs) or [Fraction(1)] * len(heights)
            sizes = [prod(shape) for shape in ballot.shapes]
            rows = list(zip(costs, sizes, ballot.kept, strict=True))
            lost = sum(float(c) * (size - kept) for c, size, kept in rows)
            total = sum(float(c) * size for c, size, _ in rows)
            trim, memory["smooth"] = pi_step(
                trim, memory.get("smooth"), memory["wanted"], lost / total
            )
        memory["trim"], memory["wanted"] = trim, wanted
        level = math.log(max(float(guess), 1e-12)) + trim
        masks = [h > math.exp(level) for h in heights]
        groups, least = self._protected(ballot, range(len(heights)))
        for members, count in zip(groups, least, strict=True):
            if sum(ballot.census.count([masks[i] for i in members])) < count:
                own = [heights[i] for i in members]
                lowest = sum(prod(ballot.shapes[i]) for i in members) - count
                highest = waterline(own, lowest, [1] * len(own), census=ballot.census)
                for i, kept in zip(members, highest, strict=True):
                    masks[i] = masks[i] | kept
        return masks, math.exp(level)

    def _learn(
        self,
        ballot: Ballot,
        groups: Sequence[str],
        unit: Mapping[str, float],
        memory: Mapping[str, Any],
    ) -> dict[str, Any]:
        r"""Move offsets until a weight at the edge is worth the same in every group.

        With :math:`m_c` weights at the edge of a group, and :math:`p_c` the mean of
        :math:`|\partial L / \partial w|` over them, the step is along
        :math:`\log(\bar p / p_c)`, less what would change the number of weights pruned,
        :math:`\sum m_c \delta_c`. Where p is the same everywhere no exchange of weights between
        groups would gain anything. The scale of the losses drops out.
        """
        names = list(dict.fromkeys(groups))
        worth = dict.fromkeys(names, 0.0)
        mass = dict.fromkeys(names, 1e-12)
        offsets = memory.get("offsets", {})
        level = memory.get("level")
        if level is None or not any(ballot.noted):
            return {}
        for group, weight, found in zip(groups, ballot.weights, ballot.noted, strict=True):
            line = unit[group] * math.exp(level + offsets.get(group, 0.0))
            size = weight.abs()
            worth[group] += found
            [edge] = ballot.census.count([(size > line) & (size < (1 + EDGE) * line)])
            mass[group] += edge
        whole = sum(mass.values())
        usual = sum(worth.values()) / whole
        way = {
            n: math.log(usual * mass[n] / worth[n]) if mass[n] >= 1 and worth[n] > 0 else 0.0
            for n in names
        }
        first = {n: 0.9 * memory.get("first", {}).get(n, 0.0) + 0.1 * way[n] for n in names}
        steps = {n: self.rate * first[n] for n in names}
        drift = sum(mass[n] * steps[n] for n in names) / whole
        moved = {n: offsets.get(n, 0.0) + steps[n] - drift for n in names}
        bounded = {n: max(-_FARTHEST, min(_FARTHEST, offset)) for n, offset in moved.items()}
        return {"offsets": bounded, "first": first}

    def _sensitivities(self, ballot: Ballot) -> dict[str, float]:
        r"""For each task, the derivative of its log-loss in the common log-threshold.

        A weight above the threshold is seen as :math:`G\,S` with the gain G and
        :math:`S = \operatorname{sign}(w)(|w| - \tau)`; its gradient, that of S, has G in it. Where
        nothing is given back, G is 1 for good. Otherwise it grows with the threshold, by

        .. math:: \frac{\partial \log G}{\partial \tau} =
            \frac{\sum (|w| - \tau)}{\sum (|w| - \tau)^2}
        """
        if not self._weighs:
            return {}
        taus, gains = ballot.memory.get("thresholds", {}), ballot.memory.get("gains", {})
        slopes: dict[str, float] = {}
        for place, name in enumerate(ballot.names):
            tau = taus.get(name, 0.0)
            for task, score in ballot.scores[place].items():
                slopes[task] = slopes.get(task, 0.0) + tau * float(score)
            if tau and self.debias:
                left = (ballot.weights[place].to(torch.float32).abs() - tau).clamp(min=0.0)
                sums = ballot.census.sum(torch.stack([left.sum(), left.square().sum()]))
                rise = float(sums[0] / sums[1].clamp(min=1e-30))
                for task, growth in ballot.statistics["growth"][place].items():
                    slopes[task] += tau * rise * float(growth) / gains.get(name, 1.0)
        return {
            task: slope / abs(ballot.losses[task])
            for task, slope in slopes.items()
            if ballot.losses.get(task)
        }


def _heights(weight: Tensor, factor: float) -> Tensor:
    """How large weights are, in units of their group's threshold: what the level is compared to."""
    return weight.to(torch.float32).abs() / factor


def _gain(weight: Tensor, tau: Tensor, census: Census) -> Tensor:
    """What makes the weights above a threshold as large again as before it, 0-dim."""
    size = weight.to(torch.float32).abs()
    norms = torch.stack([size[size > tau].norm(), (size - tau).clamp(min=0.0).norm()])
    if census.is_scattered:
        norms = census.sum(norms.square()).sqrt()
    before, after = norms
    return torch.where(after > 0, before / after.clamp(min=1e-30), 1.0)


def _unreachable(sparsity: float, most: float) -> str:
    return (
        f"sparsity={sparsity:g} is out of reach with this `max_sparsity`: at most {most:.6g}. "
        "Raise the caps or ask for less."
    )
