"""Prebuilt: libraries that a wheel may bring, for machines without a compiler.

Each is built for a level of a processor. `build` makes them when a wheel is built with the variable
``MTPRUNE_PREBUILT=1``; at run time the highest level that the processor has is taken.

This file imports nothing but the standard library: ``setup.py`` runs it by itself.
"""

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["FOLDER", "LEVELS", "build", "candidates"]

FOLDER = "prebuilt"
"""The folder of the libraries, beside the sources."""

LEVELS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "x86-64-v4": (
        "x86_64",
        ("-march=x86-64-v4",),
        ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "bmi2"),
    ),
    "x86-64-v3": (
        "x86_64",
        ("-march=x86-64-v3",),
        ("avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"),
    ),
    "x86-64-v2": ("x86_64", ("-march=x86-64-v2",), ("sse4_2", "ssse3", "popcnt")),
    "aarch64": ("aarch64", (), ()),
}
"""Best first: the machine, the flags of the compiler, and what a processor must be able to do."""

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def candidates(here: Path) -> list[Path]:
    """The libraries beside the sources that this processor can run, best first."""
    features = _features()
    return [
        here / FOLDER / f"{level}.so"
        for level, (machine, _, needs) in LEVELS.items()
        if machine == _machine() and features.issuperset(needs)
        if (here / FOLDER / f"{level}.so").exists()
    ]


def build(sources: Sequence[Path], to: Path, compiler: Sequence[str] = ("cc",)) -> list[Path]:
    """Build the libraries of all levels of this kind of machine.

    Args:
        sources: The C files.
        to: The folder for the libraries.
        compiler: The command of the compiler.

    Raises:
        subprocess.CalledProcessError: If the compiler cannot.
    """
    to.mkdir(parents=True, exist_ok=True)
    made = []
    for level, (machine, flags, _) in LEVELS.items():
        if machine == _machine():
            library = to / f"{level}.so"
            common = ["-O3", "-fopenmp", "-fPIC"]
            objects = []
            for source in sources:
                objects.append(str(library.with_suffix(f".{source.stem}.o")))
                command = [*compiler, *common, *flags, "-c", str(source), "-o", objects[-1]]
                subprocess.run(command, check=True)
            # Linked without OpenMP's runtime: torch has loaded one when it is used.
            subprocess.run([*compiler, "-shared", *objects, "-o", str(library)], check=True)
            for name in objects:
                Path(name).unlink()
            made.append(library)
    return made


def _machine() -> str:
    machine = platform.machine().lower()
    return _MACHINES.get(machine, machine)


def _features() -> set[str]:
    """What the processor says that it can do; nothing where the system does not say it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()
