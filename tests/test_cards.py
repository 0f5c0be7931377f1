"""A card tells what the pruner knows and what it was told, and nothing else."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import mtprune
from mtprune import Card, Vote
from mtprune.affinity import compare
from tests.compression.fakes import prefer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(8, 16)
        self.left, self.right = nn.Linear(16, 2), nn.Linear(16, 3)

    def forward(self, x):
        hidden = self.trunk(x).relu()
        return {"left": self.left(hidden), "right": self.right(hidden)}


def energy(weight, grad):
    return (weight * grad).square()


def pruned(method=None, seed=0, update=True):
    torch.manual_seed(1)
    model = Net()
    method = Vote(0.5) if method is None else method
    pruner = mtprune.MultitaskPruner(
        model, ["left", "right"], [model.trunk], method=method, seed=seed
    )
    if update:
        out = model(torch.randn(32, 8))
        pruner.observe_losses({task: value.square().mean() for task, value in out.items()})
        pruner.step()
    return model, pruner


BEFORE = {"left": {"accuracy": 0.8, "loss": 0.5}, "right": {"accuracy": 0.5}}
AFTER = {"left": {"accuracy": 0.6, "loss": 0.625}, "right": {"accuracy": 0.75}}


def test_the_card_beside_a_saved_model(tmp_path):
    model, pruner = pruned(seed=7)
    pruner.finalize()
    card = Card.of(pruner, before=BEFORE, after=AFTER, head={"license": "mit"})
    x = torch.randn(4, 8)
    fast = mtprune.compress(model, x, measure=prefer("csr"))
    mtprune.save(fast, tmp_path, card=card)
    text = (tmp_path / "README.md").read_text()
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    assert 'license: "mit"' in head
    assert "# A network for 2 tasks, 50.0% of its weights pruned" in body
    assert "| left | accuracy | 0.8 | 0.6 |" in body
    assert "`left` -25.00, `right` +50.00; mean +12.50, worst `left` -25.00." in body
    assert pruner.report().table() in body
    assert str(mtprune.plan_of(fast)) in body
    assert "Seed 7, mtprune" in body
    (method,) = re.findall(r"```json\n(.*?)```", body, re.DOTALL)
    assert mtprune.method_from(json.loads(method)) == pruner.method == Vote(0.5)
    found = compare(pruner.task_masks)
    row = (
        f"| left, right | {found.iou:.3f} | {found.chance:.3f} | {found.iou - found.chance:+.3f} |"
    )
    assert row in body
    # It is no part of what is loaded.
    loaded = mtprune.load(tmp_path, Net())
    for task, value in loaded(x).items():
        assert torch.equal(value, fast(x)[task])


def test_the_hub_reads_its_head():
    hub = pytest.importorskip("huggingface_hub")
    _, pruner = pruned()
    head = {"base_model": "someone/net: large", "datasets": ["sst2", "#1"]}
    data = hub.ModelCard(Card.of(pruner, head=head).markdown()).data.to_dict()
    assert data == {
        "library_name": "mtprune",
        "tags": ["mtprune", "pruning", "sparsity", "multitask"],
        **head,
    }


def test_what_is_not_known_is_not_told():
    _, pruner = pruned(Vote(0.5, disentangled=False))
    text = Card.of(pruner).markdown()
    assert "No results were given." in text
    assert "## Compressed" not in text
    told = Card.of(pruner, after={"left": 0.25, "right": 0.5}).markdown()
    assert "| left | value | 0.25 |" in told
    assert "Change in percent" not in told


def test_masks_that_no_task_has_are_not_compared():
    _, pruner = pruned(mtprune.LowRank(0.3))
    assert "What tasks share" not in Card.of(pruner).markdown()
    _, first = pruned()
    _, second = pruned(update=False)
    second.load_state_dict(first.state_dict())
    assert Card.of(second).overlap == {}
    assert Card.of(first).overlap


def test_a_method_of_your_own_is_told_in_words_or_by_your_name():
    _, pruner = pruned(Vote(0.5, saliency=energy))
    text = Card.of(pruner).markdown()
    assert "saliency=energy" in text
    assert "```json" not in text
    card = Card.of(pruner, own={"energy": energy})
    assert card.method["saliency"] == {"own": "energy"}
    with pytest.raises(ValueError, match="`saliency` is energy, which is not of this package"):
        Card.of(pruner, own={})


def test_bars_in_names_stay_in_their_cell():
    _, pruner = pruned()
    card = replace(Card.of(pruner), after={"a|b": {"loss": 1.0}})
    assert r"| a\|b | loss | 1 |" in card.markdown()


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"before": BEFORE}, r"`before` is told beside `after`"),
        ({"after": {"left": 0.5}}, r"`after` must be of the tasks \['left', 'right'\]\. Got \['le"),
        ({"after": 0.5}, r"`after` must be a mapping task -> value"),
        ({"after": {"left": "x", "right": 1.0}}, r"`after` for 'left' must return|`after`"),
        (
            {"after": {"left": 0.5, "right": float("nan")}},
            r"`after` of task 'right' has nan for 'value'",
        ),
        (
            {"before": {"left": 1.0, "right": 1.0}, "after": {"left": 0.5, "right": 1.0}},
            r"Is task 'left' better when it is lower\? Say it by `lower_is_better`",
        ),
        ({"head": ["mit"]}, r"`head` must be a mapping name -> value"),
    ],
)
def test_results_that_cannot_be_are_refused(results, message):
    _, pruner = pruned()
    with pytest.raises((ValueError, TypeError), match=message):
        Card.of(pruner, **results)


def test_nothing_is_told_before_something_is_pruned():
    _, pruner = pruned(update=False)
    with pytest.raises(ValueError, match="has pruned nothing yet, so there is nothing to tell"):
        Card.of(pruner)
