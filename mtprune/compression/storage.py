"""Storage: `save` and `load` of a model as safetensors and JSON, without code.

A model is compressed, or it is a base with the masks of its tasks.

The plan carries a fingerprint of the file with the tensors. Both are written as drafts and then
renamed, so that at any moment there is a plan for the tensors that are there: the plan itself, or,
between the two renames, its draft.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtprune.compression.compress import assemble, plan_of
from mtprune.compression.fallback import fall_back
from mtprune.compression.plan import Plan
from mtprune.compression.stored_masks import masks_of, numbered, read_masks
from mtprune.compression.switching import forget, switch_tasks, whole
from mtprune.files import digest, read_json, replace, write, write_text
from mtprune.model.names import unwrap
from mtprune.model.task_masks import (
    PackedTaskMasks,
    TaskMasks,
    check_tasks,
    masked_parameters,
    remember_task_masks,
)
from mtprune.reading import Entry

if TYPE_CHECKING:
    from mtprune.cards import Card

__all__ = ["META", "PRETRAINED", "Saved", "load", "read", "save"]

TENSORS = "model.safetensors"
META = "plan.json"
PRETRAINED = "config.json"
CARD = "README.md"
_DRAFT = ".new"
_FORMAT = 2
_ADVICE = "Take the folder as mtprune.save wrote it, or save the model again."


def save(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    arguments: Mapping[str, Any] | None = None,
    task_masks: TaskMasks | None = None,
    card: "Card | None" = None,
) -> None:
    """Save a model: its tensors as safetensors, its plan and its class's name as JSON.

    A layer in another form is stored as the parts of the form: a CSR layer as its values and their
    indices. Parts have other names than the tensors of dense layers, so that code without mtprune
    fails to load them instead of loading wrong weights. Needs the extra ``mtprune[safetensors]``.

    A model that is not compressed is saved with the masks of its tasks: one base, and one bit for
    each weight and task, from which `load` makes the subnetwork of any of them.

    Args:
        model: The model that `compress` returned, or one with task masks.
        directory: The folder to save to; made if it does not exist. If something fails, or the
            process is killed, what was saved there before can still be loaded.
        arguments: The keyword arguments that the model's class was called with, as JSON can hold
            them, for `load` to call it again.
        task_masks: ``pruner.task_masks``, with the finalized model or the one from before it was
            pruned. Known already if the model is the very one that a pruner has finalized, or if
            `load` made it.
        card: What there is to know about the model, `mtprune.Card.of(pruner)`; written as
            ``README.md``, which is replaced.

    Raises:
        ValueError: If `compress` did not make this model, and there are no task masks.
        TypeError: If arguments or state cannot be stored.
        OSError: If the files cannot be written.
    """
    safetensors = _safetensors()
    model = unwrap(model)
    masks = masks_of(model, task_masks)
    with whole(model):
        tensors, aliases, strides = _state_of(model)
    cls, bits = type(model), {} if masks is None else numbered(masks)
    plan = plan_of(model) if masks is None else None
    tensors.update((key, masks.bits[task][name]) for key, (task, name) in bits.items() if masks)
    content = safetensors.save(tensors)
    meta = {
        "format": _FORMAT,
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "arguments": None if arguments is None else dict(arguments),
        "plan": None if plan is None else plan.to_dict(),
        "aliases": aliases,
        "strides": strides,
        "tensors": hashlib.sha256(content).hexdigest(),
    }
    if masks is not None:
        shapes = {name: list(part.shape) for name, part in masks.parts.items()}
        meta["task_masks"] = {"tasks": list(masks.bits), "shapes": shapes, "bits": bits}
    try:
        plain = json.loads(json.dumps(meta))
        text = json.dumps({**meta, "digest": digest(plain)}, indent=1)
    except TypeError as error:
        raise TypeError(f"`arguments` must be what JSON can hold: {error}.") from error
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    drafts = [folder / (name + _DRAFT) for name in (TENSORS, META)]
    write(drafts[0], lambda file: file.write(content))
    write(drafts[1], lambda file: file.write(text.encode() + b"\n"))
    for draft in drafts:
        replace(draft, draft.with_suffix(""))
    if card is not None:
        write_text(folder / CARD, card.markdown(plan))


def load(
    directory: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    tasks: Sequence[str] | None = None,
) -> nn.Module:
    """Load a model that `save` or transformers saved; outputs are bitwise the same.

    All of the folder is read and checked before the model is touched, on a copy of it.

    Args:
        directory: The folder to load from.
        model: A dense model, freshly built as the original was before pruning; it becomes the
            saved one. Without it the class is imported by its recorded name and called with
            the recorded arguments: only do that with directories that you trust.
        tasks: Where task masks were saved: the tasks whose subnetwork the model becomes; all of
            the base unless given. `switch_tasks` changes it later.

    Raises:
        FileNotFoundError: If the folder does not exist, or holds no saved model.
        ValueError: If the folder is damaged, or of another model, or the model cannot be built
            without ``model``. The model is then as it was.
    """
    folder = Path(directory)
    if (folder / PRETRAINED).exists() and not (folder / META).exists():
        if model is not None:
            raise ValueError(f"'{folder}' says itself which model it holds: leave `model` out.")
        if tasks is not None:
            raise ValueError(_no_tasks(folder))
        # Imported here, because integrations import compression.
        return import_module("mtprune.integrations.pretrained").load(folder)  # type: ignore[no-any-return]
    saved = read(folder)
    if tasks is not None:
        if saved.task_masks is None:
            raise ValueError(_no_tasks(folder))
        check_tasks(tasks, saved.task_masks.bits)
    model = _build(saved) if model is None else unwrap(model)
    # Tensors go to the device of the model.
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tensors = {name: value.to(device) for name, value in saved.tensors.items()}
    tensors.update({name: tensors[first] for name, first in saved.aliases.items()})
    for target in (deepcopy(model), model):
        _put(target, saved, tensors, folder)
    forget(model)
    if saved.plan is not None:
        fall_back(model)
    if saved.task_masks is not None:
        remember_task_masks(model, saved.task_masks)
        if tasks is not None:
            switch_tasks(model, tasks)
    return model


def _state_of(
    model: nn.Module,
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, list[int]]]:
    """The tensors of a model, further names of the same ones, and strides that are not usual."""
    names: dict[tuple[Any, ...], str] = {}
    aliases, tensors, strides = {}, {}, {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"'{name}' in the state is a {type(value).__name__}, not a tensor.")
        identity = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and identity in names:
            aliases[name] = names[identity]
            continue
        names[identity] = name
        usual = torch.empty(value.shape, device="meta").stride()
        if value.stride() != usual and _is_dense(value.shape, value.stride()):
            strides[name] = list(value.stride())
        # A copy, because two tensors may share memory: safetensors stores no views.
        tensors[name] = value.detach().contiguous().clone()
    return tensors, aliases, strides


def _no_tasks(folder: Path) -> str:
    return (
        f"'{folder}' holds no task masks: leave `tasks` out, or save the finalized model, not the "
        "compressed one, with task_masks=pruner.task_masks."
    )


@dataclass(frozen=True)
class Saved:
    """What a folder holds.

    Attributes:
        made: The class of the model, as ``module:name``, and what it was called with.
        plan: The plan; None for a model that is not compressed.
        tensors: The tensors, each with memory of its own.
        aliases: Further names of tensors.
        task_masks: What its tasks voted for; None for a compressed model.
    """

    made: tuple[str, Mapping[str, Any] | None]
    plan: Plan | None
    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    task_masks: PackedTaskMasks | None


def read(folder: Path) -> Saved:
    """All that a folder holds, looked at.

    Raises:
        FileNotFoundError: If there is no saved model.
        ValueError: If it is damaged.
    """
    safetensors = _safetensors()
    if not (folder / META).exists() or not (folder / TENSORS).exists():
        raise FileNotFoundError(
            f"'{folder}' holds no {META} and {TENSORS}. Give a directory that mtprune.save wrote."
        )
    content = (folder / TENSORS).read_bytes()
    entry = _plan_for(content, folder)
    kind = entry["format"].whole()
    if kind not in (1, _FORMAT):
        raise ValueError(
            f"'{folder}' has format {kind}, and this version of mtprune reads {_FORMAT}. Update "
            "mtprune."
        )
    layout = "channels_last" if kind == 1 else "strides"
    seals = () if kind == 1 else ("tensors", "digest")
    further = ["task_masks"] if kind == _FORMAT and entry["plan"].value is None else []
    names = ["format", "class", "arguments", "plan", "aliases", layout, *seals, *further]
    parts = entry.fields(names)
    if kind == _FORMAT:
        inner = {name: part.value for name, part in parts.items() if name != "digest"}
        if digest(inner) != parts["digest"].text():
            raise parts["digest"].wrong("must be the fingerprint of all other entries")
    try:
        found: dict[str, Tensor] = safetensors.load(content)
    except Exception as error:  # of its own kinds, which differ between versions
        raise ValueError(f"'{folder / TENSORS}' is damaged: {error} {_ADVICE}") from error
    # Copies: what is loaded lies at odd addresses, where kernels may round otherwise.
    tensors = {name: value.clone() for name, value in found.items()}
    masks = read_masks(parts["task_masks"], tensors) if further else None
    if kind == 1:
        for part in parts["channels_last"].items():
            name = part.text(tensors)
            if tensors[name].dim() != 4:
                raise part.wrong("must name a tensor of four dimensions")
            tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    else:
        for name, part in parts["strides"].mapping(tensors).items():
            tensors[name] = _strided(tensors[name], part)
    aliases = {name: part.text(tensors) for name, part in parts["aliases"].mapping().items()}
    if double := set(aliases) & set(tensors):
        raise parts["aliases"].wrong(f"must not name {sorted(double)[:3]}, which are tensors")
    made = parts["class"].text(), parts["arguments"].optional(_arguments)
    plan = None if further else Plan.read(parts["plan"])
    return Saved(made, plan, tensors, aliases, masks)


def _arguments(entry: Entry) -> dict[str, Any]:
    """The keyword arguments of a model's class."""
    return {name: value.plain() for name, value in entry.mapping().items()}


def _plan_for(content: bytes, folder: Path) -> Entry:
    """The entries of the plan that goes with the tensors.

    Raises:
        ValueError: If there is none.
    """
    seal = hashlib.sha256(content).hexdigest()
    for path in (folder / META, folder / (META + _DRAFT)):
        if path.exists():
            entry = Entry(read_json(path), f"'{path}'", _ADVICE)
            if entry["format"].value == 1 or entry["tensors"].value == seal:
                return entry
    raise ValueError(
        f"'{folder / TENSORS}' is not the file that '{folder / META}' was written with: one of "
        f"them is damaged. {_ADVICE}"
    )


def _is_dense(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether strides are those of a contiguous tensor, its dimensions in any order."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True


def _strided(tensor: Tensor, entry: Entry) -> Tensor:
    """A tensor with its numbers in another order in memory."""
    stride = tuple(step.whole() for step in entry.items(tensor.dim()))
    if not _is_dense(tensor.shape, stride):
        raise entry.wrong(f"must be strides of a dense tensor of shape {tuple(tensor.shape)}")
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


def _put(model: nn.Module, saved: Saved, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Turn a dense model into the saved one, in place.

    Raises:
        ValueError: If it cannot become that.
    """
    try:
        if saved.plan is not None:
            assemble(model, saved.plan, tensors)
        if saved.task_masks is not None:
            masked_parameters(model, saved.task_masks.unpack())
        _fill(model, tensors)
        model.eval()
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"'{folder}' does not fit this {type(model).__name__}: {error} Build `model` as the "
            "original was built before pruning."
        ) from error


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give every tensor of the model's state its saved values, type and memory layout."""
    state = model.state_dict(keep_vars=True)
    missing, extra = sorted(state.keys() - tensors), sorted(tensors.keys() - state)
    if missing or extra:
        raise ValueError(
            "The saved tensors are those of another model: "
            f"missing {missing[:3]}, left over {extra[:3]}."
        )
    kinds: dict[tuple[str, torch.dtype], torch.dtype] = {}
    for name, tensor in state.items():
        saved = tensors[name]
        # A model may have become another type since it was built, but not half of a layer.
        kind = kinds.setdefault((name.rpartition(".")[0], tensor.dtype), saved.dtype)
        if kind != saved.dtype:
            raise ValueError(
                f"The saved tensors are those of another model: '{name}' is {saved.dtype}, and "
                f"others of its layer are {kind}."
            )
        alike = tensor.is_floating_point() == saved.is_floating_point()
        if tensor.shape != saved.shape or (tensor.dtype != saved.dtype and not alike):
            raise ValueError(
                f"The saved tensors are those of another model: '{name}' has {saved.dtype} and "
                f"shape {tuple(saved.shape)}, and this model's {tensor.dtype} and "
                f"{tuple(tensor.shape)}."
            )
    for name, tensor in state.items():
        tensor.data = tensors[name]


def _build(saved: Saved) -> nn.Module:
    """A dense model of the recorded class, called with the recorded arguments."""
    recorded, arguments = saved.made
    module, _, qualified = recorded.partition(":")
    advice = "Build the dense model yourself: mtprune.load(directory, model=...)."
    try:
        cls = _class(module, qualified)
    # What a module does when it is imported may fail in any way, or end the process.
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"'{_short(qualified)}' cannot be imported: {_short(error)}. {advice}"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"'{recorded}' is not a torch.nn.Module. {advice}")
    try:
        model: nn.Module = cls(**(arguments or {}))
    except Exception as error:
        given = "no arguments" if arguments is None else _short(dict(arguments))
        raise ValueError(
            f"{qualified} cannot be built with {given}: {_short(error)}. {advice}"
        ) from error
    return model


def _class(module: str, qualified: str) -> Any:
    """What a module has under a name. Importing a module runs it, so not every one is imported.

    Raises:
        ImportError: If it is none that could have a model.
        Exception: Whatever importing it raises.
    """
    if module == "__main__":
        raise ImportError("it was defined in the script that saved it")
    parts = [*module.split("."), *qualified.split(".")]
    if not all(part.isidentifier() for part in parts):
        raise ImportError(f"'{_short(module)}' and '{_short(qualified)}' are no names")
    if parts[0] in sys.stdlib_module_names or "__main__" in parts:
        raise ImportError(f"no model is defined in '{module}', which runs something of its own")
    found = import_module(module)
    for part in qualified.split("."):
        found = getattr(found, part)
    return found


def _short(value: object) -> str:
    """A text, as far as it is of use in an error."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _safetensors() -> Any:
    try:
        return import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            "Saving and loading need safetensors. Install the extra: pip install "
            "'mtprune[safetensors]'."
        ) from error
