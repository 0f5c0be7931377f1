"""Carry: an optimizer goes on with the model that is left after removal."""

from typing import Any

import torch
from torch import Tensor, nn

from mtprune.compression.build import plan_of
from mtprune.compression.plan import Cut
from mtprune.compression.removal import cut_out
from mtprune.model.names import unwrap

__all__ = ["carry_optimizer"]


def carry_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, compressed: nn.Module
) -> None:
    """Let an optimizer go on with the compressed model, in place.

    Each parameter of the model is replaced by its counterpart, and what the optimizer remembers of
    it, momenta for instance, is cut as the parameter was. Parameters of something else, weights of
    losses for instance, stay. A bias that took up constants joins the weight of its layer.

    Args:
        optimizer: The optimizer of the model.
        model: The model that was compressed, finalized.
        compressed: What `compress` made of it. Layers must be dense to be trained:
            ``compress(model, x, plan=plan.replace("*", "dense"))``.

    Raises:
        ValueError: If the optimizer is not the model's, or a layer is in another form.

    Example:
        >>> from mtprune.compression import compress
        >>> from mtprune.structure import Group, Member
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> with torch.no_grad():
        ...     _ = model[2].weight.copy_(torch.tensor([[1.0, 0.0, 2.0]]))
        >>> members = (Member("0.weight", 0, (0, 1, 2)), Member("0.bias", 0, (0, 1, 2)),
        ...            Member("2.weight", 1, (0, 1, 2), "in"))
        >>> fast = compress(model, torch.ones(1, 2), groups=[Group("hidden", 3, members)])
        >>> carry_optimizer(optimizer, model, fast)
        >>> [tuple(p.shape) for p in optimizer.param_groups[0]["params"]]
        [(2, 2), (2,), (1, 2), (1,)]
    """
    plan = plan_of(compressed)
    model, compressed = unwrap(model), unwrap(compressed)
    names = {id(p): name for name, p in model.named_parameters()}
    new = dict(compressed.named_parameters())
    moves: list[tuple[nn.Parameter, nn.Parameter, dict[str, Any]]] = []
    for group in optimizer.param_groups:
        for old in group["params"]:
            name = names.get(id(old))
            if name is None:
                continue
            if name not in new:
                raise ValueError(
                    f"'{name}' has no counterpart in the compressed model, where its layer takes "
                    "another form and is not trained. Compress with plan.replace('*', 'dense')."
                )
            cut = plan.removal[name]
            shapes = (old.shape, old.shape) if cut is None else (cut.shape, cut.after)
            if shapes != (old.shape, new[name].shape):
                raise ValueError(
                    f"'{name}' has shape {tuple(old.shape)} in `model` and "
                    f"{tuple(new[name].shape)} in `compressed`, which was made of another model."
                )
            state = optimizer.state.get(old, {})
            carried = {k: _carried(v, cut, f"{name}: {k}") for k, v in state.items()}
            moves.append((old, new[name], carried))
    if not moves:
        raise ValueError(
            "The optimizer holds no parameter of `model`. Give the one it was made of."
        )
    after = {id(old): parameter for old, parameter, _ in moves}
    for old, parameter, state in moves:
        if optimizer.state.pop(old, None) is not None:
            optimizer.state[parameter] = state
    for group in optimizer.param_groups:
        group["params"] = [after.get(id(p), p) for p in group["params"]]
        held = {id(p) for p in group["params"]}
        for name, parameter in new.items():
            weight = new.get(name.removesuffix("bias") + "weight")
            if name not in names.values() and weight is not None and id(weight) in held:
                group["params"].append(parameter)


def _carried(value: Any, cut: Cut | None, what: str) -> Any:
    """What is left of something that an optimizer remembers of a parameter."""
    if cut is None or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    fits = value.dim() == len(cut.shape) and all(
        size in (1, whole) for size, whole in zip(value.shape, cut.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"'{what}' has shape {tuple(value.shape)}, and it is not known what to cut of it. "
            "Make a new optimizer."
        )
    # Some remember sums over a dimension, of which nothing is cut.
    kept = (
        None if size == 1 else indices for size, indices in zip(value.shape, cut.kept, strict=True)
    )
    return cut_out(value, Cut(cut.tensor, tuple(value.shape), tuple(kept)))
