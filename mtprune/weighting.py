r"""Weighting: how the losses of the tasks add up to the one that is trained on.

A weighting is a function of the losses, ``{task: 0-dim tensor}`` without a graph, that returns
``{task: weight}``; or one of the values below, which depend on earlier losses or pruning updates.
With all weights 1 the total is the plain sum.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mtprune import checks
from mtprune.reading import Entry

__all__ = [
    "Noise",
    "PruningSensitivity",
    "Weigher",
    "Weighting",
    "noise_weights",
    "parse_weighting",
    "uniform",
]

Weights = Mapping[str, Any]
"""For each task, a number or a 0-dim tensor."""

Weighting = Callable[[Mapping[str, Tensor]], Weights]


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


def parse_weighting(weighting: object) -> Any:
    """A weighting from its name, or from itself.

    Raises:
        ValueError: If no weighting has the name.
        TypeError: If the argument is no weighting.
    """
    named = {"uniform": uniform, "noise": Noise(), "pruning_sensitivity": PruningSensitivity()}
    if isinstance(weighting, str):
        checks.one_of("weighting", weighting, tuple(named))
        return named[weighting]
    if isinstance(weighting, (Noise, PruningSensitivity)):
        return weighting
    if isinstance(weighting, type) or not callable(weighting):
        raise TypeError(
            f"`weighting` must be one of {tuple(named)}, or a function of the losses that returns "
            f"{{task: weight}}. Got {weighting!r}."
        )
    return weighting


class Weigher:
    """Weighs losses, and holds the memory of its weighting.

    Args:
        weighting: A `Weighting`, `Noise` or `PruningSensitivity`.
        tasks: All tasks.
    """

    def __init__(self, weighting: Any, tasks: Sequence[str]) -> None:
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
        weights = self._memory.get("weights", {})
        return {task: float(weights.get(task, 1.0)) for task in self._tasks}

    def weigh(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of scalar losses; no gradient flows through the weights."""
        if self._weighting is uniform:
            return torch.stack(list(losses.values())).sum()
        detached = {task: loss.detach() for task, loss in losses.items()}
        if isinstance(self._weighting, Noise):
            self._memory = dict(self._weighting.next(detached, self._memory))
            weights: Mapping[str, Any] = self._memory["weights"]
        elif isinstance(self._weighting, PruningSensitivity):
            weights = self._memory.get("weights", {})
        else:
            weights = self._checked(self._weighting(detached))
            self._memory = {"weights": {t: torch.as_tensor(w).detach() for t, w in weights.items()}}
        return torch.stack([weights.get(task, 1.0) * loss for task, loss in losses.items()]).sum()

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
        parts, tasks = entry.mapping(["step", "jumps", "last", "averages", "weights"]), self._tasks
        found: dict[str, Any] = {name: part.plain() for name, part in parts.items()}
        for name in {"last", "averages", "weights"} & set(parts):
            for part in parts[name].mapping(tasks).values():
                part.tensor(()) if isinstance(part.value, Tensor) else part.number()
        if "jumps" in parts:
            found["step"] = entry["step"].whole()
            for history in parts["jumps"].mapping(tasks).values():
                for jump in history.items():
                    jump.number(least=0.0)
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
