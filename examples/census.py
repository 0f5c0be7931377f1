"""Train and prune on Census-Income (KDD): five labels of a person, by a mixture of experts.

--data holds ``schema.json`` (``cat_columns``, ``cat_vocab``) and ``train.npz``, ``val.npz`` and
``test.npz`` with ``x_num`` [N, numbers] float32, ``x_cat`` [N, columns] codes and a label [N] for
every task. Numbers are standardised after log(1 + x), codes become one-hot.

    python census.py --data DIR --method vote --sparsity 0.9
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from common import data, losses
from common.loop import main
from common.options import Problem
from torch import Tensor
from torch.nn.functional import one_hot

CLASSES = {"income_50k": 2, "never_married": 2, "college": 2, "education17": 17, "marital7": 7}


def open_census(root: Path, tasks: Sequence[str]) -> data.Source:
    """The schema and the three files."""
    if not (root / "schema.json").exists():
        raise FileNotFoundError(f"{root / 'schema.json'} is missing: the columns of Census-Income.")
    schema = json.loads((root / "schema.json").read_text())
    sizes = [len(schema["cat_vocab"][column]) for column in schema["cat_columns"]]
    arrays = {
        split: data.load_npz(root, split, ["x_num", "x_cat", *tasks], "Census-Income")
        for split in ("train", "val", "test")
    }
    known = np.log1p(arrays["train"]["x_num"])
    mean, deviation = known.mean(0), known.std(0) + 1e-6
    splits = {}
    for split, found in arrays.items():
        path = root / f"{split}.npz"
        numbers = torch.from_numpy((np.log1p(found["x_num"]) - mean) / deviation).float()
        if not numbers.isfinite().all():
            raise ValueError(f"'x_num' of {path} holds NaN, infinite or too negative values.")
        features = torch.cat([numbers, _hot(found["x_cat"], sizes, path)], 1)
        splits[split] = data.Table({"input": features, **_labels(found, tasks, path)})
    return data.Source("Census-Income", splits, CLASSES, features=features.shape[1])


def _hot(codes: np.ndarray, sizes: Sequence[int], path: Path) -> Tensor:
    """One-hot codes of all columns, ``[N, sum of sizes]``."""
    if codes.shape[1] != len(sizes) or ((codes < 0) | (codes >= sizes)).any():
        raise ValueError(f"'x_cat' of {path} does not fit schema.json.")
    columns = torch.from_numpy(codes).long().unbind(1)
    return torch.cat([one_hot(x, n).float() for x, n in zip(columns, sizes, strict=True)], 1)


def _labels(found: Mapping[str, np.ndarray], tasks: Sequence[str], path: Path) -> dict[str, Tensor]:
    labels = {}
    for task in tasks:
        labels[task] = torch.from_numpy(found[task]).long()
        for edge in (int(labels[task].min()), int(labels[task].max())):
            if not 0 <= edge < CLASSES[task]:
                raise ValueError(
                    f"'{task}' of {path} holds class {edge}. There are {CLASSES[task]} classes."
                )
    return labels


PROBLEM = Problem(
    name="census",
    tasks=tuple(CLASSES),
    layouts=(data.Layout("Census-Income", "train.npz", open_census),),
    make_tasks=lambda source: {task: losses.row_classes() for task in CLASSES},
    defaults={
        "batch": 256,
        "decay": 0.0,
        "lr_every": 500,
        "lr_trained": 1e-3,
        "lr_tuned": 3e-4,
        "steps": 2000,
        "workers": 0,
    },
    nets=("mmoe", "mlp"),
    augment=False,
)
if __name__ == "__main__":
    main(PROBLEM)
