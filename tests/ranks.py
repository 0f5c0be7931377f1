"""Two gloo ranks on this machine."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
WORLD = 2

HASTE = "ignore:Everything is pruned at the first step of this loop"  # here on purpose


def on_ranks(module: str, function: str, folder: Path) -> list[Any]:
    """What a function of a module of tests gives on each rank, called with rank and world.

    Args:
        module: The module.
        function: The function; it gives tensors, numbers, strings and containers.
        folder: An empty one.
    """
    code = "import sys; from tests import ranks; ranks.serve(*sys.argv[1:])"
    command = [
        sys.executable,
        "-W",
        "error",
        "-W",
        HASTE,
        "-c",
        code,
        module,
        function,
        str(folder),
    ]
    # One thread each: ranks that wait for each other in loops take the cores from each other.
    options: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    workers = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True, **options)
        for rank in range(WORLD)
    ]
    try:
        for process in workers:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
    finally:
        for process in workers:
            process.kill()
            process.communicate()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def serve(module: str, function: str, folder: str, rank: str) -> None:
    """The life of one rank."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=int(rank), world_size=WORLD)
    torch.save(getattr(import_module(module), function)(int(rank), WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
