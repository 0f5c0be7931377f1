"""Every trainer runs, on every method, ends as sparse as asked, and resumes bitwise."""

import copy
import errno
import io
import json
import os
import re
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import camvid
import census
import cityscapes
import digits
import multimnist
import nyuv2
import pytest
import taskonomy
import torch
from common import checkpoints, fixture, loop, options, results
from matplotlib.figure import Figure
from torch.utils._pytree import tree_leaves

from mtprune import Cubic, LowRank, recipes
from tests.long import few

pytestmark = pytest.mark.slow

MODULES = (nyuv2, cityscapes, taskonomy, camvid, census, digits, multimnist)
PROBLEMS = {module.PROBLEM.name: module.PROBLEM for module in MODULES}
METHODS = [
    "dense",
    "adapmtl",
    "disparse_static",
    "disparse_dynamic",
    "disparse_pretrained",
    "magnitude",
]
TINY = ["--steps", "3", "--batch", "2", "--workers", "0", "--observations", "2", "--width", "0.02"]
CROP = ["--crop", "32", "32"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _fast_pictures(request, monkeypatch):
    """Drawing takes most of a tiny run: one method's pictures are enough."""
    if "dense" not in request.node.name:
        monkeypatch.setattr(results, "draw", lambda found: Figure())


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains on a problem's fixture, into a new folder or a given one."""
    root = tmp_path_factory.mktemp("data")

    def run(name, *arguments, out=None):
        problem = PROBLEMS[name]
        where, size = ["--data", str(root / name)], CROP if problem.augment else []
        if problem.packaged is not None:  # as large as it is
            where, size = [], ["--batch", "500"]
        elif not (root / name).exists():
            fixture.write(name, root / name, (32, 48))
        out = out or tmp_path_factory.mktemp("out")
        return loop.main(problem, [*where, "--out", str(out), *TINY, *size, *arguments])

    return run


def weights(out):
    return torch.load(Path(out) / "model.pt", weights_only=True)


PAIRS = [(name, method) for name in PROBLEMS for method in METHODS]


@pytest.mark.parametrize(
    ("name", "method"),
    few(PAIRS, *(pair for pair in PAIRS if pair[0] == "census" or pair[1] == "adapmtl")),
)
def test_runs_to_the_sparsity_asked_for(train, tmp_path, capsys, name, method):
    found = train(name, "--method", method, "--sparsity", "0.8", out=tmp_path)
    share = 0 if method == "dense" else 0.8
    assert found["zeros"] == round(share * found["weights"])
    assert list(found["test"]) == list(PROBLEMS[name].tasks)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    state = weights(tmp_path)
    assert not any(key.endswith(("_orig", "_mask")) for key in state)
    said = capsys.readouterr().out
    for task, metrics in found["test"].items():
        assert task in said
        assert all(metric in said for metric in metrics)
    assert f"{found['zeros']:,} zeros of {found['weights']:,} weights" in said


@pytest.mark.parametrize(
    "method",
    few(
        (name for name in options.METHODS if name not in METHODS),
        "best",
        "flop",
        "movement",
        "rigl",
    ),
)
def test_every_other_method(train, tmp_path, method):
    start = []
    if options.METHODS[method] == "rounds":
        train("census", "--method", "dense", out=tmp_path)
        start = ["--pretrained", str(tmp_path / "model.pt")]
    found = train("census", "--method", method, "--steps", "4", *start)
    asked = round(0.9 * found["weights"])
    if method.startswith("flop"):  # up to less than what one component costs
        assert 0 <= found["zeros"] - asked < 200
    elif method != "adapmtl_published":  # it rests where its thresholds lead it
        assert found["zeros"] == asked


def test_rounds_need_a_trained_net(train, capsys):
    for told in (["--method", "vote", "--when", "rounds"], ["--method", "best_joint"]):
        with pytest.raises(SystemExit):
            train("census", *told)
        said = capsys.readouterr().err
        assert "--when rounds needs --pretrained: a trained net to prune." in said


@pytest.mark.parametrize("method", ["flop", "flop_saliency"])
def test_ranks_of_nets_without_linear_layers(train, method):
    found = train("nyuv2", "--method", method, "--net", "unet", "--steps", "6", "--width", "0.1")
    report = found["report"]
    dearest = max(row["parameters"] // row["full_rank"] for row in report["layers"])
    assert 0 <= found["zeros"] - round(0.9 * found["weights"]) < 2 * dearest
    assert found["zeros"] == report["parameters"] - report["kept"]
    rows = report["layers"]
    assert sum(row["rank"] for row in rows) < 0.5 * sum(row["full_rank"] for row in rows)


def test_a_method_that_cannot_prune_the_net_is_told_without_a_traceback(train, monkeypatch):
    monkeypatch.setattr(LowRank, "fits", lambda method, layer: "nothing here has a rank")
    message = (
        r"^census: --method flop does not fit --net mmoe: LowRank can prune none of these layers:"
        r" 'experts\.0\.0\.weight', .* and \d+ more \(Linear: nothing here has a rank\)\. Take "
    )
    with pytest.raises(SystemExit, match=message) as caught:
        train("census", "--method", "flop")
    assert "\n" not in str(caught.value)


def test_every_recipe_is_a_method():
    assert set(recipes.__all__) <= set(options.METHODS)


class KilledError(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "arguments"),
    few(
        [
            ("nyuv2", ["--method", "vote", "--backend", "prune", "--workers", "1"]),
            ("nyuv2", ["--method", "disparse_dynamic", "--backend", "inplace"]),
            ("cityscapes", ["--method", "disparse_static"]),
            ("taskonomy", ["--method", "dense"]),
            ("camvid", ["--method", "disparse_pretrained", "--net", "mtan_segnet"]),
            ("nyuv2", ["--method", "adapmtl"]),
            *(("census", ["--method", method]) for method in METHODS),
        ],
        ("nyuv2", ["--method", "adapmtl"]),
        ("census", ["--method", METHODS[-1]]),
    ),
)
def test_killed_and_resumed_is_bitwise_the_same(train, tmp_path, monkeypatch, name, arguments):
    arguments = [*arguments, "--steps", "4", "--save-every", "1"]
    whole = train(name, *arguments, out=tmp_path / "whole")

    save, calls = loop.save, []

    def save_and_die(*what):
        save(*what)
        calls.append(what)
        if len(calls) == 2:
            raise KilledError

    monkeypatch.setattr(loop, "save", save_and_die)
    with pytest.raises(KilledError):
        train(name, *arguments, out=tmp_path / "parts")
    monkeypatch.setattr(loop, "save", save)
    parts = train(name, *arguments, "--resume", out=tmp_path / "parts")
    for key in ("zeros", "step", "val", "test", "report", "history"):
        assert whole[key] == parts[key], key
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[key], two[key]) for key in one)
    ends = [
        torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)
        for run in ("whole", "parts")
    ]
    one, two = (tree_leaves([end["optimizer"], end["pruner"], end["random"]]) for end in ends)
    for value, other in zip(one, two, strict=True):
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other


def test_pretrained_and_rewound(train, tmp_path):
    train("census", "--method", "dense", out=tmp_path)
    pretrained = ["--pretrained", str(tmp_path / "model.pt"), "--method", "magnitude"]
    found = train("census", *pretrained, "--steps", "1", "--lr", "1e-12")
    assert found["zeros"] == round(0.9 * found["weights"])
    assert found["options"]["dense_steps"] == 0
    tuned = weights(found["options"]["out"])
    trained = weights(tmp_path)
    name = "experts.0.0.weight"
    kept = tuned[name] != 0
    assert torch.allclose(tuned[name][kept], trained[name][kept])

    found = train("census", *pretrained, "--rewind", "--steps", "1", "--lr", "1e-12")
    assert found["zeros"] == round(0.9 * found["weights"])
    rewound = weights(found["options"]["out"])
    assert torch.equal(rewound[name] != 0, kept)
    torch.manual_seed(0)
    fresh = loop.nets.build("mmoe", census.CLASSES, 0.02, 19).state_dict()[name]
    assert torch.allclose(rewound[name][kept], fresh[kept])
    assert not torch.allclose(rewound[name][kept], trained[name][kept], atol=1e-5)


def test_scale_of_a_loss_in_the_scoring_moves_no_mask_and_no_weight(train, tmp_path):
    arguments = ["--method", "disparse_static"]
    plain = train("census", *arguments)
    scaled = train("census", *arguments, "--loss-scale", "college=32", "marital7=0.25")
    one, two = (weights(run["options"]["out"]) for run in (plain, scaled))
    assert all(torch.equal(one[key], two[key]) for key in one)
    joint = [train("census", "--method", "snip", *x) for x in ([], ["--loss-scale", "college=32"])]
    one, two = (weights(run["options"]["out"]) for run in joint)
    assert any(not torch.equal(one[key] == 0, two[key] == 0) for key in one)


def test_a_task_of_noise_has_labels_of_other_samples(tmp_path):
    fixture.write("census", tmp_path, (32, 48))

    def labels(*arguments):
        told = options.parse(census.PROBLEM, ["--data", str(tmp_path), *arguments])
        splits = loop.open_data(census.PROBLEM, told).splits
        return splits["train"].tensors, splits["test"].tensors

    train, test = labels()
    noisy, same = labels("--noise", "never_married")
    changed = [name for name in train if not torch.equal(train[name], noisy[name])]
    assert changed == ["never_married"]
    assert torch.equal(train["never_married"].sort()[0], noisy["never_married"].sort()[0])
    assert all(torch.equal(test[name], same[name]) for name in test)


def test_best_is_by_validation_and_only_when_sparse(train):
    found = train("census", "--method", "vote", "--steps", "12", "--save-every", "1")
    first = found["history"]["val"][0]["results"]

    def score(row):
        return sum(row["results"][task]["loss"] / first[task]["loss"] for task in first)

    sparse = [row for row in found["history"]["val"] if abs(row["sparsity"] - 0.9) < 1e-3]
    assert 0 < len(sparse) < 12
    assert found["step"] == min(sparse, key=score)["step"]
    assert found["val"] == min(sparse, key=score)["results"]


def test_mixed_precision_and_a_task_alone(train):
    found = train(
        "nyuv2", "--amp", "--tasks", "depth", "seg", "--scales", "1", "1", "--net", "mobilenetv2"
    )
    assert list(found["test"]) == ["depth", "seg"]
    assert found["zeros"] == round(0.9 * found["weights"])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own
def test_a_compiled_net_is_pruned_alike(train, monkeypatch):
    compile_ = torch.compile  # through the same graphs, but without waiting for a compiler
    monkeypatch.setattr(torch, "compile", lambda net: compile_(net, backend="aot_eager"))
    arguments = ["--method", "disparse_pretrained", "--steps", "6"]
    runs = [train("census", *arguments, *more) for more in ([], ["--compile"])]
    assert runs[0]["zeros"] == runs[1]["zeros"] == round(0.9 * runs[1]["weights"])
    one, two = (weights(run["options"]["out"]) for run in runs)
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-5), name


def test_options_shape_the_method():
    def method(*arguments):
        return options.make_method(
            options.parse(census.PROBLEM, ["--data", "x", "--steps", "400", *arguments])
        )

    uniform = recipes.adapmtl(0.9, 400, allocation="uniform")
    assert method("--method", "best") == uniform
    assert method("--method", "best", "--pretrained", "x") == recipes.best(0.9)
    trained = ("--method", "best", "--pretrained", "x", "--when", "gradual")
    gradual = replace(recipes.best(0.9), schedule=Cubic(begin=1, end=200, every=19))
    assert method(*trained) == gradual
    assert method("--method", "magnitude").schedule.at == 200
    assert method("--method", "magnitude", "--dense-steps", "7").schedule.at == 7
    assert method("--method", "magnitude", "--pretrained", "x").schedule.at == 0
    assert method("--method", "disparse_static").observations == 50
    assert method("--method", "disparse_dynamic").schedule.end == 300
    gradual = method("--method", "random", "--when", "gradual").schedule
    assert (gradual.begin, gradual.end, gradual.every) == (200, 300, 10)
    assert method("--method", "vote", "--allocation", "erk").allocation == "erk"
    assert method("--method", "vote").allocation == "floor"
    assert method("--method", "snip").allocation == "global"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "90"], r"Did you mean 0\.9"),
        (["--tasks", "depth"], "census has no task 'depth'. It has income_50k, never_married"),
        (["--tasks", "college", "college"], "names a task twice"),
        (["--loss-scale", "college"], r"must look like seg=30"),
        (["--loss-scale", "seg=30"], r"--loss-scale names \['seg'\], not in --tasks"),
        (["--noise", "seg"], r"--noise names \['seg'\], not in --tasks"),
        (["--rewind"], "--rewind needs --pretrained"),
        (["--rewind", "--pretrained", "x"], "--rewind is for what prunes at once. --method vote d"),
        (["--method", "rigl", "--when", "init"], "--when does not apply to --method rigl"),
        (["--dense-steps", "5000"], r"--dense-steps must be less than --steps 2000\. Got 5000"),
        (["--steps", "0"], "must be at least 1"),
        (["--method", "adapmtl", "--when", "trained"], "leaves adapmtl no time"),
        (["--method", "adapmtl", "--when", "rounds"], "--when rounds leaves adapmtl no time"),
        (["--lr", "0"], "must be positive"),
        (["--net", "mtan_segnet"], "invalid choice"),
    ],
)
def test_refuses(capsys, arguments, message):
    with pytest.raises(SystemExit):
        options.parse(census.PROBLEM, ["--data", "x", *arguments])
    assert re.search(message, capsys.readouterr().err)


def test_refuses_at_run_time(train, tmp_path):
    with pytest.raises(SystemExit, match=r"census: There is no .*none\.pt\. Train with"):
        train("census", "--pretrained", str(tmp_path / "none.pt"))
    train("census", "--method", "dense", out=tmp_path)
    with pytest.raises(SystemExit, match=r"census: .*model\.pt is of another net"):
        train("census", "--pretrained", str(tmp_path / "model.pt"), "--width", "0.1")
    with pytest.raises(SystemExit, match=r"checkpoint\.pt is of a run with --seed 0\. Got 1"):
        train("census", "--method", "dense", "--seed", "1", "--resume", out=tmp_path)


def flip(data):
    """The same bytes, but one bit in the middle of the largest tensor."""
    parts = zipfile.ZipFile(io.BytesIO(data)).infolist()
    # Not of the pickle, in which some bits, such as places of its memo, mean nothing.
    tensors = [part for part in parts if "/data/" in part.filename]
    largest = max(tensors, key=lambda part: part.file_size)
    name, extra = struct.unpack("<HH", data[largest.header_offset + 26 :][:4])
    place = largest.header_offset + 30 + name + extra + largest.file_size // 2
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


DAMAGES = {
    "empty": (lambda data: b"", "is not a file that torch.save wrote, or is damaged"),
    "truncated": (lambda data: data[:-999], "is not a file that torch.save wrote, or is damaged"),
    "flipped": (flip, "is damaged|is not a file that torch.save wrote"),
    "another's": (lambda data: torch_bytes({"step": 1}), "is no checkpoint of this trainer"),
    "a list": (lambda data: torch_bytes([1, 2]), "is no checkpoint of this trainer"),
}


def torch_bytes(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_without_a_traceback(train, tmp_path, damage):
    train("census", "--method", "vote", out=tmp_path)
    path = tmp_path / "checkpoint.pt"
    change, message = DAMAGES[damage]
    bad = change(path.read_bytes())
    path.write_bytes(bad)
    there = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match=rf"census: '.*checkpoint\.pt' ({message}).* Take a"):
        train("census", "--method", "vote", "--resume", out=tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == there


UNTRUE = {
    "log": ({"step": 1}, r"'log' must have \['best', 'seconds', 'train', 'val'\] besides"),
    "log.step": (99, r"'log\.step' must be a whole number, from 1 to 6\. Got 99"),
    "log.best": (
        {"step": 4, "score": 1.0},
        r"'log\.best\.step' must be one of \[3, 6\], the steps",
    ),
    "log.train": ([{"step": "x"}], r"'log\.train\.0' must have "),
    "log.val": (None, r"'log\.val' must be a list\. Got None"),
    "random.cpu": (
        torch.zeros(9, dtype=torch.uint8),
        r"'random\.cpu' must be the state of a torch",
    ),
    "random": ({}, r"'random' must be a mapping that has 'cpu'"),
    "options": ([1], r"'options' must be a mapping with strings for keys\. Got \[1\]"),
    "options.seed": (torch.zeros(2), r"is of a run with --seed tensor\(\[0\., 0\.\]\)\. Got 0"),
    "pruner.step": (-1, r"is of another pruner: This checkpoint: 'step' must be a whole number"),
    "model": ({}, r"is of another model: Error\(s\) in loading"),
    "optimizer": (7, r"is of another optimizer: "),
}


LONGER = ["census", "--method", "vote", "--steps", "6", "--save-every", "3"]
LONGER += ["--width", "0.05", "--batch", "8"]


@pytest.fixture(scope="module")
def checkpoint(train, tmp_path_factory):
    """That of a run that is done."""
    folder = tmp_path_factory.mktemp("finished")
    train(*LONGER, out=folder)
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("path", UNTRUE)
def test_a_checkpoint_that_is_not_true_is_told_without_a_traceback(
    train, checkpoint, tmp_path, path
):
    state = {name: copy.deepcopy(value) for name, value in checkpoint.items() if name != "digest"}
    value, message = UNTRUE[path]
    *way, last = path.split(".")
    inner = state
    for key in way:
        inner = inner[key]
    inner[last] = value
    checkpoints.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match=rf"census: .*checkpoint\.pt'?.*{message}"):
        train(*LONGER, "--resume", out=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_what_a_killed_run_left_is_removed(train, tmp_path):
    (tmp_path / ".checkpoint.pt.abc.part").write_bytes(b"half")
    train("census", "--method", "vote", out=tmp_path)
    assert [file.name for file in tmp_path.iterdir() if file.name.endswith(".part")] == []


def test_what_cannot_be_written_is_told_and_leaves_the_last_checkpoint(
    train, tmp_path, monkeypatch
):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = ["census", "--method", "vote", "--save-every", "2"]
    train(*arguments, out=tmp_path)
    old = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        SystemExit, match=r"census: .*best\.pt' could not be written: No space left"
    ):
        train(*arguments, out=tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == old


def test_what_is_wrong_with_the_data_is_told_without_a_traceback(tmp_path):
    with pytest.raises(SystemExit, match=r"census: .* Missing: train\.npz of Census-Income"):
        loop.main(census.PROBLEM, ["--data", str(tmp_path)])


def test_the_plugin_takes_few_marked_lines():
    lines = Path(loop.__file__).read_text().splitlines()
    marked = [line for line in lines if line.endswith("# mtprune")]
    assert 4 <= len(marked) <= 8
    for name in ("MultitaskPruner(", ".prune(", ".observe(", ".weigh(", ".step()", ".finalize()"):
        assert sum(name in line for line in marked) >= 1, name


@pytest.mark.parametrize("name", PROBLEMS)
def test_help(capsys, name):
    with pytest.raises(SystemExit) as caught:
        options.parse(PROBLEMS[name], ["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert ("  --data " in said) == (PROBLEMS[name].packaged is None)
    for option in (
        *("--tasks", "--net", "--method", "--sparsity", "--backend", "--steps"),
        *("--seed", "--amp", "--compile", "--resume", "--out", "--pretrained", "--allocation"),
    ):
        assert f"  {option} " in said or f"  {option}\n" in said


def test_the_learning_rate_falls_in_stairs_or_in_a_line():
    optimizer = torch.optim.Adam([torch.zeros(1)])

    def rates(*arguments):
        steps = ["--steps", "4", "--lr", "1", "--lr-every", "2", "--dense-steps", "0"]
        told = options.parse(census.PROBLEM, ["--data", "x", *steps, *arguments])
        found = []
        for step in range(told.steps):
            loop.set_rate(optimizer, told, step)
            found.append(optimizer.param_groups[0]["lr"])
        return found

    assert rates() == [1, 1, 0.5, 0.5]
    assert rates("--lr-factor", "0.25") == [1, 1, 0.25, 0.25]
    assert rates("--lr-shape", "line") == [1, 0.75, 0.5, 0.25]
