"""Budgets in time, against timetables written by hand and all allocations there are."""

import itertools
import json
import warnings

import pytest
import torch
from torch import nn

import mtprune
from mtprune import Channel, Cubic, Element, Head, MultitaskPruner, Neuron, Regrow, Vote, votes
from mtprune.allocation import Erk
from mtprune.compression import pricing
from mtprune.latency import Latency, Pace, Timetable, timetable
from mtprune.selection import knapsack, rank, worths
from tests.ranks import on_ranks

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))

PAYS = ((0.1, 1.0), (0.5, 4.0), (1.0, 8.0))
NEVER = ((0.1, 8.0), (1.0, 8.0))


def table(**curves):
    """A timetable of the layers of `net`."""
    names = {"first": "0.weight", "second": "2.weight", "third": "4.weight"}
    return Timetable({names[key]: curve for key, curve in curves.items()}, fixed_ms=2.0)


def net(*widths):
    torch.manual_seed(0)
    first, second = widths or (10, 10)
    return nn.Sequential(
        nn.Linear(6, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 4)
    )


LOSSES = {
    "left": lambda out, batch: out[:, :2].square().mean(),
    "right": lambda out, batch: (out[:, 2:] - 1).abs().mean(),
}


def pruned(model, method, **options):
    pruner = MultitaskPruner(model, LOSSES, method=method, **options)
    pruner.prune([X], progress=False)
    return pruner


def kept(pruner):
    return {name: int(mask.sum()) for name, mask in pruner.masks.items()}


class TestKnapsack:
    @pytest.mark.parametrize("seed", range(20))
    def test_it_finds_the_best_of_all_combinations(self, seed):
        random = torch.Generator().manual_seed(seed)
        sizes = torch.randint(1, 5, (5,), generator=random).tolist()
        costs = [torch.rand(n, generator=random).tolist() for n in sizes]
        damages = [torch.rand(n, generator=random).tolist() for n in sizes]
        room = 0.5 * sum(map(max, costs)) + 0.5 * sum(map(min, costs))
        found = knapsack(costs, damages, room)

        def total(of, choice):
            return sum(own[number] for own, number in zip(of, choice, strict=True))

        every = itertools.product(*map(range, sizes))
        best = min(total(damages, c) for c in every if total(costs, c) <= room)
        assert total(damages, found) == pytest.approx(best)
        assert total(costs, found) <= room

    def test_many_options_still_fit_and_are_near_the_best(self):
        random = torch.Generator().manual_seed(0)
        costs = [[float(c) for c in torch.rand(200, generator=random).sort()[0]] for _ in range(30)]
        damages = [[(1 - cost) ** 2 for cost in own] for own in costs]
        found = knapsack(costs, damages, 15.0)
        spent = sum(own[number] for own, number in zip(costs, found, strict=True))
        lost = sum(own[number] for own, number in zip(damages, found, strict=True))
        assert 14.9 < spent <= 15.0
        assert lost <= 30 * 0.25 * 1.02  # all alike would be the best there is without a grid

    def test_what_can_not_fit_is_refused(self):
        with pytest.raises(ValueError, match="cheapest cost 3 together, and there is room for 2"):
            knapsack([[1.0, 5.0], [2.0]], [[1.0, 0.0], [0.0]], 2.0)


class TestTimetable:
    def test_it_adds_up_and_interpolates(self):
        of = table(first=PAYS, second=NEVER)
        assert of.dense_ms == 18.0
        assert of.ms({"0.weight": 0.3, "2.weight": 0.3}) == pytest.approx(2.0 + 2.5 + 8.0)
        assert of.ms({"0.weight": 0.01}) == pytest.approx(2.0 + 1.0 + 8.0)  # as at the least
        assert of.layer_ms("unknown", [0.5]) == [0.0]

    def test_it_is_json(self, tmp_path):
        of = Timetable({"a": [(0.5, 1), (1, 2.5)]}, 0.25, "units", "cpu", 2)
        of.save(tmp_path / "times.json")
        assert Timetable.load(tmp_path / "times.json") == of
        (tmp_path / "times.json").write_text('{"layers": {"a": [[0.5, "1"]]}}')
        with pytest.raises(ValueError, match=r"'layers\.a\.0\.1' must be a finite number"):
            Timetable.load(tmp_path / "times.json")
        (tmp_path / "times.json").write_text('{"layers": {"a": [[0.5, 1.0]]}}')
        with pytest.raises(ValueError, match="holds a timetable that cannot be"):
            Timetable.load(tmp_path / "times.json")

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ({"a": [(0.5, 1.0)]}, r"`layers` of layer 'a' must have shares that rise"),
            ({"a": [(1.0, 1.0), (0.5, 1.0)]}, "must have shares that rise"),
            ({"a": [(0.0, 1.0), (1.0, 1.0)]}, "must have shares that rise"),
            ({"a": []}, "must have shares that rise"),
            ({"a": [(1.0, -1.0)]}, "times of at least 0 ms"),
            ({"a": [(1.0, 0.0)]}, "more than 0 ms"),
            ({"a": [1.0]}, "must be pairs"),
            ({"a": [(1.0, "x")]}, "must be pairs"),
            ([], "must be a mapping layer"),
        ],
    )
    def test_what_is_no_timetable_is_refused(self, layers, message):
        with pytest.raises((ValueError, TypeError), match=message):
            Timetable(layers)


class TestWeights:
    def test_layers_that_do_not_pay_stay_dense(self):
        of = table(first=PAYS, second=NEVER, third=NEVER)
        pruner = pruned(net(), Vote(latency=Latency(0.8, of)))
        # 5.2 of its 8 ms go: 2.8 are those of a share of 0.34.
        assert kept(pruner) == {"0.weight": 20, "2.weight": 100, "4.weight": 40}
        report = pruner.report()
        assert report.timing.asked_ms == pytest.approx(0.8 * 26)
        assert report.timing.predicted_ms <= report.timing.asked_ms
        assert "Time: 20.8 ms asked of 26 ms dense, 20." in str(report)
        assert report.to_dict()["timing"]["dense_ms"] == 26.0

    @pytest.mark.parametrize("asked", [0.35, 0.5, 0.75])
    @pytest.mark.parametrize("vote", [votes.unanimous, votes.mean])
    def test_no_other_densities_do_less_damage(self, asked, vote):
        """All numbers of weights of three small layers that fit into the time."""
        steps = ((0.2, 1.0), (0.5, 1.5), (0.75, 6.0), (1.0, 6.0))
        of = Timetable({"0.weight": PAYS, "2.weight": steps, "4.weight": PAYS}, 1.0)
        model = net(2, 3)
        seen = {}
        method = Vote(latency=Latency(asked, of), vote=vote, allocation="global")
        pruner = MultitaskPruner(model, LOSSES, method=method)
        pruner._show = lambda ballot: seen.setdefault("scores", ballot.scores)
        pruner.prune([X], progress=False)
        worth = worths(seen["scores"], vote, rank(seen["scores"]))
        names, sizes = list(of.layers), [12, 6, 12]
        worth = [w + 1 / 30 for w in worth]  # the least is worth something, too
        lost = [torch.cat([w.new_zeros(1), w.sort()[0].cumsum(0)]).flip(0).tolist() for w in worth]
        least = [max(1, round(of.least(n) * size)) for n, size in zip(names, sizes, strict=True)]

        def ms(counts):
            return of.ms({n: c / s for n, c, s in zip(names, counts, sizes, strict=True)})

        def damage(counts):
            return sum(own[count] for own, count in zip(lost, counts, strict=True))

        ranges = [range(low, size + 1) for low, size in zip(least, sizes, strict=True)]
        fitting = [c for c in itertools.product(*ranges) if ms(c) <= asked * of.dense_ms + 1e-9]
        found = list(kept(pruner).values())
        assert ms(found) <= asked * of.dense_ms + 1e-9
        assert damage(found) == pytest.approx(min(map(damage, fitting)))

    def test_each_layer_keeps_its_best(self):
        pruner = pruned(net(), Vote(latency=Latency(0.5, table(first=PAYS, second=PAYS))))
        alone = pruner.report().layers
        assert all(0 < row.kept < row.parameters for row in alone[:2])
        assert alone[2].kept == 40  # no time is known of it

    def test_the_allocation_makes_sure_of_some(self):
        """Without, one layer would give nearly all its weights."""
        of = Timetable(
            {"0.weight": ((0.02, 0.0), (1.0, 20.0)), "2.weight": ((0.02, 0.0), (1.0, 2.0))}
        )
        alone, sure = (
            pruned(net(), Vote(latency=Latency(0.2, of), allocation=a)).report().layers
            for a in ("global", "floor")
        )
        assert alone[0].kept < sure[0].kept
        assert sure[0].kept >= 10

    def test_the_same_table_gives_the_same_masks(self):
        method = Vote(latency=Latency(0.5, table(first=PAYS, second=PAYS, third=PAYS)))
        back = mtprune.method_from(json.loads(json.dumps(method.to_dict())))
        one, two = (pruned(net(), m).masks for m in (method, back))
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_a_schedule_gets_there_step_by_step(self):
        of = table(first=PAYS, second=PAYS, third=PAYS)
        model = net()
        schedule = Cubic(begin=1, end=5, every=2)
        method = Vote(latency=Latency(0.4, of), schedule=schedule)
        pruner = MultitaskPruner(model, LOSSES, method=method)
        counts = []
        for step in range(6):
            pruner.observe(model(X), X)
            if pruner.step():
                counts.append(sum(kept(pruner).values()))
            if step == 3:
                state = pruner.state_dict()
        assert counts == sorted(counts, reverse=True)
        assert len(counts) == 2  # at the first update nothing is due yet
        timing = pruner.report().timing
        assert timing.predicted_ms <= timing.asked_ms
        again = MultitaskPruner(net(), LOSSES, method=method)
        again.load_state_dict(state)
        assert again.report().timing is not None
        state["memory"] = {"latency": {"correction": "1"}}
        with pytest.raises(ValueError, match="memory"):
            MultitaskPruner(net(), LOSSES, method=method).load_state_dict(state)


class TestUnits:
    def test_neurons_fit_into_the_time(self):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(6, 2, 40, batch_first=True)
        model.eval()
        curve = ((0.1, 1.0), (1.0, 10.0))
        of = Timetable({"linear1.weight": curve, "linear2.weight": curve}, 5.0, of="units")
        losses = {task: lambda out, batch: out.square().mean() for task in ("a", "b")}
        method = Vote(latency=Latency(0.5, of), granularity=Neuron())
        pruner = MultitaskPruner(model, losses, method=method)
        report = pruner.prune([X[:, None]], progress=False)
        # 12.5 of 25 ms: 7.5 ms for both, so 3.75 each, a share of .375: 15 of 40.
        assert [(row.units, row.kept) for row in report.groups] == [(40, 15)]
        assert report.timing.predicted_ms == pytest.approx(12.5)

    def test_steps_of_a_curve_count(self):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(6, 2, 40, batch_first=True)
        model.eval()
        curve = ((0.1, 1.0), (0.5, 1.0), (0.501, 9.0), (1.0, 10.0))
        of = Timetable({"linear1.weight": curve, "linear2.weight": curve}, 5.0, of="units")
        losses = {task: lambda out, batch: out.square().mean() for task in ("a", "b")}
        method = Vote(latency=Latency(0.5, of), granularity=(Head(), Neuron()))
        pruner = MultitaskPruner(model, losses, method=method)
        kept = {row.name: row.kept for row in pruner.prune([X[:, None]], progress=False).groups}
        assert kept == {"neurons": 20, "self_attn.heads": 2}  # no time is known of heads


class TestTrials:
    """Choices are tried where nothing but the clock is known; here it is a function of masks."""

    def tried(self, monkeypatch, of, took, asked=0.5, **options):
        asked_for = []

        def clock(masks):
            shares = {name: float(mask.float().mean()) for name, mask in masks.items()}
            asked_for.append(shares)
            return took(of.ms(shares) / of.dense_ms)

        monkeypatch.setattr(pricing, "paced", lambda *args: Pace(of, clock))
        method = Vote(latency=asked, example_inputs=X, **options)
        return pruned(net(40, 40), method).report(), asked_for

    OF = table(first=PAYS, second=PAYS, third=PAYS)

    def test_what_is_measured_corrects_what_is_asked(self, monkeypatch):
        report, tries = self.tried(monkeypatch, self.OF, lambda share: 0.8 * share)
        timing = report.timing
        assert timing.measured_ms == pytest.approx(timing.asked_ms, rel=0.02)
        assert timing.predicted_ms == pytest.approx(timing.asked_ms / 0.8, rel=0.02)
        assert timing.correction == pytest.approx(1.25, rel=0.02)
        assert len(tries) <= 3
        assert "measured with these masks" in str(report)

    def test_a_right_timetable_is_tried_once(self, monkeypatch):
        report, tries = self.tried(monkeypatch, self.OF, lambda share: share)
        assert len(tries) == 1
        assert report.timing.correction == 1.0

    def test_a_time_that_rises_steeply_is_found(self, monkeypatch):
        report, tries = self.tried(monkeypatch, self.OF, lambda share: max(0.1, 3 * share - 0.85))
        assert report.timing.measured_ms == pytest.approx(report.timing.asked_ms, rel=0.02)
        assert len(tries) <= 4

    def test_of_a_time_that_jumps_the_nearest_stays(self, monkeypatch):
        report, tries = self.tried(monkeypatch, self.OF, lambda s: s if s > 0.7 else 0.6 * s)
        assert len(tries) == 6
        assert 0.36 < report.timing.share <= 0.42

    def test_what_cannot_be_reached_is_told(self, monkeypatch):
        with pytest.warns(UserWarning, match="asks for 13 ms of 26 ms, and the compressed model"):
            self.tried(monkeypatch, self.OF, lambda share: max(0.7, share))

    def test_the_first_and_the_last_update_are_tried(self, monkeypatch):
        tries = []

        def clock(masks):
            tries.append(sum(int(mask.sum()) for mask in masks.values()))
            return 0.5

        monkeypatch.setattr(pricing, "paced", lambda *args: Pace(self.OF, clock))
        schedule = Cubic(begin=0, end=4, every=1)
        model = net()
        pruner = MultitaskPruner(
            model, LOSSES, method=Vote(latency=0.5, example_inputs=X, schedule=schedule)
        )
        for _ in range(5):
            pruner.observe(model(X), X)
            pruner.step()
        assert len(tries) == 2


@pytest.mark.parametrize("granularity", [Element(), Neuron(), (Head(), Neuron())], ids=str)
def test_a_small_model_is_measured_and_pruned(granularity):
    """All the time there is: what is measured is nobody's business here."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    losses = {task: lambda out, batch: out.square().mean() for task in ("a", "b")}
    x = torch.randn(2, 3, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = Vote(latency=1.0, example_inputs=x, granularity=granularity)
    pruner = MultitaskPruner(model, losses, method=method)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`latency` asks")  # a busy machine
        report = pruner.prune([x], progress=False)
    assert report.timing.measured_ms > 0
    assert report.timing.dense_ms > 0


def test_a_timetable_tells_of_the_layers_that_are_pruned():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 3, 16)
    calls = []

    def even(functions):
        calls.append(len(functions))
        for function in functions:
            function()
        return [1.0] * len(functions)

    of = timetable(model, x, Neuron(), shares=[0.5, 0.25], measure=even)
    assert of.of == "units"
    assert set(of.layers) == {"linear1.weight", "linear2.weight"}
    assert [share for share, _ in of.layers["linear1.weight"]] == [0.25, 0.5, 1.0]
    assert of.dense_ms == pytest.approx(1.0)
    weights = timetable(model, x, shares=[0.5, 0.25], exclude="linear2", measure=even)
    assert "linear2.weight" not in weights.layers
    assert "linear1.weight" in weights.layers
    assert weights.dense_ms == pytest.approx(1.0)
    assert calls


class TestRefused:
    OF = table(first=PAYS, second=PAYS)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"latency": 0.5}, "`latency` needs `example_inputs`"),
            ({"latency": 50, "example_inputs": X}, r"in \(0, 1\]. Got 50. Did you mean 0.5"),
            ({"latency": 0, "example_inputs": X}, r"in \(0, 1\]. Got 0"),
            ({"latency": "fast", "example_inputs": X}, "`latency` must be a number"),
            ({"latency": 0.5, "sparsity": 0.5}, "One of .* Got sparsity and latency"),
            ({"latency": 0.5, "macs": 0.5}, "One of .* Got macs and latency"),
            ({"latency": 0.5, "example_inputs": X, "allocation": Erk()}, "can only make sure of"),
            ({"latency": 0.5, "example_inputs": X, "observations": "auto"}, "decides anew"),
            ({"latency": 0.5, "example_inputs": X, "schedule": Regrow(1, 9)}, "Regrow"),
            ({"latency": 0.5, "granularity": mtprune.Block(2, 2)}, "for single weights, and for"),
            ({"latency": 0.5, "granularity": mtprune.Expert()}, "for single weights, and for"),
            ({"latency": 0.5, "granularity": mtprune.NM()}, "fixes the sparsity"),
        ],
    )
    def test_when_it_is_built(self, options, message):
        with pytest.raises((ValueError, TypeError), match=message):
            Vote(**options)

    def test_a_timetable_that_is_none(self):
        with pytest.raises(TypeError, match=r"`times` must be a mtprune\.latency\.Timetable"):
            Latency(0.5, {"a": 1})

    @pytest.mark.parametrize(
        ("share", "of", "message"),
        [
            (0.1, OF, r"asks for 10.0% .* takes 22.2% with the least of single weights"),
            (0.5, Timetable({"other": PAYS}), "knows none of the layers"),
            (0.5, Timetable({"0.weight": PAYS}, of="units"), "is of units, and single weights"),
        ],
    )
    def test_on_a_model(self, share, of, message):
        with pytest.raises(ValueError, match=message):
            MultitaskPruner(net(), LOSSES, method=Vote(latency=Latency(share, of)))

    def test_channels_take_the_inputs_that_found_them(self):
        assert Vote(latency=0.5, granularity=Channel(X)).inputs_to_measure is X


def on_the_first(rank):
    """A clock for the first rank alone, by which all but the dense are twice as fast."""

    def measure(functions):
        assert rank == 0
        for function in functions:
            function()
        return [2.0] + [1.0] * (len(functions) - 1)

    return measure


def broken(functions):
    raise ZeroDivisionError("no clock")


def ranked(rank, world):
    model = net(40, 40)
    x = X.chunk(world)[rank]
    latency = Latency(0.5, measure=on_the_first(rank))
    pruner = MultitaskPruner(model, LOSSES, method=Vote(latency=latency, example_inputs=X))
    report = pruner.prune([x], progress=False)
    pruner.finalize()
    said = ""
    try:
        method = Vote(latency=Latency(0.5, measure=broken), example_inputs=X)
        MultitaskPruner(model, LOSSES, method=method)
    except (RuntimeError, ZeroDivisionError) as error:
        said = str(error)
    return {"masks": pruner.masks, "timing": report.to_dict()["timing"], "said": said}


@pytest.mark.slow
def test_the_first_rank_measures_for_all(tmp_path):
    one, two = on_ranks(__name__, "ranked", tmp_path)
    assert one["timing"] == two["timing"]
    assert one["timing"]["measured_ms"] == pytest.approx(one["timing"]["asked_ms"])
    assert all(torch.equal(mask, two["masks"][name]) for name, mask in one["masks"].items())
    assert sum(int(mask.sum()) for mask in one["masks"].values()) < 2000
    assert "ZeroDivisionError: no clock" in one["said"]
    assert one["said"] == two["said"]
