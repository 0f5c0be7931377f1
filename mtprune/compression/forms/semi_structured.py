"""The 2:4 form: at most two of four neighbouring weights, multiplied by CUDA hardware."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mtprune.compression.forms.base import Dense, Form, Parts, bias_part, check_bias

__all__ = ["SemiStructured"]


class SemiStructured(Form):
    """2:4 sparsity on CUDA: of four neighbouring weights at most two are kept.

    The form stores the two values of every four and their positions, in half the memory of the
    dense weight. The layout that the hardware needs is made at the first call.
    """

    choice = "2:4"
    frozen = True

    @override
    @classmethod
    def parts(cls, layer: Dense) -> Parts | None:
        weight = layer.weight.detach()
        if isinstance(layer, nn.Conv2d) or weight.shape[0] % 32 or weight.shape[1] % 64:
            return None
        fours = weight.view(len(weight), -1, 4)
        if ((fours != 0).sum(2) > 2).any():
            return None
        places = (fours != 0).to(torch.uint8).topk(2, dim=2).indices.sort(2).values
        parts = {
            "weight_pairs": fours.gather(2, places).flatten(1),
            "weight_places": places.to(torch.uint8).flatten(1),
        }
        return {**parts, **bias_part(layer)}

    @override
    @staticmethod
    def why_not(weight: Tensor) -> str:
        if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device)[0] < 8:
            return f"2:4 needs a CUDA device of capability 8 or later, and got {weight.device}"
        if weight.dtype not in (torch.float16, torch.bfloat16):
            return f"2:4 needs float16 or bfloat16, and the layer is {weight.dtype}"
        return ""

    @override
    def _store(self, layer: Dense, parts: Mapping[str, Tensor]) -> None:
        self.weight_pairs: Tensor
        self.weight_places: Tensor
        self.bias: Tensor | None
        super()._store(layer, parts)
        self._packed: Tensor | None = None
        self._packed_from = (0, 0)

    @override
    def check(self) -> None:
        rows, inputs = self.weight_shape
        half = rows, inputs // 2
        shapes = tuple(self.weight_pairs.shape), tuple(self.weight_places.shape)
        if shapes != (half, half) or self.weight_places.dtype != torch.uint8:
            raise ValueError(f"its pairs and places have shapes {shapes}, not {half}")
        if not self.weight_places.is_meta and bool((self.weight_places > 3).any()):
            raise ValueError("its places are not from 0 to 3")
        check_bias(self.bias, rows)

    @override
    def forward(self, x: Tensor) -> Tensor:
        # Parts that were moved, cast or loaded anew are packed anew.
        version = (self.weight_pairs.data_ptr(), self.weight_pairs._version)
        if self._packed is None or self._packed_from != version:
            self._packed = torch.sparse.to_sparse_semi_structured(self.weight)
            self._packed_from = version
        return F.linear(x, self._packed, self.bias)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # it is made again from the parts

    @property
    @override
    def weight(self) -> Tensor:
        rows, inputs = self.weight_shape
        full = self.weight_pairs.new_zeros(rows, inputs // 4, 4)
        places = self.weight_places.long().view(rows, -1, 2)
        return full.scatter_(2, places, self.weight_pairs.view(rows, -1, 2)).view(rows, inputs)
