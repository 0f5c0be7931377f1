"""Budget: the parameters of a model, and the best ensemble of single-task models of equal size.

Whether one multitask model beats several small ones depends on which parameters are counted. A
count names its rule, and always shows the other rules beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from torch import nn

from mtprune import checks
from mtprune.holding.hidden import prunable
from mtprune.model.names import unwrap
from mtprune.model.selectors import Spec

__all__ = ["RULES", "Ensemble", "Size", "best_ensemble", "count", "equal_split"]

Rule = Literal["encoder_linear", "encoder", "total"]
Curves = Mapping[str, Mapping[int, float]]

RULES: tuple[Rule, ...] = ("encoder_linear", "encoder", "total")
"""The rules of counting, from the narrowest to the widest."""


@dataclass(frozen=True)
class Size:
    """The number of parameters of a model, before and after pruning. Prints both, by all rules.

    Attributes:
        what: The rule that counts.
        dense: Parameters before pruning.
        kept: Parameters after pruning.
        by_rule: ``{rule: (dense, kept)}``.

    Example:
        >>> print(Size("total", dense=22_713_216, kept=13_158_067))
        * total               22,713,216 dense      13,158,067 kept   57.93%
    """

    what: Rule
    dense: int
    kept: int
    by_rule: Mapping[Rule, tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        """A line for each rule; the one that counts is marked."""
        rules = dict(self.by_rule) or {self.what: (self.dense, self.kept)}
        lines = []
        for rule, (dense, kept) in rules.items():
            mark = "*" if rule == self.what else " "
            share = kept / dense if dense else 1.0
            lines.append(f"{mark} {rule:14} {dense:>15,} dense {kept:>15,} kept  {share:7.2%}")
        return "\n".join(lines)


def count(
    model: nn.Module,
    what: Rule = "encoder_linear",
    *,
    encoder: nn.Module | str | None = None,
    include: Spec = (),
) -> Size:
    """The number of parameters that a model has and keeps.

    ``"encoder_linear"`` counts the weights of the encoder's linear layers and attention,
    ``"encoder"`` everything in the encoder, ``"total"`` the heads too. A tied parameter counts
    once. Prunable weights that are masked, or exactly zero, are not kept. All other parameters are
    kept, biases, norms and embeddings for instance.

    Args:
        model: The model, while it is pruned or after `finalize`.
        what: The rule that counts.
        encoder: The encoder: a module of the model, or its name.
        include: Other layers that were pruned, as for `MultitaskPruner`.

    Example:
        >>> import torch
        >>> model = nn.ModuleDict({"encoder": nn.Linear(4, 8), "head": nn.Linear(8, 1)})
        >>> with torch.no_grad():
        ...     _ = model["encoder"].weight[:4].zero_()
        >>> print(count(model, encoder="encoder"))
        * encoder_linear              32 dense              16 kept   50.00%
          encoder                     40 dense              24 kept   60.00%
          total                       49 dense              33 kept   67.35%
    """
    checks.one_of("what", what, RULES)
    if encoder is None and what != "total":
        raise ValueError(
            f"what={what!r} needs `encoder`: the module in the model that is the encoder, or its "
            "name."
        )
    model = unwrap(model)
    kept = {id(p): p.numel() for p in model.parameters()}
    dense = dict(kept)
    for parameter, mask in prunable(model, include):
        kept[id(parameter)] = int((parameter.detach() if mask is None else mask).count_nonzero())
    counted: dict[Rule, set[int]] = {}
    if encoder is not None:
        part = _part(model, encoder)
        counted["encoder_linear"] = {
            id(parameter)
            for module in part.modules()
            if isinstance(module, (nn.Linear, nn.MultiheadAttention))
            for name, parameter in module.named_parameters(recurse=False)
            if name.removesuffix("_orig").endswith("weight")
        }
        counted["encoder"] = {id(parameter) for parameter in part.parameters()}
    counted["total"] = set(dense)
    by_rule = {
        rule: (sum(dense[i] for i in ids), sum(kept[i] for i in ids))
        for rule, ids in counted.items()
    }
    return Size(what, *by_rule[what], by_rule)


def _part(model: nn.Module, encoder: nn.Module | str) -> nn.Module:
    if isinstance(encoder, str):
        named: dict[str, nn.Module] = dict(model.named_modules())
        if encoder not in named:
            raise ValueError(
                f"`encoder` names no module of this model. Got {encoder!r}; at its top there are "
                f"{[name for name, _ in model.named_children()]}."
            )
        return named[encoder]
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"`encoder` must be a module or its name. Got {encoder!r}.")
    part = unwrap(encoder)
    if all(part is not module for module in model.modules()):
        raise ValueError(
            f"`encoder` is no part of this model. Got a {type(part).__name__} that is not among "
            "model.modules()."
        )
    return part


@dataclass(frozen=True)
class Ensemble:
    """One single-task model for each task, together within a budget.

    Attributes:
        sizes: The size of each task's model.
        scores: Its score.
        budget: The most that all models may take together.

    Example:
        >>> ensemble = Ensemble({"sst2": 10, "trec": 30}, {"sst2": 0.5, "trec": 1.0}, budget=50)
        >>> ensemble.size, ensemble.score
        (40, 0.75)
    """

    sizes: Mapping[str, int]
    scores: Mapping[str, float]
    budget: int

    @property
    def size(self) -> int:
        """The size of all models together."""
        return sum(self.sizes.values())

    @property
    def score(self) -> float:
        """The mean score of the tasks."""
        return float(sum(map(Fraction, self.scores.values())) / len(self.scores))

    def __str__(self) -> str:
        """A line for each task, and one for all."""
        rows = [(task, self.sizes[task], self.scores[task]) for task in self.sizes]
        rows.append((f"all, of {self.budget:,}", self.size, self.score))
        wide = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{name:{wide}} {size:>15,} {score:10.4f}" for name, size, score in rows)


def best_ensemble(curves: Curves, budget: int) -> Ensemble:
    r"""The single-task models that score best on average within a common budget.

    Solves :math:`\max \sum_k c_k(s_k)` over one measured size :math:`s_k` for each task with
    :math:`\sum_k s_k \le B`, exactly: the knapsack with one choice from every group, by dynamic
    programming over the undominated (size, score) pairs. Among equal scores the smaller ensemble is
    taken; among those the one whose sizes come first, tasks in order of their names. Scores are
    compared without rounding.

    Args:
        curves: ``{task: {size: score}}``, higher scores better, sizes by one rule for all.
        budget: The most that all models may take together.

    Example:
        >>> curves = {"sst2": {10: 0.80, 20: 0.84, 40: 0.86}, "trec": {10: 0.60, 30: 0.90}}
        >>> ensemble = best_ensemble(curves, budget=50)
        >>> dict(ensemble.sizes), round(ensemble.score, 3)
        ({'sst2': 20, 'trec': 30}, 0.87)
    """
    _check(curves, budget)
    least = sum(min(curve) for curve in curves.values())
    if least > budget:
        raise ValueError(
            f"`budget` {budget:,} is too small for one model per task. The smallest measured take "
            f"{least:,} together."
        )
    order = sorted(curves)
    # Undominated pairs of size and score, both increasing, each with the sizes chosen so far.
    front: list[tuple[int, Fraction, tuple[int, ...]]] = [(0, Fraction(0), ())]
    reserve = least
    for task in order:
        reserve -= min(curves[task])
        offers = [
            (size + more, score + Fraction(value), (*chosen, more))
            for size, score, chosen in front
            for more, value in curves[task].items()
            if size + more + reserve <= budget
        ]
        offers.sort(key=lambda offer: (offer[0], -offer[1], offer[2]))
        front = []
        for offer in offers:
            if not front or offer[1] > front[-1][1]:
                front.append(offer)
    chosen = dict(zip(order, front[-1][2], strict=True))
    return _ensemble(curves, chosen, budget)


def equal_split(curves: Curves, budget: int) -> Ensemble:
    """The best single-task models, each within an equal part of the budget.

    Args:
        curves: See `best_ensemble`.
        budget: The most that all models may take together.

    Example:
        >>> curves = {"sst2": {10: 0.80, 20: 0.84, 40: 0.86}, "trec": {10: 0.60, 30: 0.90}}
        >>> dict(equal_split(curves, budget=50).sizes)
        {'sst2': 20, 'trec': 10}
    """
    _check(curves, budget)
    part = budget // len(curves)
    chosen = {}
    for task, curve in curves.items():
        fitting = [size for size in curve if size <= part]
        if not fitting:
            raise ValueError(
                f"`budget` {budget:,} gives each task {part:,}, too small for '{task}'. The "
                f"smallest measured takes {min(curve):,}."
            )
        chosen[task] = max(fitting, key=lambda size: (curve[size], -size))
    return _ensemble(curves, chosen, budget)


def _ensemble(curves: Curves, chosen: Mapping[str, int], budget: int) -> Ensemble:
    sizes = {task: chosen[task] for task in curves}
    return Ensemble(sizes, {task: curves[task][size] for task, size in sizes.items()}, budget)


def _check(curves: Curves, budget: int) -> None:
    checks.mapping("curves", curves, "task -> {size: score}", filled=True)
    for task, curve in curves.items():
        of, form = f" of task '{task}'", "size -> score with at least one size"
        checks.mapping("curves", curve, form, of=of, filled=True)
        for size, score in curve.items():
            must = "must have whole numbers of parameters as sizes"
            checks.whole("curves", size, least=0, of=of, must=must)
            must = f"must have a number as score of size {size:,}"
            checks.number("curves", score, of=of, must=must)
            must = f"has no finite score at size {size:,}"
            why = "leave out what could not be measured"
            checks.inside("curves", score, "(-inf, inf)", of=of, must=must, why=why)
    checks.whole("budget", budget, least=0, must="must be a whole number of parameters")
