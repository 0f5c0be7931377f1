"""The suite for votes, saliencies and methods: what is broken is named, what is ours passes."""

import re
from dataclasses import dataclass, replace

import pytest
import torch

from mtprune import (
    NM,
    Block,
    Cubic,
    Hold,
    LowRank,
    PerTaskKeep,
    Regrow,
    SigmoidThreshold,
    SoftThreshold,
    Vote,
    recipes,
    saliency,
    testing,
    votes,
)
from mtprune.holding import MaskHold
from mtprune.holding.inplace import InplaceMasking
from mtprune.methods import Needs
from mtprune.statistics import PerWeight
from mtprune.testing import NETS, methods
from tests import nets as shelf
from tests import test_pruner
from tests.long import LONG

SOON = Cubic(begin=1, end=5, every=2)
PLAIN = {"trunk_with_heads": NETS["trunk_with_heads"]}


# Votes.


def test_a_vote_may_round():
    testing.check_vote(lambda percentiles: percentiles.mean(dim=0))
    testing.check_vote(lambda percentiles: 1 - (1 - percentiles.float()).prod(dim=0))


def zeroed(percentiles):
    percentiles[0] = 0.0
    return percentiles.amax(dim=0)


NO_VOTES = {
    "falls": (lambda p: -p.amax(dim=0), "falls where a percentile rises, with 1 voter."),
    "falls in company": (
        lambda p: p.amax(dim=0) - 0.1 * (p.amin(dim=0) if len(p) > 1 else 0),
        "falls where a percentile rises, with 2 voters.",
    ),
    "over weights": (lambda p: p.amax(dim=1), "must turn (1, 400) into (400,). Got (1,)."),
    "with values and indices": (lambda p: p.max(dim=0), "into (400,). Got max."),
    "first": (lambda p: p[0], "depends on the order of the rows, with 2 voters."),
    "in relation": (lambda p: p.amax(dim=0) / p.max(), "on a weight depends on other weights"),
    "writes": (zeroed, "writes into the percentiles, with 1 voter."),
    "infinite": (lambda p: (p / (1 - p.ceil())).amax(dim=0), "is not finite, with 1 voter."),
    "absolute": (
        lambda p: p.amax(dim=0).clamp_min(0.5) if len(p) == 1 else p.amax(dim=0),
        "does not follow a voter that is alone.",
    ),
}


@pytest.mark.parametrize("name", NO_VOTES)
def test_what_is_no_vote_is_told_why(name):
    vote, message = NO_VOTES[name]
    with pytest.raises(AssertionError, match=re.escape(message)):
        testing.check_vote(vote)


# Saliencies.


def wanda(weight, grad=None, *, inputs):
    return weight.abs() * inputs.norm(dim=0).view(weight[:1].shape)


def named(weight, grad, layer, task, generator):
    noise = torch.rand(layer.shape, generator=generator)
    return (weight * grad).abs() + noise * (task == "a")


@pytest.mark.parametrize(
    "function",
    [
        *(getattr(saliency, n) for n in saliency.__all__ if n.islower() and n != "asks"),
        wanda,
        named,
    ],
    ids=lambda function: function.__name__,
)
def test_our_saliencies_are_saliencies(function):
    testing.check_saliency(function)


NO_SALIENCIES = {
    "sums": (lambda w, g: w.abs().sum(), "weights (4, 3) must be of that shape. Got ()."),
    "number": (lambda w, g: 1.0, "weights (4, 3) must be of that shape. Got float."),
    "flat": (lambda w, g: (w * g).flatten(), "weights (4, 3) must be of that shape. Got (12,)."),
    "draws": (lambda w, g: torch.rand_like(w), "weights (4, 3) differs from call to call."),
    "weight": (lambda w, g: g.abs() / w, "is not finite where weight are zero."),
    "gradient": (lambda w, g: (w / g).abs(), "is not finite where grad are zero."),
    "inputs": (lambda w, g, inputs: w / inputs.norm(), "is not finite where inputs are zero."),
    "writes": (lambda w, g: w.mul_(g).abs_(), "writes into what it is given."),
    "of matrices": (lambda w, g: w * g.norm(dim=1), "The size of tensor a"),
}


@pytest.mark.parametrize("name", NO_SALIENCIES)
def test_what_is_no_saliency_is_told_why(name):
    function, message = NO_SALIENCIES[name]
    error = RuntimeError if name == "of matrices" else AssertionError  # its own says enough
    with pytest.raises(error, match=re.escape(message)):
        testing.check_saliency(function)


# Methods that are broken in one way.


@dataclass(frozen=True)
class Edited(Vote):
    """A vote whose masks are changed afterwards."""

    def decide(self, ballot, step):
        decision = super().decide(ballot, step)
        return replace(decision, masks=self.edit(list(decision.masks), step))


class OneMore(Edited):
    def edit(self, masks, step):
        first = masks[0].clone()
        first[int(first.nonzero()[0])] = False
        return [first, *masks[1:]]


class Elsewhere(Edited):
    """As many weights as were asked for, at another place each time."""

    def edit(self, masks, step):
        return [mask.roll(step) for mask in masks]


class Moody(Edited):
    """Remembers in itself how often it was asked."""

    def edit(self, masks, step):
        object.__setattr__(self, "asked", getattr(self, "asked", 0) + 1)
        return [mask.roll(self.asked % 7) for mask in masks]


@dataclass(frozen=True)
class Held(Vote):
    """A vote whose masks are held otherwise."""

    of: type = MaskHold

    def hold(self, masks, optimizer):
        return self.of(masks)


class Lax(MaskHold):
    def enforce(self):
        """Let masked weights move."""


class Partial(MaskHold):
    """Looks at the back-end."""

    def take(self, layers, decision):
        if isinstance(self._masks, InplaceMasking):
            decision = replace(decision, masks=[mask.roll(1) for mask in decision.masks])
        return super().take(layers, decision)


class Forgetful(MaskHold):
    """Its checkpoint has no masks."""

    def state_dict(self):
        return {"masks": {}}


class Parting(MaskHold):
    """Changes weights as it lets go."""

    def release(self):
        layer = self._layers[0] if self._layers else None
        super().release()
        if layer is not None:
            layer.parameter.data += 1


class Sticky(MaskHold):
    """Leaves a hook behind."""

    def take(self, layers, decision):
        layers[0].places[0][0].register_forward_hook(lambda *_: None)
        return super().take(layers, decision)


class Leaving(PerWeight):
    """Leaves a trace where it looks."""

    def of(self, seen):
        LEAVE[self.saliency](seen.layer.parameter)
        return super().of(seen)


def in_grad(weight, grad):
    return weight * grad


def in_weights(weight, grad):
    return weight * grad


def in_hooks(weight, grad):
    return weight * grad


LEAVE = {
    in_grad: lambda p: setattr(p, "grad", torch.ones_like(p)),
    in_weights: lambda p: p.data.mul_(1.01),
    in_hooks: lambda p: p.register_hook(lambda grad: None),
}


@dataclass(frozen=True)
class Looks(Vote):
    def needs(self, inventory):
        return Needs({"saliency": Leaving(self.saliency)})


BROKEN = {
    "one weight off": (
        OneMore(0.7),
        testing.check_exact_count,
        r"'trunk_with_heads', backend 'prune': 147 of 208 parameters are pruned, not 146\.",
    ),
    "masks not enforced": (
        Held(0.7, of=Lax),
        testing.check_exact_count,
        r"masked weights of 'trunk\.0\.weight' are not zero\.",
    ),
    "weights come back": (
        Elsewhere(0.7, schedule=SOON),
        testing.check_nesting,
        r"backend 'prune': weights of 'trunk\.0\.weight' come back in step 5\.",
    ),
    "looks at the back-end": (
        Held(0.7, of=Partial),
        testing.check_backends_agree,
        r"'trunk_with_heads': back-ends have different masks in step 1\.",
    ),
    "hidden state": (
        Moody(0.7, schedule=SOON),
        testing.check_resume,
        r"backend 'prune': the (model|optimizer|pruner) differs resumed at step 0, where ",
    ),
    "masks not in the checkpoint": (
        Held(0.7, schedule=SOON, of=Forgetful),
        testing.check_resume,
        r"the pruner's own state of step [2-5] is refused\. .*'hold\.masks' must keep 38 weights",
    ),
    "writes .grad": (
        Looks(0.7, in_grad),
        testing.check_observe_leaves_no_trace,
        r"observe\(\) changes `\.grad` in step 0\.",
    ),
    "writes weights": (
        Looks(0.7, in_weights),
        testing.check_observe_leaves_no_trace,
        r"observe\(\) changes parameters in step 0\.",
    ),
    "leaves a hook on a weight": (
        Looks(0.7, in_hooks),
        testing.check_observe_leaves_no_trace,
        r"observe\(\) changes hooks in step 0\.",
    ),
    "changes weights at the end": (
        Held(0.7, of=Parting),
        testing.check_finalize,
        r"after finalize\(\) in step 1 the outputs differ\.",
    ),
    "leaves a hook on a module": (
        Held(0.7, of=Sticky),
        testing.check_finalize,
        r"after finalize\(\) in step 1 the hooks differ from those before pruning\.",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_method_is_told_what_is_wrong(how):
    method, check, message = BROKEN[how]
    with pytest.raises(AssertionError, match=message):
        check(method, nets=PLAIN)
    with pytest.raises(AssertionError):  # of several things that are wrong the first is told
        testing.check_method(method, nets=PLAIN)


def test_an_update_that_never_comes_is_told(monkeypatch):
    monkeypatch.setattr(methods, "_PATIENCE", 3)
    method = Vote(0.7, observations=9)
    with pytest.raises(AssertionError, match=r"the update of step 0 is never made\."):
        testing.check_nesting(method, nets=PLAIN)


class Never:
    def next_update(self, after):
        return None

    def progress(self, step):
        return 1.0


def test_a_schedule_without_updates_is_told():
    with pytest.raises(AssertionError, match=r"The schedule has no update\."):
        testing.check_nesting(Vote(0.7, schedule=Never()), nets=PLAIN)


def test_another_sparsity_may_be_expected():
    with pytest.raises(AssertionError, match=r"104 of 208 parameters are pruned, not 125\."):
        testing.check_exact_count(Vote(granularity=NM(2, 4)), nets=PLAIN, sparsity=0.6)
    testing.check_exact_count(Vote(granularity=NM(2, 4)), nets=PLAIN, sparsity=0.5)


def test_nets_of_ones_own(device):
    mine = {name: lambda name=name: shelf.build(name, device) for name in ("lstm", "bfloat16")}
    testing.check_exact_count(lambda: Vote(0.7, schedule=SOON), nets=mine)


# Methods of ours.

RECIPES = {**test_pruner.RECIPES, "flop": lambda: recipes.flop(0.5, 6)}
FORMS = {
    "majority": lambda: Vote(0.7, vote=votes.majority, allocation="uniform", schedule=SOON),
    "joint": lambda: Vote(0.7, disentangled=False, priority={}, schedule=SOON),
    "prioritized": lambda: Vote(0.7, priority={"a": 2.0}, allocation="erk"),
    "published rule": lambda: Vote(PerTaskKeep(0.2)),
    "blocks": lambda: Vote(0.7, granularity=Block(2, 2), schedule=SOON, min_keep=0),
    "straight-through": lambda: Vote(
        0.7, schedule=Hold(SOON, until=7, every=1), straight_through=True
    ),
    "fixed": lambda: Vote(0.7, saliency=saliency.gradient, schedule=Regrow(2, 6), allocation="erk"),
    "learned thresholds": lambda: SoftThreshold(
        0.7, schedule=SOON, allocation="learned", weighting="pruning_sensitivity"
    ),
    "controlled thresholds": lambda: SoftThreshold(
        0.7, schedule=SOON, per="layer", grad_mode="anneal", control="pi"
    ),
    "ranks": lambda: LowRank(0.5, schedule=SOON, vote=votes.mean),
}
MOVING = {
    "disparse_dynamic",
    "rigl",
    "set_",
    "movement",
    "movement, joint",
    "adapmtl",
    "best, from scratch",
    "straight-through",
    "fixed",
    "learned thresholds",
    "controlled thresholds",
}
METHODS = {**RECIPES, **FORMS}


def cases():
    """Each method on two nets, in turn; a few of them in the fast loop."""
    names, found = list(NETS), []
    for place, name in enumerate(METHODS):
        for net, marks in (
            (names[place % len(names)], pytest.mark.slow),
            (names[(place + 3) % len(names)], LONG),
        ):
            fast = (name, net) in {("disparse_dynamic", "convolutions"), ("flop", "attention")}
            found.append(pytest.param(name, net, marks=() if fast else marks))
    return found


@pytest.mark.parametrize(("name", "net"), cases())
def test_our_methods_are_methods(name, net, device):
    on_device = {net: lambda: moved(NETS[net](), device)}
    testing.check_method(METHODS[name], nets=on_device, nested=name not in MOVING)


def moved(net, device):
    net.model.to(device)
    make_batch = net.make_batch
    net.make_batch = lambda step: {k: v.to(device) for k, v in make_batch(step).items()}
    return net


def test_the_published_thresholds_are_a_method_but_for_the_count():
    method = SigmoidThreshold(0.3, end=6, init=-2.0, lr=0.5)
    testing.check_backends_agree(method, nets=PLAIN)
    testing.check_resume(method, nets=PLAIN)
    testing.check_observe_leaves_no_trace(method, nets=PLAIN)
    testing.check_finalize(method, nets=PLAIN)
