import torch

from mtprune.compression.running import named_tensors, parse
from mtprune.compression.verify import difference
from tests.nets import Outputs


def test_difference_in_literals():
    one = torch.tensor([3.0, 4.0])
    assert difference(one, one.clone()) == 0
    assert difference(one, torch.tensor([3.0, 4.5])) == 0.1
    assert difference(torch.zeros(1), torch.tensor([-0.0])) == 0
    assert difference(one, torch.zeros(3)) == float("inf")
    assert difference(torch.tensor([1]), torch.tensor([2])) == float("inf")
    nan = torch.tensor([float("nan"), 4.0])
    assert difference(nan, nan.clone()) == 0
    assert difference(one, nan) == float("inf")
    assert difference(nan, one) == float("inf")
    inf = torch.tensor([float("inf"), 4.0])
    assert difference(inf, inf.clone()) == 0
    assert difference(inf, one) == float("inf")
    assert difference(torch.zeros(2), one) > 1e10


def test_tensors_are_found_wherever_they_are():
    t = torch.ones(1)
    nested = {"a": [t, (t, "text")], "b": Outputs(t, {"c": t})}
    assert [name for name, _ in named_tensors(nested)] == [
        "output['a'][0]",
        "output['a'][1][0]",
        "output['b'].a",
        "output['b'].b['c']",
    ]


def test_a_list_is_several_batches_and_a_tuple_one():
    t = torch.ones(1)
    assert [len(parse(x)) for x in (t, (t, t), {"x": t}, [t, (t, t)])] == [1, 1, 1, 2]
