"""Fallback: where the machine cannot run a form, its layers become dense ones, once.

Dense layers made anew at each call would be slower than a model that was never pruned.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from mtprune.compression.attention import SelfAttention
from mtprune.compression.compress import finish, plan_of
from mtprune.compression.experts import OpenExperts
from mtprune.compression.forms import Form, building
from mtprune.compression.joining import separate_all

__all__ = ["fall_back"]


def fall_back(model: nn.Module, stacklevel: int = 2) -> bool:
    """Make layers dense whose form this machine lacks, in place, with a warning and in the plan.

    Args:
        model: A compressed model whose forms hold their parts.
        stacklevel: Of the warning: 2 for the caller's line.

    Returns:
        Whether any layer became dense.
    """
    forms = [module for module in model.modules() if isinstance(module, Form)]
    reasons = {form: form.unavailable() for form in forms}
    lacking = [form for form in forms if reasons[form]]
    if not lacking:
        return False
    dense = {form: form.dense() for form in lacking}
    _exchange(model, dense)
    kinds = (SelfAttention, OpenExperts)
    opened = [m for m in model.modules() if isinstance(m, kinds) and m.is_dense()]
    _exchange(model, {module: module.closed() for module in opened})
    plan = plan_of(model)
    if building.unavailable():
        separate_all(model, plan)
        plan = replace(plan, blocks=())
    sites = {form.site for form in lacking}
    rows = (replace(row, choice="dense") if row.layer in sites else row for row in plan.rows)
    plan = replace(plan, rows=tuple(rows), dense_ms=None, ms=None, sizes=None)
    why = "; ".join(sorted({f"'{form.choice}': {reasons[form]}" for form in lacking}))
    note = f"{len(lacking)} layers are dense here, because this machine lacks their form {why}."
    warnings.warn(f"{note} They are as slow as before pruning.", stacklevel=stacklevel + 1)
    finish(model, replace(plan, note=f"{plan.note} {note}".strip()))
    return True


def _exchange(model: nn.Module, others: Mapping[Any, nn.Module]) -> None:
    """Put other modules into the places of some, all places of each."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in others:
                parent._modules[name] = others[child]
