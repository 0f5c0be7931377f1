"""Recipes on an encoder: every method ends as sparse as asked, from the same dense net."""

import json

import pytest
import torch

pytest.importorskip("transformers", exc_type=ImportError)
for _package in ("matplotlib", "safetensors", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(_package)

import encoder_multitask  # noqa: E402
import encoder_recipes as example  # noqa: E402
import overview  # noqa: E402

from mtprune import Cubic, Hold, Rounds, saliency  # noqa: E402
from tests import sentences  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

FEW = ["--dense-steps", "6", "--steps", "12", "--batch", "4", "--random", "--sparsities", "0.8"]
WEIGHTS = 2 * (4 * 32 * 32 + 2 * 32 * 64)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return sentences.write(tmp_path_factory.mktemp("text"))


def run(data, out, *arguments):
    where = ["--data", str(data), "--tasks", "mood", "topic", "--out", str(out)]
    return example.main([*where, *FEW, *arguments])


def test_every_method_ends_as_sparse_as_asked(data, tmp_path, capsys):
    names = [f"{name}:{how}" for name in example.methods(0.5) for how in ("rounds", "gradual")]
    names += [f"{name}:gradual" for name in example.MOVEMENT]
    rows = run(data, tmp_path, "--seeds", "1", "--methods", *names, "tuned")
    assert [row["method"] for row in rows] == ["tuned", *names]
    for row in rows:
        assert row["weights"] == WEIGHTS
        # Units are whole: a head has 4 * 32 * 8 weights.
        assert (
            0
            <= row["zeros"][0] - round(row["sparsity"] * WEIGHTS)
            <= (1024 if row["method"].startswith("units") else 0)
        )
        assert len(row["delta"]) == len(row["worst"]) == len(row["loss"]) == 1
    assert "| 80.0% | here:rounds | 0.0003 | 1 |" in capsys.readouterr().out
    told = json.loads((tmp_path / "compare.json").read_text())
    assert "80%" in overview.table({"text": told}, "here:rounds")


def test_fewer_layers_are_the_first_ones(data, tmp_path):
    [row] = run(data, tmp_path, "--seeds", "1", "--methods", "joint:rounds", "--layers", "1")
    assert row["weights"] == WEIGHTS // 2
    encoder_multitask.random_encoder().save_pretrained(tmp_path / "whole")
    whole, first = (
        encoder_multitask.prepared(
            encoder_multitask.quietly_loaded(tmp_path / "whole", **config)
        ).state_dict()
        for config in ({}, {"num_hidden_layers": 1})
    )
    assert {name for name in whole if "layer.1." not in name} == set(first)
    assert all(torch.equal(whole[name], tensor) for name, tensor in first.items())


def test_more_layers_than_there_are_are_refused(data, tmp_path):
    encoder_multitask.random_encoder().save_pretrained(tmp_path / "own")
    more = ["--encoder", str(tmp_path / "own"), "--layers", "3"]
    where = ["--data", str(data), "--tasks", "mood", "topic", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="--layers 3 is more than the 2 that it has"):
        example.main([*where, *more])


def test_seeds_are_paired_and_nothing_is_done_twice(data, tmp_path, monkeypatch):
    few = ["--seeds", "2", "--methods", "elsewhere:rounds", "joint:gradual"]
    rows = run(data, tmp_path, *few)
    assert [len(row["behind"]["delta"]) for row in rows if "behind" in row] == [2]
    monkeypatch.setattr(example.Study, "prune_and_tune", None)
    assert run(data, tmp_path, *few) == rows


def test_rates_are_chosen_with_another_seed(data, tmp_path):
    few = ["--seeds", "1", "--methods", "elsewhere:rounds", "--rates", "1e-9", "1e-2"]
    [row] = run(data, tmp_path, *few)
    folder = tmp_path / "elsewhere-rounds-0.8"
    tried = [folder / f"rate{lr:g}" / "seed1000" / "results.json" for lr in (1e-9, 1e-2)]
    losses = [
        sum(task["loss"] for task in json.loads(path.read_text())["val"].values()) for path in tried
    ]
    assert row["rate"] == (1e-2 if losses[1] < losses[0] else 1e-9)
    assert row["seeds"] == [0]


def test_schedules():
    method = example.scheduled("joint:rounds", 0.9, 80, 4)
    assert method.schedule == Rounds(4)
    assert not method.disentangled
    method = example.scheduled("here:gradual", 0.9, 80, 4)
    assert method.schedule == Cubic(begin=8, end=48, every=5)
    assert method.saliency is saliency.taylor_magnitude
    apart, together = (
        example.scheduled(f"{name}:gradual", 0.9, 80, 4) for name in example.MOVEMENT
    )
    assert apart.schedule == Hold(Cubic(begin=8, end=48, every=4), until=80, every=4)
    assert apart.straight_through
    assert apart.disentangled
    assert not together.disentangled


def test_batches_go_on_where_training_stopped(data, tmp_path):
    options = example.read(["--data", str(data), "--tasks", "mood", "topic", "--random"])
    world = example.open_world(options)
    study = example.Study(world, world.tasks(options.tasks, {}), options)
    stream = study.batches(0)
    first = [next(stream) for _ in range(9)]
    for start in (1, 4, 7):
        name, batch = next(study.batches(0, start=start))
        assert name == first[start][0]
        assert torch.equal(batch["input_ids"], first[start][1]["input_ids"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "vote:rounds"], "--reference vote:rounds is none of --methods"),
        (["--methods", "vote"], "invalid choice: 'vote'"),
        (["--methods", "movement:rounds"], "invalid choice: 'movement:rounds'"),
        (["--seeds", "0"], "must be at least 1"),
    ],
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        example.read(["--data", "x", "--tasks", "mood", *arguments])
    assert message in capsys.readouterr().err
