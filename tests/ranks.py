"""Ranks on this machine, which talk by gloo, or by NCCL where there are GPUs enough."""

import os
import subprocess
import sys
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
WORLD = 2

HASTE = "ignore:Everything is pruned at the first step of this loop"  # here on purpose


def on_ranks(
    module: str, function: str, folder: Path, *, world: int = WORLD, timeout: float = 600
) -> list[Any]:
    """What a function of a module of tests gives on each rank, called with rank and world.

    Args:
        module: The module.
        function: The function; it gives tensors, numbers, strings and containers.
        folder: An empty one.
        world: How many ranks there are.
        timeout: Of their group, in seconds.
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
        subprocess.Popen(
            [*command, str(rank), str(world), str(timeout)],
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for rank in range(world)
    ]
    try:
        for process in workers:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
    finally:
        for process in workers:
            process.kill()
            process.communicate()
    return [
        torch.load(folder / f"{rank}.pt", map_location="cpu", weights_only=True)
        for rank in range(world)
    ]


def device_of(rank: int) -> torch.device:
    """Where a rank computes: on a GPU of its own if tests run there and there are enough."""
    world = dist.get_world_size() if dist.is_initialized() else 2
    return torch.device("cuda", rank) if _on_gpus(world) else torch.device("cpu")


def backend_for(world: int) -> str:
    """What so many ranks talk by: NCCL, if tests run on GPUs and there is one for each."""
    return "nccl" if _on_gpus(world) else "gloo"


def _on_gpus(world: int) -> bool:
    wanted = os.environ.get("MTPRUNE_TEST_DEVICE", "cpu").startswith("cuda")
    return wanted and torch.cuda.device_count() >= world


def serve(module: str, function: str, folder: str, rank: str, world: str, timeout: str) -> None:
    """The life of one rank."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    whole = import_module(module)
    if _on_gpus(int(world)):
        torch.cuda.set_device(int(rank))
    dist.init_process_group(
        backend_for(int(world)),
        init_method=meet,
        rank=int(rank),
        world_size=int(world),
        timeout=timedelta(seconds=float(timeout)),
    )
    found = getattr(whole, function)(int(rank), int(world))
    torch.save(found, f"{folder}/{rank}.pt")
    Path(f"{folder}/{rank}.done").touch()
    dist.destroy_process_group()
