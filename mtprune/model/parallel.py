"""Parallel: ways to spread a model over processes that a pruner cannot see through.

Each is recognised by its own name, so that an error tells what to do, and not what broke.
"""

import gc
import sys

from torch import Tensor, nn

from mtprune.model.parts import is_spread, why_not_rows

__all__ = ["check_optimizer", "check_parallel", "check_replicas"]

_USE = (
    "Use DistributedDataParallel as it is, without options that change the order of its work, or "
    "fully_shard (FSDP2)."
)


def check_parallel(model: nn.Module) -> None:
    """Refuse a model whose weights are spread over processes.

    Args:
        model: The model as the user has it, with its wrappers.

    Raises:
        ValueError: If they are, with the name of what spreads them.
    """
    fully = _is_fully_sharded(model)
    for path, module in model.named_modules():
        kind = type(module)
        where = f"'{path}' ({kind.__name__})" if path else f"The model ({kind.__name__})"
        if kind.__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"{where} is wrapped by FullyShardedDataParallel (FSDP1), which keeps its weights "
                f"in one flat tensor, in parts on each rank. {_USE}"
            )
        if kind.__name__ == "DistributedDataParallel" and getattr(module, "static_graph", False):
            raise ValueError(_STATIC)
        if kind.__module__.split(".")[0] == "deepspeed":
            raise ValueError(
                f"{where} is an engine of DeepSpeed, whose ZeRO spreads weights and optimizer "
                f"states over ranks. {_USE}"
            )
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            if getattr(parameter, "_fsdp_flattened", False):
                raise ValueError(
                    f"{where} is inside a FullyShardedDataParallel (FSDP1, use_orig_params=True): "
                    f"its '{attribute}' is a view of a part of one flat tensor. {_USE}"
                )
            if is_spread(parameter):
                _check_rows(where, attribute, parameter, fully)


def _is_fully_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has been applied to some module; it gives it another class."""
    classes = {type(module) for module in model.modules()}
    return any(base.__name__ == "FSDPModule" for kind in classes for base in kind.__mro__)


def _check_rows(where: str, attribute: str, parameter: Tensor, fully: bool) -> None:
    """Refuse a ``DTensor`` unless every rank has some rows of it, by ``fully_shard``.

    Raises:
        ValueError: With what made it one.
    """
    if not fully:
        raise ValueError(
            f"{where} is split by tensor parallelism (parallelize_module): its '{attribute}' is a "
            f"DTensor. Such models cannot be pruned yet. {_USE}"
        )
    reason = why_not_rows(parameter)
    if reason:
        raise ValueError(
            f"{where} is sharded by fully_shard (FSDP2), but its '{attribute}' {reason}. Shard it "
            "as fully_shard does by itself: over all ranks, along the first dimension."
        )


def check_optimizer(optimizer: object) -> None:
    """Refuse an optimizer that steps other copies of the weights than the model has.

    Raises:
        ValueError: If it does, with its name.
    """
    kind = type(optimizer)
    names = {base.__name__ for base in kind.__mro__}
    if "ZeroRedundancyOptimizer" in names or kind.__module__.split(".")[0] == "deepspeed":
        raise ValueError(
            f"`optimizer` is a {kind.__name__}, which steps a part of the weights on each rank "
            "(ZeRO): masks would hold on some ranks alone. Use the plain optimizer inside."
        )


_STATIC = (
    "DistributedDataParallel(static_graph=True) expects one backward in each step, and scoring "
    "sweeps the graph once for each task: ranks would drift apart without a word. Leave "
    "static_graph out."
)


def check_replicas(model: nn.Module) -> None:
    """Refuse a wrapper around a model, made later than the pruner, with which ranks drift apart.

    Raises:
        ValueError: If there is one.
    """
    if "torch.nn.parallel.distributed" not in sys.modules:
        return
    from torch.nn.parallel import DistributedDataParallel

    # Nothing leads from a module to its wrapper, so all objects are looked at: once.
    wrappers = [x for x in gc.get_objects() if type(x) is DistributedDataParallel]
    for wrapper in wrappers:
        if wrapper.static_graph and any(module is model for module in wrapper.modules()):
            raise ValueError(_STATIC)
