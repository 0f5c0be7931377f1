"""The callback for Lightning: automatic and manual optimization, and its own checkpoints."""

import pytest
import torch
from torch import nn

from mtprune import Cubic, MultitaskPruner, Vote, recipes
from tests.checkpoints import steps
from tests.integrations.clients import GRADUAL, SCORING, STEPS, Net, batches, losses, weights
from tests.nets import same, zeros

lightning = pytest.importorskip("lightning")

from mtprune.integrations.lightning import PruningCallback  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # its own, of workers


class Module(lightning.LightningModule):
    def __init__(self, manual=False):
        super().__init__()
        self.net = Net()
        self.automatic_optimization = not manual

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def training_step(self, batch, _):
        self.task_losses = losses(self.net(batch), batch)
        total = sum(self.task_losses.values())
        if self.automatic_optimization:
            return total
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for loss in self.task_losses.values():
            self.manual_backward(loss, retain_graph=True)
        optimizer.step()
        return None


def with_optimizer(method=GRADUAL, backend="prune"):
    return lambda module: MultitaskPruner(
        module,
        ["a", "b"],
        module.net.trunk,
        method=method,
        optimizer=module.optimizers(),
        backend=backend,
    )


def fit(module, callback, tmp_path, epochs=1, path=None, **options):
    settings = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    callbacks = [*([] if callback is None else [callback]), *options.pop("callbacks", ())]
    trainer = lightning.Trainer(**{**settings, **options}, callbacks=callbacks)
    torch.manual_seed(0)  # of dropout; building the net has drawn as well
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None), ckpt_path=path)
    return trainer


def module_of(seed=0, **options):
    torch.manual_seed(seed)
    return Module(**options)


PLANS = {
    "automatic": {},
    "manual": {"manual": True},
    "accumulated": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_scoring_leaves_training_as_it_is(plan, backend, tmp_path):
    options = dict(plan)
    manual = options.pop("manual", False)
    plain, scored = module_of(manual=manual), module_of(manual=manual)
    fit(plain, None, tmp_path, **options)
    callback = PruningCallback(with_optimizer(SCORING, backend))
    fit(scored, callback, tmp_path, **options)
    assert steps(callback.pruner) == STEPS // options.get("accumulate_grad_batches", 1)
    assert callback.pruner.report().step >= 6
    callback.pruner.finalize()
    assert same(weights(plain), weights(scored))


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_a_pruner_without_an_optimizer_counts_its_steps(manual, backend, tmp_path):
    module = module_of(manual=manual)
    pruner = MultitaskPruner(
        module.net, ["a", "b"], module.net.trunk, method=GRADUAL, backend=backend
    )
    plan = {} if manual else {"accumulate_grad_batches": 3}
    fit(module, PruningCallback(pruner), tmp_path, epochs=3, **plan)
    assert steps(pruner) == 3 * STEPS // plan.get("accumulate_grad_batches", 1)
    assert pruner.sparsity == pytest.approx(0.75, abs=5e-3)
    pruner.finalize()
    for name, mask in pruner.masks.items():
        assert not module.net.get_parameter(name)[~mask].any()


def in_configure_optimizers(method, backend):
    """The pruner is the module's own, and comes after the weights."""

    class Own(Module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            self.pruner = MultitaskPruner(
                self.net,
                ["a", "b"],
                self.net.trunk,
                method=method,
                optimizer=optimizer,
                backend=backend,
            )
            return optimizer

    return Own(), PruningCallback(lambda module: module.pruner)


def beforehand(method, backend):
    module = Module()
    pruner = MultitaskPruner(
        module.net, ["a", "b"], module.net.trunk, method=method, backend=backend
    )
    return module, PruningCallback(pruner)


def by_the_callback(method, backend):
    return Module(), PruningCallback(with_optimizer(method, backend))


MASKS = Vote(0.75, schedule=Cubic(1, 18, 3))
THRESHOLDS = recipes.adapmtl(0.75, 2 * STEPS)


@pytest.mark.parametrize(
    ("build", "method"),
    [
        (beforehand, MASKS),
        (in_configure_optimizers, MASKS),
        (by_the_callback, MASKS),
        (by_the_callback, THRESHOLDS),
    ],
    ids=["beforehand", "in configure_optimizers", "by the callback", "thresholds"],
)
def test_a_run_resumes_to_the_bit_wherever_the_pruner_is_built(build, method, backend, tmp_path):
    def start(seed):
        torch.manual_seed(seed)
        module, callback = build(method, backend)
        module.net.trunk[3].p = 0.0  # dropout draws anew after a stop
        return module, callback

    whole, straight = start(0)
    fit(whole, straight, tmp_path, 2)
    module, callback = start(0)
    keeper = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="first", save_last=True)
    fit(module, callback, tmp_path, 1, enable_checkpointing=True, callbacks=[keeper])
    resumed, other = start(1)
    fit(resumed, other, tmp_path, 2, tmp_path / "last.ckpt")
    assert steps(other.pruner) == 2 * STEPS
    assert zeros(other.pruner.masks) > zeros(callback.pruner.masks) > 0
    assert straight.pruner.report() == other.pruner.report()
    assert same(straight.pruner.masks, other.pruner.masks)
    assert same(whole.state_dict(), resumed.state_dict())


def test_a_module_without_a_pruner_loads_what_was_saved_while_pruning(backend, tmp_path):
    module, callback = by_the_callback(GRADUAL, backend)
    trainer = fit(module, callback, tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "last.ckpt")
    callback.pruner.finalize()
    assert same(weights(module), weights(loaded))
    assert int((loaded.net.trunk[0].weight == 0).sum()) > 48


def test_loggers_have_the_curves(tmp_path):
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    module, callback = by_the_callback(GRADUAL, "prune")
    fit(module, callback, tmp_path, logger=logger, log_every_n_steps=4)
    text = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    assert {"mtprune/loss/a", "mtprune/sparsity/task/b"} <= set(text[0].split(","))


def test_losses_may_come_from_a_function_or_be_observed_by_the_module(tmp_path):
    class Other(Module):
        def training_step(self, batch, _):
            found = losses(self.net(batch), batch)
            if self.callback._losses is None:
                self.callback.pruner.observe_losses(found)
            self.found = list(found.values())
            return sum(self.found)

    masks = []
    for where in (lambda module: module.found, None):
        torch.manual_seed(0)
        module = Other()
        module.callback = PruningCallback(with_optimizer(), where)
        fit(module, module.callback, tmp_path)
        masks.append(module.callback.pruner.masks)
    assert zeros(masks[0]) > 0
    assert same(*masks)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(TypeError, match="`pruner` must be a MultitaskPruner, or a function"):
        PruningCallback(3)
    with pytest.raises(TypeError, match="`losses` must be the name of an attribute"):
        PruningCallback(with_optimizer(), 3)
    with pytest.raises(RuntimeError, match=r"The pruner is built when trainer.fit\(\)"):
        PruningCallback(with_optimizer()).pruner  # noqa: B018
    with pytest.raises(TypeError, match=r"must return a MultitaskPruner\. Got None"):
        fit(Module(), PruningCallback(lambda module: None), tmp_path)
    stranger = MultitaskPruner(nn.Linear(2, 2), ["a"])
    with pytest.raises(ValueError, match="no part of the Module this Trainer fits"):
        fit(Module(), PruningCallback(stranger), tmp_path)
    with pytest.raises(RuntimeError, match=r"Module has no `other`. Set it in training_step"):
        fit(Module(), PruningCallback(with_optimizer(), "other"), tmp_path)
