"""The trainers' nets have the published sizes, and their losses the published forms."""

import pytest
import torch
from common import losses, nets
from torch import nn

pytestmark = pytest.mark.slow


def prunable(module: nn.Module) -> int:
    return sum(
        layer.weight.numel()
        for layer in module.modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    )


@pytest.mark.parametrize(
    ("outputs", "total"),
    [
        ({"seg": 40, "normal": 3}, 67_581_120),
        ({"seg": 19, "depth": 1}, 67_486_912),
        ({"seg": 17, "normal": 3, "depth": 1, "keypoint": 1, "edge": 1}, 136_705_216),
    ],
)
def test_deeplab_resnet34_is_as_large_as_published(outputs, total):
    with torch.device("meta"):
        model = nets.build("deeplab_resnet34", outputs, width=1)
    assert sum(prunable(shared) for shared in model.shared_modules()) == 21_267_648
    assert sum(isinstance(layer, nn.Conv2d) for layer in model.backbone.modules()) == 36
    assert prunable(model) == total


def test_mobilenetv2_is_as_large_as_published():
    with torch.device("meta"):
        model = nets.build("mobilenetv2", {"seg": 40, "normal": 3, "depth": 1}, width=1)
    assert prunable(model.backbone) == 2_189_760
    assert sum(isinstance(layer, nn.Conv2d) for layer in model.backbone.modules()) == 52
    heads = [prunable(head) for head in model.heads.values()]
    assert heads == [51_544_064, 51_392_512, 51_384_320]


@pytest.mark.parametrize(
    ("net", "stride"),
    [("deeplab_resnet34", 8), ("mobilenetv2", 8), ("mtan_segnet", 1), ("unet", 2)],
)
def test_outputs_of_any_image_size(net, stride):
    model = nets.build(net, {"seg": 5, "depth": 1}, width=0.02).eval()
    for height, width in ((64, 96), (50, 61)):
        outputs = model(torch.randn(2, 3, height, width))
        size = outputs["seg"].shape[-2:]
        assert all(
            abs(got - full / stride) <= 1 for got, full in zip(size, (height, width), strict=True)
        )
        assert outputs["seg"].shape == (2, 5, *size)
        assert outputs["depth"].shape == (2, 1, *size)
        assert stride > 1 or size == (height, width)


def test_what_mtan_shares_is_what_every_task_uses():
    model = nets.build("mtan_segnet", {"seg": 5, "depth": 1}, width=0.02)
    assert len(model.shared_modules()) > 1
    outputs = model(torch.randn(2, 3, 64, 64))
    parameters = dict(model.named_parameters())
    for task, output in outputs.items():
        gradients = torch.autograd.grad(
            output.square().sum(), parameters.values(), retain_graph=True, allow_unused=True
        )
        used = {n for n, g in zip(parameters, gradients, strict=True) if g is not None}
        shared = {id(p) for module in model.shared_modules() for p in module.parameters()}
        assert shared <= {id(parameters[name]) for name in used}
        other = {"seg": "depth", "depth": "seg"}[task]
        assert not any(f".{other}." in name for name in used)


def test_unet_hands_every_resolution_on():
    model = nets.build("unet", {"seg": 5, "depth": 1}, width=0.1)
    with torch.no_grad():
        for block in (*model.down, *model.up):
            for x in block.parameters():
                x.abs_()  # no path may die in a ReLU
    grids = []
    for block in model.down:
        block.register_forward_hook(lambda block, inputs, output: grids.append(output))
    image = torch.rand(2, 3, 64, 96)
    outputs = model(image)
    assert [tuple(grid.shape[-2:]) for grid in grids] == [(32, 48), (16, 24), (8, 12), (4, 6)]
    for output in outputs.values():
        for grid in torch.autograd.grad(output.square().sum(), grids, retain_graph=True):
            assert grid.abs().sum() > 0
    head = {id(x) for x in model.heads.parameters()}
    shared = {id(x) for module in model.shared_modules() for x in module.parameters()}
    assert shared | head == {id(x) for x in model.parameters()}
    assert not shared & head


def test_mmoe_mixes_its_experts():
    model = nets.build("mmoe", {"a": 2, "b": 7}, width=0.1, inputs=30)
    outputs = model(torch.randn(4, 30))
    assert (outputs["a"].shape, outputs["b"].shape) == ((4, 2), (4, 7))
    assert model.shared_modules() == [model.experts]


def test_imagenet_weights_from_a_file(tmp_path):
    weights = nets.ResNet34(0.1).state_dict()
    torch.save({**weights, "fc.weight": torch.zeros(1000, 51)}, tmp_path / "resnet34.pth")
    model = nets.build("deeplab_resnet34", {"seg": 5}, width=0.1)
    nets.load_backbone(model, tmp_path / "resnet34.pth")
    assert torch.equal(model.backbone.conv1.weight, weights["conv1.weight"])
    with pytest.raises(ValueError, match=r"resnet34\.pth does not hold weights of MobileNetV2"):
        nets.load_backbone(
            nets.build("mobilenetv2", {"seg": 5}, width=0.1), tmp_path / "resnet34.pth"
        )
    with pytest.raises(ValueError, match="nets with a backbone, not MTAN"):
        nets.load_backbone(
            nets.build("mtan_segnet", {"seg": 5}, width=0.1), tmp_path / "resnet34.pth"
        )


def test_invalid_pixels_do_not_count_in_the_losses():
    outputs = torch.randn(2, 3, 4, 4)
    classes = torch.randint(3, (2, 4, 4))
    classes[:, :2] = 255
    expected = nn.functional.cross_entropy(outputs[:, :, 2:], classes[:, 2:])
    assert torch.allclose(losses.classes_loss(outputs, classes), expected)
    weight = torch.tensor([0.5, 1.0, 2.0])
    expected = nn.functional.cross_entropy(outputs[:, :, 2:], classes[:, 2:], weight)
    assert torch.allclose(losses.classes_loss(outputs, classes, weight), expected)

    normals = nn.functional.normalize(torch.randn(2, 3, 4, 4), dim=1)
    normals[:, :, :2] = 0
    assert losses.normals_loss(3 * normals, normals).item() == pytest.approx(0, abs=1e-6)
    assert losses.normals_loss(-normals, normals).item() == pytest.approx(2)

    depth = torch.rand(2, 1, 4, 4) + 1
    depth[:, :, :2] = 0
    assert losses.depth_loss(depth + 0.5, depth).item() == pytest.approx(0.5)
    edges = torch.rand(2, 1, 4, 4)
    edges[:, :, :2] = 255
    assert losses.response_loss(edges - 0.25, edges).item() == pytest.approx(0.25)
    yes = torch.zeros(2, 1, 4, 4)
    yes[:, :, :2] = 255
    expected = nn.functional.softplus(torch.tensor(3.0)).item()
    assert losses.marks_loss(torch.full((2, 1, 4, 4), 3.0), yes).item() == pytest.approx(expected)
    for loss in (losses.depth_loss, losses.response_loss):
        assert loss(depth, torch.full_like(depth, 255.0 * (loss is losses.response_loss))) == 0
    assert losses.classes_loss(outputs, torch.full_like(classes, 255)) == 0


def test_losses_are_taken_at_the_outputs_resolution():
    depth = torch.arange(1, 5.0).view(1, 1, 2, 2)
    large = depth.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert losses.depth_loss(depth, large) == 0
    classes = torch.tensor([[[0, 1], [2, 0]]])
    logits = 50 * nn.functional.one_hot(classes, 3).permute(0, 3, 1, 2).float()
    large = classes.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert losses.classes_loss(logits, large) == 0
