"""Methods as JSON and back: all of them, equal, and nothing that is not known."""

import json
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

import mtprune
from mtprune import (
    METHODS,
    NM,
    Block,
    Channel,
    Cubic,
    Element,
    Erk,
    Expert,
    Floor,
    Grouped,
    Head,
    Hold,
    Linear,
    LowRank,
    Neuron,
    PerTaskKeep,
    Refit,
    Regrow,
    Rounds,
    SigmoidThreshold,
    SoftThreshold,
    Vote,
    method_from,
    notation,
    saliency,
    votes,
    weighting,
)
from mtprune.allocation import ByComponent, Global, PerOutput, Uniform
from mtprune.latency import Latency, Timetable
from mtprune.methods import describe
from mtprune.patterns import PATTERNS, Attention, FeedForward
from mtprune.structure import Argument, Group, Member
from mtprune.weighting import Noise, PruningSensitivity, Worst

IMAGE = torch.zeros(1, 3, 8, 8)
RISE = Cubic(begin=1, end=20, every=2)
GROUP = Group(
    "hidden",
    3,
    (Member("up.weight", 0, (0, 1, -1)), Member("down.weight", 1, (0, 1, 2), "in")),
    between="act",
    arguments=(Argument("attention", "slopes", 1, (0, 1, 2)),),
)
MINE = (
    Attention(
        "mine", "q.weight", "k.weight", "v.weight", "o.weight", "size", only=(("causal", 1),)
    ),
    FeedForward("mine", ("up.weight",), "down.weight"),
)

METHOD = {
    **{f"saliency {name}": Vote(0.5, saliency=getattr(saliency, name)) for name in (
        *("taylor", "taylor_magnitude", "snip", "fisher", "gradient", "movement"),
        *("magnitude", "lamp", "random", "wanda"),
    )},
    **{f"vote {name}": Vote(0.5, vote=getattr(votes, name)) for name in (
        *("unanimous", "intersection", "majority", "mean"),
    )},
    "vote at_least": Vote(0.5, vote=votes.at_least(2)),
    **{f"schedule {type(s).__name__}": Vote(0.5, schedule=s) for s in (
        *(mtprune.OneShot(at=3), Linear(0, 9, 3), RISE, Rounds(3)),
        Hold(RISE, until=30, every=5),
    )},
    "regrow": Vote(0.5, schedule=Regrow(5, 20, within="layer"), allocation="erk"),
    **{f"granularity {type(g).__name__}": Vote(0.5, granularity=g) for g in (
        *(Element(), Block(2, 2), NM(), Neuron(), Head(), Expert(), Channel(IMAGE)),
        Grouped([GROUP]),
    )},
    "tuple": Vote(0.5, granularity=(Head(patterns=(*PATTERNS, *MINE)), Neuron())),
    **{f"allocation {type(a).__name__}": Vote(0.5, allocation=a) for a in (
        *(Global(), Uniform(), Erk(0.5), Floor(0.3, of=Erk(2.0)), PerOutput()),
        ByComponent({"shared": 0.5, "type": 0.25}),
    )},
    "numbers": Vote(0.5, priority={"seg": 2, "type": 0.5}, observations="auto", min_keep=0),
    "components": Vote(0.5, allocation={"shared": 0.5, "function": 0.25}),
    "ratio": Vote(PerTaskKeep(0.3), disentangled=False),
    "macs": Vote(macs=0.5, granularity=Block(4, 1), example_inputs=IMAGE),
    "speedup": Vote(speedup=2, granularity=Channel(IMAGE)),
    "latency": Vote(latency=0.5, example_inputs=IMAGE),
    "timetable": Vote(
        latency=Latency(0.5, Timetable({"0.weight": [(0.1, 1), (1, 2.5)]}, 0.5, "units", "cpu", 2)),
        granularity=Neuron(),
    ),
    "refit": Vote(0.5, refit=Refit(7, 0.2, 3), voters=(saliency.magnitude, saliency.lamp)),
    "straight": Vote(0.5, straight_through=True, schedule=RISE, saliency=saliency.movement),
    **{f"weighting {getattr(w, '__name__', w)}": SoftThreshold(0.5, weighting=w) for w in (
        *("noise", Noise(3, 4), PruningSensitivity(0.5), Worst(reference={"seg": 0.5})),
        weighting.uniform,
    )},
    "thresholds": SoftThreshold(
        0.5, RISE, "layer", {"shared": 1.0}, budget_unit={"shared": 0.5}, max_sparsity={"seg": 0.9}
    ),
    "threshold macs": SoftThreshold(0.5, budget_unit="macs", example_inputs=IMAGE),
    "sigmoid": SigmoidThreshold(0.5, end=9, init=-15.0),
    "rank": LowRank(0.5, vote=votes.mean, budget_unit="macs", example_inputs=IMAGE),
    "gates": LowRank(0.5, "learned", schedule=RISE, rate=float("inf")),
    **{f"named {name}": make(0.8, 200) for name, make in METHODS.items()},
}  # fmt: skip


def through_json(method, **known):
    return json.loads(json.dumps(method.to_dict(**known), allow_nan=False))


@pytest.mark.parametrize("name", METHOD)
def test_a_method_comes_back_equal(name):
    method = METHOD[name]
    data = through_json(method)
    back = method_from(data, example_inputs=IMAGE)
    assert back == method
    assert describe(back) == describe(method)  # so that a checkpoint of one is one of the other
    assert getattr(back, "example_inputs", None) is getattr(method, "example_inputs", None)
    assert through_json(back) == data


def test_every_value_and_function_of_the_package_is_tried():
    said = json.dumps([method.to_dict() for method in METHOD.values()])
    assert [name for name in notation._types() if f'"type": "{name}"' not in said] == []
    assert [name for name in notation._functions() if f'"function": "{name}"' not in said] == []


def test_what_it_looks_like():
    method = Vote(0.9, vote=votes.at_least(2), schedule=RISE, voters=(saliency.magnitude,))
    data = method.to_dict()
    assert data == {
        "format": 1,
        "type": "Vote",
        "sparsity": 0.9,
        "saliency": {"function": "saliency.taylor"},
        "vote": {"function": "votes.at_least", "m": 2},
        "schedule": {"type": "Cubic", "begin": 1, "end": 20, "every": 2},
        "granularity": {"type": "Element"},
        "allocation": "floor",
        "priority": {},
        "observations": 1,
        "disentangled": True,
        "min_keep": 1,
        "straight_through": False,
        "macs": None,
        "speedup": None,
        "refit": None,
        "voters": [{"function": "saliency.magnitude"}],
        "latency": None,
    }
    assert method_from(data) == method


def test_what_an_older_version_did_not_write_is_as_it_was():
    data = Vote(0.9).to_dict()
    del data["voters"], data["refit"], data["latency"]
    assert method_from(data) == Vote(0.9)


def test_at_least_equals_another_of_the_same_number():
    assert votes.at_least(2) == votes.at_least(2) != votes.at_least(3)
    assert len({votes.at_least(2), votes.at_least(2), votes.at_least(3)}) == 2
    assert votes.at_least(2) != partial(votes.mth_smallest, m=2)


# What is yours.


def energy(weight, grad):
    return (weight * grad).square()


@dataclass(frozen=True)
class TwoCuts:
    first: int = 100

    def next_update(self, after):
        return next((step for step in (self.first, 200) if step > after), None)

    def progress(self, step):
        return 0.5 if step < 200 else 1.0


class Once:
    def next_update(self, after):
        return 0 if after < 0 else None

    def progress(self, step):
        return 1.0


@dataclass(frozen=True)
class Mine(Vote):
    pass


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            Vote(0.5, saliency=energy),
            r"`saliency` is energy, which is not of this package, and JSON holds no code. Give it "
            r"a name, here and where it is read: to_dict\(own=\{'energy': energy\}\), "
            r"mtprune.method_from\(data, own=\{'energy': energy\}\)\.",
        ),
        (Vote(0.5, vote=lambda p: p.amax(0)), r"`vote` is <lambda>.*own=\{'mine': \.\.\.\}"),
        (Vote(0.5, saliency=partial(energy)), r"`saliency` is a partial, .*'partial': \.\.\."),
        (Vote(0.5, schedule=TwoCuts()), r"`schedule` is a TwoCuts, .*'TwoCuts': TwoCuts"),
        (Vote(0.5, schedule=Once()), r"`schedule` is a Once, .*'Once': \.\.\."),
        (Vote(0.5, schedule=Hold(Once(), 9, 3)), r"`schedule\.schedule` is a Once"),
        (Mine(0.5), r"This method is a Mine, .*'Mine': Mine"),
        (
            Vote(0.5, voters=(saliency.lamp, lambda weight, grad=None: weight)),
            r"`voters\[1\]` is <lambda>",
        ),
        (Vote(0.5, allocation={"type": 0.5, 3: 0.5}), r"`allocation` has the key 3, which JSON"),
    ],
)
def test_what_is_yours_is_refused_by_name(method, message):
    with pytest.raises(ValueError, match=message):
        method.to_dict()


@pytest.mark.parametrize(
    ("method", "own"),
    [
        (Vote(0.5, saliency=energy), {"energy": energy}),
        (Vote(0.5, schedule=TwoCuts(50)), {"TwoCuts": TwoCuts}),
        (Vote(0.5, schedule=Hold(TwoCuts(50), 300, 10)), {"TwoCuts": TwoCuts}),
        (Mine(0.5, voters=(saliency.lamp,)), {"Mine": Mine}),
        (Vote(0.5, schedule=(once := Once())), {"once": once}),
    ],
)
def test_what_is_yours_has_the_name_that_you_give_it(method, own):
    data = through_json(method, own=own)
    assert method_from(data, own=own) == method
    (name,) = own
    with pytest.raises(
        ValueError, match=rf"has '{name}', which is neither .*own=\{{'{name}': \.\."
    ):
        method_from(data)


def test_a_name_of_the_package_is_taken():
    with pytest.raises(ValueError, match=r"`own` names 'Cubic', which this package has"):
        Vote(0.5).to_dict(own={"Cubic": TwoCuts})
    with pytest.raises(TypeError, match=r"`own` must be a mapping name -> function"):
        Vote(0.5).to_dict(own=[energy])


# What is refused.


def changed(**parts):
    return {**Vote(0.5).to_dict(), **parts}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"This method: it must be a mapping that has 'format'"),
        ({"type": "Vote"}, r"must be a mapping that has 'format'"),
        (changed(format=2), r"has format 2, and this version of mtprune reads 1\. Update mtprune"),
        (changed(type="Quorum"), r"has 'Quorum', which is neither of this version of mtprune nor"),
        (changed(schedule={"type": "Cosine"}), r"has 'Cosine', which is neither"),
        (changed(saliency={"function": "os.system"}), r"has 'os.system', which is neither"),
        (changed(saliency={"function": "saliency.asks"}), r"has 'saliency.asks', which is neither"),
        (changed(saliency={"function": "saliency.lamp", "p": 2}), r"must have none of \['p'\]"),
        (changed(vote={"function": "votes.at_least"}), r"must have \['m'\] besides"),
        (changed(vote={"function": "votes.at_least", "m": 0}), r"'vote.m' must be a whole number"),
        (changed(quorum=3), r"must have none of \['quorum'\].*newer mtprune has written needs"),
        (
            changed(schedule={"type": "Cubic", "end": 3}),
            r"'schedule' must have \['begin', 'every'\]",
        ),
        (changed(sparsity=2.0), r"has a Vote that cannot be: `sparsity` must be in \[0, 1\)"),
        (
            changed(schedule={"type": "Erk"}),
            r"a Vote that cannot be: `schedule` must be a schedule",
        ),
        (changed(schedule={"number": "pi"}), r"'schedule.number' must be one of"),
        (
            changed(allocation={"type": "ByComponent", "sparsities": 3}),
            r"a ByComponent that cannot",
        ),
        ({"format": 1, "type": "Erk"}, r"'type' must be a method such as 'Vote'"),
        (changed(priority={"seg": torch}), r"'priority.seg' must be made of containers"),
        (changed(schedule={"argument": "example_inputs"}), r"'schedule' must be no argument"),
        (changed(example_inputs={"argument": "x"}), r"'example_inputs.argument' must be one of"),
        (changed(example_inputs=[1.0]), r"'example_inputs' must be a mapping"),
        (changed(priority={"seg": 10**400}), r"'priority.seg' must be a finite number"),
        (
            METHOD["speedup"].to_dict(),
            r"was made with `example_inputs`, which are no part of it. Pass "
            r"method_from\(data, example_inputs=...\)",
        ),
    ],
)
def test_what_is_no_method_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        method_from(data)


def test_nesting_has_an_end():
    inner = {"type": "OneShot"}
    for _ in range(100):
        inner = {"type": "Hold", "schedule": inner, "until": 9, "every": 1}
    data = changed(schedule=inner)
    with pytest.raises(ValueError, match="must not lie deeper than in 32 containers"):
        method_from(data)


# Methods by name.


def test_methods_by_name_prune_what_was_asked_in_the_time_that_was_given():
    for name, make in METHODS.items():
        for steps in (1, 10, 2_000):
            method = make(0.8, steps)
            assert method.sparsity == (0.0 if name == "dense" else 0.8), name
            updates = [step for step in range(-1, steps) if method.schedule.next_update(step)]
            last = max((method.schedule.next_update(step) for step in updates), default=0)
            assert name == "dense" or last <= max(steps, 3), (name, steps)


def test_methods_by_name_are_the_recipes():
    assert set(mtprune.recipes.__all__) <= set(METHODS)
    assert METHODS["lamp"](0.9, 5) == mtprune.recipes.lamp(0.9)
    assert METHODS["best"](0.9, 5) == mtprune.recipes.best(0.9)
    assert METHODS["best_joint"](0.9, 5) == replace(mtprune.recipes.best(0.9), disentangled=False)
    assert METHODS["joint"](0.9, 2_000).schedule == Cubic(begin=1, end=1_000, every=99)
    assert METHODS["rigl"](0.9, 2_000).schedule == Regrow(every=25, end=1_500)
