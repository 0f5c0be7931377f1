"""Trainings: a random net, pruned by a random method in a random loop, and looked at all the time.

What must hold is said by `tests.fuzz.oaths`, from outside; here stands the loop.
"""

import io
import itertools
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from mtprune import MultitaskPruner
from tests.fuzz import engine, live, nets, oaths
from tests.fuzz.cases import from_json, simpler, to_json
from tests.fuzz.methods import MethodCase, last_of, make, slower
from tests.fuzz.methods import draw as draw_method
from tests.fuzz.nets import NetCase
from tests.fuzz.outcomes import RefusedError, WrongError, check, differs, refusable

BACKENDS = ("prune", "inplace")
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.05),
    "plain": lambda p: torch.optim.SGD(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "one by one": lambda p: torch.optim.Adam(p, lr=0.02, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "groups": lambda p: torch.optim.SGD([{"params": [x], "lr": 0.02} for x in p], momentum=0.9),
}
_PARTS = ("model", "optimizer", "pruner")
_ORDERS = list(itertools.permutations(_PARTS))
_AFTER = 2
_PATIENCE = 70  # observations="auto" takes up to 64


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        net: The net.
        method: The method.
        backend: The back-end.
        optimizer: One of `OPTIMIZERS`.
        given: Whether the pruner is given the optimizer.
        batches: Whose batches come: of ``"all"`` tasks; each of one task, in ``"turns"``; some
            ``"missing"``; or all, of ``"uneven"`` sizes.
        form: How losses come: the pruner computes them, ``"observe"``, or is given a ``"dict"``,
            a ``"list"`` or a ``"vector"``.
        accumulate: Backwards for a step of the optimizer.
        amp: Whether the forward runs in bfloat16.
        scaler: Whether losses are scaled.
        fold: Whether scoring is the backward.
        weigh: Whether the pruner weighs the losses.
        at_once: Whether `prune` comes before the loop.
        bfloat16: Whether scores are kept in bfloat16.
        resume: After which step the run goes on from a checkpoint; 0 for none.
        order: In which order that is loaded, a number.
        twin: Whether the other back-end must give the same.
    """

    net: NetCase = field(default_factory=NetCase)
    method: MethodCase = field(default_factory=MethodCase)
    backend: str = "prune"
    optimizer: str = "plain"
    given: bool = True
    batches: str = "all"
    form: str = "observe"
    accumulate: int = 1
    amp: bool = False
    scaler: bool = False
    fold: bool = False
    weigh: bool = False
    at_once: bool = False
    bfloat16: bool = False
    resume: int = 0
    order: int = 0
    twin: bool = False


def draw(chance: Random) -> Case:
    net = nets.draw(chance)
    method = draw_method(chance, net)
    odd = chance.random() < 0.5  # half of the loops are plain but for a thing or two
    rare = 0.25 if odd else 0.06
    batches = chance.choice(["all", "all", "turns", "missing", "uneven"])
    if batches in ("turns", "missing"):
        method = slower(method, min(3, net.tasks))
    given = chance.random() > rare or method.options.get("schedule", ("",))[0] == "regrow"
    soft = method.kind in ("soft", "sigmoid", "adapmtl", "adapmtl_published", "best")
    return Case(
        net=net,
        method=method,
        backend=chance.choice(BACKENDS),
        optimizer=chance.choice(list(OPTIMIZERS)),
        given=given,
        batches=batches,
        form=chance.choice(["observe", "observe", "dict", *(["list", "vector"] * odd)]),
        accumulate=2 if chance.random() < rare else 1,
        amp=not net.double and "pair" not in net.blocks and chance.random() < rare,
        scaler=given and chance.random() < rare,
        fold=not soft and chance.random() < rare / 2,
        weigh=chance.random() < 0.3,
        at_once=method.options.get("schedule", ("",))[0] == "rounds"
        or ("schedule" not in method.options and chance.random() < rare),
        bfloat16=chance.random() < rare,
        resume=chance.randint(1, 6) if chance.random() < 0.4 else 0,
        order=chance.randrange(len(_ORDERS)),
        twin=chance.random() < 0.4,
    )


class Train:
    """Trainings."""

    def draw(self, dice: Random) -> engine.Case:
        """A random one."""
        return to_json(draw(dice))

    def run(self, case: engine.Case) -> engine.Outcome:
        """Train, and look."""
        run(from_json(Case, case))
        return engine.Outcome("passed")

    def simpler(self, case: engine.Case) -> Iterator[engine.Case]:
        """Cases with something as it is by default."""
        return map(to_json, simpler(from_json(Case, case)))


def run(case: Case) -> None:
    loop = Loop(case)
    saved = None
    for at in loop.to_the_end():
        if at == case.resume:
            saved = loop.save()
    oaths.at_the_end(case.method, loop.method, loop.pruner, loop.model)
    try:
        if saved is not None:
            _resumed(case, saved, loop)
        if case.twin:
            _twin(case, loop)
    except (ValueError, TypeError, RuntimeError, RefusedError) as error:
        # The same went well before.
        raise WrongError(f"after a resumption, or with the other back-end: {error}") from error
    loop.finalize()


def _resumed(case: Case, saved: bytes, straight: "Loop") -> None:
    """Going on from a checkpoint, in fresh objects with other weights, is bitwise the same."""
    loop = Loop(case, seed=case.net.seed + 1, fresh=True)
    state = torch.load(io.BytesIO(saved), weights_only=True)
    for part in _ORDERS[case.order % len(_ORDERS)]:
        getattr(loop, part).load_state_dict(state[part])
    loop.at = state["at"]
    if loop.scaler is not None:
        loop.scaler.load_state_dict(state["scaler"])
    while loop.at < straight.at:
        loop.step()
    difference = differs(straight.state(), loop.state())
    check(not difference, f"after resuming at step {state['at']} another {difference}")


def _twin(case: Case, loop: "Loop") -> None:
    """The other back-end gives the same masks."""
    backend = BACKENDS[1 - BACKENDS.index(case.backend)]
    other = Loop(case, backend=backend)
    while other.at < loop.at:
        other.step()
    difference = differs(loop.pruner.masks, other.pruner.masks)
    check(not difference, f"back-ends have different masks: {difference}")


class Loop:
    """A model in training, with a pruner; the same case gives the same run, bit for bit.

    Args:
        case: The case.
        backend: A back-end in place of the case's.
        seed: Of the first weights, in place of the net's.
        fresh: Whether nothing is pruned at the start, because a checkpoint is loaded.
    """

    def __init__(
        self, case: Case, *, backend: str = "", seed: int | None = None, fresh: bool = False
    ) -> None:
        self.case, net = case, case.net
        self.model = nets.build(net, seed)
        self.names = list(self.model.state_dict())
        self.plain = live.structure(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[case.optimizer](trained)
        self.objects = {id(p) for p in self.model.parameters()}
        self.losses = nets.losses(net)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if case.scaler else None
        with refusable(lambda: live.of_model(self.model)):
            self.method = make(case.method, nets.inputs(net, 3, 0))
        with refusable(lambda: live.of_model(self.model) | live.of_optimizer(self.optimizer)):
            self.pruner = MultitaskPruner(
                self.model,
                self.losses if case.form == "observe" or case.at_once else net.names,
                nets.shared(net, self.model),
                method=self.method,
                optimizer=self.optimizer if case.given else None,
                include=nets.included(net, self.model),
                backend=backend or case.backend,
                score_dtype=torch.bfloat16 if case.bfloat16 else torch.float32,
            )
        self.last = last_of(self.method)
        self.at = 0
        if case.at_once and not fresh:
            self._prune_at_once()

    def to_the_end(self) -> Any:
        """Train until the last update and a little longer, and say each step."""
        wait = _PATIENCE + self.last + 4 * self.case.net.tasks
        while self.pruner.report().step != self.last:
            check(self.at < wait, f"the update of step {self.last} is never made")
            self.step()
            yield self.at
        for _ in range(_AFTER):
            self.step()
            yield self.at

    def step(self) -> None:
        """A step of the optimizer and of the pruner; what must hold of each call is checked."""
        self.optimizer.zero_grad()
        for part in range(self.case.accumulate):
            self._backward(part)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.at += 1
        with refusable(lambda: live.of_model(self.model) | live.seen_of(self.pruner)):
            changed = self.pruner.step()
        self._look(changed)

    def _look(self, changed: bool) -> None:
        """Check what holds after every step, and after every change."""
        case = self.case.method
        oaths.of_objects(self.model, self.objects)
        hard = oaths.is_hard(case, self.method, self.pruner.report())
        if hard or changed:
            oaths.of_numbers(case, self.method, self.pruner)
        if hard:
            oaths.of_zeros(self.pruner, self.model)

    def _backward(self, part: int) -> None:
        case = self.case
        number = self.at * case.accumulate + part
        rows = 4 + (3 * number % 5 if case.batches == "uneven" else 0)
        batch = nets.batch(case.net, rows, number)
        torch.manual_seed(1_000 + number)
        with torch.autocast("cpu", torch.bfloat16) if case.amp else nullcontext():
            outputs = self.model(batch["x"])
        losses = self._observed(outputs, batch, self._present(number))
        if case.fold:
            return
        if case.weigh:
            with refusable(lambda: live.of_model(self.model)):
                total = self.pruner.weigh(losses)
        else:
            total = torch.stack([loss / self.losses[t].unit for t, loss in losses.items()]).sum()
        (total if self.scaler is None else self.scaler.scale(total)).backward()

    def _present(self, number: int) -> list[str]:
        """The tasks of a batch."""
        names = self.case.net.names
        if self.case.batches == "turns":
            return [names[number % len(names)]]
        if self.case.batches == "missing":
            return [n for i, n in enumerate(names) if (number + i) % 3] or names
        return names

    def _observed(
        self, outputs: Any, batch: Mapping[str, Tensor], tasks: list[str]
    ) -> dict[str, Tensor]:
        """The losses, after the pruner has seen them and left no trace."""
        case = self.case
        options: dict[str, Any] = {"scaler": self.scaler, "fold": case.fold}
        before = live.of_model(self.model)
        with refusable(lambda: before | live.of_pruner(self.pruner)):
            if case.form == "observe":
                losses = self.pruner.observe(outputs, batch, tasks=tasks, **options)
            else:
                losses = {task: self.losses[task](outputs, batch) for task in tasks}
                self.pruner.observe_losses(self._form(losses, len(tasks)), **options)
        after = live.of_model(self.model)
        for facts in (before, after) if case.fold else ():
            facts.pop(".grad")
        difference = differs(before, after)
        check(not difference, f"observing changes {difference}")
        return losses

    def _form(self, losses: dict[str, Tensor], present: int) -> Any:
        """Losses as the case has them; what has no names only if none is missing."""
        whole = present == self.case.net.tasks
        if self.case.form == "list" and whole:
            return list(losses.values())
        if self.case.form == "vector" and whole:
            return torch.stack(list(losses.values()))
        return {**losses, "total": torch.stack(list(losses.values())).sum()}

    def _prune_at_once(self) -> None:
        batches = [nets.batch(self.case.net, 4, 500 + i) for i in range(3)]
        with refusable(lambda: live.of_model(self.model) | live.seen_of(self.pruner)):
            self.pruner.prune(batches, forward=lambda m, b: m(b["x"]), progress=False)
        self._look(changed=True)

    def save(self) -> bytes:
        """A checkpoint, as a file."""
        file = io.BytesIO()
        scaler = {} if self.scaler is None else self.scaler.state_dict()
        torch.save({**self.state(), "at": self.at, "scaler": scaler}, file)
        return file.getvalue()

    def state(self) -> dict[str, Any]:
        return {part: getattr(self, part).state_dict() for part in _PARTS}

    def finalize(self) -> None:
        """Outputs, masks, counts and names are as before; hooks of ours are gone."""
        before = self._outputs(), live.seen_of(self.pruner)
        self.pruner.finalize()
        after = self._outputs(), live.seen_of(self.pruner)
        difference = differs(before, after)
        check(not difference, f"finalize() changes {difference}")
        check(list(self.model.state_dict()) == self.names, "finalize() leaves other names")
        difference = differs(self.plain, live.structure(self.model))
        check(not difference, f"finalize() leaves traces: {difference}")
        check({id(p) for p in self.model.parameters()} == self.objects, "Parameters are others")
        check(not live.hooks(self.optimizer), "finalize() leaves hooks in the optimizer")

    def _outputs(self) -> Any:
        """Outputs in eval mode, with gradients: fused kernels of inference round otherwise."""
        self.model.eval()
        outputs = live.copied(self.model(nets.inputs(self.case.net, 5, 900)))
        self.model.train()
        return outputs
