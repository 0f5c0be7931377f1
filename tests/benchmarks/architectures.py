"""Well-known architectures at their real size, with random weights: half of their units removed.

Which units go does not change how many parameters are left, nor how long a forward takes, so they
are the odd ones, and nothing is trained. Everything else is the way of any model: groups found by
patterns or `Channel`, and `compress`, which checks the outputs. Nothing is downloaded.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import nn

from mtprune import Channel, compress
from mtprune.compression.running import call
from mtprune.patterns import heads, neurons
from mtprune.structure import NOBODY, Group
from tests.benchmarks.harness import Row, Settings, interleaved, main, threads

LENGTH = 128


@dataclass(frozen=True)
class Architecture:
    """A model and what it is called with.

    Attributes:
        name: As it is known.
        cls: The class of transformers.
        config: The class of its configuration.
        settings: What differs from the configuration's defaults.
        inputs: The kind of inputs: ``"ids"``, ``"pair"`` or ``"image"``.
        units: What is removed.
    """

    name: str
    cls: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: str = "ids"
    units: str = "heads and neurons"

    def build(self) -> Any:
        transformers = import_module("transformers")
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.settings)
        return getattr(transformers, self.cls)(config).eval()

    def batch(self, model: Any) -> dict[str, torch.Tensor]:
        if self.inputs == "image":
            size = getattr(model.config, "image_size", 224)
            return {"pixel_values": torch.randn(1, 3, size, size)}
        ids = torch.randint(5, model.config.vocab_size, (1, LENGTH))
        return {"input_ids": ids, **({"decoder_input_ids": ids} if self.inputs == "pair" else {})}

    def groups(self, model: nn.Module, batch: Any) -> list[Group]:
        if self.units == "channels":
            return list(Channel(batch).groups(model, []))
        return [*heads(model, example_inputs=batch), *neurons(model, example_inputs=batch)]


SMOLLM = {  # the numbers of SmolLM-135M
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
REAL = (
    Architecture("BERT base", "BertModel", "BertConfig"),
    Architecture("GPT-2", "GPT2LMHeadModel", "GPT2Config"),
    Architecture("SmolLM 135M", "LlamaForCausalLM", "LlamaConfig", SMOLLM),
    Architecture("ViT B/16", "ViTForImageClassification", "ViTConfig", inputs="image"),
    Architecture("T5 small", "T5ForConditionalGeneration", "T5Config", inputs="pair"),
    Architecture(
        "ResNet-50",
        "ResNetForImageClassification",
        "ResNetConfig",
        {"num_labels": 1000},
        inputs="image",
        units="channels",
    ),
)
TOYS = (
    Architecture(
        "toy",
        "BertModel",
        "BertConfig",
        {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
        | {"num_attention_heads": 4},
    ),
)


def dense(functions: list[Callable[[], object]]) -> list[float]:
    """Times by which every layer stays dense: it is the units that are measured."""
    return [float(i) for i, _ in enumerate(functions)]


@torch.no_grad()
def without_half(model: nn.Module, groups: list[Group], batch: Any) -> tuple[nn.Module, float]:
    """The model without every other unit, and how many seconds of processor `compress` took."""
    for group in groups:
        for member in group.members:
            if member.role == "in":
                index = member.index()
                unread = (index % 2 == 1) & (index != NOBODY)
                model.get_parameter(member.tensor).movedim(member.dim, 0)[unread] = 0
    start = time.process_time()
    small = compress(model, batch, groups=groups, measure=dense)
    return small, time.process_time() - start


def measured(architecture: Architecture, repeats: int) -> Row:
    model = architecture.build()
    batch = architecture.batch(model)
    start = time.process_time()
    groups = architecture.groups(model, batch)
    found = time.process_time() - start
    small, took = without_half(model, groups, batch)
    with torch.no_grad():
        times = interleaved(lambda: call(small, batch), lambda: call(model, batch), repeats)
    counts = [sum(p.numel() for p in net.parameters()) for net in (model, small)]
    return Row(
        f"{architecture.name} without half of its {architecture.units}",
        "as it was",
        1 / times["cpu"]["ratio"],
        detail={
            "parameters": counts[0],
            "left": counts[1],
            "dense_ms": 1e3 * times["cpu"]["second_s"],
            "ms": 1e3 * times["cpu"]["first_s"],
            "times": times,
            "groups": len(groups),
            "units": sum(group.size for group in groups),
            "finding_cpu_s": found,
            "compress_cpu_s": took,
        },
    )


def run(settings: Settings) -> list[Row]:
    chosen = TOYS if settings.size == "toy" else REAL
    with threads(1):
        return [measured(architecture, settings.repeats) for architecture in chosen]


if __name__ == "__main__":
    main(run)
