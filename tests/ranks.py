"""Two gloo ranks on this machine."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
WORLD = 2


def on_ranks(module: str, function: str, folder: Path) -> list[Any]:
    """What a function of a module of tests gives on each rank, called with rank and world.

    Args:
        module: The module.
        function: The function; it gives tensors, numbers, strings and containers.
        folder: An empty one.
    """
    code = "import sys; from tests import ranks; ranks.serve(*sys.argv[1:])"
    command = [sys.executable, "-W", "error", "-c", code, module, function, str(folder)]
    workers = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    try:
        for process in workers:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in workers:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def serve(module: str, function: str, folder: str, rank: str) -> None:
    """The life of one rank."""
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=int(rank), world_size=WORLD)
    torch.save(getattr(import_module(module), function)(int(rank), WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
