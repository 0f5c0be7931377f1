"""Masking: the traps of torch.nn.utils.prune, and masks that hold whatever the optimizer does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from mtprune import Cubic, Vote, saliency
from tests import checkpoints, nets
from tests.nets import Run, build, evaluate, read, same, sgd, weights
from tests.runs import record

FEW_NETS = pytest.mark.parametrize(
    "name",
    nets.each(["plain", "called_twice", "tied", "attention", "lstm", "conv_bn", "read_not_called"]),
)


def owner(run: Run, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return run.model.get_submodule(path), attribute


@torch.no_grad()
def disturb(run: Run, value: float) -> None:
    """Put a value where weights are pruned, as momentum or a careless user might."""
    named = dict(run.model.named_parameters())
    for name, mask in run.pruner.masks.items():
        parameter = named.get(name, named.get(name + "_orig"))
        parameter.masked_fill_(~mask, value)


# torch.nn.utils.prune state is real.


@nets.EVERY_NET
def test_prune_says_the_model_is_pruned_and_finds_its_state(name, device):
    run = Run(build(name, device))
    assert not prune.is_pruned(run.model)
    run.train(3)
    assert prune.is_pruned(run.model)
    for layer, mask in run.pruner.masks.items():
        for alias in run.named[layer]:
            module, attribute = owner(run, alias)
            assert isinstance(getattr(module, attribute + "_orig"), nn.Parameter)
            assert attribute not in module._parameters
            assert torch.equal(getattr(module, attribute + "_mask").bool(), mask)
            hooks = [h for h in module._forward_pre_hooks.values() if hasattr(h, "_tensor_name")]
            assert [h._tensor_name for h in hooks].count(attribute) == 1


def test_inplace_leaves_no_trace_on_the_model(device):
    run = Run(build("conv_bn", device), backend="inplace")
    before = list(run.model.state_dict())
    run.train(3)
    assert not prune.is_pruned(run.model)
    assert list(run.model.state_dict()) == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in run.model.modules())


@FEW_NETS
def test_prune_remove_bakes_one_layer(name, device):
    run = Run(build(name, device)).train(3)
    batch = run.net.make_batch(0)
    expected = evaluate(run.model, batch)
    layer, mask = next(iter(run.pruner.masks.items()))
    module, attribute = owner(run, layer)
    parameter = module._parameters[attribute + "_orig"]
    prune.remove(module, attribute)
    assert module._parameters[attribute] is parameter
    assert not hasattr(module, attribute + "_mask")
    assert bool((getattr(module, attribute)[~mask] == 0).all())
    for out, want in zip(evaluate(run.model, batch), expected, strict=True):
        assert torch.equal(out, want)


def test_after_prune_remove_training_and_finalize_go_on(device):
    run = Run(build("plain", device)).train(3)
    prune.remove(run.model.trunk[0], "weight")
    run.train(3)
    run.pruner.finalize()
    assert not prune.is_pruned(run.model)
    assert list(run.model.state_dict()) == list(build("plain").model.state_dict())


def test_masks_do_not_pile_up(device):
    run = Run(build("plain", device), Vote(0.9, schedule=Cubic(0, 20, 1)))
    before = None
    for _ in range(22):
        run.step()
        lin = run.model.trunk[0]
        hooks = list(lin._forward_pre_hooks.values())
        buffer = lin.weight_mask
        assert len(hooks) == 1
        assert not isinstance(hooks[0], prune.PruningContainer)
        assert len(lin._forward_hooks) == 1
        assert before is None or buffer is before
        before = buffer


def test_dynamic_masks_grow_as_well_as_shrink(backend, device):
    run = Run(build("plain", device), nets.dynamic(), backend)
    run.step()
    first = run.pruner.masks
    run.train(8)
    last = run.pruner.masks
    assert any(bool((last[n] & ~first[n]).any()) for n in first)
    assert any(bool((first[n] & ~last[n]).any()) for n in first)


# What is read is the masked weight.


@nets.EVERY_NET
def test_what_is_read_between_steps_is_never_stale(name, backend, device):
    run = record(nets.start, name, "dynamic", backend, device)
    for moment in run.until(4):
        for layer, mask in moment.masks.items():
            for alias in run.names[layer]:
                assert torch.equal(moment.read[alias], moment.weights[alias] * mask)


def test_what_is_read_after_functional_call_is_the_weight_again(backend, device):
    run = Run(build("read_not_called", device), backend=backend).train(2)
    batch = run.net.make_batch(0)
    expected = evaluate(run.model, batch)
    doubled = {n: p.detach() * 2 for n, p in run.model.named_parameters()}
    torch.func.functional_call(run.model, doubled, (batch["x"],))
    named = dict(run.model.named_parameters())
    for layer, mask in run.pruner.masks.items():
        held = named.get(layer, named.get(layer + "_orig"))
        assert torch.equal(read(run.model, layer), held * mask)
    for out, want in zip(evaluate(run.model, batch), expected, strict=True):
        assert torch.equal(out, want)


@pytest.mark.parametrize("name", ["plain", "read_not_called", "lstm", "attention"])
def test_weights_loaded_by_assignment_are_the_ones_that_are_used(name, backend, device):
    run = Run(build(name, device), backend=backend).train(2)
    other = Run(build(name, device, seed=5), backend=backend).train(2)
    state = {k: v.clone() for k, v in other.model.state_dict().items()}
    batch = run.net.make_batch(0)
    expected = evaluate(other.model, batch)
    run.model.load_state_dict(state, assign=True)
    run.pruner.load_state_dict(other.pruner.state_dict())
    for out, want in zip(evaluate(run.model, batch), expected, strict=True):
        assert torch.equal(out, want)
    for layer, mask in other.pruner.masks.items():
        assert torch.equal(read(run.model, layer), read(other.model, layer) * mask)


CALLED = [name for name in nets.SHELF if name != "read_not_called"]


@pytest.mark.parametrize("name", nets.each(CALLED))
def test_what_stands_at_pruned_places_of_weight_orig_does_not_matter(name, device):
    run = Run(build(name, device)).train(3)
    batch = run.net.make_batch(0)
    expected = evaluate(run.model, batch)
    disturb(run, 7.0)
    for out, want in zip(evaluate(run.model, batch), expected, strict=True):
        assert torch.equal(out, want)


def test_attention_masks_its_output_projection_and_trains_on(backend, device):
    run = Run(build("attention", device), backend=backend, optimizer=sgd).train(2)
    mask = run.pruner.masks["trunk.attention.out_proj.weight"]
    assert not bool(mask.all())
    batch = run.net.make_batch(0)
    before = read(run.model, "trunk.attention.out_proj.weight").detach().clone()
    masked = evaluate(run.model, batch)
    twin = build("attention", device).model
    twin.load_state_dict(weights(run), strict=True)
    for out, want in zip(evaluate(twin, batch), masked, strict=True):
        torch.testing.assert_close(out, want)
    run.train(5)
    after = read(run.model, "trunk.attention.out_proj.weight")
    assert bool((after[mask] != before[mask]).any())
    assert bool((after[~mask] == 0).all())


def test_a_weight_read_without_a_call_is_masked_and_trains(backend, device):
    run = Run(build("read_not_called", device), backend=backend, optimizer=sgd).train(2)
    mask = run.pruner.masks["trunk.lin.weight"]
    lin = run.model.trunk.lin
    before = lin.weight.detach().clone()
    called = []
    lin.register_forward_hook(lambda *_: called.append(1))
    run.train(4)
    assert not called
    assert bool((lin.weight[~mask] == 0).all())
    assert bool((lin.weight[mask] != before[mask]).any())


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [("tied", "trunk.first", "trunk.last"), ("tied_embedding", "embed", "lm")],
)
def test_tied_weights_share_one_mask(name, one, other, backend, device):
    run = Run(build(name, device), nets.dynamic(), backend).train(6)
    first, second = run.model.get_submodule(one), run.model.get_submodule(other)
    assert f"{one}.weight" in run.pruner.masks
    assert f"{other}.weight" not in run.pruner.masks
    assert torch.equal(first.weight, second.weight)
    if backend == "prune":
        assert first.weight_orig is second.weight_orig
        assert first.weight_mask is second.weight_mask
    run.pruner.finalize()
    assert first.weight is second.weight


def test_no_grad_forward_in_between_does_no_harm(backend, device):
    run = Run(build("attention", device), nets.gradual(), backend)
    twin = Run(build("attention", device), nets.gradual(), backend)
    for i in range(10):
        run.step()
        with torch.no_grad():
            run.model(run.net.make_batch(50 + i)["x"])
        with torch.inference_mode():
            run.model(run.net.make_batch(80 + i)["x"])
        twin.step()
    assert same(weights(run), weights(twin))


def test_an_error_in_the_forward_leaves_a_usable_weight(backend, device):
    run = Run(build("plain", device), backend=backend).train(2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run.model(torch.zeros(2, 5, device=device))
    copy.deepcopy(run.model)
    assert isinstance(run.model.trunk[0].weight, nn.Parameter)
    run.train(1)


# Zeros stay zeros.


@pytest.mark.slow
@FEW_NETS
@pytest.mark.parametrize("given", [False, True], ids=["step_alone", "optimizer_given"])
def test_zeros_stay_for_fifty_steps_of_momentum_and_decay(name, given, backend, device):
    run = Run(build(name, device), backend=backend, optimizer=sgd, given=given).train(2)
    masks = run.pruner.masks
    assert masks
    for _ in range(50):
        run.step()
        for layer, mask in masks.items():
            for alias in run.named[layer]:
                assert bool((read(run.model, alias)[~mask] == 0).all())
    assert same(masks, run.pruner.masks)


def test_with_an_optimizer_zeros_hold_before_step_is_called(backend, device):
    run = Run(build("plain", device), backend=backend, optimizer=sgd).train(2)
    outputs, batch = run.forward()
    sum(loss(outputs, batch) for loss in run.net.task_losses.values()).backward()
    run.optimizer.step()
    parameters = dict(run.model.named_parameters())
    for layer, mask in run.pruner.masks.items():
        held = parameters.get(layer, parameters.get(layer + "_orig"))
        assert bool((held[~mask] == 0).all())


def test_an_infinite_weight_that_is_pruned_becomes_zero(backend, device):
    net = build("plain", device)
    with torch.no_grad():
        net.model.trunk[0].weight[0, 0] = float("inf")

    def prune_infinite(weight, grad=None):
        return torch.where(weight.isinf(), -1.0, weight.abs())

    run = Run(net, Vote(0.5, saliency=prune_infinite), backend)
    outputs, batch = run.forward()
    run.pruner.observe(outputs, batch)
    assert run.pruner.step()
    assert bool(read(run.model, "trunk.0.weight")[0, 0] == 0)
    assert all(bool(out.isfinite().all()) for out in evaluate(run.model, batch))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_what_appears_at_a_pruned_place_is_zero_after_the_next_step(value, backend, device):
    run = Run(build("plain", device), backend=backend, given=False).train(2)
    disturb(run, value)
    run.pruner.step()
    named = dict(run.model.named_parameters())
    for layer, mask in run.pruner.masks.items():
        held = named.get(layer, named.get(layer + "_orig"))
        assert bool((held[~mask] == 0).all())
    assert all(bool(out.isfinite().all()) for out in evaluate(run.model, run.net.make_batch(0)))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_infinite_pruned_weight_does_not_reach_the_outputs(value, device):
    run = Run(build("plain", device)).train(2)
    batch = run.net.make_batch(0)
    expected = evaluate(run.model, batch)
    disturb(run, value)
    for out, want in zip(evaluate(run.model, batch), expected, strict=True):
        assert torch.equal(out, want)


@pytest.mark.parametrize("name", ["plain", "bfloat16"])
def test_finalize_zeroes_whatever_stands_at_pruned_places(name, backend, device):
    run = Run(build(name, device), backend=backend).train(2)
    disturb(run, float("inf"))
    run.pruner.finalize()
    for layer, mask in run.pruner.masks.items():
        assert bool((read(run.model, layer)[~mask] == 0).all())


OPTIMIZERS = {
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.02),
    "amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, amsgrad=True),
    "sgd": sgd,
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.02),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.005, momentum=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_comes_back_starts_at_zero_with_no_memory(optimizer, backend, device):
    run = Run(build("plain", device), nets.dynamic(), backend, OPTIMIZERS[optimizer])
    before, regrown = None, 0
    while run.at < 8:
        changed = run.step()
        masks = run.pruner.masks
        named = dict(run.model.named_parameters())
        for layer, mask in masks.items() if changed and before is not None else ():
            parameter = named.get(layer, named.get(layer + "_orig"))
            back = mask & ~before[layer]
            regrown += int(back.sum())
            assert bool((parameter[back] == 0).all())
            state = run.optimizer.state[parameter]
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                    assert bool((value[back] == 0).all()), key
        before = masks
    assert regrown > 0


def test_a_weight_that_came_back_learns(backend, device):
    run = Run(build("plain", device), nets.dynamic(), backend)
    run.step()
    before = run.pruner.masks
    run.train(2)
    back = {n: m & ~before[n] for n, m in run.pruner.masks.items()}
    run.train(1)
    still = {n: b & run.pruner.masks[n] for n, b in back.items()}
    grown = [read(run.model, n)[b] for n, b in still.items()]
    assert any(bool((w != 0).any()) for w in grown)


# The order of parameters.


def test_optimizer_state_is_not_swapped_when_loaded_by_position(backend, device):
    run = Run(build("single_weight", device), backend=backend, optimizer=sgd).train(4)
    fresh = build("single_weight", device).model  # never pruned
    optimizer = sgd(fresh)
    optimizer.load_state_dict(run.optimizer.state_dict())
    theirs = dict(run.model.named_parameters())
    for name, parameter in fresh.named_parameters():
        held = theirs.get(name, theirs.get(name + "_orig"))
        assert torch.equal(
            optimizer.state[parameter]["momentum_buffer"],
            run.optimizer.state[held]["momentum_buffer"],
        )
    run.pruner.finalize()
    again = sgd(run.model)
    again.load_state_dict(run.optimizer.state_dict())
    for parameter in run.model.parameters():
        assert torch.equal(
            again.state[parameter]["momentum_buffer"],
            run.optimizer.state[parameter]["momentum_buffer"],
        )


# Gradients.


def test_gradients_of_pruned_weights_are_zero_outside_observe_and_dense_within(device):
    seen = {}

    def spy(weight, grad):
        seen.setdefault(tuple(weight.shape), []).append(grad.clone())
        return grad.abs()

    method = Vote(0.7, saliency=spy, schedule=Cubic(0, 100, 1))
    run = Run(build("plain", device), method).train(40)
    seen.clear()
    run.optimizer.zero_grad()
    losses = run.losses()
    sum(losses.values()).backward()
    lin, mask = run.model.trunk[0], run.pruner.masks["trunk.0.weight"]
    assert bool((lin.weight_orig.grad[~mask] == 0).all())
    assert bool((lin.weight_orig.grad[mask] != 0).any())
    [a, b] = seen[(8, 6)]
    assert bool((a[~mask] != 0).any())
    torch.testing.assert_close((a + b)[mask], lin.weight_orig.grad[mask])


@pytest.mark.slow
def test_inplace_and_prune_see_the_same_dense_gradient(device):
    def scores(backend):
        method = Vote(0.7, saliency=saliency.gradient, schedule=Cubic(0, 100, 1))
        run = Run(build("checkpointed", device), method, backend).train(40)
        run.losses()
        return checkpoints.scores(run.pruner)

    one, other = scores("prune"), scores("inplace")
    assert list(one) == list(other)
    for task in one:
        assert list(one[task]) == list(other[task])
        for name in one[task]:
            torch.testing.assert_close(one[task][name], other[task][name], rtol=1e-3, atol=1e-5)


def test_per_example_gradients_of_a_pruned_layer_can_be_had(backend, device):
    net = build("plain", device)
    run = Run(net, backend=backend).train(2)
    parameters = {n: p.detach() for n, p in run.model.named_parameters()}
    buffers = dict(run.model.named_buffers())
    batch = net.make_batch(0)

    def loss(parameters, x):
        out = torch.func.functional_call(run.model, (parameters, buffers), (x[None],))
        return out["a"].sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch["x"])
    key = "trunk.0.weight" + ("_orig" if backend == "prune" else "")
    mask = run.pruner.masks["trunk.0.weight"]
    assert each[key].shape == (16, 8, 6)
    if backend == "prune":
        assert bool((each[key][:, ~mask] == 0).all())


def test_fused_attention_and_plain_linear_agree(backend, device):
    """`out_proj` is read, not called: its mask must count all the same."""
    run = Run(build("attention", device), backend=backend).train(3)
    attention = run.model.trunk.attention
    x = run.net.make_batch(3)["x"]
    w, b = attention.in_proj_weight, attention.in_proj_bias
    q, k, v = F.linear(x, w, b).chunk(3, -1)
    split = lambda t: t.unflatten(-1, (2, 4)).transpose(1, 2)  # noqa: E731
    mixed = F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).flatten(2)
    mask = run.pruner.masks["trunk.attention.out_proj.weight"]
    out = attention.out_proj
    expected = F.linear(mixed, out.weight * mask, out.bias)
    torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], expected)


# Compilers.


# Dynamo itself instantiates every custom autograd function it traces.
DYNAMO = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning"
)


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield lambda model: torch.compile(model, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()


@pytest.mark.slow
@DYNAMO
@pytest.mark.parametrize("name", ["attention", "conv_bn", "tied", "read_not_called", "adapters"])
def test_a_compiled_model_is_pruned_as_a_plain_one(name, compiler, backend, device):
    method = Vote(0.7, schedule=Cubic(2, 8, 3), observations=2)
    run = Run(build(name, device), method, backend, wrap=compiler)
    twin = Run(build(name, device), method, backend)
    for _ in range(10):
        assert run.step() == twin.step()
        for layer, mask in run.pruner.masks.items():
            for alias in run.named[layer]:
                assert bool((read(run.model, alias)[~mask] == 0).all())
    assert nets.zeros(run.pruner.masks) == round(0.7 * nets.size(run.pruner.masks))
    assert same(run.pruner.masks, twin.pruner.masks)
    one, other = weights(run), weights(twin)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@DYNAMO
def test_a_graph_that_frees_its_buffers_is_refused_with_advice(device):
    torch._dynamo.reset()
    net = build("plain", device)
    run = Run(net, Vote(0.7, schedule=Cubic(3, 9, 3)), wrap=compiled)
    with (
        torch._functorch.config.patch(donated_buffer=True, enable_autograd_cache=False),
        pytest.raises(RuntimeError, match="donated_buffer = False before compiling"),
    ):
        run.train(8)
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def test_the_masked_weight_keeps_the_memory_format_of_the_weight(backend, device):
    run = Run(build("channels_last", device), backend=backend).train(3)
    convolutions = [m for m in run.model.modules() if isinstance(m, nn.Conv2d)]
    seen = []
    for module in convolutions:
        module.register_forward_pre_hook(
            lambda m, _: seen.append(m.weight.is_contiguous(memory_format=torch.channels_last))
        )
    run.forward()
    assert len(seen) == len(convolutions) > 0
    assert all(seen)
