"""Every figure runs on a small data set, and its numbers are what they are called."""

import json

import analysis
import pytest
import torch
from analyses import bench, branching
from common import data, fixture, nets
from common.shuffling import noise, shuffled

pytestmark = pytest.mark.slow

FEW = ["--steps", "8", "--tune-steps", "2", "--seeds", "1", "--observations", "2", "--by", "loss"]
TINY = [*FEW, "--net", "unet", "--width", "0.02", "--batch", "2", "--crop", "16", "24"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    root = tmp_path_factory.mktemp("rooms")
    fixture.write("nyuv2", root, (24, 32))
    return root


@pytest.fixture(scope="module")
def draw(rooms, tmp_path_factory):
    """Measures a figure, and looks at its files."""

    def run(figure, *arguments):
        out = tmp_path_factory.mktemp(figure)
        where = ["--data", str(rooms), "--out", str(out)]
        found = analysis.main([figure, *where, *TINY, *arguments])
        told = json.loads((out / f"{figure}.json").read_text())
        assert told["rows"] == analysis._rounded(found["rows"])
        assert told["options"]["seeds"] == [0]
        assert told["trainer"]["width"] == 0.02
        assert told["command"].startswith(f"python analysis.py {figure} --data DIR --steps 8")
        assert (out / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        return found

    return run


def test_overlap_stands_beside_its_nulls(draw, capsys):
    rows = draw("iou", "--keep", "0.1", "--draws", "3", "--batch", "4")["rows"]
    pairs = ["seg-normal", "seg-depth", "normal-depth", "seg-normal-depth"]
    assert [row["tasks"] for row in rows] == pairs
    for row in rows:
        assert 0 <= row["chance"] < row["iou"] <= 1
        assert len(row["null"]) == 3
        assert row["excess"] == pytest.approx(row["iou"] - sum(row["null"]) / 3)
        assert row["low"] < row["excess"] < row["high"]
        assert row["p"] in (0.25, 0.5, 0.75, 1.0)
        assert all(len(layer["null"]) == 3 for layer in row["layers"])
    assert "unrelated" in capsys.readouterr().out


def test_watershed_has_a_curve_for_one_net_and_for_nets_of_one_task(draw):
    found = draw("watershed", "--keep", "0.1", "--shuffles", "1", "--alone", "2")
    assert [row["kind"] for row in found["rows"]] == ["init", "alone"]
    init, alone = found["curves"].values()
    assert init["layers"] == alone["layers"]
    assert all(name.startswith(("stem", "down", "up")) for name in init["layers"])
    for curve in (init, alone):
        assert len(curve["iou"]) == len(curve["null"]) == len(curve["layers"])
        assert set(curve["drops"]) == {"raw", "beyond"}


def test_arbiters_keep_as_many_weights(draw):
    rows = draw("arbiters", "--sparsities", "0.8")["rows"]
    assert [(row["line"], row["tuned"]) for row in rows] == [
        (name, tuned)
        for name in ("unanimous", "majority", "mean", "intersection", "joint")
        for tuned in (False, True)
    ]
    assert len({row["zeros"] for row in rows}) == 1
    assert rows[0]["zeros"] == pytest.approx(0.8, abs=1e-3)
    for row in rows:
        assert row["delta"] == pytest.approx(sum(row["tasks"].values()) / 3)
        assert row["worst"] == min(row["tasks"].values())


def test_sensitivity_prunes_one_component_at_a_time(draw):
    found = draw("sensitivity", "--sparsities", "0.5", "0.9")
    assert list(found["weights"]) == ["shared", "seg", "normal", "depth"]
    assert len(found["rows"]) == 2 * 4 * 2
    for row in found["rows"]:
        size = found["weights"][row["line"]]
        assert row["components"].pop(row["line"]) == round(row["sparsity"] * size) / size
        assert set(row["components"].values()) == {0.0}


def test_components_end_at_one_sparsity_overall(draw):
    rows = draw("components", "--target", "0.8")["rows"]
    assert [row["kind"] for row in rows] == ["uniform", "learned"]
    for row in rows:
        total = sum(row["weights"].values())
        zeros = sum(row["components"][name] * n for name, n in row["weights"].items())
        assert zeros == pytest.approx(round(0.8 * total))
        assert row["history"][-1]["overall"] == pytest.approx(0.8, abs=1e-3)
        steps = [moment["step"] for moment in row["history"]]
        assert steps == sorted(steps)
        spread = max(row["components"].values()) - min(row["components"].values())
        assert row["spread"] == spread


def test_thresholds_hard_and_soft_end_at_one_sparsity(draw, capsys):
    rows = draw("thresholds", "--sparsities", "0.5", "0.8")["rows"]
    assert len(rows) == 2 * 4
    for row in rows:
        assert row["zeros"] == pytest.approx(row["sparsity"], abs=1e-3)
    assert "| 80.0% | soft, learned | 1 |" in capsys.readouterr().out


@pytest.mark.long
def test_balances_train_dense_and_pruned_nets(draw):
    rows = {row["line"]: row for row in draw("balancing", "--target", "0.8")["rows"]}
    assert len(rows) == 10
    assert rows["dense, equal"]["delta"] == 0
    assert rows["dense, PCGrad"]["delta"] != 0
    for line, row in rows.items():
        zeros = 0.0 if line.startswith("dense") else 0.8
        assert row["sparsity"] == pytest.approx(zeros, abs=1e-3)


@pytest.mark.long
def test_a_table_has_no_attention_net(tmp_path):
    fixture.write("census", tmp_path / "data")
    arguments = ["--data", str(tmp_path / "data"), "--out", str(tmp_path), "--problem", "census"]
    found = analysis.main(["balancing", *arguments, *FEW, "--width", "0.05"])
    nets = {row["line"] for row in found["rows"]}
    assert "vote, FAMO" in nets
    assert not any("MTAN" in line for line in nets)
    found = analysis.main(["iou", *arguments, *FEW, "--width", "0.05", "--shuffles", "1"])
    assert len(found["rows"]) == 10 + 1


def test_shuffled_labels_are_those_of_other_pictures(rooms):
    (layout,) = (one for one in data.NYUV2 if next(rooms.glob(one.marker), None))
    source = layout.open(rooms, ["seg", "depth"])
    moved = shuffled(source, ["seg", "depth"], seed=1)
    assert moved.splits["test"] is source.splits["test"]
    before, after = source.splits["train"], moved.splits["train"]
    assert len(before) == len(after)
    origin = {"seg": [], "depth": []}
    for i in range(len(before)):
        assert torch.equal(after[i]["input"], before[i]["input"])
        for task, places in origin.items():
            same = [torch.equal(after[i][task], before[j][task]) for j in range(len(before))]
            places.append(same.index(True))
    everyone = list(range(len(before)))
    assert sorted(origin["seg"]) == sorted(origin["depth"]) == everyone
    assert origin["seg"] != everyone
    assert origin["seg"] != origin["depth"]


def test_shuffled_rows_of_a_table():
    split = data.Table({"input": torch.arange(20.0)[:, None], "a": torch.arange(20)})
    source = data.Source("rows", {"train": split, "val": split, "test": split}, {"a": 20})
    moved = shuffled(source, ["a"], seed=0).splits["train"]
    assert torch.equal(moved.tensors["input"], split.tensors["input"])
    assert moved.tensors["a"].tolist() != list(range(20))
    assert sorted(moved.tensors["a"].tolist()) == list(range(20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "vote"], "--method does not apply: the figure decides. Leave it out"),
        (["--sparsities", "90"], r"Got 90.0. Did you mean 0.9?"),
        (["--seeds", "0"], "must be at least 1"),
    ],
)
def test_refuses(capsys, arguments, message):
    with pytest.raises(SystemExit):
        analysis.read(["arbiters", "--data", "x", *arguments])
    assert message in capsys.readouterr().err


def test_a_net_that_has_learnt_nothing_is_no_measure():
    dense = {"test": {"seg": {"miou": 0.0}}, "judged": {"seg": ["miou"]}}
    with pytest.raises(bench.UntrainedError, match=r"is 0 in the baseline.*or take --by loss"):
        bench.change(dense, dense)


def test_random_pictures_with_random_labels_leave_no_excess(draw):
    rows = draw("iou", "--keep", "0.2", "--draws", "16", "--batch", "4", "--noise")["rows"]
    assert all(len(row["null"]) == 16 for row in rows)
    assert all(row["low"] < 0 < row["high"] for row in rows)


def test_noise_keeps_shapes_and_nothing_else(rooms):
    source = data.find(rooms, data.NYUV2, ["seg", "normal", "depth"])
    before, after = source.splits["train"], noise(source, ["seg", "depth"]).splits["train"]
    assert len(after) == len(before)
    sample, again, other = after[0], after[0], after[1]
    assert {name: x.shape for name, x in sample.items()} == {
        name: before[0][name].shape for name in ("input", "seg", "depth")
    }
    assert all(torch.equal(x, again[name]) for name, x in sample.items())
    assert not torch.equal(sample["input"], other["input"])
    assert sample["seg"].max() < source.outputs["seg"]


def test_nets_branch_and_keep_as_many_weights(draw):
    found = draw("branching", "--draws", "2", "--zeros", "0.8", "--batch", "4")
    lines = ["all shared", "where masks say", "in the middle", "at the first layer"]
    assert [row["line"] for row in found["rows"][::2]] == lines
    sizes = [row["parameters"] for row in found["rows"] if row["stage"] == "dense"]
    assert sizes[0] < sizes[2] < sizes[3]
    kept = [row["kept"] for row in found["rows"] if row["stage"] == "pruned, tuned"]
    assert max(kept) - min(kept) <= 1
    assert found["suggestions"][0]["table"].startswith("split at")


def test_a_branched_net_begins_as_the_one_it_branches_from():
    torch.manual_seed(0)
    net = nets.build("unet", {"seg": 3, "depth": 1}, 0.05).eval()
    images = torch.randn(2, 3, 16, 24)
    ran = branching.order_of(net, images)
    split = branching.Branched(net, ran[:6], [["seg"], ["depth"]])
    outputs, expected = split(images), net(images)
    assert list(outputs) == ["seg", "depth"]
    assert all(torch.equal(y, expected[task]) for task, y in outputs.items())
    first, second = (list(branch.modules()) for branch in split.nets)
    assert {id(m) for m in ran[:6]} == {id(m) for m in first} & {id(m) for m in second}
