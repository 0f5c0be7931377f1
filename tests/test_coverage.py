"""How much of a model takes part: tied embeddings, matrices of no known kind, the warning."""

import warnings

import pytest
import torch
from torch import nn

import mtprune
from mtprune import OneShot, Vote, recipes


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.score = nn.Linear(8, 2)
        if tied:
            self.lm_head.weight = self.embed.weight

    def losses(self):
        hidden = self.body(self.embed(torch.arange(12))).tanh()
        return {
            "lm": self.lm_head(hidden).square().mean(),
            "score": self.score(hidden).square().mean(),
        }


def pruned(model, losses, tasks, **options):
    pruner = mtprune.MultitaskPruner(model, tasks, method=Vote(0.5, schedule=OneShot(0)), **options)
    pruner.observe_losses(losses())
    pruner.step()
    return pruner


def test_a_weight_tied_to_an_embedding_is_an_embedding():
    model = Tied()
    report = pruned(model, model.losses, ["lm", "score"]).report()
    assert [row.name for row in report.layers] == ["body.weight", "score.weight"]
    assert report.left_alone == {"embed.weight": "it is tied to an embedding; `include` names it"}
    assert report.coverage == 1.0
    assert bool((model.embed.weight != 0).all())


@pytest.mark.parametrize("name", ["embed", "lm_head", "lm_head.weight"])
def test_it_is_pruned_when_named(name):
    model = Tied()
    report = pruned(model, model.losses, ["lm", "score"], include=[name]).report()
    assert [row.name for row in report.layers] == ["embed.weight", "body.weight", "score.weight"]
    assert report.left_alone == {}


def test_an_untied_head_is_a_layer():
    model = Tied(tied=False)
    report = pruned(model, model.losses, ["lm", "score"]).report()
    names = [row.name for row in report.layers]
    assert names == ["body.weight", "lm_head.weight", "score.weight"]


class Linear1D(nn.Module):
    """A kind of layer that no rule knows: its weight is ``[inputs, outputs]``."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Foreign(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.blocks = nn.ModuleList([Linear1D(width, width) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.experts = nn.Parameter(torch.randn(2, width, width))
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in "ab"})

    def losses(self):
        hidden = self.first(torch.randn(6, 4))
        for block in self.blocks:
            hidden = block(hidden).tanh()
        hidden = self.norm(hidden @ self.experts.sum(0))
        return {task: head(hidden).square().mean() for task, head in self.heads.items()}


MESSAGE = (
    r"Of the matrices to be pruned only 8\.6% take part: no rule speaks of 'experts' \(Foreign\), "
    r"'blocks\.0\.weight' \(Linear1D\), 'blocks\.1\.weight' \(Linear1D\)\. Name them with include="
)


def test_matrices_that_no_rule_speaks_of_are_told():
    model = Foreign()
    with pytest.warns(UserWarning, match=MESSAGE):
        pruner = pruned(model, model.losses, list("ab"))
    report = pruner.report()
    total = 64 + 4 * 256 + 32
    assert report.coverage == pytest.approx((64 + 32) / total)
    assert report.left_alone["experts"] == (
        f"no rule for a matrix of Foreign: {512 / total:.1%} of the model's; `include` names it"
    )
    assert set(report.left_alone) == {"experts", "blocks.0.weight", "blocks.1.weight"}
    assert "8.6% of the model's matrices take part." in str(report)
    assert report.to_dict()["coverage"] == report.coverage


def test_what_is_said_about_them_is_no_news():
    for options in (
        {"include": ["experts", "blocks.*.weight"]},
        {"exclude": ["experts", "blocks"]},
        {"shared_modules": "first"},
    ):
        model = Foreign()
        report = pruned(model, model.losses, list("ab"), **options).report()
        assert (report.coverage == 1.0) == ("include" in options)


def test_a_few_of_them_are_told_without_a_warning():
    model = Foreign()
    model.first = nn.Linear(4, 16)
    model.wide = nn.Linear(16, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner = mtprune.MultitaskPruner(model, ["a", "b"], method=recipes.magnitude(0.5))
    assert 0.5 < pruner.report().coverage < 1.0


def test_where_nothing_is_of_a_known_kind_it_says_what_is():
    with pytest.raises(ValueError, match=r"nothing prunable\. Prunable are Linear, .*`include`"):
        mtprune.MultitaskPruner(Linear1D(3, 3), ["a"])


def test_frozen_matrices_are_nobody_s_business():
    model = Foreign()
    for parameter in (model.experts, *model.blocks.parameters()):
        parameter.requires_grad_(False)
    report = pruned(model, model.losses, list("ab")).report()
    assert set(report.left_alone) == set()
