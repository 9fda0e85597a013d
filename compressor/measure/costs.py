"""What a layer of a given shape costs: a table of milliseconds, measured once and kept on disk.

A layer's cost is the time of its kernel inside a larger graph. It is read from onnxruntime's
profiler on a graph of that layer alone, without the nodes at the graph's ends that a larger graph
has only once (:data:`EDGES`) and without the call itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compressor.artifact import replacing
from compressor.errors import InputError, one_line
from compressor.measure.environment import cpu
from compressor.measure.process import Worker, WorkerFailed
from compressor.measure.shapes import GATES, Layer
from compressor.measurement import SETTINGS, Target
from compressor.task import Array

Dtype = Literal["fp32", "int8"]

MS = 15.0
"""Milliseconds of calls for each layer, and at least a few calls."""

EDGES = ("ReorderInput", "ReorderOutput", "Transpose", "QuantizeLinear", "DequantizeLinear")
"""Operators that bring a graph's input and output into the layout and type of its layers."""

METHOD = 1
"""Another number for another way to measure: what older versions cached is not used."""


def costs(
    layers: Iterable[Layer],
    target: Target,
    *,
    dtype: Dtype = "fp32",
    cache: Path | None = None,
    start: Callable[[], AbstractContextManager[Worker]] = Worker,
) -> dict[Layer, float]:
    """Milliseconds of each distinct layer on ``target``, for its whole batch.

    ``int8`` is what quantization makes of a layer: convolutions and linear layers with unsigned
    8-bit activations and signed 8-bit weights per channel, LSTM with dynamically quantized weights;
    all others stay fp32. What is not in the table under ``cache`` (by default
    ``$XDG_CACHE_HOME/compressor`` or ``~/.cache/compressor``) is measured now, in one worker, and
    kept there. A folder that cannot be written to is no error.

    Raises :class:`InputError` for a target other than the CPU, whose kernels the profiler does not
    time, and for a layer that ONNX does not have; :class:`WorkerFailed` for one that does not run.
    """
    with table(target, dtype=dtype, cache=cache, start=start) as price:
        return price(layers)


@contextmanager
def table(
    target: Target,
    *,
    dtype: Dtype = "fp32",
    cache: Path | None = None,
    start: Callable[[], AbstractContextManager[Worker]] = Worker,
) -> Iterator[Callable[[Iterable[Layer]], dict[Layer, float]]]:
    """:func:`costs` for a search that asks many times: one worker, and the file read and written
    once, at the end also when something failed."""
    if (target.runtime, target.provider) != ("onnxruntime", "cpu"):
        raise InputError(f"layer costs on {target}: onnxruntime has them for the cpu only")
    facts = _facts(target, dtype)
    path = _path(cache, facts)
    known = _read(path, facts)
    measured: dict[Layer, float] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compressor-")))
        worker: Worker | None = None

        def price(layers: Iterable[Layer]) -> dict[Layer, float]:
            nonlocal worker
            wanted = dict.fromkeys(layers)
            for layer in wanted:
                if layer not in known:
                    worker = worker or stack.enter_context(start())
                    known[layer] = measured[layer] = _measured(layer, target, dtype, worker, folder)
            return {layer: known[layer] for layer in wanted}

        try:
            yield price
        finally:
            if measured:
                _write(path, facts, _read(path, facts) | known)


def _measured(layer: Layer, target: Target, dtype: Dtype, worker: Worker, folder: Path) -> float:
    builders = INT8 if dtype == "int8" else FP32
    path = folder / "layer.onnx"
    try:
        model, inputs = builders[layer.op](layer, target.batch * layer.copies)
    except (InputError, ValueError) as error:
        raise InputError(f"no cost of {layer}: {one_line(error, 150)}") from error
    path.write_bytes(model)
    examples = [str(folder / f"{at}.npy") for at in range(len(inputs))]
    for example, array in zip(examples, inputs, strict=True):
        np.save(example, array)
    try:
        worker.ask("load", path=str(path), provider="cpu", threads=target.threads)
        worker.ask("take", inputs=examples, batch=len(inputs[0]))
        answer = worker.ask("kernels", path=str(path), ms=MS, out=f"{folder}/kernels")
    except WorkerFailed as error:
        raise WorkerFailed(f"no cost of {layer}: {one_line(error, 150)}") from error
    return milliseconds(answer["kernels"])


def milliseconds(kernels: Sequence[Mapping[str, Any]]) -> float:
    """Of all nodes but those at the edges, the mean of the faster half of their calls, summed.

    Slower calls were disturbed. The profiler cuts fractions of a microsecond off: half a one is
    added to each call.
    """
    total = 0.0
    for kernel in kernels:
        if kernel["op"] not in EDGES:
            faster = sorted(kernel["us"])[: (len(kernel["us"]) + 1) // 2]
            total += sum(faster) / len(faster) + 0.5
    return total / 1e3


# --- the table on disk ---


def _facts(target: Target, dtype: Dtype) -> dict[str, Any]:
    """All that the times depend on besides the layer."""
    import onnxruntime

    return {
        "method": METHOD,
        "cpu": cpu(),
        "onnxruntime": onnxruntime.__version__,
        "settings": dict(SETTINGS),
        **target.to_json(),
        "dtype": dtype,
    }


def _path(cache: Path | None, facts: Mapping[str, Any]) -> Path:
    if cache is None:
        base = os.environ.get("XDG_CACHE_HOME")
        cache = (Path(base) if base else Path.home() / ".cache") / "compressor"
    text = json.dumps(facts, sort_keys=True)
    return cache / f"costs-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _read(path: Path, facts: Mapping[str, Any]) -> dict[Layer, float]:
    """The table at ``path``; an empty one where there is none, or another or a broken file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        table = {Layer.from_json(row["layer"]): float(row["ms"]) for row in record["costs"]}
        sound = record["facts"] == facts and all(0 < ms < math.inf for ms in table.values())
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    return table if sound else {}


def _write(path: Path, facts: Mapping[str, Any], table: Mapping[Layer, float]) -> None:
    rows = [{"layer": layer.to_json(), "ms": ms} for layer, ms in table.items()]
    with suppress(OSError):  # a cache that cannot be kept costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(json.dumps({"facts": facts, "costs": rows}), encoding="utf-8")


# --- graphs of one layer ---

Built = tuple[bytes, tuple[Array, ...]]
"""An ONNX file and its inputs."""


ACTIVATION, WEIGHT = 2.0**-5, 2.0**-10
"""Scales of 8-bit codes: exact, so that their product is too."""


class _Graph:
    """Nodes and constants as they are added; every value is float32 unless it says otherwise."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, array: Array) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node and names its first output."""
        from onnx import helper

        name = f"n{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op, list(inputs), [name], name=name, domain=domain, **attributes)
        )
        return name

    def quantized(self, value: str) -> str:
        """``value`` through unsigned 8 bits."""
        scale = self.constant(np.array(ACTIVATION, dtype=np.float32))
        zero = self.constant(np.array(128, dtype=np.uint8))
        codes = self.node("QuantizeLinear", value, scale, zero)
        return self.node("DequantizeLinear", codes, scale, zero)

    def weights(self, array: Array, axis: int) -> str:
        """A constant in signed 8 bits, with a scale for each channel of ``axis``."""
        return self._codes((array * 127).astype(np.int8), axis, WEIGHT)

    def bias(self, array: Array) -> str:
        """A constant in 32 bits. Only with this scale does onnxruntime fuse a convolution."""
        return self._codes((array * 127).astype(np.int32), 0, ACTIVATION * WEIGHT)

    def _codes(self, array: Array, axis: int, scale: float) -> str:
        channels = array.shape[axis]
        scales = self.constant(np.full(channels, scale, dtype=np.float32))
        zeros = self.constant(np.zeros(channels, dtype=array.dtype))
        return self.node("DequantizeLinear", self.constant(array), scales, zeros, axis=axis)

    def built(self, output: str, *inputs: Array) -> Built:
        """The file: ``inputs`` are those of the values x0, x1, ..."""
        from onnx import TensorProto, helper

        of = [
            helper.make_tensor_value_info(f"x{at}", TensorProto.FLOAT, array.shape)
            for at, array in enumerate(inputs)
        ]
        last = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "layer", of, [last], self.constants)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return model.SerializeToString(), inputs


def _random(*shape: int) -> Array:
    """float32 in (-1, 1); values repeat, as none of the kernels looks at them."""
    few = np.random.default_rng(0).uniform(-1, 1, 4093).astype(np.float32)
    return np.resize(few, shape)


def _convolution(layer: Layer, batch: int, quantize: bool = False) -> Built:
    if layer.inputs % layer.groups or layer.outputs % layer.groups:
        raise InputError(f"{layer.groups} groups do not divide its channels")
    turned = layer.op == "deconv"
    first, second = (layer.inputs, layer.outputs) if turned else (layer.outputs, layer.inputs)
    weights = _random(first, second // layer.groups, *layer.kernel)
    bias = _random(layer.outputs)
    graph = _Graph()
    given = (
        (graph.quantized("x0"), graph.weights(weights, 0), graph.bias(bias))
        if quantize
        else ("x0", graph.constant(weights), graph.constant(bias))
    )
    y = graph.node(
        "ConvTranspose" if turned else "Conv",
        *given,
        strides=layer.stride,
        pads=layer.padding,
        dilations=layer.dilation,
        group=layer.groups,
    )
    return graph.built(
        graph.quantized(y) if quantize else y, _random(batch, layer.inputs, *layer.size)
    )


def _linear(layer: Layer, batch: int, quantize: bool = False) -> Built:
    """``Gemm`` for one row an example, else ``MatMul`` and ``Add``, as the exporter does."""
    graph = _Graph()
    wrap = graph.quantized if quantize else str
    weights, bias = _random(layer.outputs, layer.inputs), _random(layer.outputs)
    x = wrap("x0")
    if layer.rows == 1:
        given = (
            (graph.weights(weights, 0), graph.bias(bias))
            if quantize
            else (graph.constant(weights), graph.constant(bias))
        )
        y = graph.node("Gemm", x, *given, transB=1)
        return graph.built(wrap(y), _random(batch, layer.inputs))
    weights = np.ascontiguousarray(weights.T)
    factor = graph.weights(weights, 1) if quantize else graph.constant(weights)
    y = graph.node("Add", wrap(graph.node("MatMul", x, factor)), wrap(graph.constant(bias)))
    return graph.built(wrap(y), _random(batch, layer.rows, layer.inputs))


def _recurrent(layer: Layer, batch: int, quantize: bool = False) -> Built:
    if layer.projection:
        raise InputError("ONNX has no recurrent layers with projections")
    graph = _Graph()
    hidden, both, gates = layer.outputs, layer.directions, GATES[layer.op] * layer.outputs
    named: dict[str, Any] = {
        "hidden_size": hidden,
        "direction": "bidirectional" if both == 2 else "forward",
    }
    if layer.op == "gru":
        named["linear_before_reset"] = 1
    x, width = "x0", layer.inputs
    for _ in range(layer.layers):
        bias = graph.constant(_random(both, 2 * gates))
        if quantize:
            scale = graph.constant(np.full((both, gates), WEIGHT, dtype=np.float32))
            zero = graph.constant(np.zeros((both, gates), dtype=np.int8))
            given = [
                graph.constant((_random(both, features, gates) * 127).astype(np.int8))
                for features in (width, hidden)
            ]
            y = graph.node(
                "DynamicQuantizeLSTM",
                x,
                *given,
                bias,
                *[""] * 4,  # lengths, first hidden and cell state, peepholes
                *(scale, zero) * 2,
                domain="com.microsoft",
                **named,
            )
        else:
            w, r = (graph.constant(_random(both, gates, n)) for n in (width, hidden))
            y = graph.node(layer.op.upper(), x, w, r, bias, **named)
        # (steps, directions, batch, hidden) to (steps, batch, directions x hidden)
        turned = graph.node("Transpose", y, perm=(0, 2, 1, 3))
        shape = graph.constant(np.array([0, 0, both * hidden]))
        x, width = graph.node("Reshape", turned, shape), both * hidden
    return graph.built(x, _random(layer.rows, batch, layer.inputs))


def _attention(layer: Layer, batch: int) -> Built:
    graph = _Graph()
    (keys,) = layer.size
    heads, wide, deep = (
        layer.groups,
        layer.inputs // layer.groups,
        layer.outputs // layer.groups,
    )
    weights = graph.node("Softmax", graph.node("MatMul", "x0", "x1"), axis=-1)
    return graph.built(
        graph.node("MatMul", weights, "x2"),
        _random(batch, heads, layer.rows, wide),
        _random(batch, heads, wide, keys),
        _random(batch, heads, keys, deep),
    )


FP32: dict[str, Callable[[Layer, int], Built]] = {
    "conv": _convolution,
    "deconv": _convolution,
    "linear": _linear,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn": _recurrent,
    "attention": _attention,
}
"""Layer and batch -> its graph."""

INT8: dict[str, Callable[[Layer, int], Built]] = FP32 | {
    "conv": partial(_convolution, quantize=True),
    "linear": partial(_linear, quantize=True),
    "lstm": partial(_recurrent, quantize=True),
}
