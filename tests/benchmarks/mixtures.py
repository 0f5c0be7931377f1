"""Experts of known widths with zeros: in stacks, as transformers multiplies them, and one by one.

A block of each model, with random weights: as many tokens go to each expert as in the original,
though not all experts fit into memory. `compress` measures which of both it takes; here its forms
are taken in any case, so that the times say what there is to gain or to lose.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from mtprune import compress
from mtprune.compression.running import call
from tests.benchmarks.harness import Row, Settings, interleaved, main, threads
from tests.compression.fakes import prefer

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

    def build(self) -> Any:
        transformers = import_module("transformers")
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.family}Config")(**PLAIN, **self.settings)
        return getattr(transformers, f"{self.family}ForCausalLM")(config).eval()


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
def measured(mixture: Mixture, sparsity: float, length: int, repeats: int) -> Row:
    model = mixture.build()
    for stack in (p for p in model.parameters() if p.dim() == 3):
        stack.mul_(torch.rand_like(stack) >= sparsity)
    batch = {"input_ids": torch.randint(3, 64, (1, length))}
    fast = compress(model, batch, measure=prefer("sparse"))
    calls: dict[str, Any] = {}
    modules = {}
    for key, net in (("stacks", model), ("apart", fast)):
        modules[key] = next(m for n, m in net.named_modules() if n.endswith(".experts"))

    def record(module: Any, args: Any) -> None:
        calls["args"] = args

    handle = modules["stacks"].register_forward_pre_hook(record)
    call(model, batch)
    handle.remove()
    args = calls["args"]
    times = interleaved(lambda: modules["apart"](*args), lambda: modules["stacks"](*args), repeats)
    sizes = {
        key: sum(t.nbytes for t in module.state_dict().values()) for key, module in modules.items()
    }
    return Row(
        f"{mixture.name}, {sparsity:.0%} zeros, {length} tokens: one by one",
        "stacks",
        1 / times["cpu"]["ratio"],
        detail={
            "stacks_ms": 1e3 * times["cpu"]["second_s"],
            "ms": 1e3 * times["cpu"]["first_s"],
            "stacks_bytes": sizes["stacks"],
            "bytes": sizes["apart"],
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
