import pytest
import torch
from torch import nn

import mtprune


def model():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5), nn.Flatten()
    )
    with torch.no_grad():
        net[1].running_mean.fill_(9.0)
    return net


def test_statistics_are_the_average_over_batches():
    norm = nn.BatchNorm1d(1)
    batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])]
    assert mtprune.recalibrate_bn(norm, batches) == 1
    assert (norm.running_mean.item(), norm.running_var.item()) == (3.0, 2.0)
    assert norm.num_batches_tracked == 2


def test_what_layers_put_out_is_normal_afterwards_and_all_else_as_before():
    net = model()
    net[2].eval()
    weights = [p.detach().clone() for p in net.parameters()]
    batches = [torch.randn(8, 2, 6, 6) * 3 + 1 for _ in range(3)]
    mtprune.recalibrate_bn(net, batches)
    assert net[1].momentum == 0.3
    assert [m.training for m in net] == [True, True, False, True]
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), weights, strict=True))
    assert not any(p.grad is not None for p in net.parameters())
    net.eval()
    out = net[1](net[0](torch.cat(batches)))
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.var((0, 2, 3)), torch.ones(4), atol=2e-2, rtol=0)


def test_batches_of_another_kind():
    net = model()
    batches = [{"image": torch.randn(4, 2, 6, 6)}]
    assert mtprune.recalibrate_bn(net, batches, forward=lambda m, b: m(b["image"])) == 1
    assert net[1].num_batches_tracked == 1


def test_a_norm_that_is_not_reached_keeps_its_statistics():
    net = nn.ModuleDict({"used": nn.BatchNorm1d(1), "spare": nn.BatchNorm1d(1)})
    net["spare"].running_mean.fill_(7.0)
    batches = [torch.randn(4, 1)]
    mtprune.recalibrate_bn(net, batches, forward=lambda m, b: m["used"](b))
    assert net["spare"].running_mean.item() == 7


def test_nothing_changes_when_it_fails():
    net = model()
    with pytest.raises(ValueError, match="`batches` is empty"):
        mtprune.recalibrate_bn(net, [])
    with pytest.raises(RuntimeError):
        mtprune.recalibrate_bn(net, [torch.randn(4, 2, 6, 6), torch.randn(4, 3, 6, 6)])
    assert net[1].running_mean.tolist() == [9.0] * 4
    assert net[1].momentum == 0.3
    assert all(m.training for m in net)


def test_norms_without_statistics_are_left_out():
    assert (
        mtprune.recalibrate_bn(nn.BatchNorm1d(1, track_running_stats=False), [torch.ones(2, 1)])
        == 0
    )
