"""Forms: all that a layer can become, by name."""

from mtprune.compression.kernels import KERNELS, Kernel
from mtprune.compression.rank import Rank

__all__ = ["FORMS"]

FORMS: dict[str, type[Kernel]] = {**KERNELS, Rank.choice: Rank}
"""All but the dense one: for zeros, and for ranks."""
