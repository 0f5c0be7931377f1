"""Oaths: what a pruner has sworn about its masks, recounted from outside."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mtprune import MultitaskPruner, Report
from mtprune.methods import Method
from tests.fuzz.methods import MethodCase, is_exact
from tests.fuzz.outcomes import check


def of_objects(model: nn.Module, objects: set[int]) -> None:
    """What holds after every step: Parameters are the same objects."""
    check({id(p) for p in model.parameters()} == objects, "Parameters are other objects")


def of_numbers(case: MethodCase, method: Method[Any], pruner: MultitaskPruner) -> None:
    """What holds after an update, and as long as masks hide weights for good."""
    report = pruner.report()
    if report.step is None:
        return
    _numbers(report, pruner.masks)
    share, told = pruner.sparsity, report.sparsity
    check(share == told, f"the report says {told}, and the pruner {share}")
    if case.kind == "vote" and is_exact(case) and "schedule" in case.options:
        due = method.sparsity * method.schedule.progress(report.step)
        if case.options["schedule"][0] != "regrow":
            _exact(report, due)


def of_zeros(pruner: MultitaskPruner, model: nn.Module) -> None:
    """Masked weights are zero, as anyone reads them."""
    for name, mask in pruner.masks.items():
        check(not read(model, name)[~mask].any(), f"masked weights of '{name}' are not zero")


def at_the_end(
    case: MethodCase, method: Method[Any], pruner: MultitaskPruner, model: nn.Module
) -> None:
    """What holds after the last update."""
    report = pruner.report()
    if is_exact(case):
        _exact(report, method.sparsity)
        _nothing_emptied(case, report)
    pruned = {row.name for row in report.layers}
    others = [p for name, p in model.named_parameters() if name not in pruned]
    diverged = not all(bool(p.isfinite().all()) for p in others)  # huge losses, plain steps
    for row in report.layers if case.kind in ("rank", "flop") and not diverged else ():
        weight = read(model, row.name)
        rank = int(torch.linalg.matrix_rank(weight.flatten(1).double(), rtol=1e-4))
        check(rank <= (row.rank or 0), f"'{row.name}' has rank {rank}, and not {row.rank}")
    if case.options.get("granularity", ("",))[0] == "nm":
        n, m = case.options["granularity"][1:]
        for name, mask in pruner.masks.items():
            rows = mask.flatten(1).T if mask.dim() == 2 else mask.movedim(1, 0).flatten(1)
            fours = rows.reshape(-1, m, rows.shape[1]).sum(1)
            check(bool((fours <= n).all()), f"'{name}' keeps more than {n} of {m}")


def is_hard(case: MethodCase, method: Method[Any], report: Report) -> bool:
    """Whether what masks hide must be zero: always, or from the last update on."""
    if case.kind in ("rank", "flop"):
        return False
    soft = case.kind in ("soft", "sigmoid", "movement", "adapmtl", "adapmtl_published")
    opens = soft or case.options.get("straight_through", False)
    return not opens or method.schedule.next_update(report.step or 0) is None


def read(model: nn.Module, name: str) -> Tensor:
    """A weight as anyone sees it who reads the attribute."""
    path, _, attribute = name.rpartition(".")
    weight: Tensor = getattr(model.get_submodule(path), attribute)
    return weight.detach()


def _exact(report: Report, share: float) -> None:
    pruned = sum(row.parameters - row.kept for row in report.layers)
    asked = round(share * report.parameters)
    told = f"{pruned} of {report.parameters} weights are pruned, and not {asked}"
    check(pruned == asked, told)


def _nothing_emptied(case: MethodCase, report: Report) -> None:
    least = case.options.get("min_keep", 1)
    if case.kind != "vote" or report.kept < least * len(report.layers):
        return
    for row in report.layers:
        told = f"'{row.name}' keeps {row.kept} of {row.parameters}, with min_keep={least}"
        check(row.kept >= min(least, row.parameters), told)


def _numbers(report: Report, masks: dict[str, Tensor]) -> None:
    """The report's numbers are those of the masks."""
    check([row.name for row in report.layers] == list(masks), "the report has other layers")
    for row in report.layers:
        mask = masks[row.name]
        kept = int(mask.sum())
        if row.rank is not None:
            kept = min(row.rank * sum(mask.flatten(1).shape), mask.numel())
        found, told = (mask.numel(), kept), (row.parameters, row.kept)
        check(found == told, f"'{row.name}' has {found} weights, kept; the report says {told}")
    for rows in (report.layers, report.components):
        whole = sum(row.parameters for row in rows), sum(row.kept for row in rows)
        check(whole == (report.parameters, report.kept), "the report's sums are others")
    share = (report.parameters - report.kept) / report.parameters if report.parameters else 0.0
    check(math.isclose(share, report.sparsity), f"the report's sparsity is {report.sparsity}")
