"""Tracking: what is written down of a run, and where it can be read again."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtprune import Cubic, MultitaskPruner, Regrow, Vote, distributed, recipes, votes
from mtprune.integrations.trackers import writer_of
from mtprune.tracking import Histogram, histogram, picture
from tests.nets import same, zeros

STEPS = 12
EVERYTHING = {"scalars": 0, "histograms": 0, "images": 0}  # as TensorBoard's reader has it


class Rows:
    """Anything that has ``log``."""

    def __init__(self):
        self.rows = []

    def log(self, mapping, step):
        self.rows.append((step, dict(mapping)))

    def curve(self, name):
        return {step: row[f"mtprune/{name}"] for step, row in self.rows if f"mtprune/{name}" in row}


def gradual(**options):
    return Vote(0.5, schedule=Cubic(2, 8, 3), **options)


class Run:
    """A trunk of eight units, and two tasks."""

    def __init__(self, method=None, backend="inplace", device="cpu"):
        torch.manual_seed(0)
        self.model = nn.ModuleDict(
            {
                "trunk": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8)),
                "a": nn.Linear(8, 1),
                "b": nn.Linear(8, 1),
            }
        ).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 0.01)
        self.pruner = MultitaskPruner(
            self.model,
            ["a", "b"],
            "trunk",
            method=method or gradual(),
            optimizer=self.optimizer,
            backend=backend,
        )
        self.batches = list(torch.randn(STEPS, 16, 4, generator=torch.Generator().manual_seed(1)))
        self.losses = []

    def step(self, batch):
        x = batch.to(next(self.model.parameters()).device)
        hidden = self.model["trunk"](x)
        losses = {t: (self.model[t](hidden) - x.sum(1, True)).square().mean() for t in "ab"}
        self.pruner.observe_losses(losses)
        self.optimizer.zero_grad()
        self.pruner.weigh(losses).backward()
        self.optimizer.step()
        self.pruner.step()
        self.losses.append({task: float(loss.detach()) for task, loss in losses.items()})

    def train(self):
        for batch in self.batches:
            self.step(batch)
        return self


def test_losses_are_means_since_the_last_write():
    run, rows = Run(gradual()), Rows()
    run.pruner.track(rows, every=4)
    run.train()
    curve = rows.curve("loss/a")
    assert list(curve) == [4, 8, 12]
    for end in curve:
        mean = sum(losses["a"] for losses in run.losses[end - 4 : end]) / 4
        assert curve[end] == pytest.approx(mean, rel=1e-6)
    assert rows.curve("weight/b") == dict.fromkeys(curve, 1.0)


def test_an_update_is_written_as_the_report_has_it():
    run, rows = Run(), Rows()
    run.pruner.track(rows)
    masks = {}
    for batch in run.batches:
        before = run.pruner.masks
        run.step(batch)
        masks[run.pruner._clock.step] = before, run.pruner.masks
    report = run.pruner.report()
    assert rows.curve("sparsity/all") == {m.step: m.sparsity for m in report.history}
    for row in report.components:
        assert rows.curve(f"sparsity/component/{row.name}")[8] == row.sparsity
        assert rows.curve(f"kept/component/{row.name}")[8] == row.kept / report.kept
    used = [row for row in report.components if "a" in row.tasks]
    kept, size = sum(row.kept for row in used), sum(row.parameters for row in used)
    assert {row.name for row in used} == {"shared", "a"}
    assert rows.curve("sparsity/task/a")[8] == (size - kept) / size
    assert rows.curve("kept/task/a")[8] == kept / report.kept
    wanted = sum(round(row.want["a"] * row.kept) for row in used)
    assert rows.curve("wanted/task/a")[8] == wanted / kept
    before, after = masks[8]
    both = sum(int((before[n] & after[n]).sum()) for n in after)
    assert rows.curve("iou/all")[8] == both / sum(int((before[n] | after[n]).sum()) for n in after)
    assert 0 < rows.curve("iou/all")[8] < 1
    assert 0 < rows.curve("iou/component/shared")[8] < 1


def test_thresholds_and_weights_of_tasks_are_curves():
    run, rows = Run(replace(recipes.adapmtl(0.5, STEPS), weighting="worst")), Rows()
    run.pruner.track(rows, every=3)
    run.train()
    assert max(rows.curve("threshold/component/shared").values()) > 0
    assert set(rows.curve("weight/a")) >= {3, 6, 9}


def test_weights_that_are_tensors_stay_tensors_until_they_are_written():
    def loudest(losses):
        total = sum(losses.values())
        return {task: loss / total for task, loss in losses.items()}

    run, rows = Run(replace(recipes.adapmtl(0.5, STEPS), weighting=loudest)), Rows()
    run.pruner.track(rows, every=3)
    run.train()
    last = run.losses[-1]
    assert rows.curve("weight/a")[STEPS] == pytest.approx(last["a"] / sum(last.values()))


METHODS = {
    "vote": gradual(),
    "voters": gradual(voters=(recipes.saliency.magnitude,)),
    "together": gradual(disentangled=False),
    "regrow": Vote(0.5, schedule=Regrow(3, 9), allocation="erk", vote=votes.mean),
    "thresholds": recipes.adapmtl(0.5, STEPS),
    "movement": recipes.movement(0.5, STEPS),
    "ranks": recipes.flop(0.4, steps=STEPS),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_that_is_tracked_is_the_run_that_is_not(method, backend):
    plain = Run(method, backend).train()
    tracked, rows = Run(method, backend), Rows()
    tracked.pruner.track(rows, every=1)
    tracked.train()
    assert same(plain.pruner.masks, tracked.pruner.masks)
    assert same(plain.model.state_dict(), tracked.model.state_dict())
    assert rows.curve("sparsity/all")
    assert list(rows.curve("loss/b")) == list(range(1, STEPS + 1))


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers and copies that are asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))

    def count(self):
        waits = ("_local_scalar_dense", "_to_copy", "copy_", "nonzero", "equal")
        return sum(any(wait in name for wait in waits) for name in self.names)


def test_nothing_is_read_between_two_writes():
    counts = []
    for tracked in (False, True):
        run, rows = Run(Vote(0.5, schedule=Cubic(1, 3, 1))), Rows()
        if tracked:
            run.pruner.track(rows, every=1000)
        for batch in run.batches[:4]:
            run.step(batch)
        written = len(rows.rows)
        losses = {"a": run.model["a"](run.model["trunk"](run.batches[0])).mean()}
        with Reads() as reads:
            for _ in range(20):
                run.pruner.observe_losses(losses)
                run.pruner.step()
        counts.append(reads.count())
        assert len(rows.rows) == written
    assert counts == [0, 0]
    with Reads() as reads:  # or the test above could not fail
        float(losses["a"].detach())
    assert reads.count() == 1


@contextmanager
def waiting_is_an_error(device):
    if device.type != "cuda":
        pytest.skip("only a GPU is waited for: set MTPRUNE_TEST_DEVICE=cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_gpu_is_not_waited_for(device):
    run, rows = Run(Vote(0.5, schedule=Cubic(1, 3, 1)), device=device), Rows()
    run.pruner.track(rows, every=2)
    for batch in run.batches[:4]:
        run.step(batch)
    losses = {"a": run.model["a"](run.model["trunk"](run.batches[0].to(device))).mean()}
    with waiting_is_an_error(device):
        for _ in range(20):
            run.pruner.observe_losses(losses)
            run.optimizer.step()
            run.pruner.step()
    run.pruner.finalize()
    assert max(rows.curve("loss/a")) > 20


def test_only_the_first_of_several_processes_writes(monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    run, rows = Run(), Rows()
    run.pruner.track(rows, every=1)
    run.train()
    assert rows.rows == []


def test_pruning_without_a_loop_is_written_too():
    run, rows = Run(recipes.best(0.5)), Rows()
    model = run.model
    run.pruner.finalize()
    losses = {
        "a": lambda out, x: model["a"](out).square().mean(),
        "b": lambda out, x: (model["b"](out) - 1).square().mean(),
    }
    pruner = MultitaskPruner(model, losses, "trunk", method=recipes.best(0.5))
    pruner.track(rows)
    pruner.prune(run.batches, forward=lambda m, x: m["trunk"](x))
    assert list(rows.curve("sparsity/all")) == [0, 1, 2, 3]
    assert list(rows.curve("loss/a")) == [0, 1, 2, 3]


def test_numbers_that_lie_where():
    found = histogram([torch.arange(128.0), torch.tensor([float("nan"), float("inf")])])
    assert found == Histogram([2] * 64, found.edges, 8128.0, float(sum(i * i for i in range(128))))
    assert found.edges[0] == 0.0
    assert found.edges[-1] == 127.0
    assert len(found.edges) == 65
    assert histogram([torch.zeros(3)]).counts[0] == 3
    assert histogram([]) is None
    assert histogram([torch.zeros(0)]) is None


def test_a_large_mask_is_a_picture_of_shares():
    mask = torch.zeros(512, 2, 4, dtype=torch.bool)
    mask[:256] = True
    mask[256, 0, 0] = True
    pixels = picture(mask).pixels
    assert pixels.shape == (256, 8)
    assert pixels[:128].eq(1).all()
    assert pixels[128, 0] == 0.5
    assert pixels[129:].eq(0).all()


def test_what_cannot_be_tracked_is_refused():
    run = Run()
    with pytest.raises(TypeError, match=r"`writer` must be a SummaryWriter, a W&B run, .*Got 3"):
        run.pruner.track(3)
    with pytest.raises(ValueError, match="`every` must be a whole number, at least 1"):
        run.pruner.track(Rows(), every=0)
    with pytest.raises(ValueError, match=r"`layers` names \['c.weight'\]. Prunable here: \['trunk"):
        run.pruner.track(Rows(), layers=["c.weight"])
    run.pruner.finalize()
    with pytest.raises(RuntimeError, match=r"track\(\) was called after finalize\(\)"):
        run.pruner.track(Rows())


class Module:
    """What is used of the module ``mlflow``, whose names of metrics have few characters."""

    __name__ = "mlflow"

    def __init__(self):
        self.metrics, self.images = {}, {}

    def log_metrics(self, metrics, step=None):
        assert all(c.isascii() and (c.isalnum() or c in "_-./ ") for n in metrics for c in n)
        self.metrics[step] = {**self.metrics.get(step, {}), **metrics}

    def log_image(self, image, key, step):
        self.images[key] = image


def test_names_that_mlflow_refuses_are_changed():
    module = Module()
    writer_of(module).log({"mtprune/loss/a[0]:é": 0.5, "h": histogram([torch.ones(1)])}, 3)
    assert module.metrics == {3: {"mtprune/loss/a_0___": 0.5}}
    writer_of(module).log({"m": picture(torch.tensor([[True, False]]))}, 3)
    assert module.images["m"].tolist() == [[255, 0]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    run, rows = Run(), Rows()
    with SummaryWriter(str(tmp_path)) as writer:
        run.pruner.track(writer, every=4, layers=["trunk.0.weight", "a.weight"])
        run.pruner.track(rows, every=4)
        run.train()
    events = EventAccumulator(str(tmp_path), EVERYTHING).Reload()
    tags = events.Tags()
    assert {name for _, row in rows.rows for name in row} == set(tags["scalars"])
    for name in ("loss/a", "sparsity/all", "iou/component/shared", "wanted/task/b"):
        read = {event.step: event.value for event in events.Scalars(f"mtprune/{name}")}
        assert read == pytest.approx(rows.curve(name), rel=1e-6)
    assert set(tags["histograms"]) == {
        f"mtprune/{n}" for n in ("worth", "saliency/a", "saliency/b")
    }
    worth = events.Histograms("mtprune/worth")
    total = sum(mask.numel() for mask in run.pruner.masks.values())
    assert [event.step for event in worth] == [2, 5, 8]
    assert worth[-1].histogram_value.num == sum(worth[-1].histogram_value.bucket) == total
    assert set(tags["images"]) == {"mtprune/mask/trunk.0.weight", "mtprune/mask/a.weight"}
    image = events.Images("mtprune/mask/trunk.0.weight")[-1]
    assert (image.height, image.width) == (8, 4)
    assert zeros(run.pruner.masks) == round(0.5 * total)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
def test_mlflow_reads_what_was_written(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path}")
    mlflow.set_experiment("pruning")
    run, rows = Run(), Rows()
    with mlflow.start_run() as active:
        run.pruner.track(mlflow, every=4)
        run.pruner.track(rows, every=4)
        run.train()
    history = mlflow.MlflowClient().get_metric_history(active.info.run_id, "mtprune/loss/a")
    assert {m.step: m.value for m in history} == pytest.approx(rows.curve("loss/a"))
    assert [path.suffix for path in tmp_path.rglob("images/*") if path.suffix == ".png"]


def wandb_records(data):
    """The records of a run's file: blocks of 32 KiB, with parts of a crc, a size and a kind."""
    found, rest, place = [], b"", 7
    while place + 7 <= len(data):
        left = -place % 32768
        if 0 < left < 7:  # too little for a part
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        rest += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the whole of one, or the last part
            found.append(rest)
            rest = b""
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
def test_wandb_reads_what_was_written(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_SILENT", "true")
    run, rows = Run(), Rows()
    offline = wandb.init(mode="offline", dir=str(tmp_path), project="mtprune")
    offline.log({"mine": 1.0}, step=100)  # its steps count rows, and are the user's
    run.pruner.track(offline, every=4)
    run.pruner.track(rows, every=4)
    run.train()
    offline.finish()
    wandb.teardown()  # waits for the file
    found = []
    for data in wandb_records(next(tmp_path.rglob("*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField("history"):
            items = record.history.item
            found.append({"/".join(i.nested_key) or i.key: i.value_json for i in items})
    curve = {
        int(r["mtprune/step"]): float(r["mtprune/loss/a"]) for r in found if "mtprune/loss/a" in r
    }
    assert curve == pytest.approx(rows.curve("loss/a"))
    kinds = {name: row[name] for row in found for name in row if name.endswith("/_type")}
    assert kinds["mtprune/worth/_type"] == '"histogram"'
    assert kinds["mtprune/mask/trunk.2.weight/_type"] == '"image-file"'


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
def test_lightning_loggers_read_what_was_written(tmp_path):
    pytest.importorskip("lightning")
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, rows = Run(), Rows()
    table = CSVLogger(tmp_path / "csv")
    board = TensorBoardLogger(tmp_path / "board")
    for writer in (table, board, rows):
        run.pruner.track(writer, every=4)
    run.train()
    table.save()
    board.experiment.close()
    text = (next(tmp_path.rglob("metrics.csv"))).read_text().splitlines()
    column = text[0].split(",").index("mtprune/loss/a")
    assert [float(x) for line in text[1:] if (x := line.split(",")[column])] == pytest.approx(
        list(rows.curve("loss/a").values())
    )
    events = EventAccumulator(board.log_dir, EVERYTHING).Reload()
    assert [event.step for event in events.Scalars("mtprune/sparsity/all")] == [2, 5, 8]
    assert [event.step for event in events.Histograms("mtprune/worth")] == [2, 5, 8]
