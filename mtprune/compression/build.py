"""`compress`: choose a form for every layer, build the copy, and check it."""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mtprune.components import find_layers, unwrap
from mtprune.compression.attention import NarrowAttention
from mtprune.compression.forms import FORMS
from mtprune.compression.kernels import Kernel
from mtprune.compression.plan import Measured, Plan, Removal, Row
from mtprune.compression.removal import apply, constants, remove, resize
from mtprune.compression.running import (
    Calls,
    calls,
    check_devices,
    named_tensors,
    parse,
    run,
    unnested,
)
from mtprune.compression.sites import Site, find_sites, refuse_unfinished
from mtprune.compression.timing import Measure, interleaved
from mtprune.compression.trial import complete
from mtprune.compression.verify import blame, difference, verify
from mtprune.patterns import heads, neurons
from mtprune.structure import Group

__all__ = ["MARGIN", "WORTH", "assemble", "compress", "plan_of"]

MARGIN = 0.05
"""A form must beat the dense one by this share of its time; closer ones are ties."""

WORTH = 0.5
"""The share of zeros from which CSR is tried."""

_PLAN = "_mtprune_plan"


def compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    groups: Any = "auto",
    plan: Plan | None = None,
    tolerance: float | None = None,
    measure: Measure = interleaved,
) -> nn.Module:
    """A copy of a sparse model that is faster on this machine and gives the same outputs.

    First units that nobody reads, or that are always the same number, are removed, with all that
    belongs to them: ``groups`` says which units there are.

    Then every Linear and Conv2d with zeros in its weight is timed in each form it can take, on what
    the model really gives it, and takes the fastest: ``"dense"``, ``"rows"`` (without its dead
    outputs), ``"thin"`` (without its dead inputs too), ``"csr"`` (torch's sparse product, on a CPU)
    or ``"2:4"`` (CUDA, float16 and bfloat16). So is every Linear of low rank, which can be
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
        plan: Use this one, made before or edited, and time nothing.
        tolerance: Of the relative Frobenius norm of what outputs may differ by: 1e-5 in float32
            unless given. Outputs are bitwise equal if nothing is removed and all layers stay dense.
        measure: From a list of functions to the milliseconds of each: how forms are timed.

    Raises:
        ValueError: If the model does not run on the inputs, is not finalized, or groups or plan
            are for another model.
        RuntimeError: If outputs differ by more than the tolerance.

    Example:
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
        if plan is not None and plan != before:
            raise ValueError(
                "This model is compressed already, by another plan. Give the dense model."
            )
        return copy.deepcopy(model).eval()
    refuse_unfinished(model)
    batches = parse(example_inputs)
    check_devices(model, batches)
    work = copy.deepcopy(model).eval()
    before = _parameters(work)
    units = _units(model, groups, batches) if plan is None else []
    timed = plan is None
    with unnested(work):
        expected = run(work, batches)
        removal = _remove(work, units, batches, plan)
        if removal:
            _verify_removal(model, work, expected, units, batches, tolerance)
        sites = find_sites(work)
        if plan is not None:
            _check_fits(plan, sites)
        given = calls(work, sites, batches)
        if plan is None:
            plan, kernels = _choose(sites, given, measure, removal)
            plan, kernels = _check_whole(work, sites, batches, plan, kernels, measure)
        else:
            plan, kernels = _follow(plan, sites)
        _place(sites, kernels)
        replaced = {s.name: (s, kernels[s.name], given[s.name]) for s in sites if s.name in kernels}
        exact = not (removal or replaced)
        verify(expected, run(work, batches), tolerance, partial(blame, replaced), exact)
        if removal and timed:
            plan = _timed_whole(plan, model, work, batches, measure)
    plan = replace(plan, dense_parameters=before, parameters=_parameters(work))
    return _finish(work, plan)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _known(model: nn.Module, batches: Sequence[Any]) -> list[Group]:
    """Heads and neurons that are where patterns look, and can be removed."""
    found = []
    for look in (heads, neurons):
        with suppress(ValueError):  # there are none
            found += look(model)
    return complete(model, found, batches) if found else []


def _units(model: nn.Module, groups: Any, batches: Sequence[Any]) -> list[Group]:
    """The groups in what the user gave."""
    if groups is None or groups == "auto":
        return _known(model, batches)
    given = [groups] if isinstance(groups, Group) or hasattr(groups, "groups") else groups
    found: list[Group] = []
    for item in given if isinstance(given, Iterable) else [given]:
        if isinstance(item, Group):
            found.append(item)
        elif hasattr(item, "groups"):
            found += item.groups(model, find_layers(model))
        else:
            raise TypeError(
                "`groups` must be groups (mtprune.structure.Group) or a granularity whose units "
                f"can be removed, mtprune.Channel(example_inputs) for instance. Got {item!r}."
            )
    return found


def _remove(
    work: nn.Module, units: Sequence[Group], batches: Sequence[Any], plan: Plan | None
) -> Removal:
    """Remove what is dead, or what the plan says."""
    if plan is None:
        return remove(work, units, batches) if units else Removal()
    if plan.removal:
        layers = dict.fromkeys(cut.tensor.rpartition(".")[0] for cut in plan.removal.cuts)
        apply(work, plan.removal, constants(work, _layers(work, layers), batches))
    return plan.removal


def _layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    known = dict(model.named_modules())
    return [name for name in names if name in known]


def _verify_removal(
    model: nn.Module,
    work: nn.Module,
    expected: Sequence[Any],
    units: Sequence[Group],
    batches: Sequence[Any],
    tolerance: float | None,
) -> None:
    """Compare what is left after removal, and name the group that should not have been removed."""
    worst = partial(_worst_group, model, expected, units, batches)
    try:
        got = run(work, batches)
    except ValueError as error:
        raise RuntimeError(
            f"Without its dead units the model does not run: {error.__cause__}." + worst()
        ) from error
    verify(expected, got, tolerance, worst)


def _worst_group(
    model: nn.Module, expected: Sequence[Any], units: Sequence[Group], batches: Sequence[Any]
) -> str:
    """Which group does most harm when its dead units alone are removed."""
    worst, most = None, -1.0
    for group in units:
        alone = copy.deepcopy(model).eval()
        with unnested(alone):
            if not remove(alone, [group], batches):
                continue
            try:
                pairs = zip(expected, run(alone, batches), strict=True)
                off = max(
                    difference(a, b)
                    for before, after in pairs
                    for (_, a), (_, b) in zip(
                        named_tensors(before), named_tensors(after), strict=True
                    )
                )
            except ValueError:
                off = float("inf")
        if off > most:
            worst, most = group, off
    if worst is None:
        return " The plan removes units that are not dead in this model."
    layers = dict.fromkeys(m.tensor.rpartition(".")[0] for m in worst.members if m.role == "in")
    return (
        f" The worst group is '{worst.name}', which {list(layers)} read, off by {most:.1e} alone: "
        "more than its members depends on it. Leave it out of `groups`."
    )


def _timed_whole(
    plan: Plan, model: nn.Module, work: nn.Module, batches: Sequence[Any], measure: Measure
) -> Plan:
    """Time the model as it was against what came out."""
    dense = copy.deepcopy(model).eval()
    with unnested(dense):
        before, after = measure([lambda: run(dense, batches), lambda: run(work, batches)])
    return replace(plan, dense_ms=before, ms=after)


def plan_of(model: nn.Module) -> Plan:
    """The plan of a compressed model.

    Raises:
        ValueError: If `compress` did not make this model.

    Example:
        >>> fast = compress(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2))
        >>> print(plan_of(fast))
        layer  shape  choice  dense ms  chosen ms  dense bytes  bytes
        0      2x2    dense          -          -           24     24  no zeros
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
    resize(model, plan.removal)
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        layer = dict(model.named_modules()).get(path)
        if attribute == "bias" and isinstance(layer, (nn.Linear, _ConvNd)) and layer.bias is None:
            # Constants that were removed are in there.
            layer.bias = nn.Parameter(tensor, layer.weight.requires_grad)
    sites = find_sites(model)
    _check_fits(plan, sites)
    for site in sites:
        choice = plan[site.name].choice
        if choice != "dense":
            prefix = site.name + "."
            parts = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            site.place(FORMS[choice](site.layer, parts))
    return _finish(model, plan)


def _choose(
    sites: Sequence[Site], given: Mapping[str, Calls], measure: Measure, removal: Removal
) -> tuple[Plan, dict[str, Kernel]]:
    """Time every form of every layer, and take the best."""
    rows, kernels = [], {}
    able = bool(removal)
    for site in sites:
        row = _row(site)
        weight = site.layer.weight.detach()
        zero = 1 - int(weight.count_nonzero()) / weight.numel() if weight.numel() else 0.0
        idle = site.held or not weight.numel() or not given[site.name]
        forms = {} if idle else _forms(site, zero)
        able = able or zero > 0 or bool(forms)
        if forms:
            row = _timed(row, site, forms, given[site.name], measure)
            if row.choice != "dense":
                kernels[site.name] = forms[row.choice]
        elif zero == 0:
            row = replace(row, note="no zeros")
        elif site.held:
            row = replace(row, note=site.held)
        elif not given[site.name]:
            row = replace(row, note="the example inputs do not reach it")
        rows.append(row)
    note = "" if able else "Nothing to compress: no weight of a layer is zero."
    device = str(sites[0].layer.weight.device) if sites else "cpu"
    threads = torch.get_num_threads()
    return Plan(tuple(rows), device, threads, note=note, removal=removal), kernels


def _row(site: Site) -> Row:
    shape = tuple(site.layer.weight.shape)
    return Row(site.name, shape, "dense", (Measured("dense", None, site.bytes),))


def _forms(site: Site, zero: float) -> dict[str, Kernel]:
    """Every other form of a layer that can run where it is."""
    forms = {}
    for choice, kernel in FORMS.items():
        if kernel.lacking(site.layer.weight) or (choice == "csr" and zero < WORTH):
            continue
        parts = kernel.parts(site.layer)
        if parts is not None:
            forms[choice] = kernel(site.layer, parts)
    return forms


@torch.no_grad()
def _timed(
    row: Row, site: Site, forms: Mapping[str, Kernel], given: Calls, measure: Measure
) -> Row:
    total = [0.0] * (1 + len(forms))
    for x, times in given.values():
        functions = [partial(module, x) for module in (site.layer, *forms.values())]
        # Outside autograd's and, as elsewhere, in the mode the model will run in.
        total = [t + times * ms for t, ms in zip(total, measure(functions), strict=True)]
    measured = [Measured("dense", total[0], site.bytes)]
    for (choice, form), ms in zip(forms.items(), total[1:], strict=True):
        measured.append(Measured(choice, ms, sum(t.nbytes for t in form.state_dict().values())))
    return replace(row, choice=_best(measured), measured=tuple(measured))


def _best(measured: Sequence[Measured]) -> str:
    """The fastest form; of those as fast as it, the smallest; dense unless it is beaten."""
    dense, *others = [(m.choice, m.ms or 0.0, m.bytes) for m in measured]
    faster = [m for m in others if m[1] < (1 - MARGIN) * dense[1]]
    if not faster:
        return "dense"
    fastest = min(m[1] for m in faster)
    return min((m for m in faster if m[1] <= (1 + MARGIN) * fastest), key=lambda m: m[2])[0]


def _check_whole(
    work: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Any],
    plan: Plan,
    kernels: dict[str, Kernel],
    measure: Measure,
) -> tuple[Plan, dict[str, Kernel]]:
    """Time the model as a whole: what is fused in the dense one must not be lost unpaid."""
    if not kernels:
        return plan, kernels

    def dense() -> None:
        _place(sites, {})
        run(work, batches)

    def compressed() -> None:
        _place(sites, kernels)
        run(work, batches)

    before, after = measure([dense, compressed])
    _place(sites, {})
    if after < before:
        return replace(plan, dense_ms=before, ms=after), kernels
    rows = tuple(replace(row, choice="dense") for row in plan.rows)
    note = (
        f"All layers stay dense: with the fastest forms the whole model took {after:.2f} ms, and "
        f"{before:.2f} ms without."
    )
    return replace(plan, rows=rows, dense_ms=before, ms=before, note=note), {}


def _check_fits(plan: Plan, sites: Sequence[Site]) -> None:
    """Complain about a plan for another model."""
    shapes = {site.name: tuple(site.layer.weight.shape) for site in sites}
    for row in plan.rows:
        if shapes.get(row.layer) != row.shape:
            got = f"shape {shapes[row.layer]}" if row.layer in shapes else "no such layer"
            raise ValueError(
                f"The plan is for another model: it has '{row.layer}' with shape {row.shape}, and "
                f"this model has {got}."
            )
    known = {row.layer for row in plan.rows}
    for site in sites:
        if site.name not in known:
            raise ValueError(f"The plan is for another model: it lacks layer '{site.name}'.")


def _follow(plan: Plan, sites: Sequence[Site]) -> tuple[Plan, dict[str, Kernel]]:
    """The kernels of a plan; forms that cannot run here become dense."""
    kernels = {}
    for site in sites:
        row = plan[site.name]
        if row.choice == "dense":
            continue
        kernel = FORMS[row.choice]
        if lacking := kernel.lacking(site.layer.weight):
            warnings.warn(f"Layer '{site.name}' stays dense: {lacking}.", stacklevel=3)
            plan = plan.replace(site.name, "dense")
            continue
        parts = kernel.parts(site.layer)
        if parts is None or site.held:
            raise ValueError(
                f"The plan does not fit layer '{site.name}': it cannot be '{row.choice}'"
                + (f", because {site.held}" if site.held else "")
                + f". Use plan.replace({site.name!r}, 'dense')."
            )
        kernels[site.name] = kernel(site.layer, parts)
    return plan, kernels


def _place(sites: Sequence[Site], kernels: Mapping[str, Kernel]) -> None:
    for site in sites:
        site.place(kernels.get(site.name, site.layer))


def _finish(model: nn.Module, plan: Plan) -> nn.Module:
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            isinstance(m, (Kernel, NarrowAttention)) for m in encoder.modules()
        ):
            encoder.use_nested_tensor = False
    setattr(model, _PLAN, plan)
    return model.eval()
