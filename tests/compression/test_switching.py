"""One base and a bit for each weight and task: the subnetwork of any tasks, bitwise, and back."""

import copy
import json
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mtprune
from mtprune import Head, MultitaskPruner, Neuron, Vote
from mtprune.model.task_masks import merged_task_masks
from tests import nets
from tests.compression.fakes import prefer
from tests.compression.test_extract import Two, X, masked, masks
from tests.tampered_models import resealed


def state_equal(model, other):
    """Whether two models hold the same bits."""
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(bits(x) == bits(b[name]) for name, x in a.items())


def bits(tensor):
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def by_hand(model, task_masks, tasks):
    """A copy in which what none of the tasks would keep is zero."""
    twin = copy.deepcopy(model).eval()
    used = dict(twin.named_parameters())
    with torch.no_grad():
        for name, mask in merged_task_masks(task_masks, tasks).items():
            used[name].masked_fill_(~mask, 0)
    return twin


def test_literals(tmp_path):
    model = Two().eval()
    mtprune.save(model, tmp_path, task_masks=masks())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "plan.json"]
    stored = load_file(tmp_path / "model.safetensors")
    found = {name: value.tolist() for name, value in stored.items() if "task_masks" in name}
    # trunk and head of a, trunk and head of b: rows of three, lowest bit first.
    assert list(found.values()) == [[0b00111111, 0], [0b011], [0b11000111, 1], [0b111111]]

    loaded = mtprune.load(tmp_path, Two(), tasks=["a"])
    assert loaded.trunk.weight[2].tolist() == [0, 0, 0]
    assert loaded.a.weight[0, 2] == 0
    assert loaded.b[0].weight.count_nonzero() == 0  # nobody's but b's
    assert torch.equal(loaded(X)["a"], masked(model)(X)["a"])
    assert mtprune.switch_tasks(loaded, ["b"]) == 1 - 12 / 18
    assert torch.equal(loaded(X)["b"], masked(model, "b")(X)["b"])
    assert mtprune.switch_tasks(loaded, ["a", "b"]) == 1 - 17 / 18
    assert mtprune.switch_tasks(loaded, None) == 0
    assert state_equal(loaded, model)
    assert state_equal(mtprune.load(tmp_path, Two()), model)


@pytest.mark.parametrize("name", ["conv_bn", "adapters", "tied", "bfloat16", "channels_last"])
def test_every_subnetwork_is_the_base_under_its_masks(name, tmp_path):
    run = nets.Run(nets.build(name), Vote(sparsity=0.6)).train(2)
    run.pruner.finalize()
    with torch.no_grad():
        next(run.model.parameters())[0, 0].fill_(-0.0)  # comes back with its sign
    wishes, base = run.pruner.task_masks, copy.deepcopy(run.model)
    mtprune.save(run.model, tmp_path)
    tasks = list(wishes)
    loaded = mtprune.load(tmp_path, nets.build(name, seed=3).model, tasks=tasks[:1])
    assert state_equal(loaded, by_hand(base, wishes, tasks[:1]))
    for chosen in [c for n in (1, 2) for c in combinations(tasks, n)]:
        zeros = mtprune.switch_tasks(loaded, chosen)
        assert state_equal(loaded, by_hand(base, wishes, chosen))
        assert mtprune.switch_tasks(run.model, chosen) == zeros
        assert state_equal(loaded, run.model)
    mtprune.switch_tasks(loaded, None)
    assert state_equal(loaded, base)


def test_what_is_saved_and_compressed_is_the_base_whatever_it_serves(tmp_path):
    run = nets.Run(nets.build("conv_bn"), Vote(sparsity=0.6)).train(2)
    run.pruner.finalize()
    model, x = run.model.eval(), run.net.make_batch(0)["x"]
    fast = mtprune.compress(model, x, tasks=["a"], measure=prefer("dense"))
    mtprune.save(model, tmp_path / "whole")
    mtprune.switch_tasks(model, ["b"])
    served = copy.deepcopy(model)
    mtprune.save(model, tmp_path / "switched")
    again = mtprune.compress(model, x, tasks=["a"], measure=prefer("dense"))
    assert torch.equal(again(x)["a"], fast(x)["a"])
    assert state_equal(model, served)
    whole, switched = (tmp_path / f / "model.safetensors" for f in ("whole", "switched"))
    assert whole.read_bytes() == switched.read_bytes()
    loaded = mtprune.load(tmp_path / "whole", nets.build("conv_bn", seed=3).model, tasks=["b"])
    late = mtprune.compress(loaded, x, tasks=["a"], measure=prefer("dense"))
    assert torch.equal(late(x)["a"], fast(x)["a"])


def test_the_base_may_be_the_model_before_it_was_pruned(tmp_path):
    run = nets.Run(nets.build("plain"), Vote(sparsity=0.5)).train(1)
    dense = nets.build("plain", seed=3).model
    wishes = run.pruner.task_masks
    mtprune.save(dense, tmp_path, task_masks=wishes)
    loaded = mtprune.load(tmp_path, nets.build("plain").model, tasks=["b"])
    assert state_equal(loaded, by_hand(dense, wishes, ["b"]))
    loaded = mtprune.load(tmp_path, loaded)  # into one that serves a task
    assert state_equal(loaded, dense)


class Encoders(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.trunk = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.a, self.b = nn.Linear(16, 1), nn.Linear(16, 1)

    def forward(self, x):
        hidden = self.trunk(x).mean(1)
        return {"a": self.a(hidden), "b": self.b(hidden)}


def test_a_task_leaves_heads_and_neurons_that_only_others_wanted():
    torch.manual_seed(0)
    model, x = Encoders(), torch.randn(4, 5, 16)
    with torch.no_grad():
        model.a.weight[:, ::2], model.b.weight[:, 1::2] = 0, 0  # tasks look at other features
    losses = {t: lambda out, batch, t=t: (out[t] - 1).square().mean() for t in "ab"}
    method = Vote(sparsity=0.4, granularity=(Head(), Neuron()), allocation="global")
    pruner = MultitaskPruner(model, losses, [model.trunk], method=method)
    pruner.prune([x], progress=False)
    pruner.finalize()
    all_of_it = mtprune.compress(model, x, measure=prefer("dense"))
    fast = mtprune.compress(model, x, tasks=["a"], measure=prefer("dense"))
    mtprune.switch_tasks(model, ["a"])
    torch.testing.assert_close(fast(x)["a"], model.eval()(x)["a"])
    left = int(model.trunk.layers[0].linear1.weight.any(1).sum())
    assert 0 < left < len(all_of_it.trunk.layers[0].linear1.weight)
    assert fast.trunk.layers[0].linear1.weight.shape == (left, 16)


def test_errors(tmp_path):
    model = Two()
    advice = r"finalized model with mtprune.save\(model, directory, task_masks"
    with pytest.raises(ValueError, match=rf"does not know what its tasks voted for.*{advice}"):
        mtprune.switch_tasks(model, ["a"])
    with pytest.raises(ValueError, match=r"no plan: .* give task_masks=pruner.task_masks"):
        mtprune.save(model, tmp_path)
    other = masks()
    other["a"]["trunk.weight"] = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"another model: they have 'trunk.weight'"):
        mtprune.save(model, tmp_path, task_masks=other)
    pruner = MultitaskPruner(Two(), ["a", "b"])
    pruner.observe_losses({t: out.mean() for t, out in pruner._model(X).items()})
    pruner.step()
    with pytest.raises(ValueError, match=r"still holds .*pruner.finalize\(\) first"):
        mtprune.save(pruner._model, tmp_path, task_masks=masks())
    fast = mtprune.compress(model, X, measure=prefer("dense"))
    with pytest.raises(ValueError, match="compressed, and `task_masks` are of the one it was made"):
        mtprune.save(fast, tmp_path, task_masks=masks())
    mtprune.save(fast, tmp_path)
    with pytest.raises(ValueError, match=r"holds no task masks: leave `tasks` out"):
        mtprune.load(tmp_path, Two(), tasks=["a"])
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no task masks: leave `tasks` out"):
        mtprune.load(tmp_path / "pretrained", tasks=["a"])

    mtprune.save(model, tmp_path, task_masks=masks())
    fresh = Two()
    before = copy.deepcopy(fresh)
    with pytest.raises(ValueError, match=r"`tasks` names \['c'\]. Known here: \['a', 'b'\]"):
        mtprune.load(tmp_path, fresh, tasks=["c"])
    assert state_equal(fresh, before)
    loaded = mtprune.load(tmp_path, fresh, tasks=["a"])
    with pytest.raises(ValueError, match=r"`tasks` must be a list of some of .* Got 'b'"):
        mtprune.switch_tasks(loaded, "b")
    assert loaded.trunk.weight[2].tolist() == [0, 0, 0]
    with torch.no_grad():
        loaded.trunk.weight[2] = 1
    with pytest.raises(RuntimeError, match=r"'trunk.weight' has weights where .* \['a'\] has none"):
        mtprune.switch_tasks(loaded, ["b"])
    assert loaded.trunk.weight[2].tolist() == [1, 1, 1]


def damaged(folder, change):
    meta = json.loads((folder / "plan.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(meta["task_masks"], tensors)
    (folder / "plan.json").write_text(json.dumps(meta))
    save_file(tensors, folder / "model.safetensors")
    resealed(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda m, t: t.update({"task_masks/0": t["task_masks/1"].clone()}),
            r"mask of shape \(3, 3\)",
        ),
        (lambda m, t: t.update({"task_masks/1": torch.ones(1)}), r"mask of shape \(1, 3\)"),
        (lambda m, t: t.pop("task_masks/1"), "must have keys among"),
        (lambda m, t: m["bits"].pop("task_masks/1"), "left over"),
        (lambda m, t: m["shapes"].pop("a.weight"), "must be one of"),
        (lambda m, t: m["shapes"].update({"trunk.weight": [9, 1]}), "of another model"),
        (lambda m, t: m["shapes"].update({"trunk.weight": [1 << 40, 1 << 40]}), "as bits"),
        (lambda m, t: m["bits"].update({"task_masks/0": ["c", "trunk.weight"]}), "must be"),
        (lambda m, t: m["bits"].update({"trunk.weight": ["a", "trunk.weight"]}), "as bits"),
        (lambda m, t: m.update(tasks="ab"), "must be a list"),
    ],
)
def test_damaged_masks_are_named_and_change_nothing(change, match, tmp_path):
    mtprune.save(Two(), tmp_path, task_masks=masks())
    damaged(tmp_path, change)
    fresh = Two()
    before = copy.deepcopy(fresh)
    with pytest.raises(ValueError, match=match):
        mtprune.load(tmp_path, fresh, tasks=["a"])
    assert state_equal(fresh, before)
