"""Checks of methods: nets are pruned by them while they are trained."""

import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtprune.methods.base import Method
from mtprune.methods.inventory import Selection, take_inventory
from mtprune.model import factors
from mtprune.model.layout import layout_of
from mtprune.pruner import MultitaskPruner
from mtprune.testing.functions import check
from mtprune.testing.nets import NETS, Nets

__all__ = [
    "check_backends_agree",
    "check_exact_count",
    "check_finalize",
    "check_method",
    "check_nesting",
    "check_observe_leaves_no_trace",
    "check_resume",
]

Made = Method[Any] | Callable[[], Method[Any]]

_BACKENDS = ("prune", "inplace")
_PARTS = ("model", "optimizer", "pruner")
_AFTER = 2  # steps after the last update, in which masks have to hold
_PATIENCE = 1_000  # steps to wait for an update


def check_method(
    method: Made, *, nets: Nets = NETS, sparsity: float | None = None, nested: bool = True
) -> None:
    """Check all that must be true of a method.

    Args:
        method: A method, or a function that makes it.
        nets: What it is tried on, by name: functions that make a `Net`.
        sparsity: The share of parameters to be pruned in the end; the method's unless given.
        nested: Whether masks only shrink. They do not where weights grow again, or thresholds move.

    Example:
        >>> from mtprune import Vote
        >>> check_method(Vote(0.5), nets={"tied": NETS["tied"]})
    """
    check_exact_count(method, nets=nets, sparsity=sparsity)
    if nested:
        check_nesting(method, nets=nets)
    check_backends_agree(method, nets=nets)
    check_resume(method, nets=nets)
    check_observe_leaves_no_trace(method, nets=nets)
    check_finalize(method, nets=nets)


def check_exact_count(method: Made, *, nets: Nets = NETS, sparsity: float | None = None) -> None:
    """Check that in the end exactly ``round(sparsity * parameters)`` parameters are pruned.

    Weights, masks and report say the same. Where units are larger than a weight, or ranks are
    pruned, the number may be higher by less than a unit. For the arguments see `check_method`.
    """
    for run in _runs(method, nets):
        report, pruned, unit = run.train().pruner.report(), 0, run.unit
        for row in report.layers:
            weight, mask = run.read(row.name), run.pruner.masks[row.name]
            zero = bool((weight[~mask] == 0).all())
            check(zero, f"{run}: masked weights of '{row.name}' are not zero.")
            kept = int(mask.sum())
            if row.rank is not None:
                matrices = run.matrices(row.name)
                ranks = [_rank(matrix) for matrix in matrices]
                told = f"{run}: '{row.name}' has rank {sum(ranks)}; the report says {row.rank}."
                check(sum(ranks) <= row.rank, told)
                unit = max(unit, factors.price(matrices[0].shape))
                # Of one matrix the report tells the rank, of a stack all ranks together.
                ranks = [row.rank] if len(ranks) == 1 else ranks
                kept = sum(factors.parameters(matrices[0].shape, rank) for rank in ranks)
            told = f"{run}: '{row.name}' keeps {kept} parameters; the report says {row.kept}."
            check(kept == row.kept, told)
            pruned += row.parameters - kept
        told = f"{run}: {pruned} of {report.parameters} parameters are pruned"
        share = run.pruner.sparsity
        check(share == pruned / report.parameters, f"{told}; the pruner's sparsity is {share}.")
        share = run.method.sparsity if sparsity is None else sparsity
        if isinstance(share, (int, float)):
            asked = round(share * report.parameters)
            check(0 <= pruned - asked < unit, f"{told}, not {asked}.")


def check_nesting(method: Made, *, nets: Nets = NETS) -> None:
    """Check that no weight comes back, and no rank grows.

    For the arguments see `check_method`.
    """
    for run in _runs(method, nets):
        before = run.pruner.masks, run.kept()
        for step in run.steps():
            after = run.pruner.masks, run.kept()
            for name, mask in after[0].items():
                back = bool((mask & ~before[0][name]).any()) or after[1][name] > before[1][name]
                check(not back, f"{run}: weights of '{name}' come back in step {step}.")
            before = after


def check_backends_agree(method: Made, *, nets: Nets = NETS) -> None:
    """Check that both back-ends give the same masks at every step, and weights to rounding.

    For the arguments see `check_method`.
    """
    for name in nets:
        one, other = (_Run(method, nets, name, backend) for backend in _BACKENDS)
        for step in one.steps():
            other.step()
            same = _equal(one.pruner.masks, other.pruner.masks) and one.kept() == other.kept()
            check(same, f"'{name}': back-ends have different masks in step {step}.")
        for layer in one.kept():
            close = torch.allclose(one.read(layer), other.read(layer), rtol=1e-4, atol=1e-5)
            check(close, f"'{name}': back-ends have different weights in '{layer}'.")


def check_resume(method: Made, *, nets: Nets = NETS) -> None:
    """Check that a run goes on bit for bit from a checkpoint.

    The states of model, optimizer and pruner are loaded in every order on every net, each time at
    another step. For the arguments see `check_method`.
    """
    for place, straight in enumerate(_runs(method, nets)):
        files = [straight.save(), *(straight.save() for _ in straight.steps())]
        end, length = straight.state(), len(files) - 1
        orders = list(itertools.permutations(_PARTS))[place % len(_BACKENDS) :: len(_BACKENDS)]
        for number, order in enumerate(orders):
            at = (place + number * length // len(orders)) % (length + 1)
            state = torch.load(io.BytesIO(files[at]), weights_only=True)
            resumed = straight.again(seed=9)
            for part in order:
                try:
                    getattr(resumed, part).load_state_dict(state[part])
                except ValueError as error:
                    told = f"the {part}'s own state of step {at} is refused"
                    raise AssertionError(f"{straight}: {told}. {error}") from error
            resumed.at = at
            for part, value in resumed.train(length - at).state().items():
                told = f"resumed at step {at}, where {', '.join(order)} are loaded in this order"
                check(_equal(value, end[part]), f"{straight}: the {part} differs {told}.")


def check_observe_leaves_no_trace(method: Made, *, nets: Nets = NETS) -> None:
    """Check that ``observe`` changes no parameter, ``.grad``, buffer, random state or hook.

    For the arguments see `check_method`.
    """
    for run in _runs(method, nets):

        def observe(outputs: Any, batch: Any, run: _Run = run) -> Mapping[str, Tensor]:
            before = run.traces()
            losses = run.pruner.observe(outputs, batch)
            for what, value in run.traces().items():
                told = f"{run}: observe() changes {what} in step {run.at}."
                check(_equal(value, before[what]), told)
            return losses

        run.observe = observe
        run.train()


def check_finalize(method: Made, *, nets: Nets = NETS) -> None:
    """Check that ``finalize`` leaves plain modules with the same outputs, to the bit.

    Half way and in the end: names, masks and counts stay, hooks go. For the arguments see
    `check_method`.
    """
    for run in _runs(method, nets):
        length = sum(1 for _ in run.steps())
        for done in (run.again().train(length // 2), run):
            before = done.facts()
            done.pruner.finalize()
            told = f"{run}: after finalize() in step {done.at}"
            for what, value in done.facts().items():
                check(_equal(value, before[what]), f"{told} the {what} differ.")
            for what, value in done.structure().items():
                same = value == done.plain[what]
                check(same, f"{told} the {what} differ from those before pruning.")


def _rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix.flatten(1).double(), rtol=1e-5))


class _Run:
    """A net in training with a pruner; the same each time.

    Args:
        method: The method.
        nets: The shelf.
        name: The net's name.
        backend: The back-end.
        seed: Of the net's first weights.
    """

    def __init__(self, method: Made, nets: Nets, name: str, backend: str, seed: int = 0) -> None:
        self._of = method, nets, name, backend
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = nets[name]()
        self.model, self.make_batch, self.at = net.model, net.make_batch, 0
        self.method = method() if callable(method) else method
        self.last = _last(self.method)
        chosen = Selection(net.shared_modules)
        units = take_inventory(self.model, list(net.task_losses), chosen, self.method)[0].units
        costs = [float(cost.max()) for cost in units.costs if len(cost)] if units else []
        self.unit = max(costs, default=1.0)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1)
        self.plain = self.structure()
        self.pruner = MultitaskPruner(
            self.model,
            net.task_losses,
            net.shared_modules,
            method=self.method,
            optimizer=self.optimizer,
            backend=backend,
        )
        self.observe: Callable[[Any, Any], Mapping[str, Tensor]] = self.pruner.observe

    def __str__(self) -> str:
        _, _, name, backend = self._of
        return f"'{name}', backend '{backend}'"

    def again(self, seed: int = 0) -> "_Run":
        """The same from the start, or from other weights."""
        return _Run(*self._of, seed)

    def step(self) -> None:
        batch = self.make_batch(self.at)
        with torch.random.fork_rng():
            torch.manual_seed(1_000 + self.at)
            losses = self.observe(self.model(batch["x"]), batch)
            self.optimizer.zero_grad()
            self.pruner.weigh(losses).backward()
        self.optimizer.step()
        self.at += 1
        self.pruner.step()

    def steps(self) -> Iterator[int]:
        """Train until the last update and a little longer, and say each step."""
        while self.pruner.report().step != self.last:
            late = self.at > self.last + _PATIENCE
            check(not late, f"{self}: the update of step {self.last} is never made.")
            self.step()
            yield self.at
        for _ in range(_AFTER):
            self.step()
            yield self.at

    def train(self, steps: int | None = None) -> "_Run":
        """Train so many steps, or to the end."""
        for _ in self.steps() if steps is None else range(steps):
            if steps is not None:
                self.step()
        return self

    def read(self, name: str) -> Tensor:
        """A weight as anyone sees it who reads the attribute."""
        path, _, attribute = name.rpartition(".")
        weight: Tensor = getattr(self.model.get_submodule(path), attribute)
        return weight.detach()

    def matrices(self, name: str) -> tuple[Tensor, ...]:
        """The matrices of a weight: one for each expert of a stack."""
        path, _, attribute = name.rpartition(".")
        weight = self.read(name)
        return layout_of(self.model.get_submodule(path), attribute, weight.shape).each(weight)

    def kept(self) -> dict[str, int]:
        """How many parameters each layer keeps."""
        return {row.name: row.kept for row in self.pruner.report().layers}

    def state(self) -> dict[str, Any]:
        """The states of model, optimizer and pruner."""
        return {part: getattr(self, part).state_dict() for part in _PARTS}

    def save(self) -> bytes:
        """The same as the bytes of a file."""
        file = io.BytesIO()
        torch.save(self.state(), file)
        return file.getvalue()

    def facts(self) -> dict[str, Any]:
        """What must be as before after ``finalize``."""
        self.model.eval()
        outputs = {task: out.detach() for task, out in self.model(self.make_batch(0)["x"]).items()}
        self.model.train()
        return {"outputs": outputs, "masks": self.pruner.masks, "counts": self.kept()}

    def structure(self) -> dict[str, Any]:
        """What must be after ``finalize`` as it was before pruning."""
        modules = [type(module).__name__ for module in self.model.modules()]
        return {"names": list(self.model.state_dict()), "modules": modules, "hooks": self.hooks()}

    def hooks(self) -> dict[str, int]:
        """How many hooks there are, by kind and place."""
        owners: list[tuple[str, nn.Module | torch.optim.Optimizer]] = [*self.model.named_modules()]
        found = {
            f"{path}.{kind}": len(hooks)
            for path, owner in [*owners, ("optimizer", self.optimizer)]
            for kind, hooks in vars(owner).items()
            if kind.endswith("_hooks") and hooks is not None
        }
        held = [parameter._backward_hooks for parameter in self.model.parameters()]
        return {**found, "parameters": sum(len(hooks or ()) for hooks in held)}

    def traces(self) -> dict[str, Any]:
        """What an observation could change."""
        parameters = dict(self.model.named_parameters())
        return {
            "parameters": {name: p.detach().clone() for name, p in parameters.items()},
            "`.grad`": {
                n: p.grad if p.grad is None else p.grad.clone() for n, p in parameters.items()
            },
            "buffers": {name: buffer.clone() for name, buffer in self.model.named_buffers()},
            "the random state": torch.get_rng_state(),
            "hooks": self.hooks(),
        }


def _runs(method: Made, nets: Nets) -> Iterator[_Run]:
    for name, backend in itertools.product(nets, _BACKENDS):
        yield _Run(method, nets, name, backend)


def _last(method: Method[Any]) -> int:
    """The step of a method's last update."""
    steps, step = -1, method.schedule.next_update(-1)
    while step is not None:
        steps, step = step, method.schedule.next_update(step)
        check(steps < _PATIENCE * _PATIENCE, "The schedule has no end.")
    check(steps >= 0, "The schedule has no update.")
    return steps


def _equal(a: Any, b: Any) -> bool:
    """Nested containers of tensors and plain values are the same, in type and order too."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and bool(a == b)
