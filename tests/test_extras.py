"""What the tests need is installed, so that no promise is green because its test was skipped."""

import re
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# `encoder` brings weights to download, which no test does; `dev` is for the linters.
TRIED = (
    *("plots", "progress", "safetensors", "structured", "onnx", "transformers", "hub"),
    *("lightning", "trackers"),
    "examples",
)


def requirements(extra: str) -> dict[str, str]:
    """What an extra asks for, by the name of the package, with the versions it takes."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options.extras_require"][extra].split()
    return {re.split("[<>=!~]", line)[0]: line for line in lines}


@pytest.mark.parametrize("name", requirements("test"))
def test_nothing_is_skipped_for_want_of_a_package(name):
    try:
        assert version(name)
    except PackageNotFoundError:
        pytest.fail(f"{name} is not here: pip install -c constraints.txt -e '.[test]'")


@pytest.mark.parametrize("extra", TRIED)
def test_every_extra_is_tried(extra):
    asked = requirements("test")
    assert requirements(extra).items() <= asked.items()


def test_every_version_that_was_tried_is_written_down():
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().split("\n")}
    assert set(requirements("test")) <= pinned
