"""Small sentence tasks on disk, for the tests of the encoder's examples."""

import json
from pathlib import Path

import torch

KINDS = {
    "mood": {"kind": "classification", "labels": ["bad", "good"], "metric": "accuracy"},
    "topic": {"kind": "classification", "labels": ["a", "b", "c"], "metric": "mcc"},
    "alike": {"kind": "regression", "labels": None, "metric": "pearson", "pair": True},
}
SIZES = {"train": 40, "val": 12, "test": 70}


def write(root: Path) -> Path:
    """Words whose number tells the label, more or less."""
    (root / "tasks.json").write_text(json.dumps(KINDS))
    generator = torch.Generator().manual_seed(0)
    for task, kind in KINDS.items():
        (root / task).mkdir()
        for split, size in SIZES.items():
            lines = ["label\ttext_a" + "\ttext_b" * kind.get("pair", False)]
            for _ in range(size):
                a, b = torch.randint(1, 9, (2,), generator=generator).tolist()
                label = b / 2 if task == "alike" else b % len(kind["labels"])
                texts = [f"w{a} w{b} " * (1 + a % 3)] + [f"w{b}"] * kind.get("pair", False)
                lines.append("\t".join([str(label), *texts]))
            (root / task / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return root
