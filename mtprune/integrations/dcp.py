"""``torch.distributed.checkpoint``: a pruner beside a sharded model and its optimizer.

That library loads into what is there already, tensor by tensor, and a new pruner has no masks yet
into which any could be loaded. So a pruner is one entry of a checkpoint, the same on all ranks:
masks as bits, of whole layers, which any number of ranks can share out again.
"""

import io
from collections.abc import Mapping
from typing import Any

import torch

from mtprune.pruner import MultitaskPruner

__all__ = ["PrunerState"]


class PrunerState:
    """A pruner as ``torch.distributed.checkpoint`` saves and loads it; all ranks take part.

    Args:
        pruner: The pruner.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"trunk": nn.Linear(4, 8), "a": nn.Linear(8, 1)})
        >>> state = PrunerState(MultitaskPruner(model, ["a"], "trunk"))
        >>> # dcp.save({"model": ..., "pruner": state}, checkpoint_id=folder), and so dcp.load(...)
        >>> state.load_state_dict(state.state_dict())
    """

    def __init__(self, pruner: MultitaskPruner) -> None:
        self._pruner = pruner

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state as one entry."""
        held = io.BytesIO()
        torch.save(self._pruner.state_dict(), held)
        return {"state": held.getvalue()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken; see `MultitaskPruner.load_state_dict`."""
        held = io.BytesIO(state["state"])
        self._pruner.load_state_dict(torch.load(held, weights_only=True))
