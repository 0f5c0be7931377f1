import gc
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

torch.set_num_threads(1)  # tiny tensors: more threads only get in the way of other workers


def pytest_collection_finish():
    """Collecting garbage need not look at what is there for good: thousands of tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the suite runs: set MTPRUNE_TEST_DEVICE=cuda to run it on a GPU."""
    return torch.device(os.environ.get("MTPRUNE_TEST_DEVICE", "cpu"))


# The fast loop takes one back-end, and `test_both_backends_take_the_same_path`.
@pytest.fixture(params=["prune", pytest.param("inplace", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
