"""Small encoders with random weights and biases, and padded sequences of several lengths for them.

Those of transformers are skipped where it is not installed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtprune.structure import Group
from tests.oracles import unit_masks

TORCH = ["torch", "torch_first", "torch_plain"]
PRETRAINED = ["Bert", "Roberta", "Electra", "DistilBert", "ModernBert"]
HEADS, WIDTH, INNER, LAYERS, PAD = 4, 16, 24, 2, 0


@dataclass(frozen=True)
class Encoder:
    """A model, what to call it with, and which positions hold no padding, ``[batch, length]``."""

    model: nn.Module
    inputs: dict[str, Any]
    real: Tensor
    _read: Callable[[Any], Tensor]

    @torch.no_grad()
    def states(self, model: nn.Module | None = None) -> Tensor:
        """The states of all positions without padding, ``[positions, width]``."""
        return self._read((self.model if model is None else model)(**self.inputs))[self.real]


def lengths(batch: int = 64, length: int = 12) -> Tensor:
    """Which positions are real: 1 to all of them."""
    return torch.arange(length) < (1 + torch.arange(batch) % length)[:, None]


def build(name: str, attention: str = "sdpa", head: str = "Model", **config: Any) -> Encoder:
    torch.manual_seed(0)
    real = lengths()
    if name in TORCH:
        first = name != "torch_plain"
        layer = nn.TransformerEncoderLayer(
            WIDTH,
            HEADS,
            INNER,
            batch_first=first,
            norm_first=name == "torch_first",
            activation="gelu" if first else "relu",
        )
        model: nn.Module = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        x = torch.randn(*real.shape, WIDTH)
        x = x if first else x.transpose(0, 1)
        inputs = {"src": x, "src_key_padding_mask": ~real}
        read = (lambda y: y) if first else (lambda y: y.transpose(0, 1))
    else:
        model = pretrained(name, attention, head, **config)
        ids = torch.randint(1, 50, real.shape).where(real, PAD)
        inputs = {"input_ids": ids, "attention_mask": real.long()}
        read = lambda y: y.last_hidden_state  # noqa: E731
    randomize(model)
    return Encoder(model.eval(), inputs, real, read)


def pretrained(name: str, attention: str = "sdpa", head: str = "Model", **config: Any) -> Any:
    """A model of transformers."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
    }
    if name == "DistilBert":
        sizes = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER}
    if name == "ModernBert":
        sizes |= {"local_attention": 4, "global_attn_every_n_layers": 2}
    made = getattr(transformers, f"{name}Config")(
        vocab_size=50, max_position_embeddings=32, pad_token_id=PAD, **sizes, **config
    )
    made._attn_implementation = attention
    return getattr(transformers, name + head)(made)


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Weights and biases of a size that matters: fresh models have biases of 0."""
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def zero(model: nn.Module, groups: list[Group], dead: Callable[[int], Tensor]) -> None:
    """All that is of some units, except biases: ``dead(size)`` says which, bool ``[size]``."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.dim() > 1}
    masks = [~dead(group.size) for group in groups]
    for name, kept in unit_masks(groups, masks, shapes).items():
        model.get_parameter(name).mul_(kept)


def some(size: int) -> Tensor:
    """Every other unit but one."""
    return torch.arange(size) % 2 == 0
