"""For Lightning: a callback that shows a pruner the losses of a step, and saves it with the rest.

Lightning restores a module's weights before it asks for optimizers, runs forward and backward
inside ``optimizer.step(closure)``, and hands on one loss. So the callback takes the tasks'
losses from the module before the backward, changes masks after the batch in which an optimizer has
stepped, and lets a module that has no masks yet take weights that were saved with them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mtprune.pruner import MultitaskPruner

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    Callback = object

__all__ = ["PruningCallback"]

Build = Callable[[Any], MultitaskPruner]
Losses = Callable[[Any], Any]


class PruningCallback(Callback):  # type: ignore[misc]
    """Shows a pruner the losses of a ``LightningModule``, and lets it update its masks in time.

    In ``training_step`` put the tasks' losses where the callback looks for them, and return their
    sum, or any other loss, as ever:

    ``self.task_losses = {"seg": ..., "depth": ...}``

    With manual optimization ``self.manual_backward(loss)`` is when they are looked at. Call
    `finalize` yourself after training. Resuming by ``ckpt_path=`` goes on bit for bit, with either
    back-end, wherever the pruner is built.

    Args:
        pruner: The pruner, or a function of the module that builds it, or that says where it is. It
            is called when optimizers are there: ``lambda module: MultitaskPruner(module, tasks,
            module.trunk, sparsity=0.9, steps=1000, optimizer=module.optimizers())``. A pruner
            without ``optimizer=`` counts the batches in which some optimizer steps.
        losses: The attribute of the module that holds the losses of a step, in any form that
            `MultitaskPruner.observe_losses` takes, or a function of the module that returns them;
            None if ``training_step`` calls the pruner's ``observe`` itself.
        track: Write the run's curves to the trainer's loggers (`MultitaskPruner.track`).

    Raises:
        ImportError: If Lightning is not installed.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "a": nn.Linear(4, 1)})
        >>> pruner = MultitaskPruner(model, ["a"], "encoder")
        >>> if Callback is not object:  # that is, if lightning is installed
        ...     callback = PruningCallback(pruner)  # Trainer(..., callbacks=[callback])
    """

    def __init__(
        self,
        pruner: MultitaskPruner | Build,
        losses: str | Losses | None = "task_losses",
        *,
        track: bool = True,
    ) -> None:
        if Callback is object:
            raise ImportError(
                "PruningCallback needs Lightning. Install it with: pip install 'mtprune[lightning]'"
            )
        if not (isinstance(pruner, MultitaskPruner) or callable(pruner)):
            raise TypeError(
                f"`pruner` must be a MultitaskPruner, or a function of the module. Got {pruner!r}."
            )
        if not (losses is None or isinstance(losses, str) or callable(losses)):
            raise TypeError(
                f"`losses` must be the name of an attribute of the module, a function of the "
                f"module, or None. Got {losses!r}."
            )
        self._pruner = pruner if isinstance(pruner, MultitaskPruner) else None
        self._build = None if isinstance(pruner, MultitaskPruner) else pruner
        self._losses = losses
        self._track = track
        self._tracked: list[Any] = []
        self._saved: Mapping[str, Any] | None = None
        self._seen: Any = None
        self._stepped = False
        self._handles: list[RemovableHandle] = []

    @property
    def pruner(self) -> MultitaskPruner:
        """The pruner.

        Raises:
            RuntimeError: If it is not built yet.
        """
        if self._pruner is None:
            raise RuntimeError("The pruner is built when trainer.fit() has made the optimizers.")
        return self._pruner

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Let the module take weights that were saved with masks, though it has none yet."""
        self._remove()
        self._handles.append(pl_module.register_load_state_dict_pre_hook(_unmasked))

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Build the pruner, or find it; go on where a checkpoint was; watch the optimizers."""
        if self._pruner is None:
            assert self._build is not None
            built: object = self._build(pl_module)
            if not isinstance(built, MultitaskPruner):
                raise TypeError(
                    f"`pruner` is a function that must return a MultitaskPruner. Got {built!r}."
                )
            self._pruner = built
        if all(self._pruner._model is not module for module in pl_module.modules()):
            raise ValueError(
                f"The pruner prunes a {type(self._pruner._model).__name__} that is no part of the "
                f"{type(pl_module).__name__} this Trainer fits. Build both on one module."
            )
        if self._saved is not None:
            self._pruner.load_state_dict(self._saved)
            self._saved = None
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._note))
        for logger in trainer.loggers if self._track else ():
            if all(logger is not known for known in self._tracked):
                self._pruner.track(logger, every=max(1, trainer.log_every_n_steps))
                self._tracked.append(logger)

    def on_before_backward(self, trainer: Any, pl_module: nn.Module, loss: torch.Tensor) -> None:
        """Show the pruner the losses, whose graph still exists."""
        if self._losses is None:
            return
        losses = self._task_losses(pl_module)
        if losses is not self._seen:  # manual optimization may have several backwards
            self._seen = losses
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self.pruner.observe_losses(losses, scaler=scaler)

    def on_train_batch_end(self, *_: Any) -> None:
        """If an optimizer has stepped in this batch, update masks if that is due."""
        self._seen = None
        if self._stepped:
            self._stepped = False
            self.pruner.step()

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Stop watching."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state, for a checkpoint."""
        return {} if self._pruner is None else self._pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, as soon as the pruner is there."""
        self._saved = state_dict

    def on_save_checkpoint(
        self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]
    ) -> None:
        """Save weights under their own names where that is all there is to them.

        Then ``load_from_checkpoint`` takes them into a module without a pruner. It is not all where
        thresholds hold: there masked weights are not zero until `finalize`.
        """
        state = dict(checkpoint["state_dict"])
        if all(not bool(state[name][~state[mask]].any()) for name, mask, _ in _masked(state)):
            _strip(state)
            checkpoint["state_dict"] = state

    def _task_losses(self, module: Any) -> Any:
        if callable(self._losses):
            return self._losses(module)
        losses = getattr(module, str(self._losses), None)
        if losses is None:
            raise RuntimeError(
                f"{type(module).__name__} has no `{self._losses}`. Set it in training_step: "
                f"self.{self._losses} = {{task: loss}}, or give PruningCallback a function: "
                "losses=lambda module: {task: loss}."
            )
        return losses

    def _note(self, *_: Any) -> None:
        self._stepped = True

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _masked(state: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The names of weights that were saved with a mask, of their masks, and their own."""
    stems = [name.removesuffix("_orig") for name in state if name.endswith("_orig")]
    return [(f"{s}_orig", f"{s}_mask", s) for s in stems if f"{s}_mask" in state]


def _strip(state: dict[str, Any], module: nn.Module | None = None) -> None:
    """Give weights their own names again, and drop the masks; those that a module has plain."""
    plain = None if module is None else {name for name, _ in module.named_parameters()}
    for name, mask, own in _masked(state):
        if plain is None or own in plain:
            state[own] = state.pop(name)
            del state[mask]


def _unmasked(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    if not prefix:
        _strip(state, module)
