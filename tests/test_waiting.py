"""What must not happen between updates: waiting for a device, moving a mask, compiling anew."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mtprune import Cubic, OneShot, Vote, recipes
from tests import checkpoints, nets
from tests.nets import Run, build, same

# What makes a host wait for a device: reading a number, or a size that depends on values.
WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "unique", "is_nonzero")


class Refuse(TorchDispatchMode):
    """Fails where a number that a GPU would hold is read: saliencies, weights, losses.

    What decides which layers to sweep is on the CPU on any device, so it may be read.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1].split(".")[0]
        if name in WAITS and any(
            isinstance(a, torch.Tensor) and a.is_floating_point() for a in args
        ):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


METHODS = {
    "one shot": Vote(0.7, schedule=OneShot(6), observations=3),
    "gradual": Vote(0.7, schedule=Cubic(6, 60, 6)),
    "dynamic": recipes.disparse_dynamic(0.7, every=6, end=60),
}


class Flags(TorchDispatchMode):
    """Where in memory the flags are that operations read."""

    def __init__(self):
        super().__init__()
        self.places = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = [a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.bool]
        self.places |= {flags.data_ptr() for flags in read}
        return func(*args, **(kwargs or {}))


def enforced(run):
    """Where the masks are that hold after a step of the optimizer."""
    with Flags() as flags:
        run.optimizer.step()
    return flags.places


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_is_never_waited_for(method, backend, device):
    if device.type != "cuda":
        pytest.skip("set MTPRUNE_TEST_DEVICE=cuda")
    run = Run(build("conv_bn", device), METHODS[method], backend).train(8)
    batches = [run.net.make_batch(at) for at in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            run.optimizer.zero_grad()
            losses = run.pruner.observe(run.model(batch["x"]), batch)
            torch.stack(list(losses.values())).sum().backward()
            run.optimizer.step()
            run.pruner.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", METHODS)
def test_nothing_reads_a_number_from_the_device(method, backend, device):
    """The same on a CPU, by the operations that would wait."""
    run = Run(build("plain", device), METHODS[method], backend, optimizer=nets.sgd)
    if method == "dynamic":
        run.train(2)  # the first update draws masks
    collected = 0
    while checkpoints.steps(run.pruner) < 6:
        run.optimizer.zero_grad()
        outputs, batch = run.forward()
        with Refuse():
            losses = run.pruner.observe(outputs, batch)
        collected += bool(checkpoints.observed(run.pruner))
        torch.stack(list(losses.values())).sum().backward()
        with Refuse():
            run.optimizer.step()  # masks hold after it
        run.at += 1
        if checkpoints.steps(run.pruner) < 6:
            with Refuse():
                assert not run.pruner.step()
    assert collected


def test_masks_keep_their_place_in_memory(backend, device):
    """So that a captured graph of the training step goes on reading them."""
    run = Run(build("conv_bn", device), METHODS["dynamic"], backend).train(2)
    before, places = run.pruner.masks, enforced(run)
    assert len(places) >= len(before)
    run.train(18)
    assert enforced(run) == places
    assert not same(run.pruner.masks, before)
