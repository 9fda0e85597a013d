"""Sixteen bits: the same answers within their precision, no lost numbers, no needless casts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from compressor import Unsuitable
from compressor.measure.runtime import open_session
from compressor.stages.graph import cleaned, new_constant, write
from compressor.stages.quantize.half import bfloat, half, supports
from compressor.task import Array

Step = tuple[str, list[Any], dict[str, Any]]
RNG = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    found: Array = (RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
    return found


def chain(
    shape: tuple[int, ...],
    steps: list[Step],
    rank: int = 2,
    integers: bool = False,
    opset: int = 20,
) -> ir.Model:
    """A graph of ``steps``: ``None`` is what the last step made, a number what that step made, an
    array a constant, ``"x"`` the input, ``""`` nothing."""
    kind = ir.DataType.INT64 if integers else ir.DataType.FLOAT
    x = ir.Value(name="x", type=ir.TensorType(kind), shape=ir.Shape(["batch", *shape]))
    model = ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": opset}), ir_version=10)
    model.graph.name = "chain"
    made: list[ir.Value] = []
    for at, (operator, inputs, attributes) in enumerate(steps):
        read: list[ir.Value | None] = []
        for place, what in enumerate(inputs):
            if isinstance(what, np.ndarray):
                read.append(new_constant(model, f"c{at}_{place}", what))
            elif what == "x" or not made:
                read.append(x)
            elif what == "":
                read.append(None)
            else:
                read.append(made[-1 if what is None else what])
        outs = 2 if operator == "LSTM" else 1
        node = ir.node(operator, read, attributes, num_outputs=outs, name=f"node{at}")
        for place, value in enumerate(node.outputs):
            value.name = f"v{at}_{place}"
        model.graph.append(node)
        made.append(node.outputs[-1])
    made[-1].name, made[-1].dtype = "y", ir.DataType.FLOAT
    made[-1].shape = ir.Shape([None] * rank)
    model.graph.outputs.append(made[-1])
    return model


def run(model: ir.Model, folder: Path, *inputs: Array) -> Array:
    write(model, folder / "model.onnx")
    session = open_session(folder / "model.onnx")
    names = [given.name for given in session.get_inputs()]
    found: Array = session.run(None, dict(zip(names, inputs, strict=True)))[0]
    return found


def proto(model: ir.Model) -> onnx.ModelProto:
    made = ir.serde.serialize_model(model)
    cleaned(made)
    return made


def written(model: ir.Model) -> bytes:
    found: bytes = proto(model).SerializeToString(deterministic=True)
    return found


def reference(model: onnx.ModelProto, x: Array) -> Array:
    found: Any = ReferenceEvaluator(model).run(None, {"x": x})
    return np.asarray(found[0])


def cnn(opset: int = 20) -> ir.Model:
    return chain(
        (1, 8, 8),
        [
            ("Conv", [None, normal(8, 1, 3, 3), normal(8)], {"pads": [1, 1, 1, 1]}),
            ("Relu", [None], {}),
            ("MaxPool", [None], {"kernel_shape": [2, 2], "strides": [2, 2]}),
            ("Resize", [None, "", np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}),
            ("GlobalAveragePool", [None], {}),
            ("Flatten", [None], {}),
            ("Gemm", [None, normal(8, 5), normal(5)], {}),
        ],
        opset=opset,
    )


def transformer() -> ir.Model:
    """One head over 6 tokens, with a mask from the tokens as exporters write it."""
    lowest = np.float32(np.finfo(np.float32).min)
    return chain(
        (6,),
        [
            ("Gather", [normal(40, 16), "x"], {}),  # 0
            ("MatMul", [0, normal(16, 16)], {}),
            ("MatMul", [0, normal(16, 16)], {}),
            ("Transpose", [None], {"perm": [0, 2, 1]}),
            ("MatMul", [1, 3], {}),  # 4
            ("Equal", ["x", np.array(0)], {}),
            ("Where", [None, np.array(lowest), np.array(0, np.float32)], {}),
            ("Unsqueeze", [None, np.array([1])], {}),
            ("Add", [4, None], {}),
            ("Softmax", [None], {}),
            ("MatMul", [None, 0], {}),
            ("Add", [None, 0], {}),
            ("LayerNormalization", [None, np.ones(16, np.float32), normal(16)], {}),
            ("MatMul", [None, normal(16, 32)], {}),
            ("Gelu", [None], {}),
            ("MatMul", [None, normal(32, 4)], {}),
        ],
        rank=3,
        integers=True,
    )


def recurrent() -> ir.Model:
    return chain(
        (6,),
        [
            ("Gather", [normal(40, 16), "x"], {}),
            ("Transpose", [None], {"perm": [1, 0, 2]}),
            (
                "LSTM",
                [None, normal(1, 32, 16), normal(1, 32, 8), normal(1, 64)],
                {"hidden_size": 8},
            ),
            ("Squeeze", [None, np.array([0])], {}),
            ("Gemm", [None, normal(8, 5), normal(5)], {}),
        ],
        integers=True,
    )


TOKENS = np.random.default_rng(1).integers(0, 40, (7, 6))
TOKENS[0] = 0  # nothing but padding
IMAGES = np.random.default_rng(1).standard_normal((7, 1, 8, 8)).astype(np.float32)

MODELS: dict[str, tuple[Callable[[], ir.Model], Array, int]] = {
    "cnn": (cnn, IMAGES, 2),
    "transformer": (transformer, TOKENS, 3),
    "recurrent": (recurrent, TOKENS, 1),
}
"""What makes it, its input, and the casts of its fp16 form: input, output, around the mask."""


@pytest.mark.parametrize("name", MODELS)
def test_same_answers_in_half_the_bytes(name: str, tmp_path: Path) -> None:
    make, x, casts = MODELS[name]
    model = make()
    before = written(model)
    result = half(model)
    assert written(model) == before
    assert written(half(model)) == written(result)
    exact, got = run(model, tmp_path, x), run(result, tmp_path, x)
    assert got.dtype == np.float32
    assert np.abs(got - exact).max() < 1e-2 * np.abs(exact).max()
    assert [value.name for value in result.graph.outputs] == ["y"]
    assert [value.dtype for value in result.graph.inputs] == [
        value.dtype for value in model.graph.inputs
    ]
    big = [
        value for value in result.graph.initializers.values() if (value.const_value or x).size > 4
    ]
    assert {value.dtype for value in big} == {ir.DataType.FLOAT16}
    assert sum(node.op_type == "Cast" for node in result.graph) == casts
    onnx.checker.check_model(proto(result), full_check=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("narrowed", [half, bfloat])
def test_no_cast_is_for_nothing(name: str, narrowed: Callable[[ir.Model], ir.Model]) -> None:
    """None reads another, and no value is cast twice to one type."""
    casts = [node for node in narrowed(MODELS[name][0]()).graph if node.op_type == "Cast"]
    made = [node.outputs[0] for node in casts]
    assert not [node for node in casts if node.inputs[0] in made]
    ways = [(node.inputs[0], node.attributes["to"].as_int()) for node in casts]
    assert len(ways) == len(set(ways))


@given(power=st.integers(-60, 60))
@settings(max_examples=40, deadline=None)
def test_a_constant_that_does_not_fit_stays(
    power: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A scale that is undone at once: 65504 and 2 ** -14 are the ends of fp16's full precision."""
    scale = np.array(2.0**power, np.float32)
    x = np.random.default_rng(2).standard_normal((3, 16)).astype(np.float32)
    model = chain(
        (16,),
        [
            ("MatMul", ["x", normal(16, 16)], {}),
            ("Tanh", [None], {}),
            ("Mul", [None, scale], {}),
            ("Div", [None, scale], {}),
        ],
    )
    folder = tmp_path_factory.mktemp("scale")
    exact, result = run(model, folder, x), half(model)
    held = {
        value.dtype for value in result.graph.initializers.values() if value.shape == ir.Shape([])
    }
    fits = -24 <= power <= 15
    assert held == {ir.DataType.FLOAT16 if fits else ir.DataType.FLOAT}
    if not fits or power >= -10:
        np.testing.assert_allclose(run(result, folder, x), exact, atol=1e-2)


def test_a_few_tiny_weights_are_no_reason(tmp_path: Path) -> None:
    weights = normal(16, 16)
    weights[0, 0] = 1e-12
    result = half(chain((16,), [("MatMul", ["x", weights], {})]))
    assert [value.dtype for value in result.graph.initializers.values()] == [ir.DataType.FLOAT16]
    with pytest.raises(Unsuitable, match="can run in fp16"):
        half(chain((16,), [("MatMul", ["x", weights * np.float32(1e-9)], {})]))
    with pytest.raises(Unsuitable, match="can run in fp16"):
        half(chain((16,), [("MatMul", ["x", weights * np.float32(1e9)], {})]))


def test_norms_do_not_overflow_and_epsilons_do_not_vanish(tmp_path: Path) -> None:
    """x / max(|x|, 1e-12) of rows whose squares leave fp16, and of a row of zeros."""
    x = np.stack([np.full(16, 900), np.zeros(16), np.arange(16)]).astype(np.float32)
    model = chain(
        (16,),
        [
            ("MatMul", ["x", np.eye(16, dtype=np.float32)], {}),
            ("ReduceL2", [None, np.array([1])], {}),
            ("Clip", [None, np.array(1e-12, np.float32)], {}),
            ("Div", [0, None], {}),
        ],
    )
    np.testing.assert_allclose(
        run(half(model), tmp_path, x), run(model, tmp_path, x), atol=1e-3, rtol=1e-3
    )


def test_branches_stay_and_get_what_they_read(tmp_path: Path) -> None:
    text = """
      <ir_version: 10, opset_import: ["" : 20]>
      g (float[n,2] x, bool c) => (float[n,2] y) <float[2,2] w = {1, 2, 3, 4}> {
        h = MatMul (x, w)
        b = If (c) <
          then_branch = t () => (float[n,2] t0) { t0 = Neg (h) },
          else_branch = e () => (float[n,2] e0) { e0 = Abs (h) }
        >
        y = MatMul (b, w)
      }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    x = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    for flag in (True, False):
        exact = run(model, tmp_path, x, np.array(flag))
        got = run(half(model), tmp_path, x, np.array(flag))
        np.testing.assert_allclose(got, exact, atol=3e-2)


@pytest.mark.parametrize(("make", "opset"), [(recurrent, 20), (transformer, 20), (cnn, 22)])
def test_bf16_is_right_where_something_runs_it(make: Callable[..., ir.Model], opset: int) -> None:
    """ONNX's reference implementation does; its checker agrees with every type."""
    model = cnn(opset) if make is cnn else make()
    x = IMAGES if make is cnn else TOKENS[1:]
    narrowed = proto(bfloat(model))
    onnx.checker.check_model(narrowed, full_check=True)
    exact, got = reference(proto(model), x), reference(narrowed, x)
    assert got.dtype == np.float32
    assert 0 < np.abs(got - exact).max() < 4e-2 * np.abs(exact).max()


def test_bf16_leaves_what_its_opset_or_provider_lacks() -> None:
    """Convolutions before opset 22, recurrent layers, and islands between them."""
    for make in (cnn, recurrent):
        kinds = {node.op_type: node.outputs[-1].dtype for node in bfloat(make()).graph}
        assert kinds["Gemm"] == ir.DataType.BFLOAT16
        assert ir.DataType.BFLOAT16 not in (kinds.get("Conv"), kinds.get("LSTM"), kinds.get("Relu"))
    only = chain((1, 8, 8), [("Conv", [None, normal(8, 1, 3, 3)], {}), ("Relu", [None], {})])
    with pytest.raises(Unsuitable, match="can run in bf16"):
        bfloat(only)


def test_a_provider_is_asked_for_bf16() -> None:
    reason = supports("cpu")
    assert reason is not None
    assert "MatMul" in reason
    assert "choose from" in str(supports("abacus"))
