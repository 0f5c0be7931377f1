"""The trainer of sentence-transformers: a loss module for each data set, one of them a batch."""

import pytest
import torch

from mtprune import Cubic, MultitaskPruner, Vote
from mtprune.integrations.transformers import FILE, PruningCallback
from tests.checkpoints import steps
from tests.nets import same

transformers = pytest.importorskip("transformers", exc_type=ImportError)
sentences = pytest.importorskip("sentence_transformers", exc_type=ImportError)
datasets = pytest.importorskip("datasets")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # its own

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps"]
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of two small layers, and the words it knows."""
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (path / "vocab.txt").write_text("\n".join(vocabulary))
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(path)
    transformers.BertTokenizerFast(vocab_file=str(path / "vocab.txt")).save_pretrained(path)
    return str(path)


def start(folder, tmp_path, method, pruned=True, **options):
    torch.manual_seed(0)
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer import modules as models

    encoder = models.Transformer(folder, max_seq_length=8)
    model = sentences.SentenceTransformer(modules=[encoder, models.Pooling(16)], device="cpu")
    pairs = [(a, b) for a in WORDS for b in WORDS]
    left, right = [f"{a} {b}" for a, b in pairs], [f"{b} {b}" for a, b in pairs]
    data = {
        "alike": datasets.Dataset.from_dict(
            {"a": left, "b": right, "score": [float(a == b) for a, b in pairs]}
        ),
        "kind": datasets.Dataset.from_dict(
            {"a": left, "b": right, "label": [WORDS.index(a) % 3 for a, _ in pairs]}
        ),
    }
    loss = {
        "alike": losses.CosineSimilarityLoss(model),
        "kind": losses.SoftmaxLoss(model, 16, num_labels=3),
    }
    callbacks, pruner = [], None
    if pruned:
        pruner = MultitaskPruner(model, list(loss), encoder, method=method)
        callbacks = [PruningCallback(pruner, loss)]
    arguments = sentences.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        multi_dataset_batch_sampler="round_robin",
        logging_steps=6,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = sentences.SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, loss=loss, callbacks=callbacks
    )
    return trainer, model, pruner


def test_every_loss_is_a_task(folder, tmp_path):
    method = Vote(0.5, schedule=Cubic(2, 10, 4))
    trainer, model, pruner = start(folder, tmp_path, method)
    trainer.train()
    assert steps(pruner) == STEPS
    assert set(pruner.report().observations) == {"alike", "kind"}
    assert pruner.sparsity == pytest.approx(0.5, abs=1e-3)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert {"mtprune/loss/alike", "mtprune/loss/kind", "mtprune/sparsity/all"} <= set(logs[-1])
    pruner.finalize()
    model.save_pretrained(str(tmp_path / "saved"))
    again = sentences.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(
        model.encode(WORDS, convert_to_tensor=True), again.encode(WORDS, convert_to_tensor=True)
    )
    assert not (tmp_path / FILE).exists()


def test_scoring_leaves_training_as_it_is(folder, tmp_path):
    found = []
    for pruned in (False, True):
        method = Vote(0.0, schedule=Cubic(2, 10, 1))
        trainer, model, pruner = start(folder, tmp_path, method, pruned)
        trainer.train()
        if pruner is not None:
            assert pruner.report().step == 10
            pruner.finalize()
        found.append(model.state_dict())
    assert same(*found)
