"""Trackers: the writers of TensorBoard, W&B, MLflow and Lightning as one thing that has ``log``.

None of them is imported here: each is known by the methods it has.
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mtprune.tracking import Histogram, Picture, Value, Writer

__all__ = ["writer_of"]

Values = Mapping[str, Value]


def writer_of(given: Any) -> Writer:
    """A writer that takes numbers, histograms and pictures, whatever it is made of.

    Args:
        given: TensorBoard's ``SummaryWriter``, a W&B run, the module ``mlflow``, a Lightning
            logger, or anything that has ``log(mapping, step)``, which is shown numbers only.

    Raises:
        TypeError: If it is none of these.

    Example:
        >>> class Printer:
        ...     def log(self, mapping, step):
        ...         print(step, mapping)
        >>> writer_of(Printer()).log({"mtprune/sparsity": 0.5}, 10)
        10 {'mtprune/sparsity': 0.5}
    """
    if _is_tensorboard(given):
        return _TensorBoard(given)
    if _is_mlflow(given):
        return _MLflow(given)
    if _is_wandb(given):
        return _WandB(given)
    if callable(getattr(given, "log_metrics", None)):
        return _Logger(given)
    if callable(getattr(given, "log", None)) and not isinstance(given, type):
        return _Numbers(given.log)
    raise TypeError(
        "`writer` must be a SummaryWriter, a W&B run, the module mlflow, a Lightning logger, or an "
        f"object with log(mapping, step). Got {given!r}."
    )


@dataclass(frozen=True)
class _Numbers:
    """Shows numbers to somebody else's ``log``."""

    take: Callable[[dict[str, float], int], object]

    def log(self, mapping: Values, step: int) -> None:
        if numbers := _numbers(mapping):
            self.take(numbers, step)


@dataclass(frozen=True)
class _TensorBoard:
    """``torch.utils.tensorboard.SummaryWriter``, or tensorboardX's."""

    writer: Any

    def log(self, mapping: Values, step: int) -> None:
        for name, value in mapping.items():
            if isinstance(value, Histogram):
                self.writer.add_histogram_raw(
                    name,
                    min=value.edges[0],
                    max=value.edges[-1],
                    num=sum(value.counts),
                    sum=value.sum,
                    sum_squares=value.squares,
                    bucket_limits=list(value.edges[1:]),
                    bucket_counts=list(value.counts),
                    global_step=step,
                )
            elif isinstance(value, Picture):
                self.writer.add_image(name, value.pixels[None], global_step=step)
            else:
                self.writer.add_scalar(name, value, global_step=step)


class _WandB:
    """A run of W&B. Its own step counts its rows, so the optimizer's is a column of ours."""

    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric("mtprune/step", hidden=True)
        run.define_metric("mtprune/*", step_metric="mtprune/step")

    def log(self, mapping: Values, step: int) -> None:
        wandb = sys.modules["wandb"]  # whoever has a run has it
        row: dict[str, Any] = {"mtprune/step": step}
        for name, value in mapping.items():
            if isinstance(value, Histogram):
                row[name] = wandb.Histogram(np_histogram=(list(value.counts), list(value.edges)))
            elif isinstance(value, Picture):
                row[name] = wandb.Image(_bytes(value))
            else:
                row[name] = value
        self._run.log(row)


@dataclass(frozen=True)
class _MLflow:
    """The module ``mlflow``, that is, its active run. It has no histograms."""

    module: Any

    def log(self, mapping: Values, step: int) -> None:
        if numbers := _numbers(mapping):
            named = {_plain(name): value for name, value in numbers.items()}
            self.module.log_metrics(named, step=step)
        for name, value in mapping.items():
            if isinstance(value, Picture):
                self.module.log_image(_bytes(value), key=_plain(name), step=step)


class _Logger:
    """A Lightning logger: numbers go through it, the rest to the writer behind it, if it is one."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def log(self, mapping: Values, step: int) -> None:
        if numbers := _numbers(mapping):
            self._logger.log_metrics(numbers, step=step)
        rest = {name: value for name, value in mapping.items() if name not in numbers}
        behind = getattr(self._logger, "experiment", None)
        if rest and _is_tensorboard(behind):
            _TensorBoard(behind).log(rest, step)
        elif rest and _is_wandb(behind):
            _WandB(behind).log(rest, step)


def _is_tensorboard(given: Any) -> bool:
    return callable(getattr(given, "add_scalar", None)) and hasattr(given, "add_histogram_raw")


def _is_mlflow(given: Any) -> bool:
    return getattr(given, "__name__", "") == "mlflow" and hasattr(given, "log_metrics")


def _is_wandb(given: Any) -> bool:
    return all(callable(getattr(given, name, None)) for name in ("log", "define_metric"))


def _numbers(mapping: Values) -> dict[str, float]:
    return {n: v for n, v in mapping.items() if not isinstance(v, (Histogram, Picture))}


def _plain(name: str) -> str:
    """A name as MLflow allows it."""
    return re.sub(r"[^\w.\-/ ]", "_", name, flags=re.ASCII)


def _bytes(value: Picture) -> Any:
    """A picture as numpy has it, ``[rows, columns]`` of bytes."""
    return (value.pixels * 255).round().to(torch.uint8).numpy()
