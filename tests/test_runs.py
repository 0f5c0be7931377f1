"""Records of runs: what is looked at is what would be there if nobody looked."""

import pytest
import torch

from tests import nets
from tests.nets import Run, build, read, same, weights
from tests.pairs import pairs
from tests.runs import Record, record


def start(name, method, backend, device):
    return Run(build(name, device), nets.METHODS[method](), backend)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "backend"),
    pairs(["tied", "conv_bn", "transformer_encoder"], nets.METHODS, ["prune", "inplace"]),
)
def test_a_recorded_run_is_one_that_nobody_looks_at(name, method, backend, device):
    seen = record(start, name, method, backend, device).at(9)
    run = start(name, method, backend, device).train(9)
    assert same(run.pruner.masks, seen.masks)
    assert same(weights(run), seen.weights)
    assert run.pruner.report() == seen.report
    assert run.pruner.sparsity == seen.sparsity
    assert seen.checkpoint["at"] == 9
    for alias, weight in seen.read.items():
        assert torch.equal(read(run.model, alias), weight)


def test_a_run_is_trained_once_and_only_as_far_as_somebody_asks():
    steps = []

    def counted():
        run = start("plain", "gradual", "inplace", torch.device("cpu"))
        step = run.step
        run.step = lambda: steps.append(run.at) or step()
        return run

    kept = Record(counted)
    late, early = kept.at(4), kept.at(2)
    assert kept.at(4) is late
    assert kept.until(4)[1] is early
    assert steps == [0, 1, 2, 3]
    assert [moment.checkpoint["at"] for moment in kept.until(4)] == [1, 2, 3, 4]


def test_the_global_generator_is_left_alone(device):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Record(lambda: start("checkpointed", "static", "prune", device)).at(2)
    assert torch.equal(torch.rand(3), expected)


def test_a_test_that_writes_into_a_record_is_caught():
    kept = Record(lambda: start("plain", "static", "prune", "cpu"))
    kept.at(2).weights["a.weight"].zero_()
    kept.at(1)
    with pytest.raises(AssertionError, match="a test wrote into a record"):
        kept.at(2)
    with pytest.raises(TypeError, match="does not support item assignment"):
        kept.at(1).masks["a.weight"] = None
