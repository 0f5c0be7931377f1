"""FSDP2: a model that `fully_shard` spreads over ranks is pruned as one process would prune it."""

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import mtprune
from mtprune import (
    Block,
    Cubic,
    Head,
    LowRank,
    Neuron,
    OneShot,
    PerTaskKeep,
    Refit,
    Regrow,
    Rounds,
    SoftThreshold,
    Vote,
    recipes,
    saliency,
    votes,
)
from mtprune.integrations.dcp import PrunerState
from mtprune.weighting import PruningSensitivity
from tests.ranks import device_of, on_ranks
from tests.sharded import (
    SCATTER,
    TASKS,
    Encoder,
    Loop,
    Net,
    batch,
    losses,
    quiet,
    shard,
    watched,
    whole,
)

pytestmark = pytest.mark.slow

STEPS = 7
RISE = Cubic(begin=1, end=5, every=2)


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
    "stable": lambda: Vote(0.97, schedule=OneShot(5), observations="auto"),
    "regrow": lambda: Vote(0.7, allocation="erk", schedule=Regrow(every=2, end=6)),
    "regrow in layers": lambda: Vote(
        0.7, allocation="uniform", schedule=Regrow(every=2, end=6, within="layer")
    ),
    "movement": lambda: recipes.movement(0.7, 6),
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


def compiled_blocks(net: Any) -> Any:
    for layer in net.trunk:
        layer.compile(backend="aot_eager")
    return shard(net)


# How a model is spread, and what else may differ from the plain loop.
WAYS: dict[str, dict[str, Any]] = {
    "pruner first": {"late": True},
    "no optimizer": {"optimizer": False},
    "never gathered twice": {"spread": lambda net: shard(net, reshard_after_forward=False)},
    "root alone": {"spread": lambda net: shard(net, blocks=False)},
    "checkpointed": {"checkpointed": True},
    "compiled, then sharded": {"spread": compiled_blocks},
    "sharded, then compiled": {"spread": lambda n: torch.compile(shard(n), backend="aot_eager")},
    "scores on the CPU": {"score_device": "cpu", "score_dtype": torch.bfloat16},
}


def every_method(rank: int, world: int) -> dict[str, Any]:
    return {
        **{name: trained(name, rank, world) for name in METHODS},
        **{way: trained("floor", rank, world, **options) for way, options in WAYS.items()},
    }


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
    assert first["sparsity"] > 0
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


# What needs a run of its own.


def narrow(rank: int, world: int) -> dict[str, Any]:
    """Mixed precision: bfloat16 weights in the forward, float32 ones in the optimizer."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    spread = (lambda net: shard(net, mp_policy=policy)) if world > 1 else None
    found = {}
    for name in ("floor", "soft", "movement"):
        loop = Loop(METHODS[name](), rank, world, spread=spread, dtype=torch.float32)
        loop.train(STEPS)
        found[name] = {
            "masks": loop.masks(),
            "weights": loop.weights(),
            "sparsity": loop.pruner.sparsity,
        }
    return found


def accumulated(rank: int, world: int, scored: bool) -> dict[str, Any]:
    """Two micro-batches to a step, of which the first keeps its gradient on its rank."""
    net = shard(Net().double().to(device_of(rank)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    method = Vote(0.0 if scored else 0.5, schedule=RISE if scored else OneShot(100))
    pruner = mtprune.MultitaskPruner(
        net, TASKS, "trunk", method=method, optimizer=optimizer, backend="inplace"
    )
    for step in range(6):
        for micro in range(2):
            net.set_requires_gradient_sync(micro == 1)
            found = losses(net(batch(10 * step + micro, rank, world)))
            pruner.observe_losses(found)
            sum(found.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    return {name: whole(p) for name, p in net.named_parameters()}


class Wide(nn.Module):
    """Layers much larger than a histogram."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.ModuleList([nn.Linear(6, 600), nn.Linear(600, 600), nn.Linear(600, 5)])
        self.heads = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(5, 1)})
        self.checkpointed = checkpointed

    forward = Net.forward


def sent(rank: int, world: int) -> dict[str, Any]:
    found = {}
    methods = ("floor", "global, mean", "soft", "movement")
    for name in methods:
        loop = Loop(METHODS[name](), rank, world, kind=Wide, dtype=torch.float32)
        loop.step()
        with watched() as messages:
            loop.train(7)
        found[name] = messages
        if name == "floor":
            masks = loop.masks()
    return {"sent": found, "wide": masks}


def alone_again(rank: int, world: int) -> dict[str, Any]:
    """What a finalized model is, gathered on the first rank for `compress`."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    loop = Loop(METHODS["units"](), rank, world, kind=Encoder, dtype=torch.float32).train(STEPS)
    loop.pruner.finalize()
    try:
        mtprune.compress(loop.net, torch.randn(4, 6))
        refused = ""
    except ValueError as error:
        refused = str(error)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(loop.net, options=options)
    found: dict[str, Any] = {"refused": refused, "sparsity": loop.pruner.sparsity}
    found["report"] = sum(row.kept for row in loop.pruner.report().layers)
    found["kept"] = sum(int(mask.sum()) for mask in loop.masks().values())
    if rank == 0:
        plain = Encoder()
        plain.load_state_dict(state)
        small = mtprune.compress(plain, torch.randn(4, 6))
        found["smaller"] = sum(p.numel() for p in small.parameters())
        found["before"] = sum(p.numel() for p in plain.parameters())
    return found


def refusals(rank: int, world: int) -> dict[str, str]:
    told = {}

    def attempt(name: str, what: Any) -> None:
        try:
            what()
            told[name] = ""
        except (ValueError, RuntimeError) as error:
            told[name] = str(error)

    attempt("backend", lambda: Loop(Vote(0.5), rank, world, backend="prune"))
    late = Loop(Vote(0.5), rank, world, backend="prune", late=True)
    attempt("backend, late", late.step)
    attempt("lamp", lambda: Loop(Vote(0.5, saliency=saliency.lamp), rank, world))
    attempt("random", lambda: Loop(Vote(0.5, saliency=saliency.random), rank, world))
    attempt("ranks", lambda: Loop(LowRank(0.5), rank, world))
    attempt("pattern", lambda: Loop(Vote(granularity=mtprune.NM(1, 3)), rank, world))
    costs = SoftThreshold(0.5, budget_unit="macs", example_inputs=torch.randn(2, 6).double())
    attempt("macs", lambda: Loop(costs, rank, world))
    attempt(
        "part",
        lambda: Loop(Vote(0.5), rank, world, spread=lambda n: shard(n.trunk[0], blocks=False)),
    )

    def by_columns(net: Any) -> Any:
        from torch.distributed.tensor import Shard

        return shard(net, shard_placement_fn=lambda p: Shard(1) if p.shape[-1] == 6 else None)

    attempt("columns", lambda: Loop(Vote(0.5), rank, world, spread=by_columns))
    loop = Loop(Vote(0.5), rank, world)
    found = losses(loop.net(batch(0, rank, world)))
    attempt("fold", lambda: loop.pruner.observe_losses(found, fold=True))
    if world > 1:
        attempt("tasks", lambda: loop.pruner.observe_losses({TASKS[rank]: found[TASKS[rank]]}))
        own = {"a": found["a"], "b": found["b"] if rank else found["a"] * 1.0}
        attempt("graphs", lambda: loop.pruner.observe_losses(own))
        spoilt = {"a": found["a"], "b": found["b"] * (float("inf") if rank else 1.0)}
        loop.pruner.observe_losses(spoilt)
        attempt("finite", loop.pruner.step)
    return told


def rounds(rank: int, world: int) -> Any:
    """`prune`, from batches, with nothing trained: what is gathered must not go stale."""
    loop = Loop(
        Vote(0.6, schedule=Rounds(3), saliency=saliency.magnitude),
        rank,
        world,
        spread=shard if world > 1 else None,
        optimizer=False,
        tasks={task: lambda outputs, _, task=task: losses(outputs)[task] for task in TASKS},
    )
    batches = [batch(i, rank, world) for i in range(3)]
    loop.pruner.prune(batches, progress=False)
    with torch.no_grad():
        outputs = loop.net(batch(7, 0, 1))
    return {"masks": loop.masks(), **outputs}


def method_to_resume() -> Vote:
    """Scores of two batches, so that some are half way in a checkpoint."""
    return Vote(0.7, schedule=RISE, observations=2, saliency=saliency.fisher)


def state_of(loop: Loop) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = get_state_dict(loop.net, loop.optimizer)
    return {"model": model, "optimizer": optimizer, "pruner": PrunerState(loop.pruner)}


def save(rank: int, world: int) -> None:
    import torch.distributed.checkpoint as dcp

    loop = Loop(method_to_resume(), rank, world).train(3)
    dcp.save(state_of(loop), checkpoint_id=os.environ["MTPRUNE_TEST_FOLDER"])


def resume(rank: int, world: int) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    loop = Loop(method_to_resume(), rank, world)
    state = state_of(loop)
    dcp.load(state, checkpoint_id=os.environ["MTPRUNE_TEST_FOLDER"])
    set_state_dict(
        loop.net,
        loop.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    loop.steps = 3
    before = loop.masks()
    return told(loop.train(STEPS - 3), [before, loop.masks()])


def on_two(rank: int, world: int) -> dict[str, Any]:
    quiet()
    save(rank, world)
    return {
        **every_method(rank, world),
        "narrow": narrow(rank, world),
        "scored": accumulated(rank, world, True),
        "not scored": accumulated(rank, world, False),
        **sent(rank, world),
        "alone again": alone_again(rank, world),
        "refusals": refusals(rank, world),
        "rounds": rounds(rank, world),
    }


def on_four(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed import init_device_mesh

    quiet()
    mesh = init_device_mesh(device_of(rank).type, (2, 2), mesh_dim_names=("copies", "parts"))
    square = {
        name: trained(name, rank, world, spread=lambda n: shard(n, mesh=mesh)) for name in SQUARE
    }
    return {**square, "resumed": resume(rank, world), "four": trained("floor", rank, world)}


SQUARE = ("floor", "movement")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        name = str(tmp_path_factory.mktemp("checkpoint"))
        patch.setenv("MTPRUNE_TEST_FOLDER", name)
        yield name


@pytest.fixture(scope="module")
def two(folder: str, tmp_path_factory: Any) -> list[Any]:
    """What two ranks saw: all there is to see, since most of the time goes into starting them."""
    return on_ranks(__name__, "on_two", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(two: list[Any], tmp_path_factory: Any) -> list[Any]:
    return on_ranks(__name__, "on_four", tmp_path_factory.mktemp("four"), world=4)


@pytest.mark.parametrize("name", ["floor", "soft", "movement"])
def test_masks_of_narrow_forwards_are_exact_and_the_same_everywhere(
    name: str, two: list[Any]
) -> None:
    first, second = (result["narrow"][name] for result in two)
    assert all(torch.equal(second["masks"][n], mask) for n, mask in first["masks"].items())
    size = sum(mask.numel() for mask in first["masks"].values())
    zeros = sum(int((~mask).sum()) for mask in first["masks"].values())
    assert zeros == round(0.7 * size)
    assert first["sparsity"] == zeros / size
    for n, mask in first["masks"].items():
        assert not first["weights"][n][~mask].any()


def test_scoring_leaves_training_as_it_is(two: list[Any]) -> None:
    for result in two:
        for name, weight in result["not scored"].items():
            assert torch.equal(result["scored"][name], weight)


def test_nothing_larger_than_a_histogram_and_a_layer_is_sent(two: list[Any]) -> None:
    histogram, layer = 8 * (1 << 16), 4 * 600 * 600
    sends = two[0]["sent"]
    assert sends["floor"]
    for name, messages in sends.items():
        for call, size in messages:
            # Gradients are of one layer; all else are counts, and masks where modules read them.
            assert size <= (layer if call == SCATTER else histogram), (name, call)
    gathered = [size for call, size in sends["movement"] if call == "all_gather"]
    assert max(gathered) == 300 * 600  # the mask of a layer, a byte for each weight of its part


def test_masks_in_float32_are_those_of_one_process(two: list[Any]) -> None:
    loop = Loop(METHODS["floor"](), 0, 1, kind=Wide, spread=None, dtype=torch.float32).train(8)
    mine = two[0]["wide"]
    same = sum(int((mine[name] == mask).sum()) for name, mask in loop.masks().items())
    assert same >= 0.999 * sum(mask.numel() for mask in mine.values())


def test_a_finalized_model_is_gathered_to_be_compressed(two: list[Any]) -> None:
    first = two[0]["alone again"]
    assert (
        "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True"
        in (first["refused"])
    )
    assert first["smaller"] < first["before"]
    assert first["report"] == first["kept"]
    assert first["sparsity"] > 0.3


REFUSED = {
    "backend": r"'trunk.0.weight' is sharded by fully_shard .* Pass backend='inplace'",
    "backend, late": r"Pass backend='inplace'",
    "lamp": r"'lamp' looks at a whole layer at once\. Every rank has some rows",
    "random": r"'random' asks for `generator`",
    "ranks": r"LowRank decides about whole layers",
    "pattern": r"NM\(.*\) compares the weights of a whole layer",
    "macs": r"Build the pruner before fully_shard",
    "part": r"'trunk.0.weight' is sharded .*, and 'trunk.1.weight' is not\. Apply fully_shard to",
    "columns": r"its 'weight' is split along dimension 1, and not in rows",
    "fold": r"fold=True works in one process only",
    "tasks": r"Ranks have batches of different tasks, and fully_shard gathers weights",
    "graphs": r"The loss of task 'b' leads to 'heads\.\w\.weight' on some ranks and not on rank",
    "finite": r"Loss of task 'b' is not finite",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_parts_cannot_do_is_refused_on_all_ranks(name: str, two: list[Any]) -> None:
    for result in two:
        assert re.search(REFUSED[name], result["refusals"][name]), result["refusals"][name]


def test_weights_that_were_gathered_do_not_go_stale(two: list[Any]) -> None:
    alone = rounds(0, 1)
    for result in two:
        found = result["rounds"]
        assert all(torch.equal(found["masks"][n], mask) for n, mask in alone["masks"].items())
        for task in TASKS:
            torch.testing.assert_close(found[task], alone[task])


@pytest.mark.long
def test_two_ranks_are_resumed_on_four(two: list[Any], four: list[Any]) -> None:
    loop = Loop(method_to_resume(), 0, 1, spread=None).train(3)
    before = loop.masks()
    alone = told(loop.train(STEPS - 3), [before, loop.masks()])
    for result in four:
        check_same(result["resumed"], alone)


@pytest.mark.long
@pytest.mark.parametrize("name", SQUARE)
def test_copies_of_parts_decide_alike(name: str, four: list[Any]) -> None:
    alone = trained(name, 0, 1, spread=None)
    for result in four:
        check_same(result[name], alone, weights=1e-6)


@pytest.mark.long
def test_four_ranks_of_which_some_have_no_row(four: list[Any]) -> None:
    alone = trained("floor", 0, 1, spread=None)
    for result in four:
        check_same(result["four"], alone)
