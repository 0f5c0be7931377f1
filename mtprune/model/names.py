"""Names: a model without its wrappers, and what its parameters are called then."""

from torch import nn

__all__ = ["own_name", "strip", "unwrap"]

WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

_PARALLEL = ("DistributedDataParallel", "DataParallel")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model inside ``torch.compile``, DDP and DataParallel."""
    while True:
        children = dict(model.named_children())
        inner = children.get("_orig_mod")
        if inner is None and type(model).__name__ in _PARALLEL:
            inner = children.get("module")
        if inner is None:
            return model
        model = inner


def strip(name: str) -> str:
    """A dotted name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def own_name(model: nn.Module, name: str) -> str:
    """A parameter's name without what real wrappers inside the model add to it."""
    owner, kept = model, []
    for part in name.split("."):
        wraps = type(owner).__name__ in _PARALLEL if part == "module" else part in WRAPPERS
        if not wraps:
            kept.append(part)
        child = owner._modules.get(part)
        owner = owner if child is None else child
    return ".".join(kept)
