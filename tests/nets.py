"""A shelf of awkward nets, each as small as it can be, and a training loop to put them through.

Every factory in `SHELF` returns a `Net`: a model, its losses, what the tasks share (by name, so
that it means the same in a copy), and a function that makes batches. Modules are classes at the
top of this file, never local ones: they must survive pickling and a second process.
"""

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, is_dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtprune import Cubic, MultitaskPruner, Vote, recipes

Batch = dict[str, Any]


@dataclass
class Net:
    """A model and all it takes to train and to prune it."""

    model: nn.Module
    task_losses: dict[str, Callable[[Any, Any], Tensor]]
    shared_modules: Any
    make_batch: Callable[[int], Batch]
    include: tuple[str, ...] = ()
    warns: str = ""
    """The start of the warning at its first mask change, if it is due one."""
    private: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Layers that must turn out private to a task."""
    alone: tuple[str, ...] = ()
    """Layers that must be left alone: frozen, or dead."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.task_losses, self.shared_modules, self.make_batch))


# Losses and batches.


class Squares:
    """Mean squared error of one task's output against its target."""

    def __init__(self, task: str) -> None:
        self.task = task

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        out = getattr(outputs, self.task) if is_dataclass(outputs) else outputs[self.task]
        return (out.float() - batch["target"].reshape(-1, 1)).square().mean()


class Scaled:
    """A loss times a factor."""

    def __init__(self, loss: Callable[[Any, Any], Tensor], factor: float) -> None:
        self.loss = loss
        self.factor = factor

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        return self.loss(outputs, batch) * self.factor


class OneOfAStack:
    """One task's loss, read from a stack of all: its graph leads to every head."""

    def __init__(self, tasks: tuple[str, ...], index: int, in_place: bool) -> None:
        self.losses = [Squares(task) for task in tasks]
        self.index = index
        self.in_place = in_place

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        values = [loss(outputs, batch) for loss in self.losses]
        if not self.in_place:
            return torch.stack(values)[self.index]
        vector = torch.zeros(len(values), device=values[0].device)
        for i, value in enumerate(values):
            vector[i] = value
        return vector[self.index]


class Batches:
    """Random inputs of one shape, and a target per example: the same for the same seed."""

    def __init__(self, *shape: int, tokens: int = 0, channels_last: bool = False) -> None:
        self.shape = shape
        self.tokens = tokens
        self.channels_last = channels_last

    def __call__(self, seed: int) -> Batch:
        g = torch.Generator().manual_seed(seed)
        if self.tokens:
            x = torch.randint(self.tokens, self.shape, generator=g)
        else:
            x = torch.randn(self.shape, generator=g)
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last)
        return {"x": x, "target": torch.randn(self.shape[0], generator=g)}


def squares(*tasks: str) -> dict[str, Callable[[Any, Any], Tensor]]:
    return {task: Squares(task) for task in tasks}


# Models: each maps a batch's "x" to one [batch, 1] output per task.


class Plain(nn.Module):
    """A trunk, and a head per task as an attribute."""

    def __init__(self, trunk: nn.Module, width: int, tasks: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__()
        self.trunk = trunk
        self.tasks = tasks
        for task in tasks:
            setattr(self, task, nn.Linear(width, 1))

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(x)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.features(x)
        return {task: getattr(self, task)(hidden) for task in self.tasks}


class Heads(nn.Module):
    """A trunk, and heads in a ModuleDict."""

    def __init__(self, trunk: nn.Module, width: int, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(x)
        return {task: head(hidden) for task, head in self.heads.items()}


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Linear(a, b), nn.Tanh() if i % 2 else nn.ReLU()]
    return nn.Sequential(*layers)


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x).tanh()).tanh()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.between = nn.Linear(6, 6)
        self.last = nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x).tanh()).tanh()).tanh()


class LanguageModel(nn.Module):
    """The embedding's weight is also that of one task's head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.body = nn.Linear(6, 6)
        self.lm = nn.Linear(6, 10, bias=False)
        self.lm.weight = self.embed.weight
        self.cls = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(self.embed(x)).tanh()
        return {"lm": self.lm(hidden), "cls": self.cls(hidden.mean(1))}


def next_token(outputs: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs["lm"][:, :-1].flatten(0, 1), batch["x"][:, 1:].flatten())


class Skipping(nn.Module):
    """Task b leaves the trunk after its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Linear(6, 8)
        self.late = nn.Linear(8, 8)
        self.a = nn.Linear(8, 1)
        self.b = nn.Linear(8, 1)
        self.c = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        early = self.early(x).tanh()
        late = self.late(early).tanh()
        return {"a": self.a(late), "b": self.b(early), "c": self.c(late)}


class Dead(nn.Module):
    """A side branch whose ReLU never opens: the graph leads there, no gradient does."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Linear(6, 8)
        self.side = nn.Linear(6, 8)
        nn.init.constant_(self.side.bias, -1e3)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).tanh() + self.side(x).relu()


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        key = x[..., : self.attention.kdim]
        value = x[..., : self.attention.vdim]
        return self.attention(x, key, value, need_weights=False)[0].mean(1)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).mean(1)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(5, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0].mean(1)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 4)
        for moment in x.unbind(1):
            state = self.cell(moment, state)
        return state


class Odd(nn.Module):
    """Bilinear and transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(2, 3, 3)
        self.pair = nn.Bilinear(3, 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.up(x)
        return self.pair(wide.mean(2), wide.amax(2)).tanh()


@dataclass
class Outputs:
    a: Tensor
    b: Tensor


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp(6, 8, 8)
        self.a = nn.Linear(8, 1)
        self.b = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Outputs:
        hidden = self.trunk(x)
        return Outputs(a=self.a(hidden), b=self.b(hidden))


class Cast(nn.Module):
    """Takes the input to bfloat16, as the weights are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x.to(torch.bfloat16))


class Bare(nn.Module):
    """A Parameter that no module of a known kind owns."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 8) / 3)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.mix) * self.scale).tanh()


class Adapted(nn.Module):
    """Inside the trunk, a norm and an adapter per task."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 8)
        self.norms = nn.ModuleDict({t: nn.LayerNorm(8) for t in ("a", "b")})
        self.adapters = nn.ModuleDict({t: nn.Linear(8, 8) for t in ("a", "b")})
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.lin(x)
        return {
            t: self.out(self.adapters[t](self.norms[t](hidden)).tanh()).tanh() for t in ("a", "b")
        }


class PerTask(nn.Module):
    """A trunk that gives every task its own features."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Adapted()
        self.heads = nn.ModuleDict({t: nn.Linear(8, 1) for t in ("a", "b")})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {task: self.heads[task](hidden) for task, hidden in self.trunk(x).items()}


class Read(nn.Module):
    """One layer's weight is read, and the layer never called."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(6, 8)
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x).tanh(), self.lin.weight, self.lin.bias).tanh()


class Checkpointed(nn.Module):
    """Its inner block runs again in every backward: BatchNorm and dropout with it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.block = nn.Sequential(
            nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x).tanh()
        return hidden + checkpoint(self.block, hidden, use_reentrant=False)


# The shelf.


def plain() -> Net:
    return Net(Plain(mlp(6, 8, 8), 8), squares("a", "b"), "trunk", Batches(16, 6))


def called_twice() -> Net:
    return Net(Plain(CalledTwice(), 6), squares("a", "b"), "trunk", Batches(16, 6))


def tied() -> Net:
    return Net(Plain(Tied(), 6), squares("a", "b"), "trunk", Batches(16, 6))


def tied_embedding() -> Net:
    losses = {"lm": next_token, "cls": Squares("cls")}
    shared = ["embed", "body"]
    return Net(LanguageModel(), losses, shared, Batches(8, 5, tokens=10), include=("embed",))


def frozen_trunk() -> Net:
    model = Plain(mlp(6, 8, 8), 8)
    model.trunk.requires_grad_(False)
    private = {"a": ("a.weight",), "b": ("b.weight",)}
    alone = ("trunk.0.weight", "trunk.2.weight")
    batches = Batches(16, 6)
    return Net(model, squares("a", "b"), "auto", batches, private=private, alone=alone)


def partly_frozen_trunk() -> Net:
    model = Plain(mlp(6, 8, 8), 8)
    model.trunk[0].requires_grad_(False)
    alone = ("trunk.0.weight",)
    return Net(model, squares("a", "b"), "trunk", Batches(16, 6), alone=alone)


def skipped_layer() -> Net:
    shared = ["early", "late"]
    private = {"a": ("a.weight",), "b": ("b.weight",), "c": ("c.weight",)}
    return Net(Skipping(), squares("a", "b", "c"), shared, Batches(16, 6), private=private)


def conv_bn() -> Net:
    trunk = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Net(Plain(trunk, 4), squares("a", "b"), "trunk", Batches(8, 2, 6, 6))


def dead_relu() -> Net:
    model = Plain(Dead(), 8)
    warns = "The autograd graph leads to 'trunk.side.weight'"
    alone = ("trunk.side.weight",)
    return Net(model, squares("a", "b"), "trunk", Batches(16, 6), warns=warns, alone=alone)


def dead_units() -> Net:
    """Two thirds of a layer is dead: more ties at zero than there are weights to prune."""
    trunk = mlp(6, 12, 8)
    nn.init.constant_(trunk[0].bias[:8], -1e3)
    return Net(Plain(trunk, 8), squares("a", "b"), "trunk", Batches(16, 6))


def attention() -> Net:
    return Net(Plain(Attention(), 8), squares("a", "b"), "trunk", Batches(6, 4, 8))


def attention_with_other_keys() -> Net:
    trunk = Attention(kdim=6, vdim=4)
    return Net(Plain(trunk, 8), squares("a", "b"), "trunk", Batches(6, 4, 8))


def transformer_encoder() -> Net:
    return Net(Plain(Encoder(), 8), squares("a", "b"), "trunk", Batches(6, 4, 8))


def lstm() -> Net:
    trunk = Recurrent(nn.LSTM, num_layers=2)
    return Net(Plain(trunk, 4), squares("a", "b"), "trunk", Batches(6, 3, 5))


def gru_both_ways() -> Net:
    trunk = Recurrent(nn.GRU, bidirectional=True)
    return Net(Plain(trunk, 8), squares("a", "b"), "trunk", Batches(6, 3, 5))


def gru_cell() -> Net:
    return Net(Plain(Cell(), 4), squares("a", "b"), "trunk", Batches(6, 3, 5))


def odd_layers() -> Net:
    return Net(Plain(Odd(), 4), squares("a", "b"), "trunk", Batches(8, 2, 4))


def single_weight() -> Net:
    trunk = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 1), nn.Linear(1, 6), nn.Tanh())
    return Net(Plain(trunk, 6), squares("a", "b"), "trunk", Batches(16, 4))


def twelve_tasks() -> Net:
    tasks = tuple(f"t{i}" for i in range(12))
    return Net(Heads(mlp(6, 8, 8), 8, tasks), squares(*tasks), "trunk", Batches(16, 6))


def heads_in_a_dict() -> Net:
    model = Heads(mlp(6, 8, 8), 8, ("a", "b"))
    private = {"a": ("heads.a.weight",), "b": ("heads.b.weight",)}
    return Net(model, squares("a", "b"), "auto", Batches(16, 6), private=private)


def dataclass_outputs() -> Net:
    return Net(Structured(), squares("a", "b"), "trunk", Batches(16, 6))


def channels_last() -> Net:
    net = conv_bn()
    net.model.to(memory_format=torch.channels_last)
    net.make_batch = Batches(8, 2, 6, 6, channels_last=True)
    return net


def bfloat16() -> Net:
    model = Cast(Plain(mlp(6, 8, 8), 8)).to(torch.bfloat16)
    return Net(model, squares("a", "b"), "inner.trunk", Batches(16, 6))


def stacked_losses() -> Net:
    tasks = ("a", "b", "c")
    losses = {task: OneOfAStack(tasks, i, in_place=False) for i, task in enumerate(tasks)}
    private = {task: (f"heads.{task}.weight",) for task in tasks}
    model = Heads(mlp(6, 8, 8), 8, tasks)
    return Net(model, losses, "trunk", Batches(16, 6), private=private)


def loss_vector() -> Net:
    net = stacked_losses()
    net.task_losses = {t: OneOfAStack(("a", "b", "c"), i, True) for i, t in enumerate("abc")}
    return net


def bare_parameter() -> Net:
    include = ("trunk.mix",)
    return Net(Plain(Bare(), 8), squares("a", "b"), "trunk", Batches(16, 6), include=include)


def adapters() -> Net:
    private = {t: (f"trunk.adapters.{t}.weight", f"heads.{t}.weight") for t in ("a", "b")}
    return Net(PerTask(), squares("a", "b"), "trunk", Batches(16, 6), private=private)


def read_not_called() -> Net:
    return Net(Plain(Read(), 8), squares("a", "b"), "trunk", Batches(16, 6))


def checkpointed() -> Net:
    return Net(Plain(Checkpointed(), 8), squares("a", "b"), "trunk", Batches(16, 6))


SHELF: dict[str, Callable[[], Net]] = {
    factory.__name__: factory
    for factory in (
        plain,
        called_twice,
        tied,
        tied_embedding,
        frozen_trunk,
        partly_frozen_trunk,
        skipped_layer,
        conv_bn,
        dead_relu,
        dead_units,
        attention,
        attention_with_other_keys,
        transformer_encoder,
        lstm,
        gru_both_ways,
        gru_cell,
        odd_layers,
        single_weight,
        twelve_tasks,
        heads_in_a_dict,
        dataclass_outputs,
        channels_last,
        bfloat16,
        stacked_losses,
        loss_vector,
        bare_parameter,
        adapters,
        read_not_called,
        checkpointed,
    )
}


TYPICAL = ("tied_embedding", "read_not_called", "attention", "lstm", "conv_bn")
"""The nets of the fast loop: a tied weight, one that is read and not called, two kinds of module
that keep weights in ways of their own, and buffers."""


def each(cases: Iterable[Any] = SHELF) -> list[Any]:
    """Parameters out of names of nets, or of cases that begin with one: the others are slow."""
    found = []
    for case in cases:
        values = (case,) if isinstance(case, str) else case
        marks = () if values[0] in TYPICAL else pytest.mark.slow
        found.append(pytest.param(*values, marks=marks))
    return found


EVERY_NET = pytest.mark.parametrize("name", each())


def build(name: str, device: torch.device | str = "cpu", seed: int = 0) -> Net:
    """A net from the shelf: always the same for the same seed."""
    torch.manual_seed(seed)
    net = SHELF[name]()
    net.model.to(device)
    make_batch = net.make_batch
    net.make_batch = lambda i: {key: value.to(device) for key, value in make_batch(i).items()}
    return net


# Methods and the loop.


def static() -> Vote:
    return Vote(sparsity=0.7)


def gradual() -> Vote:
    return Vote(sparsity=0.7, schedule=Cubic(begin=2, end=8, every=2))


def dynamic() -> Vote:
    return recipes.disparse_dynamic(0.7, every=2, end=8)


METHODS: dict[str, Callable[[], Vote]] = {"static": static, "gradual": gradual, "dynamic": dynamic}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(model), lr=0.02, momentum=0.9, weight_decay=0.05)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=0.02, weight_decay=0.1)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class Run:
    """A net in training with a pruner; the same arguments give the same run, bit for bit."""

    def __init__(
        self,
        net: Net,
        method: Any = None,
        backend: str = "prune",
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
        *,
        given: bool = True,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        singly: bool = False,
        **options: Any,
    ) -> None:
        self.net = net
        self.model = net.model
        self.named = aliases(net.model)
        self.optimizer = optimizer(net.model)
        self.pruner = MultitaskPruner(
            net.model,
            net.task_losses,
            net.shared_modules,
            method=static() if method is None else method,
            include=net.include,
            backend=backend,
            optimizer=self.optimizer if given else None,
            **options,
        )
        self.call = net.model if wrap is None else wrap(net.model)
        self.singly = singly
        self.at = 0

    def forward(self, at: int | None = None) -> tuple[Any, Batch]:
        """Outputs and batch of a step; randomness is that of the step."""
        at = self.at if at is None else at
        batch = self.net.make_batch(at)
        torch.manual_seed(1000 + at)
        return self.call(batch["x"]), batch

    def losses(self) -> dict[str, Tensor]:
        outputs, batch = self.forward()
        names = list(self.net.task_losses)
        tasks = [names[self.at % len(names)]] if self.singly else None
        return self.pruner.observe(outputs, batch, tasks=tasks)

    def step(self) -> bool:
        """One training step; whether masks changed."""
        self.optimizer.zero_grad()
        losses = self.losses()
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        self.at += 1
        with expected(self.net):
            return self.pruner.step()

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            self.step()
        return self


def start(name: str, method: str, backend: str, device: torch.device) -> Run:
    """The run of a net by a method that others may look at too (`tests.runs`)."""
    return Run(build(name, device), METHODS[method](), backend)


@contextmanager
def expected(net: Net) -> Iterator[None]:
    """Let the one warning pass that this net is due."""
    with warnings.catch_warnings() if net.warns else nullcontext():
        if net.warns:
            warnings.filterwarnings("ignore", message=re.escape(net.warns))
        yield


def weigh_in(outputs: Any) -> list[Tensor]:
    """All output tensors of a model, in order."""
    if is_dataclass(outputs):
        outputs = vars(outputs)
    return list(outputs.values())


def evaluate(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Outputs in eval mode, with grad enabled: fused inference kernels round differently."""
    was = model.training
    model.eval()
    outputs = [out.detach() for out in weigh_in(model(batch["x"]))]
    model.train(was)
    return outputs


def read(model: nn.Module, name: str) -> Tensor:
    """A weight as anyone sees it who reads the attribute."""
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)


def weights(run: Run) -> dict[str, Tensor]:
    """All parameters and buffers but masks, under their names before pruning."""
    state = run.model.state_dict()
    masks = {n for n in state if n.endswith("_mask") and n.removesuffix("_mask") + "_orig" in state}
    return {n.removesuffix("_orig"): v.clone() for n, v in state.items() if n not in masks}


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter's first name, all its names."""
    by_id: dict[int, list[str]] = OrderedDict()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in by_id.values()}


def zeros(masks: Mapping[str, Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


def size(masks: Mapping[str, Tensor]) -> int:
    return sum(mask.numel() for mask in masks.values())


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
