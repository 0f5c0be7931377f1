"""PEFT in Trainer: adapters are trained and pruned, the frozen weights beside them are not."""

import pytest
import torch
from torch import nn

from mtprune import Cubic, MultitaskPruner, Vote
from mtprune.integrations.transformers import PruningCallback
from tests.nets import same, zeros

transformers = pytest.importorskip("transformers", exc_type=ImportError)
pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # its own

STEPS = 8


class Multitask(transformers.PreTrainedModel):
    """An encoder that adapters are put into, and two heads."""

    config_class = transformers.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleDict({task: nn.Linear(16, 3) for task in "ab"})
        self.post_init()

    def forward(self, input_ids, a, b):
        hidden = self.bert(input_ids=input_ids).last_hidden_state.mean(1)
        losses = {
            task: nn.functional.cross_entropy(self.heads[task](hidden), labels)
            for task, labels in {"a": a, "b": b}.items()
        }
        return {"loss": sum(losses.values()), "losses": losses}


def rows():
    ids = torch.randint(50, (32, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "a": row[0] % 3, "b": row[1] % 3} for row in ids]


def start(tmp_path, method, backend="inplace", pruned=True, **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    lora = peft.LoraConfig(
        r=4,
        target_modules=["query", "value"],
        modules_to_save=["heads.a", "heads.b"],
        lora_dropout=0.1,
    )
    model = peft.get_peft_model(Multitask(config), lora)
    pruner = None
    if pruned:
        asked = {"method": method, "backend": backend, "include": "*lora_*"}
        pruner = MultitaskPruner(model, ["a", "b"], **asked)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", **options},
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(),
        callbacks=[PruningCallback(pruner)] if pruned else [],
    )
    return trainer, pruner, model


def test_scoring_leaves_training_as_it_is(tmp_path):
    found = []
    for pruned in (False, True):
        method = Vote(0.0, schedule=Cubic(2, 6, 1))
        trainer, pruner, model = start(tmp_path, method, pruned=pruned)
        trainer.train()
        if pruner is not None:
            assert pruner.report().step == 6
            pruner.finalize()
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert same(*found)


def test_adapters_are_pruned_and_what_is_frozen_is_not(tmp_path):
    trainer, pruner, model = start(tmp_path, Vote(0.5, schedule=Cubic(2, 6, 2)))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer.train()
    masks = pruner.masks
    assert zeros(masks) == round(0.5 * sum(mask.numel() for mask in masks.values()))
    pruner.finalize()
    assert all("lora_" in name or "modules_to_save" in name for name in masks)
    assert same(frozen, {n: p for n, p in model.named_parameters() if n in frozen})
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path):
    method = Vote(0.5, schedule=Cubic(2, 7, 2))
    often = {"save_strategy": "steps", "save_steps": 4}
    trainer, straight, one = start(tmp_path, method, **often)
    trainer.train()
    trainer, pruner, other = start(tmp_path, method, **often)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(straight.masks, pruner.masks)
    assert same(one.state_dict(), other.state_dict())


def test_names_that_peft_would_not_find_again_are_refused(tmp_path):
    trainer, _, _ = start(tmp_path, Vote(0.5, schedule=Cubic(2, 7, 2)), "prune")
    with pytest.raises(ValueError, match=r"PEFT saves .* Build the pruner with backend='inplace'"):
        trainer.train()
