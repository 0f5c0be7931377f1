"""Batch norm: running statistics measured anew after pruning."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtprune.compression.running import call

__all__ = ["recalibrate_bn"]


@torch.no_grad()
def recalibrate_bn(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> int:
    """Measure the running statistics of all batch norms anew, in place.

    Pruning shifts the outputs of layers, and the running means and variances are still those from
    before. Here they become the plain average over the batches, each with equal weight. Only batch
    norms are in training mode meanwhile, so that dropout does not disturb; modes and momenta are
    put back. Weights stay, and so do batch norms that the batches do not reach.

    Args:
        model: Any model, dense or compressed.
        batches: Some training batches: tensors, tuples of arguments, or dicts of keyword arguments.
        forward: ``forward(model, batch)``, for batches of another kind.

    Returns:
        The number of batch norms that keep running statistics.

    Raises:
        ValueError: If ``batches`` is empty.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> recalibrate_bn(norm, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])])
        1
        >>> norm.running_mean, norm.running_var
        (tensor([3.]), tensor([2.]))
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    statistics = [{key: value.clone() for key, value in _statistics(norm)} for norm in norms]
    count = 0
    is_measured = False
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for batch in batches:
            count += 1
            (call if forward is None else forward)(model, batch)
        is_measured = count > 0
    finally:
        for norm, momentum, before in zip(norms, momenta, statistics, strict=True):
            norm.momentum = momentum
            if not is_measured or norm.num_batches_tracked == 0:
                for key, value in _statistics(norm):
                    value.copy_(before[key])
        for module, training in modes.items():
            module.training = training
    if not count:
        raise ValueError("`batches` is empty. Give at least one batch.")
    return len(norms)


def _statistics(norm: _BatchNorm) -> Iterable[tuple[str, torch.Tensor]]:
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        value = getattr(norm, key)
        if value is not None:
            yield key, value
