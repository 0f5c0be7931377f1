"""A study: every run once, differences paired by seed, and what was stopped goes on."""

import json
import math
import random
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import mtprune
from mtprune import METHODS, Vote, recipes, study

NAMES = {"vote": partial(METHODS["vote"], steps=100), "magnitude": recipes.magnitude}
# What a task loses for its sparsity.
LOSS = {"vote": {"seg": 0.1, "depth": 0.2}, "magnitude": {"seg": 0.3, "depth": 0.0}}


class Trainer:
    """In place of hours of work: results that are known, and a note of each run."""

    def __init__(self, stop=None, others=None):
        self.made = []
        self._stop = stop
        self._others = others or {}

    def __call__(self, method, seed):
        name = "dense" if method.sparsity == 0.0 else "vote" if method.disentangled else "magnitude"
        if (name, seed) == self._stop:
            raise KeyboardInterrupt
        self.made.append((name, method.sparsity, seed))
        if (name, seed) in self._others:
            return self._others[name, seed]
        lost = LOSS.get(name, {"seg": 0.0, "depth": 0.0})
        shift = seed * method.sparsity / 100 if name == "vote" else 0.0
        return {
            "seg": {"miou": 0.5 * (1 - lost["seg"] * method.sparsity - shift)},
            "depth": {"rmse": 2.0 * (1 + lost["depth"] * method.sparsity)},
        }


def run(train, methods=NAMES, sparsities=(0.5, 0.75), seeds=3, **options):
    return study(train, methods, sparsities, seeds, progress=False, **options)


def test_the_numbers():
    train = Trainer()
    found = run(train)
    assert len(train.made) == len(set(train.made)) == 3 * (1 + 2 * 2)
    # Seeds outermost, so that what was stopped can be read.
    assert [seed for _, _, seed in train.made] == sorted(seed for _, _, seed in train.made)
    assert [(line.method, line.sparsity) for line in found.lines] == [
        ("vote", 0.5),
        ("magnitude", 0.5),
        ("vote", 0.75),
        ("magnitude", 0.75),
    ]
    vote, magnitude = found["vote", 0.5], found["magnitude", 0.5]
    assert vote.tasks["seg"] == pytest.approx((-5.0, -5.5, -6.0))
    assert vote.tasks["depth"] == pytest.approx((-10.0,) * 3)
    assert vote.means == pytest.approx((-7.5, -7.75, -8.0))
    assert vote.worsts == pytest.approx((-10.0,) * 3)
    assert magnitude.worsts == pytest.approx((-15.0,) * 3)
    assert vote.behind is vote.worst_behind is None
    assert magnitude.behind.values == pytest.approx((0.0, 0.25, 0.5))
    assert magnitude.worst_behind.values == pytest.approx((-5.0,) * 3)
    assert magnitude.behind.comparisons == 2  # at two sparsities
    assert not magnitude.behind.differs
    other = run(Trainer(), reference="magnitude")
    assert other["vote", 0.5].behind.values == pytest.approx((0.0, -0.25, -0.5))
    assert other["magnitude", 0.5].behind is None
    with pytest.raises(KeyError, match=r"has no \('lamp', 0\.5\)"):
        found["lamp", 0.5]


def test_it_prints_and_is_written(tmp_path):
    found = run(Trainer())
    row = (
        "50.0%  magnitude  -7.50 ± 0.00  +0.25 ± 0.62 (0.90)  -15.00 ± 0.00  -5.00 ± 0.00 (0.00) *"
    )
    assert " ".join(row.split()) in " ".join(str(found).split())
    assert "in brackets half of that which holds for all 2 together" in str(found)
    found.save(tmp_path / "new", picture=True)
    told = (tmp_path / "new" / "study.md").read_text()
    assert "| seg | miou | 0.5 |" in told
    assert "| 50.0% | vote | -7.75 ± 0.25 |  | -10.00 ± 0.00 |  | -5.50 | -10.00 |" in told
    assert (tmp_path / "new" / "study.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "new" / "study.json").read_text())
    assert data == json.loads(json.dumps(found.to_dict()))
    line = data["lines"][1]
    assert line["means"] == list(found["magnitude", 0.5].means)
    assert line["results"][2]["depth"]["rmse"] == 2.0
    assert line["behind"]["among"] == pytest.approx(found["magnitude", 0.5].behind.among)
    assert "one seed nothing is known of chance" in str(run(Trainer(), seeds=1))


def test_a_picture_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*pip install 'mtprune\[plots\]'"):
        run(Trainer(), seeds=1).figure()


def test_what_was_stopped_goes_on(tmp_path):
    stopped = Trainer(stop=("vote", 1))
    with pytest.raises(KeyboardInterrupt):
        run(stopped, folder=tmp_path)
    again = Trainer()
    found = run(again, folder=tmp_path)
    assert not set(stopped.made) & set(again.made)
    assert found == run(Trainer())
    more = Trainer()
    wider = run(more, {**NAMES, "lamp": recipes.lamp}, (0.5, 0.75, 0.9), [2, 0], folder=tmp_path)
    assert {seed for _, _, seed in more.made} == {0, 2}
    assert len(more.made) == 2 * (2 + 3)  # both at 0.9, and lamp, which looks like magnitude
    assert wider["vote", 0.5].means == tuple(reversed(found["vote", 0.5].means[::2]))
    nothing = Trainer()
    assert run(nothing, folder=tmp_path) == found
    assert nothing.made == []


def test_a_folder_of_another_method_is_refused(tmp_path):
    run(Trainer(), folder=tmp_path, seeds=1)
    joint = {"vote": lambda s: replace(METHODS["vote"](s, 100), disentangled=False)}
    with pytest.raises(
        ValueError, match=r"vote-0\.5-seed0\.json' holds a run of another method: V"
    ):
        run(Trainer(), joint, folder=tmp_path)
    path = tmp_path / "runs" / "vote-0.5-seed0.json"
    path.write_text(path.read_text().replace('"seed": 0', '"sed": 0'))
    with pytest.raises(ValueError, match=r"must have \['seed'\] besides .*Remove it, and the run"):
        run(Trainer(), folder=tmp_path)


def test_results_that_are_not_finite_stay_in_the_table(tmp_path):
    bad = {("vote", 1): {"seg": {"miou": math.nan}, "depth": {"rmse": 1.0}}}
    for _ in range(2):  # the second time from the folder
        found = run(Trainer(others=bad), folder=tmp_path)
        line = found["vote", 0.5]
        assert [math.isnan(value) for value in line.means] == [False, True, False]
        assert [math.isnan(value) for value in line.worsts] == [False, True, False]
        assert "nan: with some seed a result was not a finite number." in str(found)
        assert (
            json.loads(json.dumps(found.to_dict(), allow_nan=False))["lines"][0]["means"][1] is None
        )


def test_each_run_begins_with_its_seed_and_leaves_the_random_state(tmp_path):
    def train(method, seed):
        drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
        return {"seg": 0.5, "depth": 2.0}

    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[2], random.getstate()

    drawn = []
    before = state()
    run(train, seeds=2, sparsities=[0.5], lower_is_better=False)
    assert state() == before
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3] == drawn[4] == drawn[5]


@pytest.mark.slow
def test_with_a_trainer_that_trains():
    """Two tasks with one hidden layer: the vote and random pruning, trained for real."""

    def train(method, seed):
        model = nn.ModuleDict({"t": nn.Linear(6, 16), "a": nn.Linear(16, 1), "b": nn.Linear(16, 1)})
        x = torch.randn(128, 6)
        targets = {"a": x[:, :1] - x[:, 1:2], "b": x[:, 2:3] * 2}
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        pruner = mtprune.MultitaskPruner(
            model, ["a", "b"], "t", method=method, optimizer=optimizer, seed=seed
        )
        for _ in range(50):
            hidden = model["t"](x).relu()
            losses = {t: (model[t](hidden) - y).square().mean() for t, y in targets.items()}
            pruner.observe_losses(losses)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            pruner.step()
        pruner.finalize()
        assert pruner.sparsity == pytest.approx(method.sparsity, abs=0.01)
        return {t: 1 - float(loss.detach() / targets[t].var()) for t, loss in losses.items()}

    steps = partial(METHODS["vote"], steps=50)

    def at_random(s):
        return replace(steps(s), saliency=mtprune.saliency.random, disentangled=False)

    methods = {"vote": steps, "random": at_random}
    found = study(train, methods, [0.75], seeds=3, lower_is_better=False, progress=False)
    assert max(found["random", 0.75].behind.values) < -1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": 3}, "`train` must be a function"),
        ({"methods": {}}, "`methods` must be a mapping name -> function of sparsity"),
        ({"methods": {"vote": Vote(0.5)}}, r"`methods` 'vote' must be a function of sparsity"),
        (
            {"methods": {"vote": METHODS["vote"]}},
            r"one of METHODS, which want a number of steps too\. Take functools\.partial",
        ),
        ({"methods": {"dense": recipes.lamp}}, "`methods` names 'dense', which is trained anyway"),
        ({"methods": {"x": lambda s: s}}, "`method` must be a method such as"),
        ({"sparsities": []}, "`sparsities` must be different shares of zeros"),
        ({"sparsities": [0.5, 0.5]}, "`sparsities` must be different shares of zeros"),
        ({"sparsities": [50]}, r"`sparsities` must be in \[0, 1\)\. Got 50\. Did you mean 0\.5"),
        ({"seeds": 0}, "`seeds` must be a whole number, at least 1"),
        ({"seeds": [1, 1]}, "`seeds` must be a number of seeds, or a list of different ones"),
        ({"seeds": "12"}, "`seeds` must be a number of seeds, or a list of different ones"),
        ({"reference": "lamp"}, r"`reference` must be one of \('vote', 'magnitude'\)"),
        ({"lower_is_better": {"seg": {"iou"}}}, "names what `results` does not hold"),
        ({"methods": {"a b": recipes.lamp, "A-B": recipes.lamp}}, "runs of 'a b' and of another"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_runs(change, message, tmp_path):
    train = Trainer()
    options = {"train": train, "folder": tmp_path, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        run(**options)
    assert len(train.made) <= 1


@pytest.mark.parametrize(
    ("which", "told", "message"),
    [
        (("dense", 0), [1.0], r"`train` must return a mapping task -> value"),
        (("dense", 0), {}, r"`train` must return a mapping task -> value"),
        (("dense", 0), {"seg": {"iou": 1.0}}, r"Is 'iou' of task 'seg' better when it is lower"),
        (("dense", 0), {"seg": {"miou": 0.0}}, r"'miou' of task 'seg' is 0 in the baseline"),
        (
            ("dense", 1),
            {"seg": {"miou": math.inf}, "depth": {"rmse": 1.0}},
            r"`train` returned inf for 'miou' of task 'seg', of the model that was not pruned, s",
        ),
        (("vote", 0), {"seg": {"miou": 1.0}}, r"must return a result for each task \['seg', 'dep"),
        (
            ("vote", 0),
            {"seg": {"loss": 1.0}, "depth": {"rmse": 1.0}},
            r"returned \['loss'\] for task 'seg' with 'vote' at 0\.5, seed 0, and \['miou'\]",
        ),
    ],
)
def test_results_that_cannot_be_are_refused(which, told, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run(Trainer(others={which: told}))


def test_it_runs_in_one_process(monkeypatch):
    monkeypatch.setattr("mtprune.distributed.world", lambda: 2)
    with pytest.raises(RuntimeError, match=r"study\(\) runs in one process, and there are 2"):
        run(Trainer())
