"""Train and prune on CamVid: classes, groups of classes, edges between them, presence of classes.

--data holds ``train.npz``, ``val.npz`` and ``test.npz`` with ``image`` [N, H, W, 3], ``label``
[N, H, W] (11 = void), ``group`` [N, H, W] (255 = void), ``edge`` [N, H, W] and ``presence``
[N, 11], all uint8.

    python camvid.py --data DIR --method vote --sparsity 0.9
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from common import data, losses
from common.loop import main
from common.options import Problem
from torch import Tensor

CLASSES, GROUPS = 11, 6


def open_camvid(root: Path, tasks: Sequence[str]) -> data.Source:
    """The three files."""
    readers: dict[str, Callable[[np.ndarray, Path], Tensor]] = {
        "input": lambda array, path: data.normalized(data.tensor(array, path, 3) / 255),
        "label": lambda array, path: data.classes(array, path, CLASSES, CLASSES),
        "group": lambda array, path: data.classes(array, path, GROUPS, data.IGNORE),
        "edge": lambda array, path: data.marks(data.tensor(array, path, 1), f"'edge' of {path}"),
        "presence": _presence,
    }
    splits = {}
    for split in ("train", "val", "test"):
        arrays = data.load_npz(root, split, ["image", *tasks], "CamVid")
        arrays["input"] = arrays.pop("image")
        splits[split] = data.Arrays(root / f"{split}.npz", arrays, readers)
    outputs = {"label": CLASSES, "group": GROUPS, "edge": 1, "presence": CLASSES}
    return data.Source("CamVid", splits, outputs)


def _presence(array: np.ndarray, path: Path) -> Tensor:
    """Which classes a picture holds, ``[11]``."""
    if len(array) != CLASSES:
        raise ValueError(
            f"'presence' of {path} must have shape (N, {CLASSES}). Got (N, {len(array)})."
        )
    return data.marks(torch.from_numpy(array).float(), f"'presence' of {path}")


PROBLEM = Problem(
    name="camvid",
    tasks=("label", "group", "edge", "presence"),
    layouts=(data.Layout("CamVid", "train.npz", open_camvid),),
    make_tasks=lambda source: {
        "label": losses.segmentation(CLASSES),
        "group": losses.segmentation(GROUPS),
        "edge": losses.edge_marks(yes=5),
        "presence": losses.presence(CLASSES),
    },
    defaults={
        "batch": 8,
        "crop": [96, 128],
        "decay": 1e-5,
        "lr_every": 500,
        "lr_trained": 1e-3,
        "lr_tuned": 3e-4,
        "scales": [0.75, 1.5],
        "steps": 2000,
        "width": 0.25,
    },
    nets=("unet", "deeplab_resnet34", "mobilenetv2", "mtan_segnet"),
)
if __name__ == "__main__":
    main(PROBLEM)
