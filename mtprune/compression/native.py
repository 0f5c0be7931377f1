"""Native code: a sparse product in C, compiled by the machine's own compiler at first use.

Nothing is compiled at import. What is compiled is kept in the user's cache directory, by source,
compiler and processor, and loaded without the interpreter's lock.
"""

import ctypes
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["convolve", "lacking", "multiply", "unpack"]

SOURCE = Path(__file__).with_name("sparse.c")

COMPILERS = ("cc", "gcc", "clang")

FLAGS = (
    # OpenMP's runtime is left to the one that torch has loaded: two would be in each other's way.
    ("-O3", "-march=native", "-fopenmp"),
    ("-O3", "-march=native"),
    ("-O3",),
)
"""How to compile, best first; sums keep their order and infinities their meaning in each."""

_LIBRARY = "sparse.so"
_DIGEST = "sha256"


def lacking() -> str:
    """Why there is no native code on this machine; empty if there is. Compiles at the first call.

    Example:
        >>> reason = lacking()
        >>> reason == "" or "compiler" in reason
        True
    """
    library = _library()
    return library if isinstance(library, str) else ""


def multiply(
    x: Tensor, start: Tensor, column: Tensor, value: Tensor, bias: Tensor | None, outputs: int
) -> Tensor:
    """``x W^T + b`` for a sparse weight ``[outputs, inputs]``.

    Args:
        x: ``[..., inputs]``, float32 on the CPU, as are all other numbers.
        start: ``[outputs + 1]``, int32: where the values of each output begin.
        column: ``[nonzero]``, int16 or int32: the input of each value.
        value: ``[nonzero]``.
        bias: ``[outputs]`` or None.
        outputs: How many there are.

    Returns:
        ``[..., outputs]``.

    Example:
        >>> start, column = torch.tensor([0, 1, 3]).int(), torch.tensor([2, 0, 1]).int()
        >>> multiply(torch.tensor([[1., 10, 100]]), start, column, torch.ones(3), None, 2)
        tensor([[100.,  11.]])
    """
    call = _multiply if _at_hand(x) else _multiply_op
    y: Tensor = call(x, start, column, value, bias, outputs)
    return y


def convolve(
    x: Tensor,
    start: Tensor,
    column: Tensor,
    value: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    geometry: Sequence[int],
) -> Tensor:
    """The convolution of images with a sparse weight ``[outputs, height, width, channels]``.

    Args:
        x: ``[images, channels, height, width]``, float32 on the CPU.
        start: ``[outputs * kernel height + 1]``, int32: where the values of each output and row of
            its kernel begin.
        column: ``[nonzero]``, int16 or int32: the place of each value in its output's flat weight.
        value: ``[nonzero]``.
        bias: ``[outputs]`` or None.
        size: Of what comes out: ``(outputs, height, width)``.
        geometry: Kernel, stride, padding before and dilation, for height and width each.

    Returns:
        ``[images, outputs, height, width]``.
    """
    call = _convolve if _at_hand(x) else _convolve_op
    y: Tensor = call(x, start, column, value, bias, size, geometry)
    return y


def unpack(start: Tensor, column: Tensor, value: Tensor, rows: int, columns: int) -> Tensor:
    """The dense matrix ``[rows, columns]`` of a sparse one whose rows are in equal groups.

    Example:
        >>> unpack(torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1]), torch.ones(3), 2, 3)
        tensor([[0., 0., 1.],
                [1., 1., 0.]])
    """
    groups = (len(start) - 1) // max(1, rows)
    row = torch.arange(len(start) - 1, device=start.device).div(
        max(1, groups), rounding_mode="floor"
    )
    row = row.repeat_interleave(start.long().diff(), output_size=len(value))
    full = value.new_zeros(rows, columns)
    full[row, column.long()] = value
    return full


def _at_hand(x: Tensor) -> bool:
    """Whether these are numbers now, and nobody records what is done with them.

    Going through torch's dispatcher takes longer than multiplying a short sentence.
    """
    return (
        type(x) is Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
    )


def _multiply(
    x: Tensor, start: Tensor, column: Tensor, value: Tensor, bias: Tensor | None, outputs: int
) -> Tensor:
    *batch, inputs = x.shape
    library = _library()
    if isinstance(library, str):
        _warn(library)
        return F.linear(x, unpack(start, column, value, outputs, inputs), bias)
    x = x.contiguous()
    y = x.new_empty((*batch, outputs))
    code = library.mtprune_linear(
        *_weight(start, column, value, bias, outputs, 1),
        inputs,
        x.data_ptr(),
        math.prod(batch),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if code:
        _fail(code)
    return y


def _convolve(
    x: Tensor,
    start: Tensor,
    column: Tensor,
    value: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    geometry: Sequence[int],
) -> Tensor:
    library = _library()
    if isinstance(library, str):
        _warn(library)
        return _convolve_dense(x, start, column, value, bias, size, geometry)
    x = x.contiguous()
    y = x.new_empty((x.shape[0], *size))
    sizes = (*x.shape, *size[1:], *geometry)
    code = library.mtprune_conv(
        *_weight(start, column, value, bias, size[0], geometry[0]),
        (ctypes.c_int64 * len(sizes))(*sizes),
        x.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if code:
        _fail(code)
    return y


def _convolve_dense(
    x: Tensor,
    start: Tensor,
    column: Tensor,
    value: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    geometry: Sequence[int],
) -> Tensor:
    kernel, stride, before, dilation = (tuple(geometry[i : i + 2]) for i in (0, 2, 4, 6))
    flat = unpack(start, column, value, size[0], x.shape[1] * kernel[0] * kernel[1])
    weight = flat.view(size[0], *kernel, x.shape[1]).permute(0, 3, 1, 2)
    after = [
        max(0, (size[1 + i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 - x.shape[2 + i])
        for i in range(2)
    ]
    padded = F.pad(x, (before[1], after[1], before[0], after[0]))
    y = F.conv2d(padded, weight, bias, stride, 0, dilation)
    return y[..., : size[1], : size[2]].contiguous()


def _weight(
    start: Tensor, column: Tensor, value: Tensor, bias: Tensor | None, outputs: int, groups: int
) -> tuple[int | None, ...]:
    """What both functions take first; what is in there is checked where it is read."""
    count = value.numel()
    if (
        start.numel() != outputs * groups + 1
        or column.numel() != count
        or start.dtype != torch.int32
        or column.dtype not in (torch.int16, torch.int32)
        or value.dtype != torch.float32
        or (bias is not None and (bias.numel() != outputs or bias.dtype != torch.float32))
    ):
        raise ValueError(_BROKEN)
    return (
        start.data_ptr(),
        column.data_ptr(),
        value.data_ptr(),
        None if bias is None else bias.data_ptr(),
        count,
        column.dtype == torch.int32,
        outputs,
    )


_BROKEN = "The parts of a sparse weight do not fit each other. Compress or load the model again."


def _fail(code: int) -> NoReturn:
    if code == 1:
        raise MemoryError("There is no memory left for a sparse product.")
    raise ValueError(_BROKEN)


@cache
def _warn(reason: str) -> None:
    warnings.warn(f"Sparse layers are multiplied as dense ones: {reason}.", stacklevel=2)


_SPARSE = "Tensor x, Tensor start, Tensor column, Tensor value, Tensor? bias"

_multiply_op = torch.library.custom_op(
    "mtprune::sparse_linear",
    _multiply,
    mutates_args=(),
    schema=f"({_SPARSE}, int outputs) -> Tensor",
)
_convolve_op = torch.library.custom_op(
    "mtprune::sparse_conv2d",
    _convolve,
    mutates_args=(),
    schema=f"({_SPARSE}, SymInt[] size, int[] geometry) -> Tensor",
)


@_multiply_op.register_fake
def _multiplied(x: Tensor, *weight: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight[-1]))


@_convolve_op.register_fake
def _convolved(x: Tensor, *weight: Any) -> Tensor:
    return x.new_empty((x.shape[0], *weight[-2]))


def _no_backward(context: Any, gradient: Tensor) -> None:
    raise RuntimeError(
        "Sparse layers are for inference: there is no gradient through them. Train the dense model "
        "and compress it then."
    )


_multiply_op.register_autograd(_no_backward)
_convolve_op.register_autograd(_no_backward)


@cache
def _library() -> ctypes.CDLL | str:
    """The library, from the cache or compiled now; or why there is none."""
    compiler = _compiler()
    if not compiler:
        return f"no C compiler was found ({', '.join(COMPILERS)}, or the variable CC)"
    reason = ""
    try:
        directory = _cache_directory()
        for flags in FLAGS:
            where = directory / _key(compiler, flags)
            try:
                if not _sound(where):
                    _compile(compiler, flags, where)
                return _declared(ctypes.CDLL(str(where / _LIBRARY)))
            except OSError as error:
                reason = reason or str(error)
    except (OSError, subprocess.SubprocessError) as error:
        reason = reason or str(error)
    return f"the C compiler {compiler[0]} made no library: {_first_line(reason)}"


def _compiler() -> list[str]:
    given = shlex.split(os.environ.get("CC", ""))
    for command in [given, *([name] for name in COMPILERS)]:
        if command and shutil.which(command[0]):
            return command
    return []


def _cache_directory() -> Path:
    """A directory that only this user writes to: what lies there is executed."""
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    places = [Path(tempfile.gettempdir()) / f"mtprune-{user}"]
    with suppress(RuntimeError):  # a user without a home
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        places.insert(0, Path(home) / "mtprune")
    for directory in places:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = directory.lstat()
            own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
            if own and not status.st_mode & 0o022 and os.access(directory, os.W_OK | os.X_OK):
                return directory
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="mtprune-"))


def _key(compiler: Sequence[str], flags: Sequence[str]) -> str:
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, timeout=60
    ).stdout
    parts = (SOURCE.read_text(), *compiler, version, *flags, torch.__version__, _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    """What ``-march=native`` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n", 1)[0].splitlines() if info.exists() else []
    telling = [line for line in lines if line.startswith(("model", "flags", "Features", "CPU"))]
    return "\n".join([platform.machine(), platform.processor(), *telling])


def _sound(where: Path) -> bool:
    """Whether the library is there as it was compiled: a broken one could take the process down."""
    try:
        found = hashlib.sha256((where / _LIBRARY).read_bytes()).hexdigest()
        return found == (where / _DIGEST).read_text()
    except OSError:
        return False


def _compile(compiler: Sequence[str], flags: Sequence[str], where: Path) -> None:
    """Compile into a directory that appears when it is complete."""
    made = Path(tempfile.mkdtemp(dir=where.parent))
    try:
        for command in (
            [*compiler, *flags, "-fPIC", "-c", str(SOURCE), "-o", "sparse.o"],
            [*compiler, "-shared", "sparse.o", "-o", _LIBRARY],
        ):
            done = subprocess.run(command, cwd=made, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise OSError(_first_line(done.stderr) or f"it returned {done.returncode}")
        (made / "sparse.o").unlink()
        (made / _DIGEST).write_text(hashlib.sha256((made / _LIBRARY).read_bytes()).hexdigest())
        if _sound(where):  # another process was faster
            return
        shutil.rmtree(where, ignore_errors=True)
        try:
            made.rename(where)
        except OSError:
            if not _sound(where):
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, short, long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    weight: tuple[Any, ...] = (pointer, pointer, pointer, pointer, long, short, long)
    library.mtprune_linear.argtypes = (*weight, long, pointer, long, pointer, short)
    library.mtprune_conv.argtypes = (*weight, pointer, pointer, pointer, short)
    return library


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:200]
