"""A folder saved in format 1 is still read: every form, a removal, a subnetwork.

``saved/`` holds a `Net` with all of these, and in ``expected`` an input,
the output and the dense weights. It is never written again: a format that changes gets a number
and a folder of its own.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mtprune
from mtprune.compression.forms import CHOICES

SAVED = Path(__file__).with_name("saved")

FORMS = {
    "stem.0": "rows",
    "stem.2": "thin",
    "stem.4": "sparse",
    "mixer.in_proj": "sparse",
    "mixer.out_proj": "csr",
    "up": "sparse",
    "down": "csr",
    "low": "rank",
    "pairs": "2:4",
    "head": "dense",
}


class Net(nn.Module):
    """A layer for each form; ``pairs`` is never called, because a CPU cannot."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3)
        )
        self.mixer = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.low = nn.Linear(8, 8)
        self.pairs = nn.Linear(64, 32)
        self.head, self.other = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.stem(x).flatten(2).mT
        tokens = self.mixer(tokens, tokens, tokens)[0]
        hidden = self.low(self.down(self.up(tokens).relu()).relu())
        return {"head": self.head(hidden), "other": self.other(hidden)}


@pytest.fixture
def loaded():
    return mtprune.load(SAVED, Net())


def test_every_form_is_read(loaded):
    assert set(FORMS.values()) <= set(CHOICES)
    plan = mtprune.plan_of(loaded)
    assert {row.layer: row.choice for row in plan.rows} == FORMS
    expected = load_file(SAVED / "expected.safetensors")
    for name, choice in FORMS.items():
        layer = loaded.get_submodule(name)
        assert getattr(layer, "choice", "dense") == choice
        weight = expected[f"{name}.weight"]
        if choice == "rank":  # a product, which CPUs round differently
            torch.testing.assert_close(layer.weight, weight)
        else:
            assert torch.equal(layer.weight, weight)


def test_it_says_what_it_said(loaded):
    expected = load_file(SAVED / "expected.safetensors")
    with torch.no_grad():
        outputs = loaded(expected["x"])
    assert outputs.keys() == {"head"}
    torch.testing.assert_close(outputs["head"], expected["y"], rtol=1e-5, atol=1e-6)


def test_what_was_removed_and_left_out_is_known(loaded):
    plan = mtprune.plan_of(loaded)
    assert plan.removal["up.weight"].after == (len(loaded.up.bias), 8)
    assert len(loaded.up.bias) < 12
    assert plan.subnetwork.tasks == ("head",)
    assert "other" in plan.subnetwork.absent


def test_what_is_saved_again_is_the_same(loaded, tmp_path):
    mtprune.save(loaded, tmp_path)
    before, after = (load_file(where / "model.safetensors") for where in (SAVED, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = mtprune.load(tmp_path, Net())
    assert mtprune.plan_of(again) == mtprune.plan_of(loaded)
