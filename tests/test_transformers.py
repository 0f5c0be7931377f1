"""The callback for `transformers.Trainer`, on a BERT of two small layers."""

import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mtprune import Cubic, MultitaskPruner, Vote, recipes
from mtprune.integrations import transformers as integration
from tests.checkpoints import observed, steps
from tests.nets import same, zeros

STEPS = 8


transformers = pytest.importorskip("transformers", exc_type=ImportError)
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


class Multitask(nn.Module):
    """One encoder and two heads; every batch has the labels of both tasks, or names one task."""

    def __init__(self):
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleDict({task: nn.Linear(16, 3) for task in ("a", "b")})

    def forward(self, input_ids, task=None, a=None, b=None):
        hidden = self.bert(input_ids=input_ids).last_hidden_state.mean(1)
        labels = {"a": a, "b": b}
        losses = {
            name: nn.functional.cross_entropy(head(hidden), labels[name])
            for name, head in self.heads.items()
            if name == task or task is None
        }
        return {"loss": sum(losses.values()), "losses": losses}


class Rows(torch.utils.data.Dataset):
    def __init__(self, n=32):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(50, (n, 8), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        ids = self.ids[i]
        return {"input_ids": ids, "a": ids[0] % 3, "b": ids[1] % 3}


def start(tmp_path, method, backend="prune", *, options=None, given=False, **arguments):
    torch.manual_seed(0)
    model = Multitask()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = MultitaskPruner(
        model,
        ["a", "b"],
        model.bert.encoder,
        method=method,
        backend=backend,
        optimizer=optimizer if given else None,
    )
    callback = integration.PruningCallback(pruner, **(options or {}))
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            **arguments,
        },
    )
    trainer = transformers.Trainer(
        model=model,
        args=settings,
        train_dataset=Rows(),
        eval_dataset=Rows(8),
        callbacks=[callback],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )
    return trainer, pruner, model


GRADUAL = Vote(0.75, schedule=Cubic(begin=1, end=6, every=2))
METHODS = {"vote": GRADUAL, "movement": recipes.movement(0.75, STEPS)}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@EVERY_METHOD
@pytest.mark.parametrize("given", [True, False], ids=["optimizer given", "steps counted"])
def test_a_trainer_prunes(method, given, backend, tmp_path):
    trainer, pruner, model = start(tmp_path, method, backend, given=given)
    trainer.train()
    assert steps(pruner) == STEPS
    assert pruner.report().step == (6 if method is GRADUAL else STEPS)
    total = sum(mask.numel() for mask in pruner.masks.values())
    assert zeros(pruner.masks) == round(0.75 * total)
    assert {"bert.encoder.layer.0.attention.self.query.weight", "heads.a.weight"} <= set(
        pruner.masks
    )
    assert not model._forward_hooks
    pruner.finalize()
    for name, mask in pruner.masks.items():
        assert bool((model.get_parameter(name)[~mask] == 0).all())


def test_one_step_is_one_step_of_the_optimizer_and_evaluation_is_none(tmp_path):
    trainer, pruner, _ = start(
        tmp_path,
        METHODS["movement"],
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        prediction_loss_only=True,
    )
    trainer.train()
    assert steps(pruner) == STEPS
    assert pruner.report().observations == {"a": 2 * STEPS, "b": 2 * STEPS}


def without_callback(trainer):
    handler = trainer.callback_handler
    handler.callbacks = [
        c for c in handler.callbacks if not isinstance(c, integration.PruningCallback)
    ]


@pytest.mark.parametrize("plan", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}])
def test_scoring_leaves_training_as_it_is(plan, tmp_path):
    found = []
    for pruned in (True, False):
        trainer, pruner, model = start(tmp_path, Vote(0.0, schedule=Cubic(1, 6, 1)), **plan)
        if not pruned:
            without_callback(trainer)
        trainer.train()
        pruner.finalize()
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert same(*found)


def test_the_log_has_the_losses_of_the_tasks_and_the_sparsity(tmp_path):
    trainer, pruner, _ = start(tmp_path, GRADUAL, logging_steps=2)
    seen = []

    def remember(module, inputs, kwargs, outputs):
        seen.append({task: float(loss.detach()) for task, loss in outputs["losses"].items()})

    trainer.model.register_forward_hook(remember, with_kwargs=True)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [2, 4, 6, 8]
    for place, log in enumerate(logs):
        mean = sum(losses["a"] for losses in seen[2 * place : 2 * place + 2]) / 2
        assert log["mtprune/loss/a"] == pytest.approx(mean, rel=1e-6)
    assert logs[-1]["mtprune/sparsity/all"] == pruner.sparsity
    assert {"mtprune/sparsity/task/a", "mtprune/wanted/task/b", "mtprune/weight/b"} <= set(logs[-1])


def scaled(trainer, scale=2.0**10):
    """fp16=True asks for a GPU; what scales and skips works without one."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


def test_with_a_scaler_training_is_what_it_is_without_a_pruner(tmp_path):
    found, masks = [], []
    for pruned in (True, False):
        method = Vote(0.0, schedule=Cubic(1, 6, 1))
        trainer, pruner, model = start(tmp_path, method, max_grad_norm=0.0)
        if not pruned:
            without_callback(trainer)
        scaled(trainer).train()
        pruner.finalize()
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert same(*found)
    for scale in (True, False):
        trainer, pruner, _ = start(tmp_path, GRADUAL, max_grad_norm=0.0)
        (scaled(trainer) if scale else trainer).train()
        masks.append(pruner.masks)
    assert zeros(masks[0]) > 0
    assert same(*masks)  # a power of two changes no bit


@pytest.mark.parametrize("given", [True, False], ids=["optimizer given", "steps counted"])
def test_a_step_that_the_scaler_skips_is_none(given, tmp_path):
    trainer, pruner, model = start(tmp_path, METHODS["movement"], given=given, max_grad_norm=0.0)
    calls = iter(range(100))

    def spoil(grad):
        return grad * float("inf") if next(calls) % 3 == 1 else grad

    model.heads["a"].bias.register_hook(spoil)  # no weight, so that scores see nothing of it
    scaled(trainer).train()
    assert steps(pruner) == STEPS - 3


def test_the_best_model_comes_with_its_masks(backend, tmp_path):
    def run(best):
        trainer, pruner, model = start(
            tmp_path / f"{best}",
            GRADUAL,
            backend,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="chosen",
            greater_is_better=True,
        )
        evaluate = trainer.evaluate

        def chosen(*args, **options):
            metrics = evaluate(*args, **options)
            metrics["eval_chosen"] = float(trainer.state.global_step == best)
            return metrics

        trainer.evaluate = chosen
        trainer.prediction_step = lambda model, inputs, *_, **__: (
            model(**inputs)["loss"].detach(),
            None,
            None,
        )
        return trainer, pruner, model

    trainer, pruner, model = run(STEPS)
    trainer.train()
    assert pruner.sparsity == pytest.approx(0.75, abs=1e-3)
    trainer, pruner, model = run(4)
    with pytest.warns(UserWarning, match=r"checkpoint-4, is of a time when .*% were pruned; in"):
        trainer.train()
    saved = torch.load(tmp_path / "4" / "checkpoint-4" / integration.FILE, weights_only=True)
    assert pruner.state_dict()["digest"] == saved["digest"]
    assert 0 < pruner.sparsity < 0.75
    pruner.finalize()
    for name, mask in pruner.masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any()
        assert weight[mask].count_nonzero() == mask.sum()


def test_a_loader_for_each_task(tmp_path):
    def collate(rows):
        batch = torch.utils.data.default_collate(rows)
        task = "ab"[int(batch["input_ids"].sum()) % 2]
        return {"input_ids": batch["input_ids"], "task": task, task: batch[task]}

    options = {"losses": lambda outputs, inputs: {inputs["task"]: outputs["loss"]}}
    trainer, pruner, _ = start(tmp_path, recipes.movement(0.75, 12), options=options, max_steps=12)
    trainer.data_collator = collate
    trainer.train()
    seen = pruner.report().observations
    assert sum(seen.values()) == 12
    assert min(seen.values()) > 0
    assert pruner.sparsity == pytest.approx(0.75, abs=1e-3)


@EVERY_METHOD
def test_a_resumed_run_is_the_uninterrupted_run(method, backend, tmp_path):
    often = {"save_strategy": "steps", "save_steps": 4}
    trainer, straight, one = start(tmp_path, method, backend, **often)
    trainer.train()
    trainer, pruner, other = start(tmp_path, method, backend, **often)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(straight.masks, pruner.masks)
    assert same(one.state_dict(), other.state_dict())
    assert straight.report() == pruner.report()


def test_a_checkpoint_without_the_pruner_says_where_to_look(tmp_path):
    often = {"save_strategy": "steps", "save_steps": 4}
    trainer, first, _ = start(tmp_path, GRADUAL, **often)
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    (folder / integration.FILE).rename(tmp_path / integration.FILE)
    trainer, _, _ = start(tmp_path, GRADUAL)
    with pytest.raises(RuntimeError, match=r"no mtprune.pt in .*checkpoint-4.*resume_from="):
        trainer.train(resume_from_checkpoint=str(folder))
    trainer, pruner, _ = start(tmp_path, GRADUAL, options={"resume_from": tmp_path})
    trainer.train(resume_from_checkpoint=str(folder))
    assert same(pruner.masks, first.masks)


DAMAGES = {
    "empty": (
        lambda data: b"",
        r"mtprune\.pt' is not a file that torch\.save wrote, or is damaged",
    ),
    "short": (lambda data: data[:-99], r"mtprune\.pt' is not a file that torch\.save wrote, or is"),
    "another's": (lambda data: saved({"step": 1}), r"This is not a state_dict of a Multitask"),
}


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_of_the_pruner_is_refused(damage, tmp_path):
    often = {"save_strategy": "steps", "save_steps": 4}
    trainer, _, _ = start(tmp_path, GRADUAL, **often)
    trainer.train()
    change, message = DAMAGES[damage]
    path = tmp_path / "checkpoint-4" / integration.FILE
    path.write_bytes(change(path.read_bytes()))
    assert [name.name for name in path.parent.iterdir() if name.suffix == ".part"] == []
    trainer, pruner, _ = start(tmp_path, GRADUAL)
    before = pruner.state_dict()
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(path.parent))
    assert pruner.state_dict()["digest"] == before["digest"]


def test_losses_may_be_attributes():
    class Attributes(Multitask):
        def forward(self, *args, **options):
            return SimpleNamespace(**super().forward(*args, **options))

    model = Attributes()
    callback = integration.PruningCallback(MultitaskPruner(model, ["a", "b"]))
    begin(callback, model)
    model(**torch.utils.data.default_collate([Rows()[0], Rows()[1]]))
    assert observed(callback.pruner) == {"a": 1, "b": 1}


def test_an_output_without_losses_names_what_it_has(tmp_path):
    trainer, _, _ = start(tmp_path, GRADUAL, options={"losses": "task_losses"})
    with pytest.raises(RuntimeError, match=r"no 'task_losses'. It has \['loss', 'losses'\]"):
        trainer.train()


def pruned():
    model = Multitask()
    pruner = MultitaskPruner(model, ["a", "b"])
    return model, integration.PruningCallback(pruner)


def begin(callback, model, n_gpu=1):
    args = SimpleNamespace(n_gpu=n_gpu)
    callback.on_train_begin(args, SimpleNamespace(global_step=0), None, model=model)


def test_what_cannot_be_is_refused_before_training():
    model, callback = pruned()
    with pytest.raises(ValueError, match="Start it with torchrun"):
        begin(callback, model, n_gpu=2)
    with pytest.raises(ValueError, match="no part of the Multitask this Trainer trains"):
        begin(callback, Multitask())
    with pytest.raises(TypeError, match="`pruner` must be a MultitaskPruner"):
        integration.PruningCallback(model)
    with pytest.raises(TypeError, match="`losses` must be a name in the model's output"):
        integration.PruningCallback(callback.pruner, losses=3)
    assert not model._forward_hooks
    begin(callback, model)
    begin(callback, model)  # after a run that broke off
    assert len(model._forward_hooks) == 1
