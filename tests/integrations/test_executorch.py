"""A smaller model in ExecuTorch, if it is installed: it needs packages of its own."""

import pytest
import torch
from torch import nn

import mtprune

pytest.importorskip("executorch", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore")  # its own


@torch.no_grad()
def test_a_portable_copy_runs_there(tmp_path):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    groups = [*mtprune.patterns.heads(model), *mtprune.patterns.neurons(model)]
    for group in groups:
        for member in group.members:
            dead = torch.tensor(member.units) < group.size // 2
            model.get_parameter(member.tensor).movedim(member.dim, 0)[dead] = 0
    x = torch.randn(2, 7, 16)
    fast = mtprune.compress(model, x, groups=groups, portable=True)
    assert sum(p.numel() for p in fast.parameters()) < sum(p.numel() for p in model.parameters())
    exported = torch.export.export(fast, (x,))
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    (tmp_path / "fast.pte").write_bytes(program.to_executorch().buffer)
    loaded = Runtime.get().load_program(tmp_path / "fast.pte")
    (got,) = loaded.load_method("forward").execute([x])
    torch.testing.assert_close(got, fast(x), rtol=1e-5, atol=1e-5)
