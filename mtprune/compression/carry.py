"""Carry: an optimizer goes on with the smaller model after removal."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtprune.compression.compress import plan_of
from mtprune.compression.cuts import Cut, Removal
from mtprune.compression.resizing import cut_out
from mtprune.model.names import unwrap

__all__ = ["carry_optimizer"]


def carry_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, compressed: nn.Module
) -> None:
    """Let an optimizer go on with the compressed model, in place.

    Each parameter of the model is replaced by its counterpart, and its state in the optimizer,
    momenta for instance, is cut as the parameter was. Parameters that are not the model's, weights
    of losses for instance, stay. A new bias, which took up constants, joins the parameter group of
    its layer's weight.

    Args:
        optimizer: The optimizer of the model.
        model: The model that was compressed, finalized.
        compressed: The model that `compress` returned. Layers must be dense to be trained:
            ``compress(model, x, plan=plan.replace("*", "dense"))``.

    Raises:
        ValueError: If the optimizer is of another model, or a layer is in another form.

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
    counterparts = dict(compressed.named_parameters())
    moves = _moves(optimizer, names, counterparts, plan.removal)
    for move in moves:
        if optimizer.state.pop(move.old, None) is not None:
            optimizer.state[move.new] = move.state
    replacement = {id(move.old): move.new for move in moves}
    for group in optimizer.param_groups:
        group["params"] = [replacement.get(id(p), p) for p in group["params"]]
        members = {id(p) for p in group["params"]}
        for name, parameter in counterparts.items():
            weight = counterparts.get(name.removesuffix("bias") + "weight")
            if name not in names.values() and weight is not None and id(weight) in members:
                group["params"].append(parameter)


class _Move(NamedTuple):
    """A parameter, its counterpart in the compressed model, and the counterpart's state."""

    old: nn.Parameter
    new: nn.Parameter
    state: dict[str, Any]


def _moves(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    counterparts: Mapping[str, nn.Parameter],
    removal: Removal,
) -> list[_Move]:
    """The moves of all parameters of the model that the optimizer holds.

    Args:
        optimizer: The optimizer.
        names: The names of the model's parameters by id.
        counterparts: The parameters of the compressed model by name.
        removal: The cuts between the two.

    Raises:
        ValueError: If a parameter has no counterpart of the right shape, or there is no move.
    """
    moves = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                continue
            if name not in counterparts:
                raise ValueError(
                    f"'{name}' has no counterpart in the compressed model, where its layer takes "
                    "another form and is not trained. Compress with plan.replace('*', 'dense')."
                )
            cut, new = removal[name], counterparts[name]
            shapes = (parameter.shape, parameter.shape) if cut is None else (cut.shape, cut.after)
            if shapes != (parameter.shape, new.shape):
                raise ValueError(
                    f"'{name}' has shape {tuple(parameter.shape)} in `model` and "
                    f"{tuple(new.shape)} in `compressed`, which was made of another model."
                )
            state = optimizer.state.get(parameter, {})
            state = {key: _cut_state(value, cut, f"{name}: {key}") for key, value in state.items()}
            moves.append(_Move(parameter, new, state))
    if not moves:
        raise ValueError(
            "The optimizer holds no parameter of `model`. Give the one it was made of."
        )
    return moves


def _cut_state(value: Any, cut: Cut | None, name: str) -> Any:
    """A value in the optimizer's state of a parameter, cut as the parameter was."""
    if cut is None or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    fits = value.dim() == len(cut.shape) and all(
        size in (1, whole) for size, whole in zip(value.shape, cut.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"'{name}' has shape {tuple(value.shape)}, and it is not known what to cut of it. "
            "Make a new optimizer."
        )
    # A size of 1 is a sum over the dimension, as some optimizers store it: nothing of it is cut.
    kept = (
        None if size == 1 else indices for size, indices in zip(value.shape, cut.kept, strict=True)
    )
    return cut_out(value, Cut(cut.tensor, tuple(value.shape), tuple(kept)))
