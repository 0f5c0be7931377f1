"""Mistakes: each is named, in the user's own words, and nothing has changed when it is."""

import copy
import math
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from mtprune import (
    Cubic,
    Erk,
    Floor,
    Linear,
    MultitaskPruner,
    OneShot,
    PerTaskKeep,
    Regrow,
    Vote,
    recipes,
    votes,
)
from mtprune.saliency import taylor


class Net(nn.Module):
    """A trunk of two layers with a norm between them, and one head per task."""

    def __init__(self, tasks=("a", "b")):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()
        )
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in tasks})

    def forward(self, x):
        hidden = self.trunk(x)
        return {task: head(hidden) for task, head in self.heads.items()}


LOSSES = {
    "a": lambda out, x: (out["a"] - x.sum(1, keepdim=True)).square().mean(),
    "b": lambda out, x: (out["b"] - x.prod(1, keepdim=True)).square().mean(),
}


def make_x(device, size=16):
    return torch.randn(size, 4, device=device)


def contents(tensor):
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return "lazy"
    return tensor.detach().reshape(-1).tolist() if isinstance(tensor, torch.Tensor) else None


def fingerprint(model):
    """All there is to a model: modules, keys, hooks, parameters by identity, and values."""
    found = []
    for path, module in model.named_modules():
        hooks = [
            len(getattr(module, kind, ()))
            for kind in (
                "_forward_hooks",
                "_forward_pre_hooks",
                "_backward_hooks",
                "_load_state_dict_pre_hooks",
                "_state_dict_hooks",
            )
        ]
        tensors = [
            (name, id(p), p is not None and p.requires_grad, contents(p))
            for name, p in module._parameters.items()
        ]
        buffers = [(name, contents(b)) for name, b in module._buffers.items()]
        grads = [contents(p.grad) for p in module._parameters.values() if p is not None]
        keys = () if isinstance(module, torch.jit.ScriptModule) else tuple(module.__dict__)
        found.append((path, id(module), type(module), hooks, tensors, buffers, grads, keys))
    return repr(found)


def everything(model, pruner):
    """A model, and all that a pruner says of itself."""
    masks = {name: mask.tolist() for name, mask in pruner.masks.items()}
    return fingerprint(model), masks, pruner.sparsity, pruner.report()


class unchanged:  # noqa: N801
    """Inside, something goes wrong; afterwards, everything is as before."""

    def __init__(self, model, pruner):
        self.model, self.pruner = model, pruner

    def __enter__(self):
        self.before = everything(self.model, self.pruner)

    def __exit__(self, kind, *_):
        if kind is None:
            assert everything(self.model, self.pruner) == self.before


class Run:
    """A model, a pruner and the loop around them."""

    def __init__(self, device, method=None, losses=None, shared="trunk", model=None, **options):
        torch.manual_seed(0)
        self.device = device
        self.model = (Net() if model is None else model).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.pruner = MultitaskPruner(
            self.model,
            LOSSES if losses is None else losses,
            shared,
            method=Vote(0.5, min_keep=1) if method is None else method,
            **options,
        )

    def observe(self, x=None, **options):
        x = make_x(self.device) if x is None else x
        return self.pruner.observe(self.model(x), x, **options)

    def refuses(self, error, match, call, *arguments, **options):
        with unchanged(self.model, self.pruner), pytest.raises(error, match=match) as caught:
            call(*arguments, **options)
        return str(caught.value)

    def goes_on(self):
        """A training step with a mask update, which is well."""
        self.observe()
        assert self.pruner.step() is True
        assert self.pruner.sparsity == self.pruner.report().sparsity == 0.5


# Construction. After each error, a correct pruner can be built on the same model.


def refuses(model, error, match, *arguments, optimizer=None, **options):
    before = fingerprint(model)
    hooks = len(optimizer._optimizer_step_post_hooks) if hasattr(optimizer, "step") else 0
    with pytest.raises(error, match=match) as caught:
        MultitaskPruner(model, *arguments, optimizer=optimizer, **options)
    assert fingerprint(model) == before
    if hasattr(optimizer, "step"):
        assert len(optimizer._optimizer_step_post_hooks) == hooks
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (90, ValueError, "`sparsity` must be in [0, 1). Got 90. Did you mean 0.9?"),
        (99.5, ValueError, "`sparsity` must be in [0, 1). Got 99.5. Did you mean 0.995?"),
        (-0.1, ValueError, "`sparsity` must be in [0, 1). Got -0.1."),
        (1.0, ValueError, "`sparsity` must be in [0, 1). Got 1.0."),
        (1, ValueError, "`sparsity` must be in [0, 1). Got 1."),
        (100, ValueError, "`sparsity` must be in [0, 1). Got 100."),
        (math.nan, ValueError, "`sparsity` must be in [0, 1). Got nan."),
        (math.inf, ValueError, "`sparsity` must be in [0, 1). Got inf."),
        ("90%", TypeError, "`sparsity` must be a number in [0, 1). Got '90%'."),
        (None, TypeError, "`sparsity` must be a number in [0, 1). Got None."),
        (True, TypeError, "`sparsity` must be a number in [0, 1). Got True."),
    ],
    ids=repr,
)
def test_a_sparsity_that_is_no_share_of_zeros(value, error, message):
    with pytest.raises(error) as caught:
        Vote(value)
    assert str(caught.value) == message
    with pytest.raises(error):
        recipes.disparse_static(value)


METHODS = {
    "0 observations": (
        lambda: Vote(0.5, observations=0),
        ValueError,
        r"`observations` must be at least 1, or 'auto'\. Got 0\.",
    ),
    "observations in words": (
        lambda: Vote(0.5, observations="many"),
        ValueError,
        r"`observations` must be at least 1, or 'auto'\. Got 'many'\.",
    ),
    "half an observation": (
        lambda: Vote(0.5, observations=1.5),
        ValueError,
        r"`observations` must be at least 1, or 'auto'\. Got 1\.5\.",
    ),
    "True observations": (
        lambda: Vote(0.5, observations=True),
        ValueError,
        r"`observations` must be at least 1, or 'auto'\. Got True\.",
    ),
    "saliency of one argument": (
        lambda: Vote(0.5, saliency=lambda weight: weight),
        ValueError,
        r"`saliency` must be a function of \(weight, grad\)\. Got <lambda>\(weight\)",
    ),
    "saliency of three arguments": (
        lambda: Vote(0.5, saliency=lambda weight, grad, hessian: weight),
        ValueError,
        r"`saliency` must be a function of \(weight, grad\)\. Got <lambda>",
    ),
    "granularity by name": (
        lambda: Vote(0.5, granularity="row"),
        TypeError,
        r"`granularity` must be .*Got 'row'\.",
    ),
    "priority of a list": (
        lambda: Vote(0.5, priority=["a"]),
        TypeError,
        r"`priority` must be .*Got \['a'\]\.",
    ),
    "saliency by name": (
        lambda: Vote(0.5, saliency="taylor"),
        TypeError,
        r"`saliency` must be a function\. Got 'taylor'\.",
    ),
    "vote by name": (
        lambda: Vote(0.5, vote="unanimous"),
        TypeError,
        r"`vote` must be a function\. Got 'unanimous'\.",
    ),
    "schedule that is a number": (
        lambda: Vote(0.5, schedule=100),
        TypeError,
        r"`schedule` must be a schedule such as OneShot\(\) or Cubic\(...\)\. Got 100\.",
    ),
    "cubic that ends before it begins": (
        lambda: Cubic(begin=10, end=5, every=1),
        ValueError,
        r"The schedule ends before it begins: `begin` is 10, `end` is 5\. .*steps counted from 0",
    ),
    "linear that ends before it begins": (
        lambda: Linear(begin=10, end=5, every=1),
        ValueError,
        r"The schedule ends before it begins: `begin` is 10, `end` is 5\.",
    ),
    "schedule every 0 steps": (
        lambda: Cubic(begin=0, end=5, every=0),
        ValueError,
        r"`every` must be a whole number, at least 1\. Got 0\.",
    ),
    "one-shot before the start": (
        lambda: OneShot(-1),
        ValueError,
        r"`at` must be a whole number, at least 0\. Got -1\.",
    ),
    "one-shot at half a step": (
        lambda: OneShot(0.5),
        ValueError,
        r"`at` must be a whole number, at least 0\. Got 0\.5\.",
    ),
    "regrow without an end": (
        lambda: Regrow(every=10, end=0),
        ValueError,
        r"`end` must be a whole number, at least 1\. Got 0\.",
    ),
    "regrow of nothing": (
        lambda: Regrow(every=10, end=20, fraction=0.0),
        ValueError,
        r"`fraction` must be in \(0, 1\]\. Got 0\.0\.",
    ),
    "regrow under a global allocation": (
        lambda: Vote(0.5, schedule=Regrow(every=2, end=4), allocation="global"),
        ValueError,
        r"Regrow keeps the number of weights of every layer.*allocation='erk' or 'uniform'",
    ),
    "regrow of a per-task keep": (
        lambda: Vote(PerTaskKeep(0.1), schedule=Regrow(every=2, end=4)),
        ValueError,
        r"Regrow keeps the number of weights of every layer.*with a number for `sparsity`",
    ),
    "unknown allocation": (
        lambda: Vote(0.5, allocation="ekr"),
        ValueError,
        r"`allocation` must be one of \('floor', 'global', 'uniform', 'erk'\)\. Got 'ekr'\.",
    ),
    "allocation that is a number": (
        lambda: Vote(0.5, allocation=0.5),
        TypeError,
        r"`allocation` must be one of .*Erk\(\.\.\.\), Floor\(\.\.\.\) or a mapping.*Got 0\.5\.",
    ),
    "allocation mapping with a percentage": (
        lambda: Vote(0.5, allocation={"shared": 90}),
        ValueError,
        r"`allocation\['shared'\]` must be in \[0, 1\)\. Got 90\. Did you mean 0\.9\?",
    ),
    "floor above 1": (
        lambda: Floor(fraction=1.5),
        ValueError,
        r"`fraction` must be in \[0, 1\]\. Got 1\.5\.",
    ),
    "floor of a floor": (
        lambda: Floor(of="floor"),
        ValueError,
        r"`of` must be 'erk', 'uniform' or Erk\(power\)\. Got 'floor'\.",
    ),
    "negative power": (
        lambda: Erk(-1.0),
        ValueError,
        r"`power` must be at least 0\. Got -1\.0\.",
    ),
    "priority of nothing": (
        lambda: Vote(0.5, priority={"a": 0}),
        ValueError,
        r"`priority` of task 'a' must be positive\. Got 0\.",
    ),
    "priority that is not a number": (
        lambda: Vote(0.5, priority={"a": math.nan}),
        ValueError,
        r"`priority` of task 'a' must be positive\. Got nan\.",
    ),
    "negative min_keep": (
        lambda: Vote(0.5, min_keep=-1),
        ValueError,
        r"`min_keep` must be a whole number\. Got -1\.",
    ),
    "per-task keep of a percentage": (
        lambda: PerTaskKeep(10),
        ValueError,
        r"`ratio` must be in \(0, 1\]\. Got 10\.",
    ),
    "at least no task": (
        lambda: votes.at_least(0),
        ValueError,
        r"`m` must be a whole number of tasks, at least 1\. Got 0\.",
    ),
}


@pytest.mark.parametrize("mistake", METHODS)
def test_a_method_is_validated_when_it_is_built(mistake):
    build, error, match = METHODS[mistake]
    with pytest.raises(error, match=match):
        build()


def no_change(model):
    pass


def freeze_trunk(model):
    model.trunk.requires_grad_(False)


CONSTRUCTION = {
    "no task": (
        {"task_losses": {}},
        ValueError,
        r"`task_losses` is empty: name at least one task, e\.g\. \{\"seg\": seg_loss\}",
    ),
    "no task name": ({"task_losses": []}, ValueError, r"`task_losses` is empty"),
    "a loss that is no function": (
        {"task_losses": {"a": LOSSES["a"], "b": 0.5}},
        TypeError,
        r"Loss of task 'b' must be a function of \(outputs, batch\)\. Got 0\.5\.",
    ),
    "task_losses a string": (
        {"task_losses": "seg"},
        TypeError,
        r"`task_losses` maps names to functions, .* or lists names\. Got 'seg'\.",
    ),
    "task_losses a function": (
        {"task_losses": print},
        TypeError,
        r"`task_losses` maps names to functions, .*Got <built-in function print>",
    ),
    "a task twice": (
        {"task_losses": ["a", "b", "a"]},
        ValueError,
        r"`task_losses` names a task twice: \['a', 'b', 'a'\]",
    ),
    "a task that is a number": (
        {"task_losses": {1: LOSSES["a"]}},
        TypeError,
        r"A task's name must be a non-empty string\. Got 1\.",
    ),
    "a task without a name": (
        {"task_losses": ["a", ""]},
        TypeError,
        r"A task's name must be a non-empty string\. Got ''\.",
    ),
    "shared module of another model": (
        {"shared_modules": [nn.Linear(4, 8)]},
        ValueError,
        r"`shared_modules` holds a Linear that is not in the model\. Pass a module of the model "
        r"itself, not of a copy",
    ),
    "shared parameter of another model": (
        {"shared_modules": nn.Parameter(torch.ones(8, 4))},
        ValueError,
        r"`shared_modules` holds a tensor of shape \(8, 4\) that is not a parameter of the model",
    ),
    "shared module with nothing prunable": (
        {"shared_modules": lambda model: model.trunk[1]},
        ValueError,
        r"Shared 'trunk\.1' has nothing prunable\. Prunable: Linear, .*MultiheadAttention, .*\. "
        r"Found parameters of LayerNorm\.",
    ),
    "shared module without parameters": (
        {"shared_modules": "trunk.2"},
        ValueError,
        r"Shared 'trunk\.2' has nothing prunable\. .*It has no parameters\.",
    ),
    "one shared module of several with nothing prunable": (
        {"shared_modules": ["trunk.0", "trunk.1"]},
        ValueError,
        r"Shared 'trunk\.1' has nothing prunable",
    ),
    "excluded from what it is to be shared": (
        {"shared_modules": "trunk", "exclude": "trunk"},
        ValueError,
        r"Shared 'trunk' has nothing prunable",
    ),
    "nothing shared": (
        {"shared_modules": []},
        ValueError,
        r"`shared_modules` is empty\. Name the modules that tasks share, or use 'auto'",
    ),
    "shared modules that are numbers": (
        {"shared_modules": [3]},
        TypeError,
        r"Modules are named by module, parameter, name or glob.*Got 3\.",
    ),
    "overlapping components": (
        {"shared_modules": {"low": "trunk", "high": "trunk.3"}},
        ValueError,
        r"Layer 'trunk\.3\.weight' is in components 'low' and 'high'\. A layer belongs to one",
    ),
    "component without a name": (
        {"shared_modules": {0: "trunk"}},
        TypeError,
        r"A component's name must be a string\. Got 0\.",
    ),
    "component named like a task": (
        {"shared_modules": {"a": "trunk"}},
        ValueError,
        r"Component 'a' has the name of a task\. .*call the shared one something else",
    ),
    "misspelt name": (
        {"shared_modules": "trnk"},
        ValueError,
        r"`shared_modules` 'trnk' matches no module or parameter of the model\. "
        r"Did you mean 'trunk'\?",
    ),
    "glob that matches nothing": (
        {"shared_modules": ["trunc.*"]},
        ValueError,
        r"`shared_modules` 'trunc\.\*' matches no module or parameter.* Did you mean 'trunk\.\d",
    ),
    "name that is like nothing": (
        {"shared_modules": "zzz"},
        ValueError,
        r"`shared_modules` 'zzz' matches no module or parameter of the model\.$",
    ),
    "exclude that matches nothing": (
        {"exclude": "head.a"},
        ValueError,
        r"`exclude` 'head\.a' matches no module or parameter.*Did you mean 'heads\.a'\?",
    ),
    "include of another model's embedding": (
        {"include": [nn.Embedding(3, 3)]},
        ValueError,
        r"`include` holds a Embedding that is not in the model|"
        r"`include` holds an Embedding that is not in the model",
    ),
    "include by number": ({"include": 7}, TypeError, r"Modules are named by module.*Got 7\."),
    "unknown task in priority": (
        {"method": Vote(0.5, priority={"sge": 2.0})},
        ValueError,
        r"`priority` names \['sge'\]\. Known here: \['a', 'b'\]\.",
    ),
    "unknown component in allocation": (
        {"method": Vote(0.5, allocation={"backbone": 0.5})},
        ValueError,
        r"`allocation` names \['backbone'\]\. Known here: \['shared', 'a', 'b', 'undeclared'\]\.",
    ),
    "method that is a number": (
        {"method": 0.9},
        TypeError,
        r"`method` must be .*Got 0\.9",
    ),
    "recipe that was not called": (
        {"method": recipes.magnitude},
        TypeError,
        r"`method` must be .*Got <function magnitude",
    ),
    "unknown back-end": (
        {"backend": "in-place"},
        ValueError,
        r"`backend` must be one of \('prune', 'inplace'\)\. Got 'in-place'\.",
    ),
    "regrow without optimizer": (
        {"method": recipes.rigl(0.5, every=2, end=4)},
        ValueError,
        r"Regrowth resets the optimizer's state.*Pass optimizer=\.\.\. to the pruner",
    ),
    "optimizer of another model": (
        {"optimizer": torch.optim.SGD(nn.Linear(4, 4).parameters(), lr=0.1)},
        ValueError,
        r"`optimizer` trains none of the prunable weights of this model\. Build it on the param",
    ),
    "optimizer that is none": (
        {"optimizer": "sgd"},
        TypeError,
        r"`optimizer` must be a torch\.optim\.Optimizer\. Got 'sgd'\.",
    ),
}


@pytest.mark.parametrize("mistake", CONSTRUCTION)
def test_a_mistake_in_construction_is_refused_and_leaves_nothing_behind(mistake, device):
    arguments, error, match = CONSTRUCTION[mistake]
    model = Net().to(device)
    options = {"task_losses": LOSSES, "shared_modules": "trunk", "method": Vote(0.5)}
    refuses(model, error, match, **(options | arguments))
    Run(device, model=model).goes_on()


@pytest.mark.parametrize("model", [None, "net", Net], ids=["None", "a string", "a class"])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module\. Got "):
        MultitaskPruner(model, LOSSES)


def test_a_model_with_nothing_prunable_is_refused():
    refuses(nn.Sequential(nn.LayerNorm(4)), ValueError, "nothing prunable", LOSSES)


def test_a_frozen_shared_module_is_refused_until_it_is_thawed(device):
    model = Net().to(device)
    model.trunk.requires_grad_(False)
    refuses(
        model,
        ValueError,
        r"Shared 'trunk' has nothing prunable: all its weights are frozen "
        r"\(requires_grad=False\)\. Unfreeze it or leave it out of `shared_modules`",
        LOSSES,
        "trunk",
    )
    model.trunk.requires_grad_(True)
    Run(device, model=model).goes_on()


def test_a_second_pruner_on_the_same_model_is_refused_until_finalize(backend, device):
    run = Run(device, backend=backend)
    run.goes_on()
    match = r"already has a live pruner\. Call its finalize\(\) before building another"
    for model in (run.model, torch.compile(run.model, backend="eager"), nn.DataParallel(run.model)):
        run.refuses(ValueError, match, MultitaskPruner, model, LOSSES)
    run.pruner.finalize()
    Run(device, model=run.model, backend=backend).goes_on()


def test_pruners_of_different_models_do_not_meet(device):
    runs = [Run(device), Run(device)]
    for run in runs:
        run.goes_on()


# Parts that cannot be pruned: refused by name; with exclude= the rest is pruned.


def quantized():
    with warnings.catch_warnings():
        # Deprecated in torch, and still what people's models hold.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, ")
        layer = torch.ao.nn.quantized.dynamic.Linear(4, 4)
        # It is born with whatever was in memory.
        layer.set_weight_bias(
            torch.quantize_per_tensor(torch.randn(4, 4), 0.05, 0, torch.qint8), None
        )
        return layer


def scripted():
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r".*torch\.jit\.script.* is (deprecated|not supp)"
        )
        return torch.jit.script(nn.Linear(4, 4))


def traced():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.trace.* is (deprecated|not supp)")
        return torch.jit.trace(nn.Linear(4, 4), torch.randn(2, 4))


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*weight_norm.* is deprecated")
        return nn.utils.weight_norm(nn.Linear(4, 4))


def lazy():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules are a new feature")
        return nn.LazyLinear(4)


UNPRUNABLE = {
    "quantized": (quantized, r"'odd' \(Linear\) is quantized and cannot be pruned\. .*exclude"),
    "scripted": (scripted, r"'odd' \(RecursiveScriptModule\) is scripted and cannot be pruned\."),
    "traced": (traced, r"'odd' \(TopLevelTracedModule\) is scripted and cannot be pruned\."),
    "lazy": (lazy, r"'odd' \(LazyLinear\) is lazy: its 'weight' has no shape yet\. Run one forw"),
    "weight_norm, old": (
        old_weight_norm,
        r"'odd' \(Linear\) computes its 'weight' from other parameters \(weight_norm.*"
        r"exclude=\['odd'\]",
    ),
    "weight_norm, parametrization": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        r"'odd' \(ParametrizedLinear\) computes its 'weight' from other parameters \(weight_norm.*"
        r"exclude=\['odd'\]",
    ),
    "spectral_norm, old": (
        lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
        r"'odd' \(Linear\) computes its 'weight' from other parameters \(.*spectral_norm.*"
        r"exclude=\['odd'\]",
    ),
    "spectral_norm, parametrization": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        r"'odd' \(ParametrizedLinear\) computes its 'weight' from other parameters \(.*spectral_n.*"
        r"exclude=\['odd'\]",
    ),
    "pruned by torch": (
        lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
        r"'odd' \(Linear\) is pruned already: it has 'weight_orig'\. Call "
        r"torch\.nn\.utils\.prune\.remove\(module, 'weight'\) first\.",
    ),
}


class WithOddPart(Net):
    """Whose head `a` has a part that cannot be pruned."""

    def __init__(self, odd):
        super().__init__()
        self.odd = odd

    def forward(self, x):
        return super().forward(self.odd(x))


@pytest.mark.parametrize("kind", UNPRUNABLE)
def test_a_part_that_cannot_be_pruned_is_refused_by_name(kind):
    make, match = UNPRUNABLE[kind]
    refuses(WithOddPart(make()), ValueError, match, LOSSES, "trunk")


@pytest.mark.parametrize("form", ["name", "module", "glob", "list"])
@pytest.mark.parametrize("kind", UNPRUNABLE)
def test_exclude_lets_the_rest_be_pruned(kind, form):
    model = WithOddPart(UNPRUNABLE[kind][0]())
    spec = {"name": "odd", "module": model.odd, "glob": "od*", "list": [model.odd]}[form]
    pruner = MultitaskPruner(model, LOSSES, "trunk", method=Vote(0.5), exclude=spec)
    assert list(pruner.masks) == [
        *("trunk.0.weight", "trunk.3.weight", "heads.a.weight", "heads.b.weight")
    ]
    if form == "name":
        x = torch.randn(8, 4)
        pruner.observe(model(x), x)
        assert pruner.step() is True
        assert pruner.sparsity == 0.5
    pruner.finalize()


def test_a_model_that_is_itself_of_such_a_kind_is_named_the_model():
    with pytest.raises(ValueError, match=r"The model \(LazyLinear\) is lazy"):
        MultitaskPruner(lazy(), ["a"])


# Losses.


class WithLoss:
    """A run one of whose losses can go wrong for a while."""

    def __new__(cls, device, **options):
        wrong = {}

        def loss(out, x):
            return wrong["b"](out, x) if "b" in wrong else LOSSES["b"](out, x)

        run = Run(device, losses={"a": LOSSES["a"], "b": loss}, **options)
        run.wrong = wrong
        return run


@pytest.mark.parametrize("when", ["due", "not due"])
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            lambda out, x: (out["b"] - 1).square(),
            ValueError,
            "Loss of task 'b' must be a scalar. Got shape (16, 1). Reduce it, e.g. with .mean().",
        ),
        (
            lambda out, x: [out["b"].mean(), out["b"].squeeze()],
            ValueError,
            "Loss of task 'b' must be a scalar. Got shape (16,). Reduce it, e.g. with .mean().",
        ),
        (
            lambda out, x: None,
            TypeError,
            "Loss of task 'b' must be a scalar tensor. Got NoneType None.",
        ),
        (
            lambda out, x: "1",
            TypeError,
            "Loss of task 'b' must be a scalar tensor. Got str '1'.",
        ),
    ],
    ids=["not a scalar", "a part not a scalar", "None", "a string"],
)
def test_a_loss_must_be_a_scalar_tensor(loss, error, message, when, device):
    run = WithLoss(device, method=Vote(0.5, schedule=OneShot(0 if when == "due" else 50)))
    run.wrong["b"] = loss
    run.refuses(error, f"^{re.escape(message)}$", run.observe)
    if when == "due":
        run.wrong.clear()
        run.goes_on()


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            lambda out, x: LOSSES["b"]({"b": out["b"].detach()}, x),
            ValueError,
            "Loss of task 'b' carries no gradient. Was it computed from detached outputs, or under "
            "torch.no_grad()?",
        ),
        (
            lambda out, x: 0.0,
            ValueError,
            "Loss of task 'b' carries no gradient. Was it computed from detached outputs, or under "
            "torch.no_grad()?",
        ),
        (
            lambda out, x: torch.ones((), device="meta", requires_grad=True) * 2,
            ValueError,
            "Loss of task 'b' is on meta, the model on {device}. Compute the loss where the model "
            "is.",
        ),
    ],
    ids=["detached", "a number", "on another device"],
)
def test_a_loss_that_could_not_be_observed_is_refused_when_it_is_needed(
    loss, error, message, device
):
    run = WithLoss(device)
    run.wrong["b"] = loss
    where = run.model.trunk[0].weight.device
    run.refuses(error, f"^{re.escape(message.format(device=where))}$", run.observe)
    run.wrong.clear()
    run.goes_on()
    run.wrong["b"] = loss
    run.observe()  # nothing is due any more, and what the losses are is the user's own affair


@pytest.mark.parametrize(
    ("factor", "which"),
    [(math.nan, "loss"), (math.inf, "loss"), (-math.inf, "loss"), (0.0, "saliency")],
    ids=["nan", "inf", "-inf", "finite loss, gradient not"],
)
def test_what_is_not_finite_is_named_when_the_update_is_due(factor, which, backend, device):
    run = WithLoss(device, backend=backend)
    if which == "loss":
        run.wrong["b"] = lambda out, x: out["b"].mean() * factor
        match = r"^Loss of task 'b' is not finite\. .*masks are unchanged"
    else:
        run.wrong["b"] = lambda out, x: (out["b"] * 0).square().sum().sqrt()
        match = (
            r"^Saliency of task 'b' is not finite in "
            r"('trunk\.0\.weight' \(32 of 32\)|'trunk\.3\.weight' \(64 of 64\)|"
            r"'heads\.b\.weight' \(8 of 8\))\. Check the loss; masks are unchanged"
        )
    with unchanged(run.model, run.pruner):
        run.observe()
    run.refuses(RuntimeError, match, run.pruner.step)
    run.wrong.clear()
    run.goes_on()


def test_a_saliency_of_a_few_weights_that_is_not_finite_is_counted(device):
    run = WithLoss(device)
    run.wrong["b"] = lambda out, x: (
        (run.model.heads["b"].weight[0, :3] * 0).sqrt().sum() + (LOSSES["b"](out, x))
    )
    run.observe()
    run.refuses(RuntimeError, r"of task 'b' .* in 'heads\.b\.weight' \(3 of 8\)", run.pruner.step)


def test_a_later_update_that_is_not_finite_leaves_the_masks_of_the_one_before(backend, device):
    schedule = Linear(begin=1, end=5, every=2)
    run = WithLoss(device, method=Vote(0.5, schedule=schedule), backend=backend)
    for _ in range(3):
        run.observe()
        run.pruner.step()
    assert run.pruner.sparsity == 0.25
    run.pruner.step()
    run.wrong["b"] = lambda out, x: out["b"].mean() * math.nan
    run.observe()
    run.refuses(RuntimeError, "Loss of task 'b' is not finite", run.pruner.step)
    run.wrong.clear()
    run.goes_on()


def test_joint_saliency_that_is_not_finite_is_that_of_the_summed_losses(device):
    run = WithLoss(device, method=recipes.snip(0.5))
    run.wrong["b"] = lambda out, x: (out["b"] * 0).square().sum().sqrt()
    run.observe()
    match = r"^Saliency of the summed losses is not finite in '(trunk|heads\.b)\..*weight' \(\d+ of"
    run.refuses(RuntimeError, match, run.pruner.step)
    run.wrong.clear()
    run.goes_on()


def test_prune_names_a_loss_that_is_not_finite(device):
    run = WithLoss(device)
    run.wrong["b"] = lambda out, x: out["b"].mean() * math.nan
    match = "Loss of task 'b' is not finite"
    run.refuses(RuntimeError, match, run.pruner.prune, [make_x(device)], progress=False)
    run.wrong.clear()
    assert run.pruner.prune([make_x(device)], progress=False).sparsity == 0.5


# The order of calls.


def test_a_due_step_before_any_observe(backend, device):
    run = Run(device, backend=backend)
    match = (
        r"^Step 0 is due but nothing has been observed\. Call pruner\.observe\(outputs, batch\) "
        r"after the forward pass, before pruner\.step\(\)\. A loss counts if it carries a "
        r"gradient: hand it over before \.item\(\) or \.detach\(\)\.$"
    )
    run.refuses(RuntimeError, match, run.pruner.step)
    run.goes_on()


def test_a_step_before_any_observe_is_no_matter_until_one_is_due(device):
    run = Run(device, method=Vote(0.5, schedule=OneShot(3)))
    assert [run.pruner.step() for _ in range(2)] == [False, False]
    run.refuses(RuntimeError, "Step 3 is due but nothing has been observed", run.pruner.step)


def test_observe_under_no_grad_is_no_observation(device):
    run = Run(device)
    with torch.no_grad():
        run.observe()
    run.refuses(RuntimeError, "Step 0 is due but nothing has been observed", run.pruner.step)


def test_a_task_that_is_never_observed_is_named_when_the_next_update_arrives(device):
    run = Run(device, method=Vote(0.5, schedule=Cubic(begin=2, end=10, every=3)))
    for _ in range(4):
        run.observe(tasks=["a"])
        assert run.pruner.step() is False
    run.observe(tasks=["a"])
    match = (
        r"^Step 5 is due but task 'b' has not been observed since step 0\. "
        r"Call pruner\.observe\(\.\.\., tasks=\['b'\]\)\.$"
    )
    run.refuses(RuntimeError, match, run.pruner.step)
    run.observe(tasks=["b"])
    assert run.pruner.step() is True


def test_a_task_that_is_observed_no_longer_is_named_with_the_update_it_was_last_in(device):
    run = Run(device, method=Vote(0.5, schedule=Linear(begin=2, end=8, every=2)))
    for _ in range(4):
        run.observe()
        run.pruner.step()
    for _ in range(3):
        run.observe(tasks=["a"])
        assert run.pruner.step() is False
    message = run.refuses(RuntimeError, "task 'b' has not been observed", run.pruner.step)
    assert "since step 4" in message


def test_a_task_that_is_never_observed_is_named_after_a_thousand_steps(device):
    run = Run(device, method=Vote(0.5, schedule=OneShot(5)))
    for _ in range(8):
        run.observe(tasks=["a"])
        assert run.pruner.step() is False
    assert not any(run.pruner.step() for _ in range(1004 - 8))
    match = r"^Step 5 is due but task 'b' has not been observed since step 0\. .*tasks=\['b'\]"
    run.refuses(RuntimeError, match, run.pruner.step)
    run.observe(tasks=["b"])
    assert run.pruner.step() is True


def test_all_tasks_that_are_never_observed_are_named(device):
    losses = LOSSES | {"c": lambda out, x: out["a"].mean(), "d": lambda out, x: out["b"].mean()}
    schedule = Linear(begin=1, end=2, every=1)
    run = Run(device, losses=losses, method=Vote(0.5, schedule=schedule))
    run.observe(tasks=["a", "d"])
    run.pruner.step()
    message = run.refuses(RuntimeError, "'b', 'c'", run.pruner.step)
    assert "tasks=['b', 'c']" in message


def test_observe_after_backward_says_to_call_it_before(device):
    run = Run(device)
    x = make_x(device)
    out = run.model(x)
    losses = {task: loss(out, x) for task, loss in LOSSES.items()}
    sum(losses.values()).backward()
    run.model.zero_grad()
    match = r"Call observe\(\) before backward\(\)"
    run.refuses(RuntimeError, match, run.pruner.observe_losses, losses)
    run.goes_on()


def test_observe_after_the_optimizer_step_says_to_call_it_before(device):
    run = Run(device)
    x = make_x(device)
    out = run.model(x)
    sum(loss(run.model(x), x) for loss in LOSSES.values()).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    match = r"Call observe\(\) before optimizer\.step\(\): the weights have changed"
    run.refuses(RuntimeError, match, run.pruner.observe, out, x)
    run.goes_on()


def test_an_observation_that_failed_half_way_leaves_no_trace(device):
    # Here the trunk alone has moved on, so that the sweep has scored the heads when it fails.
    method = Vote(0.5, allocation="global")
    run, other = Run(device, method=method), Run(device, method=method)
    x = make_x(device)
    out = run.model(x)
    with torch.no_grad():
        for each in (run.model, other.model):
            each.trunk[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"before optimizer\.step\(\)"):
        run.pruner.observe(out, x * 100)
    for each in (run, other):
        each.observe(x)
        assert each.pruner.step() is True
    masks = other.pruner.masks
    assert all(torch.equal(mask, masks[name]) for name, mask in run.pruner.masks.items())


def test_an_observation_whose_second_task_failed_leaves_no_trace(device):
    method = Vote(0.5, allocation="global")
    run, other = Run(device, method=method), Run(device, method=method)
    x, y = make_x(device), make_x(device)
    losses = {task: loss(run.model(y), y) for task, loss in LOSSES.items()}
    losses["b"].backward()
    run.model.zero_grad()
    run.refuses(RuntimeError, "before backward", run.pruner.observe_losses, losses)
    for each in (run, other):
        each.observe(x)
        assert each.pruner.step() is True
    masks = other.pruner.masks
    assert all(torch.equal(mask, masks[name]) for name, mask in run.pruner.masks.items())
    assert run.pruner.report() == other.pruner.report()


def test_a_refused_observation_does_not_move_the_window_of_later_updates(device, monkeypatch):
    sweeps = []
    real = torch.autograd.grad

    def counting(loss, *args, **options):
        sweeps.append(loss)
        return real(loss, *args, **options)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    run = WithLoss(device, method=Vote(0.5, schedule=Linear(begin=4, end=12, every=4)))
    made = []
    for step in range(1, 13):
        if step == 4:
            run.wrong["b"] = lambda out, x: out["b"].detach().mean()
            run.refuses(ValueError, "carries no gradient", run.observe)
            run.wrong.clear()
        before = len(sweeps)
        run.observe()
        made.append(len(sweeps) - before)
        run.pruner.step()
    assert made == [0, 0, 0, 2] * 3


class Reentrant(Net):
    """Whose trunk is checkpointed the old way, with or without a layer before it."""

    def __init__(self, stem):
        super().__init__()
        self.stem = nn.Linear(4, 4) if stem else nn.Identity()

    def forward(self, x):
        hidden = checkpoint(self.trunk, self.stem(x), use_reentrant=True)
        return {task: head(hidden) for task, head in self.heads.items()}


@pytest.mark.parametrize("stem", [True, False], ids=["after a layer", "from the input on"])
@pytest.mark.parametrize("shared", ["trunk", "auto"])
def test_reentrant_checkpointing_is_refused_with_the_way_out(shared, stem, device):
    run = Run(device, model=Reentrant(stem), shared=shared)

    def attempt():
        run.observe(make_x(device).requires_grad_())
        run.pruner.step()

    match = r"Reentrant activation checkpointing cannot be observed\. Use .*use_reentrant=False"
    run.refuses(RuntimeError, match, attempt)


# Who uses what.


BOTH_CAUSES = r"(?s)detached.*zero-initialised"


def test_a_shared_module_that_no_task_reaches_because_it_is_detached(backend, device):
    class Detached(Net):
        def forward(self, x):
            hidden = self.trunk(x).detach()
            return {task: head(hidden) for task, head in self.heads.items()}

    run = Run(device, model=Detached(), backend=backend)
    run.observe()
    message = run.refuses(
        RuntimeError,
        r"^Shared 'trunk' is used by no task: no loss has a graph that leads there",
        run.pruner.step,
    )
    assert re.search(BOTH_CAUSES, message)
    run.pruner.finalize()
    MultitaskPruner(run.model, LOSSES, method=Vote(0.5)).finalize()


def test_a_shared_module_that_no_task_reaches_because_the_heads_are_zero(backend, device):
    model = Net()
    for head in model.heads.values():
        nn.init.zeros_(head.weight)
    run = Run(device, model=model, backend=backend)
    run.observe()
    assert run.pruner.step() is False  # the graph says otherwise: look again
    run.observe()
    message = run.refuses(
        RuntimeError, r"^Shared 'trunk' is used by no task: every gradient", run.pruner.step
    )
    assert re.search(BOTH_CAUSES, message)
    for head in model.heads.values():
        nn.init.ones_(head.weight)
    run.goes_on()


@pytest.mark.parametrize("cause", ["detached", "zero"])
def test_a_shared_module_that_one_task_alone_reaches(cause, backend, device):
    class Half(Net):
        def forward(self, x):
            hidden = self.trunk(x)
            other = hidden.detach() if cause == "detached" else hidden
            return {"a": self.heads["a"](hidden), "b": self.heads["b"](other)}

    model = Half()
    if cause == "zero":
        nn.init.zeros_(model.heads["b"].weight)
    run = Run(device, model=model, shared=[model.trunk], backend=backend)
    run.observe()
    if cause == "zero":
        assert run.pruner.step() is False
        run.observe()
    message = run.refuses(
        RuntimeError, r"^Shared 'trunk' is used by task 'a' alone: no other task", run.pruner.step
    )
    assert re.search(BOTH_CAUSES, message)
    assert ("graphs lead there" in message) == (cause == "zero")
    assert "leave it out of `shared_modules`" in message


def test_prune_says_the_same_of_a_shared_module_that_is_not(device):
    model = Net()
    for head in model.heads.values():
        nn.init.zeros_(head.weight)
    run = Run(device, model=model)
    batches = [make_x(device) for _ in range(3)]
    match = r"^Shared 'trunk' is used by no task"
    run.refuses(RuntimeError, match, run.pruner.prune, batches, progress=False)


def test_each_declared_module_answers_for_itself(device):
    model = Net()
    model.spare = nn.Linear(4, 4)
    run = Run(device, model=model, shared=["trunk", "spare"])
    run.observe()
    run.refuses(RuntimeError, r"^Shared 'spare' is used by no task", run.pruner.step)


def test_losses_that_reach_nothing_prunable(device):
    model = Net()
    for module in (model.trunk[0], model.trunk[3], *model.heads.values()):
        module.weight.requires_grad_(False)
    run = Run(device, model=model, shared="auto")
    run.observe()
    match = r"^No task has a non-zero gradient in any prunable layer\. .*detached.*frozen or zero"
    run.refuses(RuntimeError, match, run.pruner.step)


# What the method makes of it.


@pytest.mark.parametrize(
    ("allocation", "hint"),
    [
        ({"shared": 0.5, "a": 0.5, "b": 0.5}, r"sparsity=0\.5\."),
        ({"shared": 0.99}, r"Name fewer components"),
    ],
    ids=["other sums", "too little left"],
)
def test_an_allocation_that_contradicts_the_sparsity(allocation, hint, device):
    sparsity = 0.9 if len(allocation) == 3 else 0.1
    run = Run(device, method=Vote(sparsity, allocation=allocation))
    run.observe()
    message = run.refuses(ValueError, r"^`allocation` keeps \d+ of 112 weights", run.pruner.step)
    assert re.search(hint, message)
    assert f"{112 - round(sparsity * 112)} kept)" in message


def test_an_allocation_of_a_component_that_turned_out_not_to_exist(device):
    run = Run(device, method=Vote(0.5, allocation={"undeclared": 0.5}))
    run.observe()
    match = (
        r"^`allocation` names components \['undeclared'\], which do not exist\. "
        r"Components: \['a', 'b', 'shared'\]\."
    )
    run.refuses(ValueError, match, run.pruner.step)


@pytest.mark.parametrize(
    ("saliency", "got"),
    [
        (lambda weight, grad: weight.sum(), r"\(\)"),
        (lambda weight, grad: (weight * grad).sum(1), r"\(1,\)"),
        (lambda weight, grad: 1.0, "float"),
        (lambda weight, grad: None, "NoneType"),
    ],
    ids=["a sum", "a row each", "a number", "nothing"],
)
def test_a_saliency_that_returns_another_shape(saliency, got, device):
    run = Run(device, method=Vote(0.5, saliency=saliency))
    match = (
        rf"^The saliency of 'heads\.a\.weight' must have the weight's shape \(1, 8\)\. Got {got}"
    )
    run.refuses(ValueError, match, run.observe)
    assert not any(p._backward_hooks for p in run.model.parameters())


def test_a_saliency_without_data_that_returns_another_shape(device):
    run = Run(device, method=Vote(0.5, saliency=lambda weight, grad=None: weight.abs().sum()))
    run.observe()
    match = r"The saliency of 'trunk\.0\.weight' must have the weight's shape"
    run.refuses(ValueError, match, run.pruner.step)


def test_a_saliency_without_data_that_is_not_finite(device):
    run = Run(device, method=Vote(0.5, saliency=lambda weight, grad=None: weight / (weight > 0)))
    with torch.no_grad():
        run.model.trunk[0].weight[0, :2] = 0
    run.observe()
    run.refuses(RuntimeError, r"not finite in 'trunk\.0\.weight'", run.pruner.step)


def nearly_equal(weight, grad):
    """Saliencies so close that all of them must be ranked exactly."""
    return 1 + 1e-3 * weight.abs()


@pytest.mark.parametrize("saliency", [taylor, nearly_equal])
@pytest.mark.parametrize(
    "vote",
    [lambda p: -p.amax(0), lambda p: 1 - p.mean(0), lambda p: (p - 0.5).abs().amax(0)],
    ids=["upside down", "mean upside down", "extremes"],
)
def test_a_vote_that_is_not_monotone(vote, saliency, device):
    run = Run(device, method=Vote(0.5, vote=vote, saliency=saliency))
    run.observe()
    match = r"^The vote is not one: .*A vote must be non-decreasing in every percentile\.$"
    run.refuses(ValueError, match, run.pruner.step)


@pytest.mark.parametrize(
    "vote", [lambda p: p, lambda p: p.max(0), lambda p: p.sum()], ids=["all", "a pair", "a sum"]
)
def test_a_vote_that_returns_something_else_than_one_worth_per_weight(vote, device):
    run = Run(device, method=Vote(0.5, vote=vote))
    run.observe()
    run.refuses((ValueError, TypeError), r"(?i)\bvote\b", run.pruner.step)


# Calls with wrong arguments.


def test_observe_with_tasks_that_do_not_exist(device):
    run = Run(device)
    match = r"^`tasks` names \['typo'\]\. Declared tasks: \['a', 'b'\]\.$"
    run.refuses(ValueError, match, run.observe, tasks=["typo"])
    run.refuses(ValueError, match, run.observe, tasks=["a", "typo"])
    run.refuses(ValueError, match, run.observe, tasks="typo")
    run.goes_on()


def test_observe_when_only_names_were_declared(device):
    run = Run(device, losses=["a", "b"])
    match = (
        r"^Task 'a' was declared without a loss function\. Hand its loss to observe_losses\(\), "
        r"or declare it as name -> function\.$"
    )
    run.refuses(RuntimeError, match, run.observe)
    run.refuses(RuntimeError, match, run.pruner.prune, [make_x(device)], progress=False)


@pytest.mark.parametrize(
    ("losses", "error", "match"),
    [
        (
            lambda a, b: [a],
            ValueError,
            r"^`losses` must hold one loss per task, in the order \['a', 'b'\]\. Got 1\.$",
        ),
        (
            lambda a, b: torch.stack([a, b, a]),
            ValueError,
            r"one loss per task, in the order \['a', 'b'\]\. Got 3\.$",
        ),
        (
            lambda a, b: {"total": a + b},
            ValueError,
            r"^`losses` has none of the declared tasks \['a', 'b'\]\. Got keys \['total'\]\.$",
        ),
        (
            lambda a, b: a + b,
            TypeError,
            r"^`losses` must be a mapping task -> loss, or a sequence or 1-D tensor in the order "
            r"\['a', 'b'\]\. Got a tensor of shape \(\)\.$",
        ),
        (
            lambda a, b: torch.stack([a, b]).reshape(1, 2),
            TypeError,
            r"Got a tensor of shape \(1, 2\)\.$",
        ),
        (lambda a, b: 3.0, TypeError, r"Got float 3\.0\.$"),
        (lambda a, b: None, TypeError, r"Got NoneType None\.$"),
        (
            lambda a, b: {"a": a, "b": b.expand(3)},
            ValueError,
            r"^Loss of task 'b' must be a scalar\. Got shape \(3,\)",
        ),
    ],
    ids=[
        "too few",
        "too many",
        "no declared key",
        "the sum",
        "a matrix",
        "a number",
        "nothing",
        "not scalar",
    ],
)
def test_observe_losses_with_what_are_not_the_losses(losses, error, match, device):
    run = Run(device)
    x = make_x(device)
    out = run.model(x)
    wrong = losses(*(loss(out, x) for loss in LOSSES.values()))
    run.refuses(error, match, run.pruner.observe_losses, wrong)
    run.goes_on()


def test_weigh_with_nothing_to_weigh(device):
    run = Run(device)
    run.refuses(ValueError, r"^None of the losses \[\] carries a gradient", run.pruner.weigh, {})
    constants = {"a": 0.0, "b": torch.ones(())}
    match = r"^None of the losses \['a', 'b'\] carries a gradient"
    run.refuses(ValueError, match, run.pruner.weigh, constants)


def test_prune_with_an_empty_loader(device):
    run = Run(device)
    match = r"^`batches` gave no observation of tasks \['a', 'b'\]\. Pass at least one batch\.$"
    run.refuses(RuntimeError, match, run.pruner.prune, [], progress=False)
    run.refuses(RuntimeError, match, run.pruner.prune, iter(()), progress=False)
    assert run.pruner.prune([make_x(device)], progress=False).sparsity == 0.5


def test_prune_with_regrow(device):
    model = Net().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = recipes.rigl(0.5, every=2, end=4)
    run = Run(device, model=model, method=method, optimizer=optimizer)
    match = r"^Regrow trains sparsely: call observe\(\) and step\(\) in a loop\.$"
    run.refuses(RuntimeError, match, run.pruner.prune, [make_x(device)], progress=False)


def test_calls_after_finalize(backend, device):
    run = Run(device, backend=backend)
    run.goes_on()
    state = run.pruner.state_dict()
    run.pruner.finalize()
    x = make_x(device)
    losses = {task: loss(run.model(x), x) for task, loss in LOSSES.items()}
    for call, arguments in {
        "observe": ({}, x),
        "observe_losses": (losses,),
        "step": (),
        "prune": ([x],),
        "load_state_dict": (state,),
    }.items():
        match = rf"^{call}\(\) was called after finalize\(\)\. Build a new MultitaskPruner to go on"
        run.refuses(RuntimeError, match, getattr(run.pruner, call), *arguments)
    Run(device, model=run.model, backend=backend).goes_on()


# Checkpoints of something else.


def checkpoint_of(device, model=None, losses=None, method=None, **options):
    run = Run(device, model=model, losses=losses, method=method, **options)
    run.observe()
    run.pruner.step()
    return run.pruner.state_dict()


CHECKPOINTS = {
    "other tasks": (
        lambda device: checkpoint_of(
            device, losses={"a": LOSSES["a"], "c": LOSSES["b"]}, shared="auto"
        ),
        r"of a pruner with other tasks: it has \['a', 'c'\], this one \['a', 'b'\]\.",
    ),
    "other shapes": (
        lambda device: checkpoint_of(device, model=other_shapes()),
        r"of a pruner with other shapes: it has \{'trunk\.0\.weight': \[9, 4\].*"
        r"this one \{'trunk\.0\.weight': \[8, 4\]",
    ),
    "other layers": (
        lambda device: checkpoint_of(device, exclude="heads.b"),
        r"of a pruner with other shapes: .*heads\.b\.weight",
    ),
    "another sparsity": (
        lambda device: checkpoint_of(device, method=Vote(0.6)),
        r"of a pruner with other method: it has Vote\(sparsity=0\.6, .*this one Vote\(spars",
    ),
    "another recipe": (
        lambda device: checkpoint_of(device, method=recipes.snip(0.5)),
        r"of a pruner with other method: it has Vote\(.*snip.*this one Vote\(.*taylor",
    ),
    "a model's": (lambda device: Net().state_dict(), r"not a state_dict of a MultitaskPruner"),
    "an optimizer's": (
        lambda device: torch.optim.SGD(Net().parameters(), lr=1.0).state_dict(),
        r"not a state_dict of a MultitaskPruner",
    ),
    "an empty one": (lambda device: {}, r"not a state_dict of a MultitaskPruner"),
    "a trainer's, which has tasks too": (
        lambda device: {"tasks": ["a", "b"], "epoch": 3},
        r"not a state_dict of a MultitaskPruner",
    ),
    "another version's": (
        lambda device: checkpoint_of(device) | {"version": 3},
        r"of a pruner with other version: it has 3, this one 2\.",
    ),
}


def other_shapes():
    model = Net()
    model.trunk[0] = nn.Linear(4, 9)
    model.trunk[1] = nn.LayerNorm(9)
    model.trunk[3] = nn.Linear(9, 8)
    return model


@pytest.mark.parametrize("wrong", CHECKPOINTS)
def test_a_checkpoint_of_something_else_changes_nothing(wrong, backend, device):
    make, match = CHECKPOINTS[wrong]
    state = make(device)
    run = Run(device, backend=backend)
    run.goes_on()
    before = run.pruner.state_dict()
    run.refuses(ValueError, match, run.pruner.load_state_dict, state)
    after = run.pruner.state_dict()
    assert list(after) == list(before)
    for key in ("step", "done", "facts", "singly"):
        assert after[key] == before[key]
    assert torch.equal(after["generator"], before["generator"])
    run.pruner.load_state_dict(copy.deepcopy(before))


def test_task_masks_are_not_in_a_checkpoint(device):
    state = checkpoint_of(device)
    run = Run(device)
    run.pruner.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Checkpoints do not hold task masks; .*next update"):
        _ = run.pruner.task_masks


# Errors that are not ours.


def test_an_error_of_the_users_loss_or_saliency_comes_through_as_it_is(device):
    def broken(weight, grad):
        raise KeyError("mine")

    run = Run(device, method=Vote(0.5, saliency=broken))
    run.refuses(KeyError, "mine", run.observe)
    assert not any(p._backward_hooks for p in run.model.parameters())
    other = WithLoss(device)
    other.wrong["b"] = lambda out, x: out["c"]
    other.refuses(KeyError, "c", other.observe)
    other.wrong.clear()
    other.goes_on()
