import pytest
import torch

from mtprune.observing.losses import check_devices, compute, given, parse, scalar


def loss(outputs, batch):
    return outputs - batch


# --- Declaring -----------------------------------------------------------------------------------


def test_tasks_keep_their_order_and_their_functions():
    parsed = parse({"seg": loss, "depth": max})
    assert list(parsed.items()) == [("seg", loss), ("depth", max)]


@pytest.mark.parametrize("names", [["seg", "depth"], ("seg", "depth")])
def test_names_alone_declare_tasks_whose_losses_the_caller_computes(names):
    assert parse(names) == {"seg": None, "depth": None}


def test_one_task_is_enough():
    assert parse(["seg"]) == {"seg": None}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        pytest.param({}, ValueError, "`task_losses` is empty: name at least one", id="no task"),
        pytest.param([], ValueError, "`task_losses` is empty: name at least one", id="no name"),
        pytest.param(
            ["a", "b", "a"], ValueError, r"names a task twice: \['a', 'b', 'a'\]", id="twice"
        ),
        pytest.param(
            {"seg": 1.0}, TypeError, r"Loss of task 'seg' must be a function", id="number"
        ),
        pytest.param({"seg": None}, TypeError, r"Loss of task 'seg' must be a function", id="None"),
        pytest.param(
            {0: loss}, TypeError, "A task's name must be a non-empty string. Got 0", id="0"
        ),
        pytest.param([""], TypeError, "A task's name must be a non-empty string. Got ''", id="''"),
        pytest.param("seg", TypeError, "maps names to functions, .* Got 'seg'", id="a string"),
        pytest.param(loss, TypeError, "maps names to functions", id="a function"),
        pytest.param({"a", "b"}, TypeError, "maps names to functions", id="a set has no order"),
    ],
)
def test_what_declares_no_tasks_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        parse(given)


# --- Computing -----------------------------------------------------------------------------------

DECLARED = {"a": lambda o, b: o + b, "b": lambda o, b: o * b, "c": lambda o, b: o}


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        pytest.param(None, {"a": 5, "b": 6, "c": 2}, id="all"),
        pytest.param(["c", "a"], {"a": 5, "c": 2}, id="some, in declared order"),
        pytest.param("b", {"b": 6}, id="a single name"),
        pytest.param([], {}, id="none"),
    ],
)
def test_losses_are_what_their_functions_return(only, expected):
    losses = compute(DECLARED, 2, 3, only)
    assert list(losses.items()) == list(expected.items())


def test_functions_of_tasks_not_asked_for_are_not_called():
    assert compute({"a": loss, "b": lambda o, b: 1 / 0}, 3, 1, ["a"]) == {"a": 2}


def test_an_unknown_task_is_named_with_those_declared():
    with pytest.raises(
        ValueError, match=r"`tasks` names \['x'\]. Declared tasks: \['a', 'b', 'c'\]"
    ):
        compute(DECLARED, 2, 3, ["a", "x"])


def test_a_task_without_a_function_points_to_observe_losses():
    with pytest.raises(
        RuntimeError, match=r"'b' was declared without a loss function.*observe_los"
    ):
        compute({"a": loss, "b": None}, 2, 3, None)


# --- Given ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        pytest.param({"b": 2, "a": 1}, {"a": 1, "b": 2}, id="a mapping in any order"),
        pytest.param({"b": 2, "total": 3}, {"b": 2}, id="undeclared keys ignored, one absent"),
        pytest.param([1, 2], {"a": 1, "b": 2}, id="a list in declared order"),
        pytest.param((1, 2), {"a": 1, "b": 2}, id="a tuple"),
    ],
)
def test_losses_are_found_by_name_or_by_order(losses, expected):
    found = given(["a", "b"], losses)
    assert list(found.items()) == list(expected.items())


def test_a_vector_of_losses_is_taken_apart_with_its_graph(device):
    weight = torch.tensor(2.0, device=device, requires_grad=True)
    found = given(["a", "b"], torch.stack([weight * 3, weight * 5]))
    assert {name: loss.item() for name, loss in found.items()} == {"a": 6.0, "b": 10.0}
    assert torch.autograd.grad(found["b"], weight)[0].item() == 5.0


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        pytest.param(
            {"total": 1},
            ValueError,
            r"none of the declared tasks \['a', 'b'\]\. Got keys \['total'\]",
            id="no declared key",
        ),
        pytest.param(
            [1], ValueError, r"one loss per task, in the order \['a', 'b'\]\. Got 1", id="too few"
        ),
        pytest.param(torch.ones(3), ValueError, r"one loss per task.* Got 3", id="a long vector"),
        pytest.param(torch.ones(2, 2), TypeError, r"Got a tensor of shape \(2, 2\)", id="a matrix"),
        pytest.param(torch.tensor(1.0), TypeError, r"Got a tensor of shape \(\)", id="their sum"),
        pytest.param(1.5, TypeError, r"mapping task -> loss, .* Got float 1.5", id="a number"),
    ],
)
def test_what_does_not_say_whose_losses_it_holds_is_refused(losses, error, message):
    with pytest.raises(error, match=message):
        given(["a", "b"], losses)


# --- One loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_of_any_shape_is_a_scalar(shape, device):
    weight = torch.full(shape, 3.0, device=device, requires_grad=True)
    result = scalar("seg", weight * 2)
    assert result is not None
    assert (result.shape, result.item()) == ((), 6.0)
    result.backward()
    assert weight.grad is not None


def test_a_list_of_losses_is_summed_and_constants_in_it_are_left_out(device):
    weight = torch.tensor(3.0, device=device, requires_grad=True)
    result = scalar("seg", [weight, (weight * 2).reshape(1), torch.tensor(9.0), 4])
    assert result is not None
    assert (result.shape, result.item()) == ((), 9.0)


@pytest.mark.parametrize(
    "absent",
    [
        pytest.param(0.0, id="a number"),
        pytest.param(0, id="a whole number"),
        pytest.param(torch.tensor(1.0), id="a tensor without a graph"),
        pytest.param([], id="an empty list"),
        pytest.param([torch.tensor(1.0), 2.0], id="a list of constants"),
    ],
)
def test_a_loss_without_a_graph_is_an_absent_task(absent):
    assert scalar("seg", absent) is None


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        pytest.param(
            torch.ones(16, 1, requires_grad=True),
            ValueError,
            r"Loss of task 'depth' must be a scalar\. Got shape \(16, 1\)\. "
            r"Reduce it, e\.g\. with \.mean\(\)",
            id="not reduced",
        ),
        pytest.param(
            torch.ones(3), ValueError, r"must be a scalar\. Got shape \(3,\)", id="nor a graph"
        ),
        pytest.param(
            [torch.ones(2, requires_grad=True)], ValueError, r"Got shape \(2,\)", id="in a list"
        ),
        pytest.param("1.0", TypeError, r"must be a scalar tensor\. Got str '1\.0'", id="a string"),
        pytest.param(None, TypeError, r"Loss of task 'depth' .* Got NoneType None", id="None"),
        pytest.param({"x": 1}, TypeError, r"must be a scalar tensor\. Got dict", id="a mapping"),
    ],
)
def test_what_is_no_scalar_names_its_task(value, error, message):
    with pytest.raises(error, match=message):
        scalar("depth", value)


def test_a_loss_elsewhere_than_the_model_is_refused():
    here, meta = torch.device("cpu"), torch.device("meta")
    losses = {"seg": torch.ones(()), "depth": torch.ones((), device=meta)}
    check_devices(losses, {here, meta})
    with pytest.raises(ValueError, match=r"Loss of task 'depth' is on meta, the model on cpu\."):
        check_devices(losses, {here})


def test_a_task_that_is_misspelt_is_no_task_that_sits_out():
    with pytest.raises(ValueError, match=r"'sge', which is no task\. Did you mean 'seg'"):
        given(("seg", "depth"), {"sge": 1, "depth": 2})
    assert given(("seg", "depth"), {"seg": 1, "segs": 3, "depth": 2}) == {
        "seg": 1,
        "depth": 2,
    }
