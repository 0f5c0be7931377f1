"""The command line: what files say about pruning, and what it says of files that are broken."""

import json
import os
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import mtprune
from mtprune import Cubic, LowRank, MultitaskPruner, SoftThreshold, Vote
from mtprune.__main__ import main
from mtprune.checkpoint import sealed
from mtprune.inspecting import CHECKPOINT, COMPRESSED, STATE, compare, inspect
from tests.tampering import tampered
from tests.test_page import Page

TASKS = ("a", "b")
LAYERS = ["trunk.0.weight", "trunk.2.weight", "heads.a.weight", "heads.b.weight"]


class Net(nn.Module):
    """A trunk and two heads."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(8, 2) for task in TASKS})

    def forward(self, x):
        hidden = self.trunk(x)
        return {task: head(hidden) for task, head in self.heads.items()}


def trained(method, seed=0, steps=4, backend="prune"):
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = {t: lambda out, x, t=t: (out[t] - x[:, :1]).square().mean() for t in TASKS}
    pruner = MultitaskPruner(
        model, losses, [model.trunk], method=method, optimizer=optimizer, backend=backend
    )
    for _ in range(steps):
        x = torch.randn(16, 6)
        optimizer.zero_grad()
        pruner.weigh(pruner.observe(model(x), x)).backward()
        optimizer.step()
        pruner.step()
    return model, pruner, optimizer


@pytest.fixture(scope="module")
def voted():
    """A pruner in the midst of training, its model and its optimizer."""
    return trained(Vote(0.75, schedule=Cubic(0, 3, 1)))


@pytest.fixture
def files(voted, tmp_path):
    """The files that a user has of it."""
    model, pruner, optimizer = voted
    torch.save(pruner.state_dict(), tmp_path / "pruner.pt")
    parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
    everything = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**everything, "epoch": 3}, tmp_path / "run.pt")
    torch.save(model.state_dict(), tmp_path / "masked.pt")
    masks = pruner.masks
    plain = {n.removesuffix("_orig"): v for n, v in model.state_dict().items() if "_mask" not in n}
    zeroed = {name: value * masks.get(name, 1) for name, value in plain.items()}
    torch.save(zeroed, tmp_path / "model.pt")
    return tmp_path


def run(capsys, *words):
    """What a command prints, to either side, and its exit code."""
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return out, err, code


# What files say.


@pytest.mark.parametrize("name", ["pruner.pt", "run.pt"])
def test_a_checkpoint_says_what_the_report_of_its_pruner_says(voted, files, capsys, name):
    report = voted[1].report()
    found = inspect(files / name)
    assert found.kind == CHECKPOINT
    for told, known in zip(found.report.layers, report.layers, strict=True):
        assert told == known
    assert found.report.components == report.components
    assert found.report.history == report.history
    assert (found.report.step, found.report.sparsity) == (report.step, report.sparsity)
    assert found.report.coverage is None
    assert {n: m.tolist() for n, m in found.masks.items()} == {
        n: m.tolist() for n, m in voted[1].masks.items()
    }
    out, err, code = run(capsys, "inspect", files / name)
    assert (err, code) == ("", 0)
    assert report.table().split("\n")[1] in out  # the row of 'shared'
    for line in report.table(layers=True).split("\n")[1:5]:
        assert line in out
    assert "Which share of the model's matrices takes part is not known." in out
    assert ("Part 'pruner' of the file." in out) == (name == "run.pt")


def test_json_is_the_report(voted, files, capsys):
    out, _, code = run(capsys, "inspect", files / "pruner.pt", "--json")
    told = json.loads(out)
    report = json.loads(json.dumps(voted[1].report().to_dict()))
    assert code == 0
    assert told["kind"] == CHECKPOINT
    assert told["report"]["coverage"] is None
    for name in ("components", "layers", "tasks", "kept", "history", "observations"):
        assert told["report"][name] == report[name], name


@pytest.mark.parametrize("name", ["model.pt", "masked.pt"])
def test_zeros_of_a_state_are_counted_masked_or_not(voted, files, capsys, name):
    found = inspect(files / name)
    assert found.kind == STATE
    assert found.report.tasks == ()
    masks = voted[1].masks
    rows = {row.name: (row.parameters, row.kept) for row in found.report.layers}
    assert rows == {n: (m.numel(), int(m.sum())) for n, m in masks.items()}
    assert [row.name for row in found.report.components] == ["trunk", "heads"]
    assert found.report.sparsity == voted[1].sparsity
    out, _, _ = run(capsys, "inspect", files / name)
    assert "embeddings too: a state does not say" in out
    assert "want" not in out
    assert "private" not in out


def test_a_part_can_be_named(files, capsys):
    assert inspect(files / "run.pt", "model").kind == STATE
    out, err, code = run(capsys, "inspect", files / "run.pt", "--part", "epoch")
    assert (out, code) == ("", 1)
    assert err.startswith(f"mtprune: '{files / 'run.pt'}' holds no state under 'epoch'. It has [")
    torch.save({"old": Net().state_dict(), "new": Net().state_dict()}, files / "two.pt")
    _, err, code = run(capsys, "inspect", files / "two.pt")
    assert "holds several states: name one of ['new', 'old'], as --part NAME." in err
    assert run(capsys, "inspect", files / "two.pt", "--part", "new")[2] == 0


def test_wrapped_names_are_bare_and_safetensors_is_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = {f"_orig_mod.module.{n}": v.clone() for n, v in Net().state_dict().items()}
    safetensors.save_file(state, tmp_path / "m.safetensors")
    found = inspect(tmp_path / "m.safetensors")
    assert {row.name for row in found.report.layers} == set(LAYERS)
    (tmp_path / "m.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"m\.safetensors' is damaged: "):
        inspect(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "method",
    [
        SoftThreshold(0.5, schedule=Cubic(0, 3, 1)),
        LowRank(0.5),
        Vote(0.5, straight_through=True, schedule=Cubic(0, 9, 1)),
    ],
    ids=["soft", "rank", "open"],
)
def test_other_methods_say_what_they_have(tmp_path, capsys, method):
    pruner = trained(method)[1]
    torch.save(pruner.state_dict(), tmp_path / "p.pt")
    found = inspect(tmp_path / "p.pt")
    for told, known in zip(found.report.layers, pruner.report().layers, strict=True):
        assert (told.name, told.kept, told.threshold) == (known.name, known.kept, known.threshold)
        assert (told.rank, told.full_rank) == (known.rank, known.full_rank)
        assert told.macs is None
    assert run(capsys, "inspect", tmp_path / "p.pt")[2] == 0


def test_before_the_first_update_nothing_is_pruned(tmp_path, capsys):
    pruner = trained(Vote(0.5, schedule=Cubic(9, 12, 3)), steps=1)[1]
    torch.save(pruner.state_dict(), tmp_path / "p.pt")
    out, _, code = run(capsys, "inspect", tmp_path / "p.pt")
    assert code == 0
    assert "Nothing pruned yet: 256 weights in 4 layers, 2 tasks." in out


def test_a_checkpoint_of_version_1_is_read(capsys):
    saved = sorted((Path(__file__).parent / "fixtures").rglob("*.pt"))
    old = [p for p in saved if "version" in torch.load(p, weights_only=True)]
    for path in old:
        assert run(capsys, "inspect", path)[2] == 0


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """The folder of a compressed model."""
    pytest.importorskip("safetensors")
    model, pruner, _ = trained(Vote(0.5, schedule=Cubic(0, 3, 1)))
    pruner.finalize()
    with torch.no_grad():
        model.trunk[0].weight[:4] = 0
        model.trunk[0].bias[:4] = 0
    small = mtprune.compress(model, torch.randn(2, 6))
    folder = tmp_path_factory.mktemp("compressed")
    mtprune.save(small, folder)
    return folder, mtprune.plan_of(small)


def test_a_compressed_folder_says_its_plan(compressed, capsys):
    folder, plan = compressed
    out, _, code = run(capsys, "inspect", folder)
    assert code == 0
    assert out == f"{folder}: {COMPRESSED}\n\n{plan}\nA Net.\n"
    told = json.loads(run(capsys, "inspect", folder, "--json")[0])
    assert mtprune.Plan.from_dict(told["plan"]) == plan
    assert told["report"] is None


# Two files.


def test_two_runs_are_compared_layer_by_layer(voted, files, capsys):
    other = trained(Vote(0.5, schedule=Cubic(0, 3, 1)))[1]
    torch.save(other.state_dict(), files / "other.pt")
    found = compare(inspect(files / "pruner.pt"), inspect(files / "other.pt"))
    mine, theirs = voted[1].masks, other.masks
    both = sum(int((mine[n] & theirs[n]).sum()) for n in mine)
    any_ = sum(int((mine[n] | theirs[n]).sum()) for n in mine)
    assert found.overlap == both / any_
    for pair in found.layers:
        one, two = mine[pair.name], theirs[pair.name]
        assert pair.first == float(one.double().mean())
        assert pair.second == float(two.double().mean())
        assert pair.overlap == int((one & two).sum()) / int((one | two).sum())
    out, _, code = run(capsys, "compare", files / "pruner.pt", files / "other.pt")
    assert code == 0
    last = out.strip().split("\n")[-1].split()
    assert last == ["total", "25.00%", "50.00%", f"{found.overlap:.3f}"]
    told = json.loads(run(capsys, "compare", "--json", files / "pruner.pt", files / "other.pt")[0])
    assert [row["name"] for row in told["layers"]] == LAYERS


def test_a_checkpoint_and_the_model_s_state_agree(files):
    found = compare(inspect(files / "pruner.pt"), inspect(files / "model.pt"))
    assert found.overlap == 1.0
    assert {pair.overlap for pair in found.layers} == {1.0}


def test_layers_that_only_one_has_and_other_shapes_are_told(files, capsys):
    state = {"trunk.0.weight": torch.eye(3), "more.weight": torch.eye(2)}
    torch.save(state, files / "odd.pt")
    out, _, code = run(capsys, "compare", files / "model.pt", files / "odd.pt")
    assert code == 0
    assert "Of other shapes: trunk.0.weight." in out
    rows = {words[0]: words[1:] for words in map(str.split, out.split("\n")) if words}
    assert rows["more.weight"] == ["-", "50.00%", "-"]
    assert rows["trunk.2.weight"][1:] == ["-", "-"]


def test_what_cannot_be_compared_is_refused(files, compressed, capsys):
    _, err, code = run(capsys, "compare", files / "model.pt", compressed[0])
    assert code == 1
    assert "is a compressed model: its layers have other forms. Compare what was saved" in err
    torch.save({"x.weight": torch.eye(2)}, files / "other.pt")
    _, err, code = run(capsys, "compare", files / "model.pt", files / "other.pt")
    assert code == 1
    assert "have no layer in common: the first has ['trunk.0.weight'" in err


# Pages.


@pytest.mark.parametrize("name", ["pruner.pt", "model.pt"])
def test_the_page_has_the_numbers(files, capsys, name):
    page = files / "out.html"
    words = ("report", files / name, "-o", page, "--mask", "trunk.0.weight")
    assert run(capsys, *words) == (f"Wrote {page}.\n", "", 0)
    read = Page(page.read_text(encoding="utf-8"))
    report = inspect(files / name).report
    rows = read.tables["Layers, in numbers."][1:-1]
    assert [row[:3] for row in rows] == [
        [row.name, f"{row.parameters:,}", f"{row.kept:,}"] for row in report.layers
    ]
    assert read.tables["Masks, in numbers."][1][:2] == ["trunk.0.weight", "16 x 6"]
    assert "takes part is not known" in read.text
    assert ("2 tasks: a, b" in read.text) == (name == "pruner.pt")


def test_the_page_of_a_compressed_folder_has_its_plan(compressed, tmp_path, capsys):
    folder, plan = compressed
    assert run(capsys, "report", folder, "-o", tmp_path / "c.html")[2] == 0
    read = Page((tmp_path / "c.html").read_text(encoding="utf-8"))
    rows = read.tables["The form of every layer."][1:]
    assert [row[0] for row in rows] == [row.layer for row in plan.rows]
    assert [row[2] for row in rows] == [row.choice for row in plan.rows]
    sizes = read.tables["Sizes."]
    assert sizes[1][:3] == [
        "parameters",
        f"{plan.sizes.against.parameters:,}",
        f"{plan.sizes.parameters:,}",
    ]


def test_pages_that_cannot_be_written_are_told(files, capsys):
    _, err, code = run(capsys, "report", files / "model.pt", "-o", files / "page.txt")
    assert (code, "its name ends in .html" in err) == (1, True)
    _, err, code = run(capsys, "report", files / "model.pt", "-o", files / "no" / "page.html")
    assert (code, "could not be written" in err) == (1, True)
    words = ("report", files / "model.pt", "-o", files / "page.html", "--mask", "nothing")
    _, err, code = run(capsys, *words)
    assert (code, "has no mask of ['nothing']. It has those of [" in err) == (1, True)
    assert not (files / "page.html").exists()


# Broken files.


class Code:
    """What runs when it is loaded by a reader that trusts."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def told_or_refused(value, path, seal):
    """Save a value, and let all be told of it that can be; whether anything was."""
    try:
        torch.save(seal(value), path)
    except Exception:  # some values no file can hold
        return True
    try:
        found = inspect(path)
    except ValueError:
        return False
    json.dumps([str(found), found.to_dict()], allow_nan=False)
    found.report.save(path.with_suffix(".html"), masks=found.masks)
    return True


@pytest.mark.slow
def test_tampered_files_are_told_of_or_refused(voted, tmp_path):
    state = {name: v for name, v in voted[1].state_dict().items() if name != "digest"}
    parts = {"model": voted[0].state_dict(), "epoch": 3}
    known = 0
    for seed in range(60):
        known += told_or_refused(tampered(state, seed)[0], tmp_path / "p.pt", sealed)
        known += told_or_refused(tampered(parts, seed)[0], tmp_path / "m.pt", lambda value: value)
    assert 20 < known < 110


def test_tensors_that_claim_more_than_they_have_are_passed_over(tmp_path, capsys):
    state = {"a.weight": torch.eye(2), "b.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}
    torch.save({**state, "c.weight": torch.eye(2).to_sparse()}, tmp_path / "m.pt")
    out, _, code = run(capsys, "inspect", tmp_path / "m.pt")
    assert code == 0
    assert "Not dense, and not counted: b.weight, c.weight." in out
    torch.save({"b.weight": state["b.weight"]}, tmp_path / "n.pt")
    _, err, code = run(capsys, "inspect", tmp_path / "n.pt")
    assert (code, "holds no dense tensor of two or more dimensions" in err) == (1, True)


def broken(folder, files):
    """Files that are wrong in many ways, and what is said of each."""
    whole = (files / "pruner.pt").read_bytes()
    state = torch.load(files / "pruner.pt", weights_only=True)
    facts = state["facts"]
    counts = [{**facts["counts"][0], "kept": 10**9}, *facts["counts"][1:]]
    lies = sealed(
        {k: v for k, v in {**state, "facts": {**facts, "counts": counts}}.items() if k != "digest"}
    )
    twice = sealed(
        {k: v for k, v in state.items() if k != "digest"}
        | {"facts": {**facts, "counts": [*facts["counts"], facts["counts"][0]]}}
    )
    masks = {name: torch.zeros_like(bits) for name, bits in state["hold"]["masks"].items()}
    empty = sealed({k: v for k, v in state.items() if k != "digest"} | {"hold": {"masks": masks}})
    wrong = {
        "truncated": (whole[: len(whole) // 2], "is not a file that torch.save wrote, or is"),
        "empty": (b"", "is not a file that torch.save wrote, or is damaged"),
        "noise": (os.urandom(500), "is not a file that torch.save wrote, or is damaged"),
        "text": (b"step 1: loss 0.5\n" * 20, "is not a file that torch.save wrote"),
        "code": (Code(folder / "was run"), "holds a posix.mkdir, and reading it would run code"),
        "module": (Net(), "test_inspecting.Net, and reading it would run code. Save model"),
        "number": (3, "holds a int, and no state of a pruner or of a model. Give what torch.save"),
        "nothing": ({}, "holds an empty file, and no state"),
        "vectors": ({"bias": torch.zeros(3)}, "holds a dict, and no state of a pruner"),
        "changed": ({**state, "step": state["step"] + 1}, "'digest' must be the fingerprint"),
        "lies": (lies, "'facts.counts.0.kept' must be a whole number"),
        "twice": (twice, "'facts.counts' must tell of each layer once"),
        "other masks": (empty, "must keep "),
        "newer": ({**state, "version": 99}, "pruner with other version: it has 99, this one 2."),
    }
    for name, (value, message) in wrong.items():
        path = folder / f"{name}.pt"
        path.write_bytes(value) if isinstance(value, bytes) else torch.save(value, path)
        yield path, message


def test_broken_files_are_told_in_one_line_and_nothing_is_run(files, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("broken")
    for path, message in broken(folder, files):
        for words in (("inspect", path), ("compare", files / "model.pt", path)):
            out, err, code = run(capsys, *words)
            assert (out, code) == ("", 1), path
            assert err.startswith("mtprune: "), path
            assert message in err, path
            assert err.count("\n") == 1, path
        _, _, code = run(capsys, "report", path, "-o", folder / "page.html")
        assert code == 1
    assert not (folder / "page.html").exists()
    assert not (folder / "was run").exists()


def test_folders_that_hold_no_model_are_told(tmp_path, compressed, capsys):
    assert run(capsys, "inspect", tmp_path / "none")[1:] == (
        f"mtprune: '{tmp_path / 'none'}' does not exist.\n",
        1,
    )
    _, err, code = run(capsys, "inspect", tmp_path)
    assert (code, "holds no plan.json and model.safetensors" in err) == (1, True)
    (tmp_path / "config.json").write_text("{}")
    _, err, code = run(capsys, "inspect", tmp_path)
    assert (code, "must be a mapping that has 'quantization_config'" in err) == (1, True)
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("plan.json", "model.safetensors"):
        (broken / name).write_bytes((compressed[0] / name).read_bytes())
    text = (broken / "plan.json").read_text()
    (broken / "plan.json").write_text(text[: len(text) // 2])
    _, err, code = run(capsys, "inspect", broken)
    assert (code, "holds no JSON that can be read" in err) == (1, True)


# The program.


@pytest.mark.parametrize("words", [[], ["look"], ["inspect"], ["report", "x"], ["compare", "x"]])
def test_a_wrong_command_is_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: mtprune" in capsys.readouterr().err


def test_help_tells_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("inspect", "compare", "report", "Exit codes: 0 done, 1"))


def test_the_console_script_is_the_same_program():
    config = ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    script = config["options.entry_points"]["console_scripts"].strip()
    name, _, target = script.partition(" = ")
    module, _, function = target.partition(":")
    assert name == "mtprune"
    assert getattr(import_module(module), function) is main


@pytest.mark.slow
def test_it_runs_as_a_module_and_into_a_pipe_that_closes(files):
    command = [sys.executable, "-m", "mtprune", "inspect", str(files / "pruner.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "trunk.0.weight" in done.stdout
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
