"""Files: checkpoints, saved models, plans and trainers' checkpoints that are damaged or hostile."""

import copy
import io
import json
import random
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import mtprune
from tests import hostile, hostile_models
from tests.fuzz.engine import Case, Outcome
from tests.tampered_models import tampered_folder
from tests.tampering import alike, tampered

EXAMPLES = Path(__file__).parents[2] / "examples"

_KINDS = {"sound": "passed", "refused": "refused", "changed": "changed", "raw": "raw"}


class Tampered:
    """A seed, and whether fingerprints are made anew: nothing is simpler than that."""

    def draw(self, dice: random.Random) -> Case:
        """A seed."""
        return {"seed": dice.randrange(1 << 30), "sealed": dice.random() < 0.6}

    def simpler(self, case: Case) -> Iterable[Case]:
        """Nothing is."""
        return ()


class States(Tampered):
    """States of pruners, of all methods."""

    def __init__(self) -> None:
        self._states = {kind: hostile.checkpoint(kind) for kind in hostile.KINDS}

    def draw(self, dice: random.Random) -> Case:
        """The same, and a method."""
        return {**super().draw(dice), "kind": dice.choice(list(hostile.KINDS))}

    def run(self, case: Case) -> Outcome:
        """Load it into a pruner in training, and train on."""
        kind, what = hostile.outcome(
            case["kind"], self._states[case["kind"]], case["seed"], sealed=case["sealed"]
        )
        return Outcome(_KINDS.get(kind, "wrong"), what)


class Models(Tampered):
    """Folders that `mtprune.save` wrote."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp()) / "saved"
        model = hostile_models.compressed()
        mtprune.save(model, self._folder)
        with torch.no_grad():
            self._expected = model(hostile_models.example())

    def run(self, case: Case) -> Outcome:
        """Load it into a dense model, and run that."""
        to = Path(tempfile.mkdtemp())
        kind, what = hostile_models.outcome(
            self._folder,
            to / "copy",
            case["seed"],
            sealed=case["sealed"],
            expected=self._expected,
        )
        shutil.rmtree(to)
        return Outcome(_KINDS.get(kind, "wrong"), what)


class Plans(Tampered):
    """Plans that `compress` is given."""

    def __init__(self) -> None:
        self._plan = json.loads(json.dumps(mtprune.plan_of(hostile_models.compressed()).to_dict()))

    def run(self, case: Case) -> Outcome:
        """Compress by it."""
        kind, what = hostile_models.plan_outcome(self._plan, case["seed"])
        return Outcome(_KINDS.get(kind, "wrong"), what)


class Trainers(Tampered):
    """Checkpoints of the example trainers."""

    def __init__(self) -> None:
        sys.path.insert(0, str(EXAMPLES))
        import census
        from common import checkpoints, fixture, loop
        from common.options import parse

        self._loop, self._checkpoints = loop, checkpoints
        root = Path(tempfile.mkdtemp())
        fixture.write("census", root / "data")
        few = ["--steps", "6", "--width", "0.05", "--batch", "8", "--save-every", "3"]
        where = ["--data", str(root / "data"), "--out", str(root / "out"), "--device", "cpu"]
        self._options: Namespace = parse(census.PROBLEM, [*where, *few, "--method", "vote"])
        self._source = loop.open_data(census.PROBLEM, self._options)
        self._problem = census.PROBLEM
        run = loop.build(self._problem, self._options, self._source)
        log = {"step": 3, "train": [], "val": [], "best": None, "seconds": 0.0}
        self._path = root / "checkpoint.pt"
        loop.save(run, log, self._path)
        self._bytes = self._path.read_bytes()
        self._state: dict[str, Any] = torch.load(self._path, weights_only=True)

    def run(self, case: Case) -> Outcome:
        """Resume from it."""
        dice = random.Random(case["seed"])
        path = Path(tempfile.mkdtemp()) / "checkpoint.pt"
        if case["sealed"]:
            state = {k: v for k, v in self._state.items() if k != "digest"}
            bad, what = tampered(copy.deepcopy(state), case["seed"])
            try:
                self._checkpoints.save(bad, path)
            except Exception:
                return Outcome("refused", f"{what}: it cannot be written")
        else:
            data = bytearray(self._bytes)
            what = dice.choice(("flipped", "truncated", "torn", "emptied", "another"))
            if what == "flipped":
                data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            elif what == "truncated":
                del data[dice.randrange(len(data)) :]
            elif what == "torn":
                at = dice.randrange(len(data))
                data[at : at + 64] = bytes(64)
            elif what == "emptied":
                data.clear()
            else:
                file = io.BytesIO()
                torch.save(dice.choice(([1], {"model": {}}, torch.zeros(3))), file)
                data = bytearray(file.getvalue())
            path.write_bytes(bytes(data))
        run = self._loop.build(self._problem, self._options, self._source)
        try:
            self._loop.load(run, path)
        except self._checkpoints.UnusableError as error:
            if str(path) not in str(error):
                return Outcome("raw", f"{what}: {error}")
            return Outcome("refused", what)
        if case["sealed"]:
            return Outcome("passed", what)
        same = alike(run.model.state_dict(), self._state["model"])
        return Outcome("passed" if same else "wrong", what)


class Pretrained(Tampered):
    """Folders that `save_pretrained` wrote and ``from_pretrained`` reads."""

    def __init__(self) -> None:
        import transformers

        from mtprune.integrations.pretrained import save_pretrained
        from tests.compression.fakes import prefer, zero_
        from tests.encoders import build

        transformers.logging.set_verbosity_error()
        self._load = transformers.AutoModel.from_pretrained
        self._encoder = build("Bert", "sdpa", "Model")
        zero_(self._encoder.model, 0.7, rows=0.2, cols=0.2)
        fast = mtprune.compress(self._encoder.model, self._encoder.inputs, measure=prefer("csr"))
        self._folder = Path(tempfile.mkdtemp()) / "saved"
        save_pretrained(fast, self._folder)
        (self._folder / "config.json").rename(self._folder / "plan.json")

    def run(self, case: Case) -> Outcome:
        """Load it with transformers, and run it. Errors may be those of transformers."""
        to = Path(tempfile.mkdtemp()) / "copy"
        what = tampered_folder(self._folder, to, case["seed"], sealed=False)
        if (to / "plan.json").exists():
            (to / "plan.json").rename(to / "config.json")
        try:
            model = self._load(to)
            with torch.no_grad():
                self._encoder.states(model)
        except Exception as error:
            return Outcome("refused", f"{what}: {type(error).__name__}")
        finally:
            shutil.rmtree(to.parent)
        return Outcome("passed", what)
