"""Choosing: every layer takes the form that was fastest, if the whole model is faster for it."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mtprune.compression import native
from mtprune.compression.forms import FORMS
from mtprune.compression.kernels import Kernel
from mtprune.compression.plan import Measured, Plan, Removal, Row
from mtprune.compression.running import Calls, run, unnested
from mtprune.compression.sites import Site
from mtprune.compression.timing import Measure

__all__ = [
    "MARGIN",
    "WORTH",
    "check_fits",
    "check_whole",
    "choose",
    "follow",
    "opened",
    "place",
    "time_whole",
]

MARGIN = 0.05
"""A form must beat the dense one by this share of its time; closer ones are ties."""

WORTH = 0.5
"""The share of zeros from which sparse products are tried."""


def choose(
    sites: Sequence[Site],
    given: Mapping[str, Calls],
    measure: Measure,
    removal: Removal,
    portable: bool,
) -> tuple[Plan, dict[str, Kernel]]:
    """Time every form of every layer, and take the best."""
    rows, kernels = [], {}
    able, missing = bool(removal), ""
    for site in sites:
        row = _row(site)
        weight = site.layer.weight.detach()
        zero = 1 - int(weight.count_nonzero()) / max(1, weight.numel())
        choosable = weight.numel() and given[site.name] and not site.held
        forms = _forms(site, zero, portable) if choosable else {}
        able = able or (zero > 0 and weight.numel() > 0) or bool(forms)
        if forms:
            row = _timed(row, site, forms, given[site.name], measure)
            if row.choice != "dense":
                kernels[site.name] = forms[row.choice]
        elif zero == 0 or not weight.numel():
            row = replace(row, note="no zeros")
        elif site.held:
            row = replace(row, note=site.held)
        elif not given[site.name]:
            row = replace(row, note="the example inputs do not reach it")
        if zero >= WORTH and weight.device.type == "cpu" and weight.dtype == torch.float32:
            missing = native.lacking()
        rows.append(row)
    note = "" if able else "Nothing to compress: no weight of a layer is zero."
    note = f"Without the form 'sparse': {missing}." if missing else note
    device = str(sites[0].layer.weight.device) if sites else "cpu"
    threads = torch.get_num_threads()
    return Plan(tuple(rows), device, threads, note=note, removal=removal), kernels


def _row(site: Site) -> Row:
    shape = tuple(site.layer.weight.shape)
    return Row(site.name, shape, "dense", (Measured("dense", None, site.bytes),))


def _forms(site: Site, zero: float, portable: bool) -> dict[str, Kernel]:
    """Every other form of a layer that can run where it is."""
    forms = {}
    for choice, kernel in FORMS.items():
        if portable and not kernel.portable:
            continue
        if (choice in ("sparse", "csr") and zero < WORTH) or kernel.lacking(site.layer.weight):
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


def check_whole(
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
        place(sites, {})
        run(work, batches)

    def compressed() -> None:
        place(sites, kernels)
        run(work, batches)

    before, after = measure([dense, compressed])
    place(sites, {})
    if after < before:
        return replace(plan, dense_ms=before, ms=after), kernels
    rows = tuple(replace(row, choice="dense") for row in plan.rows)
    note = plan.note + " " * bool(plan.note)
    note += (
        f"All layers stay dense: with the fastest forms the whole model took {after:.2f} ms, and "
        f"{before:.2f} ms without."
    )
    return replace(plan, rows=rows, dense_ms=before, ms=before, note=note), {}


def opened(plan: Plan) -> list[str]:
    """The attentions whose projections are layers in a plan."""
    suffix = ".in_proj"
    return [r.layer.removesuffix(suffix) for r in plan.rows if r.layer.endswith(suffix)]


def check_fits(plan: Plan, sites: Sequence[Site]) -> None:
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


def follow(plan: Plan, sites: Sequence[Site], portable: bool) -> tuple[Plan, dict[str, Kernel]]:
    """The kernels of a plan; forms that cannot run here become dense."""
    kernels = {}
    for site in sites:
        row = plan[site.name]
        if row.choice == "dense":
            continue
        kernel = FORMS[row.choice]
        lacking = kernel.lacking(site.layer.weight)
        if portable and not kernel.portable:
            lacking = f"portable=True, and {row.choice} cannot be exported"
        if lacking:
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


def place(sites: Sequence[Site], kernels: Mapping[str, Kernel]) -> None:
    """Hang every layer's form where the layer was, or the layer itself."""
    for site in sites:
        site.place(kernels.get(site.name, site.layer))


def time_whole(
    plan: Plan, model: nn.Module, work: nn.Module, batches: Sequence[Any], measure: Measure
) -> Plan:
    """Time the model as it was against what came out."""
    dense = copy.deepcopy(model).eval()
    with unnested(dense):
        before, after = measure([lambda: run(dense, batches), lambda: run(work, batches)])
    return replace(plan, dense_ms=before, ms=after)
