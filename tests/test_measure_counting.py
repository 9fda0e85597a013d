"""Parameters and multiply-accumulates, against numbers worked by hand."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser
from torch import Tensor, nn

from compressor import zoo
from compressor.loading import onnxfile
from compressor.measure.counting import Counted, counted, macs, params
from compressor.stages.export import exported
from compressor.stages.graph import write
from compressor.task import Input, Task


class First(nn.Module):
    """The first output of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)[0]


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


# Two sequences of 7 steps; 5 inputs, 6 hidden. Each gate is one product of each with the hidden.
STEPS, GATE = 2 * 7, 6 * (5 + 6)
# Two sequences of 5 steps of width 8: four projections, scores and their product with the values.
ATTENTION = 2 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8)

BY_HAND = [
    ("linear", nn.Linear(5, 7), (3, 5), 3 * 5 * 7),
    ("convolution", nn.Conv2d(4, 8, 3), (1, 4, 9, 9), 7 * 7 * 8 * 4 * 9),
    ("stride and padding", nn.Conv2d(4, 8, 3, 2, 1), (2, 4, 9, 9), 2 * 5 * 5 * 8 * 4 * 9),
    ("groups", nn.Conv2d(4, 8, 3, groups=2), (1, 4, 9, 9), 7 * 7 * 8 * 2 * 9),
    ("depthwise", nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 6, 6), 6 * 6 * 8 * 9),
    ("one dimension", nn.Conv1d(4, 6, 3), (1, 4, 8), 6 * 6 * 4 * 3),
    ("transposed", nn.ConvTranspose2d(4, 6, 2, 2), (1, 4, 3, 3), 3 * 3 * 4 * 6 * 4),
    ("lstm", First(nn.LSTM(5, 6, batch_first=True)), (2, 7, 5), STEPS * 4 * GATE),
    ("gru", First(nn.GRU(5, 6, batch_first=True)), (2, 7, 5), STEPS * 3 * GATE),
    (
        "two layers, both ways",
        First(nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True)),
        (2, 7, 5),
        STEPS * 2 * 4 * (GATE + 6 * (12 + 6)),
    ),
    ("attention", Attention(8, 2, batch_first=True), (2, 5, 8), ATTENTION),
    (
        "encoder layer",
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (2, 5, 8),
        ATTENTION + 2 * 5 * 2 * 8 * 16,
    ),
    ("no product", nn.Sequential(nn.ReLU(), nn.Flatten()), (2, 5, 8), 0),
]


@pytest.mark.parametrize(
    ("model", "shape", "count"), [case[1:] for case in BY_HAND], ids=[case[0] for case in BY_HAND]
)
def test_macs_worked_by_hand(model: nn.Module, shape: tuple[int, ...], count: int) -> None:
    assert macs(model, (np.zeros(shape, dtype=np.float32),)) == count


def test_macs_of_a_subclass_are_those_of_its_class() -> None:
    class Named(nn.Conv2d):
        pass

    x = (np.zeros((1, 4, 9, 9), dtype=np.float32),)
    assert macs(Named(4, 8, 3), x) == macs(nn.Conv2d(4, 8, 3), x)


def test_counting_leaves_torch_as_it_was() -> None:
    fast = torch.backends.mha.get_fastpath_enabled()
    model = nn.Linear(2, 2)
    macs(model, (np.zeros((1, 2), dtype=np.float32),))
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.backends.mkldnn.enabled
    assert torch.is_grad_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert not model.training
    with pytest.raises(RuntimeError):
        macs(model, (np.zeros((1, 3), dtype=np.float32),))
    assert torch.backends.mha.get_fastpath_enabled() == fast, "also after an error"


def test_params_worked_by_hand() -> None:
    assert params(nn.Linear(5, 7)) == 5 * 7 + 7
    assert params(nn.Conv2d(4, 8, 3, groups=2, bias=False)) == 8 * 2 * 9
    assert params(nn.LSTM(5, 6)) == 4 * (GATE + 2 * 6)
    assert params(nn.BatchNorm2d(8)) == 16, "running statistics are no parameters"


def test_tied_parameters_count_once() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert params(tied) == 4 * 4 + 4 + 4


SHAPES = {
    "digits": (1, 8, 8),
    "digits?size=16": (1, 16, 16),
    "digits?size=32": (1, 32, 32),
    "digits-rows": (8, 8),
    "digits-masks": (1, 8, 8),
    "breast-cancer": (30,),
}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_zoo_model_is_counted_in_proportion_to_its_batch(name: str) -> None:
    shape = SHAPES[zoo.MODELS[name].data]
    model = zoo.build(name, zoo.arguments_for(name, shape, 10))
    one, three = (macs(model, (np.zeros((n, *shape), dtype=np.float32),)) for n in (1, 3))
    assert one > 0
    assert three == 3 * one
    assert params(model) > 0


# --- ONNX


def zoo_file(name: str, path: Path) -> tuple[nn.Module, tuple[int, ...]]:
    shape = SHAPES[zoo.MODELS[name].data]
    model = zoo.build(name, zoo.arguments_for(name, shape, 10)).eval()
    task = Task(name, "classification", lambda: model, {}, (Input("input", shape),), "accuracy")
    write(exported(model, task, 20), path)
    return model, shape


QUICK = ("cnn", "lstm", "vit", "unet")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in zoo.MODELS]


@pytest.mark.parametrize("name", EVERY)
def test_a_graph_costs_what_its_model_costs(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model, shape = zoo_file(name, path)
    found = counted(path, (Input("input", shape),))
    assert found.uncounted == ()
    assert found.macs == macs(model, (np.zeros((1, *shape), dtype=np.float32),))
    # Normalisation is folded into the convolution before it, which then has a bias.
    folds = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not folds and name != "vit":  # whose attention has a bias that cancels out
        assert found.params == params(model)
    # Scales and shifts are all that may go; of a new model the biases are zeros, and shared.
    gone = sum(params(module) for module in folds)
    least = params(model) - gone if folds else 0.99 * params(model)
    assert least <= found.params <= params(model)


DOMAINS = {"": 23, "com.microsoft": 1, "ai.onnx.ml": 5, "own": 1}
IMPORTS = ", ".join(f'"{domain}": {version}' for domain, version in DOMAINS.items())
HEAD = f"<ir_version: 10, opset_import: [{IMPORTS}]> g "


def written(path: Path, text: str, **held: Any) -> Path:
    """The graph ``(inputs) => (outputs) { nodes }`` with constants of these shapes, or arrays."""
    model = parser.parse_model(HEAD + text)
    for name, value in held.items():
        array = np.ones(value, np.float32) if isinstance(value, tuple) else value
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    path.write_bytes(model.SerializeToString())
    return path


def fed(path: Path) -> tuple[Input, ...]:
    return onnxfile.inputs(onnxfile.read(path), {}, batch=(onnxfile.read(path).batch or 1,))


NODES = [
    ("(float[n,4,9,9] x) => (float y) { y = Conv(x, w) }", {"w": (8, 4, 3, 3)}, 7 * 7 * 8 * 4 * 9),
    (
        "(float[n,4,9,9] x) => (float y) { y = Conv<group=2>(x, w) }",
        {"w": (8, 2, 3, 3)},
        7 * 7 * 8 * 2 * 9,
    ),
    (
        "(float[n,4,3,3] x) => (float y) { y = ConvTranspose<strides=[2,2]>(x, w) }",
        {"w": (4, 6, 2, 2)},
        3 * 3 * 4 * 6 * 4,
    ),
    ("(float[n,5] x) => (float y) { y = Gemm<transB=1>(x, w, b) }", {"w": (7, 5), "b": (7,)}, 35),
    ("(float[n,5] x) => (float y) { y = Gemm<transA=1>(w, w) }", {"w": (3, 2)}, 2 * 3 * 2),
    ("(float[n,6,5] x) => (float y) { y = MatMul(x, w) }", {"w": (5, 7)}, 6 * 5 * 7),
    ("(float[n,2,6,5] x) => (float y) { y = MatMul(x, w) }", {"w": (2, 5, 7)}, 2 * 6 * 5 * 7),
    (
        '(float[n,6,5] x) => (float y) { y = Einsum<equation="bij, kj -> bik">(x, w) }',
        {"w": (7, 5)},
        6 * 5 * 7,
    ),
    (
        "(float[7,n,5] x) => (float y, float h, float c) "
        "{ y, h, c = LSTM<hidden_size=6>(x, w, r) }",
        {"w": (1, 24, 5), "r": (1, 24, 6)},
        None,
    ),
    (
        "(float[n,4,5,8] q, float[n,2,6,8] k, float[n,2,6,3] v) => (float y) "
        "{ y = Attention(q, k, v) }",
        {},
        4 * 5 * 6 * (8 + 3),
    ),
    (
        "(float[n,5,32] q, float[n,6,16] k, float[n,6,6] v) => (float y) "
        "{ y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v) }",
        {},
        4 * 5 * 6 * (8 + 3),
    ),
    (
        "(float[n,5,8] q, float[n,6,8] k, float[n,6,8] v) => (float y) "
        "{ a = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v) y = MatMul(a, w) }",
        {"w": (8, 3)},
        5 * 6 * (8 + 8) + 5 * 8 * 3,
    ),
    (
        "(float[n,5,8] x) => (float y) { y = com.microsoft.Attention<num_heads=2>(x, w, b) }",
        {"w": (8, 24), "b": (24,)},
        5 * 8 * 24 + 5 * 5 * 16,
    ),
    (
        "(float[n,5,32] x) => (float y) "
        "{ a = com.microsoft.MatMulNBits<K=32, N=8, bits=4, block_size=32>(x, w, s) "
        "g = com.microsoft.Gelu(a) y = MatMul(g, v) }",
        {"w": np.zeros((8, 1, 16), np.uint8), "s": (8,), "v": (8, 2)},
        5 * 32 * 8 + 5 * 8 * 2,
    ),
    (
        "(float[n,3,8] x) => (float y) "
        "{ s = Shape(x) b = Slice(s, i, j) t = Concat<axis=0>(b, k) h = Reshape(x, t) "
        "y = MatMul(h, w) }",
        {"i": np.array([0]), "j": np.array([1]), "k": np.array([24]), "w": (24, 2)},
        24 * 2,
    ),
    ("(float[n,5] x) => (float y) { r = Relu(x) y = Add(r, r) }", {}, 0),
]


@pytest.mark.parametrize(("text", "held", "count"), NODES)
def test_nodes_worked_by_hand(
    tmp_path: Path, text: str, held: dict[str, Any], count: int | None
) -> None:
    path = written(tmp_path / "m.onnx", text, **held)
    if count is None:  # the first axis is time, which is no batch
        inputs: tuple[Input, ...] = (Input("x", (1, 5)),)
        count = 1 * (24 * 5 + 24 * 6)
    else:
        inputs = fed(path)
    assert counted(path, inputs)[1:] == (count, ())


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_is_divided_out(tmp_path: Path, batch: int) -> None:
    text = f"(float[{batch},6,5] x) => (float[{batch},6,7] y) {{ y = MatMul(x, w) }}"
    path = written(tmp_path / "m.onnx", text, w=(5, 7))
    assert counted(path, fed(path)).macs == 6 * 5 * 7


def test_what_is_said_of_values_for_another_batch_is_not_believed(tmp_path: Path) -> None:
    text = "(float[n,6,5] x) => (float[9,9,9] y) { a = MatMul(x, w) y = MatMul(a, v) }"
    path = written(tmp_path / "m.onnx", text, w=(5, 7), v=(7, 2))
    model = onnx.load(path)
    model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [9, 9]))
    path.write_bytes(model.SerializeToString())
    assert counted(path, fed(path)).macs == 6 * 5 * 7 + 6 * 7 * 2


def test_functions_are_looked_into(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    product = helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = helper.make_graph(
        [helper.make_node("twice", ["x", "w"], ["y"], domain="own")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((5, 7), np.float32), "w")],
    )
    functions = [helper.make_function("own", "twice", ["a", "b"], ["c"], [product], opsets)]
    path = tmp_path / "m.onnx"
    path.write_bytes(
        helper.make_model(graph, functions=functions, opset_imports=opsets).SerializeToString()
    )
    assert counted(path, fed(path)) == Counted(35, 35, ())


def test_a_quantized_file_costs_what_it_was_made_of(tmp_path: Path) -> None:
    text = (
        "(float[n,4,9,9] x) => (float y) "
        "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) "
        "e = DequantizeLinear<axis=0>(w, t) y = Conv(d, e) }"
    )
    held: dict[str, Any] = {
        "s": np.float32(0.1),
        "z": np.uint8(3),
        "t": (8,),
        "w": np.zeros((8, 4, 3, 3), np.int8),
    }
    path = written(tmp_path / "m.onnx", text, **held)
    assert counted(path, fed(path)) == Counted(8 * 4 * 9, 7 * 7 * 8 * 4 * 9, ())


@pytest.mark.parametrize(
    ("held", "nodes", "count"),
    [
        ({"w": (3, 2)}, "y = MatMul(x, w)", 6),
        ({"w": np.int8([[1, 2], [3, 4], [5, 6]])}, "c = Cast<to=1>(w) y = MatMul(x, c)", 6),
        ({"w": (3, 2), "unread": (7, 7)}, "y = MatMul(x, w)", 6),
        ({"w": (3, 2), "to": np.array([-1, 6])}, "a = MatMul(x, w) y = Reshape(a, to)", 6),
        ({"w": np.float32(3)}, "y = Mul(x, w)", 0),
        (dict.fromkeys("abcd", (3,)), "y = BatchNormalization(x, a, b, c, d)", 6),
        ({}, "w = Constant<value = float[3,2] {1,2,3,4,5,6}>() y = MatMul(x, w)", 6),
        (
            {"w": np.zeros((3, 1, 16), np.uint8), "s": (3,)},
            "y = com.microsoft.MatMulNBits<K=32, N=3, bits=4, block_size=32>(x, w, s)",
            96,
        ),
    ],
)
def test_parameters_are_what_is_computed_with(
    tmp_path: Path, held: dict[str, Any], nodes: str, count: int
) -> None:
    path = written(tmp_path / "m.onnx", f"(float[n,3] x) => (float y) {{ {nodes} }}", **held)
    assert onnxfile.read(path).params == count


def test_what_cannot_be_counted_is_named(tmp_path: Path) -> None:
    body = "b (int64 i, bool c) => (bool d, float z) { d = Identity(c) z = MatMul(x, w) }"
    cases = {
        f"y = Loop<body = {body}>(m, t)": "Loop around MatMul",
        "y = com.microsoft.PackedAttention<num_heads=1>(x, w)": "(an unknown operator)",
        "a = NonZero(x) c = Cast<to=1>(a) y = MatMul(c, w)": "(unknown shapes)",
        "y = ai.onnx.ml.LinearRegressor<coefficients=[1.0]>(x)": "LinearRegressor",
        "y = own.Thing(x)": "Thing",
    }
    for nodes, said in cases.items():
        text = f"(float[n,5] x) => (float y) {{ k = MatMul(x, w) {nodes} }}"
        held: dict[str, Any] = {"m": np.array(2), "t": np.array(True)}
        path = written(tmp_path / "m.onnx", text, w=(5, 7), **held)
        found = counted(path, (Input("x", (5,)),))
        assert found.macs is None, nodes
        (named,) = found.uncounted
        assert said in named


@settings(max_examples=10)
@given(st.integers(10, 40))
def test_counting_computes_nothing_large(power: int) -> None:
    """A constant of any size may be described in a few bytes."""
    text = (
        "(float[n,5] x) => (float y) { f = ConstantOfShape(s) e = Expand(x, s) t = Tile(x, s) "
        "r = Range(zero, large, one) y = MatMul(x, w) }"
    )
    size = 1 << power
    held: dict[str, Any] = {
        "s": np.array([size, size]),
        "zero": np.array(0),
        "one": np.array(1),
        "large": np.array(size),
        "w": (5, 7),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "m.onnx", text, **held)
        counted(path, (Input("x", (5,)),))  # the libraries are imported by now
        tracemalloc.start()
        try:
            assert counted(path, (Input("x", (5,)),)).macs == 35
            assert tracemalloc.get_traced_memory()[1] < 1 << 22
        finally:
            tracemalloc.stop()
