"""Experts of known widths with zeros: in stacks, as transformers multiplies them, and one by one.

The experts of one block of each model, with random weights and random routes: as many tokens go to
each expert as in the original, though not all experts fit into memory. `compress` measures which of
both it takes; here experts run one by one in sparse forms in any case, so that the times say what
there is to gain or to lose.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import nn

from mtprune.compression.experts import OpenExperts
from mtprune.compression.forms import Sparse
from tests.benchmarks.harness import Row, Settings, interleaved, main, threads

SPARSITIES = (0.8, 0.9, 0.95)
LENGTHS = (1, 128)

PLAIN = {
    "vocab_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Mixture:
    """A block of experts.

    Attributes:
        name: Whose it is.
        family: The name of its classes in transformers.
        settings: What differs from the plain configuration.
    """

    name: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self) -> tuple[nn.Module, int]:
        """The experts, and how many of them a token is sent to."""
        transformers = import_module("transformers")
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.family}Config")(**PLAIN, **self.settings)
        with torch.device("meta"):
            model = getattr(transformers, f"{self.family}ForCausalLM")(config)
        config._experts_implementation = "grouped_mm"  # as transformers chooses
        experts = next(m for n, m in model.named_modules() if n.endswith(".experts"))
        experts.to_empty(device="cpu")
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.02)
        return experts.eval(), int(config.num_experts_per_tok)


QWEN = {"hidden_size": 2048, "moe_intermediate_size": 768, "head_dim": 128}
REAL = (
    Mixture(
        "Granite 3.0 1B, 32 experts",
        "GraniteMoe",
        {"hidden_size": 1024, "intermediate_size": 512}
        | {"num_local_experts": 32, "num_experts_per_tok": 8},
    ),
    Mixture(
        "Qwen 3 30B, 16 of its 128 experts",
        "Qwen3Moe",
        {**QWEN, "num_experts": 16, "num_experts_per_tok": 1},
    ),
)
TOYS = (
    Mixture(
        "toy",
        "Mixtral",
        {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4}
        | {"num_experts_per_tok": 2},
    ),
)


@torch.no_grad()
def sparse(experts: nn.Module) -> OpenExperts:
    """Experts one by one, each matrix in the sparse form."""
    own = OpenExperts(experts)
    for layers in (own.ups, own.downs):
        for number, layer in enumerate(layers):
            layers[number] = Sparse.build(layer)
    return own


@torch.no_grad()
def measured(mixture: Mixture, sparsity: float, length: int, repeats: int) -> Row:
    experts, each = mixture.build()
    for stack in experts.parameters():
        stack.mul_(torch.rand_like(stack) >= sparsity)
    own = sparse(experts)
    x = torch.randn(length, mixture.settings["hidden_size"])
    chosen = torch.rand(length, len(own.ups)).topk(each).indices
    call = (x, chosen, torch.full((length, each), 1 / each))
    times = interleaved(lambda: own(*call), lambda: experts(*call), repeats)
    torch.testing.assert_close(own(*call), experts(*call), rtol=1e-3, atol=1e-5)
    sizes = [sum(t.nbytes for t in module.state_dict().values()) for module in (experts, own)]
    return Row(
        f"{mixture.name}, {sparsity:.0%} zeros, {length} tokens: one by one",
        "stacks",
        1 / times["cpu"]["ratio"],
        detail={
            "stacks_ms": 1e3 * times["cpu"]["second_s"],
            "ms": 1e3 * times["cpu"]["first_s"],
            "stacks_bytes": sizes[0],
            "bytes": sizes[1],
            "times": times,
        },
    )


def run(settings: Settings) -> list[Row]:
    chosen = TOYS if settings.size == "toy" else REAL
    with threads(1):
        return [
            measured(mixture, sparsity, length, settings.repeats)
            for mixture in chosen
            for sparsity in SPARSITIES
            for length in LENGTHS
        ]


if __name__ == "__main__":
    main(run)
