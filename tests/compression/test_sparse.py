"""The sparse product of our own: against the dense layer, threads against one, and without it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mtprune
from mtprune.compression.attention import SelfAttention
from mtprune.compression.forms import Sparse, building, packed, products
from mtprune.compression.verify import difference
from tests.compression.fakes import prefer, zero_
from tests.long import few

ROOT = Path(__file__).parents[2]

needs_compiler = pytest.mark.skipif(bool(building.unavailable()), reason=building.unavailable())

pytestmark = needs_compiler


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library was looked for yet, and none is in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    building.library.cache_clear()
    products._warn.cache_clear()
    yield tmp_path
    building.library.cache_clear()
    products._warn.cache_clear()


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def sparse(layer):
    return Sparse(layer, Sparse.parts(layer))


def check(layer, x):
    """The form gives what the layer gives, computed in double."""
    with torch.no_grad():
        got = sparse(layer)(x)
        weight, bias = layer.weight.double(), layer.bias
        bias = None if bias is None else bias.double()
        if isinstance(layer, nn.Conv2d):
            expected = layer._conv_forward(x.double(), weight, bias)
        else:
            expected = nn.functional.linear(x.double(), weight, bias)
    assert got.dtype == torch.float32
    assert difference(expected.float(), got) <= 1e-6


def test_literals():
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0, 2], [0, 0, 0], [3, 0, 0]]))
        layer.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    kernel = sparse(layer)
    assert kernel.weight_start.tolist() == [0, 2, 2, 3]
    assert kernel.weight_column.tolist() == [0, 2, 0]
    assert kernel.weight_column.dtype == torch.int16
    assert kernel(torch.tensor([[1.0, 5.0, 1.0]])).tolist() == [[4, 2, 6]]


def test_a_convolution_keeps_rows_of_its_kernel_apart():
    layer = nn.Conv2d(2, 1, 2, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 1, 0, 1] = 3.0
        layer.weight[0, 0, 1, 0] = 5.0
    kernel = sparse(layer)
    assert kernel.weight_start.tolist() == [0, 1, 2]
    assert kernel.weight_column.tolist() == [3, 4]  # row, column, channel: 0 1 1 and 1 0 0
    assert kernel.weight_values.tolist() == [3, 5]
    x = torch.arange(8.0).view(1, 2, 2, 2)
    assert kernel(x).tolist() == [[[[3 * 5 + 5 * 2]]]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [1, 16, 37])
def test_any_number_of_tokens(inputs, bias):
    layer = zero_(nn.Linear(inputs, 35, bias=bias), 0.7, rows=0.2)
    for tokens in [*range(71), 128, 129, 200]:
        check(layer, torch.randn(tokens, inputs))


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
def test_any_number_of_outputs(outputs, sparsity):
    for tokens in (1, 31, 65):
        check(zero_(nn.Linear(19, outputs), sparsity), torch.randn(tokens, 19))


def test_inputs_that_lie_otherwise():
    layer = zero_(nn.Linear(20, 24), 0.8)
    for x in (
        torch.randn(20),
        torch.randn(2, 3, 5, 20),
        torch.randn(20, 7).t(),
        torch.randn(7, 40)[:, ::2],
        torch.randn(3, 20, 9).transpose(1, 2),
        torch.randn(1, 20).expand(6, 20),
        torch.randn(2, 0, 20),
    ):
        check(layer, x)


CONVOLUTIONS = [
    {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    for kernel in (1, 2, 3, (5, 2), (1, 4))
    for stride in (1, 2, (3, 1))
    for padding in (0, 1, (2, 5), 7)
    for dilation in (1, 2, (1, 3))
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=lambda o: " ".join(map(str, o.values())))
def test_convolutions(options):
    layer = zero_(nn.Conv2d(5, 7, **options), 0.6, rows=0.2)
    for size in ((2, 5, 13, 11), (1, 5, 9, 40), (3, 5, 10, 10)):
        check(layer, torch.randn(size))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("padding", ["same", "valid", (1, 2)])
@pytest.mark.parametrize("kernel", [3, (2, 4)])
def test_other_paddings(kernel, padding, mode):
    layer = zero_(nn.Conv2d(3, 4, kernel, padding=padding, padding_mode=mode, dilation=2), 0.5)
    x = torch.randn(2, 3, 12, 19)
    with torch.no_grad():
        assert difference(layer(x), sparse(layer)(x)) <= 1e-6


def test_images_that_lie_otherwise():
    layer = zero_(nn.Conv2d(6, 8, 3, padding=1), 0.7).to(memory_format=torch.channels_last)
    x = torch.randn(2, 6, 9, 17)
    for images in (x.to(memory_format=torch.channels_last), x[..., ::2], x[:0], x.transpose(2, 3)):
        check(layer, images)
    with torch.no_grad():
        assert difference(layer(x[0]), sparse(layer)(x[0])) <= 1e-6


def test_what_sees_nothing_but_padding_is_the_bias():
    layer = zero_(nn.Conv2d(2, 3, 3, padding=12, dilation=12), 0.0)
    with torch.no_grad():
        layer.weight[:, :, 1] = 0  # so that most outputs touch no pixel
        y = sparse(layer)(torch.randn(1, 2, 4, 40))
    assert torch.equal(y, layer.bias.view(1, 3, 1, 1).expand_as(y))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_threads_change_no_bit(count, set_threads):
    linear, conv = zero_(nn.Linear(50, 90), 0.8), zero_(nn.Conv2d(40, 20, 3, padding=2), 0.8)
    for size in (3, 33, 64, 130, 700):
        tokens, images = torch.randn(size, 50), torch.randn(1 + size % 3, 40, 6, size // 2)
        set_threads(1)
        alone = sparse(linear)(tokens), sparse(conv)(images)
        set_threads(count)
        assert torch.equal(sparse(linear)(tokens), alone[0])
        assert torch.equal(sparse(conv)(images), alone[1])


def test_many_inputs_take_wider_places():
    layer = nn.Linear(40_000, 3)
    zero_(layer, 0.999)
    assert Sparse.parts(layer)["weight_column"].dtype == torch.int32
    check(layer, torch.randn(2, 40_000))


@pytest.mark.parametrize("scored", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["weight_values", "weight_column", "bias"])
def test_parts_that_change_are_packed_anew(scored, name):
    layer = nn.Linear(6, 2)
    with scored():
        layer.weight.copy_(torch.tensor([[1.0, 0, 0, 0, 0, 2], [0, 3, 0, 0, 0, 0]]))
        form = sparse(layer)
        for key, part in form.state_dict().items():
            owner = form._buffers if key in form._buffers else form._parameters
            kind = nn.Parameter if owner is form._parameters else torch.clone
            owner[key] = kind(part.clone(), *([False] if kind is nn.Parameter else []))
        x = torch.randn(3, 6)
        form(x)
        part = getattr(form, name)
        part.sub_(1) if name == "weight_column" else part.mul_(2)
        if name == "weight_column":
            with pytest.raises(ValueError, match="do not fit each other"):
                form(x)
            part.add_(1)
            part[1] = 4
        torch.testing.assert_close(form(x), nn.functional.linear(x, form.weight, form.bias))


def test_a_weight_is_packed_once_in_a_compiled_model_too(monkeypatch):
    made = []
    monkeypatch.setattr(
        products, "sparse_matrix", lambda *given: made.append(given) or packed.sparse_matrix(*given)
    )
    layer = nn.Conv2d(3, 4, 3)
    zero_(layer, 0.8)
    model = nn.Sequential(sparse(layer), nn.ReLU())
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(3):
            assert torch.equal(compiled(x), expected)
    assert len(made) == 1


def test_zeros_do_not_meet_infinity():
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert sparse(layer)(torch.tensor([[float("inf"), 2.0]])).tolist() == [[2, float("inf")]]


def test_what_was_cast_or_moved_is_multiplied_dense():
    for layer, x in (
        (nn.Linear(6, 5), torch.randn(3, 6)),
        (nn.Conv2d(6, 5, 3, 2, 1), torch.randn(2, 6, 7, 7)),
    ):
        kernel, layer = sparse(zero_(layer, 0.6)).double(), layer.double()
        torch.testing.assert_close(kernel(x.double()), layer(x.double()))
        with torch.autocast("cpu", torch.bfloat16):
            assert sparse(layer.float())(x.bfloat16()).dtype == torch.bfloat16
        assert sparse(layer).to("meta")(x.to("meta")).shape == layer(x).shape


def test_backward_is_refused():
    kernel = sparse(zero_(nn.Linear(6, 5), 0.6))
    y = kernel(torch.randn(3, 6, requires_grad=True))
    with pytest.raises(RuntimeError, match="Sparse layers are for inference"):
        y.sum().backward()


def test_errors():
    linear, conv = sparse(zero_(nn.Linear(6, 5), 0.6)), sparse(zero_(nn.Conv2d(6, 5, 3), 0.6))
    with pytest.raises(RuntimeError, match=r"takes 6 inputs and got shape \(3, 7\)"):
        linear(torch.randn(3, 7))
    for size in ((1, 5, 8, 8), (1, 6, 2, 8)):
        with pytest.raises(RuntimeError, match=r"takes 6 channels .* kernel of \[3, 3\]"):
            conv(torch.randn(size))
    assert "CPU" in Sparse.why_not(torch.zeros(1, device="meta"))
    assert "float32" in Sparse.why_not(torch.zeros(1, dtype=torch.float64))
    assert Sparse.parts(nn.Conv2d(4, 4, 3, groups=2)) is None


def test_parts_that_do_not_fit_are_not_followed():
    """A file may say anything; nothing outside of the input is read for it."""
    layer = zero_(nn.Linear(6, 5), 0.5)
    for name, change in {
        "weight_column": lambda c: c + 6,
        "weight_start": lambda s: s + 1,
        "weight_values": lambda v: v[1:],
        "weight_column of another sign": lambda c: -c - 1,
        "weight_start backwards": lambda s: s.flip(0),
        "weight_start too short": lambda s: s[:-1],
        "bias": lambda b: b[1:],
    }.items():
        parts = Sparse.parts(layer)
        key = name.split()[0]
        parts[key] = change(parts[key])
        with pytest.raises(ValueError, match=r"do not fit each other|its bias has shape"):
            Sparse(layer, parts)(torch.randn(3, 6))


ROWS = (torch.zeros(3, 6), torch.tensor([0, 1, 2]).int(), torch.tensor([2, 5]).short())
ROWS += (torch.ones(2), torch.zeros(2), 2)
IMAGES = (torch.zeros(1, 2, 5, 5), torch.tensor([0, 1, 1, 2]).int(), torch.tensor([0, 17]).short())
IMAGES += (torch.ones(2), None, (1, 3, 3), (3, 3, 1, 1, 0, 0, 1, 1))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(()), r"takes rows \[..., inputs\]"),
        (1, ROWS[1].long(), "do not fit each other"),
        (1, ROWS[1][:2], "do not fit each other"),
        (2, ROWS[2].to(torch.uint8), "do not fit each other"),
        (2, ROWS[2] + 1, "do not fit each other"),
        (3, torch.ones(3), "do not fit each other"),
        (3, torch.ones(2, device="meta"), "its inputs on cpu and its weight on meta"),
        (0, torch.zeros(3, 6, device="meta"), "its inputs on meta and its weight on cpu"),
        (4, torch.zeros(1), "do not fit each other"),
        (4, torch.zeros(2).half(), "do not fit each other"),
        (5, -1, "makes from 0 to 2147483647 outputs"),
        (5, 1 << 62, "makes from 0 to 2147483647 outputs"),
    ],
)
def test_the_operator_looks_at_each_argument(place, value, message):
    arguments = list(ROWS)
    assert torch.ops.mtprune.sparse_linear(*arguments).shape == (3, 2)
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.mtprune.sparse_linear(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, torch.zeros(2, 5, 5)),
        (5, (1, -1, 3)),
        (5, (1, 3)),
        (5, (1, 1 << 40, 3)),
        *((6, (*IMAGES[6][:i], 1 << 62, *IMAGES[6][i + 1 :])) for i in range(8)),
        *((6, (*IMAGES[6][:i], -1, *IMAGES[6][i + 1 :])) for i in range(8)),
        (6, (1 << 16, 1 << 16, 1, 1, 0, 0, 1, 1)),
        (6, (3, 3, 1, 1, 0, 0, 1)),
    ],
)
def test_the_operator_looks_at_sizes(place, value, dtype):
    arguments = list(IMAGES)
    assert torch.ops.mtprune.sparse_conv2d(*arguments).shape == (1, 1, 3, 3)
    arguments[place] = value
    arguments[0] = arguments[0].to(dtype)
    with pytest.raises(ValueError, match=r"none above 2147483647\. Got shape"):
        torch.ops.mtprune.sparse_conv2d(*arguments)


def test_an_exported_program_takes_other_types(tmp_path):
    model, x = net(), torch.randn(2, 3, 6, 6)
    fast = mtprune.compress(model, x, measure=prefer("sparse"))
    program = torch.export.export(fast, (x,), strict=False).module()
    linear = torch.ops.mtprune.sparse_linear
    parts = fast[3]._parts()
    rows = torch.randn(4, 288)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        got = linear(rows.to(dtype), *parts, 10)
        weight, bias = fast[3].weight.to(dtype), fast[3].bias.to(dtype)
        torch.testing.assert_close(got, nn.functional.linear(rows.to(dtype), weight, bias))
    assert torch.equal(program(x), fast(x))


def net():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    )
    return zero_(model, 0.8)


def test_it_is_exported(tmp_path):
    model, x = net(), torch.randn(2, 3, 6, 6)
    fast = mtprune.compress(model, x, measure=prefer("sparse"))
    assert isinstance(fast[0], Sparse)
    assert isinstance(fast[3], Sparse)
    program = torch.export.export(
        fast, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},), strict=False
    )
    other = torch.randn(7, 3, 6, 6)
    assert torch.equal(program.module()(other), fast(other))
    torch.export.save(program, tmp_path / "net.pt2")
    again = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.equal(again(x), fast(x))


def test_it_is_traced():
    model, x = net(), torch.randn(2, 3, 6, 6)
    fast = mtprune.compress(model, x, measure=prefer("sparse"))
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), fast(x))
    for op, args in (
        (products._multiply_op, (torch.randn(3, 288), *fast[3]._parts(), 10)),
        (products._convolve_op, (x, *fast[0]._parts(), (8, 6, 6), (3, 3, 1, 1, 1, 1, 1, 1))),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


CHILD = """
import sys, torch
from mtprune.compression.forms import building, products
assert not building.library.cache_info().currsize  # not at import
x, start = torch.arange(3.0)[None], torch.tensor([0, 1]).int()
print(products.multiply(x, start, torch.tensor([2]).int(), torch.ones(1), None, 1).item())
print(repr(building.unavailable()))
"""


def child(environment):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", CHILD],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
@pytest.mark.slow
def test_processes_that_compile_at_once(tmp_path):
    running = [child({"XDG_CACHE_HOME": str(tmp_path)}) for _ in range(3)]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert out.split() == ["2.0", "''"], err
    made = list((tmp_path / "mtprune").iterdir())
    assert len(made) == 1
    assert sorted(path.name for path in made[0].iterdir()) == ["sha256", "sparse.so"]


@pytest.mark.slow
@pytest.mark.parametrize("broken", few([b"", b"no library", None]))
def test_a_broken_cache_is_made_anew(fresh, broken):
    assert building.unavailable() == ""
    (library,) = fresh.glob("mtprune/*/sparse.so")
    # Another file, because this one is mapped: writing into it would reach the running code.
    content = library.read_bytes()[:4096] if broken is None else broken
    library.unlink()
    library.write_bytes(content)
    done = child({"XDG_CACHE_HOME": str(fresh)})
    out, err = done.communicate(timeout=300)
    assert out.split() == ["2.0", "''"], err
    assert len(library.read_bytes()) > 4096


def test_a_cache_that_others_write_to_is_not_used(fresh, monkeypatch):
    (fresh / "mtprune").mkdir()
    (fresh / "mtprune").chmod(0o777)
    elsewhere = fresh / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(building.tempfile, "gettempdir", lambda: str(elsewhere))
    assert building.unavailable() == ""
    assert not list((fresh / "mtprune").iterdir())
    assert list(elsewhere.glob("mtprune-*/*/sparse.so"))


@pytest.mark.slow
def test_without_openmp_it_is_one_thread(fresh, monkeypatch, set_threads):
    compile_ = building._compile

    def refuse(compiler, flags, where):
        if "-fopenmp" in flags:
            raise OSError("no OpenMP here")
        compile_(compiler, flags, where)

    monkeypatch.setattr(building, "_compile", refuse)
    set_threads(2)
    check(zero_(nn.Linear(20, 30), 0.8), torch.randn(200, 20))
    assert building.unavailable() == ""


@pytest.mark.slow
def test_without_a_compiler_other_forms_are_taken(fresh, monkeypatch):
    model, x = net(), torch.randn(2, 3, 6, 6)
    fast = mtprune.compress(model, x, measure=prefer("sparse"))
    plan = mtprune.plan_of(fast)
    building.library.cache_clear()
    monkeypatch.setattr(building.shutil, "which", lambda name: None)
    reason = r"no C compiler was found \(cc, gcc, clang, or the variable CC\)"
    other = mtprune.compress(model, x, measure=prefer("sparse"))
    assert {row.choice for row in mtprune.plan_of(other).rows} == {"dense"}
    assert "Without the form 'sparse': no C compiler" in str(mtprune.plan_of(other))
    with pytest.warns(UserWarning, match=rf"Layer '0' stays dense: {reason}"):
        mtprune.compress(model, x, plan=plan.replace("3", "dense"))
    # A model that was compressed elsewhere still runs.
    with pytest.warns(UserWarning, match=f"kept beside them: {reason}"):
        y = fast(x)
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)


def test_a_compiler_that_fails_is_named(fresh, monkeypatch):
    monkeypatch.setenv("CC", "false")
    monkeypatch.setattr(building, "COMPILERS", ())
    assert building.unavailable() == "the C compiler false made no library: it returned 1"


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.trunk = nn.TransformerEncoder(layer, 2)
        self.stem = nn.Conv2d(1, 4, 3)

    def forward(self, x, padding=None):
        return self.trunk(x, src_key_padding_mask=padding), self.stem(x[:, None])


@pytest.mark.slow
@pytest.mark.parametrize("padded", few([False, True], True))
def test_attention_is_opened_and_travels(padded, tmp_path):
    torch.manual_seed(0)
    model = zero_(Classifier(), 0.8).eval()
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3]) if padded else None
    x = torch.randn(2, 7, 16)
    fast = mtprune.compress(model, (x, padding), measure=prefer("sparse"))
    assert sum(isinstance(m, SelfAttention) for m in fast.modules()) == 2
    assert sum(isinstance(m, Sparse) for m in fast.modules()) == 9
    plan = mtprune.plan_of(fast)
    assert plan["trunk.layers.0.self_attn.in_proj"].shape == (48, 16)
    mtprune.save(fast, tmp_path)
    torch.save({"x": (x, padding), "y": fast(x, padding)}, tmp_path / "pair.pt")
    code = (
        "import sys, torch, mtprune\n"
        "from tests.compression.test_sparse import Classifier\n"
        "torch.set_num_threads(1)\n"
        "pair = torch.load(sys.argv[1] + '/pair.pt')\n"
        "y = mtprune.load(sys.argv[1], Classifier())(*pair['x'])\n"
        "assert all(torch.equal(a, b) for a, b in zip(y, pair['y'], strict=True))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    again = mtprune.compress(model, (x, padding), plan=plan)
    assert all(torch.equal(a, b) for a, b in zip(again(x, padding), fast(x, padding), strict=True))
    closed = mtprune.compress(model, (x, padding), plan=plan.replace("*", "dense"))
    assert not any(isinstance(m, SelfAttention) for m in closed.modules())


def test_what_ships():
    """The sources are data of the package."""
    from setuptools.config.setupcfg import read_configuration

    options = read_configuration(ROOT / "setup.cfg")["options"]
    shipped = options["package_data"]["mtprune.compression.forms"]
    for path in (*building.SOURCES, *building.HEADERS):
        assert path.name in shipped
        assert path.exists()
