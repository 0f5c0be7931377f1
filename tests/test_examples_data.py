"""The trainers' data: rendered fixtures agree with themselves, readers with the fixtures."""

import json
import shutil

import make_fixture
import numpy as np
import pytest
import torch
from camvid import open_camvid
from census import open_census
from common import data, fixture
from PIL import Image

SIZE = (48, 64)
LAYOUTS = {
    "nyuv2": (data.NYUV2, ["seg", "normal", "depth"], "AdaShare's NYU-v2"),
    "nyuv2_mtan": (data.NYUV2, ["seg", "normal", "depth"], "MTAN's NYU-v2"),
    "cityscapes": (data.CITYSCAPES, ["seg", "depth"], "AdaShare's Cityscapes"),
    "cityscapes_mtan": (data.CITYSCAPES, ["seg", "depth"], "MTAN's Cityscapes"),
    "taskonomy": (data.TASKONOMY, list(data.TASKONOMY_OUTPUTS), "AdaShare's Taskonomy"),
    "omnidata": (data.TASKONOMY, list(data.TASKONOMY_OUTPUTS), "Omnidata's Taskonomy"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every layout's fixture, as the script writes it."""
    root = tmp_path_factory.mktemp("data")
    for layout in fixture.LAYOUTS:
        make_fixture.main([layout, str(root / layout), "--size", *map(str, SIZE)])
    return root


@pytest.fixture
def copy(written, tmp_path):
    """A copy of a layout's fixture that may be damaged."""
    return lambda layout: shutil.copytree(written / layout, tmp_path / layout)


def found(root, layout, tasks=None):
    layouts, every, _ = LAYOUTS[layout]
    return data.find(root, layouts, tasks or every)


# The scenes.


@pytest.fixture(scope="module")
def scene():
    return fixture.render(120, 160, np.random.default_rng(3))


def test_normals_are_those_of_the_depth(scene):
    points = scene.depth[:, :, None] * fixture.rays(120, 160)
    right, down = points[1:, 1:] - points[1:, :-1], points[1:, 1:] - points[:-1, 1:]
    normals = np.cross(down, right)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals *= np.sign(-(normals * points[1:, 1:]).sum(-1, keepdims=True))  # to the camera
    normals *= [1, -1, -1]  # y up, z to the viewer
    face = scene.face
    inside = (face[1:, 1:] == face[1:, :-1]) & (face[1:, 1:] == face[:-1, 1:])
    assert inside.mean() > 0.9
    cosines = (normals * scene.normal[1:, 1:]).sum(-1)[inside]
    assert cosines.min() > 1 - 1e-6
    assert len(np.unique(face)) > 8


def test_edges_are_where_depth_or_normals_jump(scene):
    points = scene.depth[:, :, None] * fixture.rays(120, 160)
    camera = scene.normal * [1, -1, -1]
    jump = np.zeros(scene.depth.shape, dtype=bool)
    for axis in (0, 1):
        step = np.diff(points, axis=axis)
        first = np.take(camera, range(points.shape[axis] - 1), axis)
        off_plane = np.abs((step * first).sum(-1)) > 1e-9
        turned = np.abs(np.diff(camera, axis=axis)).sum(-1) > 1e-9
        jump[: step.shape[0], : step.shape[1]] |= off_plane | turned
    assert (jump == scene.edge).mean() > 0.999
    assert 0.01 < scene.edge.mean() < 0.3


def test_keypoints_are_at_edges(scene):
    rows, columns = np.nonzero(scene.keypoint > 0.9)
    assert len(rows)
    for row, column in zip(rows, columns, strict=True):
        assert scene.edge[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3].any()


def test_fixture_is_the_same_each_time(written, tmp_path):
    fixture.write("taskonomy", tmp_path, SIZE)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")]
    assert len(files) > 60
    for file in files:
        assert (tmp_path / file).read_bytes() == (written / "taskonomy" / file).read_bytes()


# The layouts.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_readers_give_what_was_rendered(written, layout):
    _, tasks, name = LAYOUTS[layout]
    source = found(written / layout, layout)
    assert source.layout == name
    assert {split: len(x) > 0 for split, x in source.splits.items()} == dict.fromkeys(
        ("train", "val", "test"), True
    )
    held_out = layout != "omnidata"
    assert len(source.splits["train"]) == 8 - held_out
    sample = source.splits["test"][0]
    assert set(sample) == {"input", *tasks}
    scene = fixture._scenes(SIZE, 0)["test"][0]
    size = (256, 256) if layout in ("taskonomy", "omnidata") else SIZE
    same = {
        name: data.resized(torch.tensor(getattr(scene, attribute)).float(), size)
        for name, attribute in (("kind", "kind"), ("depth", "depth"), ("edge", "edge"))
    }
    assert sample["input"].shape == (3, *size)
    known = sample["seg"] != data.IGNORE
    assert 0.95 < known.float().mean() < 1  # a corner is not
    count = source.outputs["seg"]
    assert torch.equal(sample["seg"][known], (same["kind"].long() % count)[known])
    assert torch.equal(sample["depth"][0] == 0, ~known)
    depth = sample["depth"][0][known]
    if layout in ("cityscapes", "cityscapes_mtan"):
        depth = 1 / depth
    if layout in ("taskonomy", "omnidata"):
        depth = ((depth * np.log(2**16)).exp() - 1) / 512
    assert torch.allclose(depth, same["depth"][known], atol=2e-3)
    if "normal" in sample:
        normal = data.resized(torch.tensor(scene.normal).permute(2, 0, 1).float(), size)
        assert torch.equal(sample["normal"].norm(dim=0) > 0.5, known)
        assert ((sample["normal"] * normal).sum(0)[known] > 0.999).all()
    if "edge" in sample:
        assert torch.equal(sample["edge"][0] > 0, same["edge"] > 0)
        assert sample["keypoint"].min() == -1
        assert sample["keypoint"].max() == 1


def test_taskonomy_has_class_weights(written):
    source = found(written / "taskonomy", "taskonomy")
    assert source.class_weights.shape == (17,)
    assert found(written / "omnidata", "omnidata").class_weights is None


def test_only_the_tasks_files_are_read(copy):
    root = copy("nyuv2")
    shutil.rmtree(root / "normal_mask")
    assert set(found(root, "nyuv2", ["seg"]).splits["train"][0]) == {"input", "seg"}


def test_arrays_and_tables(written):
    source = open_camvid(written / "camvid", ["label", "presence"])
    sample = source.splits["val"][0]
    assert sample["input"].shape == (3, *SIZE)
    assert sample["label"].unique()[-1] == data.IGNORE
    assert sample["presence"].shape == (11,)
    source = open_census(written / "census", ["college", "marital7"])
    assert source.features == 2 + 9 + 5 + 3
    rows = source.splits["train"].tensors["input"]
    assert (rows[:, 2:].sum(1) == 3).all()
    assert rows[:, :2].mean(0).abs().max() < 1e-4


# Augmentation.


def view(sample, **changes):
    settings = {"crop": None, "scales": (1, 1), "zoom": {}, "normals": (), "padding": {}}
    augment = data.Augment(**(settings | changes))
    for place in range(100):  # until mirrored
        generator = np.random.default_rng([0, place])
        twin = np.random.default_rng([0, place])
        twin.uniform()
        if twin.random() < 0.5:
            return augment(sample, generator)
    raise AssertionError


def test_mirror_turns_normals_round():
    normal = torch.nn.functional.normalize(torch.randn(3, 4, 6), dim=0)
    image = torch.randn(3, 4, 6)
    seen = view({"input": image, "normal": normal, "place": torch.tensor(3)}, normals=("normal",))
    assert torch.equal(seen["input"], image.flip(-1))
    assert torch.equal(seen["normal"][0], -normal.flip(-1)[0])
    assert torch.equal(seen["normal"][1:], normal.flip(-1)[1:])
    assert seen["place"] == 3


def test_enlarging_brings_things_nearer():
    depth = torch.full((1, 4, 6), 3.0)
    depth[:, 0] = 0
    for zoom, expected in ((data.nearer, 1.5), (data.larger, 6.0)):
        seen = view({"input": depth, "depth": depth}, scales=(2, 2), zoom={"depth": zoom})["depth"]
        assert seen.shape == (1, 8, 12)
        assert set(seen.unique().tolist()) == {0.0, expected}
    whole = np.log(2.0**16)
    encoded = torch.log1p(torch.tensor([0.0, 2048.0])) / whole
    nearer = torch.expm1(data._log_nearer(encoded, 2.0) * whole)
    assert nearer.tolist() == pytest.approx([0, 1024], rel=1e-3)


def test_small_pictures_are_centred_in_what_is_ignored():
    sample = {"input": torch.ones(3, 4, 6), "seg": torch.ones(4, 6, dtype=torch.long)}
    seen = view(sample, crop=(8, 6), padding={"seg": 255})
    assert seen["seg"].tolist() == [[255] * 6] * 2 + [[1] * 6] * 4 + [[255] * 6] * 2
    assert torch.equal(seen["input"][0], (seen["seg"] == 1).float())


def test_labels_stay_with_their_pixels():
    place = torch.arange(20 * 30).view(20, 30)
    image = place.float().expand(3, 20, 30)
    augment = data.Augment((7, 9), (1, 1), {}, (), {})
    views = [
        augment({"input": image, "seg": place}, np.random.default_rng(seed)) for seed in range(20)
    ]
    for seen in views:
        assert seen["seg"].shape == (7, 9)
        assert torch.equal(seen["input"][0], seen["seg"].float())
    assert len({int(seen["seg"][0, 0]) for seen in views}) > 10


def test_batches_hang_on_seed_and_step_alone(written):
    split = found(written / "nyuv2", "nyuv2").splits["train"]
    augment = data.Augment((16, 16), (0.5, 1.5), {}, ("normal",), {"seg": 255})

    def batches(start, workers, seed=0):
        return list(
            data.training_batches(
                split, augment, batch=3, seed=seed, start=start, stop=5, workers=workers
            )
        )

    whole, late, other = batches(0, 0), batches(2, 2), batches(0, 0, seed=1)
    assert len(late) == 3
    for one, two in zip(whole[2:], late, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(whole[0]["input"], other[0]["input"])
    keys = [n for batch in data.Places(7, 3, 0, 0, 14) for n, _ in batch]
    assert sorted(keys[:7]) == sorted(keys[7:14]) == list(range(7))
    assert keys[:7] != keys[7:14]


# What can be wrong.


def test_no_folder_and_no_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
        data.find(tmp_path / "nowhere", data.NYUV2, ["seg"])
    message = (
        "no layout known here. Missing: nyu_v2_3task.json of AdaShare's NYU-v2, "
        "train/image of MTAN's NYU-v2"
    )
    with pytest.raises(FileNotFoundError, match=message):
        data.find(tmp_path, data.NYUV2, ["seg"])


def test_missing_files_are_named(copy):
    root = copy("nyuv2")
    (root / "depth" / "0002.npy").unlink()
    split = found(root, "nyuv2").splits["train"]
    message = r"0002\.npy is missing: the 'depth' of sample 0 of AdaShare's NYU-v2"
    with pytest.raises(FileNotFoundError, match=message):
        split[0]
    root = copy("nyuv2_mtan")
    shutil.rmtree(root / "val" / "normal")
    with pytest.raises(FileNotFoundError, match=r"val/normal is missing: the 'normal' of MTAN's"):
        found(root, "nyuv2_mtan")
    root = copy("omnidata")
    shutil.rmtree(root / "keypoints2d")
    with pytest.raises(FileNotFoundError, match="keypoints2d is missing: the 'keypoint' of Omni"):
        found(root, "omnidata")
    root = copy("taskonomy")
    (root / "semseg_prior_factor.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"semseg_prior_factor\.npy is missing"):
        found(root, "taskonomy")
    root = copy("camvid")
    (root / "val.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.npz is missing: the val split of CamVid"):
        open_camvid(root, ["label"])
    root = copy("census")
    (root / "schema.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"schema\.json is missing"):
        open_census(root, ["college"])


@pytest.mark.slow
def test_a_worker_names_the_file_too(copy):
    root = copy("nyuv2")
    (root / "depth" / "0002.npy").unlink()
    split = found(root, "nyuv2").splits["train"]
    batches = data.training_batches(split, None, batch=7, seed=0, start=0, stop=1, workers=1)
    with pytest.raises(FileNotFoundError, match=r"0002\.npy is missing"):
        list(batches)


def damage_cut(root):
    path = root / "img" / "0001.png"
    path.write_bytes(path.read_bytes()[:200])
    return r"0001\.png is broken"


def damage_text(root):
    (root / "depth" / "0001.npy").write_text("no array")
    return r"0001\.npy is broken"


def damage_class(root):
    path = root / "seg" / "0001.png"
    array = np.array(Image.open(path))
    array[-1, -1] = 41
    Image.fromarray(array).save(path)
    return r"0001\.png holds class 41\. There are 40 classes, 0 to 39, and 255 = ignore"


def damage_nan(root):
    array = np.load(root / "depth" / "0001.npy")
    array[3, 3] = np.nan
    np.save(root / "depth" / "0001.npy", array)
    return r"0001\.npy holds NaN"


def damage_size(root):
    np.save(root / "depth" / "0001.npy", np.ones((4, 5), dtype=np.float32))
    return r"0001\.npy is 4x5, but the input is 48x64"


def damage_shape(root):
    np.save(root / "depth" / "0001.npy", np.ones((48, 64, 2), dtype=np.float32))
    return r"0001\.npy must have shape \(H, W, 1\)\. Got \(48, 64, 2\)"


def damage_mode(root):
    Image.open(root / "img" / "0001.png").convert("L").save(root / "img" / "0001.png")
    return r"0001\.png must be of mode RGB\. Got L"


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        *(damage_cut, damage_text, damage_class, damage_nan),
        *(damage_size, damage_shape, damage_mode),
    ],
)
def test_broken_files_are_named(copy, damage):
    root = copy("nyuv2")
    message = damage(root)
    with pytest.raises(ValueError, match=message):
        found(root, "nyuv2").splits["val"][0]


def test_empty_splits(copy):
    root = copy("nyuv2")
    lists = json.loads((root / "nyu_v2_3task.json").read_text())
    (root / "nyu_v2_3task.json").write_text(json.dumps(lists | {"test": []}))
    with pytest.raises(ValueError, match="The test split of AdaShare's NYU-v2 is empty"):
        found(root, "nyuv2")
    (root / "nyu_v2_3task.json").write_text(json.dumps(lists | {"train": lists["train"][:1]}))
    with pytest.raises(ValueError, match="The train split of AdaShare's NYU-v2 is empty"):
        found(root, "nyuv2")  # nothing is left after holding out
    (root / "nyu_v2_3task.json").write_text('{"train": [["a.png"]]}')
    with pytest.raises(ValueError, match=r"nyu_v2_3task\.json is broken: .* lists of 4 files"):
        found(root, "nyuv2")
    root = copy("cityscapes_mtan")
    for path in (root / "val" / "image").glob("*"):
        path.unlink()
    with pytest.raises(ValueError, match="The val split of MTAN's Cityscapes is empty"):
        found(root, "cityscapes_mtan")
    root = copy("omnidata")
    (root / "train_val_test_tiny.csv").write_text("id,train,val,test\nashland,1,0,0\n")
    with pytest.raises(ValueError, match="The val split of Omnidata's Taskonomy is empty"):
        found(root, "omnidata")


@pytest.mark.slow
def test_broken_arrays_and_tables(copy):
    root = copy("camvid")
    arrays = dict(np.load(root / "train.npz"))
    np.savez(root / "train.npz", **{**arrays, "label": arrays["label"] + 10})
    with pytest.raises(ValueError, match=r"train\.npz holds class .*11 classes"):
        open_camvid(root, ["label"]).splits["train"][0]
    np.savez(root / "train.npz", image=arrays["image"])
    with pytest.raises(ValueError, match=r"train\.npz lacks \['edge'\] of CamVid"):
        open_camvid(root, ["edge"])
    np.savez(root / "train.npz", **{**arrays, "edge": arrays["edge"][1:]})
    with pytest.raises(ValueError, match="must be equally long"):
        open_camvid(root, ["edge"])
    np.savez(root / "train.npz", **{**arrays, "edge": arrays["edge"] + 1})
    with pytest.raises(ValueError, match=r"'edge' of .*train\.npz holds 2\. It must be 0 or 1"):
        open_camvid(root, ["edge"]).splits["train"][0]
    np.savez(root / "train.npz", **{**arrays, "presence": arrays["presence"] * 0.5})
    with pytest.raises(ValueError, match=r"'presence' of .*train\.npz holds 0\.5"):
        open_camvid(root, ["presence"]).splits["train"][0]
    np.savez(root / "train.npz", **{**arrays, "presence": arrays["presence"][:, 1:]})
    with pytest.raises(ValueError, match=r"'presence' of .* must have shape \(N, 11\)"):
        open_camvid(root, ["presence"]).splits["train"][0]
    np.savez(root / "train.npz", **{**arrays, "group": arrays["group"][:, 1:]})
    with pytest.raises(
        ValueError, match=r"'group' of .*train\.npz is 47x64, but the input is 48x64"
    ):
        open_camvid(root, ["group"]).splits["train"][0]
    (root / "train.npz").write_text("nothing")
    with pytest.raises(ValueError, match=r"train\.npz is broken"):
        open_camvid(root, ["edge"])
    root = copy("census")
    arrays = dict(np.load(root / "test.npz"))
    np.savez(root / "test.npz", **{**arrays, "college": arrays["college"] + 2})
    with pytest.raises(ValueError, match=r"'college' of .*test\.npz holds class 3"):
        open_census(root, ["college"])
    np.savez(root / "test.npz", **{**arrays, "college": arrays["college"].astype(int) - 2})
    with pytest.raises(ValueError, match=r"'college' of .*test\.npz holds class -1"):
        open_census(root, ["college"])
    np.savez(root / "test.npz", **{**arrays, "x_cat": arrays["x_cat"].astype(int) - 1})
    with pytest.raises(ValueError, match="does not fit schema"):
        open_census(root, ["college"])
    np.savez(root / "test.npz", **{**arrays, "x_cat": arrays["x_cat"] + 9})
    with pytest.raises(ValueError, match="does not fit schema"):
        open_census(root, ["college"])
    np.savez(root / "test.npz", **{**arrays, "x_num": arrays["x_num"] * np.nan})
    with pytest.raises(ValueError, match=r"'x_num' of .* holds NaN"):
        open_census(root, ["college"])
