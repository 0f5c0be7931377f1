"""Compression: random sparse nets, and their outputs on inputs that nobody showed."""

import random
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import mtprune
from mtprune.compression.forms import CHOICES
from mtprune.structure import Group, Member
from tests.fuzz.engine import Case, Outcome
from tests.fuzz.random_nets import ROWS, RandomNet, draw_net, inputs, simpler_nets

GATES = (None, None, "scale", "row", "position", "length")


class Compress:
    """A sparse net, compressed."""

    def draw(self, dice: random.Random) -> Case:
        """A net, its zeros, and the arguments."""
        return {
            "net": draw_net(dice),
            "zeros": dice.choice((0.0, 0.5, 0.9, 0.97)),
            "dead": dice.choice((0.0, 0.3, 0.6)),
            "bias": dice.choice(("as it is", "one", "zero")),
            "gate": dice.choice(GATES),
            "rows": dice.choice((1, 1, 2, ROWS)),
            "length": dice.choice((1, 3, 5)),
            "groups": dice.choice(("auto", "auto", "residual", "none")),
            "portable": dice.random() < 0.2,
            "force": dice.choice((None, None, *CHOICES)),
            "saved": dice.random() < 0.3,
            "double": dice.random() < 0.1,
        }

    def run(self, case: Case) -> Outcome:
        """Compress, and compare on inputs other than the example."""
        model = sparse(case)
        dtype = torch.float64 if case["double"] else torch.float32
        example = with_gate(inputs(1, case["rows"], case["length"]).to(dtype), case)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        random_state = torch.get_rng_state()
        options: dict[str, Any] = {"portable": case["portable"]}
        if case["groups"] == "residual":
            options["groups"] = residual_units(case)
        elif case["groups"] == "none":
            options["groups"] = ()
        if case["force"] is not None:
            plan = mtprune.plan_of(mtprune.compress(model, example, **options))
            for row in plan.rows:
                if any(m.choice == case["force"] for m in row.measured):
                    plan = plan.replace(row.layer, case["force"])
            options = {"portable": case["portable"], "plan": plan}
        fast = mtprune.compress(model, example, **options)
        if not torch.equal(torch.get_rng_state(), random_state):
            return Outcome("changed", "the random state")
        for name, value in model.state_dict().items():
            if not torch.equal(value, before[name]):
                return Outcome("changed", f"'{name}' of the model that was given")
        for seed, rows, length in ((2, ROWS, case["length"]), (3, 1, 5), (4, 3, case["length"])):
            batch = with_gate(3 * inputs(seed, rows, length).to(dtype), {**case, "gate_seed": seed})
            outcome = compared(model, fast, batch)
            if outcome is not None:
                return outcome
        return self._saved(case, fast, example) if case["saved"] else Outcome("passed")

    def _saved(self, case: Case, fast: nn.Module, example: Any) -> Outcome:
        """Whether a saved copy is bitwise the same."""
        with tempfile.TemporaryDirectory() as folder:
            mtprune.save(fast, folder)
            fresh = Gated(RandomNet(case["net"]), case["gate"])
            loaded = mtprune.load(folder, fresh.double() if case["double"] else fresh)
        with torch.no_grad():
            one, other = fast(*example), loaded(*example)
        for name, out in one.items():
            if not torch.equal(out, other[name]):
                return Outcome("wrong", f"'{name}' of the loaded model is another")
        return Outcome("passed")

    def simpler(self, case: Case) -> Iterable[Case]:
        """Smaller nets first, then plainer arguments."""
        for net in simpler_nets(case["net"]):
            yield {**case, "net": net}
        plain = {
            "gate": None,
            "force": None,
            "groups": "none",
            "saved": False,
            "double": False,
            "portable": False,
            "bias": "as it is",
            "dead": 0.0,
            "zeros": 0.0,
            "rows": ROWS,
            "length": 5,
        }
        for name, value in plain.items():
            if case[name] != value:
                yield {**case, name: value}


class Gated(nn.Module):
    """A random net whose inputs, or the place of them, scale what goes on inside."""

    def __init__(self, inner: RandomNet, gate: str | None) -> None:
        super().__init__()
        self.inner = inner
        self.gate = gate

    def forward(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The outputs of all tasks."""
        outputs, hidden = {}, [x]
        for piece in self.inner.pieces:
            if hasattr(piece, "up"):
                h = piece.up(hidden[-1]).relu() * self._factor(hidden[-1], t)
                hidden.append(hidden[-1] + piece.down(h))
            else:
                hidden.append(piece(hidden[-1]))
        for task, place in self.inner.places.items():
            outputs[task] = self.inner.heads[task](hidden[place])
        return outputs

    def _factor(self, x: Tensor, t: Tensor) -> Tensor:
        if self.gate == "scale":
            return t
        if self.gate == "row":
            return x.norm(dim=-1, keepdim=True)
        if self.gate == "position":
            return 1.0 + torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1)
        if self.gate == "length":
            return torch.tensor(x.shape[1] ** 0.5, dtype=x.dtype)
        return torch.ones((), dtype=x.dtype)


def with_gate(x: Tensor, case: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The arguments of a `Gated`: the same gate for all rows of an example."""
    seed = case.get("gate_seed")
    if seed is None:
        return x, x.new_full((len(x), 1, 1), 0.5)
    generator = torch.Generator().manual_seed(seed)
    return x, torch.rand(len(x), 1, 1, generator=generator).to(x)


@torch.no_grad()
def sparse(case: Mapping[str, Any]) -> Gated:
    """The net of a case, with zeros."""
    model = Gated(RandomNet(case["net"]), case["gate"]).eval()
    dice = torch.Generator().manual_seed(case["net"]["seed"])
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.mul_(torch.rand(weight.shape, generator=dice) >= case["zeros"])
            dead = torch.rand(len(weight), generator=dice) < case["dead"]
            if ".up." in name or "linear1" in name:
                weight[dead] = 0.0
    for name, bias in model.named_parameters():
        if name.endswith("up.bias") and case["bias"] != "as it is":
            bias.fill_(1.0 if case["bias"] == "one" else 0.0)
    return model.double() if case["double"] else model


def residual_units(case: Mapping[str, Any]) -> list[Group]:
    """The hidden units of all residual pieces."""
    units = tuple(range(12))
    return [
        Group(
            f"units of {i}",
            12,
            (
                Member(f"inner.pieces.{i}.up.weight", 0, units),
                Member(f"inner.pieces.{i}.up.bias", 0, units),
                Member(f"inner.pieces.{i}.down.weight", 1, units, "in"),
            ),
        )
        for i, piece in enumerate(case["net"]["pieces"])
        if piece == "residual"
    ]


@torch.no_grad()
def compared(model: Gated, fast: nn.Module, batch: tuple[Tensor, Tensor]) -> Outcome | None:
    """What is wrong on a batch, or None."""
    expected, got = model(*batch), fast(*batch)
    for name, out in expected.items():
        size = float(out.norm().clamp_min(1e-6))
        off = float((got[name] - out).norm()) / size
        if not off < 1e-4:
            return Outcome("wrong", f"'{name}' is off by {off:.1e} on a batch of {len(batch[0])}")
    return None
