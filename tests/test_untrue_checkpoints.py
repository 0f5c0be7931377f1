"""Checkpoints whose fingerprint is right, and that contradict themselves, or their method."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtprune import Cubic, Hold, MultitaskPruner, OneShot, SoftThreshold, Vote
from mtprune.bits import pack_bits, unpack_bits
from mtprune.schedule import Rounds
from tests import checkpoints, hostile, nets

State = dict[str, Any]


def flipped(state: State, name: str, number: int, to: bool) -> None:
    """Let so many more weights of a layer be kept, or go; what is told of it agrees."""
    shape = state["shapes"][name]
    mask = unpack_bits(state["hold"]["masks"][name], shape).flatten()
    mask[(mask != to).nonzero().flatten()[:number]] = to
    state["hold"]["masks"][name] = pack_bits(mask)
    [row] = [row for row in state["facts"]["counts"] if row["name"] == name]
    row["kept"] = int(mask.sum())
    row["wanted"] = {voter: min(n, row["kept"]) for voter, n in row["wanted"].items()}
    row["unanimous"] = min(row["unanimous"], row["kept"])


def two_weights_fewer(state: State) -> None:
    flipped(state, "trunk.0.weight", 2, to=False)


def a_weight_elsewhere(state: State) -> None:
    flipped(state, "trunk.0.weight", 1, to=False)
    flipped(state, "trunk.2.weight", 1, to=True)


def no_masks(state: State) -> None:
    state["hold"]["masks"] = {}


def no_numbers(state: State) -> None:
    state["facts"]["counts"] = []


def numbers_twice(state: State) -> None:
    state["facts"]["counts"].append(state["facts"]["counts"][0])


def nobody_s_layer(state: State) -> None:
    state["users"]["a"][0] = False


def led_nowhere(state: State) -> None:
    state["led"] = torch.zeros_like(state["led"])


def no_users(state: State) -> None:
    state["users"] = None


def at(done: int) -> Callable[[State], None]:
    def change(state: State) -> None:
        state["done"] = done

    return change


def before_all_updates(state: State) -> None:
    state["done"] = -1


def ahead_of_time(state: State) -> None:
    state["step"] = 1


def containers_without_end(state: State) -> None:
    state["memory"]["round"] = state["memory"]


def containers_in_containers(state: State) -> None:
    value: Any = 1
    for _ in range(100_000):
        value = [value]
    state["memory"]["deep"] = value


def a_long_name(state: State) -> None:
    state["memory"]["x" * 1_000] = object()


FEWER = r"'hold' must keep \d+ weights in 4 layers, as its method does at step \d, not \d+\. Got"
NO_UPDATE = r"'done' must be -1 or the step of an update of .*\. Got {}\. Load"

UNTRUE: list[tuple[str, Callable[[State], None], str]] = [
    ("gradual", two_weights_fewer, FEWER),
    ("movement", two_weights_fewer, FEWER),
    ("finished", two_weights_fewer, FEWER),
    ("dynamic", two_weights_fewer, r"must keep 12 weights of 'trunk\.0\.weight', as its .* not 10"),
    ("dynamic", a_weight_elsewhere, r"must keep 12 weights of 'trunk\.0\.weight', as .* not 11"),
    *(
        (kind, change, message)
        for kind in ("gradual", "dynamic", "movement", "finished")
        for change, message in [
            (no_masks, r"'hold\.masks' must keep \d+ weights, as the last update did, not 48"),
            (no_numbers, r"'facts\.counts' must tell of the 4 layers that are pruned, in order"),
            (before_all_updates, r"'facts\.counts' must tell that all is kept, as before the fir"),
        ]
    ),
    ("gradual", led_nowhere, "'led' must have every layer that some task uses"),
    ("ranks", no_numbers, r"'facts\.counts' must tell of the 4 layers that are pruned, in order"),
    ("gradual", numbers_twice, r"'facts\.counts' must tell of the 4 layers that are pruned, in"),
    ("gradual", nobody_s_layer, r"'facts\.counts' must tell of the 4 layers that are pruned"),
    ("gradual", no_users, r"'users' must tell which task uses which layer, after an update\. Got"),
    ("gradual", at(3), NO_UPDATE.format(3)),
    ("gradual", at(10**15), NO_UPDATE.format(10**15)),
    ("movement", at(10**15), NO_UPDATE.format(10**15)),
    ("gradual", at(2), r"'facts\.history' must end at step 2, the last update"),
    ("gradual", ahead_of_time, r"'done' must be at most 1, the steps so far\. Got 4\."),
    ("gradual", containers_without_end, r"'memory(\.round){6}\.…' must not lie deeper than in 32"),
    ("gradual", containers_in_containers, r"'memory\.deep.*' must not lie deeper than in 32 cont"),
    ("gradual", a_long_name, r"'memory\.x{60}…' must be made of containers, tensors, numbers and"),
]


@pytest.mark.parametrize(("kind", "change", "message"), UNTRUE)
def test_what_is_not_true_is_refused(kind, change, message):
    state = hostile.checkpoint(kind)
    change(state)
    try:
        state = checkpoints.resealed(state)
    except (RecursionError, RuntimeError):  # it has no fingerprint
        assert "deeper" in message
    run = hostile.start(kind, seed=1).train(hostile.KINDS[kind][1])
    before = hostile.everything(run)
    with pytest.raises(ValueError, match=message):
        run.pruner.load_state_dict(state)
    assert hostile.alike(hostile.everything(run), before)


def test_masks_before_the_first_update_are_refused():
    run = hostile.start("before anything")
    state = run.pruner.state_dict()
    masks = {n: pack_bits(torch.zeros(s) > 0) for n, s in state["shapes"].items()}
    state["hold"]["masks"] = masks
    with pytest.raises(ValueError, match=r"'hold\.masks' must keep all weights, as before the fir"):
        run.pruner.load_state_dict(checkpoints.resealed(state))


class Sloppy:
    """A schedule whose updates depend on where the one before was."""

    def next_update(self, after: int) -> int | None:
        return after + 2 if after < 8 else None

    def progress(self, step: int) -> float:
        return min(1.0, step / 8)

    def __repr__(self) -> str:
        return "Sloppy()"


@pytest.mark.parametrize(
    "schedule", [Sloppy(), Hold(Cubic(begin=1, end=4, every=1), until=9, every=4), OneShot(6)]
)
def test_every_step_of_every_schedule_can_be_resumed(schedule):
    device = torch.device("cpu")
    method = Vote(0.7, schedule=schedule)
    run = nets.Run(nets.build("plain", device), method, "prune")
    for _ in range(12):
        fresh = nets.Run(nets.build("plain", device, seed=1), method, "prune")
        fresh.pruner.load_state_dict(run.pruner.state_dict())
        assert hostile.alike(fresh.pruner.state_dict(), run.pruner.state_dict())
        run.train(1)
    assert run.pruner.sparsity == pytest.approx(0.7, abs=0.005)


@pytest.mark.parametrize("schedule", [Rounds(3), OneShot(5), Cubic(begin=2, end=9, every=3)])
def test_what_was_pruned_without_a_loop_can_be_resumed(schedule):
    device = torch.device("cpu")
    net = nets.build("plain", device)
    method = Vote(0.7, schedule=schedule)

    def pruner() -> MultitaskPruner:
        made = nets.build("plain", device)
        return MultitaskPruner(made.model, made.task_losses, made.shared_modules, method=method)

    one = MultitaskPruner(net.model, net.task_losses, net.shared_modules, method=method)
    batches = [net.make_batch(i) for i in range(6)]
    one.prune(batches, forward=lambda model, batch: model(batch["x"]), progress=False)
    other = pruner()
    other.load_state_dict(one.state_dict())
    assert hostile.alike(other.state_dict(), one.state_dict())
    assert other.sparsity == one.sparsity > 0.6


def test_thresholds_that_end_early_leave_a_true_report_and_checkpoint():
    device = torch.device("cpu")
    method = SoftThreshold(0.7, schedule=Cubic(begin=0, end=20, every=4))
    run = nets.Run(nets.build("plain", device), method, "prune").train(7)
    run.pruner.finalize()
    report = run.pruner.report()
    size = sum(mask.numel() for mask in run.pruner.masks.values())
    kept = sum(int(mask.sum()) for mask in run.pruner.masks.values())
    assert report.kept == kept < size
    fresh = nets.Run(nets.build("plain", device, seed=1), method, "prune")
    fresh.pruner.load_state_dict(run.pruner.state_dict())
    assert nets.same(fresh.pruner.masks, run.pruner.masks)
    assert fresh.pruner.report().kept == kept
    assert fresh.pruner.sparsity == run.pruner.sparsity == (size - kept) / size


def test_a_checkpoint_is_not_changed_by_those_who_load_it():
    state = hostile.checkpoint("learned thresholds")
    kept = copy.deepcopy(state)
    run = hostile.start("learned thresholds", seed=1)
    run.pruner.load_state_dict(state)
    run.train(6)
    assert hostile.alike(state, kept)
