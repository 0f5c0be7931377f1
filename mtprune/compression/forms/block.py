"""Block: a whole layer of a transformer encoder in one call of the native code."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mtprune.compression.forms import building
from mtprune.compression.forms.indices import BROKEN
from mtprune.compression.forms.packed import Matrix, Norm

__all__ = ["ACTIVATIONS", "Block"]

ACTIVATIONS = ("relu", "gelu", "gelu_tanh")
"""What the native code can do between the two products of a feed-forward."""


class _Layout(ctypes.Structure):
    _fields_ = (
        ("width", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("norm_first", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("project", Matrix),
        ("out", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("norm", Norm * 2),
    )


class Block:
    """A layer, packed: attention and feed-forward, each with a residual and a norm.

    Args:
        matrices: Queries, keys and values of all heads in one; outputs of the heads; and the two
            of the feed-forward.
        norms: That of the attention, and that of the feed-forward.
        heads: The number of heads, and the numbers of each.
        norm_first: Whether norms are at the beginning, not after the residual is added.
        activation: One of `ACTIVATIONS`.

    Raises:
        ValueError: If they do not fit each other.
        RuntimeError: If there is no native code on this machine.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        norms: Sequence[Norm],
        heads: tuple[int, int],
        *,
        norm_first: bool,
        activation: str,
    ) -> None:
        library = building.library()
        if isinstance(library, str):
            raise RuntimeError(f"A block needs native code: {library}.")
        self._run = library.mtprune_block
        self._kept = (*matrices, *norms)
        project, out, up, down = matrices
        self._layout = _Layout(
            out.outputs,
            *heads,
            up.outputs,
            norm_first,
            ACTIVATIONS.index(activation),
            project,
            out,
            up,
            down,
            (Norm * 2)(*norms),
        )
        self._pointer = ctypes.addressof(self._layout)
        self.width = int(out.outputs)
        if library.mtprune_block_check(self._pointer):
            raise ValueError(BROKEN)

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The outputs of the layer.

        Args:
            x: ``[sentences, length, width]``, float32 on the CPU.
            mask: ``[sentences, length]``, added to the scores of each key, float32; or None.

        Raises:
            MemoryError: If there is no memory left.
            ValueError: If inputs have other shapes.
        """
        sentences, length, width = x.shape
        if width != self.width or (mask is not None and mask.shape != x.shape[:2]):
            raise ValueError(
                f"The layer takes [sentences, length, {self.width}] and a mask [sentences, length]."
                f" Got {tuple(x.shape)} and {None if mask is None else tuple(mask.shape)}."
            )
        x = x.contiguous()
        mask = None if mask is None else mask.contiguous()
        y = torch.empty_like(x)
        code = self._run(
            self._pointer,
            x.data_ptr(),
            None if mask is None else mask.data_ptr(),
            sentences,
            length,
            y.data_ptr(),
            torch.get_num_threads(),
        )
        if code:
            raise MemoryError("There is no memory left for a block.")
        return y
