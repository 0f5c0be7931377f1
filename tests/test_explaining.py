"""Explained shares: closed forms, tasks that cannot be learned, and what a vote makes of them."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import mtprune
from mtprune import MultitaskPruner, Vote, explained, priorities
from tests.ranks import on_ranks


class Given(nn.Module):
    """Puts out what the batch says."""

    def forward(self, batch):
        return batch["outputs"]


def squares(outputs, batch):
    return mse_loss(outputs, batch["target"])


def batch(outputs, target, kind=torch.float64):
    return {"outputs": torch.tensor(outputs, dtype=kind), "target": torch.tensor(target).to(kind)}


def test_every_sample_gets_the_mean_of_the_others():
    # Means of the others are 4, 3, 2: squared errors 9, 1, 16 against 0, 1, 1 of the outputs.
    given = batch([[1.0], [3.0], [5.0]], [[1.0], [4.0], [6.0]])
    assert explained(Given(), {"a": squares}, [given]) == {"a": pytest.approx(1 - (2 / 26))}


def test_batches_count_by_their_samples_and_one_of_one_sample_is_left_out():
    three = batch([[1.0], [3.0], [5.0]], [[1.0], [4.0], [6.0]])  # 2 and 26
    two = batch([[0.0], [2.0]], [[1.0], [2.0]])  # others 2 and 0: 1 and 5
    one = batch([[0.0]], [[9.0]])
    found = explained(Given(), {"a": squares}, iter([three, one, two]))
    assert found == {"a": pytest.approx(1 - (2 + 1) / (26 + 5))}


def test_a_given_loss_without_knowledge_is_taken():
    one = batch([[1.0]], [[3.0]])
    assert explained(Given(), {"a": squares}, [one, one], baselines={"a": 16}) == {"a": 0.75}
    worse = explained(Given(), {"a": squares}, [one], baselines={"a": 2.0})
    assert worse == {"a": -1.0}
    assert explained(Given(), {"a": squares}, [one], baselines={"a": 4.0}) == {"a": 0.0}
    # Then outputs may be anything.
    losses = {"a": lambda outputs, b: [torch.tensor(outputs.count("x")), 1.0]}
    found = explained(nn.Identity(), losses, ["xx", "x"], baselines={"a": 10.0})
    assert found == {"a": pytest.approx(1 - 2.5 / 10)}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_outputs_of_any_structure_and_kind(kind):
    inner = batch([[1.0], [3.0], [5.0]], [[1.0], [4.0], [6.0]], kind)
    outputs = {"all": (inner["outputs"], [torch.arange(3), "name"]), "loss": torch.tensor(7.0)}

    def loss(outputs, given):
        values, (numbers, name) = outputs["all"]
        assert (numbers.tolist(), name, float(outputs["loss"])) == ([0, 1, 2], "name", 7.0)
        assert values.dtype == kind
        return squares(values, given)

    given = {"outputs": outputs, "target": inner["target"]}
    assert explained(Given(), {"a": loss}, [given])["a"] == pytest.approx(1 - 2 / 26, rel=1e-2)


@pytest.mark.parametrize("loss", ["squares", "classes"])
@pytest.mark.parametrize("seed", range(3))
def test_outputs_without_a_word_about_their_samples_explain_nothing(loss, seed):
    torch.manual_seed(seed)
    losses = {
        "squares": lambda outputs, b: mse_loss(outputs, b["target"]),
        "classes": lambda outputs, b: cross_entropy(outputs, b["target"].softmax(1)),
    }
    given = {"outputs": 3 * torch.randn(4000, 4), "target": torch.randn(4000, 4)}
    assert explained(Given(), {"a": losses[loss]}, [given])["a"] < 0


class Three(nn.Module):
    """A trunk and a head for each of three tasks."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(10, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(0.1)
        )
        self.heads = nn.ModuleDict({task: nn.Linear(40, n) for task, n in SIZES.items()})

    def forward(self, batch):
        hidden = self.trunk(batch["x"])
        return {task: head(hidden) for task, head in self.heads.items()}


SIZES = {"classes": 3, "number": 1, "shuffled": 3}
LOSSES = {
    "classes": lambda outputs, b: cross_entropy(outputs["classes"], b["classes"]),
    "number": lambda outputs, b: mse_loss(outputs["number"], b["number"]),
    "shuffled": lambda outputs, b: cross_entropy(outputs["shuffled"], b["shuffled"]),
}


def draw(count):
    x = torch.randn(count, 10)
    first = x[:, :3].argmax(1)
    number = x[:, 2:4].sum(1, keepdim=True).tanh()
    return {"x": x, "classes": first, "number": number, "shuffled": first[torch.randperm(count)]}


@pytest.fixture(scope="module")
def trained():
    """A model that has learned two tasks, and by heart what it could of the third."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, known = Three(), draw(256)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(150):
            optimizer.zero_grad()
            outputs = model(known)
            sum(loss(outputs, known) for loss in LOSSES.values()).backward()
            optimizer.step()
        return model, known, [draw(200) for _ in range(4)]


def test_a_task_with_shuffled_labels_explains_nothing_and_has_no_say(trained):
    model, _, fresh = trained
    shares = explained(model, LOSSES, fresh)
    assert shares["classes"] > 0.5
    assert shares["number"] > 0.5
    assert shares["shuffled"] < 0.01
    assert priorities(shares) == {"classes": 1.0, "number": 1.0, "shuffled": 0.01}
    # The best constants say so as well.
    best = {"classes": math.log(3), "shuffled": math.log(3)}
    best["number"] = float(torch.cat([b["number"] for b in fresh]).var())
    against = explained(model, LOSSES, fresh, baselines=best)
    assert priorities(against) == priorities(shares)


def test_a_vote_listens_to_those_who_explain_something(trained):
    model, known, fresh = trained

    def kept(tasks, priority):
        torch.manual_seed(0)
        twin = Three()
        twin.load_state_dict(model.state_dict())
        method = Vote(0.8, allocation="uniform", priority=priority)
        losses = {task: LOSSES[task] for task in tasks}
        pruner = MultitaskPruner(twin.eval(), losses, twin.trunk, method=method)
        pruner.prune([known], progress=False)
        return pruner.masks["trunk.0.weight"]

    alone = kept(["classes", "number"], {})
    plain = kept(LOSSES, {})
    gated = kept(LOSSES, priorities(explained(model, LOSSES, fresh)))
    shared = [float((mask & alone).sum()) / float(mask.sum()) for mask in (plain, gated)]
    assert shared[1] > 0.95 > shared[0] + 0.1


def test_the_model_is_left_as_it_was(trained):
    model, _, fresh = trained
    model.train()
    model.trunk[3].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    first = explained(model, LOSSES, fresh)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(5)))
    assert explained(model, LOSSES, fresh) == first  # no dropout, no batch's own statistics
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.training, model.trunk[1].training, model.trunk[3].training) == (True, True, False)
    with pytest.raises(KeyError):
        explained(model, LOSSES, [{}])
    assert model.training


def test_a_forward_of_the_users_own(trained):
    model, _, fresh = trained
    pairs = [(b, "name") for b in fresh]
    losses = {task: lambda o, p, f=f: f(o, p[0]) for task, f in LOSSES.items()}
    found = explained(model, losses, pairs, forward=lambda model, pair: model(pair[0]))
    assert found == explained(model, LOSSES, fresh)


def on_a_rank(rank, world):
    """The shares of all batches, of which each rank has its own."""
    given = [
        batch([[1.0], [3.0], [5.0]], [[1.0], [4.0], [6.0]]),
        batch([[0.0], [2.0]], [[1.0], [2.0]]),
    ]
    return explained(Given(), {"a": squares}, given[rank::world])


@pytest.mark.slow
def test_ranks_agree_on_the_shares_of_all_batches(tmp_path):
    expected = {"a": 1 - (2 + 1) / (26 + 5)}
    assert on_ranks(__name__, "on_a_rank", tmp_path) == [pytest.approx(expected)] * 2


FINE = batch([[1.0], [3.0]], [[1.0], [4.0]])


@pytest.mark.parametrize(
    ("losses", "batches", "options", "message"),
    [
        ({}, [FINE], {}, "`task_losses` is empty"),
        ({"a": squares}, [], {}, "`batches` gave no batch of two samples or more"),
        (
            {"a": squares},
            [batch([[1.0]], [[1.0]])],
            {},
            "`batches` gave no batch of two samples or more",
        ),
        (
            {"a": squares},
            [FINE],
            {"baselines": {"b": 1.0}},
            r"`baselines` names \['b'\]\. Known here: \['a'\]",
        ),
        (
            {"a": squares},
            [FINE],
            {"baselines": {"a": 0.0}},
            r"losses of task 'a' add up to 1, and without knowledge to 0\. A share needs",
        ),
        (
            {"a": lambda outputs, b: -squares(outputs, b)},
            [FINE],
            {},
            r"losses of task 'a' add up to -1, and without knowledge to -13\. A share needs",
        ),
        (
            {"a": lambda outputs, b: squares(outputs, b) * math.nan},
            [FINE],
            {},
            r"losses of task 'a' add up to nan, and without knowledge to nan\.",
        ),
        (
            {"a": lambda outputs, b: torch.tensor(3.0)},
            [FINE],
            {},
            "loss of task 'a' is the same for any outputs. Compute it from what",
        ),
        (
            {"a": lambda outputs, b: 1.0, "b": lambda outputs, b: 1.0},
            [{"outputs": "words"}],
            {"baselines": {"a": 1.0}},
            r"no tensor of numbers with samples first, whose mean the tasks \['b'\] could be held",
        ),
    ],
)
def test_refuses(losses, batches, options, message):
    with pytest.raises(ValueError, match=message):
        explained(Given(), losses, batches, **options)


def test_refuses_what_is_no_number_and_names_without_a_function():
    with pytest.raises(TypeError, match="`baselines` of task 'a' must be a number"):
        explained(Given(), {"a": squares}, [FINE], baselines={"a": "x"})
    with pytest.raises(TypeError, match="`baselines` must be a mapping task -> loss"):
        explained(Given(), {"a": squares}, [FINE], baselines=3.0)
    with pytest.raises(RuntimeError, match="Task 'a' was declared without a loss function"):
        explained(Given(), ["a"], [FINE])


def test_priorities_rise_with_the_share_to_1():
    shares = {"a": -2.0, "b": 0.0, "c": 0.02, "d": 0.05, "e": 0.1, "f": 0.9}
    found = priorities(shares)
    assert found == pytest.approx({"a": 0.01, "b": 0.01, "c": 0.2, "d": 0.5, "e": 1.0, "f": 1.0})
    assert priorities(shares, full=0.9, least=0.5)["f"] == 1.0
    assert priorities(shares, full=0.9, least=0.5)["e"] == 0.5
    assert Vote(0.9, priority=found).priority == found


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: priorities({}), "`shares` must be a mapping task -> explained share"),
        (lambda: priorities({"a": 0.5}, full=0.0), r"`full` must be in \(0, 1\]"),
        (lambda: priorities({"a": 0.5}, least=0.0), r"`least` must be in \(0, 1\]"),
        (lambda: priorities({"a": 1.5}), r"`shares` of task 'a' must be in \(-inf, 1\]"),
        (lambda: priorities({"a": math.nan}), r"`shares` of task 'a' must be in \(-inf, 1\]"),
    ],
)
def test_priorities_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_both_are_of_the_package():
    assert {"explained", "priorities"} <= set(dir(mtprune))
