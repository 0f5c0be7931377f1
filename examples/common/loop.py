"""The training loop, with the pruner in it. Lines that concern the pruner end in ``# mtprune``."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import checkpoints, data, distilling, losses, nets, results
from common.options import Options, Problem, make_method, parse, scoring_batches
from common.shuffling import shuffled
from mtprune import MultitaskPruner
from mtprune.files import write_torch
from mtprune.methods import Method
from mtprune.reading import Entry

Results = dict[str, Any]


class UnfitError(ValueError):
    """A method that cannot prune the net."""


@dataclass(frozen=True)
class Run:
    """What a run is made of.

    Attributes:
        options: How.
        source: The data set.
        tasks: Those to learn.
        model: The net.
        optimizer: Of its weights.
        pruner: Of its weights, too.
        scaler: Of float16 gradients; does nothing otherwise.
        teacher: Whom the net imitates, if anyone.
    """

    options: Options
    source: data.Source
    tasks: Mapping[str, losses.Task]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    pruner: MultitaskPruner
    scaler: torch.amp.GradScaler
    teacher: distilling.Teacher | None = None

    def parts(self) -> dict[str, Any]:
        """What has a state_dict."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "pruner": self.pruner,
            "scaler": self.scaler,
        }

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, if asked for."""
        options = self.options
        kind = torch.float16 if options.device.startswith("cuda") else torch.bfloat16
        return torch.autocast(options.device.split(":")[0], kind, enabled=options.amp)

    def to_device(self, batch: data.Sample) -> data.Sample:
        """A batch where the net is."""
        return {name: x.to(self.options.device, non_blocking=True) for name, x in batch.items()}

    def to_learn_from(self, batch: data.Sample) -> data.Sample:
        """A batch where the net is, with what the teacher says about it."""
        batch = self.to_device(batch)
        if self.teacher is None:
            return batch
        with self.autocast():
            return self.teacher.teach(batch)


def open_data(problem: Problem, options: Options) -> data.Source:
    """Find the data, and read a sample of every split: what is wrong should show now."""
    if problem.packaged is not None:
        source = problem.packaged()
    else:
        source = data.find(options.data, problem.layouts, options.tasks)
    for task in options.tasks:
        if task not in source.outputs:
            raise ValueError(f"{source.layout} has no task '{task}'. It has {[*source.outputs]}.")
    for split in source.splits.values():
        split[0]
    return shuffled(source, options.noise, seed=0) if options.noise else source


def build(
    problem: Problem, options: Options, source: data.Source, method: Method[Any] | None = None
) -> Run:
    """Net, optimizer and pruner, as they are before the first step.

    The method is the one that the options describe unless given.

    Raises:
        UnfitError: If the method cannot prune the net.
    """
    every = problem.make_tasks(source)
    tasks = {name: every[name] for name in options.tasks}
    teacher = make_teacher(options, source) if options.distil else None
    model = make_net(options, source)
    optimizer = torch.optim.Adam(model.parameters(), options.lr, weight_decay=options.decay)
    try:
        pruner = MultitaskPruner(  # mtprune
            model,
            to_learn(options, tasks, teacher),
            shared_modules=model.shared_modules(),
            method=method or make_method(options),
            optimizer=optimizer,
            backend=options.backend,
            seed=options.seed,
        )
    except ValueError as error:
        raise UnfitError(
            f"--method {options.method} does not fit --net {options.net}: {error}"
        ) from error
    on_gpu = options.device.startswith("cuda")
    scaler = torch.amp.GradScaler(options.device.split(":")[0], enabled=options.amp and on_gpu)
    return Run(options, source, tasks, model, optimizer, pruner, scaler, teacher)


def to_learn(
    options: Options, tasks: Mapping[str, losses.Task], teacher: distilling.Teacher | None
) -> dict[str, distilling.Loss]:
    """What each task is trained and scored on."""
    found = {}
    for name, task in tasks.items():
        scale = options.loss_scale.get(name, 1)
        found[name] = losses.task_loss(name, task, scale)
        if teacher is not None:
            found[name] = teacher.adds(name, found[name], task.imitate, scale)
    return found


def make_net(options: Options, source: data.Source) -> nn.Module:
    """The net with its initial weights, which hang on the seed alone."""
    torch.manual_seed(options.seed)
    outputs = {name: source.outputs[name] for name in options.tasks}
    model = nets.build(options.net, outputs, options.width, source.features)
    if options.imagenet is not None:
        nets.load_backbone(model, options.imagenet)
    return model.to(options.device)


def make_teacher(options: Options, source: data.Source) -> distilling.Teacher:
    """The net to imitate."""
    net = make_net(options, source)
    load_weights(net, options.teacher)
    return distilling.Teacher(net, options.distil, options.temperature)


def batches_from(problem: Problem, run: Run, start: int, stop: int) -> Any:
    """The training batches of these steps."""
    options, tasks = run.options, run.tasks
    augment = None
    if problem.augment:
        augment = data.Augment(
            crop=tuple(options.crop),
            scales=tuple(options.scales),
            zoom=run.source.zoom,
            normals=tuple(name for name, task in tasks.items() if task.normals),
            padding={name: task.padding for name, task in tasks.items()},
        )
    return data.training_batches(
        run.source.splits["train"],
        augment,
        batch=options.batch,
        seed=options.seed,
        start=start,
        stop=stop,
        workers=options.workers,
    )


def train(problem: Problem, options: Options, source: data.Source | None = None) -> Results:
    """Train, prune, pick by validation, test; the results, as written to the JSON.

    The data set is opened unless given. Into ``--out`` go ``checkpoint.pt`` (to resume),
    ``best.pt``, ``model.pt`` (the finished net: plain weights, zeros and all), ``results.json``
    and ``curves.png``.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    checkpoints.begin(options.out)
    source = source or open_data(problem, options)
    run = build(problem, options, source)
    model, optimizer, pruner, scaler = run.model, run.optimizer, run.pruner, run.scaler
    weight = {
        name: options.weight.get(name, task.weight) / options.loss_scale.get(name, 1)
        for name, task in run.tasks.items()
    }
    log: dict[str, Any] = {"step": 0, "train": [], "val": [], "best": None, "seconds": 0.0}
    saved = options.out / "checkpoint.pt"
    if options.resume and saved.exists():
        log = load(run, saved)
    elif options.pretrained is not None:
        load_weights(model, options.pretrained)
    if log["step"] == 0 and (count := scoring_batches(options)):
        scoring = islice(batches_from(problem, run, 0, count), count)
        pruner.prune(map(run.to_learn_from, scoring), forward=forward, progress=False)  # mtprune
        if options.rewind:
            rewind(run)

    net = compiled(model) if options.compile else model
    began, sparsity = time.perf_counter() - log["seconds"], pruner.sparsity
    batches = batches_from(problem, run, log["step"], options.steps)
    bar = tqdm(batches, initial=log["step"], total=options.steps, unit="step", disable=None)
    for batch in map(run.to_learn_from, bar):
        step = log["step"]
        set_rate(optimizer, options, step)
        optimizer.zero_grad()
        with run.autocast():
            outputs = forward(net, batch)
        parts = pruner.observe(outputs, batch, scaler=scaler if options.amp else None)  # mtprune
        total = pruner.weigh({name: weight[name] * part for name, part in parts.items()})  # mtprune
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        if pruner.step():  # mtprune
            sparsity = pruner.sparsity

        log["step"] = step + 1
        if step % max(1, options.steps // 500) == 0:
            scale = options.loss_scale
            now = {name: float(part.detach()) / scale.get(name, 1) for name, part in parts.items()}
            log["train"].append({"step": step, "sparsity": sparsity, **now})
            shown = {name: f"{loss:.3g}" for name, loss in now.items()}
            bar.set_postfix(shown | {"sparsity": f"{sparsity:.1%}"}, refresh=False)
        if log["step"] % options.save_every == 0 or log["step"] == options.steps:
            validate(run, log)
            log["seconds"] = time.perf_counter() - began
            save(run, log, saved)
    return finish(problem, options, source, log)


def forward(model: nn.Module, batch: data.Sample) -> dict[str, Tensor]:
    """``{task: output}``."""
    outputs: dict[str, Tensor] = model(batch["input"])
    return outputs


def compiled(model: nn.Module) -> Any:
    """The compiled net, whose graph can be swept before its backward pass."""
    torch._functorch.config.donated_buffer = False
    return torch.compile(model)


def set_rate(optimizer: torch.optim.Optimizer, options: Options, step: int) -> None:
    """The learning rate of a step: a staircase downwards, or a straight line to 0."""
    if options.lr_shape == "line":
        factor = 1 - step / options.steps
    else:
        factor = options.lr_factor ** (step // options.lr_every)
    for group in optimizer.param_groups:
        group["lr"] = options.lr * factor


def load_weights(model: nn.Module, path: Path) -> None:
    """Give a net the weights of a finished run."""
    if not path.exists():
        raise checkpoints.UnusableError(
            f"There is no {path}. Train with --method dense to get a model.pt."
        )
    try:
        model.load_state_dict(checkpoints.read(path))
    except (RuntimeError, TypeError) as error:
        raise checkpoints.UnusableError(
            f"{path} is of another net than these options describe. {error}"
        ) from None


@torch.no_grad()
def rewind(run: Run) -> None:
    """Bring the weights that were kept back to where they began."""
    masks = run.pruner.masks
    fresh = make_net(run.options, run.source).state_dict()
    for name, value in run.model.state_dict().items():
        plain = name.removesuffix("_orig")
        if plain in fresh:  # masks are not
            value.copy_(fresh[plain] * masks[plain] if plain in masks else fresh[plain])


@torch.no_grad()
def evaluate(run: Run, split: str) -> dict[str, dict[str, float]]:
    """Loss and metrics of every task on a split."""
    model, options = run.model, run.options
    model.eval()
    metrics = {name: task.metric() for name, task in run.tasks.items()}
    sums, count = dict.fromkeys(run.tasks, 0.0), 0
    batches = data.test_batches(
        run.source.splits[split], batch=options.batch, workers=options.workers
    )
    for batch in map(run.to_device, batches):
        with run.autocast():
            outputs = forward(model, batch)
        size = len(batch["input"])
        count += size
        for name, task in run.tasks.items():
            sums[name] += size * float(losses.task_loss(name, task)(outputs, batch))
            metrics[name].update(outputs[name].float(), batch[name])
    model.train()
    return {name: {"loss": sums[name] / count, **metrics[name].compute()} for name in run.tasks}


def validate(run: Run, log: dict[str, Any]) -> None:
    """Evaluate on the validation split; keep the weights if they are the best so far.

    Best is the smallest mean over tasks of the loss, in units of that of the first validation, so
    that no task's scale counts. Weights that are not as sparse as they shall be do not qualify,
    unless there are no others in the end.
    """
    found = evaluate(run, "val")
    log["val"].append({"step": log["step"], "sparsity": run.pruner.sparsity, "results": found})
    first = log["val"][0]["results"]
    ratios = [found[name]["loss"] / max(first[name]["loss"], 1e-12) for name in run.tasks]
    score = sum(ratios) / len(ratios)
    best = log["best"]
    if is_sparse(run):
        better = best is None or score < best["score"]
    else:
        better = best is None and log["step"] == run.options.steps
    if better:
        log["best"] = {"step": log["step"], "score": score}
        states = {name: part.state_dict() for name, part in run.parts().items()}
        kept = {name: states[name] for name in ("model", "pruner")}
        checkpoints.save(kept, run.options.out / "best.pt")


def is_sparse(run: Run) -> bool:
    """Whether the number of zeros is what it shall be; of ranks, of parameters saved."""
    target = 0.0 if run.options.method == "dense" else run.options.sparsity
    size = sum(mask.numel() for mask in run.pruner.masks.values())
    saved, asked = round(run.pruner.sparsity * size), round(target * size)
    # A component is saved as a whole, so it may be a little more.
    return saved >= asked if results.is_rank(run.options.method) else saved == asked


def save(run: Run, log: Mapping[str, Any], path: Path) -> None:
    """All that is needed to go on as if nothing had happened."""
    state = {name: part.state_dict() for name, part in run.parts().items()}
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    about = {"log": log, "options": comparable(run.options)}
    checkpoints.save({**state, "random": random, **about}, path)


def load(run: Run, path: Path) -> dict[str, Any]:
    """Go on from a checkpoint; the log so far.

    Raises:
        UnusableError: If it is damaged, or of a run with other options.
    """
    parts = run.parts()
    entries = checkpoints.load(path, [*parts, "random", "log", "options"], run.options.device)
    mine = comparable(run.options)
    for name, value in checkpoints.differing(entries["options"], mine).items():
        raise checkpoints.UnusableError(
            f"{path} is of a run with --{name.replace('_', '-')} {value}. Got {mine.get(name)}."
        )
    with checkpoints.usable():
        log = read_log(entries["log"], run)
        random = checkpoints.random_states(entries["random"])
    checkpoints.restore(parts, entries, path)
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return log


def read_log(entry: Entry, run: Run) -> dict[str, Any]:
    """What has been noted of a run; its losses need not be finite."""
    parts = entry.fields(["step", "train", "val", "best", "seconds"])
    step = parts["step"].whole(least=1, most=run.options.steps)
    parts["seconds"].number(least=0.0)
    for row in parts["train"].items():
        check_numbers(row, ["step", "sparsity", *run.tasks])
    checked = []
    for row in parts["val"].items():
        told = row.fields(["step", "sparsity", "results"])
        checked.append(told["step"].whole(most=run.options.steps))
        told["sparsity"].number(0.0, 1.0)
        for numbers in told["results"].fields(run.tasks).values():
            check_numbers(numbers, ["loss"], others=True)
    if parts["best"].value is not None or step == run.options.steps:
        best = parts["best"].fields(["step", "score"])
        if best["step"].whole() not in checked:
            raise best["step"].wrong(f"must be one of {checked}, the steps of validations")
    log: dict[str, Any] = entry.plain()
    return log


def check_numbers(entry: Entry, names: Sequence[str], *, others: bool = False) -> None:
    """Refuse what is not a number under each of some names, or under others too."""
    rows = entry.mapping()
    for part in (entry.mapping() if others else entry.fields(names)).values():
        if isinstance(part.value, bool) or not isinstance(part.value, (int, float)):
            raise part.wrong("must be a number")
    if set(names) - set(rows):
        raise entry.wrong(f"must have {names}")


def comparable(options: Options) -> dict[str, Any]:
    """The options that a run hangs on, as plain values."""
    free = {"out", "resume", "workers", "threads", "data", "pretrained", "imagenet", "teacher"}
    return {name: value for name, value in vars(options).items() if name not in free}


def finish(problem: Problem, options: Options, source: data.Source, log: Results) -> Results:
    """Bake the best weights in, test them, and tell what came out."""
    run = build(problem, options, source)
    parts = {name: run.parts()[name] for name in ("model", "pruner")}
    best = checkpoints.load(options.out / "best.pt", parts, options.device)
    checkpoints.restore(parts, best, options.out / "best.pt")
    run.pruner.finalize()  # mtprune
    weights = dict(run.model.named_parameters())
    masks = run.pruner.masks
    found = {
        "problem": problem.name,
        "layout": source.layout,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "weights": sum(mask.numel() for mask in masks.values()),
        "zeros": run.pruner.report().parameters - run.pruner.report().kept
        if results.is_rank(options.method)
        else sum(int((weights[name][~mask] == 0).sum()) for name, mask in masks.items()),
        "step": log["best"]["step"],
        "val": next(v["results"] for v in log["val"] if v["step"] == log["best"]["step"]),
        "test": evaluate(run, "test"),
        "judged": {
            name: sorted(task.judge(log["val"][0]["results"][name]))
            for name, task in run.tasks.items()
        },
        "report": run.pruner.report().to_dict(),
        "history": {"train": log["train"], "val": log["val"]},
        "seconds": log["seconds"],
    }
    write_torch(options.out / "model.pt", run.model.state_dict())
    results.write(found, options.out)
    print(f"\n{run.pruner.report()}\n" if found["zeros"] else "")
    print(results.table(found))
    print(f"Wrote results.json, curves.png and model.pt to {options.out}.")
    return found


def main(problem: Problem, arguments: Sequence[str] | None = None) -> Results:
    """Read the command line, and train."""
    options = parse(problem, arguments)
    source = open_or_exit(problem, options)
    try:
        return train(problem, options, source)
    except (OSError, checkpoints.UnusableError, UnfitError) as error:
        raise SystemExit(f"{problem.name}: {error}") from None


def open_or_exit(problem: Problem, options: Options) -> data.Source:
    """The data set; what is wrong with it is told without a traceback."""
    try:
        return open_data(problem, options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{problem.name}: {error}") from None
