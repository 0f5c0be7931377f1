"""Tampering: values as a damaged or a hostile file could hold them, drawn from a seed.

A value is containers, tensors, numbers and strings, as a checkpoint or JSON holds them. A tampered
one differs in one entry, chosen by chance.
"""

import math
import random
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]


def tampered(value: Any, seed: int) -> tuple[Any, str]:
    """A copy of a value with one entry changed, and what was done where.

    Args:
        value: Containers, tensors, numbers and strings.
        seed: Of what and where.
    """
    draw = random.Random(seed)
    paths = list(_paths(value))
    for _ in range(100):
        path = draw.choice(paths)
        changes = _changes(_at(value, path), draw)
        if path:
            changes |= {"dropped": _DROP, "renamed": _RENAME, "doubled": _DOUBLE}
        what = draw.choice(sorted(changes))
        new = _with(value, path, changes[what], draw)
        if not alike(new, value):
            return new, f"{what} at {'.'.join(map(str, path)) or 'the top'}"
    raise AssertionError("nothing to change")


def alike(one: Any, other: Any) -> bool:
    """Whether two values are the same to the bit, types too."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and one.layout == other.layout
        if not same or one.is_meta or one.layout != torch.strided:
            return same and one.layout == torch.strided
        bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
        return torch.equal(*bits)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


_DROP, _RENAME, _DOUBLE = object(), object(), object()
_STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 10**30, -(10**30), 2**63, 0.5, -0.5, 1e300, 1e-320),
    *(math.nan, math.inf, -math.inf, "", "seg", "x" * 5000, b"bytes", [], {}, (), [[]], {"a": {}}),
    {1: 2},
    [None] * 50,
)


def _strange_tensors() -> list[Tensor]:
    return [
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(3, dtype=torch.int64),
        torch.ones(2, 2),
        torch.full((4,), math.nan),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(1 << 33, dtype=torch.uint8, device="meta"),
        torch.eye(3).to_sparse(),
        torch.zeros(1, 1).expand(1 << 20, 1 << 20),
    ]


def _deep() -> Any:
    value: Any = 1
    for _ in range(5000):
        value = [value]
    return value


def _changes(value: Any, draw: random.Random) -> dict[str, Any]:
    """What could stand in a value's place."""
    found: dict[str, Any] = {
        "strange": draw.choice(_STRANGE),
        "tensor": draw.choice(_strange_tensors()),
    }
    if draw.random() < 0.02:
        found["deep"] = _deep()
    if isinstance(value, bool):
        found["flipped"] = not value
    elif isinstance(value, int):
        found["off by one"] = value + draw.choice((-1, 1))
        found["negative"] = -value
        found["real"] = float(value) if abs(value) < 1e300 else 0.5
    elif isinstance(value, float):
        found["scaled"] = value * draw.choice((-1.0, 2.0, 1e12))
        found["text"] = str(value)
    elif isinstance(value, str):
        found["longer"] = value + "x"
        found["shorter"] = value[:-1]
    elif isinstance(value, dict):
        found["one more"] = {**value, "one more": draw.choice(_STRANGE)}
        found["emptied"] = {}
        found["pairs"] = list(value.items())
    elif isinstance(value, (list, tuple)):
        found["one more"] = [*value, draw.choice(_STRANGE)]
        found["shorter"] = type(value)(value[:-1])
        found["turned"] = type(value)(reversed(value))
    elif isinstance(value, Tensor):
        found |= _tensor_changes(value, draw)
    return found


def _tensor_changes(value: Tensor, draw: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {
        "longer": torch.cat([value.reshape(-1), value.new_ones(1)]),
        "shorter": value.reshape(-1)[:-1].clone(),
        "other type": value.double() if value.dtype != torch.float64 else value.int(),
        "one dimension more": value.unsqueeze(0),
        "values": value.tolist(),
    }
    if value.numel():
        found["bit flipped"] = _flipped(value, draw)
        if value.is_floating_point():
            spoilt = value.clone()
            spoilt.view(-1)[draw.randrange(value.numel())] = draw.choice(
                (math.nan, math.inf, -1e30)
            )
            found["not finite"] = spoilt
    return found


def _flipped(value: Tensor, draw: random.Random) -> Tensor:
    """A copy with one bit the other way; of bools, one of them."""
    copied = value.clone().contiguous()
    if value.dtype == torch.bool:
        copied.view(-1)[draw.randrange(value.numel())] ^= True
        return copied
    raw = copied.view(-1).view(torch.uint8)
    raw[draw.randrange(raw.numel())] ^= 1 << draw.randrange(8)
    return copied


def _paths(value: Any, path: Path = ()) -> list[Path]:
    found = [path]
    if isinstance(value, dict):
        for key, part in value.items():
            found += _paths(part, (*path, key))
    elif isinstance(value, (list, tuple)):
        for place, part in enumerate(value):
            found += _paths(part, (*path, place))
    return found


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _with(value: Any, path: Path, new: Any, draw: random.Random) -> Any:
    """A copy with another value at a path; containers on the way are new ones."""
    if not path:
        return new
    key, *rest = path
    if isinstance(value, dict):
        if rest:
            return {**value, key: _with(value[key], tuple(rest), new, draw)}
        if new is _DROP:
            return {k: v for k, v in value.items() if k != key}
        if new is _RENAME:
            other = draw.choice([*(k for k in value if k != key), f"{key}x"])
            return {(other if k == key else k): v for k, v in value.items() if k != other}
        return {**value, key: draw.choice(list(value.values())) if new is _DOUBLE else new}
    parts = list(value)
    if rest:
        parts[key] = _with(value[key], tuple(rest), new, draw)
    elif new is _DROP:
        del parts[key]
    elif new is _DOUBLE:
        parts.insert(key, parts[key])
    elif new is _RENAME:
        parts[key] = draw.choice(parts)
    else:
        parts[key] = new
    return type(value)(parts)
