"""Tampered folders of saved models: what a damaged or a hostile one could hold, from a seed."""

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtprune.files import digest
from tests.tampering import tampered

TENSORS, META = "model.safetensors", "plan.json"


def resealed(folder: Path) -> None:
    """Give a folder that was changed the fingerprints of what it holds now."""
    meta = json.loads((folder / META).read_text())
    if isinstance(meta, dict):
        meta["tensors"] = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
        meta.pop("digest", None)
        meta["digest"] = digest(meta)
        (folder / META).write_text(json.dumps(meta))


def tampered_folder(folder: Path, to: Path, seed: int, *, sealed: bool) -> str:
    """A copy of a folder with one thing changed, and what was done.

    Args:
        folder: What `mtprune.save` wrote.
        to: Where the copy goes.
        seed: Of what is done.
        sealed: Whether fingerprints are made anew, as somebody would who means harm.
    """
    shutil.copytree(folder, to)
    draw = random.Random(seed)
    how = draw.choice(("plan", "plan", "tensors", "tensors", "bytes", "bombs", "missing"))
    if how == "plan":
        what = _plan(to, seed)
    elif how == "tensors":
        what = _tensors(to, draw)
    elif how == "bombs":
        what = _bomb(to, draw)
    elif how == "missing":
        name = draw.choice((TENSORS, META))
        (to / name).unlink()
        return f"{name} is missing"
    else:
        return _bytes(to, draw)
    if sealed:
        try:
            resealed(to)
        except (RecursionError, ValueError):
            what += ", not resealed"
    return what


def _plan(folder: Path, seed: int) -> str:
    meta = json.loads((folder / META).read_text())
    for more in range(1000):
        new, what = tampered(meta, 1000 * seed + more)
        try:
            text = json.dumps(new)
        except (TypeError, ValueError, RecursionError):  # no JSON
            continue
        (folder / META).write_text(text)
        return f"plan: {what}"
    raise AssertionError


def _tensors(folder: Path, draw: random.Random) -> str:
    tensors = load_file(folder / TENSORS)
    name = draw.choice(sorted(tensors))
    how = draw.choice(("dropped", "renamed", "swapped", "type", "shape", "numbers", "one number"))
    value = tensors[name]
    if how == "dropped":
        del tensors[name]
    elif how == "renamed":
        tensors[f"{name}x"] = tensors.pop(name)
    elif how == "swapped":
        other = draw.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif how == "type":
        kinds = (torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.float16)
        tensors[name] = value.to(draw.choice(kinds))
    elif how == "shape":
        shorter = value.reshape(-1)[:-1].clone()
        tensors[name] = draw.choice((value.reshape(-1), value.unsqueeze(0), shorter))
    elif how == "numbers":
        tensors[name] = _far(value, draw)
    else:
        changed = value.reshape(-1).clone()
        if len(changed):
            place = draw.randrange(len(changed))
            changed[place] = _far(changed, draw)[place]
        tensors[name] = changed.view(value.shape)
    save_file(
        {key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / TENSORS
    )
    return f"tensors: '{name}' {how}"


def _far(value: Tensor, draw: random.Random) -> Tensor:
    """Numbers out of any range of indices."""
    if value.is_floating_point() or value.dtype == torch.bool:
        return torch.zeros_like(value)
    info = torch.iinfo(value.dtype)
    return torch.full_like(value, draw.choice((info.max, info.min, info.max // 2, 7)))


def _bomb(folder: Path, draw: random.Random) -> str:
    """Something small that asks for much memory or time."""
    meta: Any = json.loads((folder / META).read_text())
    plan = meta["plan"] if "plan" in meta else meta["quantization_config"]["plan"]
    how = draw.choice(("bits", "shape", "deep", "digits", "nested sizes"))
    if how == "bits":
        kept = ["0x" + "f" * 200_000, None]
        plan["removal"]["cuts"] = [{"tensor": "0.weight", "shape": [8, 8], "kept": kept}]
    elif how == "shape":
        cut = {"tensor": "0.weight", "shape": [1 << 39, 2], "kept": ["0x" + "f" * 200_000, None]}
        plan["removal"]["cuts"] = [cut]
    elif how == "digits":
        plan["threads"] = 10**4000
    elif how == "nested sizes":
        sizes = plan["sizes"]
        for _ in range(300):
            sizes = {**plan["sizes"], "against": sizes}
        plan["sizes"] = sizes
    if how == "deep":
        (folder / META).write_text("[" * 100_000 + "]" * 100_000)
    else:
        (folder / META).write_text(json.dumps(meta))
    return f"bomb: {how}"


def _bytes(folder: Path, draw: random.Random) -> str:
    name = draw.choice((TENSORS, META))
    data = bytearray((folder / name).read_bytes())
    how = draw.choice(("flipped", "truncated", "emptied", "longer", "torn"))
    if how == "flipped":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif how == "truncated":
        del data[draw.randrange(len(data)) :]
    elif how == "emptied":
        data.clear()
    elif how == "longer":
        data += bytes(draw.randrange(1, 99))
    else:
        at = draw.randrange(len(data))
        data[at : at + 40] = bytes(40)
    (folder / name).write_bytes(bytes(data))
    return f"bytes: {name} {how}"
