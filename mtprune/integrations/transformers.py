"""For transformers: a callback for its ``Trainer``, and `save_pretrained` for ``from_pretrained``.

Trainer shows no callback the losses of a step. So a forward hook on the model hands them to the
pruner while their graph is alive. The callback calls `step` after every optimizer step, adds the
tasks' losses and the sparsity to Trainer's log, and saves the pruner's state with every checkpoint.

Importing this module registers the format of compressed models with transformers at once; after
``import mtprune`` alone that happens when transformers is imported.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mtprune.files import read_torch, write_torch
from mtprune.integrations.pretrained import save_pretrained
from mtprune.model.names import unwrap
from mtprune.pruner import MultitaskPruner
from mtprune.tracking import Tracker

try:
    from transformers import TrainerCallback
except ImportError:
    TrainerCallback = object

__all__ = ["FILE", "PruningCallback", "save_pretrained"]

FILE = "mtprune.pt"
"""The file of the pruner's state in a checkpoint folder."""

Losses = Callable[[Any, Mapping[str, Any]], Any]

_NEVER = 1 << 60


class PruningCallback(TrainerCallback):  # type: ignore[misc]
    """Shows a pruner the losses of a `transformers.Trainer`, and lets it update its masks in time.

    Trainer trains on the ``loss`` that the model returns, as without the callback. Build the pruner
    on the model that the Trainer trains, with the tasks' names, and call `finalize` yourself after
    training: until then checkpoints may hold ``weight_orig`` and ``weight_mask``. Resuming goes on
    bit for bit. With ``load_best_model_at_end=True`` masks are those of the best checkpoint, too; a
    warning says so if not all had been pruned by then.

    ``log_history``, and callbacks that come after this one, have each task's loss, the mean since
    the last log of this process, and what `MultitaskPruner.track` names. What ``report_to`` sends
    comes before: in place of ``callbacks=[callback]`` write
    ``trainer.callback_handler.callbacks.insert(0, callback)``.

    Args:
        pruner: The pruner.
        losses: The tasks' losses: the name in the model's output of a mapping ``{task: loss}``, or
            a function ``losses(outputs, inputs)`` that returns the mapping. With one loader for
            each task, the mapping has one loss, under the task's name:
            ``lambda outputs, inputs: {inputs["task"]: outputs["loss"]}``. Or a mapping ``{task:
            module}`` of the modules that compute the losses, as sentence-transformers has them.
        resume_from: The checkpoint folder with the pruner's state, if it is not in ``output_dir``.

    Raises:
        ImportError: If transformers is not installed.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "a": nn.Linear(4, 1)})
        >>> pruner = MultitaskPruner(model, ["a"], "encoder")
        >>> if TrainerCallback is not object:  # that is, if transformers is installed
        ...     callback = PruningCallback(pruner)  # Trainer(..., callbacks=[callback])
    """

    def __init__(
        self,
        pruner: MultitaskPruner,
        losses: str | Losses | Mapping[str, nn.Module] = "losses",
        *,
        resume_from: str | Path | None = None,
    ) -> None:
        if TrainerCallback is object:
            raise ImportError(
                "PruningCallback needs transformers. Install it with: "
                "pip install 'mtprune[transformers]'"
            )
        if not isinstance(pruner, MultitaskPruner):
            raise TypeError(f"`pruner` must be a MultitaskPruner. Got {pruner!r}.")
        if not (isinstance(losses, (str, Mapping)) or callable(losses)):
            raise TypeError(
                f"`losses` must be a name in the model's output, a function of (outputs, inputs), "
                f"or a mapping task -> module. Got {losses!r}."
            )
        self.pruner = pruner
        self._losses = losses
        self._scaler: Any = None
        self._latest = _Latest()
        self._tracker: Tracker | None = None
        self._resume_from = None if resume_from is None else Path(resume_from)
        self._handles: list[RemovableHandle] = []

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: nn.Module,
        optimizer: Any = None,
        **others: Any,
    ) -> None:
        """Watch the losses; load the pruner's state if Trainer resumes a checkpoint."""
        if args.n_gpu > 1:
            raise ValueError(
                "Trainer splits batches over several GPUs in one process (DataParallel). Start it "
                "with torchrun, one process per GPU, or show it one with CUDA_VISIBLE_DEVICES."
            )
        trained = unwrap(model)
        if all(self.pruner._model is not module for module in trained.modules()):
            raise ValueError(
                f"The pruner prunes a {type(self.pruner._model).__name__} that is no part of the "
                f"{type(trained).__name__} this Trainer trains. Build both on one model."
            )
        if hasattr(trained, "peft_config") and self.pruner._backend == "prune":
            raise ValueError(
                "PEFT saves and loads adapters under their own names, which backend='prune' "
                "changes. Build the pruner with backend='inplace'."
            )
        if state.global_step:
            self._load(self._resume_from or _folder(args, state))
        self._stop()  # in case the last run was interrupted
        self._scaler = getattr(optimizer, "scaler", None)
        if self._tracker is None:
            self._tracker = self.pruner.track(self._latest, every=_NEVER)
        if isinstance(self._losses, Mapping):
            for task, module in self._losses.items():
                seen = partial(self._observe_one, task)
                self._handles.append(module.register_forward_hook(seen))
        else:
            self._handles.append(trained.register_forward_hook(self._observe, with_kwargs=True))

    def on_step_end(
        self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **others: Any
    ) -> None:
        """After the optimizer's step, unless a scaler skipped it: update masks if that is due."""
        if not getattr(optimizer, "step_was_skipped", False):
            self.pruner.step()

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """Add the tasks' losses and the shares pruned to a log of training."""
        if self._tracker is None or not logs or "loss" not in logs:
            return
        self._tracker.write()
        found = {"mtprune/sparsity/all": self.pruner.sparsity, **self._latest.values}
        self._latest.values = {n: v for n, v in found.items() if not n.startswith("mtprune/iou/")}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Save the pruner's state with the checkpoint."""
        folder = _folder(args, state)
        if state.is_world_process_zero:  # the state is the same on every rank
            folder.mkdir(parents=True, exist_ok=True)
            write_torch(folder / FILE, self.pruner.state_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stop watching; go back to the masks of the best checkpoint if Trainer went back to it."""
        self._stop()
        best = getattr(state, "best_model_checkpoint", None)
        if not (getattr(args, "load_best_model_at_end", False) and best):
            return
        last = self.pruner.report().sparsity  # masks may be those of the best checkpoint already
        self._load(Path(best))
        then = self.pruner.report().sparsity
        if then < last:
            warnings.warn(
                f"The best checkpoint, {best}, is of a time when {then:.1%} were "
                f"pruned; in the end {last:.1%} were. Save, or look for the best, only when all is "
                "pruned.",
                stacklevel=2,
            )

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _observe(
        self, module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], outputs: Any
    ) -> None:
        if module.training and torch.is_grad_enabled():
            self.pruner.observe_losses(self._task_losses(outputs, inputs), scaler=self._scaler)

    def _observe_one(self, task: str, module: nn.Module, args: Any, loss: Any) -> None:
        if torch.is_grad_enabled():
            parts = list(loss.values()) if isinstance(loss, Mapping) else loss
            self.pruner.observe_losses({task: parts}, scaler=self._scaler)

    def _task_losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Any:
        if callable(self._losses):
            return self._losses(outputs, inputs)
        name = str(self._losses)
        if isinstance(outputs, Mapping):
            names = list(outputs)
            if name in names:
                return outputs[name]
        else:
            names = list(vars(outputs)) if hasattr(outputs, "__dict__") else []
            if name in names:
                return getattr(outputs, name)
        raise RuntimeError(
            f"The model's output has no '{name}'. It has {names}. Return the tasks' losses "
            "under that name, or give PruningCallback a function: losses=lambda outputs, inputs: "
            "{task: loss}."
        )

    def _load(self, folder: Path) -> None:
        if not (folder / FILE).exists():
            raise RuntimeError(
                f"Trainer goes on from a checkpoint, but there is no {FILE} in {folder}. If it "
                "lies elsewhere: PruningCallback(..., resume_from=...)."
            )
        self.pruner.load_state_dict(read_torch(folder / FILE))


class _Latest:
    """Keeps what was written last under each name."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def log(self, mapping: Mapping[str, float], step: int) -> None:
        self.values.update(mapping)


def _folder(args: Any, state: Any) -> Path:
    """The folder of the checkpoint of this step, as Trainer names it."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
