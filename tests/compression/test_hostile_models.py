"""Folders that are damaged, or were never saved by us: one error, and the model is as it was."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

import mtprune
from mtprune.compression import storage
from tests import hostile_models
from tests.compression.fakes import prefer
from tests.long import few
from tests.tampered_models import resealed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = hostile_models.compressed()
    mtprune.save(model, folder)
    with torch.no_grad():
        return folder, model(hostile_models.example())


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


def edit(folder, change):
    meta = json.loads((folder / "plan.json").read_text())
    change(meta)
    (folder / "plan.json").write_text(json.dumps(meta))
    resealed(folder)


def refused(folder, message, model=None):
    model = hostile_models.dense() if model is None else model
    before = hostile_models.everything(model)
    with pytest.raises(ValueError, match=message):
        mtprune.load(folder, model)
    assert hostile_models.alike(hostile_models.everything(model), before)


def test_as_it_was_saved_it_is_bitwise_the_same(saved):
    folder, expected = saved
    loaded = mtprune.load(folder, hostile_models.dense())
    rows = mtprune.plan_of(loaded).rows
    assert {row.choice for row in rows} == {"dense", "rows", "thin", "sparse", "csr", "rank"}
    with torch.no_grad():
        assert torch.equal(loaded(hostile_models.example()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [False, True], ids=["damaged", "hostile"])
def test_tampered_folders_are_refused_or_run(saved, tmp_path, sealed):
    folder, expected = saved
    found = [
        hostile_models.outcome(folder, tmp_path / f"{i}", i, sealed=sealed, expected=expected)
        for i in range(60)
    ]
    assert [one for one in found if one[0] not in ("refused", "sound")] == []


@pytest.mark.slow
def test_tampered_plans_are_refused_or_right(saved):
    plan = json.loads((saved[0] / "plan.json").read_text())["plan"]
    found = [hostile_models.plan_outcome(plan, seed) for seed in range(30)]
    assert [one for one in found if one[0] not in ("refused", "sound")] == []


def test_damage_is_named(copied):
    path = copied / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    refused(copied, r"model\.safetensors' is not the file that '.*plan\.json' was written with")
    meta = json.loads((copied / "plan.json").read_text())
    path.write_bytes(bytes(data[:-3]) + bytes([data[-3] ^ 1]) + bytes(data[-2:]))
    (copied / "plan.json").write_text(json.dumps({**meta, "aliases": {"x": "low.bias"}}))
    refused(copied, r"plan\.json': 'digest' must be the fingerprint of all other entries")
    (copied / "plan.json").write_text("{")
    refused(copied, r"plan\.json' holds no JSON that can be read")


def test_a_lost_bias_is_missed(tmp_path):
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(8, 16) > 0.8)
    fast = mtprune.compress(model, torch.randn(3, 16), measure=prefer("csr"))
    assert mtprune.plan_of(fast)["0"].choice == "csr"
    mtprune.save(fast, tmp_path)
    tensors = storage._safetensors().load((tmp_path / "model.safetensors").read_bytes())
    del tensors["0.bias"]
    (tmp_path / "model.safetensors").write_bytes(storage._safetensors().save(tensors))
    resealed(tmp_path)
    fresh = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    refused(tmp_path, r"does not fit this Sequential: it lacks the layer's bias", fresh)


@pytest.mark.parametrize(
    "count",
    [
        ["norm.eps", 3],
        ["training", 0],
        ["attention.num_heads", 99],
        ["norm.weight.ndim", 0],
        ["_modules.x", 0],
        ["norm.forward.__code__.co_argcount", 0],
    ],
)
def test_nothing_but_numbers_of_units_is_set(copied, count):
    edit(copied, lambda meta: meta["plan"]["removal"]["counts"].append(count))
    refused(copied, rf"it sets '{count[0]}' to {count[1]}, and this model has")


def test_a_bomb_of_bits_is_looked_at_before_it_is_unpacked(copied):
    def change(meta):
        kept = ["0x" + "f" * 200_000, None]
        meta["plan"]["removal"]["cuts"] = [{"tensor": "up.weight", "shape": [12, 8], "kept": kept}]

    edit(copied, change)
    refused(copied, r"'plan\.removal\.cuts\.0\.kept\.0' must be a hexadecimal number of at most 12")


@pytest.mark.parametrize("arguments", [3, True, [1], "x"])
def test_arguments_are_names_and_values(copied, arguments):
    edit(copied, lambda meta: meta.update(arguments=arguments))
    refused(copied, r"plan\.json': 'arguments' must be a mapping with strings for keys")
    with pytest.raises(ValueError, match=r"'arguments' must be a mapping"):
        mtprune.load(copied)


@pytest.mark.parametrize("depth", [101, 600, 5000])
def test_what_is_nested_too_often_is_refused(copied, depth):
    path = copied / "plan.json"
    nested = '"arguments": {"a": ' + "[" * depth + "]" * depth + "}"
    path.write_text(path.read_text().replace('"arguments": null', nested))
    refused(copied, r"plan\.json' holds no JSON that can be read: (It is nested|maximum recursion)")


def test_indices_out_of_range_are_refused_when_loaded(tmp_path):
    for choice, key in (
        ("csr", "0.weight_col"),
        ("csr", "0.weight_crow"),
        ("sparse", "0.weight_column"),
    ):
        model = nn.Sequential(nn.Linear(16, 8))
        with torch.no_grad():
            model[0].weight.mul_(torch.rand(8, 16) > 0.8)
        fast = mtprune.compress(model, torch.randn(3, 16), measure=prefer(choice))
        folder = tmp_path / key
        mtprune.save(fast, folder)
        tensors = storage._safetensors().load((folder / "model.safetensors").read_bytes())
        tensors[key] = tensors[key] + 9999
        (folder / "model.safetensors").write_bytes(storage._safetensors().save(tensors))
        resealed(folder)
        refused(folder, "do not fit each other", nn.Sequential(nn.Linear(16, 8)))


def test_indices_that_are_written_later_are_looked_at_too():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(8, 16) > 0.8)
    x = torch.randn(3, 16)
    fast = mtprune.compress(model, x, measure=prefer("csr"))
    fast(x)
    fast[0].weight_col += 1000
    with pytest.raises(ValueError, match="do not fit each other"):
        fast(x)
    fast[0].weight_col -= 1000
    torch.testing.assert_close(fast(x), model(x))
    state = {k: v.repeat_interleave(2)[::2] for k, v in fast[0].state_dict().items()}
    fast[0].load_state_dict(state, assign=True)
    torch.testing.assert_close(fast(x), model(x))


def unseen(part):
    """Write without a word to torch's count of versions."""
    part.data.fill_(50_000_000)


def by_numpy(part):
    part.numpy()[:] = 50_000_000


def in_inference(part):
    with torch.inference_mode():
        part.fill_(50_000_000)


@pytest.mark.parametrize("name", ["weight_col", "weight_crow"])
@pytest.mark.parametrize("write", [unseen, by_numpy, in_inference])
def test_no_way_of_writing_indices_is_followed(name, write):
    model = nn.Sequential(nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(8, 16) > 0.8)
    x = torch.randn(3, 16)
    fast = mtprune.compress(model, x, measure=prefer("csr"))
    with torch.inference_mode():
        state = {key: value.clone() for key, value in fast[0].state_dict().items()}
    if write is in_inference:
        fast[0].load_state_dict(state, assign=True)
    with torch.no_grad():
        fast(x)
        write(getattr(fast[0], name))
        with pytest.raises(ValueError, match="do not fit each other"):
            fast(x)


FORMS = ("rows", "thin", "sparse", "csr", "rank")


def odd(seed):
    """Small models whose tensors begin at odd places in a file."""
    torch.manual_seed(seed)
    width = 3 + 2 * seed
    model = nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, 7), nn.LayerNorm(7))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(9, width) > 0.7)
        model[0].weight[2] = 0.0
        model[2].weight.copy_(torch.randn(7, 1) @ torch.randn(1, 9))
    return model, torch.randn(5, width)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("choice", FORMS)
def test_loaded_models_are_bitwise_the_saved_ones_and_own_their_memory(tmp_path, choice, seed):
    model, x = odd(seed)
    fast = mtprune.compress(model, x, measure=prefer(choice))
    mtprune.save(fast, tmp_path)
    loaded = mtprune.load(tmp_path, odd(seed + 1)[0] if seed > 99 else odd(seed)[0])
    for path in tmp_path.iterdir():
        os.truncate(path, 0)
    with torch.no_grad():
        for batch in (x, x[:1], torch.cat([x] * 7)):
            assert torch.equal(loaded(batch), fast(batch))
    mine, theirs = fast.state_dict(), loaded.state_dict()
    assert [v.stride() for v in mine.values()] == [v.stride() for v in theirs.values()]


KILLED = """
import os, signal, sys, torch
from torch import nn
import mtprune
from mtprune import files
from mtprune.compression import storage

torch.manual_seed(1)
fast = mtprune.compress(nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4))
left = int(sys.argv[2])
real = os.replace

def dying(*names):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*names)

os.replace = dying
mtprune.save(fast, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize(
    ("renames", "killed", "new_one"),
    few(
        [(0, True, False), (1, True, False), (2, True, False), (3, True, True), (4, False, True)],
        (2, True, False),
        (3, True, True),
    ),
)
def test_a_process_killed_while_saving_leaves_the_old_model_or_the_new_one(
    renames, killed, new_one, tmp_path
):
    x = torch.randn(3, 4)
    torch.manual_seed(0)
    old = mtprune.compress(nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4))
    torch.manual_seed(1)
    new = mtprune.compress(nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4))
    mtprune.save(old, tmp_path)
    run = [sys.executable, "-c", KILLED, str(tmp_path), str(renames)]
    assert (subprocess.run(run, check=False).returncode == -signal.SIGKILL) == killed
    loaded = mtprune.load(tmp_path, nn.Sequential(nn.Linear(4, 4)))
    assert [torch.equal(loaded(x), model(x)) for model in (old, new)] == [not new_one, new_one]
