"""Which method to use: trials on copies, halved by what they keep of the dense model's results."""

import copy
import random
from dataclasses import replace
from itertools import pairwise
from math import inf, nan

import numpy as np
import pytest
import torch
from torch import nn

import mtprune
from mtprune import (
    Cubic,
    MultitaskPruner,
    OneShot,
    Regrow,
    Rounds,
    Vote,
    choosing,
    recipes,
    saliency,
)
from mtprune.choosing import choose, halving, usual

TASKS = ("a", "b")


class Rows(nn.Module):
    """A row of weights for each task."""

    def __init__(self, *rows):
        super().__init__()
        self.rows = nn.Linear(len(rows[0]), len(rows), bias=False)
        with torch.no_grad():
            self.rows.weight.copy_(torch.tensor(rows))

    def forward(self, x):
        return {task: self.rows(x)[:, i] for i, task in enumerate(TASKS[: len(self.rows.weight)])}


def squares(scales):
    """The squared error of each task against one more than what the weights say."""

    def loss(task, scale):
        return lambda out, batch: scale * (out[task] - batch[task] - 1).square().sum()

    return {task: loss(task, scale) for task, scale in zip(TASKS, scales, strict=True)}


def data_of(model, inputs):
    with torch.no_grad():
        return {"x": inputs, **model(inputs)}


def watch(model, pruner, steps, batch=None):
    """A loop that trains nothing."""
    for _ in range(steps):
        if batch is not None:
            pruner.observe(model(batch["x"]), batch)
        pruner.step()


def setting(rows, inputs, judged=None, scales=(1.0, 1.0), **options):
    """All arguments for weights that stay as they are; a pruned one costs 100 w^2 points."""
    model = Rows(*rows)
    batch = data_of(model, inputs)
    truth = data_of(model, inputs if judged is None else judged)

    def evaluate(pruned):
        with torch.no_grad():
            found = pruned(truth["x"])
        return {t: {"loss": 1 + (found[t] - truth[t]).square().sum()} for t in found}

    losses = {task: loss for task, loss in squares(scales).items() if task in batch}
    return {
        "model": model,
        "task_losses": losses,
        "batches": [batch],
        "shared_modules": "auto",
        "sparsity": 0.5,
        "steps": 8,
        "train": lambda model, pruner, steps: watch(model, pruner, steps, batch),
        "evaluate": evaluate,
        "forward": lambda model, batch: model(batch["x"]),
        "progress": False,
    } | options


VOTE = Vote(0.5)
JOINT = Vote(0.5, disentangled=False)
SIZE = Vote(0.5, saliency=saliency.magnitude, disentangled=False)


# What is chosen.


def test_the_method_that_sees_what_is_used_wins(backend):
    """The largest weights read an input that is always 0."""
    rows = [[1.0, 2.0, 0.5, 9.0], [1.0, 2.0, 0.5, 9.0]]
    unused = setting(rows, torch.eye(4)[:3], candidates={"size": SIZE, "joint": JOINT})
    choice = choose(**unused, backend=backend)
    assert (choice.name, choice.method, choice.in_loop) == ("joint", JOINT, False)
    told = [(t.name, t.round, t.steps, t.mean, t.tasks, t.error) for t in choice.trials]
    assert told == [
        ("size", 1, 8, -125.0, {"a": -125.0, "b": -125.0}, ""),
        ("joint", 1, 8, -25.0, {"a": -25.0, "b": -25.0}, ""),
    ]
    assert choice.given.mean == 0.0


def test_size_wins_where_batches_show_only_a_part_of_what_is_used(backend):
    rows = [[0.1, 0.2, 3.0, 3.0], [0.1, 0.2, 3.0, 3.0]]
    candidates = {"joint": JOINT, "size": SIZE}
    partly = setting(rows, torch.eye(4)[:2], judged=torch.eye(4), candidates=candidates)
    choice = choose(**partly, backend=backend)
    assert choice.name == "size"
    assert [t.mean for t in choice.trials] == pytest.approx([-1800.0, -5.0], abs=0.01)


def test_the_vote_wins_where_one_loss_is_a_thousand_times_larger(backend):
    rows = [[2.0, 2.0, 1.0, 1.0], [2.0, 2.0, 1.0, 1.0]]
    candidates = {"joint": JOINT, "vote": VOTE}
    scaled = setting(rows, torch.eye(4), scales=(1.0, 1000.0), candidates=candidates)
    choice = choose(**scaled, backend=backend)
    joint, vote = choice.trials
    assert choice.name == "vote"
    assert (joint.mean, joint.worst_task, joint.worst) == (-500.0, "a", -1000.0)
    assert (vote.mean, vote.worst) == (-200.0, -200.0)


def test_one_task_is_enough():
    one = setting([[1.0, 2.0, 0.5, 9.0]], torch.eye(4)[:3])
    choice = choose(**one, candidates={"size": SIZE, "joint": JOINT})
    assert choice.name == "joint"
    assert choice.trials[1].tasks == {"a": -25.0}


def test_one_candidate_is_measured_and_taken():
    choice = choose(**setting([[1.0, 2.0]] * 2, torch.eye(2), candidates={"size": SIZE}))
    assert choice.name == "size"
    assert [t.mean for t in choice.trials] == [-100.0]
    assert choice.why == "size is the only one that came so far."


def test_the_table_tells_why():
    rows = [[1.0, 2.0, 0.5, 9.0], [1.0, 2.0, 0.5, 9.0]]
    unused = setting(rows, torch.eye(4)[:3])
    candidates = {"size": SIZE, "less": Vote(0.25), "joint": JOINT}
    choice = choose(**unused, candidates=candidates, trials=100)
    assert str(choice) == (
        "candidate             steps     mean    worst  task\n"
        "joint                     8   -25.00   -25.00     a\n"
        "size                      8  -125.00  -125.00     a\n"
        "not pruned, as given      0    +0.00    +0.00     a\n"
        "less: out. It keeps 75.0% of the weights after 4 steps, where 50.0% are due. If its "
        "schedule spans the run, name a function of steps -> method.\n"
        "Change in percent against the model after 8 steps without pruning.\n"
        "joint is chosen: it is ahead of size by 100.00 points in one trial each. With seeds=3 you "
        "would see how much of that is chance.\n"
        "Vote(sparsity=0.5, disentangled=False): prune(batches), then train."
    )


# How the field is halved.


@pytest.mark.parametrize(
    ("candidates", "trials", "steps", "seeds", "plan"),
    [
        (1, 20, 100, 1, [(1, 10)]),
        (2, 20, 100, 1, [(2, 6)]),
        (3, 28, 4, 1, [(3, 2), (2, 4)]),
        (3, 90, 100, 1, [(3, 6), (2, 24)]),
        (8, 28, 100, 1, [(8, 1), (4, 2), (2, 4)]),
        (8, 72, 100, 1, [(8, 1), (4, 4), (2, 16)]),
        (8, 720, 100, 1, [(8, 25), (4, 50), (2, 100)]),
        (8, 600, 100, 1, [(8, 11), (4, 33), (2, 100)]),
        (8, 500, 100, 1, [(8, 6), (4, 25), (2, 100)]),
        (8, 216, 100, 1, [(8, 3), (4, 12), (2, 48)]),
        (8, 648, 100, 3, [(8, 3), (4, 12), (2, 48)]),
        (5, 10_000, 100, 1, [(5, 25), (3, 50), (2, 100)]),
    ],
)
def test_each_round_halves_the_field_and_the_last_is_as_long_as_can_be(
    candidates, trials, steps, seeds, plan
):
    assert halving(candidates, trials, steps, seeds) == plan


def test_trials_are_never_more_than_allowed_nor_longer_than_the_run():
    for candidates in range(1, 20):
        for steps in (20, 50, 1000):
            for trials in (250, 333, 1000):
                plan = halving(candidates, trials, steps)
                assert sum(n * length for n, length in plan) + plan[-1][1] <= trials
                assert plan[-1][1] <= steps
                assert plan[0][0] == candidates
                assert plan[0][1] >= 1
                assert plan[-1][0] == min(2, candidates)
                assert all(2 * a[1] <= b[1] for a, b in pairwise(plan))
                assert all(b[0] == (a[0] + 1) // 2 for a, b in pairwise(plan))


def ranked(count):
    """Candidates that are the worse the later they come: they keep the first weights, and so on."""

    def keep(first):
        def saliency(weight, grad=None):
            order = torch.arange(weight.numel()).reshape(weight.shape)
            return (order == first).float()

        return saliency

    return {
        f"keeps {i}": Vote(0.9, saliency=keep(i), disentangled=False, allocation="global")
        for i in range(count)
    }


def recorded(options, seeds=1):
    """The trials that are made: the steps of each, and what the random state gives."""
    calls = []

    def train(model, pruner, steps):
        calls.append((steps, float(torch.rand(1)), np.random.rand(), random.random()))
        watch(model, pruner, steps)

    choice = choose(**options | {"train": train, "seeds": seeds})
    return choice, calls


LADDER = [[float(10 - i) for i in range(10)]]


def test_the_better_half_goes_on_and_nothing_else_is_trained():
    ladder = setting(LADDER, torch.eye(10), sparsity=0.9, steps=16, trials=72)
    candidates = dict(reversed(ranked(8).items()))
    choice, calls = recorded(ladder | {"candidates": candidates})
    assert choice.name == "keeps 0"
    rounds = [[t.name for t in choice.trials if t.round == i] for i in (1, 2, 3)]
    assert [len(names) for names in rounds] == [8, 4, 2]
    assert set(rounds[1]) == {f"keeps {i}" for i in range(4)}
    assert set(rounds[2]) == {"keeps 0", "keeps 1"}
    assert [steps for steps, *_ in calls] == [16] + [1] * 8 + [4] * 4 + [16] * 2
    assert sum(steps for steps, *_ in calls) == 72
    assert [t.steps for t in choice.trials] == [1] * 8 + [4] * 4 + [16] * 2


def test_without_steps_the_trials_say_how_long_the_run_is():
    ladder = setting(LADDER, torch.eye(10), sparsity=0.9, trials=96)
    del ladder["steps"]
    candidates = dict(reversed(ranked(8).items()))
    _, calls = recorded(ladder | {"candidates": candidates})
    assert calls[0][0] == 16
    _, calls = recorded({**ladder, "candidates": ranked(1), "trials": None})
    assert [steps for steps, *_ in calls] == [100, 100]


def went_on(before, loop, **options):
    """Who is in which round, of the best `before` training and the worst in the `loop`."""
    names = ranked(before + loop)
    for i in range(before, before + loop):
        names[f"keeps {i}"] = replace(names[f"keeps {i}"], schedule=OneShot(1))
    batch = data_of(Rows(*LADDER), torch.eye(10))
    ladder = setting(LADDER, torch.eye(10), sparsity=0.9, candidates=names)
    ladder["train"] = lambda model, pruner, steps: watch(model, pruner, steps, batch)
    choice = choose(**ladder | options)
    last = max(trial.round for trial in choice.trials)
    rounds = [[t for t in choice.trials if t.round == i] for i in range(1, last + 1)]
    return [[int(t.name.split()[1]) for t in tried] for tried in rounds]


def test_short_trials_do_not_drop_all_methods_of_one_kind():
    """Methods in the loop are given too little time in short trials, so they compete apart."""
    assert went_on(4, 4, trials=100) == [[*range(8)], [0, 1, 4, 5], [0, 4]]
    assert went_on(5, 1, trials=100) == [[*range(6)], [0, 1, 5], [0, 5]]
    assert went_on(1, 5, trials=100) == [[*range(6)], [0, 1, 2], [0, 1]]
    assert went_on(3, 0, trials=100) == [[*range(3)], [0, 1]]
    assert went_on(0, 5, trials=100) == [[*range(5)], [0, 1, 2], [0, 1]]


def test_all_trials_start_from_the_same_random_state():
    ladder = setting(LADDER, torch.eye(10), sparsity=0.9, candidates=ranked(3))
    _, calls = recorded(ladder)
    assert len(calls) == 1 + 3 + 2
    assert len({call[1:] for call in calls}) == 1
    _, calls = recorded(ladder | {"trials": 100}, seeds=2)
    assert len(calls) == 2 * (1 + 3 + 2)
    assert len({call[1:] for call in calls}) == 2


# What trials are made of.


class Noisy(nn.Module):
    """A net with all that training changes besides weights."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})

    def forward(self, x):
        hidden = self.trunk(x)
        return {task: head(hidden)[:, 0] for task, head in self.heads.items()}


def real(**options):
    """All arguments for a net that is trained in earnest."""
    torch.manual_seed(0)
    model = Noisy().eval()
    x = torch.randn(256, 4)
    data = {"x": x, "a": x[:, 0] * x[:, 1], "b": x[:, 2].abs()}

    def loss(task):
        return lambda out, batch: (out[task] - batch[task]).square().mean()

    losses = {task: loss(task) for task in TASKS}

    def train(model, pruner, steps):
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(steps):
            rows = torch.randint(256, (32,))
            batch = {name: values[rows] for name, values in data.items()}
            optimizer.zero_grad()
            pruner.weigh(pruner.observe(model(batch["x"]), batch)).backward()
            optimizer.step()
            pruner.step()

    @torch.no_grad()
    def evaluate(model):
        model.eval()
        out = model(data["x"])
        return {task: loss(out, data) for task, loss in losses.items()}

    return {
        "model": model,
        "task_losses": losses,
        "batches": [{name: values[i : i + 32] for name, values in data.items()} for i in range(8)],
        "shared_modules": [model.trunk],
        "sparsity": 0.6,
        "steps": 8,
        "candidates": {
            "rounds": recipes.best(0.6),
            "gradual": lambda steps: recipes.best(0.6, steps),
            "random": recipes.random(0.6),
        },
        "train": train,
        "evaluate": evaluate,
        "lower_is_better": True,
        "forward": lambda model, batch: model(batch["x"]),
        "progress": False,
    } | options


def test_model_and_random_state_are_as_before(backend):
    options = real()
    model = options["model"]
    before = copy.deepcopy(model)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    failing = {"candidates": {"late": Vote(0.6, schedule=Cubic(5, 50, 5))}}
    choose(**options, backend=backend)
    with pytest.raises(RuntimeError, match="All candidates are out"):
        choose(**options | failing, backend=backend)
    for (name, now), then in zip(
        model.state_dict().items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(now, then), name
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


def test_the_same_is_chosen_again_for_the_same_reasons(backend):
    first = choose(**real(), backend=backend)
    torch.rand(7)
    second = choose(**real(), backend=backend)
    assert first == second
    assert str(first) == str(second)


def test_both_backends_come_to_the_same_choice():
    one, other = (choose(**real(), backend=backend) for backend in ("prune", "inplace"))
    assert one.name == other.name
    assert [t.mean for t in one.trials] == pytest.approx([t.mean for t in other.trials], abs=0.01)


def test_what_is_named_by_the_model_s_modules_is_found_in_the_copies():
    options = real()
    seen = []

    def train(model, pruner, steps):
        seen.append(set(pruner.masks))
        assert model is not options["model"]
        options["train"](model, pruner, steps)
        report = pruner.report()
        seen.append({row.name: row.tasks for row in report.components})

    one = {"candidates": {"vote": Vote(0.6)}, "exclude": [options["model"].heads["b"]]}
    choose(**options | one | {"train": train})
    assert seen[-2] == {"trunk.0.weight", "heads.a.weight"}
    assert seen[-1]["shared"] == ("a", "b")


def test_methods_that_prune_at_once_do_so_before_training_and_others_in_the_loop():
    options = real()
    seen = []

    def train(model, pruner, steps):
        seen.append([round(pruner.sparsity, 1)])
        options["train"](model, pruner, steps)
        seen[-1].append(round(pruner.sparsity, 1))

    candidates = {
        "rounds": Vote(0.6, schedule=Rounds(2)),
        "at once": Vote(0.6, schedule=OneShot()),
        "gradual": lambda steps: Vote(0.6, schedule=Cubic(1, steps, 1)),
        "later": Vote(0.6, schedule=OneShot(1)),
    }
    choice = choose(**options | {"train": train, "candidates": candidates})
    assert seen[:5] == [[0.0, 0.0], [0.6, 0.6], [0.6, 0.6], [0.0, 0.6], [0.0, 0.6]]
    made = {name: c(8) if callable(c) else c for name, c in candidates.items()}
    loops = {name: replace(choice, method=method).in_loop for name, method in made.items()}
    assert loops == {"rounds": False, "at once": False, "gradual": True, "later": True}


def test_a_function_is_asked_for_each_trial_and_for_the_run_to_come():
    asked = []

    def gradual(steps):
        asked.append(steps)
        return Vote(0.6, schedule=Cubic(1, steps, 1))

    choice = choose(**real(candidates={"gradual": gradual}, trials=8))
    assert asked == [4, 8]  # in the trial, and for the run
    assert choice.method == Vote(0.6, schedule=Cubic(1, 8, 1))


def test_the_usual_candidates_are_those_that_win_somewhere():
    found = usual(0.9)
    made = {name: c if isinstance(c, Vote) else c(100) for name, c in found.items()}
    assert made["trained here, rounds"] == recipes.best(0.9)
    assert made["trained here, gradual"] == recipes.best(0.9, 100)
    assert made["trained elsewhere, rounds"] == recipes.best(0.9, trained="elsewhere")
    assert made["trained elsewhere, gradual"] == recipes.best(0.9, 100, trained="elsewhere")
    for way in ("rounds", "gradual"):
        theirs = made[f"trained elsewhere, {way}"]
        assert made[f"joint, {way}"] == replace(theirs, disentangled=False)
    gradual = replace(made["joint, gradual"], saliency=saliency.magnitude)
    assert made["magnitude, gradual"] == gradual
    assert made["magnitude, at once"] == replace(gradual, schedule=OneShot())
    assert {method.sparsity for method in made.values()} == {0.9}
    with pytest.raises(ValueError, match=r"Got 90\. Did you mean 0\.9\?"):
        usual(90)


def method_of(trial, sparsity):
    candidate = usual(sparsity)[trial.name]
    return candidate if isinstance(candidate, Vote) else candidate(trial.steps)


def test_the_usual_candidates_are_tried_unless_others_are_given():
    choice = choose(**real(candidates=None, trials=28))
    assert [t.name for t in choice.trials if t.round == 1] == list(usual(0.6))
    assert [t.steps for t in choice.trials] == [1] * 8 + [2] * 4 + [4] * 2
    kinds = [
        [replace(choice, method=method_of(t, 0.6)).in_loop for t in choice.trials if t.round == i]
        for i in (1, 2, 3)
    ]
    assert [sorted(kind) for kind in kinds] == [[False] * n + [True] * n for n in (4, 2, 1)]
    assert not any(t.error for t in choice.trials)


def test_thresholds_can_be_tried_as_well():
    thresholds = {"thresholds": lambda steps: recipes.best(0.6, steps, trained=False)}
    choice = choose(**real(candidates=thresholds))
    assert choice.method == recipes.best(0.6, 8, trained=False)
    assert choice.in_loop


# What `evaluate` says, and what is noise.


def told(results, seeds=1, **options):
    """Candidates of whose results only the changes are given: ``{name: {seed: {task: change}}}``.

    `evaluate` knows them by the weight that they keep.
    """
    names = list(results)

    def evaluate(model):
        kept = model.rows.weight.detach().flatten().nonzero().flatten().tolist()
        changes = {"a": 0.0, "b": 0.0}
        if len(kept) == 1:
            changes = results[names[kept[0]]][torch.initial_seed()]
        return {task: 1 + change / 100 for task, change in changes.items()}

    rows = [[1.0] * 5, [1.0] * 5]
    candidates = dict(zip(names, ranked(len(names)).values(), strict=True))
    given = {"evaluate": evaluate, "candidates": candidates, "seeds": seeds}
    return choose(**setting(rows, torch.eye(5), sparsity=0.9, trials=100) | given | options)


def both(a, b):
    return {"a": a, "b": b}


def test_within_one_standard_error_the_worst_task_decides():
    choice = told(
        {
            "wild": {0: both(2, -6), 1: both(-2, -6), 2: both(6, -6)},
            "even": {0: both(-2, -2), 1: both(-3, -3), 2: both(-2, -2)},
        },
        seeds=3,
        lower_is_better=False,
    )
    wild, even = choice.trials
    assert wild.means == pytest.approx((-2.0, -4.0, 0.0))
    assert (wild.mean, even.mean) == pytest.approx((-2.0, -7 / 3))
    assert choice.name == "even"
    assert choice.why == (
        "even is chosen by its worst task: wild and even are apart by only 0.33 points, with a "
        "standard error of 0.88 over 3 seeds, and the worst task of even loses 3.67 points less."
    )


def test_beyond_it_the_mean_decides():
    choice = told(
        {
            "wild": {0: both(6, -6), 1: both(6, -6), 2: both(6.1, -6)},
            "even": {0: both(-1, -1), 1: both(-1, -1), 2: both(-1, -1)},
        },
        seeds=3,
        lower_is_better=False,
    )
    assert choice.name == "wild"
    assert choice.why == (
        "wild is chosen: it is ahead of even by 1.02 points, with a standard error of 0.02 over 3 "
        "seeds."
    )


def test_with_one_seed_the_mean_decides_and_equals_by_their_worst_task():
    near = {"wild": {0: both(6, -6)}, "even": {0: both(-0.1, -0.1)}}
    assert told(near, lower_is_better=False).name == "wild"
    equal = {"wild": {0: both(50, -50)}, "even": {0: both(0, 0)}}
    choice = told(equal, lower_is_better=False)
    assert choice.name == "even"
    assert choice.why == (
        "even is chosen by its worst task: even and wild are apart by only 0.00 points in one "
        "trial each, and the worst task of even loses 50.00 points less."
    )


def test_lower_is_better_turns_the_choice_round():
    results = {"low": {0: both(-10, -10)}, "high": {0: both(10, 10)}}
    assert told(results, lower_is_better=False).name == "high"
    assert told(results, lower_is_better=True).name == "low"


def named(metric):
    """Results with a name: the candidate called "low" has the lower value."""

    def evaluate(model):
        low = model.rows.weight.flatten()[0] != 0 and model.rows.weight.count_nonzero() == 1
        return {task: {metric: np.float64(0.5 if low else 1.0)} for task in TASKS}

    results = {"low": {0: both(0, 0)}, "high": {0: both(0, 0)}}
    return lambda **options: told(results, evaluate=evaluate, **options).name


def test_metrics_with_a_known_name_need_no_word():
    assert named("loss")() == "low"
    assert named("rmse")() == "low"
    assert named("accuracy")() == "high"
    assert named("within_11.25")() == "high"
    assert named("mae")(lower_is_better={"a": {"mae"}, "b": ["mae"]}) == "low"
    assert named("mae")(lower_is_better={}) == "high"
    assert named("loss")(lower_is_better=False) == "high"


def test_directions_are_never_guessed():
    with pytest.raises(
        ValueError, match=r"Is 'mae' of task 'a' better when it is lower\? Say it by"
    ):
        named("mae")()
    results = {"one": {0: both(0, 0)}, "other": {0: both(0, 0)}}
    with pytest.raises(
        ValueError, match=r"Is task 'a' better when it is lower\? Say it by `lower_"
    ):
        told(results)
    with pytest.raises(ValueError, match=r"`lower_is_better` names what `results` does not hold"):
        named("mae")(lower_is_better={"c": {"mae"}})
    with pytest.raises(TypeError, match=r"`lower_is_better` must be a mapping task -> metrics, Tr"):
        named("mae")(lower_is_better="mae")


# Candidates that fail.


def test_a_candidate_that_fails_is_out_and_says_why():
    def strange(steps):
        raise KeyError("no such thing")

    def infinite(weight, grad=None):
        return weight / 0

    candidates = {
        "size": SIZE,
        "strange": strange,
        "no method": lambda steps: 0.5,
        "regrown": Vote(0.5, schedule=Regrow(2, 8)),
        "infinite": Vote(0.5, saliency=infinite),
        "late": Vote(0.5, schedule=Cubic(10, 1000, 10)),
        "less": Vote(0.25),
        "joint": JOINT,
    }
    unused = setting([[1.0, 2.0, 0.5, 9.0]] * 2, torch.eye(4)[:3], candidates=candidates)
    choice = choose(**unused, trials=100)
    assert choice.name == "joint"
    errors = {trial.name: trial.error for trial in choice.trials if trial.error}
    assert set(errors) == set(candidates) - {"size", "joint"}
    assert errors["strange"] == "KeyError: 'no such thing'"
    assert errors["no method"].startswith("TypeError: `method` must be a method such as Vote(")
    assert errors["infinite"].startswith("RuntimeError: ")
    assert errors["less"] == (
        "It keeps 75.0% of the weights after 2 steps, where 50.0% are due. If its schedule spans "
        "the run, name a function of steps -> method."
    )
    assert [t.name for t in choice.trials if t.round > 1] == ["joint", "size"] * 2
    out = next(t for t in choice.trials if t.error)
    assert (out.worst_task, np.isnan(out.worst), np.isnan(out.mean)) == ("", True, True)
    assert "strange: out. KeyError: 'no such thing'" in str(choice)


def test_a_result_that_is_not_finite_puts_the_candidate_out():
    for bad in (nan, inf):
        results = {"bad": {0: both(0, bad)}, "good": {0: both(-9, -9)}}
        choice = told(results, lower_is_better=False)
        assert choice.name == "good"
        assert choice.trials[0].error == f"`evaluate` returned {bad} for task 'b'."
        assert choice.why == "good is the only one that came so far."


def test_an_evaluate_that_fails_on_it_puts_the_candidate_out():
    options = setting([[1.0, 2.0, 0.5, 9.0]] * 2, torch.eye(4)[:3])
    plain = options["evaluate"]

    def evaluate(model):
        if model.rows.weight[0, 3] == 0:
            raise ValueError(f"Predictions are NaN{200 * '!'}\nin all rows.")
        return plain(model)

    candidates = {"joint": JOINT, "size": SIZE}
    choice = choose(**options | {"evaluate": evaluate, "candidates": candidates})
    assert choice.name == "size"
    assert choice.trials[0].error.endswith("!\nin all rows.")
    out = next(line for line in str(choice).split("\n") if ": out." in line)
    assert out == f"joint: out. ValueError: Predictions are NaN{126 * '!'}..."


def test_if_all_are_out_each_says_why():
    late = {"late": Vote(0.5, schedule=Cubic(10, 1000, 10)), "less": Vote(0.25)}
    with pytest.raises(
        RuntimeError, match=r"All candidates are out:\nlate: It keeps 100.*\nless: It"
    ):
        choose(**setting([[1.0, 2.0, 0.5, 9.0]] * 2, torch.eye(4), candidates=late))


def test_an_interrupt_passes():
    options = real()

    def train(model, pruner, steps):
        if pruner.sparsity:
            raise KeyboardInterrupt
        options["train"](model, pruner, steps)

    with pytest.raises(KeyboardInterrupt):
        choose(**options | {"train": train})


# Mistakes.


def stops_early(model, pruner, steps):
    watch(model, pruner, steps - 1)


def never_steps(model, pruner, steps):
    pass


WRONG = [
    ({"sparsity": 95}, ValueError, r"`sparsity` must be in \[0, 1\)\. Got 95\. Did you mean 0\.95"),
    ({"steps": 0}, ValueError, r"`steps` must be a whole number, at least 1\. Got 0"),
    ({"steps": 2.5}, ValueError, r"`steps` must be a whole number, at least 1\. Got 2\.5"),
    ({"trials": 1.5}, ValueError, r"`trials` must be a whole number, at least 1\. Got 1\.5"),
    ({"seeds": 0}, ValueError, r"`seeds` must be a whole number, at least 1\. Got 0"),
    (
        {"trials": 27},
        ValueError,
        r"For 8 candidates and 1 seed `trials` must be at least 28 and `steps` at least 4: they "
        r"meet in 3 rounds, each at least twice as long as the one before\. Got 27 and 8\.",
    ),
    (
        {"trials": 83, "seeds": 3},
        ValueError,
        r"8 candidates and 3 seeds `trials` must be at least 84",
    ),
    ({"steps": 3, "trials": 100}, ValueError, r"and `steps` at least 4.*Got 100 and 3\."),
    ({"train": None}, TypeError, r"`train` must be a function\. Got None"),
    ({"evaluate": 3}, TypeError, r"`evaluate` must be a function\. Got 3"),
    ({"batches": iter([])}, TypeError, r"`batches` is an iterator, which the first trial would"),
    ({"batches": 3}, TypeError, r"`batches` must be a list or a loader\. Got 3"),
    ({"candidates": {}}, ValueError, r"`candidates` must be a mapping name -> method or function"),
    ({"candidates": [SIZE]}, ValueError, r"`candidates` must be a mapping name -> method or fu"),
    (
        {"candidates": {"v": Vote}},
        TypeError,
        r"`candidates` 'v' must be a method, or a function of steps -> method\. Got <class",
    ),
    ({"candidates": {"v": 0.9}}, TypeError, r"`candidates` 'v' must be a method, or a function"),
    (
        {"optimizer": None},
        TypeError,
        r"`optimizer` is not an argument of choose\(\): it comes from",
    ),
    ({"method": SIZE}, TypeError, r"`method` is not an argument of choose\(\): it comes from `can"),
    ({"seed": 3}, TypeError, r"`seed` is not an argument of choose\(\): it comes from `seeds`"),
    ({"task_losses": {}}, ValueError, r"`task_losses` is empty"),
    ({"model": 3}, TypeError, r"`model` must be a torch\.nn\.Module\. Got 3"),
    (
        {"train": never_steps},
        RuntimeError,
        r"`train` called pruner\.step\(\) 0 times, and should have made 8 optimizer steps",
    ),
    (
        {"train": stops_early},
        RuntimeError,
        r"`train` called pruner\.step\(\) 7 times, and should have made 8 optimizer steps",
    ),
    (
        {"evaluate": lambda model: {"a": 1.0}},
        ValueError,
        r"`evaluate` must return a result for each task \['a', 'b'\], and no others\. Got \['a'\]",
    ),
    (
        {"evaluate": lambda model: {"a": 1.0, "b": 1.0, "c": 1.0}},
        ValueError,
        r"`evaluate` must return a result for each task \['a', 'b'\], and no others",
    ),
    (
        {"evaluate": lambda model: 0.5},
        TypeError,
        r"`evaluate` must return a mapping task -> value or task -> \{metric: value\}\. Got 0\.5",
    ),
    (
        {"evaluate": lambda model: {"a": 1.0, "b": "good"}},
        TypeError,
        r"`evaluate` for 'b' must return a mapping task -> value or .* Got 'good'",
    ),
    (
        {"evaluate": lambda model: {"a": {"loss": nan}, "b": {"loss": 1.0}}},
        ValueError,
        r"`evaluate` returned nan for 'loss' of task 'a', of the model as it was given\. Nothing",
    ),
    (
        {"evaluate": lambda model: {"a": {"loss": 0.0}, "b": {"loss": 1.0}}},
        ValueError,
        r"'loss' of task 'a' is 0 in the baseline: no change is relative to 0",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG)
def test_mistakes_are_named_before_anything_is_tried(change, kind, message):
    options = setting([[1.0, 2.0, 0.5, 9.0]] * 2, torch.eye(4), trials=56) | change
    with pytest.raises(kind, match=message):
        choose(**options)


def test_a_model_that_training_breaks_is_named():
    options = setting([[1.0, 2.0]] * 2, torch.eye(2), candidates={"size": SIZE})

    def train(model, pruner, steps):
        watch(model, pruner, steps)
        with torch.no_grad():
            model.rows.weight.mul_(nan)

    with pytest.raises(
        ValueError, match=r"returned nan for 'loss' of task 'a', of the model train"
    ):
        choose(**options | {"train": train})


def test_results_that_change_their_form_are_refused():
    options = setting([[1.0, 2.0]] * 2, torch.eye(2), candidates={"size": SIZE})

    def evaluate(model):
        dense = model.rows.weight.all()
        return {task: {"loss": 1.0} if dense else {"rmse": 1.0} for task in TASKS}

    with pytest.raises(
        ValueError, match=r"`evaluate` returned \['rmse'\] for task 'a' .* \['loss'\]"
    ):
        choose(**options | {"evaluate": evaluate})


def test_a_train_that_stops_stepping_is_no_fault_of_the_candidate():
    options = real()

    def train(model, pruner, steps):
        options["train"](model, pruner, steps if not pruner.sparsity else steps - 1)

    with pytest.raises(RuntimeError, match=r"`train` called pruner\.step\(\) \d times, and should"):
        choose(**options | {"train": train})


def test_a_model_with_a_live_pruner_is_refused():
    options = real()
    pruner = MultitaskPruner(options["model"], list(TASKS))
    with pytest.raises(ValueError, match="This model already has a live pruner"):
        choose(**options)
    pruner.finalize()


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr("mtprune.distributed.world", lambda: 2)
    with pytest.raises(
        RuntimeError, match=r"choose\(\) makes its trials in one process, and there"
    ):
        choose(**real())


def test_loaders_are_not_begun_by_looking_at_them():
    begun, batches = [], real()["batches"]

    class Loader:
        def __iter__(self):
            begun.append(float(torch.rand(1)))
            return iter(2 * batches)

    with pytest.raises(RuntimeError, match="`train` called pruner"):
        choose(**real(batches=Loader(), train=never_steps))
    assert not begun
    choose(**real(batches=Loader(), progress=True))
    assert len(set(begun)) <= 2 < len(begun)


def test_a_model_that_cannot_be_copied_is_named():
    options = real()
    options["model"].held = options["model"].trunk[0].weight * 2
    with pytest.raises(TypeError, match="`model` cannot be copied, and trials are made on copies"):
        choose(**options)


def test_choose_is_imported_when_it_is_asked_for():
    assert mtprune.choose is choose
    assert mtprune.Choice is choosing.Choice
