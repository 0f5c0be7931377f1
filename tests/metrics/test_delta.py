import pytest

from mtprune.metrics import delta_t

# NYU-v2, MobileNetV2 at 90 %: the published table of AdapMTL.
METRICS = {
    "seg": ["miou", "pixel accuracy"],
    "normal": ["mean", "median", "11.25", "22.5", "30"],
    "depth": ["abs", "rel", "1.25", "1.25^2", "1.25^3"],
}
LOWER = {"normal": {"mean", "median"}, "depth": {"abs", "rel"}}


def row(seg, normal, depth):
    values = {"seg": seg, "normal": normal, "depth": depth}
    return {task: dict(zip(METRICS[task], values[task], strict=True)) for task in METRICS}


DENSE = row([19.94, 48.71], [17.85, 16.21, 29.77, 72.19, 86.19], [0.64, 0.24, 58.93, 86.27, 96.16])
TABLE = {
    "SNIP": (
        row([18.96, 46.93], [18.33, 16.97, 28.93, 71.21, 85.78], [0.64, 0.25, 56.75, 85.71, 95.33]),
        (-8.57, -12.03, -9.38, -9.99),
        -2.86,
    ),
    "LTH": (
        row([19.14, 47.25], [17.67, 16.32, 29.67, 72.15, 86.22], [0.65, 0.25, 57.68, 85.89, 96.13]),
        (-7.01, -0.03, -8.32, -5.12),
        -1.72,
    ),
    "IMP": (
        row([18.76, 48.12], [18.71, 16.68, 29.63, 71.76, 85.91], [0.64, 0.23, 59.75, 86.52, 96.31]),
        (-7.13, -9.11, 6.00, -3.41),
        -1.40,
    ),
    "DiSparse": (
        row([19.87, 48.83], [17.92, 16.79, 29.87, 71.76, 85.64], [0.65, 0.24, 58.42, 85.72, 96.28]),
        (-0.10, -4.87, -2.94, -2.64),
        -0.54,
    ),
    "AdapMTL without adaptive thresholds": (
        row([18.93, 47.51], [18.16, 16.87, 28.37, 71.53, 86.63], [0.65, 0.24, 58.26, 85.82, 95.92]),
        (-7.53, -10.91, -3.47, -7.30),
        -2.21,
    ),
    "AdapMTL": (
        row([20.16, 49.14], [17.53, 15.96, 30.16, 72.36, 86.51], [0.64, 0.24, 59.03, 86.57, 96.38]),
        (1.99, 5.25, 0.75, 2.66),
        0.73,
    ),
}
CENT = 0.01 + 1e-9


@pytest.mark.parametrize("model", TABLE)
def test_sums_give_the_published_table(model):
    results, published, _ = TABLE[model]
    change = delta_t(results, DENSE, LOWER, reduction="sum")
    assert [*change.tasks.values(), change.overall] == pytest.approx(published, abs=CENT)
    assert list(change.tasks) == ["seg", "normal", "depth"]


@pytest.mark.parametrize("model", TABLE)
def test_means_give_each_task_its_sum_over_its_metrics(model):
    results, _, overall = TABLE[model]
    change = delta_t(results, DENSE, LOWER)
    sums = delta_t(results, DENSE, LOWER, reduction="sum").tasks
    assert change.tasks == pytest.approx({t: sums[t] / len(METRICS[t]) for t in METRICS})
    assert change.overall == pytest.approx(overall, abs=CENT)


def test_no_change_is_zero():
    change = delta_t(DENSE, DENSE, LOWER)
    assert change.overall == 0
    assert change.tasks == {"seg": 0, "normal": 0, "depth": 0}


def test_a_lower_error_is_as_good_as_a_higher_score():
    base = {"a": {"score": 2.0, "error": 4.0}}
    better = {"a": {"score": 3.0, "error": 3.0}}
    assert delta_t(better, base, {"a": ["error"]}).tasks == {"a": (50 + 25) / 2}
    assert delta_t(better, base).tasks == {"a": (50 - 25) / 2}


def test_the_sign_of_the_baseline_does_not_turn_better_into_worse():
    # A log-likelihood that rises from -2 to -1, and a loss that does.
    assert delta_t({"a": {"x": -1.0}}, {"a": {"x": -2.0}}).overall == 50
    assert delta_t({"a": {"x": -1.0}}, {"a": {"x": -2.0}}, {"a": {"x"}}).overall == -50


def test_a_tasks_metrics_are_averaged_before_the_tasks_are():
    base = {"a": {"x": 1.0}, "b": {"x": 1.0, "y": 1.0, "z": 1.0}}
    results = {"a": {"x": 2.0}, "b": {"x": 1.0, "y": 1.0, "z": 1.0}}
    assert delta_t(results, base).overall == 50


def test_the_order_of_tasks_and_metrics_does_not_matter():
    results, published, _ = TABLE["IMP"]
    turned = {t: dict(reversed(m.items())) for t, m in reversed(results.items())}
    change = delta_t(turned, DENSE, LOWER, reduction="sum")
    assert [change.tasks[t] for t in METRICS] == pytest.approx(published[:3], abs=CENT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ({"a": {"x": 1}}, {"b": {"x": 1}}),
            r"must hold the same tasks\. Got \['a'\] and \['b'\]",
            id="other tasks",
        ),
        pytest.param(({}, {}), "must hold the same tasks", id="no tasks"),
        pytest.param(
            ({"a": {"x": 1}}, {"a": {"y": 1}}),
            r"Task 'a' must have the same metrics in both\. Got \['x'\] and \['y'\]",
            id="other metrics",
        ),
        pytest.param(({"a": {}}, {"a": {}}), "Task 'a' must have the same metrics", id="no metric"),
        pytest.param(
            ({"a": {"x": 1}}, {"a": {"x": 0}}),
            "'x' of task 'a' is 0 in the baseline",
            id="zero baseline",
        ),
        pytest.param(
            ({"a": {"x": 1}}, {"a": {"x": 1}}, {"a": {"y"}}),
            r"`lower_is_better` names what `results` does not hold: \['a: y'\]",
            id="unknown metric",
        ),
        pytest.param(
            ({"a": {"x": 1}}, {"a": {"x": 1}}, {"b": {"x"}}),
            r"does not hold: \['b: x'\]",
            id="unknown task",
        ),
        pytest.param(
            ({"a": {"x": 1}}, {"a": {"x": 1}}, None, "median"),
            "`reduction` must be 'mean' or 'sum'. Got 'median'",
            id="unknown reduction",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        delta_t(*arguments)
