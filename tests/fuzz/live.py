"""Live objects: what there is to see of a model, an optimizer and a pruner, to compare later."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mtprune import MultitaskPruner


def copied(value: Any) -> Any:
    """Nested containers with tensors of their own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def of_model(model: nn.Module) -> dict[str, Any]:
    """Parameters as objects and by value, gradients, buffers, modes, hooks and the random state."""
    parameters = dict(model.named_parameters())
    return {
        "parameters": {n: p.detach().clone() for n, p in parameters.items()},
        "objects": {n: id(p) for n, p in parameters.items()},
        "trained": {n: p.requires_grad for n, p in parameters.items()},
        ".grad": {n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "modules": structure(model),
        "random state": torch.get_rng_state(),
    }


def structure(model: nn.Module) -> dict[str, Any]:
    """Types, modes, attributes and numbers of hooks of all modules."""
    return {
        path: [type(module).__name__, module.training, attributes(module), hooks(module)]
        for path, module in model.named_modules()
    }


def attributes(module: nn.Module) -> list[str]:
    return sorted(name for name in vars(module) if not name.startswith("_"))


def hooks(owner: Any) -> dict[str, int]:
    """How many hooks there are, by kind, where there are any."""
    kinds = {name: held for name, held in vars(owner).items() if name.endswith("_hooks")}
    return {name: len(held) for name, held in kinds.items() if held}


def of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"optimizer": copied(optimizer.state_dict()), "optimizer hooks": hooks(optimizer)}


def of_pruner(pruner: MultitaskPruner) -> dict[str, Any]:
    """All that a checkpoint holds, and masks and report as they are read."""
    return {"state": copied(pruner.state_dict()), **seen_of(pruner)}


def seen_of(pruner: MultitaskPruner) -> dict[str, Any]:
    """What a user reads of a pruner."""
    return {
        "masks": pruner.masks,
        "sparsity": pruner.sparsity,
        "report": copy.deepcopy(pruner.report().to_dict()),
    }
