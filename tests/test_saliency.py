import pytest
import torch

from mtprune import saliency

WEIGHT = [2.0, -3.0, 0.0, 0.5]
GRAD = [0.5, 1.0, -4.0, -2.0]
WEIGHTED = [2.0, 9.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(saliency.taylor, [1.0, 3.0, 0.0, 1.0], id="taylor is |w g|"),
        pytest.param(saliency.snip, [1.0, 3.0, 0.0, 1.0], id="snip is |w g|"),
        pytest.param(saliency.taylor_magnitude, WEIGHTED, id="taylor_magnitude is w^2 |g|"),
        pytest.param(saliency.fisher, [1.0, 9.0, 0.0, 1.0], id="fisher is (w g)^2"),
        pytest.param(saliency.gradient, [0.5, 1.0, 4.0, 2.0], id="gradient is |g|"),
        pytest.param(saliency.movement, [-1.0, 3.0, 0.0, 1.0], id="movement is -w g"),
        pytest.param(saliency.magnitude, [2.0, 3.0, 0.0, 0.5], id="magnitude is |w|"),
    ],
)
def test_each_formula_on_four_weights(function, expected, device):
    weight = torch.tensor(WEIGHT, device=device).view(2, 2)
    grad = torch.tensor(GRAD, device=device).view(2, 2)
    result = function(weight, grad)
    assert result.shape == (2, 2)
    assert result.flatten().tolist() == expected
    assert weight.flatten().tolist() == WEIGHT
    assert grad.flatten().tolist() == GRAD


def test_movement_ranks_a_growing_weight_above_a_shrinking_one():
    # Descent moves w by -g: the first grows in size, the second shrinks towards zero.
    weight = torch.tensor([1.0, 1.0, -1.0, -1.0])
    grad = torch.tensor([-1.0, 1.0, 1.0, -1.0])
    assert saliency.movement(weight, grad).tolist() == [1.0, -1.0, 1.0, -1.0]


def test_a_masked_weight_has_a_gradient_but_no_taylor_saliency():
    weight, grad = torch.zeros(3), torch.tensor([1.0, -2.0, 3.0])
    assert saliency.taylor(weight, grad).tolist() == [0.0, 0.0, 0.0]
    assert saliency.gradient(weight, grad).tolist() == [1.0, 2.0, 3.0]


def test_random_draws_from_the_generator_given_and_leaves_the_global_one_alone(device):
    weight = torch.zeros(3, 5, device=device)
    before = torch.get_rng_state()
    draws = [
        saliency.random(weight, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].shape == (3, 5)
    assert draws[0].device == weight.device
    reference = torch.rand(3, 5, generator=torch.Generator().manual_seed(7))
    assert torch.equal(draws[0].cpu(), reference)  # the same wherever the model lives


def one_line(weight, grad):
    return (weight - grad).abs()


class Scaled:
    def __call__(self, weight, grad):
        return weight * grad


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(saliency.taylor, True, id="taylor"),
        pytest.param(saliency.movement, True, id="movement"),
        pytest.param(saliency.magnitude, False, id="magnitude"),
        pytest.param(saliency.random, False, id="random"),
        pytest.param(one_line, True, id="function"),
        pytest.param(Scaled(), True, id="callable object"),
        pytest.param(lambda *args: args[0], True, id="varargs"),
        pytest.param(lambda weight, grad=None: weight, False, id="gradient with a default"),
        pytest.param(torch.mul, True, id="builtin without a signature"),
    ],
)
def test_a_saliency_needs_data_unless_its_gradient_has_a_default(function, expected):
    assert ("grad" in saliency.asks(function)) is expected


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(
            lambda weight: weight,
            r"must be a function of \(weight, grad\)\. Got <lambda>\(weight\)",
            id="of the weight alone",
        ),
        pytest.param(
            lambda *, weight, grad: weight,
            r"must be a function of \(weight, grad\)\. Got <lambda>\(\*, weight, grad\)",
            id="keywords only",
        ),
        pytest.param(
            lambda weight, grad, step: weight,
            r"must be a function of \(weight, grad\)\. Got <lambda>\(weight, grad, step\)",
            id="three arguments",
        ),
    ],
)
def test_a_function_that_cannot_take_weight_and_gradient_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        saliency.asks(function)


def test_a_saliency_is_given_the_keywords_it_names():
    assert saliency.asks(saliency.random) == {"generator"}
    assert saliency.asks(lambda weight, grad, generator: weight) == {"grad", "generator"}
    assert saliency.asks(lambda weight, grad=None, *, inputs, task: weight) == {"inputs", "task"}
    assert saliency.asks(lambda weight, grad, *, layer: weight) == {"grad", "layer"}
    assert saliency.asks(torch.mul) == {"grad"}


@pytest.mark.parametrize("function", list(saliency.IN_PLACE), ids=lambda f: f.__name__)
def test_the_forms_with_an_out_argument_give_the_same_bits(function):
    weight, grad = torch.randn(2, 1_000).unbind()
    out = torch.empty(1_000)
    assert saliency.IN_PLACE[function](weight, grad, out) is out
    assert torch.equal(out, function(weight, grad))


@pytest.mark.parametrize("shape", [(1,), (7,), (4, 5), (3, 2, 2, 2), (0,)], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_lamp_is_its_written_definition(shape, ties):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    weight = (weight * 2).round() if ties else weight
    flat = [float(w) ** 2 for w in weight.double().flatten()]
    expected = [w / sum(v for v in flat if v >= w) if w else 0.0 for w in flat]
    found = saliency.lamp(weight)
    assert found.shape == weight.shape
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert all(score == 1.0 for score in found.flatten().topk(min(1, len(flat))).values) or ties


def test_lamp_of_nothing_but_zeros_is_zero():
    assert saliency.lamp(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
