"""Supported: other people's programs that work with us, and the tests that prove it.

``python -m tests.integrations.supported`` prints the table of ``docs/integrations/index.md``, and
``--write`` puts it there and a shorter one into README; a test holds both to it.
"""

import argparse
import ast
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "integrations" / "index.md"
README = ROOT / "README.md"
BITWISE = "test_scoring_leaves_training_as_it_is"
HEAD = "| client | versions tested | how | tested | bitwise |\n|---|---|---|---|---|\n"
SHORT = "| with | versions | how |\n|---|---|---|\n"


@dataclass(frozen=True)
class Client:
    """A program that others have written.

    Attributes:
        name: What it is called.
        version: The version that was tested; that of ``constraints.txt`` if it is a package there.
        how: What its user writes.
        tested: What tests try.
        tests: Those tests: a file of `tests`, or ``file::function``.
        page: Where it is explained, beside the table.
        trains: Whether it runs training, which scoring must leave as it is, to the bit.
    """

    name: str
    version: str
    how: str
    tested: str
    tests: tuple[str, ...]
    page: str = ""
    trains: bool = True

    @property
    def title(self) -> str:
        return f"[{self.name}]({self.page})" if self.page else self.name

    @property
    def bitwise(self) -> bool:
        """Whether a test holds training with scoring on to that without, bit for bit."""
        return any(BITWISE in functions(test.split("::")[0]) for test in self.tests)

    @property
    def tried(self) -> str:
        """The version, in words."""
        return pinned().get(self.version, self.version)

    @property
    def row(self) -> str:
        bitwise = "yes" if self.bitwise else "-"
        return f"| {self.title} | {self.tried} | {self.how} | {self.tested} | {bitwise} |\n"

    @property
    def short(self) -> str:
        """The row of README, from which links lead elsewhere."""
        return f"| {_from_root(self.title)} | {self.tried} | {_from_root(self.how)} |\n"


LOOPS = ("integrations/test_loops.py",)
WRITTEN = "its loop, written out"

CLIENTS = (
    Client(
        "Lightning",
        "lightning",
        "`mtprune.integrations.lightning.PruningCallback`",
        "automatic and manual optimization, accumulation, clipping, bf16, `ckpt_path=` with both "
        "back-ends; DDP on two processes",
        (
            "integrations/test_lightning_callback.py",
            "integrations/test_two_ranks.py::test_two_ranks_decide_as_one_process_and_resume",
        ),
        "lightning.md",
    ),
    Client(
        "transformers' Trainer",
        "transformers",
        "`mtprune.integrations.transformers.PruningCallback`",
        "accumulation, bf16, scaler, resuming, best model at end",
        ("test_transformers.py",),
        "transformers.md",
    ),
    Client(
        "sentence-transformers",
        "sentence-transformers",
        "the same, with its loss modules",
        "two data sets in turn",
        ("integrations/test_sentence_transformers.py",),
        "transformers.md",
    ),
    Client(
        "PEFT",
        "peft",
        'the same, with `include="*lora_*"` and `backend="inplace"`',
        "LoRA in Trainer: adapters pruned, resumed; frozen weights untouched",
        ("integrations/test_peft_trainer.py", "integrations/test_peft.py"),
        "peft.md",
    ),
    Client(
        "accelerate",
        "accelerate",
        "prepared model and optimizer as they are",
        "accumulation, clipping, bf16, scaler, `save_state` and `load_state`; DDP on two processes",
        (
            "integrations/test_accelerate.py",
            "integrations/test_two_ranks.py::test_two_ranks_decide_as_one_process_and_resume",
        ),
        "accelerate.md",
    ),
    Client(
        "torchjd",
        "torchjd",
        "`observe_jacobian`; scalarizers as `weighting=`",
        "`backward`, `mtl_backward`, UPGrad and three more aggregators, five scalarizers",
        ("integrations/test_torchjd.py",),
        "torchjd.md",
    ),
    Client(
        "LibMTL's trainer",
        WRITTEN,
        "[a vector of losses](../your-trainer.md)",
        "equal weights, PCGrad; `rep_grad=True` is an error",
        LOOPS,
    ),
    Client(
        "torchvision's and timm's references",
        "their loops, written out",
        "[averages](#averages-of-weights)",
        "scaler, clipping, accumulation, averages with buffers",
        LOOPS,
    ),
    Client(
        "DistributedDataParallel",
        "torch",
        "[the model as it is](../distributed.md)",
        "`no_sync`, `find_unused_parameters`, `gradient_as_bucket_view`, uneven batches, "
        "float16 and bfloat16 hooks, compiled; `join` and `static_graph` are errors",
        ("test_ddp.py", "test_distributed.py", "test_elastic.py"),
        "../distributed.md",
    ),
    Client(
        "FSDP2 (`fully_shard`)",
        "torch",
        '[`backend="inplace"`](../distributed.md)',
        "every method it takes, meshes, mixed precision, checkpointing, compiled, resumed on other "
        "numbers of ranks, a rank killed and started anew by `torchrun`",
        ("test_sharded.py", "test_elastic.py"),
        "../distributed.md",
    ),
    Client(
        "TensorBoard",
        "tensorboard",
        "`pruner.track(SummaryWriter(...))`",
        "read back by its own reader",
        ("test_tracking.py::test_tensorboard_reads_what_was_written",),
        "trackers.md",
        trains=False,
    ),
    Client(
        "W&B",
        "0.31.0",
        "`pruner.track(run)`",
        "offline; its file read back",
        ("test_tracking.py::test_wandb_reads_what_was_written",),
        "trackers.md",
        trains=False,
    ),
    Client(
        "MLflow",
        "3.17.2",
        "`pruner.track(mlflow)`",
        "a store of files; read back by its client",
        ("test_tracking.py::test_mlflow_reads_what_was_written",),
        "trackers.md",
        trains=False,
    ),
)


@cache
def pinned() -> dict[str, str]:
    """The versions of packages in ``constraints.txt``."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


@cache
def functions(file: str) -> frozenset[str]:
    """The tests in a file."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def _from_root(text: str) -> str:
    """Links of the page, as README must have them.

    Example:
        >>> _from_root("[a](a.md), [b](../b.md), [c](#c)")
        '[a](docs/integrations/a.md), [b](docs/b.md), [c](docs/integrations/index.md#c)'
    """
    text = text.replace("](#", "](index.md#")
    return re.sub(r"\]\((?!\.\./)", "](docs/integrations/", text).replace("](../", "](docs/")


def table() -> str:
    """The table of the page."""
    return HEAD + "".join(client.row for client in CLIENTS)


def brief() -> str:
    """The table of README: what trains."""
    return SHORT + "".join(client.short for client in CLIENTS if client.trains)


def written(page: str) -> str:
    """The page, or README, with the table as it is now."""
    for head, made in ((HEAD, table()), (SHORT, brief())):
        first = re.escape(head.splitlines()[0])
        page = re.sub(rf"{first}\n(\|.*\n)+", lambda _, made=made: made, page, count=1)
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(prog="python -m tests.integrations.supported")
    parser.add_argument("--write", action="store_true", help="into the page, and into README")
    if parser.parse_args(arguments).write:
        for path in (PAGE, README):
            path.write_text(written(path.read_text()))
    else:
        print(table(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
