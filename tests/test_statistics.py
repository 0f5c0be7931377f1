"""Statistics: what is gathered of layers, of their inputs above all."""

import copy
import gc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mtprune import Cubic, Linear, OneShot, Vote, testing
from mtprune.methods import Ballot, Masks, Method, Needs
from mtprune.model.inputs import rows
from mtprune.model.layers import find_layers
from mtprune.statistics import JOINT, Statistic, why_no_inputs
from tests import nets
from tests.nets import Run, build
from tests.ranks import on_ranks


@dataclass(frozen=True)
class Spy(Method[Masks]):
    """Prunes nothing, and keeps the ballots it is shown."""

    statistics: Mapping[str, Statistic]
    schedule: Any = field(default_factory=OneShot)
    observations: int = 1
    over_the_run: bool = False
    sparsity: float = 0.0
    ballots: list[Ballot] = field(default_factory=list, repr=False, compare=False)

    def needs(self, inventory):
        return Needs(
            self.statistics, observations=self.observations, over_the_run=self.over_the_run
        )

    def fits(self, layer):
        return why_no_inputs(layer)

    def decide(self, ballot, step):
        self.ballots.append(replace(ballot, statistics=copy.deepcopy(ballot.statistics)))
        return Masks(ballot.masks)

    def shown(self, name, update=-1):
        """The sums of a statistic at an update, by the names of layers."""
        ballot = self.ballots[update]
        return dict(zip(ballot.names, ballot.statistics[name], strict=True))


@dataclass(frozen=True)
class Of(Statistic):
    """A statistic that is a function of what is seen."""

    function: Any
    asks: frozenset[str] = frozenset({"inputs"})
    dtype: torch.dtype | None = None

    def of(self, seen):
        return self.function(seen)


GRAM = Of(lambda seen: seen.inputs.T @ seen.inputs)
ROWS = Of(lambda seen: torch.tensor(float(len(seen.inputs)), device=seen.device))


def still(model):
    """An optimizer under which weights stay as they are."""
    return torch.optim.SGD(nets.trainable(model), lr=0.0)


def counted(method, layer="trunk.inner.weight", update=-1):
    """How many rows of inputs of a layer have been counted."""
    return float(method.shown("rows", update)[layer][JOINT])


# Inputs as rows.

CONVOLUTIONS = {
    "plain": (nn.Conv2d(2, 3, 3), (4, 2, 7, 6)),
    "stride": (nn.Conv2d(2, 3, 3, stride=(2, 3)), (4, 2, 7, 9)),
    "padding": (nn.Conv2d(2, 3, (3, 5), padding=(1, 2)), (4, 2, 7, 6)),
    "dilation": (nn.Conv2d(2, 3, 3, dilation=(2, 1), padding=2), (4, 2, 7, 6)),
    "all of it": (nn.Conv2d(2, 3, (2, 3), 2, (1, 2), (3, 2)), (4, 2, 9, 8)),
    "same": (nn.Conv2d(2, 3, 3, padding="same"), (4, 2, 7, 6)),
    "same, even": (nn.Conv2d(2, 3, (4, 2), padding="same", dilation=(1, 3)), (4, 2, 7, 9)),
    "valid": (nn.Conv2d(2, 3, 3, padding="valid"), (4, 2, 7, 6)),
    "reflect": (nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), (4, 2, 7, 6)),
    "replicate": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), (4, 2, 7, 6)),
    "circular": (nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), (4, 2, 7, 6)),
    "one dimension": (nn.Conv1d(2, 3, 4, stride=2, padding=3, dilation=2), (4, 2, 11)),
    "same in one": (nn.Conv1d(2, 3, 4, padding="same"), (4, 2, 11)),
    "three dimensions": (nn.Conv3d(2, 3, (2, 1, 3), (1, 2, 1), (1, 0, 2)), (2, 2, 4, 5, 6)),
    "replicate in three": (
        nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"),
        (2, 2, 4, 3, 5),
    ),
    "no batch": (nn.Conv2d(2, 3, 3, padding=1), (2, 7, 6)),
    "no batch in one": (nn.Conv1d(2, 3, 3, stride=2), (2, 11)),
    "channels last": (nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), (4, 2, 7, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_multiplies_its_rows_by_its_weight(name, device):
    module, shape = copy.deepcopy(CONVOLUTIONS[name])
    module = module.to(device)
    x = torch.randn(shape, device=device)
    out = module(x)
    out = out if len(shape) == module.weight.dim() else out.unsqueeze(0)
    product = rows(module, x) @ module.weight.flatten(1).T + module.bias
    torch.testing.assert_close(product, out.movedim(1, -1).flatten(0, -2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 4, 5)])
def test_a_linear_layer_multiplies_its_rows_by_its_weight(shape, device):
    module, x = nn.Linear(5, 3).to(device), torch.randn(shape, device=device)
    product = rows(module, x) @ module.weight.T + module.bias
    torch.testing.assert_close(product, module(x).reshape(-1, 3))


def test_rows_of_half_precision_are_float32(device):
    module = nn.Linear(5, 3).to(device, torch.bfloat16)
    assert (
        rows(module, torch.ones(2, 5, device=device, dtype=torch.bfloat16)).dtype == torch.float32
    )


class Modules(nn.Module):
    """One of every kind, and an embedding whose weight is that of a Linear layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.up = nn.ConvTranspose1d(2, 2, 2)
        self.pair = nn.Bilinear(2, 2, 2)
        self.rnn = nn.GRU(2, 2)
        self.cell = nn.LSTMCell(2, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.embed = nn.Embedding(3, 4)
        self.tied = nn.Linear(4, 3)
        self.tied.weight = self.embed.weight


def test_whose_inputs_can_be_told_as_rows():
    reasons = {layer.name: why_no_inputs(layer) for layer in find_layers(Modules(), "embed")}
    assert {name for name, reason in reasons.items() if not reason} == {
        "linear.weight",
        "conv.weight",
    }
    kinds = {
        "grouped.weight": "Conv2d with groups",
        "up.weight": "ConvTranspose1d",
        "pair.weight": "Bilinear",
        "rnn.weight_ih_l0": "GRU",
        "cell.weight_hh": "LSTMCell",
        "attention.in_proj_weight": "MultiheadAttention",
        "attention.out_proj.weight": "NonDynamicallyQuantizableLinear",
        "embed.weight": "Embedding",
    }
    for name, kind in kinds.items():
        assert reasons[name] == f"inputs are not gathered for {kind}"


# Inputs alone are gathered while the model runs.


def captured(run, step):
    """What each layer is called with in a step, in order of calls."""
    seen = {layer.name: [] for layer in find_layers(run.model)}
    handles = [
        module.register_forward_pre_hook(
            lambda module, given, name=layer.name: seen[name].append(rows(module, given[0]))
        )
        for layer in find_layers(run.model)
        for module, _ in layer.places
    ]
    with torch.no_grad():
        run.forward(step)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found).detach() for name, found in seen.items()}


@pytest.mark.parametrize("name", ["plain", "called_twice", "tied", "skipped_layer", "conv_bn"])
def test_sums_over_inputs_are_those_of_every_call(name, backend, device):
    method = Spy({"gram": GRAM, "rows": ROWS}, observations=2)
    run = Run(build(name, device), method, backend, still)
    inputs = [captured(run, step) for step in range(2)]
    run.train(2)
    [ballot] = method.ballots
    assert len(ballot.names) == len(find_layers(build(name).model))
    for layer, sums in method.shown("gram").items():
        x = torch.cat([seen[layer] for seen in inputs])
        assert list(sums) == [JOINT]
        torch.testing.assert_close(sums[JOINT], x.T @ x, rtol=1e-4, atol=1e-4)
        assert counted(method, layer) == len(x)


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_exist_only_on_steps_that_are_observed(device):
    method = Spy({"rows": ROWS}, schedule=Linear(3, 7, 4), observations=2)
    run = Run(build("called_twice", device), method, "inplace")
    there = []
    for _ in range(10):
        there.append(hooks(run.model))
        run.step()
    assert [bool(n) for n in there] == [False, True, True] + [False, False] + [True, True] + [
        False
    ] * 3
    assert set(there) == {0, 3}  # one for each layer, called twice or not
    assert [counted(method, update=i) for i in range(2)] == [64, 64]


def test_hooks_go_with_finalize(backend, device):
    run = Run(build("plain", device), Spy({"rows": ROWS}), backend)
    assert hooks(run.model) == 4
    run.pruner.finalize()
    assert hooks(run.model) == 0


@pytest.mark.parametrize("kind", ["plain", "conv_bn"])
def test_inputs_of_two_layers_are_never_there_together(kind, device):
    alive, most = weakref.WeakSet(), []

    def look(seen):
        alive.add(seen.inputs)
        gc.collect()
        most.append(len(alive))
        return seen.inputs.sum()

    run = Run(build(kind, device), Spy({"sum": Of(look)}), "inplace")
    run.forward()
    assert most == [1] * 4
    gc.collect()
    assert not alive


def test_inputs_that_a_sweep_needs_are_kept_by_reference_and_no_longer(device):
    asks = frozenset({"inputs", "grad"})
    run = Run(build("plain", device), Spy({"x": Of(lambda seen: seen.inputs.sum(), asks)}))
    batch = run.net.make_batch(0)
    x = batch["x"]

    def references():
        found = (t for t in gc.get_objects() if type(t) is torch.Tensor)
        return sum(t.data_ptr() == x.data_ptr() for t in found)

    assert references() == 1
    outputs = run.model(x)
    assert references() == 2
    run.pruner.observe(outputs, batch)
    assert references() == 1


def test_evaluation_between_steps_is_not_counted(backend, device):
    method = Spy({"rows": ROWS}, observations=2)
    run = Run(build("called_twice", device), method, backend)
    for _ in range(2):
        with torch.no_grad():
            run.forward()
        outputs, batch = run.forward()
        with torch.inference_mode():
            run.forward()
        losses = run.pruner.observe(outputs, batch)
        sum(losses.values()).backward()
        run.optimizer.step()
        run.pruner.step()
    assert counted(method) == 2 * 2 * 16


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_forward_that_is_not_observed_is_not_counted(order, backend, device):
    """Only calls that a loss was computed from: not those of another forward with gradients."""
    method = Spy({"rows": ROWS, "gram": GRAM})
    run = Run(build("called_twice", device), method, backend)
    alone = Spy({"rows": ROWS, "gram": GRAM})
    other = Run(build("called_twice", device), alone, backend)
    extra = 100 * run.net.make_batch(5)["x"]
    if order == "before":
        kept = run.model(extra)
    outputs, batch = run.forward()
    if order == "after":
        kept = run.model(extra)
    run.pruner.observe(outputs, batch)
    other.pruner.observe(*other.forward())
    run.pruner.step(), other.pruner.step()
    assert counted(method) == counted(alone) == 2 * 16
    grams = [spy.shown("gram")["trunk.inner.weight"] for spy in (method, alone)]
    assert all(torch.equal(grams[0][voter], sums) for voter, sums in grams[1].items())
    assert all(out.grad_fn is not None for out in kept.values())


def test_forwards_that_are_not_wanted_are_not_counted(backend, device):
    """With accumulated gradients the update comes later than its last observation."""
    method = Spy({"rows": ROWS}, schedule=OneShot(1), observations=2)
    run = Run(build("called_twice", device), method, backend)
    for _ in range(5):
        losses = run.pruner.observe(*run.forward())
        sum(losses.values()).backward()
    run.optimizer.step()
    run.pruner.step()
    assert counted(method) == 2 * 2 * 16
    assert method.ballots[0].losses.keys() == {"a", "b"}


def test_an_activation_checkpoint_counts_its_inputs_once(backend, device):
    method = Spy({"rows": ROWS}, observations=2)
    run = Run(build("checkpointed", device), method, backend)
    run.train(2)
    for layer in ("trunk.stem.weight", "trunk.block.0.weight", "trunk.block.4.weight", "a.weight"):
        assert counted(method, layer) == 2 * 16


def test_batches_of_one_task_at_a_time_add_up(backend, device):
    method = Spy({"rows": ROWS}, schedule=OneShot(3))
    run = Run(build("called_twice", device), method, backend)
    for task in ("a", "a", "b"):
        outputs, batch = run.forward()
        losses = run.pruner.observe(outputs, batch, tasks=[task])
        run.optimizer.zero_grad()
        losses[task].backward()
        run.optimizer.step()
        run.pruner.step()
    # The second batch of task a is not needed.
    assert counted(method) == 2 * 2 * 16


def test_sums_over_the_run_go_on(backend, device):
    method = Spy({"rows": ROWS}, schedule=Linear(1, 3, 1), over_the_run=True)
    Run(build("called_twice", device), method, backend).train(3)
    assert [counted(method, update=i) for i in range(3)] == [32, 64, 96]


def test_a_statistic_chooses_its_type(device):
    exact = Of(GRAM.function, dtype=torch.float64)
    method = Spy({"gram": GRAM, "exact": exact})
    net = build("plain", device)
    run = Run(net, method, score_dtype=torch.bfloat16)
    run.train(1)
    layer = "trunk.0.weight"
    assert method.shown("gram")[layer][JOINT].dtype == torch.bfloat16
    assert method.shown("exact")[layer][JOINT].dtype == torch.float64


def wanda(weight, grad=None, *, inputs):
    return weight.abs() * inputs.norm(dim=0).view(weight[:1].shape)


def wanda_of_tasks(weight, grad, *, inputs):
    return (weight * grad).abs() * inputs.norm(dim=0).view(weight[:1].shape)


@pytest.mark.slow
@pytest.mark.parametrize("saliency", [wanda, wanda_of_tasks])
@pytest.mark.parametrize(
    "name",
    ["convolutions", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tied", "attention"))],
)
def test_gathering_resumes_to_the_bit(saliency, name):
    method = Vote(0.7, saliency=saliency, schedule=Cubic(3, 7, 4), observations=3)
    testing.check_method(method, nets={name: testing.NETS[name]})


# Inputs and gradients.


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_inputs_with_gradients_are_seen_for_each_task(scale, backend, device):
    asks = frozenset({"inputs", "grad"})
    method = Spy({"both": Of(lambda seen: seen.grad @ seen.inputs.T @ seen.inputs, asks)})
    run = Run(build("called_twice", device), method, backend, still)
    inputs = captured(run, 0)
    outputs, batch = run.forward()
    wanted = {}
    for task, loss in run.net.task_losses.items():
        for layer in find_layers(run.model):
            [grad] = torch.autograd.grad(
                loss(outputs, batch), layer.parameter, retain_graph=True, allow_unused=True
            )
            if grad is not None:
                x = inputs[layer.name]
                wanted[task, layer.name] = grad @ x.T @ x
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))
    run.pruner.observe(outputs, batch, scaler=None if scale == 1.0 else scaler)
    run.optimizer.step()
    run.pruner.step()
    found = {
        (task, layer): value
        for layer, sums in method.shown("both").items()
        for task, value in sums.items()
    }
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


class Sometimes(nn.Module):
    """A layer that is skipped once in a while."""

    def __init__(self):
        super().__init__()
        self.always = nn.Linear(6, 6)
        self.often = nn.Linear(6, 6)
        self.skips = False

    def forward(self, x):
        hidden = self.always(x).tanh()
        return hidden if self.skips else self.often(hidden).tanh()


def test_where_no_gradient_arrives_a_statistic_is_zero(backend, device):
    asks = frozenset({"inputs", "grad"})
    method = Spy(
        {"both": Of(lambda seen: seen.grad @ seen.inputs.T @ seen.inputs, asks)}, Linear(1, 2, 1)
    )
    trunk = Sometimes()
    model = nets.Plain(trunk, 6).to(device)
    net = nets.Net(model, nets.squares("a", "b"), "trunk", build("plain", device).make_batch)
    run = Run(net, method, backend).train(1)
    trunk.skips = True
    run.train(1)
    for update, zero in enumerate([False, True]):
        value = method.shown("both", update)["trunk.often.weight"]["a"]
        assert value.shape == (6, 6)
        assert bool((value == 0).all()) is zero


def test_the_gradient_must_be_asked_for(device):
    run = Run(build("plain", device), Spy({"greedy": Of(lambda seen: seen.grad)}))
    with pytest.raises(RuntimeError, match=r"did not ask for the gradient\. Put it into `asks`"):
        run.forward()


def test_a_statistic_that_asks_for_nothing_is_of_the_weights_at_the_update(backend, device):
    method = Spy({"norm": Of(lambda seen: seen.weight.norm(), frozenset())}, OneShot(2))
    run = Run(build("plain", device), method, backend).train(2)
    weight = nets.read(run.model, "trunk.0.weight")
    for value in method.shown("norm")["trunk.0.weight"].values():
        torch.testing.assert_close(value, weight.norm())


# Saliencies that name what they want to be given.


def best(scores, share):
    """The weights of highest score in each layer."""
    masks = {}
    for name, score in scores.items():
        flat = score.flatten()
        mask = torch.zeros_like(flat, dtype=torch.bool)
        mask[flat.argsort(descending=True)[: round(share * flat.numel())]] = True
        masks[name] = mask.view(score.shape)
    return masks


@pytest.mark.parametrize("name", ["plain", "conv_bn"])
def test_a_saliency_may_look_at_the_inputs(name, backend, device):
    method = Vote(0.5, saliency=wanda, allocation="uniform", disentangled=False)
    run = Run(build(name, device), method, backend, still)
    inputs = captured(run, 0)
    scores = {
        layer.name: wanda(layer.parameter.detach(), inputs=inputs[layer.name])
        for layer in find_layers(run.model)
    }
    run.train(1)
    for layer, mask in best(scores, 0.5).items():
        assert torch.equal(run.pruner.masks[layer], mask)


def test_layers_whose_inputs_are_not_gathered_are_left_dense(backend, device):
    run = Run(build("attention", device), Vote(0.5, saliency=wanda), backend).train(1)
    assert list(run.pruner.masks) == ["a.weight", "b.weight"]
    assert run.pruner.report().left_alone == {
        "trunk.attention.in_proj_weight": "inputs are not gathered for MultiheadAttention",
        "trunk.attention.out_proj.weight": (
            "inputs are not gathered for NonDynamicallyQuantizableLinear"
        ),
    }
    assert nets.zeros(run.pruner.masks) == 8


def test_a_model_without_such_layers_is_refused(device):
    net = nets.Net(nets.Recurrent(nn.LSTM), nets.squares("a"), "rnn", nets.Batches(6, 3, 5))
    with pytest.raises(ValueError, match=r"can prune none of these layers: .* for LSTM\)"):
        Run(net, Vote(0.5, saliency=wanda))


def test_a_saliency_may_look_at_the_layer(backend, device):
    def late(weight, grad, layer):
        assert layer.shape == weight.shape
        return torch.ones_like(weight) * (layer.name != "trunk.0.weight")

    method = Vote(0.4, saliency=late, allocation="global", min_keep=0)
    run = Run(build("plain", device), method, backend).train(1)
    sizes = {name: int(mask.sum()) for name, mask in run.pruner.masks.items()}
    # All others tie: 77 of 80 stay, by position.
    assert sizes == {"trunk.0.weight": 0, "trunk.2.weight": 64, "a.weight": 8, "b.weight": 5}


@pytest.mark.parametrize("data", [True, False])
def test_a_saliency_may_look_at_the_task(data, backend, device):
    """One that counts for task a alone keeps the head of a, and none of b's."""

    def of_a(weight, grad, task):
        return weight.abs() * (task == "a")

    def of_a_without_data(weight, grad=None, *, task):
        return weight.abs() * (task == "a")

    method = Vote(
        0.5, saliency=of_a if data else of_a_without_data, allocation="global", min_keep=0
    )
    run = Run(build("plain", device), method, backend).train(1)
    assert bool(run.pruner.masks["a.weight"].sum() > run.pruner.masks["b.weight"].sum())
    assert not run.pruner.masks["b.weight"].any()


def test_a_saliency_may_draw_from_the_generator_of_the_pruner(backend, device):
    def noisy(weight, grad, generator):
        return torch.rand(weight.shape, generator=generator).to(weight.device)

    def masks(seed):
        return Run(build("plain", device), Vote(0.5, saliency=noisy), backend, seed=seed).train(1)

    first, second, other = (masks(seed).pruner.masks for seed in (1, 1, 2))
    assert nets.same(first, second)
    assert not nets.same(first, other)


# What is refused.


def test_a_layer_that_is_never_called_is_named(backend, device):
    run = Run(build("read_not_called", device), Vote(0.5, saliency=wanda), backend)
    with pytest.raises(
        RuntimeError, match=r"Inputs of 'trunk\.lin\.weight' have not been seen\. They are gathered"
    ):
        run.step()
    assert nets.zeros(run.pruner.masks) == 0


@pytest.mark.parametrize("saliency", [wanda, wanda_of_tasks])
def test_a_compiled_model_is_named(saliency, backend, device):
    def compiled(model):
        return torch.compile(model, backend="eager")

    run = Run(build("plain", device), Vote(0.5, saliency=saliency), backend, wrap=compiled)
    with pytest.raises(
        RuntimeError, match=r"have not been seen\. .* which a compiled model skips: observe the"
    ):
        run.step()
    torch._dynamo.reset()


def test_inputs_that_are_not_finite_are_named(backend, device):
    infinite = Of(lambda seen: seen.inputs.T @ seen.inputs / 0)
    run = Run(build("plain", device), Spy({"gram": infinite}), backend)
    run.pruner.observe(*run.forward())
    with pytest.raises(
        RuntimeError,
        match=r"Statistic 'gram' is not finite in 'trunk\.0\.weight' \(36 of 36\)\. Check the inp",
    ):
        run.pruner.step()


# Two ranks.


def gathered(rank, world):
    """Sums of inputs alone, and of inputs with gradients."""
    asks = frozenset({"inputs", "grad"})
    method = Spy(
        {
            "gram": GRAM,
            "rows": ROWS,
            "swept": Of(lambda seen: torch.tensor(float(len(seen.inputs))), asks),
        },
        OneShot(2),
        observations=2,
    )
    net = build("called_twice")
    make_batch = net.make_batch
    net.make_batch = lambda seed: {
        name: value.chunk(world)[rank].round() for name, value in make_batch(seed).items()
    }
    wrap = DistributedDataParallel if world > 1 else None
    Run(net, method, "prune", still, wrap=wrap).train(2)
    return {name: method.shown(name) for name in ("gram", "rows", "swept")}


@pytest.mark.slow
def test_two_ranks_add_up(tmp_path):
    alone = gathered(0, 1)
    first, second = on_ranks(__name__, "gathered", tmp_path)
    assert first["gram"].keys() == alone["gram"].keys()
    for name, layers in alone.items():
        for layer, sums in layers.items():
            for voter, value in sums.items():
                assert torch.equal(first[name][layer][voter], second[name][layer][voter])
                torch.testing.assert_close(first[name][layer][voter], value)
    assert float(first["rows"]["trunk.inner.weight"][JOINT]) == 2 * 2 * 16
    assert float(first["swept"]["trunk.inner.weight"]["a"]) == 2 * 2 * 16
