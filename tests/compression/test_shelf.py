"""Every net of the shelf, every form, all sparsities: the outputs are those of the zeros.

Each net meets every form and every sparsity, and each form every sparsity.
"""

import pytest
import torch

import mtprune
from mtprune.compression.forms import Form
from mtprune.compression.verify import TOLERANCES, difference
from tests import nets
from tests.compression.fakes import leaves, prefer, zero_
from tests.pairs import pairs


@pytest.mark.parametrize(
    ("name", "choice", "sparsity"),
    nets.each(pairs(nets.SHELF, ["sparse", "csr", "rows", "thin"], [0.0, 0.8, 1.0])),
)
def test_compressed_is_what_it_was(name, choice, sparsity):
    net = nets.build(name)
    zero_(net.model, sparsity, rows=0.3 if sparsity else 0, cols=0.3 if sparsity else 0)
    net.model.eval()
    batches = [net.make_batch(i)["x"] for i in range(2)]
    fast = mtprune.compress(net.model, batches, measure=prefer(choice))
    replaced = [m for m in fast.modules() if isinstance(m, Form)]
    assert not (replaced and sparsity == 0)
    x = net.make_batch(9)["x"]
    with torch.no_grad():
        pairs = list(zip(leaves(net.model(x)), leaves(fast(x)), strict=True))
    assert pairs
    for expected, got in pairs:
        allowed = TOLERANCES[expected.dtype] if replaced else 0
        assert difference(expected, got) <= allowed
    assert mtprune.plan_of(mtprune.compress(fast, batches)) == mtprune.plan_of(fast)
