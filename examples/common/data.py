"""Data sets as they lie on disk, and how their samples reach the net.

A sample is ``{"input": [3, H, W], task: label}``. Labels, whatever the files hold:

| kind | shape | invalid |
|---|---|---|
| classes | ``[H, W]`` int64 | 255 |
| normals, unit length | ``[3, H, W]`` | zero vector |
| depth | ``[1, H, W]`` | 0 |
| keypoints, edges in [-1, 1] | ``[1, H, W]`` | 255 (padding) |

A file that is missing or broken is an error that names it.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

Sample = dict[str, Tensor]
Reader = Callable[[Path], Tensor]

IGNORE = 255
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # of ImageNet
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Split(Protocol):
    """Samples by number."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, number: int) -> Sample:
        """One of them."""
        ...


@dataclass(frozen=True)
class Source:
    """A data set found on disk.

    Attributes:
        layout: Whose layout it is.
        splits: ``{"train": ..., "val": ..., "test": ...}``.
        outputs: Channels of each task's head.
        class_weights: For the segmentation's cross-entropy, ``[classes]``.
        zoom: ``{task: f(label, factor)}``: how values change when the picture is enlarged.
        features: Length of a row, for tables.
    """

    layout: str
    splits: Mapping[str, Split]
    outputs: Mapping[str, int]
    class_weights: Tensor | None = None
    zoom: Mapping[str, Callable[[Tensor, float], Tensor]] = field(default_factory=dict)
    features: int = 3

    def __post_init__(self) -> None:
        """Refuse empty splits."""
        for name, split in self.splits.items():
            if len(split) == 0:
                raise ValueError(f"The {name} split of {self.layout} is empty.")


@dataclass(frozen=True)
class Layout:
    """A way to lay a data set out.

    Attributes:
        name: Whose layout it is.
        marker: A glob of the file that tells it from others.
        open: ``open(root, tasks) -> Source``.
    """

    name: str
    marker: str
    open: Callable[[Path, Sequence[str]], Source]


def find(root: Path, layouts: Sequence[Layout], tasks: Sequence[str]) -> Source:
    """Open a data set in whichever layout it has.

    Raises:
        FileNotFoundError: If it has none of them: says what is missing of which.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}.")
    for layout in layouts:
        if next(root.glob(layout.marker), None) is not None:
            return layout.open(root, tasks)
    missing = ", ".join(f"{layout.marker} of {layout.name}" for layout in layouts)
    raise FileNotFoundError(f"{root} has no layout known here. Missing: {missing}.")


# Single files.


def load_array(path: Path) -> np.ndarray:
    """A ``.npy`` file."""
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is broken: {error}") from error


def load_picture(path: Path, *modes: str) -> np.ndarray:
    """A picture, ``[H, W]`` or ``[H, W, 3]``, which must have one of the modes."""
    try:
        with Image.open(path) as picture:
            mode, array = picture.mode, np.asarray(picture)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is broken: {error}") from error
    if mode not in modes:
        raise ValueError(f"{path} must be of mode {' or '.join(modes)}. Got {mode}.")
    return array


def tensor(array: np.ndarray, path: Path, channels: int) -> Tensor:
    """``[channels, H, W]`` float32 from ``[H, W]`` or ``[H, W, channels]``, checked."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] != channels:
        raise ValueError(f"{path} must have shape (H, W, {channels}). Got {array.shape}.")
    found = torch.tensor(array, dtype=torch.float32).permute(2, 0, 1)
    if not found.isfinite().all():
        raise ValueError(f"{path} holds NaN or infinite values.")
    return found


def classes(array: np.ndarray, path: Path, count: int, ignore: int) -> Tensor:
    """``[H, W]`` int64 from class indices, checked; what is ignored becomes 255."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2:
        raise ValueError(f"{path} must have shape (H, W). Got {array.shape}.")
    found = torch.tensor(array.astype(np.int64))
    ignored = found == ignore
    wrong = found[~ignored & ((found < 0) | (found >= count))]
    if len(wrong):
        raise ValueError(
            f"{path} holds class {int(wrong[0])}. There are {count} classes, 0 to {count - 1}, "
            f"and {ignore} = ignore."
        )
    return found.masked_fill(ignored, IGNORE)


def marks(values: Tensor, what: str) -> Tensor:
    """Yes and no as 1 and 0, checked; 255 is ignored."""
    wrong = values[(values != 0) & (values != 1) & (values != IGNORE)]
    if len(wrong):
        raise ValueError(
            f"{what} holds {float(wrong[0]):g}. It must be 0 or 1, or {IGNORE} = ignore."
        )
    return values


def normalized(image: Tensor) -> Tensor:
    """An RGB image with values in [0, 1], as nets trained on ImageNet want it."""
    return (image - MEAN) / STD


def unit(normals: Tensor) -> Tensor:
    """Vectors of length 1; those that have none to speak of become zero."""
    length = normals.norm(dim=0, keepdim=True)
    return torch.where(length > 0.5, normals / length.clamp(min=0.5), torch.zeros(()))


def png_image(path: Path) -> Tensor:
    """An RGB picture."""
    return normalized(tensor(load_picture(path, "RGB"), path, 3) / 255)


def npy_image(path: Path) -> Tensor:
    """RGB values in [0, 1]."""
    return normalized(tensor(load_array(path), path, 3))


def png_classes(count: int) -> Reader:
    """Class indices in a grey picture, 255 = ignore."""
    return lambda path: classes(load_picture(path, "L"), path, count, IGNORE)


def npy_classes(count: int) -> Reader:
    """Class indices in an array, -1 = ignore."""
    return lambda path: classes(load_array(path), path, count, -1)


def png_normals(path: Path) -> Tensor:
    """Normals as ``(n + 1) * 127.5``; where all three are 255 there is none."""
    raw = tensor(load_picture(path, "RGB"), path, 3)
    return unit((raw / 127.5 - 1) * (raw < 255).any(0))


def npy_normals(path: Path) -> Tensor:
    """Normals as they are; zero where there is none."""
    return unit(tensor(load_array(path), path, 3))


def npy_depth(path: Path) -> Tensor:
    """Depth, or inverse depth, where positive."""
    return tensor(load_array(path), path, 1).clamp(min=0)


# Lists of files.


@dataclass(frozen=True)
class Files:
    """A split of files.

    Attributes:
        layout: Whose layout it is, for errors.
        samples: ``{"input": file, task: file}`` of each sample.
        readers: How each of them is read.
        resize: Bring everything to this height and width first, by nearest neighbour.
    """

    layout: str
    samples: Sequence[Mapping[str, Path]]
    readers: Mapping[str, Reader]
    resize: tuple[int, int] | None = None

    def __len__(self) -> int:
        """How many samples."""
        return len(self.samples)

    def __getitem__(self, number: int) -> Sample:
        """Read one.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If one is broken, holds what it must not, or is of another size.
        """
        sample = {}
        for name, path in self.samples[number].items():
            try:
                sample[name] = self.readers[name](path)
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{path} is missing: the '{name}' of sample {number} of {self.layout}."
                ) from None
            size = sample[name].shape[-2:]
            if size != sample["input"].shape[-2:]:
                raise ValueError(
                    f"{path} is {size[0]}x{size[1]}, but the input is "
                    f"{sample['input'].shape[-2]}x{sample['input'].shape[-1]}."
                )
        if self.resize is not None:
            sample = {name: resized(value, self.resize) for name, value in sample.items()}
        return sample


def hold_out(samples: Sequence[Any], every: int = 10) -> tuple[list[Any], list[Any]]:
    """Training and validation samples, for data that come without the latter: every tenth."""
    kept = [sample for i, sample in enumerate(samples) if i % every]
    return kept, list(samples[::every])


def load_lists(path: Path, layout: str, names: Sequence[str]) -> dict[str, list[dict[str, Path]]]:
    """AdaShare's JSON: ``{split: [[file, ...], ...]}``, files relative to its folder.

    Args:
        path: The JSON.
        layout: Whose layout it is, for errors.
        names: What the files of a sample are, in order.
    """
    try:
        lists = json.loads(path.read_text())
        found = {
            split: [
                {name: path.parent / file for name, file in zip(names, files, strict=True)}
                for files in samples
            ]
            for split, samples in lists.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is broken: {layout} has lists of {len(names)} files ({', '.join(names)}) "
            f"under 'train' and 'test'. {error}"
        ) from error
    for split in ("train", "test"):
        if not found.get(split):
            raise ValueError(f"The {split} split of {layout} is empty: see {path}.")
    return found


def make_splits(
    lists: Mapping[str, list[dict[str, Path]]],
    layout: str,
    readers: Mapping[str, Reader],
    tasks: Sequence[str],
    resize: tuple[int, int] | None = None,
) -> dict[str, Split]:
    """The three splits, with the files that the tasks need; validation held out if need be."""
    train, val, test = lists["train"], lists.get("val"), lists["test"]
    if not val:
        train, val = hold_out(train)
    needed = ["input", *tasks]
    return {
        split: Files(
            layout, [{name: sample[name] for name in needed} for sample in samples], readers, resize
        )
        for split, samples in (("train", train), ("val", val), ("test", test))
    }


def numbered(
    root: Path, layout: str, folders: Mapping[str, str], needed: Sequence[str]
) -> dict[str, list[dict[str, Path]]]:
    """MTAN's files ``{train,val}/<folder>/<number>.npy``; its ``val`` is the test set."""
    lists = {}
    for split, name in (("train", "train"), ("test", "val")):
        folder = root / name / folders["input"]
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing: the images of {layout}.")
        for task in needed:
            if not (root / name / folders[task]).is_dir():
                raise FileNotFoundError(
                    f"{root / name / folders[task]} is missing: the '{task}' of {layout}."
                )
        files = sorted(folder.glob("*.npy"), key=lambda file: (len(file.name), file.name))
        if not files:
            raise ValueError(f"The {name} split of {layout} is empty: {folder} holds no .npy.")
        lists[split] = [
            {what: root / name / sub / file.name for what, sub in folders.items()} for file in files
        ]
    return lists


def nearer(depth: Tensor, factor: float) -> Tensor:
    """Metric depth, when the picture is enlarged."""
    return depth / factor


def larger(disparity: Tensor, factor: float) -> Tensor:
    """Inverse depth, when the picture is enlarged."""
    return disparity * factor


# Published layouts.


def _nyuv2_adashare(root: Path, tasks: Sequence[str]) -> Source:
    layout = "AdaShare's NYU-v2"
    names = ("input", "seg", "normal", "depth")
    readers = {
        "input": png_image,
        "seg": png_classes(40),
        "normal": png_normals,
        "depth": npy_depth,
    }
    lists = load_lists(root / "nyu_v2_3task.json", layout, names)
    splits = make_splits(lists, layout, readers, tasks)
    return Source(layout, splits, {"seg": 40, "normal": 3, "depth": 1}, zoom={"depth": nearer})


def _nyuv2_mtan(root: Path, tasks: Sequence[str]) -> Source:
    layout = "MTAN's NYU-v2"
    folders = {"input": "image", "seg": "label", "normal": "normal", "depth": "depth"}
    readers = {
        "input": npy_image,
        "seg": npy_classes(13),
        "normal": npy_normals,
        "depth": npy_depth,
    }
    splits = make_splits(numbered(root, layout, folders, tasks), layout, readers, tasks)
    return Source(layout, splits, {"seg": 13, "normal": 3, "depth": 1}, zoom={"depth": nearer})


def _cityscapes_adashare(root: Path, tasks: Sequence[str]) -> Source:
    layout = "AdaShare's Cityscapes"
    names = ("input", "depth", "seg2", "seg7", "seg")
    readers = {"input": npy_image, "seg": npy_classes(19), "depth": npy_depth}
    splits = make_splits(load_lists(root / "cityscape.json", layout, names), layout, readers, tasks)
    return Source(layout, splits, {"seg": 19, "depth": 1}, zoom={"depth": larger})


def _cityscapes_mtan(root: Path, tasks: Sequence[str]) -> Source:
    layout = "MTAN's Cityscapes"
    label = "label_7" if (root / "train" / "label_7").is_dir() else "label"
    folders = {"input": "image", "seg": label, "depth": "depth"}
    readers = {"input": npy_image, "seg": npy_classes(7), "depth": npy_depth}
    splits = make_splits(numbered(root, layout, folders, tasks), layout, readers, tasks)
    return Source(layout, splits, {"seg": 7, "depth": 1}, zoom={"depth": larger})


NYUV2 = (
    Layout("AdaShare's NYU-v2", "nyu_v2_3task.json", _nyuv2_adashare),
    Layout("MTAN's NYU-v2", "train/image", _nyuv2_mtan),
)
CITYSCAPES = (
    Layout("AdaShare's Cityscapes", "cityscape.json", _cityscapes_adashare),
    Layout("MTAN's Cityscapes", "train/image", _cityscapes_mtan),
)

# Taskonomy: files of Omnidata, split by AdaShare's JSON or by buildings.

DOMAINS = {
    "input": "rgb",
    "seg": "segment_semantic",
    "normal": "normal",
    "depth": "depth_zbuffer",
    "keypoint": "keypoints2d",
    "edge": "edge_texture",
}
TASKONOMY_OUTPUTS = {"seg": 17, "normal": 3, "depth": 1, "keypoint": 1, "edge": 1}


def _taskonomy_classes(path: Path) -> Tensor:
    """1 background and 2 to 17 objects become 0 to 16; 0, uncertain, is ignored."""
    return classes(load_picture(path, "L").astype(np.int64) - 1, path, 17, -1)


def _taskonomy_depth(path: Path) -> Tensor:
    """``log(1 + v) / log(2^16)`` of 16-bit values in 1/512 m; far ones are invalid."""
    raw = tensor(load_picture(path, "I;16", "I"), path, 1)
    return torch.log1p(raw * (raw < 64500)) / np.log(2.0**16)


def _log_nearer(depth: Tensor, factor: float) -> Tensor:
    """Logarithmic depth, when the picture is enlarged."""
    whole = np.log(2.0**16)
    return torch.log1p(torch.expm1(depth * whole) / factor) / whole


def _clipped(top: float) -> Reader:
    """16-bit responses as shares of the range, clipped at ``top`` and stretched to [-1, 1]."""

    def read(path: Path) -> Tensor:
        raw = tensor(load_picture(path, "I;16", "I"), path, 1)
        return (raw / 2**16).clamp(max=top) / top * 2 - 1

    return read


TASKONOMY_READERS: dict[str, Reader] = {
    "input": png_image,
    "seg": _taskonomy_classes,
    "normal": png_normals,
    "depth": _taskonomy_depth,
    "keypoint": _clipped(0.005),
    "edge": _clipped(0.08),
}


def _taskonomy(
    root: Path, tasks: Sequence[str], layout: str, lists: Mapping[str, list[dict[str, Path]]]
) -> Source:
    splits = make_splits(lists, layout, TASKONOMY_READERS, tasks, resize=(256, 256))
    weights = None
    if (root / "semseg_prior_factor.npy").exists():
        weights = torch.from_numpy(load_array(root / "semseg_prior_factor.npy")).float()
        if weights.shape != (17,):
            raise ValueError(f"{root / 'semseg_prior_factor.npy'} must hold 17 weights.")
    return Source(layout, splits, TASKONOMY_OUTPUTS, weights, {"depth": _log_nearer})


def _taskonomy_adashare(root: Path, tasks: Sequence[str]) -> Source:
    layout = "AdaShare's Taskonomy"
    listed = load_lists(root / "taskonomy.json", layout, tuple(DOMAINS))
    if not (root / "semseg_prior_factor.npy").exists():
        raise FileNotFoundError(
            f"{root / 'semseg_prior_factor.npy'} is missing: the class weights of {layout}."
        )

    def on_disk(path: Path) -> Path:
        """``building/domain/file`` of the list is ``domain/taskonomy/building/file`` on disk."""
        building, domain, file = path.relative_to(root).parts
        return root / domain / "taskonomy" / building / file

    lists = {
        split: [{name: on_disk(path) for name, path in sample.items()} for sample in samples]
        for split, samples in listed.items()
    }
    return _taskonomy(root, tasks, layout, lists)


def _taskonomy_omnidata(root: Path, tasks: Sequence[str]) -> Source:
    layout = "Omnidata's Taskonomy"
    table = sorted(root.glob("train_val_test_*.csv"))[0]
    for task in tasks:
        if not (root / DOMAINS[task]).is_dir():
            raise FileNotFoundError(f"{root / DOMAINS[task]} is missing: the '{task}' of {layout}.")
    lists: dict[str, list[dict[str, Path]]] = {"train": [], "val": [], "test": []}
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if not {"id", *lists} <= set(row):
            raise ValueError(f"{table} must have the columns id, train, val, test. Got {row}.")
        for split in (split for split in lists if row[split] == "1"):
            for image in sorted((root / "rgb" / "taskonomy" / row["id"]).glob("*.png")):
                stem = image.name.removesuffix("rgb.png")
                lists[split].append(
                    {
                        name: root / domain / "taskonomy" / row["id"] / f"{stem}{domain}.png"
                        for name, domain in DOMAINS.items()
                    }
                )
    for split, samples in lists.items():
        if not samples:
            raise ValueError(f"The {split} split of {layout} is empty: see {table} and rgb/.")
    return _taskonomy(root, tasks, layout, lists)


TASKONOMY = (
    Layout("AdaShare's Taskonomy", "taskonomy.json", _taskonomy_adashare),
    Layout("Omnidata's Taskonomy", "train_val_test_*.csv", _taskonomy_omnidata),
)

# Arrays: all samples of a split in one file.


def load_npz(root: Path, split: str, names: Sequence[str], layout: str) -> dict[str, np.ndarray]:
    """Some arrays of ``<split>.npz``, equally long and not empty."""
    path = root / f"{split}.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: the {split} split of {layout}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            if absent := [name for name in names if name not in file]:
                raise KeyError(f"{path} lacks {absent} of {layout}. It has {file.files}.")
            arrays = {name: file[name] for name in names}
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is broken: {error}") from error
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The arrays of {path} must be equally long. Got {lengths}.")
    if not all(lengths.values()):
        raise ValueError(f"The {split} split of {layout} is empty: see {path}.")
    return arrays


@dataclass(frozen=True)
class Arrays:
    """A split of arrays.

    Attributes:
        path: Their file, for errors.
        arrays: ``{"input": ..., task: ...}``, samples first.
        readers: ``read(array, path)`` of each.
    """

    path: Path
    arrays: Mapping[str, np.ndarray]
    readers: Mapping[str, Callable[[np.ndarray, Path], Tensor]]

    def __len__(self) -> int:
        """How many samples."""
        return len(self.arrays["input"])

    def __getitem__(self, number: int) -> Sample:
        """One of them.

        Raises:
            ValueError: If it holds what it must not, or is of another size than the input.
        """
        sample = {
            name: self.readers[name](array[number], self.path)
            for name, array in self.arrays.items()
        }
        full = sample["input"].shape[-2:]
        for name, value in sample.items():
            if value.dim() > 1 and (size := value.shape[-2:]) != full:
                raise ValueError(
                    f"'{name}' of {self.path} is {size[0]}x{size[1]}, but the input is "
                    f"{full[0]}x{full[1]}."
                )
        return sample


@dataclass(frozen=True)
class Table:
    """A split of a table; read by the batch.

    Attributes:
        tensors: ``{"input": [N, F], task: [N]}``.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        """How many rows."""
        return len(self.tensors["input"])

    def __getitem__(self, number: int) -> Sample:
        """One row."""
        return {name: values[number] for name, values in self.tensors.items()}

    def __getitems__(self, keys: Sequence[tuple[int, int | None]]) -> Sample:
        """Several rows, as a batch."""
        rows = torch.tensor([row for row, _ in keys])
        return {name: values[rows] for name, values in self.tensors.items()}


# Augmentation.


def resized(value: Tensor, size: tuple[int, int], mode: str = "nearest-exact") -> Tensor:
    """A picture or label of another height and width."""
    if value.dim() == 2:
        return resized(value.unsqueeze(0), size, mode).squeeze(0)
    kind, smooth = value.dtype, mode == "bilinear"
    options = {"align_corners": False} if smooth else {}
    return interpolate(value.unsqueeze(0).float(), size=size, mode=mode, **options)[0].to(kind)


@dataclass(frozen=True)
class Augment:
    """Scale, mirror and crop at random; labels stay true.

    Attributes:
        crop: Height and width; None leaves the picture its size.
        scales: The range that the scale is drawn from.
        zoom: ``{task: f(label, factor)}``: how values change when the picture is enlarged.
        normals: Tasks whose first channel points to the right.
        padding: What is put around each label where the picture is too small; others get 0.
    """

    crop: tuple[int, int] | None
    scales: tuple[float, float]
    zoom: Mapping[str, Callable[[Tensor, float], Tensor]]
    normals: tuple[str, ...]
    padding: Mapping[str, float]

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        """Another view of the sample."""
        factor = float(generator.uniform(*self.scales))
        mirror = generator.random() < 0.5
        where = generator.random(2)
        return {name: self._view(name, x, factor, mirror, where) for name, x in sample.items()}

    def _view(
        self, name: str, value: Tensor, factor: float, mirror: bool, where: np.ndarray
    ) -> Tensor:
        if value.dim() < 2:  # of the whole picture
            return value
        if factor != 1:
            size = (round(value.shape[-2] * factor), round(value.shape[-1] * factor))
            value = resized(value, size, "bilinear" if name == "input" else "nearest-exact")
            if name in self.zoom:
                value = self.zoom[name](value, factor)
        if mirror:
            value = value.flip(-1)
            if name in self.normals:
                value = value * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
        if self.crop is not None:
            value = _cropped(value, self.crop, where, self.padding.get(name, 0))
        return value.contiguous()


def _cropped(value: Tensor, crop: tuple[int, int], where: np.ndarray, padding: float) -> Tensor:
    """A window of that size; the picture is centred in padding where it is smaller."""
    for axis, (size, place) in zip((-2, -1), zip(crop, where, strict=True), strict=True):
        short = max(0, size - value.shape[axis])
        if short:
            around = [0, 0, short // 2, short - short // 2] if axis == -2 else []
            around = around or [short // 2, short - short // 2]
            value = torch.nn.functional.pad(value, around, value=padding)
        start = int(place * (value.shape[axis] - size + 1))
        value = value.narrow(axis, start, size)
    return value


# Batches.


@dataclass(frozen=True)
class Prepared(Dataset[Sample]):
    """A split, augmented; what a sample becomes depends on its place in the run alone.

    Attributes:
        split: The samples.
        augment: What to do with each, if anything.
        seed: Of the run.
    """

    split: Split
    augment: Augment | None
    seed: int

    def __len__(self) -> int:
        """How many samples."""
        return len(self.split)

    def __getitems__(self, keys: Sequence[tuple[int, int | None]]) -> Sample:
        """A batch of samples, each by its number in the split and its place in the run."""
        samples = []
        for number, place in keys:
            sample = self.split[number]
            if self.augment is not None and place is not None:
                sample = self.augment(sample, np.random.default_rng([self.seed, 1, place]))
            samples.append(sample)
        return default_collate(samples)


class Places(Sampler[list[tuple[int, int | None]]]):
    """Which samples make up the batches from step ``start`` on: a shuffle per epoch.

    A function of seed and step, so that a run that goes on sees what it would have seen.
    """

    def __init__(self, count: int, batch: int, seed: int, start: int, stop: int) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        """How many batches."""
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int | None]]]:
        """Batches of (number in the split, place in the run)."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start, self.stop):
            keys: list[tuple[int, int | None]] = []
            for place in range(step * self.batch, (step + 1) * self.batch):
                if place // self.count != epoch:
                    epoch = place // self.count
                    order = np.random.default_rng([self.seed, 0, epoch]).permutation(self.count)
                keys.append((int(order[place % self.count]), place))
            yield keys


def training_batches(
    split: Split,
    augment: Augment | None,
    *,
    batch: int,
    seed: int,
    start: int,
    stop: int,
    workers: int,
) -> "DataLoader[Sample]":
    """Batches of steps ``start`` to ``stop``."""
    places = Places(len(split), batch, seed, start, stop)
    return _loader(split, augment, seed, places, workers)


def test_batches(split: Split, *, batch: int, workers: int) -> "DataLoader[Sample]":
    """All samples in order, as they are."""
    keys: list[tuple[int, int | None]] = [(number, None) for number in range(len(split))]
    chunks = [keys[i : i + batch] for i in range(0, len(keys), batch)]
    return _loader(split, None, 0, chunks, workers)


def _loader(
    split: Split,
    augment: Augment | None,
    seed: int,
    batches: Iterable[list[tuple[int, int | None]]],
    workers: int,
) -> "DataLoader[Sample]":
    data: Any = split if isinstance(split, Table) else Prepared(split, augment, seed)
    own: Any = batches
    generator = torch.Generator()  # its own, so that the global one does not move
    return DataLoader(
        data, batch_sampler=own, num_workers=workers, collate_fn=_same, generator=generator
    )


def _same(batch: Sample) -> Sample:
    return batch
