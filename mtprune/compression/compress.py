"""`compress`: remove dead units, choose a form for every layer, and check the copy."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mtprune import checks
from mtprune.compression.attention import NarrowAttention
from mtprune.compression.calls import record_calls, self_attentions
from mtprune.compression.choose import (
    build_forms,
    check_fits,
    choose,
    dense_unless_faster,
    opened_in,
    place,
    time_whole,
    told,
)
from mtprune.compression.experts import OpenExperts
from mtprune.compression.extract import Places, cut, extract
from mtprune.compression.forms import FORMS, Form
from mtprune.compression.joining import choose_blocks, join_all
from mtprune.compression.measure import sizes_of
from mtprune.compression.mixtures import experts_in, share_calls, stacks_unless_faster
from mtprune.compression.plan import Plan, Removal
from mtprune.compression.resizing import resize
from mtprune.compression.running import check_devices, parse, unnested
from mtprune.compression.shrink import Units, check_shrunk, groups_of, shrink
from mtprune.compression.sites import find_sites, refuse_unfinished
from mtprune.compression.timing import Measure, interleaved
from mtprune.compression.together import Together
from mtprune.compression.verify import Reference, Replaced, worst_layer
from mtprune.model.names import unwrap
from mtprune.model.task_masks import TaskMasks
from mtprune.progress import is_watched, stages

__all__ = ["assemble", "choose_forms", "compress", "finish", "is_compressed", "plan_of"]

_PLAN = "_mtprune_plan"
_STAGES = 5


def compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    groups: Any = "auto",
    tasks: Sequence[str] | None = None,
    task_masks: TaskMasks | None = None,
    outputs: Places | None = None,
    portable: bool = False,
    plan: Plan | None = None,
    tolerance: float | None = None,
    measure: Measure = interleaved,
    progress: bool | None = None,
) -> nn.Module:
    """A copy of a sparse model that is faster on this machine and gives the same outputs.

    First, units whose outputs no layer reads, or are constant, are removed with all their entries:
    ``groups`` says which units a model has.

    Then every Linear and Conv2d with zeros in its weight, or of low rank, is timed in each form it
    can take, on the inputs that it receives in the model, and takes the fastest: ``"dense"``,
    ``"rows"`` (without its dead outputs), ``"thin"`` (without its dead inputs too), ``"sparse"`` (a
    sparse product of our own, on a CPU in float32; a C compiler makes it at first use), ``"csr"``
    (torch's sparse product, on a CPU), ``"2:4"`` (CUDA, float16 and bfloat16) or ``"rank"`` (two
    layers, where these are smaller). The projections of a ``MultiheadAttention`` that attends to
    itself are timed too. A form that is not faster than the dense one by 5 % is not taken, and of
    forms within 5 % of each other the smallest is. Then each encoder layer that native code knows
    is timed as one block, and becomes one if that is faster (``plan.blocks``). If the model as a
    whole is no faster, all layers stay dense.

    The copy is in eval mode and meant for inference; the model is left as it is.

    Args:
        model: A model with zeros in its weights: after ``pruner.finalize()``, or from elsewhere.
        example_inputs: Inputs like those to come: a tensor, a tuple of arguments, a dict of
            keyword arguments, or a list of these, several batch sizes for instance.
        groups: The units that can be removed: the granularity that the model was pruned with,
            ``Channel(example_inputs)`` for instance, or groups (`mtprune.structure.Group`), or
            several of these, or none: ``()``. ``"auto"`` or None takes the heads and neurons of
            transformers that `mtprune.patterns` knows, if removing some of them on trial changes
            nothing else.
        tasks: Keep only the weights that one of these tasks voted for, and the outputs of these
            tasks. `plan_of` says how many weights that are (``subnetwork``). The absence of other
            weights changes the outputs of these tasks too (see ``docs/compress.md``).
        task_masks: ``pruner.task_masks``: the weights that each task voted for. Known already if
            the model is the very one that a pruner has finalized.
        outputs: ``{task: place}``: the keys, fields or indices of the model's outputs that belong
            to each task. By default they are found by name, or by the weights that they depend on.
        portable: Take only forms that can be exported (``torch.export``, ONNX).
        plan: A plan made before or edited. Nothing is timed. Give the ``tasks`` it was made for.
        tolerance: The relative Frobenius norm by which outputs may differ: 1e-5 in float32 unless
            given. Outputs are bitwise equal if nothing is removed and all layers stay dense.
        measure: How forms are timed: from a list of functions to the milliseconds of each. Layers
            that are alike, in shape and in share of zeros, are timed once.
        progress: Show a progress bar, if tqdm is installed; where a terminal is, unless given.

    Raises:
        ValueError: If the model does not run on the inputs, is not finalized, or groups or plan
            are for another model.
        RuntimeError: If outputs differ by more than the tolerance.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 1))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.mul_(torch.rand(512, 64) > 0.95)
        >>> fast = compress(model, [torch.randn(1, 64), torch.randn(32, 64)])
        >>> x = torch.randn(8, 64)
        >>> torch.allclose(fast(x), model(x), atol=1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module. Got {model!r}.")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"`plan` must be a mtprune.Plan. Got {plan!r}.")
    if tolerance is not None:
        checks.inside(
            "tolerance", tolerance, "[0, inf)", must="must be a finite number, at least 0"
        )
    model = unwrap(model)
    made_by = getattr(model, _PLAN, None)
    if made_by is not None:
        _check_same(made_by, plan, tasks)
        return copy.deepcopy(model).eval()
    refuse_unfinished(model)
    batches = parse(example_inputs)
    check_devices(model, batches)
    original, part = model, None
    if tasks is not None:
        model, part = extract(model, batches, tasks, task_masks, outputs)
    elif task_masks is not None or outputs is not None:
        raise ValueError(
            "`task_masks` and `outputs` say what belongs to `tasks`. Give `tasks` too."
        )
    if plan is not None and _tasks(plan) != (set() if part is None else set(part.tasks)):
        raise ValueError(
            f"The plan is for the tasks {sorted(_tasks(plan))}. Compress with the same `tasks`."
        )
    work = copy.deepcopy(model).eval()
    is_timed = plan is None
    before = copy.deepcopy(work)
    shown = is_watched() if progress is None else progress
    with unnested(work), unnested(before), stages(_STAGES, shown) as begin:
        begin("trying out units")
        units = groups_of(model, groups, batches) if plan is None else Units()
        begin("running other inputs")
        reference = Reference.of(before, batches)
        begin("removing dead units")
        removal = shrink(work, units.groups, reference, plan)
        if removal:
            check_shrunk(work, reference, units.groups, tolerance)
        if plan is None:
            begin("timing layers")
            plan, replaced = choose_forms(work, batches, removal, portable, measure, shown)
        else:
            plan, replaced = _replay_forms(work, batches, plan, portable)
        begin("comparing outputs")
        exact = not (removal or replaced or plan.blocks)
        reference.check(work, tolerance, partial(worst_layer, replaced), exact=exact)
        if is_timed:
            plan = replace(plan, stayed=units.stayed(before, removal, reference.others))
        if removal and is_timed:
            plan = time_whole(plan, model, work, batches, measure)
    if plan.sizes is None:
        # A copy once more: the user's own model is never run.
        plan = replace(plan, sizes=sizes_of(work, batches, copy.deepcopy(original).eval()))
    return finish(work, replace(plan, subnetwork=part))


def choose_forms(
    work: nn.Module,
    batches: Sequence[Any],
    removal: Removal,
    portable: bool,
    measure: Measure,
    shown: bool,
) -> tuple[Plan, list[Replaced]]:
    """Time all forms of all layers, and put the best in their places."""
    mixtures = [] if portable else experts_in(work)
    sites = find_sites(work, [*self_attentions(work, batches), *mixtures])
    calls = share_calls(sites, record_calls(work, sites, batches))
    plan, forms = choose(sites, calls, measure, removal, portable, shown)
    place(sites, forms)
    plan, forms = stacks_unless_faster(work, sites, batches, plan, forms, measure)
    if not portable:
        place(sites, forms)
        plan = replace(plan, blocks=choose_blocks(work, batches, measure, bool(removal)))
    place(sites, {})
    plan, forms = dense_unless_faster(work, sites, batches, plan, forms, measure)
    place(sites, forms)
    join_all(work, plan)
    return plan, [Replaced(s, forms[s.name], calls[s.name]) for s in sites if s.name in forms]


def _replay_forms(
    work: nn.Module, batches: Sequence[Any], plan: Plan, portable: bool
) -> tuple[Plan, list[Replaced]]:
    """Put the forms of a plan in their places."""
    sites = find_sites(work, opened_in(plan))
    check_fits(plan, sites)
    calls = record_calls(work, sites, batches)
    plan, forms = build_forms(plan, sites, portable)
    plan = replace(plan, blocks=()) if portable else plan
    place(sites, forms)
    join_all(work, plan)
    return plan, [Replaced(s, forms[s.name], calls[s.name]) for s in sites if s.name in forms]


def _check_same(made_by: Plan, plan: Plan | None, tasks: Sequence[str] | None) -> None:
    """Check that a compressed model is not to be compressed by another plan."""
    differs = tasks is not None and _tasks(made_by) != set(tasks)
    if differs or (plan is not None and plan != made_by):
        raise ValueError("This model is compressed already, by another plan. Give the dense model.")


def _tasks(plan: Plan) -> set[str]:
    return set() if plan.subnetwork is None else set(plan.subnetwork.tasks)


def plan_of(model: nn.Module) -> Plan:
    """The plan of a compressed model.

    Raises:
        ValueError: If `compress` did not make this model.

    Example:
        >>> import torch
        >>> fast = compress(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2))
        >>> print(plan_of(fast))
        layer  shape  choice  dense ms  chosen ms  dense bytes  bytes
        0      2x2    dense          -          -           24     24  no zeros
        whole model: parameters 6 -> 6, multiply-adds 4 -> 4, bytes 24 -> 24
        Nothing to compress: no weight of a layer is zero.
    """
    plan = getattr(unwrap(model), _PLAN, None)
    if not isinstance(plan, Plan):
        raise ValueError("This model has no plan: mtprune.compress did not make it.")
    return plan


def is_compressed(model: nn.Module) -> bool:
    """Whether `compress` made this model."""
    return isinstance(getattr(unwrap(model), _PLAN, None), Plan)


def assemble(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Turn a dense model into the compressed model of a plan, in place, with the saved parts.

    Args:
        model: The dense model, as it was built.
        plan: The plan.
        tensors: The saved tensors by name, as in the compressed model's ``state_dict``.

    Raises:
        ValueError: If the plan is for another model.
    """
    if plan.subnetwork is not None:
        cut(model, plan.subnetwork)
    resize(model, plan.removal)
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        layer = dict(model.named_modules()).get(path)
        if attribute == "bias" and isinstance(layer, (nn.Linear, _ConvNd)) and layer.bias is None:
            # Units that were constants were moved into this bias.
            layer.bias = nn.Parameter(tensor, layer.weight.requires_grad)
    sites = find_sites(model, opened_in(plan))
    check_fits(plan, sites)
    forms = {}
    for site in told(plan, sites):
        choice = plan[site.name].choice
        if choice != "dense":
            prefix = site.name + "."
            parts = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            forms[site.name] = FORMS[choice](site.layer, parts)
    place(sites, forms)
    join_all(model, plan)
    return finish(model, plan)


def finish(model: nn.Module, plan: Plan) -> nn.Module:
    """The model in eval mode, with its plan, and with its forms' names."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            isinstance(m, (Form, NarrowAttention, Together)) for m in encoder.modules()
        ):
            encoder.use_nested_tensor = False
    for name, module in model.named_modules():
        if isinstance(module, (Form, OpenExperts)):
            module.site = name
    setattr(model, _PLAN, plan)
    return model.eval()
