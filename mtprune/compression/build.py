"""`compress`: choose a form for every layer, build the copy, and check it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mtprune.compression.attention import NarrowAttention
from mtprune.compression.choose import (
    check_fits,
    check_whole,
    choose,
    follow,
    opened,
    place,
    time_whole,
)
from mtprune.compression.extract import Places, cut, extract
from mtprune.compression.forms import FORMS
from mtprune.compression.kernels import Kernel
from mtprune.compression.plan import Plan
from mtprune.compression.removal import resize
from mtprune.compression.running import (
    calls,
    check_devices,
    parse,
    run,
    self_attentions,
    unnested,
)
from mtprune.compression.shrink import check_shrunk, shrink, units_of
from mtprune.compression.sites import find_sites, refuse_unfinished
from mtprune.compression.sizes import sizes_of
from mtprune.compression.timing import Measure, interleaved
from mtprune.compression.verify import blame, verify
from mtprune.model.names import unwrap
from mtprune.model.task_masks import TaskMasks

__all__ = ["assemble", "compress", "plan_of"]

_PLAN = "_mtprune_plan"


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
) -> nn.Module:
    """A copy of a sparse model that is faster on this machine and gives the same outputs.

    First units that nobody reads, or that are always the same number, are removed, with all that
    belongs to them: ``groups`` says which units there are.

    Then every Linear and Conv2d with zeros in its weight is timed in each form it can take, on what
    the model really gives it, and takes the fastest: ``"dense"``, ``"rows"`` (without its dead
    outputs), ``"thin"`` (without its dead inputs too), ``"sparse"`` (a sparse product of our own,
    on a CPU in float32; a C compiler makes it at first use), ``"csr"`` (torch's sparse product, on
    a CPU) or ``"2:4"`` (CUDA, float16 and bfloat16). So are the projections of a
    ``MultiheadAttention`` that attends to itself, and every Linear of low rank, which can be
    ``"rank"``: two layers, where these are smaller. A form that is not faster than the dense one
    by 5 % is not taken, of forms within 5 % of each other the smallest is, and if the model as a
    whole is no faster, all layers stay dense.

    The copy is in eval mode and meant for inference; the model is left as it is.

    Args:
        model: A model with zeros in its weights: after ``pruner.finalize()``, or from elsewhere.
        example_inputs: What the model will be run on: a tensor, a tuple of arguments, a dict of
            keyword arguments, or a list of these, several batch sizes for instance.
        groups: What can be removed: the granularity that the model was pruned with,
            ``Channel(example_inputs)`` for instance, or groups (`mtprune.structure.Group`), or
            several of these, or none: ``()``. ``"auto"``, which `None` is too, takes the heads and
            neurons of transformers that `mtprune.patterns` knows, if removing some of them on trial
            changes nothing else. What it does not know it does not guess.
        tasks: Return only what these tasks need: weights that one of them voted for, and their own
            outputs. `plan_of` says what that left (``subnetwork``), and other weights' absence
            changes the outputs of these tasks too (see ``docs/compress.md``).
        task_masks: ``pruner.task_masks``: what each task voted for. Known already if the model is
            the very one that a pruner has finalized.
        outputs: ``{task: place}``: the keys, fields or indices of what the model returns that
            belong to each task. By default they are found by name, or by whose weights they need.
        portable: Take only forms that can be exported (``torch.export``, ONNX).
        plan: Use this one, made before or edited, and time nothing; with the ``tasks`` it is for.
        tolerance: Of the relative Frobenius norm of what outputs may differ by: 1e-5 in float32
            unless given. Outputs are bitwise equal if nothing is removed and all layers stay dense.
        measure: From a list of functions to the milliseconds of each: how forms are timed.

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
    model = unwrap(model)
    before = getattr(model, _PLAN, None)
    if before is not None:
        _check_same(before, plan, tasks)
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
    units = units_of(model, groups, batches) if plan is None else []
    timed = plan is None
    with unnested(work):
        expected = run(work, batches)
        removal = shrink(work, units, batches, plan)
        if removal:
            check_shrunk(model, work, expected, units, batches, tolerance)
        if plan is None:
            sites = find_sites(work, self_attentions(work, batches))
        else:
            sites = find_sites(work, opened(plan))
            check_fits(plan, sites)
        given = calls(work, sites, batches)
        if plan is None:
            plan, kernels = choose(sites, given, measure, removal, portable)
            plan, kernels = check_whole(work, sites, batches, plan, kernels, measure)
        else:
            plan, kernels = follow(plan, sites, portable)
        place(sites, kernels)
        replaced = {s.name: (s, kernels[s.name], given[s.name]) for s in sites if s.name in kernels}
        exact = not (removal or replaced)
        verify(expected, run(work, batches), tolerance, partial(blame, replaced), exact)
        if removal and timed:
            plan = time_whole(plan, model, work, batches, measure)
    if plan.sizes is None:
        # A copy once more: the user's own model is never run.
        plan = replace(plan, sizes=sizes_of(work, batches, copy.deepcopy(original).eval()))
    return _finish(work, replace(plan, subnetwork=part))


def _check_same(before: Plan, plan: Plan | None, tasks: Sequence[str] | None) -> None:
    """Complain about other wishes for a model that is compressed already."""
    other = tasks is not None and _tasks(before) != set(tasks)
    if other or (plan is not None and plan != before):
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
    found = getattr(unwrap(model), _PLAN, None)
    if not isinstance(found, Plan):
        raise ValueError("This model has no plan: mtprune.compress did not make it.")
    return found


def assemble(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put a plan's forms into a dense model, in place, with parts that were saved.

    Args:
        model: As it was built, dense.
        plan: The plan.
        tensors: The parts by name, as in the compressed model's ``state_dict``.

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
            # Constants that were removed are in there.
            layer.bias = nn.Parameter(tensor, layer.weight.requires_grad)
    sites = find_sites(model, opened(plan))
    check_fits(plan, sites)
    kernels = {}
    for site in sites:
        choice = plan[site.name].choice
        if choice != "dense":
            prefix = site.name + "."
            parts = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            kernels[site.name] = FORMS[choice](site.layer, parts)
    place(sites, kernels)
    return _finish(model, plan)


def _finish(model: nn.Module, plan: Plan) -> nn.Module:
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            isinstance(m, (Kernel, NarrowAttention)) for m in encoder.modules()
        ):
            encoder.use_nested_tensor = False
    for name, module in model.named_modules():
        if isinstance(module, Kernel):
            module.site = name
    setattr(model, _PLAN, plan)
    return model.eval()
