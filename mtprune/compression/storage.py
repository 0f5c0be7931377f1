"""Storage: `save` and `load` of a compressed model as safetensors and JSON, without code."""

import json
from collections.abc import Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtprune.compression.compress import assemble, plan_of
from mtprune.compression.plan import Plan
from mtprune.model.names import unwrap

__all__ = ["load", "save"]

TENSORS = "model.safetensors"
META = "plan.json"
PRETRAINED = "config.json"
_FORMAT = 1


def save(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Save a compressed model: its tensors as safetensors, its plan and its class's name as JSON.

    A layer in another form is stored as the parts of the form: a CSR layer as its values and their
    indices. Parts have other names than the tensors of dense layers, so that code without mtprune
    fails to load them instead of loading wrong weights. Needs the extra ``mtprune[safetensors]``.

    Args:
        model: The model that `compress` returned.
        directory: The folder to save to; made if it does not exist.
        arguments: The keyword arguments that the model's class was called with, as JSON can hold
            them, for `load` to call it again.

    Raises:
        ValueError: If `compress` did not make this model.
        TypeError: If arguments or state cannot be stored.
    """
    safetensors = _safetensors()
    model, plan = unwrap(model), plan_of(model)
    cls = type(model)
    names: dict[tuple[Any, ...], str] = {}
    aliases, tensors, channels_last = {}, {}, []
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"'{name}' in the state is a {type(value).__name__}, not a tensor.")
        identity = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and identity in names:
            aliases[name] = names[identity]
            continue
        names[identity] = name
        last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
        if last and not value.is_contiguous():
            channels_last.append(name)
        # A copy, because two tensors may share memory: safetensors stores no views.
        tensors[name] = value.detach().contiguous().clone()
    meta = {
        "format": _FORMAT,
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "arguments": None if arguments is None else dict(arguments),
        "plan": plan.to_dict(),
        "aliases": aliases,
        "channels_last": channels_last,
    }
    try:
        text = json.dumps(meta, indent=1)
    except TypeError as error:
        raise TypeError(f"`arguments` must be what JSON can hold: {error}.") from error
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(tensors, str(folder / TENSORS))
    (folder / META).write_text(text + "\n")


def load(directory: str | PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load a model that `save` or transformers saved; outputs are bitwise the same.

    Args:
        directory: The folder to load from.
        model: A dense model, freshly built as the original was before pruning; it becomes the
            compressed one. Without it the class is imported by its recorded name and called with
            the recorded arguments: only do that with directories that you trust.

    Raises:
        FileNotFoundError: If the folder does not exist, or holds no saved model.
        ValueError: If the model cannot be built without ``model``, or is another one.
    """
    safetensors = _safetensors()
    folder = Path(directory)
    if (folder / PRETRAINED).exists() and not (folder / META).exists():
        if model is not None:
            raise ValueError(f"'{folder}' says itself which model it holds: leave `model` out.")
        # Imported here, because integrations import compression.
        return import_module("mtprune.integrations.pretrained").load(folder)  # type: ignore[no-any-return]
    if not (folder / META).exists() or not (folder / TENSORS).exists():
        raise FileNotFoundError(
            f"'{folder}' holds no {META} and {TENSORS}. Give a directory that mtprune.save wrote."
        )
    meta = json.loads((folder / META).read_text())
    if meta.get("format") != _FORMAT:
        raise ValueError(
            f"'{folder}' has format {meta.get('format')!r}, and this version of mtprune reads "
            f"{_FORMAT}. Update mtprune."
        )
    model = _build(meta) if model is None else unwrap(model)
    tensors: dict[str, Tensor] = safetensors.load_file(str(folder / TENSORS))
    for name in meta["channels_last"]:
        tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    # Tensors go to the device of the model.
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tensors = {name: value.to(device) for name, value in tensors.items()}
    tensors.update({name: tensors[first] for name, first in meta["aliases"].items()})
    assemble(model, Plan.from_dict(meta["plan"]), tensors)
    _fill(model, tensors)
    return model


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give every tensor of the model's state its saved values, type and memory layout."""
    state = model.state_dict(keep_vars=True)
    missing, extra = sorted(state.keys() - tensors), sorted(tensors.keys() - state)
    if missing or extra:
        raise ValueError(
            f"The saved tensors are those of another model: missing {missing[:3]}, left over "
            f"{extra[:3]}. Build `model` as the original was built."
        )
    for name, tensor in state.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"The saved tensors are those of another model: '{name}' has shape "
                f"{tuple(tensors[name].shape)}, and this model's {tuple(tensor.shape)}."
            )
    for name, tensor in state.items():
        tensor.data = tensors[name]


def _build(meta: Mapping[str, Any]) -> nn.Module:
    """A dense model of the recorded class, called with the recorded arguments."""
    module, _, qualified = meta["class"].partition(":")
    advice = "Build the dense model yourself: mtprune.load(directory, model=...)."
    try:
        if module == "__main__":
            raise ImportError("it was defined in the script that saved it")
        cls: Any = import_module(module)
        for part in qualified.split("."):
            cls = getattr(cls, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"'{qualified}' cannot be imported: {error}. {advice}") from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"'{meta['class']}' is not a torch.nn.Module. {advice}")
    try:
        model: nn.Module = cls(**(meta["arguments"] or {}))
    except Exception as error:
        given = "no arguments" if meta["arguments"] is None else f"{meta['arguments']}"
        raise ValueError(f"{qualified} cannot be built with {given}: {error}. {advice}") from error
    return model


def _safetensors() -> Any:
    try:
        return import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            "Saving and loading need safetensors. Install the extra: pip install "
            "'mtprune[safetensors]'."
        ) from error
