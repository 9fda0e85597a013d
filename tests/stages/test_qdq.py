"""Static 8-bit graphs: the numbers in them, and what onnxruntime makes of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graphs import answers, drawn, floats, ranges_of, sqnr
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import CONSTANTS, IMAGE, SAME, nets

from compressor.measure.placement import unfused_pairs
from compressor.stages.graph import constant, write
from compressor.stages.quantize.histogram import Range
from compressor.stages.quantize.kernels import Codes
from compressor.stages.quantize.plan import axis_of, plan
from compressor.stages.quantize.qdq import affine, channel_scales, nearest, quantized
from compressor.task import Array

UNSIGNED = Codes(signed=False, bits=8)
CODES = st.builds(Codes, signed=st.booleans(), bits=st.sampled_from([7, 8]))
SEEDS = st.integers(0, 2**16)


def eight_bits(
    model: ir.Model, left: Any = (), codes: Codes = UNSIGNED, **given: Array
) -> ir.Model:
    """With ranges of these inputs."""
    return quantized(model, plan(model, left), ranges_of(model, given, left), codes)


def constants(model: ir.Model) -> dict[str, Array]:
    return {name: constant(value) for name, value in model.graph.initializers.items()}  # type: ignore[misc]


# --- scales and zero points

ENDS = st.floats(1e-30, 1e30) | st.just(0.0)


@given(low=ENDS, high=ENDS, codes=CODES)
def test_codes_cover_the_range_and_reach_no_further(low: float, high: float, codes: Codes) -> None:
    scale, zero = affine(Range(-low, high), codes)
    span, step = low + high, float(scale)
    assert step > 0
    assert np.isfinite(scale)
    assert codes.least <= zero <= codes.least + 255  # 0 has a code: x / scale + zero is exact there
    if span == 0:
        return
    assert step * 255 <= span
    assert step * 255 >= span * (1 - 1e-6)
    bottom, top = (codes.least - zero) * step, (codes.least + 255 - zero) * step
    # A range on one side of 0, as a clamp has it, is met; one around 0 moves by half a step.
    assert abs(bottom + low) <= step * 0.501
    assert abs(top - high) <= step * 0.501
    if low == 0:
        assert (bottom, zero) == (0, codes.least)
        assert top <= high
    if high == 0:
        assert (top, zero) == (0, codes.least + 255)
        assert bottom >= -low


@given(
    seed=SEEDS,
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    axis=st.integers(0, 1),
    codes=CODES,
)
def test_every_channel_uses_all_codes(seed: int, shape: list[int], axis: int, codes: Codes) -> None:
    (weight,) = floats(seed, tuple(shape))
    weight[(slice(None),) * axis + (0,)] = 0  # a channel without weights
    scales = channel_scales(weight, axis, codes)
    held = nearest(weight, scales, axis, codes)
    assert held.dtype == np.int8
    assert held.shape == weight.shape
    channels = np.moveaxis(held.astype(int), axis, 0).reshape(shape[axis], -1)
    assert np.abs(channels).max(1).tolist() == [0] + [codes.largest] * (shape[axis] - 1)
    shaped = scales.reshape([-1 if at == axis else 1 for at in range(len(shape))])
    assert (np.abs(held * shaped - weight) <= shaped * 0.5001).all()


# --- the graph computes what the numbers say


def encoded(x: Array, scale: Array, zero: Array, codes: Codes) -> Array:
    """QuantizeLinear, in float32, less the zero point."""
    held = np.clip(np.rint(x / scale) + zero, codes.least, codes.least + 255)
    return np.asarray(held - zero)


@settings(max_examples=30)
@given(
    seed=SEEDS,
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    kind=st.sampled_from(["MatMul(x, w)", "Gemm(x, w, b)", "Gemm <transB = 1> (x, w, b)"]),
    codes=CODES,
)
def test_a_layer_is_what_its_codes_say(
    seed: int, sizes: tuple[int, int, int], kind: str, codes: Codes
) -> None:
    rows, reads, makes = sizes
    x, w, b = floats(seed, (rows, reads), (reads, makes), (makes,))
    turned = "transB" in kind
    model = drawn(
        f"(float[n, {reads}] x) => (float[n, {makes}] y) {{ y = {kind} }}",
        w=np.ascontiguousarray(w.T) if turned else w,
        b=b,
    )
    made = eight_bits(model, (), codes, x=x)
    held = constants(made)
    axis = axis_of(next(node for node in model.graph if node.name in plan(model).inside))
    assert held["w_quantized"].shape[axis] == makes
    weight = held["w_quantized"].astype(np.int64)
    weight = weight.T if turned else weight
    total = encoded(x, held["x_scale"], held["x_zero_point"], codes).astype(np.int64) @ weight
    both = held["x_scale"] * held["w_scale"]
    if "b" in kind:
        name = next(name for name in held if name.endswith("_bias_quantized"))
        assert held[name].dtype == np.int32
        assert np.array_equal(held[name.replace("_quantized", "_scale")], both)
        assert np.array_equal(held[name], np.rint(b.astype(np.float64) / both))
        total = total + held[name]
    else:
        assert not [name for name in held if "bias" in name]
    assert np.allclose(answers(made, x=x)["y"], total * both, rtol=1e-5, atol=1e-30)


@settings(max_examples=25)
@given(seed=SEEDS, power=st.integers(0, 12), tiny=st.integers(0, 12))
def test_a_huge_bias_does_not_overflow(seed: int, power: int, tiny: int) -> None:
    x, w, b = floats(seed, (4, 6), (6, 5), (5,))
    w[:, 0] = 0
    w[:, 1] *= np.float32(10.0**-tiny)
    b *= np.float32(10.0**power)
    model = drawn("(float[n, 6] x) => (float[n, 5] y) { y = Gemm(x, w, b) }", w=w, b=b)
    exact, seen = answers(model, x=x)["y"], answers(eight_bits(model, x=x), x=x)["y"]
    # Each product is as near as 8 bits are, and a bias as large as this loses nothing to them.
    near = 0.05 * np.abs(w).max(0) * np.abs(x).max() * 6 + 1e-6 * np.abs(b)
    near[0] += np.ptp(x) * np.abs(w).max() / 255 / 127  # a step of a channel without weights
    assert (np.abs(seen - exact) <= near).all()


@settings(max_examples=40)
@given(net=nets(), seed=SEEDS)
def test_the_graph_stands_for_the_float_one(net: tuple[str, list[str]], seed: int) -> None:
    text, left = net
    model = drawn(text, **CONSTANTS)
    (x,) = floats(seed, (3, 4, 8, 8))
    exact = answers(model, x=x)
    names = [str(node.name) for node in model.graph]
    ours = plan(model, left)
    made = eight_bits(model, left, x=x)
    assert [value.name for value in made.graph.inputs] == ["x"]
    seen = answers(made, x=x)
    assert list(seen) == list(exact)  # outputs keep their names and their order
    deep = len(ours.weighted)
    for name, value in exact.items():
        assert seen[name].shape == value.shape
        assert seen[name].dtype == np.float32
        if not deep:
            assert np.array_equal(seen[name], value)
        elif "Clip" in text:
            # What a Clip lets pass may be less than a step of its input: 8 bits see none of it.
            assert np.isfinite(seen[name]).all()
        elif value.any():
            # Products of products: the noise of each layer is passed on.
            assert sqnr(value, seen[name]) > 25 - 5 * deep
    assert [str(node.name) for node in model.graph] == names  # the source stays as it was


@settings(max_examples=10)
@given(net=nets())
def test_all_left_is_the_float_graph(net: tuple[str, list[str]]) -> None:
    text, _ = net
    model = drawn(text, **CONSTANTS)
    made = quantized(model, plan(model, plan(model).weighted), {}, UNSIGNED)
    assert not [node for node in made.graph if "Linear" in node.op_type]


def test_a_value_read_in_float_too_is_decoded_once() -> None:
    model = drawn(
        f"{IMAGE} => (float[n, 4, 8, 8] a, float[n, 4, 8, 8] y, float[n, 4, 8, 8] z) {{"
        f"a = Conv {SAME} (x, w) z = Exp(a) y = Conv {SAME} (a, v) }}",
        **CONSTANTS,
    )
    (x,) = floats(0, (2, 4, 8, 8))
    made = eight_bits(model, x=x)
    assert [value.name for value in made.graph.outputs] == ["a", "y", "z"]
    ends = Counter(node.op_type for node in made.graph)
    assert (ends["QuantizeLinear"], ends["DequantizeLinear"]) == (3, 3 + 2)  # x, a, y; and weights
    seen = answers(made, x=x)
    assert np.allclose(np.exp(seen["a"]), seen["z"], rtol=1e-5)
    assert all(sqnr(value, seen[name]) > 20 for name, value in answers(model, x=x).items())


def test_one_weight_of_two_layers_gets_codes_for_each() -> None:
    model = drawn(
        "(float[n, 4] x) => (float[n, 4] y) { a = Gemm(x, w, b) r = Relu(a) y = Gemm(r, w, b) }",
        **dict(zip("wb", floats(0, (4, 4), (4,)), strict=True)),
    )
    (x,) = floats(1, (9, 4))
    made = eight_bits(model, x=x)
    weights = [name for name in constants(made) if name.startswith("w") and "quantized" in name]
    assert len(weights) == 2
    assert sqnr(answers(model, x=x)["y"], answers(made, x=x)["y"]) > 30


def test_names_that_are_taken_get_a_number() -> None:
    model = drawn(
        "(float[n, 4] x) => (float[n, 4] y) { a = Gemm(x, w) y = Add(a, w_scale) }",
        **dict(zip(["w", "w_scale"], floats(0, (4, 4), (4,)), strict=True)),
    )
    (x,) = floats(1, (9, 4))
    assert sqnr(answers(model, x=x)["y"], answers(eight_bits(model, x=x), x=x)["y"]) > 30


def test_the_same_graph_twice_is_the_same_file(tmp_path: Path) -> None:
    text = f"{IMAGE} => (float[n, 4, 8, 8] y) {{ a = Conv {SAME} (x, w, b) y = Relu(a) }}"
    (x,) = floats(0, (2, 4, 8, 8))
    for at in range(2):
        write(eight_bits(drawn(text, **CONSTANTS), x=x), tmp_path / f"{at}.onnx")
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()


# --- onnxruntime fuses everything


def optimized(model: ir.Model, folder: Path) -> Path:
    """The graph as onnxruntime runs it."""
    write(model, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    return folder / "optimized.onnx"


HEAD = " g1 = GlobalAveragePool({}) f = Flatten(g1) y = Gemm <transB = 1> (f, dense, row)"
NETS = {
    "plain": f"a = Conv {SAME} (x, w, b) c = Relu(a) p = MaxPool <kernel_shape = [2, 2], strides ="
    f" [2, 2]> (c) d = Conv {SAME} (p, v, b) e = Relu(d)" + HEAD.format("e"),
    "residual": f"a = Conv {SAME} (x, w, b) c = Relu(a) d = Conv {SAME} (c, v, b) e = Relu(d)"
    f" h = Conv {SAME} (e, w, b) s = Add(h, c) t = Relu(s) i = Conv <strides = [2, 2]> (t, w, b)"
    " j = Conv <strides = [2, 2]> (t, v, b) k = Add(i, j) l = Relu(k)" + HEAD.format("l"),
    "inverted": "a = Conv (x, wide) c = Clip(a, low, high)"
    " d = Conv <pads = [1, 1, 1, 1], group = 8> (c, deep) e = Clip(d, low, high)"
    f" h = Conv (e, narrow) i = Conv {SAME} (h, w, b) s = Add(h, i)" + HEAD.format("s"),
    "excited": f"a = Conv {SAME} (x, w, b) c = Relu(a) g = GlobalAveragePool(c)"
    " d = Conv (g, small, b) e = Relu(d) h = Conv (e, small, b) i = Sigmoid(h) m = Mul(c, i)"
    f" n1 = Conv {SAME} (m, v, b)" + HEAD.format("n1"),
    "joined": f"a = Conv {SAME} (x, w, b) c = Relu(a) d = Conv {SAME} (c, v, b) e = Relu(d)"
    " h = Concat <axis = 1> (c, e) i = Conv (h, narrow)" + HEAD.format("i"),
}


@pytest.mark.parametrize("name", NETS)
def test_nothing_is_left_in_float_between_pairs(name: str, tmp_path: Path) -> None:
    wide, deep, narrow, small, dense, row = floats(
        5, (8, 4, 1, 1), (8, 1, 3, 3), (4, 8, 1, 1), (4, 4, 1, 1), (10, 4), (10,)
    )
    model = drawn(
        f"{IMAGE} => (float[n, 10] y) {{ {NETS[name]} }}",
        **CONSTANTS,
        wide=wide,
        deep=deep,
        narrow=narrow,
        small=small,
        dense=dense,
        row=row,
    )
    (x,) = floats(6, (8, 4, 8, 8))
    made = eight_bits(model, x=x)
    path = optimized(made, tmp_path)
    had = Counter(node.op_type for node in model.graph)
    has = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert unfused_pairs(path) == 0
    assert not [op for op in has if op in ("Conv", "FusedConv", "Gemm", "FusedGemm", "Add", "Mul")]
    assert not [op for op in has if op in ("Relu", "Clip", "Sigmoid", "Concat")]
    assert has["QLinearConv"] == had["Conv"]
    assert has["QGemm"] == 1
    assert has["QLinearAdd"] == had["Add"]
    assert has["QuantizeLinear"] == 1  # the input; QGemm hands out float
    assert has["DequantizeLinear"] == 0
    assert sqnr(answers(model, x=x)["y"], answers(made, x=x)["y"]) > 20
