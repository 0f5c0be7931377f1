"""Runtimes: other ways to run a model on a CPU, each as a function from a model to a call.

What is missing on the machine is said, not skipped. `pip install '.[peers]'` brings all of it.
"""

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], Any]
"""A model with its inputs, ready to run; gives the outputs as a list of arrays or tensors."""

Runtime = Callable[[nn.Module, Tensor, int], Call]
"""From a model, its inputs and a number of threads to a call.

Raises:
    ImportError: If a package is missing.
    Exception: Of its own kinds, if it cannot run the model.
"""


def eager(model: nn.Module, x: Tensor, threads: int) -> Call:
    """Torch as it is."""
    return lambda: model(x)


def inductor(model: nn.Module, x: Tensor, threads: int) -> Call:
    """``torch.compile``, with weights as constants."""
    config: Any = import_module("torch._inductor.config")
    config.freezing = True
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model))
    with torch.no_grad():
        compiled(x)
    return lambda: compiled(x)


def torchao_int8(model: nn.Module, x: Tensor, threads: int) -> Call:
    """torchao's dynamic int8 for Linear layers, compiled as it is meant to be."""
    with _quiet():
        quantization = import_module("torchao.quantization")
        other = copy.deepcopy(model)
        quantization.quantize_(other, quantization.Int8DynamicActivationInt8WeightConfig())
        return inductor(other, x, threads)


def onnxruntime(model: nn.Module, x: Tensor, threads: int) -> Call:
    """ONNX Runtime in float32."""
    with _folder() as folder:
        return session(exported(model, x, folder), x, threads)


def onnxruntime_dynamic_int8(model: nn.Module, x: Tensor, threads: int) -> Call:
    """ONNX Runtime, weights in int8 and activations when they come along."""
    with _folder() as folder:
        return session(dynamic_int8(exported(model, x, folder)), x, threads)


def onnxruntime_static_int8(model: nn.Module, x: Tensor, threads: int) -> Call:
    """ONNX Runtime in int8, with the ranges of activations from the inputs."""
    with _folder() as folder:
        return session(static_int8(exported(model, x, folder), x), x, threads)


def openvino(model: nn.Module, x: Tensor, threads: int) -> Call:
    """OpenVINO in float32, for the shortest answer."""
    runtime = import_module("openvino")
    with _folder() as folder:
        graph = runtime.Core().read_model(exported(model, x, folder))
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = runtime.compile_model(graph, "CPU", settings).create_infer_request()
    given = [x.numpy()]
    return lambda: list(request.infer(given).values())


def exported(model: nn.Module, x: Tensor, folder: Path, rows: bool = False) -> Path:
    """A model as an ONNX file.

    Args:
        model: The model, in eval mode.
        x: Its inputs.
        folder: Where the file goes.
        rows: Whether the number of rows may be another one later.
    """
    onnx = import_module("onnx")
    path = folder / "model.onnx"
    shapes = ({0: torch.export.Dim("rows")},) if rows else None
    with _quiet():
        torch.onnx.export(
            model, (x,), path, dynamic_shapes=shapes, verbose=False, external_data=False
        )
    graph = onnx.load(path)
    del graph.graph.value_info[:]  # the quantizer infers shapes itself, and wants no others
    onnx.save(graph, path)
    return path


def dynamic_int8(path: Path) -> Path:
    """The same model with dynamic int8."""
    other = path.with_name("dynamic.onnx")
    with _quiet():
        quantize = import_module("onnxruntime.quantization").quantize_dynamic
        quantize(path, other, reduce_range=not _has_vnni())
    return other


def static_int8(path: Path, x: Tensor) -> Path:
    """The same model with int8 and fixed ranges."""
    other = path.with_name("static.onnx")
    with _quiet():
        quantization = import_module("onnxruntime.quantization")
        reader = _Reader(import_module("onnxruntime").InferenceSession(path), x)
        quantization.quantize_static(
            path, other, reader, per_channel=True, reduce_range=not _has_vnni()
        )
    return other


def session(path: Path, x: Tensor, threads: int) -> Call:
    """A file in ONNX Runtime."""
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    found = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {found.get_inputs()[0].name: x.numpy()}
    return lambda: found.run(None, given)


class _Reader:
    """One batch, for the quantizer to see ranges on."""

    def __init__(self, found: Any, x: Tensor) -> None:
        self._batches: Iterator[Any] = iter([{found.get_inputs()[0].name: x.numpy()}])

    def get_next(self) -> Any:
        return next(self._batches, None)


def _has_vnni() -> bool:
    """Whether sums of products of eight bits fit; elsewhere weights must have seven."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "vnni" in info.read_text()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What exporters say on their way is of no use here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
