import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the suite runs: set MTPRUNE_TEST_DEVICE=cuda to run it on a GPU."""
    return torch.device(os.environ.get("MTPRUNE_TEST_DEVICE", "cpu"))


@pytest.fixture(params=["prune", "inplace"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
