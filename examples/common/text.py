"""Sentence tasks as they lie on disk, and how their batches reach an encoder.

A folder holds ``tasks.json`` and, for each task, ``<task>/{train,val,test}.tsv``: a header line,
then ``label<TAB>text_a`` or, for pairs, ``label<TAB>text_a<TAB>text_b``, without quoting. In
``tasks.json`` a task has its ``kind`` (``classification`` or ``regression``), its ``labels`` (names
of the classes), whether it asks about a ``pair``, and its ``metric`` (``accuracy``, ``mcc`` or
``pearson``).
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Encoded = Mapping[str, Sequence[int]]
Encode = Callable[[Sequence[Sequence[str]]], list[Encoded]]
Batch = dict[str, Tensor]

SPLITS = ("train", "val", "test")
METRICS = ("accuracy", "mcc", "pearson")


@dataclass(frozen=True)
class Rows:
    """The examples of a split.

    Attributes:
        texts: What the tokenizer made of each: ``input_ids`` and, of some, ``token_type_ids``.
        labels: Classes, or numbers; ``[N]``.
    """

    texts: Sequence[Encoded]
    labels: Tensor

    def __len__(self) -> int:
        """How many."""
        return len(self.texts)

    def only(self, numbers: Sequence[int]) -> "Rows":
        """Some of them."""
        return Rows([self.texts[i] for i in numbers], self.labels[list(numbers)])

    def batch(self, numbers: Sequence[int], padding: int) -> Batch:
        """Some of them as tensors ``[n, longest]``, with ``attention_mask`` and ``label``."""
        found: Batch = {"label": self.labels[list(numbers)]}
        for name in self.texts[numbers[0]]:
            pieces = [torch.tensor(self.texts[i][name]) for i in numbers]
            fill = padding if name == "input_ids" else 0
            found[name] = pad_sequence(pieces, batch_first=True, padding_value=fill)
        ones = [torch.ones(len(self.texts[i]["input_ids"]), dtype=torch.long) for i in numbers]
        found["attention_mask"] = pad_sequence(ones, batch_first=True)
        return found


@dataclass(frozen=True)
class Task:
    """What a task asks, and its examples.

    Attributes:
        name: Of the task.
        outputs: Of its head: a logit for each class, or one number.
        metric: What its score is: see `METRICS`.
        splits: ``{"train": ..., "val": ..., "test": ...}``.
    """

    name: str
    outputs: int
    metric: str
    splits: Mapping[str, Rows]

    @property
    def regression(self) -> bool:
        """Whether labels are numbers; then they have mean 0 and deviation 1 in training."""
        return self.metric == "pearson"


def read_tasks(
    root: Path,
    names: Sequence[str],
    encode: Encode,
    *,
    train: Mapping[str, int] | None = None,
    held_out: int | None = None,
) -> dict[str, Task]:
    """The tasks of a folder.

    Args:
        root: The folder.
        names: Which of its tasks.
        encode: From texts, or pairs of them, to what the encoder takes.
        train: At most so many training examples of a task, drawn at random but always the same.
        held_out: At most so many examples of each other split.
    """
    facts = _facts(root)
    if unknown := [name for name in names if name not in facts]:
        raise ValueError(
            f"{root / 'tasks.json'} has no task '{unknown[0]}'. It has {', '.join(facts)}."
        )
    return {name: _read(root, name, facts[name], encode, train or {}, held_out) for name in names}


def _facts(root: Path) -> dict[str, Any]:
    path = root / "tasks.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: it says what the tasks in --data are.")
    facts: dict[str, Any] = json.loads(path.read_text())
    return facts


def _read(
    root: Path,
    name: str,
    facts: Mapping[str, Any],
    encode: Encode,
    train: Mapping[str, int],
    held_out: int | None,
) -> Task:
    metric = facts.get("metric", "accuracy")
    if metric not in METRICS or (metric == "pearson") != (facts.get("kind") == "regression"):
        raise ValueError(
            f"'{name}' in {root / 'tasks.json'} has kind {facts.get('kind')!r} and metric "
            f"{metric!r}. Known are classification with accuracy or mcc, regression with pearson."
        )
    classes = len(facts["labels"]) if facts.get("labels") else 1
    splits = {}
    for split in SPLITS:
        most = train.get(name) if split == "train" else held_out
        path = root / name / f"{split}.tsv"
        labels, texts = _read_rows(path, 3 if facts.get("pair") else 2)
        if metric != "pearson" and not all(x.isdigit() and int(x) < classes for x in labels):
            raise ValueError(f"A label in {path} is none of 0 to {classes - 1}, as tasks.json has.")
        if most is not None and most < len(texts):
            chosen = torch.randperm(len(texts), generator=_generator(name, split))[:most].tolist()
            labels, texts = [labels[i] for i in chosen], [texts[i] for i in chosen]
        numbers = torch.tensor([float(label) for label in labels])
        kind = numbers if metric == "pearson" else numbers.long()
        splits[split] = Rows(encode(texts), kind)
    if metric == "pearson":
        center, scale = splits["train"].labels.mean(), splits["train"].labels.std()
        splits = {
            split: Rows(rows.texts, (rows.labels - center) / scale)
            for split, rows in splits.items()
        }
    return Task(name, classes, metric, splits)


def _read_rows(path: Path, fields: int) -> tuple[list[str], list[list[str]]]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing.")
    labels, texts = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], start=2):
        label, *rest = line.split("\t")
        if len(rest) != fields - 1:
            raise ValueError(f"Line {number} of {path} has {len(rest) + 1} fields, not {fields}.")
        labels.append(label)
        texts.append(rest)
    if not texts:
        raise ValueError(f"{path} has no examples.")
    return labels, texts


# From text to numbers.


def tokenized(tokenizer: Any, length: int) -> Encode:
    """What a tokenizer of transformers makes of texts, at most ``length`` tokens each."""

    def encode(texts: Sequence[Sequence[str]]) -> list[Encoded]:
        columns = [list(column) for column in zip(*texts, strict=True)]
        found = tokenizer(*columns, truncation=True, max_length=length, return_attention_mask=False)
        return [{name: found[name][i] for name in found} for i in range(len(texts))]

    return encode


def checksummed(vocabulary: int, length: int) -> Encode:
    """Every word by its checksum: no tokenizer to download, and no meaning either."""
    start, end, first = 1, 2, 3

    def encode(texts: Sequence[Sequence[str]]) -> list[Encoded]:
        found = []
        for parts in texts:
            ids = [start]
            for part in parts:
                ids += [first + zlib.crc32(w.encode()) % (vocabulary - first) for w in part.split()]
                ids.append(end)
            found.append({"input_ids": ids[:length]})
        return found

    return encode


# Batches.


def training_batches(
    task: Task, size: int, *, seed: int, padding: int, start: int = 0
) -> Iterator[Batch]:
    """Batches of like length in random order, without end, from the ``start``-th on.

    Which come is fixed by the arguments, so that a run can go on where it stopped.
    """
    rows = task.splits["train"]
    per_epoch = max(1, len(rows) // size)
    epoch, skip = divmod(start, per_epoch)
    while True:
        for numbers in _epoch(rows, size, _generator(seed, task.name, epoch))[skip:]:
            yield rows.batch(numbers, padding)
        epoch, skip = epoch + 1, 0


def _epoch(rows: Rows, size: int, generator: torch.Generator) -> list[list[int]]:
    """Everything once, but for what fills no batch: pools of 8 batches are sorted by length."""
    order = torch.randperm(len(rows), generator=generator).tolist()
    order = order[: max(1, len(rows) // size) * size]
    batches = []
    for i in range(0, len(order), 8 * size):
        pool = sorted(order[i : i + 8 * size], key=lambda n: len(rows.texts[n]["input_ids"]))
        batches += [pool[j : j + size] for j in range(0, len(pool), size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in shuffled]


def test_batches(rows: Rows, size: int, *, padding: int) -> Iterator[Batch]:
    """Everything once, the shortest first."""
    order = sorted(range(len(rows)), key=lambda n: len(rows.texts[n]["input_ids"]))
    for i in range(0, len(order), size):
        yield rows.batch(order[i : i + size], padding)


def _generator(*names: object) -> torch.Generator:
    """A generator for these names: other names, other numbers."""
    return torch.Generator().manual_seed(zlib.crc32(" ".join(map(str, names)).encode()))
