"""The package: what it shows."""

import mtprune


def test_dir_shows_the_api_and_nothing_else():
    assert dir(mtprune) == sorted([*mtprune.__all__, "__version__"])
    assert all(hasattr(mtprune, name) for name in dir(mtprune))
