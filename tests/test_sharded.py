"""FSDP2: a model that `fully_shard` spreads over ranks is pruned as one process would prune it."""

from typing import Any

import pytest
import torch

from mtprune import (
    Block,
    Cubic,
    Head,
    Neuron,
    OneShot,
    PerTaskKeep,
    Refit,
    Regrow,
    SoftThreshold,
    Vote,
    recipes,
    saliency,
    votes,
)
from mtprune.weighting import PruningSensitivity
from tests.ranks import on_ranks
from tests.sharded import Encoder, Loop, Net, quiet, shard, whole

pytestmark = pytest.mark.slow

STEPS = 9
RISE = Cubic(begin=1, end=7, every=2)


def soft(**options: Any) -> SoftThreshold:
    return SoftThreshold(0.7, schedule=RISE, **options)


METHODS = {
    "floor": lambda: Vote(0.7, schedule=RISE),
    "global, mean": lambda: Vote(0.7, schedule=RISE, vote=votes.mean, allocation="global"),
    "erk, majority": lambda: Vote(0.7, schedule=RISE, vote=votes.majority, allocation="erk"),
    "uniform, joint": lambda: Vote(
        0.7, schedule=RISE, allocation="uniform", disentangled=False, observations=2
    ),
    "components": lambda: Vote(0.7, schedule=RISE, allocation={"a": 0.5}, priority={"b": 2.0}),
    "voters": lambda: Vote(0.7, schedule=RISE, voters=(saliency.magnitude,)),
    "per task": lambda: Vote(PerTaskKeep(0.3), schedule=RISE),
    "stable": lambda: Vote(0.7, schedule=OneShot(6), observations="auto"),
    "regrow": lambda: Vote(0.7, allocation="erk", schedule=Regrow(every=2, end=6)),
    "regrow in layers": lambda: Vote(
        0.7, allocation="uniform", schedule=Regrow(every=2, end=6, within="layer")
    ),
    "movement": lambda: recipes.movement(0.7, 8),
    "refit": lambda: Vote(0.6, schedule=RISE, refit=Refit(samples=1000)),
    "soft": soft,
    "soft, by counts": lambda: soft(control="pi", debias=True),
    "soft, weighed": lambda: soft(
        per="layer", allocation={"a": 0.4}, weighting=PruningSensitivity()
    ),
    "soft, learned": lambda: soft(allocation="learned"),
    "blocks": lambda: Vote(0.6, granularity=Block(2, 2), schedule=RISE),
    "units": lambda: Vote(0.4, granularity=(Head(), Neuron()), schedule=RISE),
}
NETS = {"units": Encoder}


def trained(name: str, rank: int, world: int, **options: Any) -> dict[str, Any]:
    loop = Loop(METHODS[name](), rank, world, kind=NETS.get(name, Net), **options)
    masks = []
    for _ in range(STEPS):
        loop.step()
        masks.append(loop.masks())
    return told(loop, masks)


def told(loop: Loop, masks: Any) -> dict[str, Any]:
    pruner = loop.pruner
    wishes = {
        task: {name: whole(mask) for name, mask in of.items()}
        for task, of in pruner.task_masks.items()
    }
    return {
        "masks": masks,
        "wishes": wishes,
        "weights": loop.weights(),
        "sparsity": pruner.sparsity,
        "rows": [(r.name, r.parameters, r.kept, str(r.want)) for r in pruner.report().layers],
    }


# How a model is spread, and what else may differ from the plain loop.
WAYS: dict[str, dict[str, Any]] = {
    "pruner first": {"late": True},
    "no optimizer": {"optimizer": False},
    "never gathered twice": {"spread": lambda net: shard(net, reshard_after_forward=False)},
    "root alone": {"spread": lambda net: shard(net, blocks=False)},
    "checkpointed": {"checkpointed": True},
    "scores on the CPU": {"score_device": "cpu", "score_dtype": torch.bfloat16},
}


def every_method(rank: int, world: int) -> dict[str, Any]:
    quiet()
    return {
        **{name: trained(name, rank, world) for name in METHODS},
        **{way: trained("floor", rank, world, **options) for way, options in WAYS.items()},
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: Any) -> list[Any]:
    return on_ranks(__name__, "every_method", tmp_path_factory.mktemp("two"))


def check_same(found: Any, alone: Any, *, weights: float = 1e-9) -> None:
    for step, (mine, theirs) in enumerate(zip(found["masks"], alone["masks"], strict=True)):
        for name, mask in theirs.items():
            assert torch.equal(mine[name], mask), f"{name} at step {step}"
    assert found["rows"] == alone["rows"]
    assert found["sparsity"] == alone["sparsity"]
    for task, of in alone["wishes"].items():
        assert all(torch.equal(found["wishes"][task][name], mask) for name, mask in of.items())
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=weights)


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_decide_as_one_process_with_the_whole_batch(name: str, two: list[Any]) -> None:
    alone = trained(name, 0, 1, spread=None)
    first, second = (result[name] for result in two)
    assert first["sparsity"] > 0.2
    # Learned offsets look at the sizes of gradients before ranks add theirs up.
    rough = {"soft, learned": 1e-2, "soft, by counts": 1e-6}
    check_same(first, alone, weights=rough.get(name, 1e-6))
    check_same(second, first)


@pytest.mark.parametrize("way", WAYS)
def test_however_a_model_is_spread(way: str, two: list[Any]) -> None:
    options = {k: v for k, v in WAYS[way].items() if k.startswith("score")}
    alone = trained("floor", 0, 1, spread=None, **options)
    check_same(two[0][way], alone)
    check_same(two[1][way], two[0][way])
