"""Sanitizers: the C code built with them, and driven through many shapes and hostile arguments.

``python -m tests.sanitize --cases 2000`` builds the native code with AddressSanitizer and
UndefinedBehaviorSanitizer, and calls it in a process into which their runtime is loaded. Results
are compared with a dense product; indices that lie must be refused. A fault ends the process.
"""

import argparse
import ctypes
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from mtprune.compression.forms import Sparse, building, packed
from mtprune.compression.forms.block import ACTIVATIONS, Block

FLAGS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp")


def build(folder: Path, march: str) -> Path:
    """Build the library with sanitizers, for a kind of processor.

    Raises:
        RuntimeError: If the compiler cannot.
    """
    library = folder / "sparse.so"
    command = [
        compiler(),
        *FLAGS,
        "-fPIC",
        "-shared",
        *map(str, building.SOURCES),
        "-o",
        str(library),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[:500]}")
    return library


def compiler() -> str:
    """The compiler.

    Raises:
        RuntimeError: If there is none.
    """
    found = next((name for name in ("gcc", "cc", "clang") if shutil.which(name)), "")
    if not found:
        raise RuntimeError("no C compiler was found")
    return found


def runtime() -> str:
    """The runtime of the sanitizers, to be loaded before all else."""
    command = [compiler(), "-print-file-name=libasan.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def drive(library: Path, cases: int, seed: int) -> dict[str, int]:
    """Call the library; how many calls were right, and how many were refused.

    Raises:
        AssertionError: If a result is wrong, or what lies is not refused.
    """
    loaded = ctypes.CDLL(str(library))
    building.declare(loaded)
    building.library = lambda: loaded  # type: ignore[assignment]
    dice = random.Random(seed)
    counts = {"products": 0, "convolutions": 0, "blocks": 0, "refused": 0}
    for number in range(cases):
        torch.manual_seed(seed + number)
        torch.set_num_threads(dice.choice((1, 1, 2, 4)))
        if number % 3 == 0:
            counts["blocks"] += 1
            counts["refused"] += run_block(dice)
            continue
        layer, x = layer_of(dice)
        with torch.no_grad():
            layer.weight.mul_(torch.rand(layer.weight.shape) > dice.random())
            parts = Sparse.parts(layer)
            assert parts is not None
            form = Sparse(layer, parts)
            close(form(x), layer(x))
            counts["convolutions" if x.dim() == 4 else "products"] += 1
            if lie(form, dice):
                try:
                    form(x)
                except (ValueError, RuntimeError, IndexError):
                    counts["refused"] += 1
                else:
                    raise AssertionError(f"case {number}: indices that lie were followed")
    return counts


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse a result that is off by more than rounding."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def layer_of(dice: random.Random) -> tuple[torch.nn.Linear | torch.nn.Conv2d, torch.Tensor]:
    """A layer and its inputs."""
    bias = dice.random() < 0.5
    if dice.random() < 0.5:
        inputs, outputs = dice.randint(1, 130), dice.randint(1, 70)
        rows = dice.choice((0, 1, 3, 15, 16, 17, 33, 64, 65, 200))
        shape = (rows,) if dice.random() < 0.7 else (rows, 2)
        return torch.nn.Linear(inputs, outputs, bias), torch.randn(*shape, inputs)
    kernel, channels = dice.choice((1, 2, 3, 5)), dice.randint(1, 9)
    layer = torch.nn.Conv2d(
        channels,
        dice.randint(1, 20),
        kernel,
        stride=dice.choice((1, 1, 2, 3)),
        padding=dice.randint(0, kernel),
        dilation=dice.choice((1, 1, 2)),
        bias=bias,
    )
    least = layer.dilation[0] * (kernel - 1) + 1
    high, wide = least + dice.randint(0, 12), least + dice.randint(0, 12)
    return layer, torch.randn(dice.randint(1, 3), channels, high, wide)


def run_block(dice: random.Random) -> int:
    """Run a layer as a block, and then one whose parts lie; how many of these were refused.

    Raises:
        AssertionError: If a result is wrong, or what lies is not refused.
    """
    heads, head = dice.randint(1, 5), dice.randint(1, 9)
    width, hidden = dice.choice((heads * head, dice.randint(1, 150))), dice.randint(1, 200)
    shapes = (3 * heads * head, width), (width, heads * head), (hidden, width), (width, hidden)
    weights = [torch.randn(shape) * (torch.rand(shape) > dice.random()) / 4 for shape in shapes]
    biases = [torch.randn(len(w)) if dice.random() < 0.7 else None for w in weights]
    first, activation = dice.random() < 0.5, dice.choice(ACTIVATIONS)
    norms = [packed.norm_of(torch.randn(width), torch.randn(width), 1e-5) for _ in range(2)]
    sentences, length = dice.randint(1, 7), dice.choice((1, 2, 5, 16, 17, 32, 33, 64, 70, 150))
    mask = torch.randn(sentences, length).masked_fill(torch.rand(sentences, length) < 0.3, -1e9)
    mask_or_none = mask if dice.random() < 0.5 else None

    def made(sparse: bool) -> list[packed.Matrix]:
        return [
            (sparse_of if sparse else packed.dense_matrix)(w, b)
            for w, b in zip(weights, biases, strict=True)
        ]

    def block(matrices: list[packed.Matrix]) -> Block:
        return Block(matrices, norms, (heads, head), norm_first=first, activation=activation)

    x = torch.randn(sentences, length, width)
    sparse = made(True)
    close(block(sparse)(x, mask_or_none), block(made(False))(x, mask_or_none))
    which = dice.choice(sparse)
    cell, line, column = which.kept[:3]
    if not len(column):
        return 0
    how = dice.randrange(5)
    if how == 0:
        cell[dice.randrange(len(cell)), dice.randrange(2)] += dice.choice((-1, 1, 1 << 30))
    elif how == 1:
        line[dice.randrange(len(line)), 0] = 255
    elif how == 2:
        line[dice.randrange(len(line)), 1] += 1
    elif how == 3:
        column[dice.randrange(len(column))] = 255
    else:
        which.inputs += dice.choice((1, -1, 1 << 40))
    try:
        block(sparse)
    except ValueError:
        return 1
    raise AssertionError("parts of a block that lie were followed")


def sparse_of(weight: torch.Tensor, bias: torch.Tensor | None) -> packed.Matrix:
    """A weight as a sparse matrix."""
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    parts = Sparse.parts(layer)
    assert parts is not None
    start, column, value = (parts[f"weight_{name}"] for name in ("start", "column", "values"))
    return packed.sparse_matrix(start, column, value, bias, *weight.shape)


def lie(form: Sparse, dice: random.Random) -> bool:
    """Change an index so that it lies outside; whether there was one."""
    start, column = form.weight_start, form.weight_column
    if not len(column):
        return False
    how = dice.choice(("far", "negative", "start", "end"))
    if how == "far":
        column[dice.randrange(len(column))] = torch.iinfo(column.dtype).max
        return True
    if how == "negative":
        column[dice.randrange(len(column))] = -1
    elif how == "start":
        start[0] = 1
    else:
        start[-1] += dice.choice((1, 1_000_000))
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Build and drive."""
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize")
    parser.add_argument("--cases", type=int, default=500, help="how many layers")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    parser.add_argument("--march", default="native", help="the processor, as the compiler names it")
    parser.add_argument("--library", type=Path, help="drive this one, in this process")
    options = parser.parse_args(arguments)
    if options.library is not None:
        counts = drive(options.library, options.cases, options.seed)
        print(", ".join(f"{count} {name}" for name, count in counts.items()))
        return 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            library = build(Path(folder), options.march)
            where = ["--library", str(library)]
            many = ["--cases", str(options.cases), "--seed", str(options.seed)]
            done = subprocess.run(
                [sys.executable, "-m", "tests.sanitize", *where, *many],
                env={
                    **os.environ,
                    "LD_PRELOAD": runtime(),
                    # Python keeps memory until it ends, and torch maps what it likes.
                    "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0",
                },
                capture_output=True,
                text=True,
            )
    except RuntimeError as error:
        print(f"not run: {error}")
        return 2
    print(done.stdout.strip() or done.stderr[-3000:])
    print("no fault" if done.returncode == 0 else f"a fault: it ended with {done.returncode}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
