"""Pretrained: compressed encoders that ``from_pretrained`` loads.

The tensors of a compressed model do not fit the model that its configuration describes. So the
configuration holds the plan too, as ``quantization_config``: a quantizer of transformers is code
that may change a model before its weights are loaded. `PlanQuantizer` changes it as the plan says.

Importing this module registers `PlanConfig` and `PlanQuantizer` with transformers.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtprune.compression.choose import opened_in, place
from mtprune.compression.compress import assemble, plan_of
from mtprune.compression.experts import OpenExperts
from mtprune.compression.fallback import fall_back
from mtprune.compression.forms import Form
from mtprune.compression.plan import Measured, Plan, Removal, Row, joined, seen_from
from mtprune.compression.sites import find_sites
from mtprune.compression.storage import CARD
from mtprune.files import read_json, write_text
from mtprune.integrations.plain import plain_config
from mtprune.model.names import unwrap
from mtprune.model.paths import numbers
from mtprune.reading import Entry

try:
    from transformers.quantizers.auto import (
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError:
    AUTO_QUANTIZER_MAPPING = None
    HfQuantizer = QuantizationConfigMixin = object

if TYPE_CHECKING:
    from mtprune.cards import Card

__all__ = ["HEADS", "METHOD", "PlanConfig", "PlanQuantizer", "load", "save_pretrained"]

METHOD = "mtprune"
"""The name of the quantizer in a configuration."""

HEADS = "heads"
"""The folder of the tasks' heads."""

_FORMAT = 1
_SOURCE = "The `quantization_config` of this model"
_ADVICE = "Take the folder as mtprune's save_pretrained wrote it, or save the model again."
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "uint8", "bool")


class PlanConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a compressed model.

    Args:
        plan: The plan, as `Plan.to_dict` returns it.
        tensors: Type and shape, by name, of the tensors that do not follow from the configuration:
            the parts of layers that are not dense, and biases of layers that lost inputs.
        prefix: The prefix of names in the base model; empty if that was saved by itself.
        format: The version of the format.
        quant_method: ``"mtprune"``.
        others: Ignored: entries of later formats.
    """

    def __init__(
        self,
        plan: Mapping[str, Any],
        tensors: Mapping[str, tuple[str, list[int]]],
        prefix: str = "",
        format: int = _FORMAT,  # noqa: A002 - its name in the file
        quant_method: str = METHOD,
        **others: Any,
    ) -> None:
        if format != _FORMAT:
            raise ValueError(
                f"This model has format {format!r}, and this version of mtprune reads {_FORMAT}. "
                "Update mtprune."
            )
        entry = Entry({"plan": plan, "tensors": tensors, "prefix": prefix}, _SOURCE, _ADVICE)
        Plan.read(entry["plan"])
        for spec in entry["tensors"].mapping().values():
            dtype, shape = spec.items(2)
            dtype.text(_DTYPES)
            for size in shape.items():
                size.whole(most=1 << 40)
        self.quant_method = quant_method
        self.format = format
        self.prefix = entry["prefix"].text()
        self.plan = dict(plan)
        self.tensors = dict(tensors)


class PlanQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts the forms of a plan into a model before its weights are loaded."""

    quantization_config: Any
    requires_calibration = True  # loading a dense model cannot make a plan

    def is_serializable(self) -> bool:
        """Whether the model can be saved: yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained further: yes."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **others: Any) -> None:
        try:
            plan, tensors = _fitted(self.quantization_config, model)
            assemble(model, plan, tensors)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{_SOURCE} does not fit this {type(model).__name__}: {error} {_ADVICE}"
            ) from error
        names = (seen_from(_prefix(model), name) or name for name in _markers(model))
        ignored = {rf"(^|\.){re.escape(name)}$" for name in names}
        theirs = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
        all_ignored = ignored | set(theirs or ())
        # A list in the first versions of transformers 5, a set later.
        model._keys_to_ignore_on_load_unexpected = (
            all_ignored if isinstance(theirs, set) else sorted(all_ignored)
        )

    def postprocess_model(self, model: Any, **others: Any) -> None:
        """Unmark the model as quantized, so that it can be cast and trained like any other."""
        model.config.quantization_config = self.quantization_config
        model.is_quantized = False
        _check_layers(model, self.quantization_config)
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta:
                # A copy: what was loaded may be the file itself, at an odd address.
                tensor.data = tensor.data.clone(memory_format=torch.preserve_format)
        for module in model.modules():
            if isinstance(module, Form) and module.frozen:
                module.requires_grad_(False)
        if fall_back(model, stacklevel=4):
            self.quantization_config = _config(model, plan_of(model))
            model.config.quantization_config = self.quantization_config

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], Any]:
        """The state, with entries that make code without mtprune fail to load it."""
        return {**model.state_dict(), **_markers(model)}, {}


def save_pretrained(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    encoder: str = "",
    heads: str = "",
    card: "Card | None" = None,
) -> None:
    """Save a compressed encoder of transformers so that ``from_pretrained`` loads it.

    Once mtprune is imported, ``from_pretrained(directory)`` of all classes returns the compressed
    model, bitwise; without mtprune it raises. A model whose layers are all dense, and whole or as
    wide as a configuration can say, is saved as transformers does it, and loads without mtprune.
    Needs the extra ``mtprune[transformers]``.

    Args:
        model: The model that `compress` returned.
        directory: The folder to save to; made if it does not exist.
        encoder: The name of the encoder in the model; the whole model unless given.
        heads: The name of a ``ModuleDict`` in the model: its modules are saved beside the encoder,
            in ``heads/<key>.safetensors``.
        card: What there is to know about the model, `mtprune.Card.of(pruner)`; written as
            ``README.md``, which is replaced.

    Raises:
        TypeError: If the encoder is not a model of transformers.
        ValueError: If `compress` did not make this model.
    """
    model = unwrap(model)
    plan = plan_of(model)
    module: Any = model.get_submodule(encoder)
    if not _is_pretrained(module):
        names = [repr(name) for name, child in model.named_modules() if _is_pretrained(child)]
        raise TypeError(
            f"`encoder` must name a model of transformers. Got {encoder!r}, a "
            f"{type(module).__name__}. There is {', '.join(names) or 'none in this model'}; others "
            "can be saved with mtprune.save."
        )
    part = plan.part(encoder)
    folder = Path(directory)
    is_dense = all(row.choice == "dense" for row in part.rows)
    plain = plain_config(module, part.removal) if is_dense and part.removal else None
    if plain is None and (part.removal or not is_dense):
        module.config.quantization_config = _config(module, part)
        module.hf_quantizer = PlanQuantizer(module.config.quantization_config)
    old = module.config
    try:
        module.config = plain or old
        module.save_pretrained(folder)
    finally:
        module.config = old
    if heads:
        safetensors = import_module("safetensors.torch")  # transformers needs it too
        (folder / HEADS).mkdir(exist_ok=True)
        for key, head in model.get_submodule(heads).named_children():
            state = {name: value.contiguous() for name, value in head.state_dict().items()}
            safetensors.save_file(state, str(folder / HEADS / f"{key}.safetensors"))
    if card is not None:
        write_text(folder / CARD, card.markdown(plan))


def load(directory: str | PathLike[str]) -> nn.Module:
    """Load a model that `save_pretrained` saved, as the class that it had.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If transformers has no such class.
    """
    if AUTO_QUANTIZER_MAPPING is None:
        raise ImportError(
            f"'{directory}' holds a model of transformers. Install the extra: pip install "
            "'mtprune[transformers]'."
        )
    path = Path(directory) / "config.json"
    config = Entry(read_json(path), f"'{path}'", _ADVICE)
    listed = config.mapping().get("architectures")
    names = listed.items() if listed is not None and listed.value else []
    name = names[0].text() if names else "model without a class"
    cls: Any = getattr(import_module("transformers"), name, None)
    if cls is None:
        raise ValueError(
            f"'{directory}' holds a {name}, which transformers does not have. Import its class "
            "yourself and call its from_pretrained."
        )
    model: nn.Module = cls.from_pretrained(directory)
    return model


def _config(model: nn.Module, plan: Plan) -> PlanConfig:
    """The ``quantization_config`` of a model with this plan."""
    cut = {name.rpartition(".")[0] for name in (c.tensor for c in plan.removal.cuts)}
    tensors = {
        f"{name}.{key}": (str(value.dtype).removeprefix("torch."), list(value.shape))
        for name, module in model.named_modules()
        for key, value in module.state_dict().items()
        # Constants that were removed may have given a layer its first bias.
        if isinstance(module, Form) or (name in cut and key == "bias")
    }
    return PlanConfig(plan.to_dict(), tensors, _prefix(model))


def _fitted(config: PlanConfig, model: Any) -> tuple[Plan, dict[str, Tensor]]:
    """The plan for this model, whose head may not be the saved one, and the parts of its forms.

    Parts are on the meta device, and of the type in which they will be loaded: the model's.
    """
    plan, tensors, prefix = Plan.from_dict(config.plan), config.tensors, _prefix(model)
    if config.prefix != prefix:
        plan = plan.part(config.prefix).under(prefix)
        specs = {seen_from(config.prefix, name): spec for name, spec in tensors.items()}
        tensors = {joined(prefix, name): spec for name, spec in specs.items() if name}
    sites = find_sites(model, opened_in(plan))
    shapes = {site.name: tuple(site.layer.weight.shape) for site in sites}
    place(sites, {})
    # Rows tell the shapes after removal, which a head shares in where it reads what lost units.
    cuts = {name: plan.removal[f"{name}.weight"] for name in shapes}
    shapes |= {
        n: cut.after for n, cut in cuts.items() if cut is not None and cut.shape == shapes[n]
    }
    # Layers that this model does not have are left out; its head may be another one.
    rows = [row for row in plan.rows if row.layer in shapes]
    rows = [r for r in rows if seen_from(prefix, r.layer) or shapes[r.layer] == r.shape]
    # Experts that are gone are none of its layers: those that stay are known.
    new = {site.name for site in sites if site.opened is None} - {row.layer for row in rows}
    rows += [Row(name, shapes[name], "dense", (Measured("dense", None, 0),)) for name in new]
    modules = {name for name, _ in model.named_modules()}
    removal = Removal(
        tuple(cut for cut in plan.removal.cuts if cut.tensor.rpartition(".")[0] in modules),
        tuple(
            (path, count)
            for path, count in plan.removal.counts
            if path.rpartition(".")[0] in modules or numbers(model, [path])
        ),
        tuple(part for part in plan.removal.taken if part.module in modules),
    )
    parts = {}
    for name, (dtype, shape) in tensors.items():
        part = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        parts[name] = part.to(model.dtype) if part.is_floating_point() else part
    blocks = tuple(block for block in plan.blocks if block.layer in modules)
    return replace(plan, rows=tuple(rows), removal=removal, blocks=blocks), parts


def _check_layers(model: Any, config: PlanConfig) -> None:
    """Refuse layers of the plan that were not loaded whole, or not as they were saved.

    Transformers only warns of what it did not find, and has a start for it in no form but the dense
    one. A dense layer that is missing altogether may be a head that the saved model did not have.

    Raises:
        ValueError: With the name of the layer.
    """
    state = model.state_dict(keep_vars=True)
    # How transformers marks what it has loaded; where it marks nothing, nothing can be said.
    found = {name for name, value in state.items() if getattr(value, "_is_hf_initialized", False)}
    prefix = _prefix(model)
    rows = Plan.from_dict(config.plan).part(config.prefix).under(prefix).rows
    known = {row.layer for row in rows if seen_from(prefix, row.layer)}
    for name, layer in model.named_modules():
        if not isinstance(layer, Form) and name not in known:
            continue
        own = {key for key in state if key.startswith(f"{name}.")}
        lost = sorted(own - found)
        if found and lost and (isinstance(layer, Form) or len(lost) < len(own)):
            raise ValueError(
                f"The saved tensors do not fit layer '{name}': they lack {lost[:3]}. {_ADVICE}"
            )
        try:
            if not all(part.is_floating_point() for part in layer.parameters()):
                raise ValueError("its weights are whole numbers.")
            if isinstance(layer, Form):
                layer.check()
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"The saved tensors do not fit layer '{name}': {error} {_ADVICE}"
            ) from error


def _markers(model: nn.Module) -> dict[str, Tensor]:
    """Empty weights for layers without a weight: code that expects one fails on its shape.

    Without the markers transformers would only warn, and initialize the missing weights at random.
    """
    modules = dict(model.named_modules())
    layers = {
        f"{name}.weight": torch.empty(0)
        for name, module in modules.items()
        if isinstance(module, Form) and "weight" not in module.state_dict()
    }
    stacks = {
        f"{name}.{stack}": empty
        for name, module in modules.items()
        if isinstance(module, OpenExperts)
        for stack, empty in module.markers()
    }
    return {**layers, **stacks}


def _is_pretrained(module: nn.Module) -> bool:
    return hasattr(module, "save_pretrained") and hasattr(module, "base_model_prefix")


def _prefix(model: Any) -> str:
    """The prefix of names in the base model; empty if the model is a base model."""
    prefix: str = model.base_model_prefix
    return prefix if prefix and hasattr(model, prefix) else ""


def register() -> None:
    """Register the format with transformers, if that is installed; once is enough."""
    if AUTO_QUANTIZER_MAPPING is not None and METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(PlanConfig)
        register_quantizer(METHOD)(PlanQuantizer)


register()
