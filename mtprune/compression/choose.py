"""Choosing: every layer takes the form that was fastest, if the whole model is faster for it."""

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mtprune.compression.calls import Calls
from mtprune.compression.forms import FORMS, Form
from mtprune.compression.joining import join_all, separate_all, unpack_all
from mtprune.compression.plan import Measured, Plan, Removal, Row
from mtprune.compression.running import run, unnested
from mtprune.compression.sites import Site
from mtprune.compression.times import Times, bytes_of
from mtprune.compression.timing import Measure
from mtprune.progress import bar

__all__ = [
    "build_forms",
    "check_fits",
    "choose",
    "dense_unless_faster",
    "opened_in",
    "place",
    "time_whole",
    "told",
]

MARGIN = 0.05
"""A form must beat the dense one by this share of its time; closer ones are ties."""


def choose(
    sites: Sequence[Site],
    calls: Mapping[str, Calls],
    measure: Measure,
    removal: Removal,
    portable: bool,
    shown: bool,
) -> tuple[Plan, dict[str, Form]]:
    """Time every form of every layer, and take the best.

    Args:
        sites: The layers.
        calls: The inputs of each.
        measure: How forms are timed.
        removal: The units that were removed before.
        portable: Whether only forms that can be exported count.
        shown: Whether to show a progress bar.

    Returns:
        The plan, and the forms of the layers that do not stay dense.
    """
    rows, chosen, unavailable = [], {}, {}
    compressible = bool(removal)
    times = Times(measure)
    for site in bar(sites, shown, "timing layers"):
        row = _row(site)
        weight = site.layer.weight.detach()
        zeros = 1 - int(weight.count_nonzero()) / max(1, weight.numel())
        may_change = weight.numel() and calls[site.name] and not site.why_dense
        forms = _candidates(site, zeros, portable) if may_change else {}
        compressible = compressible or (zeros > 0 and weight.numel() > 0) or bool(forms)
        if forms:
            row = _timed(row, site, forms, times.of(site, forms, calls[site.name]))
            if row.choice != "dense":
                chosen[site.name] = forms[row.choice]
        elif zeros == 0 or not weight.numel():
            row = replace(row, note="no zeros")
        elif site.why_dense:
            row = replace(row, note=site.why_dense)
        elif not calls[site.name]:
            row = replace(row, note="the example inputs do not reach it")
        for choice, form in FORMS.items():
            if zeros >= form.min_zeros and not form.why_not(weight) and form.unavailable():
                unavailable[choice] = form.unavailable()
        rows.append(row)
    notes = [f"Without the form '{choice}': {why}." for choice, why in unavailable.items()]
    if not compressible:
        notes = notes or ["Nothing to compress: no weight of a layer is zero."]
    device = str(sites[0].layer.weight.device) if sites else "cpu"
    threads = torch.get_num_threads()
    return Plan(tuple(rows), device, threads, note=" ".join(notes), removal=removal), chosen


def _row(site: Site) -> Row:
    shape = tuple(site.layer.weight.shape)
    return Row(site.name, shape, "dense", (Measured("dense", None, site.bytes),))


def _candidates(site: Site, zeros: float, portable: bool) -> dict[str, Form]:
    """Every other form of a layer that can run on its device.

    Args:
        site: The layer.
        zeros: The share of zeros in its weight.
        portable: Whether only forms that can be exported count.
    """
    forms = {}
    for choice, form in FORMS.items():
        if zeros < form.min_zeros or (portable and not form.is_portable()):
            continue
        if form.why_not(site.layer.weight) or form.unavailable():
            continue
        built = form.build(site.layer)
        if built is not None:
            forms[choice] = built
    return forms


def _timed(row: Row, site: Site, forms: Mapping[str, Form], times: Sequence[float]) -> Row:
    """The row with the times of all forms, the dense one first, and the best choice."""
    measured = [Measured("dense", times[0], site.bytes)]
    for (choice, form), ms in zip(forms.items(), times[1:], strict=True):
        measured.append(Measured(choice, ms, bytes_of(form)))
    return replace(row, choice=_best(measured), measured=tuple(measured))


def _best(measured: Sequence[Measured]) -> str:
    """The fastest form; of those as fast as it, the smallest; dense unless it is beaten."""
    dense, *others = [(m.choice, m.ms or 0.0, m.bytes) for m in measured]
    faster = [m for m in others if m[1] < (1 - MARGIN) * dense[1]]
    if not faster:
        return "dense"
    fastest = min(m[1] for m in faster)
    return min((m for m in faster if m[1] <= (1 + MARGIN) * fastest), key=lambda m: m[2])[0]


def dense_unless_faster(
    work: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Any],
    plan: Plan,
    forms: dict[str, Form],
    measure: Measure,
) -> tuple[Plan, dict[str, Form]]:
    """Time the model as a whole, and keep it dense unless the chosen forms make it faster.

    Torch may have fused in the dense model what is separate with other forms.
    """
    if not (forms or plan.blocks):
        return plan, forms

    def dense() -> None:
        separate_all(work, plan)
        place(sites, {})
        run(work, batches)

    def compressed() -> None:
        place(sites, forms)
        join_all(work, plan)
        run(work, batches)

    before, after = measure([dense, compressed])
    separate_all(work, plan)
    place(sites, {})
    if after < before:
        return replace(plan, dense_ms=before, ms=after), forms
    unpack_all(work, plan)
    rows = tuple(replace(row, choice="dense") for row in plan.rows)
    note = plan.note + " " * bool(plan.note)
    note += (
        f"All layers stay dense: with the fastest forms the whole model took {after:.2f} ms, and "
        f"{before:.2f} ms without."
    )
    return replace(plan, rows=rows, blocks=(), dense_ms=before, ms=before, note=note), {}


def opened_in(plan: Plan) -> set[str]:
    """The names of attentions and experts whose matrices are layers in a plan."""
    parts = (re.fullmatch(r"(.+)\.(in_proj|(ups|downs)\.\d+)", row.layer) for row in plan.rows)
    return {part[1] for part in parts if part}


def check_fits(plan: Plan, sites: Sequence[Site]) -> None:
    """Check that a plan is for the model with these layers.

    Raises:
        ValueError: If a layer is missing in one of them, or has another shape.
    """
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
        if site.name not in known and site.standing is None:
            raise ValueError(f"The plan is for another model: it lacks layer '{site.name}'.")


def told(plan: Plan, sites: Sequence[Site]) -> list[Site]:
    """The layers that a plan tells of: older ones tell nothing of other classes than Linear."""
    known = {row.layer for row in plan.rows}
    return [site for site in sites if site.name in known]


def build_forms(plan: Plan, sites: Sequence[Site], portable: bool) -> tuple[Plan, dict[str, Form]]:
    """The forms that a plan gives to layers; forms that cannot run here become dense.

    Returns:
        The plan with what became dense, and the forms of the layers that do not stay dense.

    Raises:
        ValueError: If a layer cannot take the form of the plan.
    """
    forms = {}
    for site in told(plan, sites):
        choice = plan[site.name].choice
        if choice == "dense":
            continue
        form = FORMS[choice]
        why_not = form.why_not(site.layer.weight) or form.unavailable()
        if portable and not form.is_portable():
            why_not = f"portable=True, and {choice} cannot be exported"
        if why_not:
            # The level of the line that called `compress`.
            warnings.warn(f"Layer '{site.name}' stays dense: {why_not}.", stacklevel=4)
            plan = plan.replace(site.name, "dense")
            continue
        built = None if site.why_dense else form.build(site.layer)
        if built is None:
            raise ValueError(
                f"The plan does not fit layer '{site.name}': it cannot be '{choice}'"
                + (f", because {site.why_dense}" if site.why_dense else "")
                + f". Use plan.replace({site.name!r}, 'dense')."
            )
        forms[site.name] = built
    return plan, forms


def place(sites: Sequence[Site], forms: Mapping[str, Form]) -> None:
    """Put every layer's form in the place of the layer, or the layer itself."""
    for site in sites:
        site.place(forms.get(site.name))


def time_whole(
    plan: Plan, model: nn.Module, work: nn.Module, batches: Sequence[Any], measure: Measure
) -> Plan:
    """The plan with the times of the whole model as it was and as it became."""
    dense = copy.deepcopy(model).eval()
    with unnested(dense):
        before, after = measure([lambda: run(dense, batches), lambda: run(work, batches)])
    return replace(plan, dense_ms=before, ms=after)
