"""What becomes of a folder that is tampered with: refused, or a model that runs."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mtprune
from mtprune.compression.plan import Plan
from tests.tampered_models import tampered_folder
from tests.tampering import alike, tampered

FORMS = {
    "conv": "rows",
    "first": "thin",
    "second": "sparse",
    "up": "csr",
    "down": "sparse",
    "low": "rank",
    "narrow": "rank",
}


class Mixed(nn.Module):
    """A layer for each form that a CPU can run, units that are removed, and a layout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)
        self.narrow = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.up, self.down, self.low = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.narrow(self.first(self.norm(self.conv(x)).relu()).relu())
        h = self.second(h)
        h = h.flatten(2).mT
        h = self.down(self.up(h).relu())
        h = h + self.attention(h, h, h)[0]
        low: Tensor = self.low(h)
        return low


def dense(seed: int = 0) -> Mixed:
    """The model as it is built, with zeros for every form."""
    torch.manual_seed(seed)
    model = Mixed().eval()
    with torch.no_grad():
        for name, share in (("first", 0.8), ("second", 0.9), ("up", 0.8), ("down", 0.8)):
            weight = model.get_submodule(name).weight
            weight.mul_(torch.rand(weight.shape) > share)
        model.conv.weight[2:4] = 0.0
        model.first.weight[:, 3] = 0.0
        model.up.weight[[1, 5]] = 0.0
        model.low.weight.copy_(torch.randn(8, 1) @ torch.randn(1, 8))
        model.narrow.weight.copy_((torch.randn(8, 1) @ torch.randn(1, 72)).view(8, 8, 3, 3))
    return model.to(memory_format=torch.channels_last)


def example() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def compressed(seed: int = 0) -> nn.Module:
    """The model with each layer in a form of its own, as far as it has it."""
    model, x = dense(seed), example()
    units = mtprune.structure.Group(
        "up",
        12,
        (
            mtprune.structure.Member("up.weight", 0, tuple(range(12))),
            mtprune.structure.Member("up.bias", 0, tuple(range(12))),
            mtprune.structure.Member("down.weight", 1, tuple(range(12)), "in"),
        ),
    )
    plan = mtprune.plan_of(mtprune.compress(model, x, groups=units))
    for layer, choice in FORMS.items():
        plan = plan.replace(layer, choice)
    return mtprune.compress(model, x, plan=plan)


def everything(model: nn.Module) -> dict[str, Any]:
    """All that must stay as it is when a folder is refused."""
    plain = (int, float, str, bool, tuple)
    return copy.deepcopy(
        {
            "state": dict(model.state_dict()),
            "attributes": {
                f"{name}.{key}": value
                for name, module in model.named_modules()
                for key, value in vars(module).items()
                if isinstance(value, plain)
            },
            "modules": [(name, type(module).__name__) for name, module in model.named_modules()],
            "objects": [id(parameter) for parameter in model.parameters()],
        }
    )


def outcome(
    folder: Path, to: Path, seed: int, *, sealed: bool, expected: Tensor
) -> tuple[str, str]:
    """What came of a tampered folder, and what exactly.

    Args:
        folder: What `mtprune.save` wrote.
        to: Where the tampered copy goes.
        seed: Of the tampering.
        sealed: Whether fingerprints are made anew.
        expected: The outputs of the model that was saved.

    Returns:
        ``"refused"``, ``"sound"`` (it was taken, and runs), ``"wrong"`` (damage was not seen),
        ``"changed"`` (refused, and the model had changed) or ``"raw"`` (somebody else's error).
    """
    what = tampered_folder(folder, to, seed, sealed=sealed)
    model = dense()
    before = everything(model)
    try:
        mtprune.load(to, model)
    except (ValueError, FileNotFoundError) as error:
        if str(to) not in str(error):
            return "raw", f"{what}: {error!r}"
        if not alike(everything(model), before):
            return "changed", f"{what}: {error!r}"
        return "refused", what
    except Exception as error:
        return "raw", f"{what}: {type(error).__name__}: {error}"
    try:
        with torch.no_grad():
            outputs = model(example())
        mtprune.plan_of(model).to_dict()
        str(mtprune.plan_of(model))
    except Exception as error:
        return "raw", f"{what}, then: {type(error).__name__}: {error}"
    if not sealed and not torch.equal(outputs, expected):
        return "wrong", what
    return "sound", what


def plan_outcome(plan: dict[str, Any], seed: int) -> tuple[str, str]:
    """The same for a tampered plan that `compress` is given."""
    bad, what = tampered(plan, seed)
    model = dense()
    before = everything(model)
    try:
        fast = mtprune.compress(model, example(), plan=Plan.from_dict(bad))
    except (ValueError, RuntimeError) as error:
        words = ("plan", "Plan", "compressed model", "Without its dead units")
        if not any(word in str(error) for word in words):
            return "raw", f"{what}: {error!r}"
        return ("refused" if alike(everything(model), before) else "changed"), what
    except Exception as error:
        return "raw", f"{what}: {type(error).__name__}: {error}"
    with torch.no_grad():
        off = (fast(example()) - model(example())).norm() / model(example()).norm()
    return ("sound" if float(off) < 1e-4 else "wrong"), what
