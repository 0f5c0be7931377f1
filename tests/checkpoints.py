"""What a checkpoint of a pruner tells, read in one place: the only tests that know its keys."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtprune import MultitaskPruner
from mtprune.checkpoint import sealed
from mtprune.methods import Masks


def shapes(pruner: MultitaskPruner) -> dict[str, tuple[int, ...]]:
    """The shape of every layer that may be pruned."""
    return {name: tuple(shape) for name, shape in pruner.state_dict()["shapes"].items()}


def steps(pruner: MultitaskPruner) -> int:
    """How many steps have been counted."""
    return int(pruner.state_dict()["step"])


def users(pruner: MultitaskPruner) -> dict[str, set[str]]:
    """The tasks that use each layer, once that is settled."""
    state = pruner.state_dict()
    return {
        name: {task for task, flags in state["users"].items() if flags[i]}
        for i, name in enumerate(state["shapes"])
    }


def bits(pruner: MultitaskPruner) -> dict[str, Tensor]:
    """The masks as a checkpoint holds them."""
    return dict(pruner.state_dict()["hold"]["masks"])


def scores(pruner: MultitaskPruner) -> dict[str, dict[str, Tensor]]:
    """The scores of each voter since the last update, layer by layer, flat."""
    return dict(pruner.state_dict()["evidence"]["statistics"].get("saliency", {}))


def observed(pruner: MultitaskPruner) -> dict[str, int]:
    """Observations of each task since the last update."""
    return dict(pruner.state_dict()["evidence"]["counts"])


def discarded(pruner: MultitaskPruner) -> dict[str, int]:
    """Observations of each task that were thrown away since the last update."""
    return dict(pruner.state_dict()["evidence"]["discarded"])


def memory(pruner: MultitaskPruner) -> dict[str, Any]:
    """What the method remembers of its last decision."""
    return dict(pruner.state_dict()["memory"])


def thresholds(pruner: MultitaskPruner) -> dict[str, Tensor]:
    """The threshold of each layer, while they are learned."""
    return dict(pruner.state_dict()["hold"]["thresholds"])


def noted(pruner: MultitaskPruner) -> Tensor:
    """What was noted of each layer in the backwards since thresholds were set."""
    found: Tensor = pruner.state_dict()["hold"]["noted"]
    return found


def gates(pruner: MultitaskPruner) -> dict[str, Tensor]:
    """The gates of each layer's components, while they are learned."""
    return dict(pruner.state_dict()["hold"]["gates"])


def set_thresholds(pruner: MultitaskPruner, make: Callable[[str, Tensor], Tensor]) -> None:
    """Put other thresholds in place of those that are there, by a layer's name and its own."""
    state = pruner.state_dict()
    soft = state["hold"]
    soft["thresholds"] = {name: make(name, tau) for name, tau in soft["thresholds"].items()}
    pruner.load_state_dict(resealed(state))


def set_random_masks(pruner: MultitaskPruner, density: float = 0.1) -> None:
    """Masks that keep this share of all weights, wherever chance has it."""
    # Not by way of a checkpoint: one that keeps other numbers than its method does is refused.
    random, layers = np.random.default_rng(0), pruner._active
    sizes = [layer.parameter.numel() for layer in layers]
    masks = [torch.from_numpy(random.random(size) < density) for size in sizes]
    pruner._hold.take(layers, Masks(masks))


def resealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state that was changed, with the fingerprint of what it is now."""
    return sealed({name: value for name, value in state.items() if name != "digest"})
