"""What counts, and the best ensemble that the same number buys."""

import itertools
import random
import re
from fractions import Fraction

import pytest
import torch
from torch import nn

from mtprune import MultitaskPruner, Vote, recipes
from mtprune.budget import RULES, Ensemble, Size, best_ensemble, count, equal_split
from tests.nets import Run, build, zeros


class Encoded(nn.Module):
    """Embeddings, an encoder layer, and two heads, one of them tied to the embeddings."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed = nn.Embedding(10, 8)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.a = nn.Linear(8, 3)
        self.b = nn.Linear(8, 10, bias=False)
        self.b.weight = self.embed.weight

    def forward(self, x):
        hidden = self.body(self.embed(x)).mean(1)
        return {"a": self.a(hidden), "b": self.b(hidden)}


LINEAR = 3 * 8 * 8 + 8 * 8 + 2 * 8 * 16
BODY = LINEAR + 3 * 8 + 8 + 16 + 8 + 4 * 8
TOTAL = BODY + 10 * 8 + 8 * 3 + 3


def test_each_rule_counts_what_it_says(device):
    model = Encoded().to(device)
    found = count(model, encoder=model.body)
    assert found.by_rule == {
        "encoder_linear": (LINEAR, LINEAR),
        "encoder": (BODY, BODY),
        "total": (TOTAL, TOTAL),
    }
    assert sum(p.numel() for p in model.parameters()) == TOTAL
    for rule in RULES:
        found = count(model, rule, encoder="body")
        assert (found.what, found.dense, found.kept) == (rule, *found.by_rule[rule])
    assert count(model, "total") == Size("total", TOTAL, TOTAL, {"total": (TOTAL, TOTAL)})


@pytest.mark.parametrize("stage", ["one-shot", "may open", "final"])
def test_what_is_pruned_is_not_kept(stage, backend, device):
    model = Encoded().to(device)
    method = Vote(0.5) if stage == "one-shot" else recipes.movement(0.5, 8, cooldown=0.5)
    losses = {t: (lambda out, x, t=t: out[t].square().mean()) for t in ("a", "b")}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = MultitaskPruner(
        model, losses, "body", method=method, backend=backend, optimizer=optimizer, exclude="b"
    )
    x = torch.arange(10, device=device).view(2, 5)
    for _ in range({"one-shot": 1, "may open": 6, "final": 8}[stage]):
        optimizer.zero_grad()
        sum(pruner.observe(model(x), x).values()).backward()
        optimizer.step()
        pruner.step()
    masks = pruner.masks
    lost = zeros(masks)
    outside = int((~masks["a.weight"]).sum())
    expected = {
        "encoder_linear": (LINEAR, LINEAR - lost + outside),
        "encoder": (BODY, BODY - lost + outside),
        "total": (TOTAL, TOTAL - lost),
    }
    assert lost > 0
    assert count(model, encoder=model.body).by_rule == expected
    assert count(torch.compile(model, backend="eager"), encoder="body").by_rule == expected
    pruner.finalize()
    assert count(model, encoder=model.body).by_rule == expected


@pytest.mark.parametrize("name", ["plain", "tied", "lstm", "conv_bn", "transformer_encoder"])
def test_the_total_is_what_the_pruner_says(name, backend, device):
    run = Run(build(name, device), backend=backend).train(2)
    found = count(run.model, "total")
    assert found.dense == sum(p.numel() for p in run.model.parameters())
    assert found.dense - found.kept == zeros(run.pruner.masks)


def test_embeddings_count_as_pruned_if_they_are_included():
    model = Encoded()
    with torch.no_grad():
        model.embed.weight[:5].zero_()
    assert count(model, "total", include="embed").kept == TOTAL - 40


def test_zero_biases_are_kept():
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.bias)
    assert count(model, "encoder", encoder=model).kept == 15


def test_both_numbers_are_always_printed():
    text = str(Size("total", 2_000, 500))
    assert "2,000 dense" in text
    assert "500 kept" in text
    assert "25.00%" in text
    assert str(Size("total", 0, 0)).endswith("100.00%")
    lines = str(count(Encoded(), encoder="body")).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["*", "encoder_linear"],
        ["encoder", f"{BODY}"],
        ["total", f"{TOTAL}"],
    ]


def brute_force(curves, budget):
    """Every choice, the best first: by mean score, then size, then sizes in order of names."""
    order = sorted(curves)
    found = [
        (-sum(Fraction(curves[t][s]) for t, s in zip(order, sizes, strict=True)), sum(sizes), sizes)
        for sizes in itertools.product(*(curves[task] for task in order))
        if sum(sizes) <= budget
    ]
    return dict(zip(order, min(found)[2], strict=True)) if found else None


@pytest.mark.parametrize("seed", range(20))
def test_the_best_ensemble_is_that_of_brute_force(seed):
    draw = random.Random(seed)
    coarse = seed % 2  # many ties
    curves = {
        f"task{k}": {
            draw.randrange(0, 12 if coarse else 10**9): (
                draw.randrange(3) / 10 if coarse else draw.random()
            )
            for _ in range(draw.randint(1, 5))
        }
        for k in draw.sample(range(9), draw.randint(1, 4))
    }
    most = sum(max(curve) for curve in curves.values())
    for budget in {0, most, *(draw.randint(0, most) for _ in range(5))}:
        best = brute_force(curves, budget)
        if best is None:
            with pytest.raises(ValueError, match="too small for one model per task"):
                best_ensemble(curves, budget)
            continue
        found = best_ensemble(curves, budget)
        assert found.sizes == best
        assert list(found.sizes) == list(curves)
        assert found.scores == {task: curves[task][size] for task, size in best.items()}
        assert found.size <= budget
        again = dict(reversed([(t, dict(reversed(c.items()))) for t, c in curves.items()]))
        assert best_ensemble(again, budget).sizes == best


def test_rounding_decides_nothing():
    # 0.1 + 0.2 > 0.3 in floats, and a little more than 0.3 in truth too: by less than rounding.
    curves = {"a": {1: 0.1, 2: 0.3}, "b": {1: 0.2, 2: 0.0}}
    assert best_ensemble(curves, 3).sizes == {"a": 2, "b": 1}
    curves = {"a": {1: 1e16, 2: 1e16}, "b": {1: 0.0, 2: 1.0}}
    assert best_ensemble(curves, 4).sizes == {"a": 1, "b": 2}


@pytest.mark.long
@pytest.mark.slow
def test_many_tasks_are_no_matter():
    curves = {f"t{k}": {s * (k + 1): (s / (s + k + 1)) for s in range(1, 21)} for k in range(30)}
    assert best_ensemble(curves, 2_000).size <= 2_000


def test_the_equal_split_is_never_better():
    curves = {"a": {10: 0.5, 20: 0.4, 30: 0.9}, "b": {5: 0.5, 10: 0.5, 40: 0.8}}
    split = equal_split(curves, 40)
    assert split.sizes == {"a": 10, "b": 5}
    assert best_ensemble(curves, 40).score == pytest.approx(0.7)
    assert split.score == 0.5


def test_an_ensemble_prints_sizes_and_scores():
    text = str(Ensemble({"sst2": 1_000, "rte": 20}, {"sst2": 0.9, "rte": 0.6}, 2_000))
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["sst2", "1,000", "0.9000"]
    assert rows[2] == ["all,", "of", "2,000", "1,020", "0.7500"]


MODEL = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: count(MODEL, "layers"), ValueError, "`what` must be one of"),
        (lambda: count(MODEL), ValueError, "what='encoder_linear' needs `encoder`"),
        (
            lambda: count(MODEL, encoder="bert"),
            ValueError,
            "Got 'bert'; at its top there are ['encoder', 'head']",
        ),
        (lambda: count(MODEL, encoder=3), TypeError, "`encoder` must be a module or its name"),
        (lambda: count(MODEL, encoder=nn.Linear(2, 2)), ValueError, "`encoder` is no part of"),
        (lambda: best_ensemble({}, 5), ValueError, "`curves` must be a mapping task -> {size:"),
        (
            lambda: best_ensemble({"rte": {}}, 5),
            ValueError,
            "`curves` of task 'rte' must be a mapping size -> score with at least one size. Got {}",
        ),
        (lambda: best_ensemble({"rte": {0.5: 1.0}}, 5), ValueError, "whole numbers of parameters"),
        (lambda: best_ensemble({"rte": {-1: 1.0}}, 5), ValueError, "whole numbers of parameters"),
        (lambda: best_ensemble({"rte": {1: "good"}}, 5), TypeError, "must have a number as score"),
        (
            lambda: best_ensemble({"rte": {1: float("nan")}}, 5),
            ValueError,
            "no finite score at size 1. Got nan: leave out what could not be measured",
        ),
        (lambda: best_ensemble({"rte": {1: 1.0}}, 0.5), ValueError, "`budget` must be a whole"),
        (
            lambda: best_ensemble({"rte": {1_000: 1.0}, "cola": {500: 1.0}}, 1_400),
            ValueError,
            "`budget` 1,400 is too small for one model per task. The smallest measured take 1,500",
        ),
        (
            lambda: equal_split({"rte": {1_000: 1.0}, "cola": {500: 1.0}}, 1_800),
            ValueError,
            "gives each task 900, too small for 'rte'. The smallest measured takes 1,000",
        ),
    ],
)
def test_what_is_refused_says_what_to_do(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
