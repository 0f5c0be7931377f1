"""Mixtures: experts run one by one where forms of their matrices make that faster."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mtprune.compression.calls import Calls
from mtprune.compression.experts import OpenExperts, can_open_experts
from mtprune.compression.forms import Form
from mtprune.compression.joining import MARGIN, ModuleCalls, recorded_calls
from mtprune.compression.plan import Plan
from mtprune.compression.sites import Opened, Site
from mtprune.compression.timing import Measure
from mtprune.compression.verify import ROUNDING, difference

__all__ = ["experts_in", "share_calls", "stacks_unless_faster"]


def experts_in(model: nn.Module) -> list[str]:
    """The names of experts in stacks that can be run one by one."""
    return [name for name, module in model.named_modules() if name and can_open_experts(module)]


def share_calls(sites: Iterable[Site], calls: Mapping[str, Calls]) -> dict[str, Calls]:
    """The calls of each layer, those of experts for all of a stack alike.

    A router sends each expert another number of tokens, and some none of these. All are timed on as
    many as an expert gets in the median, or fewer, a power of two, so that those that are alike are
    timed once.
    """
    shared = dict(calls)
    stacks: dict[str, list[str]] = {}
    for site in sites:
        if site.opened is not None and isinstance(site.opened.own, OpenExperts):
            stacks.setdefault(site.name.rpartition(".")[0], []).append(site.name)
    for names in stacks.values():
        inputs = [x for name in names for x, _ in calls[name].values()]
        inputs.sort(key=len)
        if inputs:
            x = inputs[len(inputs) // 2]
            x = x[: 1 << (len(x).bit_length() - 1)]
            shared.update({name: {tuple(x.shape): (x, 1)} for name in names})
    return shared


def stacks_unless_faster(
    work: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Any],
    plan: Plan,
    forms: Mapping[str, Form],
    measure: Measure,
) -> tuple[Plan, dict[str, Form]]:
    """Leave experts in stacks unless they are faster one by one, in the forms chosen for them.

    A plan has rows for the matrices of those alone that are run one by one.

    Args:
        work: The model.
        sites: Its layers.
        batches: The example inputs.
        plan: The plan so far.
        forms: The forms of the layers that do not stay dense.
        measure: How functions are timed.
    """
    opened = {
        site.opened.name: site.opened
        for site in sites
        if site.opened is not None and isinstance(site.opened.own, OpenExperts)
    }
    if not opened:
        return plan, dict(forms)
    changed = {site.opened.name for site in sites if site.opened is not None and site.name in forms}
    calls = recorded_calls(work, {n: x.own for n, x in opened.items() if n in changed}, batches)
    slow, times = {name for name in opened if name not in changed}, [0.0, 0.0]
    for name, mine in calls.items():
        stacked, apart = _times(opened[name], mine, measure)
        if not apart < (1 - MARGIN) * stacked:
            slow.add(name)
            times = [times[0] + stacked, times[1] + apart]
    gone = {site.name for site in sites if site.opened is not None and site.opened.name in slow}
    note = plan.note
    if slow & changed:
        note = (
            f"{note} {len(slow & changed)} mixtures of experts stay in stacks: they took "
            f"{times[0]:.2f} ms, and {times[1]:.2f} ms one by one in the fastest forms."
        ).strip()
    rows = tuple(row for row in plan.rows if row.layer not in gone)
    left = {name: form for name, form in forms.items() if name not in gone}
    return replace(plan, rows=rows, note=note), left


@torch.no_grad()
def _times(opened: Opened, calls: ModuleCalls, measure: Measure) -> tuple[float, float]:
    """The milliseconds of experts for all calls, in stacks and one by one; equal if unlike."""
    stacked = apart = 0.0
    for (args, kwargs), number in calls.values():
        expected, got = (module(*args, **kwargs) for module in (opened.fused, opened.own))
        if difference(expected, got) > ROUNDING.get(expected.dtype, 0.0):
            return 0.0, 0.0
        pair = measure([partial(x, *args, **kwargs) for x in (opened.fused, opened.own)])
        stacked, apart = stacked + number * pair[0], apart + number * pair[1]
    return stacked, apart
