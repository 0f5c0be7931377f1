"""LoRA: adapters on a pruned base, which stays as sparse when they are merged."""

import copy

import pytest
import torch
from torch import nn

from mtprune import MultitaskPruner, Vote
from mtprune.integrations.peft import keep_zeros

peft = pytest.importorskip("peft", exc_type=ImportError)

LAYERS = ("first", "second")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)
        self.a, self.b = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x):
        hidden = self.second(self.first(x).tanh())
        return {"a": self.a(hidden), "b": self.b(hidden)}


LOSSES = {t: lambda out, x, t=t: (out[t] - 1).square().mean() for t in "ab"}


def adapted(model, name="default", **options):
    options = {"r": 3, "target_modules": list(LAYERS), "lora_dropout": 0.0, **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options), adapter_name=name)
    stir(wrapped)
    return wrapped


@torch.no_grad()
def stir(model):
    """An adapter begins as zero."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(torch.randn_like(parameter) / 3)


def pruned(backend="prune"):
    torch.manual_seed(0)
    model = Net()
    pruner = MultitaskPruner(
        model, LOSSES, LAYERS, method=Vote(0.5, allocation="uniform"), backend=backend
    )
    pruner.prune([torch.randn(16, 8)], progress=False)
    pruner.finalize()
    return model, pruner.masks


def test_zeros_stay_when_adapters_are_trained_and_merged():
    model, masks = pruned()
    model, x = adapted(model), torch.randn(5, 8)
    free = copy.deepcopy(model)
    assert keep_zeros(model) == [f"base_model.model.{name}" for name in LAYERS]
    assert keep_zeros(model) == [f"base_model.model.{name}" for name in LAYERS]  # once is enough
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sum(loss(model(x), x) for loss in LOSSES.values()).backward()
        optimizer.step()
    trained = {t: y.detach() for t, y in model(x).items()}
    merged = model.merge_and_unload()
    for name in LAYERS:
        weight = merged.get_submodule(name).weight
        assert torch.equal(weight != 0, masks[f"{name}.weight"])
    for task, y in merged(x).items():
        torch.testing.assert_close(y, trained[task])
    assert not bool((free.merge_and_unload().first.weight == 0).any())


def test_the_forward_is_that_of_the_masked_sum():
    model, masks = pruned()
    dense, x = copy.deepcopy(model), torch.randn(5, 8)
    model = adapted(model, r=2, lora_alpha=6)
    keep_zeros(model)
    for name in LAYERS:
        layer = model.base_model.model.get_submodule(name)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 3
        weight = dense.get_submodule(name).weight
        weight.data = (weight + product * masks[f"{name}.weight"]).detach()
    for task, y in dense(x).items():
        torch.testing.assert_close(model(x)[task], y)
    with model.disable_adapter():
        assert torch.equal(model(x)["a"], pruned()[0](x)["a"])


def test_each_task_has_an_adapter_on_one_pruned_base():
    model, masks = pruned()
    model, x = adapted(model, "for a"), torch.randn(5, 8)
    keep_zeros(model)
    model.add_adapter("for b", peft.LoraConfig(r=2, target_modules=list(LAYERS)))
    stir(model)
    outputs = {}
    for task in "ab":
        model.set_adapter(f"for {task}")
        outputs[task] = model(x)["a"].detach()
        model.merge_adapter([f"for {task}"])
        for name in LAYERS:
            weight = model.base_model.model.get_submodule(name).base_layer.weight
            assert torch.equal(weight != 0, masks[f"{name}.weight"])
        torch.testing.assert_close(model(x)["a"], outputs[task])
        model.unmerge_adapter()
    assert not torch.allclose(outputs["a"], outputs["b"])


def test_a_copy_has_adapters_of_its_own():
    model, masks = pruned()
    model, x = adapted(model), torch.randn(5, 8)
    keep_zeros(model)
    twin = copy.deepcopy(model)
    stir(twin)
    expected = twin(x)["a"].detach()
    assert not torch.allclose(expected, model(x)["a"])
    merged = twin.merge_and_unload()
    torch.testing.assert_close(merged(x)["a"], expected)
    assert torch.equal(merged.first.weight != 0, masks["first.weight"])


def test_the_base_is_pruned_under_adapters_that_are_trained(backend):
    torch.manual_seed(0)
    model, x = adapted(Net()), torch.randn(16, 8)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    pruner = MultitaskPruner(model, LOSSES, exclude="*lora_*", method=Vote(0.5), backend=backend)
    pruner.prune([x], progress=False)
    names = [f"base_model.model.{name}.base_layer.weight" for name in LAYERS]
    assert list(pruner.masks)[:2] == names
    pruner.finalize()
    keep_zeros(model)
    merged = model.merge_and_unload()
    for layer, name in zip(LAYERS, names, strict=True):
        assert torch.equal(merged.get_submodule(layer).weight != 0, pruner.masks[name])


def test_what_cannot_be_is_refused_with_what_to_do():
    model = adapted(Net())
    with pytest.raises(ValueError, match=r"lora_A.* is an adapter's: .*keep_zeros.*'\*lora_\*'"):
        MultitaskPruner(model, LOSSES)
    with pytest.raises(ValueError, match="Net has no LoRA adapter"):
        keep_zeros(Net())
    with pytest.raises(ValueError, match=r"first' cannot be kept: its adapter drops out inputs"):
        keep_zeros(adapted(Net(), lora_dropout=0.1))
    with pytest.raises(ValueError, match=r"none of plain LoRA"):
        keep_zeros(adapted(Net(), use_dora=True))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"its adapters are merged. Call unmerge_adapter"):
        keep_zeros(model)
    conv = nn.Sequential(nn.Conv1d(3, 4, 1))
    with pytest.raises(ValueError, match=r"it is a Conv1d. Name nn.Linear layers"):
        keep_zeros(adapted(conv, target_modules=["0"]))
