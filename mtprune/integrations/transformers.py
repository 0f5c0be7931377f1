"""For transformers: a callback for its ``Trainer``, and `save_pretrained` for ``from_pretrained``.

Trainer shows no callback the losses of a step. So a forward hook on the model hands them to the
pruner while their graph is alive. The callback calls `step` after every optimizer step, and saves
the pruner's state with every checkpoint.

Importing this module registers the format of compressed models with transformers at once; after
``import mtprune`` alone that happens when transformers is imported.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mtprune.files import read_torch, write_torch
from mtprune.integrations.pretrained import save_pretrained
from mtprune.model.names import unwrap
from mtprune.pruner import MultitaskPruner

try:
    from transformers import TrainerCallback
except ImportError:
    TrainerCallback = object

__all__ = ["FILE", "PruningCallback", "save_pretrained"]

FILE = "mtprune.pt"
"""The file of the pruner's state in a checkpoint folder."""

Losses = Callable[[Any, Mapping[str, Any]], Any]


class PruningCallback(TrainerCallback):  # type: ignore[misc]
    """Shows a pruner the losses of a `transformers.Trainer`, and lets it update its masks in time.

    Trainer trains on the ``loss`` that the model returns, as without the callback. Build the pruner
    on the model that the Trainer trains, with the tasks' names, and call `finalize` yourself after
    training: until then checkpoints may hold ``weight_orig`` and ``weight_mask``. Resuming goes on
    bit for bit.

    Args:
        pruner: The pruner.
        losses: The tasks' losses: the name in the model's output of a mapping ``{task: loss}``, or
            a function ``losses(outputs, inputs)`` that returns the mapping. With one loader for
            each task, the mapping has one loss, under the task's name:
            ``lambda outputs, inputs: {inputs["task"]: outputs["loss"]}``.
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
        losses: str | Losses = "losses",
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
        if not (isinstance(losses, str) or callable(losses)):
            raise TypeError(
                f"`losses` must be a name in the model's output, or a function of (outputs, "
                f"inputs). Got {losses!r}."
            )
        self.pruner = pruner
        self._losses = losses
        self._resume_from = None if resume_from is None else Path(resume_from)
        self._handle: RemovableHandle | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **others: Any
    ) -> None:
        """Watch the model's outputs; load the pruner's state if Trainer resumes a checkpoint."""
        if args.fp16:
            raise ValueError(
                "fp16=True scales losses where no callback can see by how much. Use bf16=True."
            )
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
        if state.global_step:
            self._load(self._resume_from or _folder(args, state))
        self.on_train_end(args, state, control)  # in case the last run was interrupted
        self._handle = trained.register_forward_hook(self._observe, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """After the optimizer's step: update masks if that is due."""
        self.pruner.step()

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Save the pruner's state with the checkpoint."""
        folder = _folder(args, state)
        if state.is_world_process_zero:  # the state is the same on every rank
            folder.mkdir(parents=True, exist_ok=True)
            write_torch(folder / FILE, self.pruner.state_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stop watching the model's outputs."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _observe(
        self, module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], outputs: Any
    ) -> None:
        if module.training and torch.is_grad_enabled():
            self.pruner.observe_losses(self._task_losses(outputs, inputs))

    def _task_losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Any:
        if not isinstance(self._losses, str):
            return self._losses(outputs, inputs)
        if isinstance(outputs, Mapping):
            names = list(outputs)
            if self._losses in names:
                return outputs[self._losses]
        else:
            names = list(vars(outputs)) if hasattr(outputs, "__dict__") else []
            if self._losses in names:
                return getattr(outputs, self._losses)
        raise RuntimeError(
            f"The model's output has no '{self._losses}'. It has {names}. Return the tasks' losses "
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


def _folder(args: Any, state: Any) -> Path:
    """The folder of the checkpoint of this step, as Trainer names it."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
