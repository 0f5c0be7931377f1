r"""Pruning and int8 together: what each is worth on an encoder for several tasks, in one table.

The encoder is fine-tuned, once as it is and once with half of its heads and neurons pruned at the
start (``units:rounds`` of ``encoder_recipes.py``), equally long. Both go to ONNX Runtime, in
float32 and in dynamic int8. And it is fine-tuned without most of its single weights
(``elsewhere:rounds``), and made fast by ``mtprune.compress``. Of each there is the latency for one
sentence and for 16, and what it gives on the test split.

    python encoder_int8.py --data DIR --tasks sst2 trec subj sick_e --out DIR

Options are those of ``encoder_recipes.py``; the first of ``--sparsities`` is the share of heads and
neurons that goes, the others are shares of single weights, and ``--seeds`` says how many runs the
results are the mean of.
"""

import copy
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import encoder_recipes as recipes
import onnx
import onnxruntime
import torch
from common import text
from encoder_multitask import Net
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import mtprune
from mtprune.compression.timing import sampled
from mtprune.files import write_text
from mtprune.text import columns

SIZES = (1, 16)
ROUNDS = 21
SHARES = ("0.5", "0.75", "0.9")
"""Of heads and neurons, and of single weights, unless others are given."""


class Session(nn.Module):
    """An encoder in ONNX Runtime, called as the one it was made of."""

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options)

    def forward(self, **inputs: Tensor) -> BaseModelOutput:
        """The last hidden state, as transformers gives it."""
        names = [entry.name for entry in self.session.get_inputs()]
        (hidden, *_) = self.session.run(None, {name: inputs[name].numpy() for name in names})
        return BaseModelOutput(last_hidden_state=torch.from_numpy(hidden))


class Hidden(nn.Module):
    """What an exporter takes: tensors in, the last hidden state out."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states ``[rows, tokens, width]``."""
        hidden: Tensor = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        return hidden


def exported(encoder: nn.Module, batch: text.Batch, path: Path) -> Path:
    """The encoder as an ONNX file, for any number of rows and tokens."""
    names = ("input_ids", "attention_mask")
    sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens", min=2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Hidden(encoder).eval(),
            tuple(batch[name] for name in names),
            path,
            input_names=names,
            dynamic_shapes=(sizes, sizes),
            external_data=False,
            verbose=False,
        )
    model = onnx.load(path)
    del model.graph.value_info[:]  # the quantizer infers shapes itself, and wants no others
    onnx.save(model, path)
    return path


def in_int8(path: Path) -> Path:
    """The same file with weights of eight bits; seven where products of eight overflow."""
    other = path.with_name(f"int8-{path.name}")
    info = Path("/proc/cpuinfo")
    has_vnni = info.exists() and "vnni" in info.read_text()
    quantize_dynamic(path, other, reduce_range=not has_vnni)
    return other


def with_encoder(net: Net, encoder: nn.Module) -> Net:
    """The same heads on another encoder."""
    other = copy.copy(net)
    other._modules = {**net._modules, "encoder": encoder}
    return other


def tuned(study: recipes.Study, spec: str, share: float, seed: int) -> Net:
    """A net that was pruned by a method, if at all, and fine-tuned."""
    net = copy.deepcopy(study.dense(seed))
    later = study.batches(seed, start=study.options.dense_steps)
    torch.manual_seed(seed)
    study.prune_and_tune(net, spec, share, seed, study.options.rates[0], later)
    return net.eval()


def contestants(study: recipes.Study, seed: int, folder: Path) -> dict[str, Net]:
    """The nets of a seed by name: dense and pruned, in torch and in ONNX Runtime."""
    units, *weights = study.options.sparsities
    first = next(iter(study.tasks.values())).splits["train"]
    example = first.batch(list(range(2)), study.world.padding)
    given = {key: value for key, value in example.items() if key != "label"}
    nets = {}
    for name, spec in (("dense", recipes.TUNED), (f"{units:.0%} of units", "units:rounds")):
        net = tuned(study, spec, units, seed)
        small = net.encoder
        if spec != recipes.TUNED:
            small = mtprune.compress(small, given, portable=True, tolerance=1e-3)
        nets[f"{name}, torch"] = with_encoder(net, small)
        path = exported(small, example, folder / f"{len(nets)}.onnx")
        threads = torch.get_num_threads()
        nets[f"{name}, ONNX Runtime"] = with_encoder(net, Session(path, threads))
        nets[f"{name}, int8"] = with_encoder(net, Session(in_int8(path), threads))
    sizes = [sentences(rows, study.options.length) for rows in SIZES]
    for share in weights:
        net = tuned(study, "elsewhere:rounds", share, seed)
        fast = mtprune.compress(net.encoder, sizes, tolerance=1e-3)
        nets[f"{share:.0%} of weights, torch"] = with_encoder(net, fast)
    return nets


def sentences(rows: int, tokens: int) -> dict[str, Tensor]:
    """Inputs of a size; what they say does not matter for how long they take."""
    ids = torch.randint(5, 500, (rows, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def latencies(nets: Mapping[str, Net], tokens: int) -> dict[str, list[float]]:
    """Median milliseconds of each encoder for each of `SIZES`, all taking turns."""
    found: dict[str, list[float]] = {name: [] for name in nets}
    for rows in SIZES:
        inputs = sentences(rows, tokens)
        runs = [partial(net.encoder, **inputs) for net in nets.values()]
        for name, times in zip(nets, sampled(runs, ROUNDS, ROUNDS), strict=True):
            found[name].append(median(times))
    return found


def results(study: recipes.Study, net: Net) -> dict[str, float]:
    """The main metric of each task on the test split."""
    told = {}
    for task, found in study.evaluate(net, "test").items():
        told[task] = next(value for metric, value in found.items() if metric != "loss")
    return told


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text."""
    dense = rows[0]
    tasks = list(dense["tasks"])
    head = ("", *(f"{size} x ms" for size in SIZES), "faster", "mean", *tasks)
    lines = [head]
    for row in rows:
        faster = [f"{a / b:.1f}x" for a, b in zip(dense["ms"], row["ms"], strict=True)]
        given = [f"{row['tasks'][task]:.1f}" for task in tasks]
        ms = (f"{value:.1f}" for value in row["ms"])
        average = f"{mean(row['tasks'].values()):.1f}"
        lines.append((row["name"], *ms, " ".join(faster), average, *given))
    return "\n".join(columns(lines, left=1))


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, prune, export, quantize, and tell what each is worth."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    given = given if "--sparsities" in given else [*given, "--sparsities", *SHARES]
    options = recipes.read(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    world = recipes.open_world(options)
    study = recipes.Study(world, world.tasks(options.tasks, {}), options)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            nets = contestants(study, seed, Path(folder))
            times = latencies(nets, options.length)
            runs.append({n: (times[n], results(study, net)) for n, net in nets.items()})
    rows = [
        {
            "name": name,
            "ms": [mean(run[name][0][i] for run in runs) for i in range(len(SIZES))],
            "tasks": {task: mean(run[name][1][task] for run in runs) for task in study.tasks},
            "seeds": [{"ms": run[name][0], "tasks": run[name][1]} for run in runs],
        }
        for name in runs[0]
    ]
    told = table(rows)
    print(told)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "int8.txt", told + "\n")
    write_text(options.out / "int8.json", json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
