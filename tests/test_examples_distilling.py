"""Distillation: imitations in closed form, and trainers that learn from the dense net."""

import math

import census
import compare
import pytest
import torch
from common import distilling, fixture, loop, losses, options, results
from common.distilling import Teacher
from matplotlib.figure import Figure
from torch import nn

from tests.long import few

TINY = ["--steps", "4", "--batch", "8", "--observations", "2", "--width", "0.02"]


def logits(*chances):
    return torch.tensor(chances, dtype=torch.float64).log()


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_of_classes_the_divergence_of_softened_chances(temperature):
    p, q = (0.7, 0.2, 0.1), (0.25, 0.25, 0.5)
    taught, output = (temperature * logits(x) for x in (p, q))
    found = float(distilling.classes(output, taught, temperature))
    assert found == pytest.approx(temperature**2 * divergence(p, q))
    # A mean over samples, and over pixels.
    rows = distilling.classes(output.repeat(4, 1), taught.repeat(4, 1), temperature)
    pixels = [x.view(1, 3, 1, 1).expand(2, 3, 4, 5) for x in (output, taught)]
    assert float(rows) == pytest.approx(found)
    assert float(distilling.classes(*pixels, temperature)) == pytest.approx(found)
    halved = torch.cat([output, taught]), taught.repeat(2, 1)
    assert float(distilling.classes(*halved, temperature)) == pytest.approx(found / 2)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_of_marks_the_divergence_of_yes_and_no(temperature):
    p, q = (0.9, 0.1), (0.4, 0.6)
    taught, output = (temperature * torch.tensor(yes / no).log() for yes, no in (p, q))
    expected = temperature**2 * divergence(p, q)
    assert float(distilling.marks(output, taught, temperature)) == pytest.approx(expected, rel=1e-5)
    sides = torch.tensor([[-1.0, 1.0]]).view(1, 1, 1, 2)
    whole = [x + sides for x in (output, taught)]  # whose means are as before
    assert float(distilling.pictures(*whole, temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(distilling.marks(*whole, temperature)) != pytest.approx(expected, rel=1e-3)


def test_of_numbers_the_square_and_of_directions_the_cosine():
    output, taught = torch.tensor([[1.0], [5.0]]), torch.tensor([[2.0], [2.0]])
    assert float(distilling.numbers(output, taught, 2)) == 5
    east, north = torch.tensor([2.0, 0, 0]), torch.tensor([0, 5.0, 0])
    output = torch.stack([east, east, -east, east + north / 2.5], 1).view(1, 3, 2, 2)
    taught = torch.stack([3 * east, north, east, east], 1).view(1, 3, 2, 2)
    expected = 1 - (1 + 0 - 1 + 0.5**0.5) / 4
    assert float(distilling.directions(output, taught, 2)) == pytest.approx(expected)


TASKS = {
    "segmentation": (losses.segmentation(3), (2, 3, 4, 4)),
    "normals": (losses.normals(), (2, 3, 4, 4)),
    "depth": (losses.depth(), (2, 1, 4, 4)),
    "keypoints": (losses.keypoints(), (2, 1, 4, 4)),
    "edges": (losses.edges(), (2, 1, 4, 4)),
    "edge marks": (losses.edge_marks(), (2, 1, 4, 4)),
    "presence": (losses.presence(3), (2, 3, 4, 4)),
    "classes": (losses.row_classes(), (5, 3)),
    "numbers": (losses.row_numbers(), (5, 1)),
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_imitates_down_to_0(name):
    task, shape = TASKS[name]
    chance = torch.Generator().manual_seed(0)
    taught, output = torch.randn(2, *shape, generator=chance, dtype=torch.float64)
    apart = task.imitate(output.requires_grad_(), taught, 2.0)
    (gradient,) = torch.autograd.grad(apart, output)
    closer = task.imitate((output - 0.01 * gradient).detach(), taught, 2.0)
    assert 0 < float(closer) < float(apart.detach())
    same = task.imitate(taught.clone(), taught, 2.0)
    assert float(same) == pytest.approx(0, abs=1e-9)


def test_a_teacher_rests_and_its_word_is_weighed():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, x):
            return {"a": self.inner(x)}

    teacher = Teacher(Net(), weight=0.5, temperature=1.0)
    before = net[1].running_mean.clone()
    batch = {"input": torch.randn(4, 2), "a": torch.tensor([0, 1, 2, 0])}
    taught = teacher.teach(batch)
    assert set(batch) < set(taught)
    (said,) = (taught[name] for name in set(taught) - set(batch))
    assert torch.equal(said, net(batch["input"]))  # twice the same, without dropout
    assert torch.equal(net[1].running_mean, before)
    assert not said.requires_grad
    output = torch.randn(4, 3)
    own = losses.task_loss("a", losses.row_classes(), scale=30.0)
    both = teacher.adds("a", own, distilling.classes, scale=30.0)
    expected = own({"a": output}, batch) + 30 * 0.5 * distilling.classes(output, said, 1.0)
    assert torch.allclose(both({"a": output}, taught), expected)


# The trainers.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Census data, and a dense net that was trained on it."""
    folder = tmp_path_factory.mktemp("distilling")
    fixture.write("census", folder / "data")
    train(folder, "dense", "--method", "dense")
    return folder


def train(folder, name, *arguments):
    where = ["--data", str(folder / "data"), "--out", str(folder / name)]
    return loop.main(census.PROBLEM, [*where, *TINY, *arguments])


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr(results, "draw", lambda found: Figure())


def weights(folder, name):
    return torch.load(folder / name / "model.pt", weights_only=True)


@pytest.mark.long
@pytest.mark.slow
def test_a_net_that_learns_from_the_dense_one_comes_closer_to_it(folder):
    teacher = ["--teacher", str(folder / "dense" / "model.pt")]
    much = ["--method", "magnitude", "--when", "init", "--steps", "60", "--sparsity", "0.5"]
    found = train(folder, "alone", *much)
    taught = train(folder, "taught", *much, "--distil", "100", *teacher)
    assert taught["zeros"] == found["zeros"] == round(0.5 * found["weights"])
    assert taught["options"]["temperature"] == 2.0

    told = options.parse(census.PROBLEM, ["--data", str(folder / "data"), *TINY])
    source = loop.open_data(census.PROBLEM, told)
    rows = source.splits["test"].tensors["input"]
    said = {}
    for name in ("dense", "alone", "taught"):
        net = loop.make_net(told, source)
        net.load_state_dict(weights(folder, name))
        said[name] = {task: output.detach() for task, output in net(rows).items()}

    def far(name):
        dense = said["dense"]
        return sum(float(distilling.classes(said[name][t], dense[t], 1.0)) for t in dense)

    assert far("taught") < 0.5 * far("alone")


@pytest.mark.slow
@pytest.mark.parametrize("method", few(["vote", "adapmtl"]))
def test_methods_learn_from_the_dense_net_and_go_on_where_they_stopped(folder, monkeypatch, method):
    pretrained = ["--pretrained", str(folder / "dense" / "model.pt")]
    arguments = ["--method", method, "--distil", "0.5", *pretrained, "--save-every", "1"]
    whole = train(folder, f"{method} whole", *arguments)
    assert whole["zeros"] == round(0.9 * whole["weights"])

    save, calls = loop.save, []

    def save_and_die(*what):
        save(*what)
        calls.append(what)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(folder, f"{method} parts", *arguments)
    monkeypatch.setattr(loop, "save", save)
    with pytest.raises(SystemExit, match=r"is of a run with --distil 0\.5\. Got 2\.0"):
        train(folder, f"{method} parts", *arguments, "--distil", "2", "--resume")
    train(folder, f"{method} parts", *arguments, "--resume")
    one, two = (weights(folder, f"{method} {run}") for run in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_what_is_wrong_with_a_teacher_is_told(folder):
    with pytest.raises(SystemExit, match=r"census: There is no .*none\.pt\. Train with"):
        train(folder, "x", "--distil", "--teacher", str(folder / "none.pt"))
    teacher = ["--teacher", str(folder / "dense" / "model.pt")]
    with pytest.raises(SystemExit, match=r"census: .*model\.pt is of another net"):
        train(folder, "x", "--distil", *teacher, "--width", "0.1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distil"], "--distil needs --pretrained or --teacher: the net to learn from"),
        (["--teacher", "x"], "--teacher and --temperature are for --distil. Give it, too"),
        (["--temperature", "4"], "--teacher and --temperature are for --distil. Give it, too"),
        (["--distil", "0"], "must be positive"),
    ],
)
def test_refuses(capsys, arguments, message):
    with pytest.raises(SystemExit):
        options.parse(census.PROBLEM, ["--data", "x", *arguments])
    assert message in capsys.readouterr().err


def test_a_comparison_has_every_method_taught_by_its_seeds_dense_net(tmp_path):
    command = ["census", "--data", "x", "--out", str(tmp_path), "--distil", "--temperature", "4"]
    told = compare.read(command)
    for spec in ("vote", "adapmtl", "imp", "lth", "dense_tuned"):
        for job in compare.jobs(compare.Entry(spec, 0.9), 1, told):
            dense = tmp_path / "dense" / "seed1" / "model.pt"
            own = options.parse(census.PROBLEM, [*job.arguments, "--data", "x"])
            assert (own.distil, own.teacher, own.temperature) == (1.0, dense, 4.0)
    dense = compare.dense_job(1, told)
    assert options.parse(census.PROBLEM, [*dense.arguments, "--data", "x"]).distil is None
