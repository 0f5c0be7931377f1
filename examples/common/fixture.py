"""Small data sets in the published layouts, rendered from scenes of boxes in a room.

Every label of a picture comes from the same ray cast, so labels agree: normals are those of the
depth, edges lie where depth or normals jump, keypoints are the boxes' visible corners.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

COUNTS = {"train": 8, "test": 4}
BOXES = 4
FOCAL = 0.9  # of the width


@dataclass(frozen=True)
class Scene:
    """A rendered picture with its labels; x points right, y down, z into the picture.

    Attributes:
        image: RGB in [0, 1], ``[H, W, 3]``.
        depth: Along z, metres, ``[H, W]``.
        normal: Unit vectors towards the camera, ``[H, W, 3]``; y up, z towards the viewer.
        face: The number of the face seen, ``[H, W]``.
        kind: What is seen: 0 wall, 1 floor, 2 ceiling, 3 and up the boxes, ``[H, W]``.
        edge: Whether depth or normals jump to the right or below, ``[H, W]``.
        keypoint: How close a visible corner is, in [0, 1], ``[H, W]``.
    """

    image: np.ndarray
    depth: np.ndarray
    normal: np.ndarray
    face: np.ndarray
    kind: np.ndarray
    edge: np.ndarray
    keypoint: np.ndarray


def rays(height: int, width: int) -> np.ndarray:
    """Directions through the centres of the pixels, ``[H, W, 3]`` with z = 1."""
    columns = (np.arange(width) + 0.5 - width / 2) / (FOCAL * width)
    rows = (np.arange(height) + 0.5 - height / 2) / (FOCAL * width)
    x, y = np.meshgrid(columns, rows)
    return np.stack([x, y, np.ones_like(x)], -1)


def render(height: int, width: int, generator: np.random.Generator) -> Scene:
    """Cast rays into a room with a few boxes in it.

    Args:
        height: Of the picture.
        width: Of the picture.
        generator: Draws the room and the boxes.
    """
    directions = rays(height, width)
    room = np.array([generator.uniform(1.5, 2.5), 1.2, generator.uniform(4.0, 6.0)])
    depth = np.full((height, width), np.inf)
    face = np.zeros((height, width), dtype=np.int64)
    kind = np.zeros((height, width), dtype=np.int64)
    normal = np.zeros((height, width, 3))
    seen = (depth, face, normal, kind)
    # The room is seen from inside, its boxes from outside.
    _cast(directions, np.zeros(3), np.eye(3), room, -1, seen, [0, 2, 0], 0)
    corners = []
    for box in range(BOXES):
        half = generator.uniform(0.2, 0.6, 3)
        place = np.array(
            [
                generator.uniform(-0.7, 0.7) * room[0],
                room[1] - half[1],
                generator.uniform(0.4, 0.85) * room[2],
            ]
        )
        angle = generator.uniform(0, np.pi / 2)
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
        what = 3 + int(generator.integers(16))
        _cast(directions, place, turn, half, 1, seen, [what] * 3, 6 * (box + 1))
        signs = np.stack(np.meshgrid(*[[-1, 1]] * 3), -1).reshape(-1, 3)
        corners.append(place + (signs * half) @ turn.T)
    shade = 0.35 + 0.65 * np.abs(normal @ np.array([0.3, 0.5, 0.81]))
    edge = _edges(face)
    image = PALETTE[kind] * shade[:, :, None] + generator.normal(0, 0.02, (height, width, 3))
    return Scene(
        image=image.clip(0, 1),
        depth=depth,
        normal=normal * np.array([1, -1, -1]),
        face=face,
        kind=kind,
        edge=edge,
        keypoint=_keypoints(np.concatenate(corners), depth, edge),
    )


def _cast(
    directions: np.ndarray,
    place: np.ndarray,
    turn: np.ndarray,
    half: np.ndarray,
    side: int,
    seen: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    kinds: list[int],
    first: int,
) -> None:
    """Let the rays hit a box, from outside (``side`` 1) or inside (-1), and note what is near."""
    depth, face, normal, kind = seen
    local, origin = directions @ turn, -place @ turn
    for axis in range(3):
        slope = np.where(local[..., axis] == 0, 1e-12, local[..., axis])
        for sign in (-1, 1):
            length = (sign * half[axis] - origin[axis]) / slope
            hit = origin + length[..., None] * local
            inside = np.ones(depth.shape, dtype=bool)
            for other in range(3):
                if other != axis:
                    inside &= np.abs(hit[..., other]) <= half[other] + 1e-9
            facing = sign * side * slope < 0
            nearer = inside & facing & (length > 1e-6) & (length < depth)
            depth[nearer] = length[nearer]
            face[nearer] = first + 2 * axis + (sign > 0)
            normal[nearer] = turn[:, axis] * sign * side
            floor = side < 0 and axis == 1 and sign > 0
            kind[nearer] = 1 if floor else kinds[axis]


def _edges(face: np.ndarray) -> np.ndarray:
    """Where the face changes to the right or below."""
    edge = np.zeros(face.shape, dtype=bool)
    edge[:, :-1] |= face[:, 1:] != face[:, :-1]
    edge[:-1] |= face[1:] != face[:-1]
    return edge


def _keypoints(corners: np.ndarray, depth: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """Bumps of two pixels around the corners that nothing hides, ``[H, W]``."""
    height, width = depth.shape
    rows, columns = np.mgrid[:height, :width]
    response = np.zeros(depth.shape)
    for x, y, z in corners:
        column, row = x / z * FOCAL * width + width / 2, y / z * FOCAL * width + height / 2
        if not (0 <= row < height and 0 <= column < width):
            continue
        near = (slice(max(0, int(row) - 1), int(row) + 2),)
        near += (slice(max(0, int(column) - 1), int(column) + 2),)
        if z > depth[int(row), int(column)] * 1.02 or not edge[near].any():
            continue  # behind something
        distance = (rows + 0.5 - row) ** 2 + (columns + 0.5 - column) ** 2
        response = np.maximum(response, np.exp(-distance / 8))
    return response


CENSUS = {"income_50k": 2, "never_married": 2, "college": 2, "education17": 17, "marital7": 7}
PALETTE = np.random.default_rng(7).uniform(0.15, 1.0, (19, 3))

# Files.


def write(layout: str, root: Path, size: tuple[int, int] = (96, 128), seed: int = 0) -> None:
    """Write a small data set.

    Args:
        layout: One of `LAYOUTS`.
        root: Its folder, made if need be.
        size: Height and width of the pictures.
        seed: Of the scenes.
    """
    root.mkdir(parents=True, exist_ok=True)
    LAYOUTS[layout](root, size, seed)


def _scenes(size: tuple[int, int], seed: int) -> dict[str, list[Scene]]:
    generator = np.random.default_rng(seed)
    return {
        split: [render(*size, generator) for _ in range(count)] for split, count in COUNTS.items()
    }


def _png(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def _npy(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def _bytes(image: np.ndarray) -> np.ndarray:
    return (image * 255).round().astype(np.uint8)


def _encoded(normal: np.ndarray) -> np.ndarray:
    return ((normal + 1) * 127.5).round().astype(np.uint8)


def _with_gaps(fill: float, values: np.ndarray) -> np.ndarray:
    """The values, with a corner that the sensor did not see."""
    values = values.copy()
    values[: len(values) // 8, : values.shape[1] // 8] = fill
    return values


def _nyuv2(root: Path, size: tuple[int, int], seed: int) -> None:
    lists: dict[str, list[list[str]]] = {}
    number = 0
    for split, scenes in _scenes(size, seed).items():
        lists[split] = []
        for scene in scenes:
            number += 1
            files = [
                *(f"img/{number:04}.png", f"seg/{number:04}.png"),
                *(f"normal_mask/{number:04}.png", f"depth/{number:04}.npy"),
            ]
            _png(root / files[0], _bytes(scene.image))
            _png(root / files[1], _with_gaps(255, scene.kind.astype(np.uint8)))
            _png(root / files[2], _with_gaps(255, _encoded(scene.normal)))
            _npy(root / files[3], _with_gaps(0, scene.depth.astype(np.float32)))
            lists[split].append(files)
    (root / "nyu_v2_3task.json").write_text(json.dumps(lists))


def _nyuv2_mtan(root: Path, size: tuple[int, int], seed: int) -> None:
    for split, scenes in _scenes(size, seed).items():
        folder = root / {"train": "train", "test": "val"}[split]
        for i, scene in enumerate(scenes):
            _npy(folder / f"image/{i}.npy", scene.image)
            _npy(folder / f"label/{i}.npy", _with_gaps(-1, scene.kind % 13 * 1.0))
            _npy(folder / f"normal/{i}.npy", _with_gaps(0, scene.normal))
            _npy(folder / f"depth/{i}.npy", _with_gaps(0, scene.depth)[:, :, None])


def _cityscapes(root: Path, size: tuple[int, int], seed: int) -> None:
    lists: dict[str, list[list[str]]] = {}
    for split, scenes in _scenes(size, seed).items():
        lists[split] = []
        for i, scene in enumerate(scenes):
            names = ("image", "depth", "label2", "label7", "label19")
            files = [f"{split}/{name}/{i}.npy" for name in names]
            near = _with_gaps(0, 1 / scene.depth)[:, :, None].astype(np.float32)
            _npy(root / files[0], scene.image.astype(np.float32))
            _npy(root / files[1], near)
            for file, count in zip(files[2:], (2, 7, 19), strict=True):
                _npy(root / file, _with_gaps(-1, (scene.kind % count).astype(np.float32)))
            lists[split].append(files)
    (root / "cityscape.json").write_text(json.dumps(lists))


def _cityscapes_mtan(root: Path, size: tuple[int, int], seed: int) -> None:
    for split, scenes in _scenes(size, seed).items():
        folder = root / {"train": "train", "test": "val"}[split]
        for i, scene in enumerate(scenes):
            near = _with_gaps(0, 1 / scene.depth)[:, :, None]
            _npy(folder / f"image/{i}.npy", scene.image)
            _npy(folder / f"label_7/{i}.npy", _with_gaps(-1, scene.kind % 7 * 1.0))
            _npy(folder / f"depth/{i}.npy", near)


def _omnidata_files(root: Path, building: str, point: int, scene: Scene) -> dict[str, str]:
    """Write one view; where each domain's file is, as AdaShare's JSON says it."""
    depth = _with_gaps(65535, (scene.depth * 512).round().astype(np.uint16))
    arrays = {
        "rgb": _bytes(scene.image),
        "segment_semantic": _with_gaps(0, (1 + scene.kind % 17).astype(np.uint8)),
        "normal": _with_gaps(128, _encoded(scene.normal)),
        "depth_zbuffer": depth,
        "keypoints2d": (scene.keypoint * 0.006 * 2**16).astype(np.uint16),
        "edge_texture": (scene.edge * 0.1 * 2**16).astype(np.uint16),
    }
    listed = {}
    for domain, array in arrays.items():
        file = f"point_{point}_view_0_domain_{domain}.png"
        _png(root / domain / "taskonomy" / building / file, array)
        listed[domain] = f"{building}/{domain}/{file}"
    return listed


def _taskonomy(root: Path, size: tuple[int, int], seed: int) -> None:
    lists = {
        split: [
            list(_omnidata_files(root, f"{split}house", i, scene).values())
            for i, scene in enumerate(scenes)
        ]
        for split, scenes in _scenes(size, seed).items()
    }
    (root / "taskonomy.json").write_text(json.dumps(lists))
    np.save(root / "semseg_prior_factor.npy", np.linspace(0.5, 2.0, 17))


def _omnidata(root: Path, size: tuple[int, int], seed: int) -> None:
    lines = ["id,train,val,test"]
    for building, scenes, marks in (
        ("ashland", _scenes(size, seed)["train"], "1,0,0"),
        ("bonnie", _scenes(size, seed + 1)["test"], "0,1,0"),
        ("corozal", _scenes(size, seed)["test"], "0,0,1"),
    ):
        for i, scene in enumerate(scenes):
            _omnidata_files(root, building, i, scene)
        lines.append(f"{building},{marks}")
    (root / "train_val_test_tiny.csv").write_text("\n".join(lines) + "\n")


def _camvid(root: Path, size: tuple[int, int], seed: int) -> None:
    for i, split in enumerate(("train", "val", "test")):
        scenes = _scenes(size, seed + i)["train" if split == "train" else "test"]
        label = np.stack([_with_gaps(11, (x.kind % 11).astype(np.uint8)) for x in scenes])
        np.savez(
            root / f"{split}.npz",
            image=np.stack([_bytes(scene.image) for scene in scenes]),
            label=label,
            group=np.where(label == 11, 255, label % 6).astype(np.uint8),
            edge=np.stack([scene.edge for scene in scenes]).astype(np.uint8),
            presence=np.stack([[(x == c).sum() >= 20 for c in range(11)] for x in label])
            * np.uint8(1),
        )
    names = {"classes": [f"class{i}" for i in range(11)], "void": 11, "group_void": 255}
    (root / "labels.json").write_text(json.dumps(names))


def _census(root: Path, size: tuple[int, int], seed: int) -> None:
    """Rows whose labels follow from their features; ``size`` does not apply."""
    generator = np.random.default_rng(seed)
    vocabulary = [9, 5, 3]
    effects = generator.normal(size=(2 + sum(vocabulary), 5))
    for split, count in (("train", 512), ("val", 128), ("test", 128)):
        numbers = np.abs(generator.normal(size=(count, 2)))
        codes = np.stack([generator.integers(n, size=count) for n in vocabulary], 1)
        hot = [np.eye(n)[codes[:, i]] for i, n in enumerate(vocabulary)]
        score = np.concatenate([numbers, *hot], 1) @ effects
        labels = {
            task: np.digitize(score[:, i], np.linspace(-2, 2, n - 1)).astype(np.uint8)
            for i, (task, n) in enumerate(CENSUS.items())
        }
        numbers, codes = numbers.astype(np.float32), codes.astype(np.uint8)
        np.savez(root / f"{split}.npz", x_num=numbers, x_cat=codes, **labels)
    columns = [f"column{i}" for i in range(len(vocabulary))]
    schema = {
        "num_columns": ["first", "second"],
        "cat_columns": columns,
        "cat_vocab": {
            column: [str(code) for code in range(count)]
            for column, count in zip(columns, vocabulary, strict=True)
        },
    }
    (root / "schema.json").write_text(json.dumps(schema))


LAYOUTS: dict[str, Callable[[Path, tuple[int, int], int], None]] = {
    "nyuv2": _nyuv2,
    "nyuv2_mtan": _nyuv2_mtan,
    "cityscapes": _cityscapes,
    "cityscapes_mtan": _cityscapes_mtan,
    "taskonomy": _taskonomy,
    "omnidata": _omnidata,
    "camvid": _camvid,
    "census": _census,
}
