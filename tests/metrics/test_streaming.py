"""What is true of every streaming metric."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mtprune import metrics
from mtprune.metrics import Accuracy, Binary, Depth, Edges, Keypoints, Normals, Segmentation
from tests.tampering import alike, tampered

ROOT = Path(__file__).parents[2]
DEVICE = torch.device(os.environ.get("MTPRUNE_TEST_DEVICE", "cpu"))
H, W = 5, 7


def classes(n, generator):
    targets = torch.randint(4, (n, H, W), generator=generator)
    targets[torch.rand(n, H, W, generator=generator) < 0.2] = 255
    return torch.randn(n, 4, H, W, generator=generator), targets


def examples(n, generator):
    return torch.randn(n, 4, generator=generator), torch.randint(4, (n,), generator=generator)


def depths(n, generator):
    targets = torch.rand(n, 1, H, W, generator=generator) * 5 + 0.5
    outputs = targets * torch.empty_like(targets).uniform_(0.5, 1.6, generator=generator)
    targets[torch.rand(n, 1, H, W, generator=generator) < 0.2] = 0
    return outputs, targets


def normals(n, generator):
    targets = torch.randn(n, 3, H, W, generator=generator)
    outputs = targets + 0.5 * torch.randn(n, 3, H, W, generator=generator)
    targets = targets / targets.norm(dim=1, keepdim=True)
    hidden = torch.rand(n, 1, H, W, generator=generator) < 0.2
    return outputs, targets.masked_fill(hidden, 0)


def encoded(n, generator):
    outputs, targets = normals(n, generator)
    image = (targets * 127 + 127).round()
    return outputs, image.masked_fill((targets == 0).all(dim=1, keepdim=True), 255)


def maps(n, generator):
    targets = torch.rand(n, 1, H, W, generator=generator)
    outputs = torch.rand(n, 1, H, W, generator=generator)
    targets[torch.rand(n, 1, H, W, generator=generator) < 0.2] = 255
    return outputs, targets


def labels(n, generator):
    targets = torch.randint(2, (n, 3), generator=generator)
    targets[torch.rand(n, 3, generator=generator) < 0.2] = 255
    return torch.randn(n, 3, generator=generator), targets


# Name -> how to make the metric, and a batch of n for it.
SHELF = {
    "segmentation": (lambda: Segmentation(4), classes),
    "segmentation, disparse": (lambda: Segmentation(4, compat="disparse"), classes),
    "segmentation, adapmtl": (lambda: Segmentation(4, compat="adapmtl"), classes),
    "accuracy": (lambda: Accuracy(4), examples),
    "depth": (Depth, depths),
    "depth, disparse": (lambda: Depth(compat="disparse"), depths),
    "normals": (Normals, normals),
    "normals, disparse": (lambda: Normals(compat="disparse"), encoded),
    "normals, adapmtl": (lambda: Normals(compat="adapmtl"), normals),
    "edges": (lambda: Edges(ignore=255), maps),
    "keypoints": (lambda: Keypoints(ignore=255), maps),
    "binary": (lambda: Binary(3, ignore=255), labels),
}
EVERY = pytest.mark.parametrize("name", SHELF)


def batch(name, n=12, seed=0):
    return [x.to(DEVICE) for x in SHELF[name][1](n, torch.Generator().manual_seed(seed))]


def measured(name, *batches):
    metric = SHELF[name][0]()
    for outputs, targets in batches:
        metric.update(outputs, targets)
    return metric


def close(values, tolerance=1e-9):
    return pytest.approx(values, rel=tolerance, abs=tolerance)


@EVERY
def test_how_the_data_is_cut_into_batches_does_not_matter(name):
    outputs, targets = batch(name)
    whole = measured(name, (outputs, targets)).compute()
    for sizes in ([1] * 12, [5, 7], [3, 1, 8]):
        parts = zip(outputs.split(sizes), targets.split(sizes), strict=True)
        assert measured(name, *parts).compute() == close(whole)


@EVERY
def test_the_order_of_images_does_not_matter(name):
    outputs, targets = batch(name)
    turned = measured(name, (outputs.flip(0), targets.flip(0))).compute()
    assert turned == close(measured(name, (outputs, targets)).compute())


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_measured_as_what_they_hold(name, dtype):
    outputs, targets = batch(name)
    outputs = outputs.to(dtype)
    result = measured(name, (outputs, targets)).compute()
    assert result == close(measured(name, (outputs.float(), targets)).compute(), 1e-6)


@EVERY
def test_memory_layout_does_not_matter(name):
    outputs, targets = batch(name)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (outputs, targets)]
    assert measured(name, strided).compute() == close(measured(name, (outputs, targets)).compute())


@EVERY
def test_results_are_plain_finite_floats(name):
    result = measured(name, batch(name)).compute()
    assert all(type(value) is float for value in result.values())
    assert all(value == value and abs(value) != float("inf") for value in result.values())


@EVERY
def test_computing_changes_nothing(name):
    metric = measured(name, batch(name))
    first = metric.compute()
    assert metric.compute() == first
    metric.update(*batch(name, seed=1))
    both = measured(name, batch(name), batch(name, seed=1)).compute()
    assert metric.compute() == both


@EVERY
def test_merging_is_measuring_both(name):
    parts = [batch(name, seed=seed) for seed in range(3)]
    merged = measured(name, parts[0]).merge(measured(name, parts[1], parts[2]))
    assert merged.compute() == close(measured(name, *parts).compute())
    assert merged.merge(SHELF[name][0]()).compute() == merged.compute()


@EVERY
def test_reset_forgets(name):
    metric = measured(name, batch(name, seed=1))
    metric.reset()
    with pytest.raises(ValueError, match="nothing to measure"):
        metric.compute()
    metric.update(*batch(name))
    assert metric.compute() == measured(name, batch(name)).compute()


@EVERY
def test_nothing_to_measure_names_the_metric(name):
    metric = SHELF[name][0]()
    with pytest.raises(ValueError, match=f"^{type(metric).__name__}: .*so there is nothing to"):
        metric.compute()


@pytest.mark.parametrize("name", [name for name in SHELF if name != "accuracy"])
def test_a_batch_without_a_valid_pixel_adds_nothing(name):
    outputs, targets = batch(name, seed=1)
    empty = targets * 0 if type(SHELF[name][0]()) in (Depth, Normals) else targets * 0 + 255
    if name == "normals, disparse":
        empty += 255
    result = measured(name, batch(name), (outputs, empty)).compute()
    assert result == measured(name, batch(name)).compute()
    with pytest.raises(ValueError, match="nothing to measure"):
        measured(name, (outputs, empty)).compute()


@EVERY
def test_an_empty_batch_adds_nothing(name):
    outputs, targets = batch(name)
    result = measured(name, (outputs, targets), (outputs[:0], targets[:0])).compute()
    assert result == measured(name, (outputs, targets)).compute()


@EVERY
def test_state_goes_through_a_file(name):
    file = io.BytesIO()
    torch.save(measured(name, batch(name)).state_dict(), file)
    file.seek(0)
    metric = SHELF[name][0]()
    metric.load_state_dict(torch.load(file, weights_only=True))
    metric.update(*batch(name, seed=1))
    assert metric.compute() == measured(name, batch(name), batch(name, seed=1)).compute()


@EVERY
def test_saved_state_does_not_follow_the_metric(name):
    metric = measured(name, batch(name))
    before = metric.compute()
    state = metric.state_dict()
    metric.update(*batch(name, seed=1))
    metric.load_state_dict(state)
    assert metric.compute() == before


@EVERY
def test_update_never_looks_at_a_value(name):
    # A meta tensor has none, so whatever would wait for an accelerator fails here.
    metric = SHELF[name][0]()
    for _ in range(2):
        metric.update(*(x.to("meta") for x in batch(name)))
    assert all(held.device.type == "meta" for held in metric.state_dict()["sums"].values())


@EVERY
def test_inference_mode_may_come_and_go(name):
    metric = SHELF[name][0]()
    with torch.inference_mode():
        metric.update(*batch(name))
    metric.update(*batch(name, seed=1))
    with torch.inference_mode():
        metric.reset()
        metric.update(*batch(name))
    metric.update(*batch(name, seed=1))
    assert metric.compute() == measured(name, batch(name), batch(name, seed=1)).compute()


@EVERY
def test_no_graph_is_kept(name):
    outputs, targets = batch(name)
    metric = measured(name, (outputs.requires_grad_(), targets))
    assert not any(held.requires_grad for held in metric.state_dict()["sums"].values())


@EVERY
def test_directions_are_known(name):
    result = measured(name, batch(name)).compute()
    better = {metric: 0.9 * value if metric in LOWER else 1.1 * value
              for metric, value in result.items()}  # fmt: skip
    results = {"task": better}
    directions = metrics.lower_is_better(results)
    assert metrics.delta_t(results, {"task": result}, directions).overall == pytest.approx(10)
    assert set(result) <= metrics.LOWER_IS_BETTER | metrics.HIGHER_IS_BETTER


LOWER = ["absolute", "relative", "rmse", "mean", "median", "error"]


def test_only_equal_metrics_merge():
    with pytest.raises(
        ValueError,
        match=r"Only equal metrics merge\. Got Depth\(compat='disparse', skip_nonfinite=False\) "
        r"for Depth\(compat=None, skip_nonfinite=False\)",
    ):
        Depth().merge(Depth(compat="disparse"))
    with pytest.raises(ValueError, match=r"Got Segmentation\(.*classes=3.* for .*classes=4"):
        Segmentation(4).merge(Segmentation(3))
    with pytest.raises(ValueError, match=r"Got Keypoints\("):
        Edges().merge(Keypoints())


def test_state_of_another_metric_is_refused():
    message = (
        r"This state for Segmentation\(.*classes=4.*\): 'sums\.confusion' must be a dense int64 "
        r"tensor of shape \(4, 4\)\. Got a int64 tensor of shape \(3, 3\)\. Load the state_dict\(\)"
    )
    with pytest.raises(ValueError, match=message):
        Segmentation(4).load_state_dict(Segmentation(3).state_dict())


def test_counts_that_are_negative_are_refused():
    metric = measured("segmentation", batch("segmentation"))
    before = copy.deepcopy(metric.state_dict())
    for kind, name in (("sums", "confusion"), ("flaws", next(iter(before["flaws"])))):
        state = copy.deepcopy(before)
        state[kind][name].view(-1)[0] = -1
        with pytest.raises(
            ValueError, match=rf"'{kind}\.{name}' must be counts, which are not neg"
        ):
            metric.load_state_dict(state)
        assert alike(metric.state_dict(), before)


@EVERY
def test_tampered_states_are_refused_or_equal(name):
    metric = measured(name, batch(name))
    before, result = copy.deepcopy(metric.state_dict()), metric.compute()
    for seed in range(60):
        state, what = tampered(copy.deepcopy(before), seed)
        if what.split(" at ")[0] in ("bit flipped", "not finite", "doubled", "renamed"):
            continue  # other numbers of the same kind: nothing tells that they were never added
        with pytest.raises(ValueError, match="This state for"):
            metric.load_state_dict(state)
        assert alike(metric.state_dict(), before), what
        assert metric.compute() == result


@pytest.mark.parametrize("make", [Depth, Normals, lambda compat: Segmentation(2, compat=compat)])
def test_unknown_compat_is_refused(make):
    with pytest.raises(
        ValueError, match=r"`compat` must be None, 'disparse' or 'adapmtl'. Got 'mtan'"
    ):
        make(compat="mtan")


def test_all_reduce_is_nothing_on_one_process():
    metric = measured("depth", batch("depth"))
    before = metric.compute()
    metric.all_reduce()
    assert metric.compute() == before


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    results = {}
    for name in SHELF:
        # The last rank has seen nothing.
        metric = measured(name, *([batch(name, seed=rank)] if rank < 2 else []))
        metric.all_reduce()
        results[name] = metric.compute()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


SCRIPT = """
import sys
from tests.metrics import test_streaming

test_streaming.worker(int(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
def test_all_reduce_gives_every_rank_the_result_of_all(tmp_path):
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE)
        for rank in range(3)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for rank in range(3):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name in SHELF:
            whole = measured(name, batch(name, seed=0), batch(name, seed=1)).compute()
            assert result[name] == close(whole)
