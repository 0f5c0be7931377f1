"""Pricing: a timetable of a model, from compressed copies with random weights, or units, gone."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from mtprune.compression.calls import Calls, record_calls, self_attentions
from mtprune.compression.choose import time_whole
from mtprune.compression.compress import choose_forms, compress
from mtprune.compression.dead import keep_some
from mtprune.compression.plan import Plan, Removal
from mtprune.compression.removal import removal_of
from mtprune.compression.resizing import resize
from mtprune.compression.running import call, check_devices, parse, unnested
from mtprune.compression.sites import Site, find_sites
from mtprune.compression.timing import Measure, interleaved
from mtprune.distributed import from_first
from mtprune.latency import SHARES, Pace, Timetable
from mtprune.progress import bar, is_watched
from mtprune.structure import Group

__all__ = ["Stopwatch", "paced", "price"]

_TIMES = 3
"""So often a whole model is timed: a choice is judged by it."""

_Times = Mapping[str, Sequence[float]]
"""For each layer its milliseconds at each share."""


def paced(
    model: nn.Module,
    example_inputs: Any,
    layers: Sequence[str],
    groups: Sequence[Group],
    measure: Measure | None = None,
) -> Pace:
    """The measured timetable of a model, and how to measure more. All ranks get that of the first.

    Args:
        model: The dense model; it is left as it is.
        example_inputs: As for `compress`.
        layers: The names of the weights that will be pruned.
        groups: The units that will be pruned; none if it is single weights.
        measure: How functions are timed.
    """
    measure = measure or interleaved
    watch = Stopwatch(model, example_inputs, groups, measure)

    def tried(masks: Mapping[str, Tensor]) -> float:
        return from_first(lambda: watch(masks))

    def table() -> Timetable:
        return price(model, example_inputs, layers, groups, SHARES, measure)

    return Pace(from_first(table), tried)


@torch.no_grad()
def price(
    model: nn.Module,
    example_inputs: Any,
    layers: Sequence[str],
    groups: Sequence[Group],
    shares: Sequence[float],
    measure: Measure,
) -> Timetable:
    """Measure a timetable.

    Args:
        model: The dense model; it is left as it is.
        example_inputs: As for `compress`.
        layers: The names of the weights that will be pruned.
        groups: The units that will be pruned; none if it is single weights.
        shares: The shares at which to measure.
        measure: How functions are timed.
    """
    batches = parse(example_inputs)
    check_devices(model, batches)
    falling = sorted({1.0, *shares}, reverse=True)
    work = copy.deepcopy(model).eval()
    with unnested(work):
        of = partial(_of_units, groups=groups) if groups else _of_weights
        left, times, whole = of(work, batches, layers, falling, measure)
    fixed, curves = _scaled(times, whole)
    points = {
        name: tuple(sorted(dict(zip(left[name], curve, strict=True)).items()))
        for name, curve in curves.items()
    }
    device = str(next(iter(model.parameters())).device)
    of_what: Any = "units" if groups else "weights"
    return Timetable(points, fixed, of_what, device, torch.get_num_threads())


def _scaled(times: _Times, whole: Sequence[float]) -> tuple[float, dict[str, list[float]]]:
    """The time of everything else, and layers' times that with it add up to those of the model.

    Layers that run together as one block take less than each on its own, and so does what is
    between them; both are in the whole model's time alone.

    Args:
        times: For each layer its milliseconds at each share, dense first.
        whole: The milliseconds of the model at each share.
    """
    sums = [sum(column) for column in zip(*times.values(), strict=True)]
    fixed = max(0.0, min(t - s for t, s in zip(whole, sums, strict=True)))
    factors = [(t - fixed) / s if s else 1.0 for t, s in zip(whole, sums, strict=True)]
    # A layer with fewer weights could at worst run as one with more.
    return fixed, {
        name: list(accumulate((f * t for f, t in zip(factors, own, strict=True)), min))
        for name, own in times.items()
    }


def _of_weights(
    model: nn.Module,
    batches: Sequence[Any],
    layers: Sequence[str],
    shares: Sequence[float],
    measure: Measure,
) -> tuple[_Times, _Times, list[float]]:
    """The shares of weights left in each layer, layers' times at them, and the model's."""
    random = torch.Generator().manual_seed(0)
    plans: list[Plan] = []
    for share in bar(shares[1:], is_watched(), "timing shares"):
        work = copy.deepcopy(model)
        tensors = dict(work.named_parameters(remove_duplicate=False))
        for weight in map(tensors.__getitem__, layers):
            weight.mul_((torch.rand(weight.shape, generator=random) < share).to(weight.device))
        with unnested(work):
            plans.append(choose_forms(work, batches, Removal(), False, measure, False)[0])
    dense = measure([partial(_called, model, batches)])[0]
    sites = {row.layer: _of_site(row.layer, layers) for row in plans[0].rows}
    times: dict[str, list[float]] = {}
    for site, name in sites.items():
        rows = [plan[site] for plan in plans]
        timed = [row.dense.ms for row in rows if row.dense.ms]
        if name is None or not timed:
            continue  # nothing but a dense layer can take its place
        # Of neighbours in time, because the load of the machine changes from one plan to the next.
        ratios = [
            (r.chosen.ms or 1.0) / r.dense.ms if r.chosen and r.dense.ms else 1.0 for r in rows
        ]
        times[name] = [median(timed) * ratio for ratio in (1.0, *ratios)]
    whole = [(plan.ms or 1.0) / plan.dense_ms if plan.dense_ms else 1.0 for plan in plans]
    return dict.fromkeys(times, shares), times, [dense * ratio for ratio in (1.0, *whole)]


def _of_units(
    model: nn.Module,
    batches: Sequence[Any],
    layers: Sequence[str],
    shares: Sequence[float],
    measure: Measure,
    groups: Sequence[Group],
) -> tuple[_Times, _Times, list[float]]:
    """The same where layers get smaller."""
    sizes = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
    left: dict[str, list[float]] = {name: [] for name in layers}
    copies, whole = [], []
    dense = None
    for share in bar(shares, is_watched(), "timing shares"):
        work = copy.deepcopy(model)
        removal = removal_of(work, groups, _random_units(work, groups, share))
        resize(work, removal)
        for name, parameter in work.named_parameters(remove_duplicate=False):
            if name in left:
                left[name].append(parameter.numel() / sizes[name])
        with unnested(work):
            sites = find_sites(work, self_attentions(work, batches))
            copies.append((sites, record_calls(work, sites, batches)))
            for site in sites:
                site.place(None)
            plan, _ = choose_forms(work, batches, removal, False, measure, False)
            plan = time_whole(plan, model, work, batches, measure)
        dense = dense or plan.dense_ms or 0.0
        whole.append(dense * (plan.ms or 0.0) / (plan.dense_ms or 1.0) if share < 1 else dense)
    times = _side_by_side(copies, layers, measure)
    return {name: left[name] for name in times}, times, whole


def _random_units(model: nn.Module, groups: Sequence[Group], share: float) -> list[Tensor]:
    """Random units that go, bool ``[size]`` for each group, so that a share of them stays."""
    random = torch.Generator().manual_seed(0)
    dead = []
    for group in groups:
        gone = torch.randperm(group.size, generator=random) >= max(1, round(share * group.size))
        keep_some(model, group, torch.zeros_like(gone), gone)
        dead.append(gone)
    return dead


def _side_by_side(
    copies: Sequence[tuple[Sequence[Site], Mapping[str, Calls]]],
    layers: Sequence[str],
    measure: Measure,
) -> dict[str, list[float]]:
    """The milliseconds of each layer in each of several copies of a model.

    Args:
        copies: The layers of each, and their calls.
        layers: The names of the weights that will be pruned.
        measure: How functions are timed.
    """
    known: dict[Any, list[float]] = {}
    times = {}
    for alike in zip(*(sites for sites, _ in copies), strict=True):
        name = _of_site(alike[0].name, layers)
        calls = [own[site.name] for site, (_, own) in zip(alike, copies, strict=True)]
        if name is None or not all(calls):
            continue
        traits = tuple(
            (repr(site.layer), tuple((shape, n) for shape, (_, n) in own.items()))
            for site, own in zip(alike, calls, strict=True)
        )
        if traits not in known:
            known[traits] = [0.0] * len(copies)
            for inputs in zip(*(own.values() for own in calls), strict=True):
                modules = [site.layer for site in alike]
                functions = [partial(m, x) for m, (x, _) in zip(modules, inputs, strict=True)]
                found = zip(known[traits], measure(functions), inputs, strict=True)
                known[traits] = [total + n * ms for total, ms, (_, n) in found]
        times[name] = known[traits]
    return times


def _of_site(site: str, layers: Sequence[str]) -> str | None:
    """The name of the weight of a site among those that will be pruned."""
    return next((n for n in (f"{site}.weight", f"{site}_weight") if n in layers), None)


class Stopwatch:
    """The time of a model with masks, compressed, as a share of the dense model's.

    Args:
        model: The dense model. It is copied.
        example_inputs: As for `compress`.
        groups: The units that are pruned; none if it is single weights.
        measure: How functions are timed.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, groups: Sequence[Group], measure: Measure
    ) -> None:
        self._model = copy.deepcopy(model).eval()
        self._batches = parse(example_inputs)
        self._groups: Any = tuple(groups) or "auto"
        self._measure = measure

    @torch.no_grad()
    def __call__(self, masks: Mapping[str, Tensor]) -> float:
        """Measure.

        Args:
            masks: Masks of weights by name, of any shape; other weights stay.
        """
        work = copy.deepcopy(self._model)
        tensors = dict(work.named_parameters(remove_duplicate=False))
        for name, mask in masks.items():
            tensors[name].mul_(mask.view(tensors[name].shape).to(tensors[name].device))
        fast = compress(
            work, self._batches, groups=self._groups, measure=self._measure, progress=False
        )
        ratios = []
        with unnested(self._model):
            for _ in range(_TIMES):
                # Neither checked nor shielded as while forms are chosen: as a user calls it.
                runs = [partial(_called, m, self._batches) for m in (self._model, fast)]
                before, after = self._measure(runs)
                ratios.append(after / before)
        return median(ratios)


def _called(model: nn.Module, batches: Sequence[Any]) -> None:
    for batch in batches:
        call(model, batch)
