"""Building: the C code of this folder, compiled by the machine's own compiler.

Nothing is compiled at import: the first use compiles. The library is kept in the user's cache
directory, under a key of sources, compiler and processor, and called without the interpreter's
lock. Where there is no compiler, what the package brings is taken (`prebuilt`).
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from mtprune.compression.forms import prebuilt
from mtprune.compression.forms.packed import sparse_matrix

__all__ = ["COMPILERS", "FLAGS", "HEADERS", "SOURCES", "declare", "library", "unavailable"]

SOURCES = tuple(Path(__file__).with_name(name) for name in ("sparse.c", "block.c"))
"""What is compiled, each by itself."""

HEADERS = tuple(Path(__file__).with_name(name) for name in ("panel.h", "packed.h"))
"""What the sources include of ours."""

COMPILERS = ("cc", "gcc", "clang")

FLAGS = (
    # Without linking OpenMP's runtime: torch has loaded one, and two would disturb each other.
    ("-O3", "-march=native", "-fopenmp"),
    ("-O3", "-march=native"),
    ("-O3",),
)
"""Flags of the compiler, best first; none changes the order of sums or the meaning of infinity."""

_LIBRARY = "sparse.so"
_DIGEST = "sha256"

_POINTER, _SHORT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64

FUNCTIONS = {
    "mtprune_check": (_POINTER,),
    "mtprune_linear": (_POINTER, _POINTER, _LONG, _POINTER, _SHORT),
    "mtprune_conv": (_POINTER, _POINTER, _POINTER, _POINTER, _SHORT),
    "mtprune_block": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _SHORT),
    "mtprune_block_check": (_POINTER,),
}
"""The functions of the library, with the types of their arguments."""


def unavailable() -> str:
    """Why this machine has no native code; empty if it has. The first call compiles.

    Example:
        >>> reason = unavailable()
        >>> reason == "" or "compiler" in reason
        True
    """
    found = library()
    return found if isinstance(found, str) else ""


@cache
def library() -> ctypes.CDLL | str:
    """The library, from the cache or compiled now, or prebuilt; or why there is none."""
    found = _compiled()
    if isinstance(found, str):
        for path in prebuilt.candidates(Path(__file__).parent):
            with suppress(OSError):
                return _tried(ctypes.CDLL(str(path)))
    return found


def _compiled() -> ctypes.CDLL | str:
    """The library for this very processor; or why there is none."""
    try:
        compiler = _compiler()
    except ValueError as error:
        return f"the variable CC is no command of a compiler: {os.environ['CC']!r}, {error}"
    if not compiler:
        return f"no C compiler was found ({', '.join(COMPILERS)}, or the variable CC)"
    reason = ""
    try:
        directory = _cache_directory()
        for flags in FLAGS:
            folder = directory / _key(compiler, flags)
            try:
                if not _is_intact(folder):
                    _compile(compiler, flags, folder)
                return _tried(ctypes.CDLL(str(folder / _LIBRARY)))
            except OSError as error:
                reason = reason or str(error)
                shutil.rmtree(folder, ignore_errors=True)  # or it would be tried for ever
    except (OSError, subprocess.SubprocessError) as error:
        reason = reason or str(error)
    return f"the C compiler {compiler[0]} made no library: {_first_line(reason)}"


def _compiler() -> list[str]:
    wanted = shlex.split(os.environ.get("CC", ""))
    for command in [wanted, *([name] for name in COMPILERS)]:
        if command and shutil.which(command[0]):
            return command
    return []


def _cache_directory() -> Path:
    """A directory that only this user can write to: libraries in it are executed."""
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    candidates = [Path(tempfile.gettempdir()) / f"mtprune-{user}"]
    with suppress(RuntimeError):  # a user without a home
        home = Path(os.environ.get("XDG_CACHE_HOME", ""))
        home = home if home.is_absolute() else Path.home() / ".cache"
        candidates.insert(0, home / "mtprune")
    for directory in candidates:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory = directory.resolve()  # who may write is a matter of where a link leads
            status = directory.stat()
            is_own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
            if is_own and not status.st_mode & 0o022 and os.access(directory, os.W_OK | os.X_OK):
                return directory
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="mtprune-"))


def _key(compiler: Sequence[str], flags: Sequence[str]) -> str:
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, errors="replace", timeout=60
    ).stdout
    texts = [path.read_text() for path in (*HEADERS, *SOURCES)]
    parts = (*texts, *compiler, version, *flags, torch.__version__, _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    """The features of the processor, which ``-march=native`` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n", 1)[0].splitlines() if info.exists() else []
    features = [line for line in lines if line.startswith(("model", "flags", "Features", "CPU"))]
    return "\n".join([platform.machine(), platform.processor(), *features])


def _is_intact(folder: Path) -> bool:
    """Whether a folder holds the library as it was compiled: a broken one may crash the process."""
    try:
        digest = hashlib.sha256((folder / _LIBRARY).read_bytes()).hexdigest()
        return digest == (folder / _DIGEST).read_text()
    except OSError:
        return False


def _compile(compiler: Sequence[str], flags: Sequence[str], folder: Path) -> None:
    """Compile into a folder that appears when it is complete."""
    draft = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        objects = [f"{source.stem}.o" for source in SOURCES]
        for command in (
            *(
                [*compiler, *flags, "-fPIC", "-c", str(source), "-o", made]
                for source, made in zip(SOURCES, objects, strict=True)
            ),
            [*compiler, "-shared", *objects, "-o", _LIBRARY],
        ):
            run = subprocess.run(
                command, cwd=draft, capture_output=True, text=True, errors="replace", timeout=300
            )
            if run.returncode:
                raise OSError(_first_line(run.stderr) or f"it returned {run.returncode}")
        for made in objects:
            (draft / made).unlink()
        (draft / _DIGEST).write_text(hashlib.sha256((draft / _LIBRARY).read_bytes()).hexdigest())
        if _is_intact(folder):  # another process was faster
            return
        shutil.rmtree(folder, ignore_errors=True)
        try:
            draft.rename(folder)
        except OSError:
            if not _is_intact(folder):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _tried(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions' arguments, after a product that is known.

    Raises:
        OSError: If it is not this library, or computes something else.
    """
    try:
        declare(loaded)
    except AttributeError as error:
        raise OSError(f"what it made is not the library of these sources: {error}") from error
    start, column = torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1])
    value, bias = torch.tensor([2.0, 3.0, 4.0]), torch.tensor([0.5, -1.0])
    matrix = sparse_matrix(start, column, value, bias, 2, 3)
    x, y = (ctypes.c_float * 3)(1, 2, 3), (ctypes.c_float * 2)()
    code = loaded.mtprune_linear(ctypes.addressof(matrix), x, 1, y, 1)
    if code or list(y) != [6.5, 10.0]:
        raise OSError("the library it made computes something else")
    return loaded


def declare(loaded: ctypes.CDLL) -> None:
    """Tell a library the types of its functions' arguments.

    Raises:
        AttributeError: If it lacks one of `FUNCTIONS`.
    """
    for name, types in FUNCTIONS.items():
        getattr(loaded, name).argtypes = types


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:200]
