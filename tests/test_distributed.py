"""Two gloo ranks on this machine, half a batch each: one decision, that of the whole batch."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mtprune import Block, Cubic, LowRank, SoftThreshold, Vote, recipes
from tests import checkpoints, nets
from tests.nets import Run, build, same, sgd, weights
from tests.ranks import backend_for, device_of, on_ranks

pytestmark = pytest.mark.slow

STEPS = 10


class Share:
    """A rank's part of every batch."""

    def __init__(self, make_batch, rank, world):
        self.make_batch = make_batch
        self.rank = rank
        self.world = world

    def __call__(self, seed):
        return {k: v.chunk(self.world)[self.rank] for k, v in self.make_batch(seed).items()}


def start(name, method, backend, rank, world):
    net = build(name, device_of(rank))
    net.make_batch = Share(net.make_batch, rank, world)
    wrap = DistributedDataParallel if world > 1 else None
    return Run(net, METHODS[method](), backend, sgd, wrap=wrap)


def soft(allocation="uniform"):
    return SoftThreshold(
        0.7,
        schedule=Cubic(begin=1, end=7, every=2),
        allocation=allocation,
        weighting="pruning_sensitivity",
    )


METHODS = {
    **nets.METHODS,
    "soft": soft,
    "learned": lambda: soft("learned"),
    "movement": lambda: recipes.movement(0.7, 8),
    "blocks": lambda: Vote(
        0.7, granularity=Block(2, 2), schedule=Cubic(begin=1, end=7, every=2), min_keep=0
    ),
    "rank": lambda: LowRank(0.7, schedule=Cubic(begin=1, end=7, every=2)),
    "gates": lambda: LowRank(0.7, "learned", schedule=Cubic(begin=1, end=7, every=1)),
}


# Each net with each method, and each method under both back-ends.
CASES = [
    (name, method, ("prune", "inplace")[(i + j) % 2])
    for i, name in enumerate(("plain", "skipped_layer", "tied"))
    for j, method in enumerate(METHODS)
]


def train(case, rank, world):
    run = start(*case, rank, world)
    masks = []
    for _ in range(STEPS):
        run.step()
        masks.append({name: mask.cpu() for name, mask in run.pruner.masks.items()})
    memory = checkpoints.memory(run.pruner)
    return {
        "masks": masks,
        "weights": {name: weight.cpu() for name, weight in weights(run).items()},
        "offsets": memory.get("offsets", {}),
        "kept": [row.kept for row in run.pruner.report().layers],
    }


def disagree(rank):
    """Ranks with different masks must be told so; here their random draws differ."""
    net = build("plain")
    run = Run(net, nets.dynamic(), seed=rank)
    try:
        run.step()
    except RuntimeError as error:
        return str(error)
    return ""


def work(rank, world):
    results = {"/".join(case): train(case, rank, world) for case in CASES}
    return {**results, "disagree": disagree(rank)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks saw."""
    return on_ranks(__name__, "work", tmp_path_factory.mktemp("ranks"))


CASE = pytest.mark.parametrize("case", CASES, ids="-".join)


@CASE
def test_ranks_have_the_same_masks_and_weights(case, ranks):
    first, second = (result["/".join(case)] for result in ranks)
    for one, other in zip(first["masks"], second["masks"], strict=True):
        assert same(one, other)
    assert same(first["weights"], second["weights"])
    assert first["offsets"] == second["offsets"]
    assert first["kept"] == second["kept"]
    last = first["masks"][-1]
    asked = round(0.7 * nets.size(last))
    if case[1] in ("rank", "gates"):  # no zeros, and whole components
        assert sum(first["kept"]) < nets.size(last)
    else:
        largest = 4 if case[1] == "blocks" else 1
        assert 0 <= nets.zeros(last) - asked < largest
        assert nets.zeros(last) == nets.size(last) - sum(first["kept"])


# Learned offsets look at the sizes of gradients before ranks add theirs up.
@pytest.mark.parametrize("case", [c for c in CASES if c[1] != "learned"], ids="-".join)
def test_two_ranks_are_one_process_with_the_whole_batch(case, ranks):
    alone = train(case, 0, 1)
    result = ranks[0]["/".join(case)]
    assert alone["kept"] == result["kept"]
    for one, other in zip(alone["masks"], result["masks"], strict=True):
        assert same(one, other)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "gpus", "backend"),
    [
        ("cuda", 2, "nccl"),
        ("cuda:0", 4, "nccl"),
        ("cuda", 1, "gloo"),
        ("cpu", 2, "gloo"),
    ],
)
def test_ranks_of_these_tests_talk_by_nccl_where_each_has_a_gpu(device, gpus, backend, monkeypatch):
    monkeypatch.setenv("MTPRUNE_TEST_DEVICE", device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert backend_for(2) == backend


def test_masks_that_differ_between_ranks_are_refused(ranks):
    for result in ranks:
        assert "Masks differ between ranks" in result["disagree"]
