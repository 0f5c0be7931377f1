"""A decoder for two tasks, from training to `AutoModelForCausalLM`: half of its heads and neurons.

A small Llama with random weights learns two tasks of next tokens: to count in steps, and to say
the first half of a line again. It is pruned to half of its query groups and half of its neurons
while both tasks go on learning, made smaller, saved, and loaded by transformers. As every layer
keeps as many, what is saved is a plain Llama, which loads without mtprune.

Printed, and written as JSON, are how often both tasks' tokens are right, before and after, and the
milliseconds of a forward pass and of generating.

    python decoder.py --out results.json
    python decoder.py --steps 60 --hidden 32 --layers 2  # seconds
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mtprune
from mtprune import Cubic, Head, MultitaskPruner, Neuron, Vote
from mtprune.files import write_text
from mtprune.integrations.transformers import save_pretrained

WORDS, COUNT, ECHO = 48, 48, 49
"""How many words there are, and the tokens that say which task a line is of."""

LENGTH = 12


def lines(task: str, rows: int, random: torch.Generator) -> Tensor:
    """Lines of a task, ``[rows, 1 + LENGTH]``, the first token that of the task."""
    if task == "count":
        start = torch.randint(WORDS, (rows, 1), generator=random)
        step = torch.randint(1, 4, (rows, 1), generator=random)
        words = (start + step * torch.arange(LENGTH)) % WORDS
    else:
        words = torch.randint(WORDS, (rows, LENGTH // 2), generator=random).repeat(1, 2)
    first = torch.full((rows, 1), COUNT if task == "count" else ECHO)
    return torch.cat([first, words], 1)


def told(task: str) -> slice:
    """The places whose next token follows from the tokens before."""
    return slice(2, LENGTH) if task == "count" else slice(LENGTH // 2, LENGTH)


def loss(model: nn.Module, task: str, ids: Tensor) -> Tensor:
    """The cross-entropy of the tokens that follow from those before."""
    logits = model(input_ids=ids).logits[:, told(task)]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:][:, told(task)].flatten())


@torch.no_grad()
def right(model: nn.Module, task: str) -> float:
    """The share of these tokens that a model says right, on lines that it has not seen."""
    ids = lines(task, 256, torch.Generator().manual_seed(1))
    said = model(input_ids=ids).logits.argmax(-1)
    return float((said[:, told(task)] == ids[:, 1:][:, told(task)]).float().mean())


def batches(rows: int, random: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Lines of both tasks, without end."""
    while True:
        yield {task: lines(task, rows, random) for task in TASKS}


TASKS = ("count", "echo")


def train(
    model: nn.Module, steps: int, rows: int, prune: bool, random: torch.Generator
) -> MultitaskPruner | None:
    """Train a model on both tasks, and prune it to half of its heads and neurons meanwhile."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    pruner = None
    if prune:
        schedule = Cubic(begin=1, end=max(2, steps // 2), every=max(1, steps // 20))
        # Half of every group: as many heads and neurons in each layer.
        method = Vote(0.5, granularity=(Head(), Neuron()), allocation="uniform", schedule=schedule)
        body = model.get_submodule("model")
        pruner = MultitaskPruner(model, TASKS, body, method=method, optimizer=optimizer)
    model.train()
    for _, batch in zip(range(steps), batches(rows, random), strict=False):
        losses = {task: loss(model, task, ids) for task, ids in batch.items()}
        if pruner is not None:
            pruner.observe_losses(losses)
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()
    if pruner is not None:
        pruner.finalize()
    model.eval()
    return pruner


@torch.no_grad()
def milliseconds(functions: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """The least time of each function, taken in turns."""
    times = [[] for _ in functions]  # type: list[list[float]]
    for _ in range(1 + repeats):
        for function, taken in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function()
            taken.append(1e3 * (time.perf_counter() - begin))
    return [round(min(taken[1:]), 3) for taken in times]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, number in {
        "steps": 1500,
        "rows": 32,
        "hidden": 128,
        "layers": 4,
        "repeats": 20,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--folder", type=Path, default=Path("decoder"), help="where it is saved")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    o = parser.parse_args(argv)

    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=o.hidden,
        intermediate_size=4 * o.hidden,
        num_hidden_layers=o.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=max(4, o.hidden // 8),
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    train(model, o.steps, o.rows, False, random)
    dense = LlamaForCausalLM(config).eval()
    dense.load_state_dict(model.state_dict())
    pruner = train(model, o.steps, o.rows, True, random)
    assert pruner is not None
    print(pruner.report())

    ids = lines("echo", 8, random)
    units = [*mtprune.patterns.heads(model), *mtprune.patterns.neurons(model)]
    plan = mtprune.plan_of(mtprune.compress(model, {"input_ids": ids}, groups=units))
    fast = mtprune.compress(model, {"input_ids": ids}, plan=plan.replace("*", "dense"))
    save_pretrained(fast, o.folder)
    loaded = AutoModelForCausalLM.from_pretrained(o.folder)

    prompt = ids[:, : 1 + LENGTH // 2]
    options = {"max_new_tokens": LENGTH // 2, "do_sample": False, "pad_token_id": 0}

    def say(net: Any) -> Any:
        return net.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    assert torch.equal(say(model), say(loaded)), "what is loaded says what was pruned"
    both = (dense, loaded)
    forward = milliseconds([lambda net=net: net(input_ids=ids) for net in both], o.repeats)
    saying = milliseconds([lambda net=net: say(net) for net in both], max(1, o.repeats // 4))
    found = {
        "right": {t: [round(right(n, t), 3) for n in (dense, model, loaded)] for t in TASKS},
        "parameters": [sum(p.numel() for p in net.parameters()) for net in both],
        "forward ms": forward,
        "generate ms": saying,
        "plain": "quantization_config" not in json.loads((o.folder / "config.json").read_text()),
        "heads": [loaded.config.num_attention_heads, loaded.config.num_key_value_heads],
        "neurons": loaded.config.intermediate_size,
    }
    print(json.dumps(found, indent=1))
    if o.out:
        write_text(o.out, json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
