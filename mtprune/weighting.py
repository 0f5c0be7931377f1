r"""Weighting: how the losses of the tasks add up to the one that is trained on.

A weighting is a function of the losses, ``{task: 0-dim tensor}`` without a graph, that returns
``{task: weight}``; or one of the values below, which depend on earlier losses or pruning updates.
With all weights 1 the total is the plain sum.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mtprune import checks
from mtprune.reading import Entry

__all__ = [
    "Noise",
    "PruningSensitivity",
    "Weigher",
    "Weighting",
    "Worst",
    "noise_weights",
    "parse_weighting",
    "uniform",
]

Weights = Mapping[str, Any]
"""For each task, a number or a 0-dim tensor."""

Weighting = Callable[[Mapping[str, Tensor]], Weights]
"""A function of the losses that returns the weights."""


def uniform(losses: Mapping[str, Tensor]) -> Weights:
    """Every task counts 1: the plain sum.

    Example:
        >>> uniform({"seg": torch.tensor(3.0), "depth": torch.tensor(0.1)})
        {'seg': 1.0, 'depth': 1.0}
    """
    return dict.fromkeys(losses, 1.0)


class Rule(Protocol):
    """A weighting that remembers."""

    def next(self, losses: Mapping[str, Tensor], memory: Mapping[str, Any]) -> Mapping[str, Any]:
        """The memory after these losses; its ``"weights"`` are the weights of these losses."""
        ...


@dataclass(frozen=True)
class Noise:
    r"""AdapMTL's published weights: the more a task's loss jumps, the more it counts.

    With :math:`r_t(i) = |L_t(i-1) - L_t(i)| / |L_t(i)|` and :math:`d_t` its mean over the last
    ``window`` steps, a task counts :math:`T d_t / \sum_u d_u` for T tasks. For a stationary loss
    :math:`d_t` is its coefficient of variation, which falls with the batch size: it says how noisy
    a loss is, not how the task bears pruning.

    Xiang et al., "AdapMTL: adaptive pruning framework for multitask learning model", ACM MM 2024.
    The original multiplies by 3 for any number of tasks, and fails at a loss of 0 and after a NaN;
    here such steps are left out.

    Attributes:
        begin: Step from which jumps count; weights are 1 until there are more than ``window``
            jumps.
        window: How many jumps are averaged.

    Example:
        >>> Noise(begin=0, window=100).window
        100
    """

    begin: int = 5_000
    window: int = 500

    def __post_init__(self) -> None:
        """Validate."""
        checks.whole("begin", self.begin, least=0)
        checks.whole("window", self.window, least=1)

    def next(self, losses: Mapping[str, Tensor], memory: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Rule`."""
        step = int(memory.get("step", 0))
        jumps = {task: list(history) for task, history in memory.get("jumps", {}).items()}
        last = dict(memory.get("last", {}))
        if step >= self.begin:
            for task, loss in losses.items():
                now = float(loss)
                if now - now != 0.0:  # not finite: the step does not count
                    continue
                if task in last and now != 0.0:
                    history = [*jumps.get(task, ()), abs(last[task] - now) / abs(now)]
                    jumps[task] = history[-self.window - 1 :]
                last[task] = now
        weights = noise_weights(jumps, self.window) if set(jumps) >= set(last) else {}
        return {"step": step + 1, "jumps": jumps, "last": last, "weights": weights}


def noise_weights(jumps: Mapping[str, Sequence[float]], window: int) -> dict[str, float]:
    """The weights that follow from relative jumps of the losses; empty while there are too few.

    Args:
        jumps: For each task, the latest ``|L(i-1) - L(i)| / |L(i)|``.
        window: How many of the last jumps count; there must be more jumps than that.

    Example:
        >>> noise_weights({"a": [9.0, 0.25, 0.25], "b": [0.0, 0.5, 1.0]}, window=2)
        {'a': 0.5, 'b': 1.5}
    """
    if not jumps or any(len(history) <= window for history in jumps.values()):
        return {}
    means = {task: sum(history[-window:]) / window for task, history in jumps.items()}
    total = sum(means.values())
    if total == 0.0:
        return {}
    return {task: len(means) * mean / total for task, mean in means.items()}


@dataclass(frozen=True)
class PruningSensitivity:
    r"""The more a task's loss grows with the common threshold, the more it counts.

    With :math:`\rho_t` the moving average over updates of
    :math:`\max(0, \partial \log |L_t| / \partial b)`, b the common log-threshold, a task counts
    :math:`T \rho_t / \sum_u \rho_u`, but never less than ``least``. A loss in other units has the
    same derivative of the logarithm, and weighs the same.

    Attributes:
        decay: The share of the moving average that stays at each update, in [0, 1).
        least: The least weight of a task; tasks share the rest of the weight.

    Example:
        >>> PruningSensitivity(least=0.0).weights({"a": 0.75, "b": 0.25}, ["a", "b"])
        {'a': 1.5, 'b': 0.5}
    """

    decay: float = 0.9
    least: float = 0.5

    def __post_init__(self) -> None:
        """Validate."""
        checks.inside("decay", self.decay, "[0, 1)")
        checks.inside("least", self.least, "[0, 1)")

    def average(self, memory: Mapping[str, float], slopes: Mapping[str, float]) -> dict[str, float]:
        """The moving averages after an update with these slopes."""
        positive = {task: max(0.0, slope) for task, slope in slopes.items()}
        return {
            task: slope
            if task not in memory
            else self.decay * memory[task] + (1 - self.decay) * slope
            for task, slope in positive.items()
        }

    def weights(self, averages: Mapping[str, float], tasks: Sequence[str]) -> dict[str, float]:
        """The weights that follow from moving averages; empty while all averages are 0."""
        total = sum(averages.values())
        if total == 0.0:
            return {}
        share = {task: averages.get(task, 0.0) / total for task in tasks}
        return {task: self.least + (1 - self.least) * len(tasks) * s for task, s in share.items()}


@dataclass(frozen=True)
class Worst:
    r"""The further a task lags behind, the more it counts: the worst task is what is trained for.

    A task's lag is :math:`F_t = \log(L_t / r_t)`, :math:`r_t` its loss for reference, so losses in
    other units lag as much. Training plays against weights that sum to 1,

    .. math:: \min_\theta \max_p \; \sum_t p_t F_t - \tau \, \mathrm{KL}(p \,\|\, 1 / T),

    which follow by exponentiated gradient, :math:`p_t \propto p_t^{1 - \eta \tau} e^{\eta F_t}` at
    each step, and a task counts :math:`l + (1 - l) T p_t` for T tasks. Lags that stay as they are
    lead to :math:`p_t \propto (L_t / r_t)^{1 / \tau}`; with :math:`\tau = 0` weight goes on moving
    to the task that lags most, until it no longer does. What cannot be learned lags for ever:
    :math:`\tau` and :math:`l` are what the other tasks then keep.

    Sagawa et al., "Distributionally robust neural networks for group shifts", ICLR 2020, for groups
    of samples and plain losses. A step's loss that is not positive and finite is left out; such a
    task, and one that the batch lacks, has the lag that it had last.

    Attributes:
        rate: :math:`\eta`, how far weights move in a step.
        temperature: :math:`\tau`, how evenly they stay spread.
        least: :math:`l`, the least weight of a task, in [0, 1).
        window: Of a task without a reference, how many first losses make it: their geometric mean.
            Weights are 1 until then.
        reference: Losses of tasks for reference, such as the dense network's.

    Example:
        >>> weights = Worst(temperature=0.0).weights({"a": 0.5, "b": -0.5})
        >>> {task: round(weight, 2) for task, weight in weights.items()}
        {'a': 1.42, 'b': 0.58}
    """

    rate: float = 0.02
    temperature: float = 0.5
    least: float = 0.1
    window: int = 20
    reference: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Validate."""
        checks.inside("rate", self.rate, "(0, 1]")
        checks.inside("temperature", self.temperature, "[0, inf)")
        if self.rate * self.temperature > 1:
            raise ValueError(
                "`rate` times `temperature` must be at most 1, or weights swing. Got "
                f"{self.rate!r} times {self.temperature!r}."
            )
        checks.inside("least", self.least, "[0, 1)")
        checks.whole("window", self.window, least=1)
        checks.mapping("reference", self.reference, "task -> loss")
        for task, loss in self.reference.items():
            of = f" of task '{task}'"
            checks.number("reference", loss, of=of)
            checks.inside("reference", loss, "(0, inf)", of=of, must="must be positive")

    def next(self, losses: Mapping[str, Tensor], memory: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Rule`."""
        starts = {task: list(logs) for task, logs in memory.get("starts", {}).items()}
        lags = dict(memory.get("lags", {}))
        found = {task: float(loss) for task, loss in losses.items()}
        found = {task: math.log(loss) for task, loss in found.items() if 0 < loss < math.inf}
        for task, log in found.items():
            if task in self.reference:
                lags[task] = log - math.log(self.reference[task])
            elif len(starts.setdefault(task, [])) < self.window:
                starts[task].append(log)
            else:
                lags[task] = log - fmean(starts[task])
        scores = memory.get("scores", {})
        if found and set(lags) >= set(starts):
            middle, stays = fmean(lags.values()), 1 - self.rate * self.temperature
            scores = {
                task: stays * scores.get(task, 0.0) + self.rate * (lag - middle)
                for task, lag in lags.items()
            }
        weights = self.weights(scores)
        return {"starts": starts, "lags": lags, "scores": scores, "weights": weights}

    def weights(self, scores: Mapping[str, float]) -> dict[str, float]:
        r"""The weights that follow from :math:`\log p`, up to what all tasks have in common."""
        highest = max(scores.values(), default=0.0)
        parts = {task: math.exp(score - highest) for task, score in scores.items()}
        rest = (1 - self.least) * len(parts)
        total = sum(parts.values())
        return {task: self.least + rest * part / total for task, part in parts.items()}


def parse_weighting(weighting: object) -> Any:
    """A weighting from its name, or from itself.

    Raises:
        ValueError: If no weighting has the name.
        TypeError: If the argument is no weighting.
    """
    named = {
        "uniform": uniform,
        "noise": Noise(),
        "pruning_sensitivity": PruningSensitivity(),
        "worst": Worst(),
    }
    if isinstance(weighting, str):
        checks.one_of("weighting", weighting, tuple(named))
        return named[weighting]
    if isinstance(weighting, (Noise, PruningSensitivity, Worst)):
        return weighting
    if type(weighting).__module__.startswith("torchjd.aggregation"):
        raise TypeError(
            f"`weighting` weighs losses, and {weighting!r} combines gradients. Leave that to "
            "torchjd: backward(losses), pruner.observe_jacobian(losses), jac_to_grad(parameters, "
            "aggregator)."
        )
    if isinstance(weighting, type) or not callable(weighting):
        raise TypeError(
            f"`weighting` must be one of {tuple(named)}, a function of the losses that returns "
            f"{{task: weight}}, or a module that makes one loss of them. Got {weighting!r}."
        )
    return weighting


class Weigher:
    """Weighs losses, and holds the memory of its weighting.

    Args:
        weighting: A `Weighting`, `Noise`, `PruningSensitivity`, `Worst`, or a module that makes one
            loss of a vector of losses, as torchjd's scalarizers do.
        tasks: All tasks.

    Raises:
        ValueError: If the weighting names tasks that there are not.
    """

    def __init__(self, weighting: Any, tasks: Sequence[str]) -> None:
        named = weighting.reference if isinstance(weighting, Worst) else {}
        if unknown := sorted(set(named) - set(tasks)):
            raise ValueError(f"`reference` names {unknown}. Known here: {list(tasks)}.")
        self._weighting = weighting
        self._tasks = list(tasks)
        self._memory: dict[str, Any] = {}

    @property
    def is_plain(self) -> bool:
        """Whether the total is the plain sum, always."""
        return self._weighting is uniform

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each task now."""
        return {task: float(weight) for task, weight in self.current.items()}

    @property
    def current(self) -> dict[str, float | Tensor]:
        """The weight of each task now, as the weighting left it: nothing is waited for."""
        weights = self._memory.get("weights", {})
        return {task: weights.get(task, 1.0) for task in self._tasks}

    def weigh(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of scalar losses; no gradient flows through weights that are numbers."""
        if self._weighting is uniform:
            return torch.stack(list(losses.values())).sum()
        if isinstance(self._weighting, nn.Module):
            return self._scalarized(self._weighting, losses)
        detached = {task: loss.detach() for task, loss in losses.items()}
        if isinstance(self._weighting, (Noise, Worst)):
            self._memory = dict(self._weighting.next(detached, self._memory))
            weights: Mapping[str, Any] = self._memory["weights"]
        elif isinstance(self._weighting, PruningSensitivity):
            weights = self._memory.get("weights", {})
        else:
            weights = self._checked(self._weighting(detached))
            self._memory = {"weights": {t: torch.as_tensor(w).detach() for t, w in weights.items()}}
        return torch.stack([weights.get(task, 1.0) * loss for task, loss in losses.items()]).sum()

    def _scalarized(self, module: nn.Module, losses: Mapping[str, Tensor]) -> Tensor:
        """What a module makes of the losses; a task counts as much as its loss moves that."""
        vector = torch.stack(list(losses.values()))
        total: object = module(vector)
        if not isinstance(total, Tensor) or total.numel() != 1:
            raise ValueError(
                f"`weighting` {module!r} must make one loss of losses [{len(vector)}]. "
                f"Got {total!r}."
            )
        (slopes,) = torch.autograd.grad(total, vector, retain_graph=True, materialize_grads=True)
        self._memory = {"weights": dict(zip(losses, slopes.detach().unbind(), strict=True))}
        return total

    def note(self, slopes: Mapping[str, float]) -> None:
        """Update the weights from the derivatives of log-losses in the common log-threshold."""
        if isinstance(self._weighting, PruningSensitivity) and slopes:
            averages = self._weighting.average(self._memory.get("averages", {}), slopes)
            weights = self._weighting.weights(averages, self._tasks)
            self._memory = {"averages": averages, "weights": weights}

    def state_dict(self) -> dict[str, Any]:
        """As plain containers."""
        return dict(self._memory)

    def read(self, entry: Entry) -> dict[str, Any]:
        """What `state_dict` returned, as a value for `load`; nothing is changed.

        Raises:
            ValueError: If it is not that.
        """
        lists, numbers = {"jumps", "starts"}, {"last", "averages", "lags", "scores", "weights"}
        parts, tasks = entry.mapping(["step", *lists, *numbers]), self._tasks
        found: dict[str, Any] = {name: part.plain() for name, part in parts.items()}
        for name in numbers & set(parts):
            for part in parts[name].mapping(tasks).values():
                part.tensor(()) if isinstance(part.value, Tensor) else part.number()
        if "jumps" in parts:
            found["step"] = entry["step"].whole()
        for name in lists & set(parts):
            for history in parts[name].mapping(tasks).values():
                for number in history.items():
                    number.number(least=0.0 if name == "jumps" else -math.inf)
        return found

    def load(self, memory: Mapping[str, Any]) -> None:
        """Go on with what `read` has found."""
        self._memory = dict(memory)

    def _checked(self, weights: object) -> Mapping[str, Any]:
        if not isinstance(weights, Mapping) or not set(weights) <= set(self._tasks):
            raise ValueError(
                f"`weighting` must return {{task: weight}} for tasks out of {self._tasks}. "
                f"Got {weights!r}."
            )
        return weights
