"""accelerate: what it prepares is handed over as it is."""

import pytest
import torch

from tests.checkpoints import steps
from tests.integrations.clients import GRADUAL, SCORING, Net, batches, losses, pruner_of, weights
from tests.nets import same

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _alone():
    """accelerate remembers its settings for as long as a process lives."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    """A loop as accelerate's quick tour has it."""

    def __init__(self, tmp_path, method=GRADUAL, backend="prune", seed=0, **options):
        torch.manual_seed(seed)
        self.accelerator = accelerate.Accelerator(cpu=True, project_dir=str(tmp_path), **options)
        optimizer = torch.optim.AdamW((model := Net()).parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4)
        loader = torch.utils.data.DataLoader(batches(), batch_size=None)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        self.pruner = None
        if method is not None:
            self.pruner = pruner_of(self.model, self.optimizer, method, backend=backend)
            self.accelerator.register_for_checkpointing(self.pruner)

    def train(self, begin=0, end=12):
        torch.manual_seed(begin)
        for index, batch in enumerate(self.loader):
            if not begin <= index < end:
                continue
            with self.accelerator.accumulate(self.model):
                found = losses(self.model(batch), batch)
                if self.pruner is not None:
                    self.pruner.observe_losses(found)
                self.accelerator.backward(sum(found.values()))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                if self.pruner is not None:
                    self.pruner.step()
        return self


PLANS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "bf16": {"mixed_precision": "bf16"},
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_scoring_leaves_training_as_it_is(plan, tmp_path, backend):
    plain = Run(tmp_path, None, **plan).train()
    scored = Run(tmp_path, SCORING, backend, **plan).train()
    assert scored.pruner.report().step == (6 if plan.get("gradient_accumulation_steps") else 9)
    scored.pruner.finalize()
    assert same(weights(plain.model), weights(scored.model))


def test_steps_are_those_of_the_optimizer(tmp_path):
    run = Run(tmp_path, gradient_accumulation_steps=3).train()
    assert steps(run.pruner) == 4


def test_a_registered_pruner_is_saved_and_loaded(tmp_path, backend):
    whole = Run(tmp_path / "whole", backend=backend).train(0, 5).train(5)
    first = Run(tmp_path, backend=backend).train(0, 5)
    first.accelerator.save_state(str(tmp_path / "state"))
    second = Run(tmp_path, backend=backend, seed=1)
    second.accelerator.load_state(str(tmp_path / "state"))
    second.train(5)
    assert second.pruner.sparsity == whole.pruner.sparsity == pytest.approx(0.75, abs=5e-3)
    assert same(whole.model.state_dict(), second.model.state_dict())
    assert same(whole.pruner.masks, second.pruner.masks)


def test_a_step_that_the_scaler_skips_is_none(tmp_path):
    """Its fp16 asks for a GPU; its optimizer takes a scaler without one."""
    run, scaler = Run(tmp_path, None), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(run.optimizer.optimizer, scaler=scaler)
    pruner = pruner_of(run.model, optimizer)
    for index, batch in enumerate(batches()[:6]):
        found = losses(run.model(batch), batch)
        if index % 2:
            found["a"] = found["a"] * torch.tensor(float("inf"))
        pruner.observe_losses(found, scaler=scaler)
        scaler.scale(sum(found.values())).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == bool(index % 2)
        pruner.step()
        optimizer.zero_grad()
    assert steps(pruner) == 3
    assert pruner.report().step == 3
