"""Accuracy repair: exact in float, and good for what comes out of 8 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from compressor.stages.graph import constant, copied
from compressor.stages.quantize import bias, equalize, rounding, smooth
from compressor.stages.quantize.histogram import Range
from compressor.stages.quantize.kernels import Codes
from compressor.stages.quantize.plan import plan
from compressor.stages.quantize.qdq import channel_scales, nearest, quantized
from compressor.task import Array

CODES = Codes(signed=False, bits=8)
SEEDS = st.integers(0, 2**16)


def graph(
    nodes: Sequence[Any], constants: Mapping[str, Array], shape: Sequence[Any], out: str = "y"
) -> ir.Model:
    """A model from ``x`` of this shape to ``out``."""
    made = [helper.make_node(*node, **more) for node, more in nodes]
    for at, node in enumerate(made):
        node.name = f"n{at}"
    whole = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.asarray(array, np.float32), name)
            for name, array in constants.items()
        ],
    )
    opset = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(whole, opset_imports=opset, ir_version=10))


def values(model: ir.Model, x: Array, names: Sequence[str] = ()) -> dict[str, Array]:
    """What the model makes of ``x``: its outputs, and inner values by name."""
    import onnxruntime

    proto = ir.to_proto(copied(model))
    asked = [output.name for output in proto.graph.output]
    inner = [name for name in names if name not in (*asked, "x")]
    for name in inner:
        proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    found = dict(zip([*asked, *inner], session.run(None, {"x": x}), strict=True))
    return {"x": x, **found}


def over(array: Array, axis: int) -> tuple[int, ...]:
    return tuple(at for at in range(array.ndim) if at != axis % array.ndim)


def peaks(model: ir.Model, x: Array, places: Mapping[str, int]) -> dict[str, Array]:
    seen = values(model, x, list(places))
    return {name: np.abs(seen[name]).max(over(seen[name], at)) for name, at in places.items()}


def means(model: ir.Model, x: Array, places: Mapping[str, int]) -> dict[str, Array]:
    seen = values(model, x, list(places))
    return {name: seen[name].mean(over(seen[name], at)) for name, at in places.items()}


def eight_bits(model: ir.Model, x: Array, bits: int = 8) -> ir.Model:
    planned = plan(model)
    seen = values(model, x, planned.ranged)
    ranges = {
        name: Range(min(float(seen[name].min()), 0.0), max(float(seen[name].max()), 0.0))
        for name in planned.ranged
    }
    return quantized(model, planned, ranges, Codes(signed=False, bits=bits))


def sqnr(exact: Array, seen: Array) -> float:
    """Decibels."""
    return float(10 * np.log10(np.square(exact).sum() / np.square(exact - seen).sum()))


def convolutions(seed: int, spread: float, between: str = "Relu") -> tuple[ir.Model, Array]:
    """Conv, depthwise Conv and Conv, whose channels differ by up to ``10 ** (2 * spread)``."""
    rng = np.random.default_rng(seed)
    scale, other = 10 ** rng.uniform(-spread, spread, (2, 8))
    held = {
        "w1": rng.normal(size=(8, 3, 3, 3)) * scale.reshape(-1, 1, 1, 1),
        "b1": rng.normal(size=8) * scale,
        "w2": rng.normal(size=(8, 1, 3, 3)) * (other / scale).reshape(-1, 1, 1, 1),
        "b2": rng.normal(size=8) * other,
        "w3": rng.normal(size=(4, 8, 1, 1)) / other.reshape(1, -1, 1, 1),
        "b3": rng.normal(size=4),
        "slope": rng.uniform(0.1, 0.3, (8, 1, 1)),
        "zero": np.array(0.0),
        "bound": np.array(1e5),
    }
    more = {"PRelu": ["slope"], "Clip": ["zero", "bound"]}.get(between, [])
    nodes = [
        (("Conv", ["x", "w1", "b1"], ["a"]), {"pads": [1] * 4}),
        ((between, ["a", *more], ["b"]), {}),
        (("Conv", ["b", "w2", "b2"], ["c"]), {"pads": [1] * 4, "group": 8}),
        ((between, ["c", *more], ["d"]), {}),
        (("Conv", ["d", "w3", "b3"], ["y"]), {}),
    ]
    model = graph(nodes, held, ["batch", 3, 8, 8])
    return model, rng.normal(size=(16, 3, 8, 8)).astype(np.float32)


def dense(seed: int, spread: float, transposed: bool) -> tuple[ir.Model, Array]:
    """Gemm (or MatMul and Add), Relu and Gemm."""
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-spread, spread, 12)
    first = rng.normal(size=(6, 12)) * scale
    held = {
        "w1": first.T if transposed else first,
        "b1": rng.normal(size=12) * scale,
        "w2": rng.normal(size=(12, 5)) / scale[:, None],
        "b2": rng.normal(size=5),
    }
    opening = [(("Gemm", ["x", "w1", "b1"], ["a"]), {"transB": 1})]
    if not transposed:
        opening = [(("MatMul", ["x", "w1"], ["m"]), {}), (("Add", ["m", "b1"], ["a"]), {})]
    nodes: list[Any] = [
        *opening,
        (("Relu", ["a"], ["b"]), {}),
        (("Gemm", ["b", "w2", "b2"], ["y"]), {}),
    ]
    return graph(nodes, held, ["batch", 6]), rng.normal(size=(64, 6)).astype(np.float32)


@settings(max_examples=20)
@given(seed=SEEDS, spread=st.floats(0, 2), between=st.sampled_from(["Relu", "PRelu", "Identity"]))
def test_equalizing_keeps_the_function(seed: int, spread: float, between: str) -> None:
    model, x = convolutions(seed, spread, between)
    before = values(model, x)["y"]
    for given_peaks in (None, peaks(model, x, equalize.places(model))):
        other = copied(model)
        equalize.equalize(other, given_peaks)
        after = values(other, x)["y"]
        assert np.abs(after - before).max() <= 1e-5 * max(np.abs(before).max(), 1)
    assert np.array_equal(values(model, x)["y"], before)  # a copy shares no constant that changed


@settings(max_examples=20)
@given(seed=SEEDS, transposed=st.booleans())
def test_dense_layers_are_equalized_too(seed: int, transposed: bool) -> None:
    model, x = dense(seed, 1.5, transposed)
    before = values(model, x)["y"]
    assert equalize.equalize(model) == ["b"]
    assert np.allclose(values(model, x)["y"], before, rtol=1e-5, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("observed", [False, True])
def test_channels_of_unlike_scale_survive_8_bits_once_equalized(observed: bool) -> None:
    model, x = convolutions(0, 2.0)
    exact = values(model, x)["y"]
    seen = peaks(model, x, equalize.places(model)) if observed else None
    bad = sqnr(exact, values(eight_bits(model, x), x)["y"])
    assert equalize.equalize(model, seen) == ["b", "d"]
    assert sqnr(exact, values(eight_bits(model, x), x)["y"]) > bad + 15


def test_equalizing_settles() -> None:
    model, _ = convolutions(0, 2.0)
    equalize.equalize(model)
    assert equalize.equalize(model, rounds=1) == []


@pytest.mark.parametrize("reached", [False, True])
def test_a_clip_is_no_obstacle_where_nothing_reaches_its_bound(reached: bool) -> None:
    model, x = convolutions(0, 0.5, "Clip")
    before = values(model, x)["y"]
    assert equalize.equalize(copied(model)) == []
    seen = peaks(model, x, equalize.places(model))
    if reached:
        seen = {name: np.full_like(peak, 1e5) for name, peak in seen.items()}
    changed = equalize.equalize(model, seen)
    assert changed == ([] if reached else ["b", "d"])
    assert [node.op_type for node in model.graph].count("Relu") == len(changed)
    assert np.allclose(values(model, x)["y"], before, rtol=1e-4, atol=1e-4)


def test_a_value_with_two_readers_is_left() -> None:
    rng = np.random.default_rng(0)
    held = {"w1": rng.normal(size=(4, 4)), "w2": rng.normal(size=(4, 4))}
    nodes: list[Any] = [
        (("MatMul", ["x", "w1"], ["a"]), {}),
        (("Relu", ["a"], ["b"]), {}),
        (("MatMul", ["b", "w2"], ["c"]), {}),
        (("Add", ["b", "c"], ["y"]), {}),
    ]
    model = graph(nodes, held, ["batch", 4])
    assert equalize.places(model) == {}
    assert equalize.equalize(model) == []


NORMALISATIONS = ("LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization")


def transformer(seed: int, op: str, outlier: float, alone: bool) -> tuple[ir.Model, Array]:
    """A normalisation, and two MatMuls that read it; one channel in eight is ``outlier`` large."""
    rng = np.random.default_rng(seed)
    scale = np.where(np.arange(32) % 8 == 0, outlier, 1.0) * rng.uniform(0.5, 2, 32)
    held = {
        "scale": scale,
        "shift": rng.normal(size=32) * scale,
        "skip": rng.normal(size=(1, 32)),
        "wq": rng.normal(size=(32, 16)),
        "wk": rng.normal(size=(32, 16)),
    }
    given = {
        "LayerNormalization": ["x", "scale", "shift"],
        "SkipLayerNormalization": ["x", "x", "scale", "shift"],
        "SimplifiedLayerNormalization": ["x", "scale"],
    }[op]
    domain = {"domain": "com.microsoft"} if op.startswith("Skip") else {}
    nodes: list[Any] = [
        ((op, given, ["n"]), domain),
        (("MatMul", ["n", "wq"], ["q"]), {}),
        (("MatMul", ["n", "wk"], ["k"]), {}),
        (("Concat", ["q", "k"] if alone else ["q", "k", "n"], ["y"]), {"axis": -1}),
    ]
    x = rng.normal(size=(4, 16, 32)).astype(np.float32)
    return graph(nodes, held, ["batch", 16, 32]), x


def samples(model: ir.Model, x: Array, names: Sequence[str]) -> dict[str, Array]:
    seen = values(model, x, names)
    return {name: seen[name].reshape(-1, seen[name].shape[-1]) for name in names}


@pytest.mark.parametrize("op", NORMALISATIONS)
@settings(max_examples=20)
@given(seed=SEEDS)
def test_smoothing_keeps_the_function(op: str, seed: int) -> None:
    model, x = transformer(seed, op, 50, alone=True)
    before, count = values(model, x)["y"], len(model.graph)
    chosen = smooth.smooth(model, samples(model, x, smooth.places(model)))
    assert list(chosen) == ["n"]
    assert len(model.graph) == count
    assert np.allclose(values(model, x)["y"], before, rtol=1e-4, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("alone", [True, False])
def test_outliers_survive_8_bits_once_smoothed(alone: bool) -> None:
    model, x = transformer(0, "LayerNormalization", 50, alone)
    exact = values(model, x)
    bad = sqnr(exact["y"][..., :32], values(eight_bits(model, x), x)["y"][..., :32])
    if not alone:
        assert smooth.smooth(copied(model), samples(model, x, ["n"])) == {}
    smooth.smooth(model, samples(model, x, ["n"]), insert=not alone)
    assert np.allclose(values(model, x)["y"], exact["y"], rtol=1e-4, atol=1e-3)
    better = values(eight_bits(model, x), x)["y"][..., :32]
    assert sqnr(exact["y"][..., :32], better) > bad + 6


def test_nothing_to_smooth_is_left_alone() -> None:
    model, x = transformer(0, "LayerNormalization", 1, alone=True)
    flat = np.ones((64, 32), np.float32) * np.random.default_rng(0).choice([-1, 1], (64, 32))
    for name in ("wq", "wk"):
        model.graph.initializers[name].const_value = ir.tensor(
            np.random.default_rng(1).choice([-1, 1], (32, 16)).astype(np.float32)
        )
    before = values(model, x)["y"]
    assert smooth.smooth(model, {"n": flat}) == {}
    assert smooth.smooth(model, {}) == {}
    assert np.array_equal(values(model, x)["y"], before)


@settings(max_examples=20)
@given(seed=SEEDS)
def test_means_come_back_after_quantizing(seed: int) -> None:
    model, x = convolutions(seed, 0.5)
    small = eight_bits(model, x, bits=4)

    def measured(other: ir.Model, places: Mapping[str, int]) -> dict[str, Array]:
        assert places == {"a": 1, "b": 1, "c": 1, "d": 1, "y": 1}
        return means(other, x, places)

    before, after = bias.correct(small, model, measured)
    assert after <= before
    assert bias.correct(small, model, measured, rounds=0) == (after, after)


def test_means_of_a_coarse_net_come_back_and_fidelity_with_them() -> None:
    model, x = convolutions(0, 0.5)
    exact = values(model, x)["y"]
    small = eight_bits(model, x, bits=4)
    bad = sqnr(exact, values(small, x)["y"])
    before, after = bias.correct(small, model, lambda m, places: means(m, x, places))
    assert after < before / 4
    assert sqnr(exact, values(small, x)["y"]) > bad


def test_a_shift_of_known_size_is_taken_back() -> None:
    model, x = dense(0, 0.0, transposed=False)
    before = values(model, x)["y"]
    moved = copied(model)
    shifted = constant(model.graph.initializers["b1"])
    assert shifted is not None
    moved.graph.initializers["b1"].const_value = ir.tensor(shifted + np.float32(0.25))
    assert bias.correct(moved, model, lambda m, places: means(m, x, places))[1] < 1e-5
    assert np.allclose(values(moved, x)["y"], before, atol=1e-5)


def test_without_a_bias_there_is_nothing_to_correct() -> None:
    model, x = transformer(0, "LayerNormalization", 1, alone=True)
    assert bias.correct(copied(model), model, lambda m, places: means(m, x, places)) == (0.0, 0.0)


@settings(max_examples=20)
@given(seed=SEEDS, axis=st.sampled_from([0, 1]), bits=st.integers(3, 8))
def test_rounding_is_never_worse_than_nearest_on_what_judges_it(
    seed: int, axis: int, bits: int
) -> None:
    rng = np.random.default_rng(seed)
    codes = Codes(signed=False, bits=bits)
    weight = rng.normal(size=(24, 12) if axis else (12, 24)).astype(np.float32)
    rows = rng.normal(size=(1, 200, 24)) @ rng.normal(size=(24, 24))
    scales = channel_scales(weight, axis, codes)
    plain = nearest(weight, scales, axis, codes)
    found = rounding.rounded(weight, scales, axis, rows, codes)
    assert found.dtype == np.int8
    assert found.shape == weight.shape
    assert np.abs(found).max() <= codes.largest
    judge = rows[0, 1::2]

    def error(integers: Array) -> Array:
        away = np.moveaxis(integers, axis, 1) * scales - np.moveaxis(weight, axis, 1)
        return np.asarray(np.square(judge @ away).sum(0))

    assert (error(found) <= error(plain) * (1 + 1e-6)).all()
    assert np.array_equal(found, rounding.rounded(weight, scales, axis, rows, codes))


def test_correlated_inputs_gain_from_rounding_and_dead_ones_are_no_harm() -> None:
    rng = np.random.default_rng(0)
    codes = Codes(signed=False, bits=4)
    weight = rng.normal(size=(64, 16)).astype(np.float32)
    # Few directions explain the inputs, as in real nets.
    seen = (rng.normal(size=(1, 400, 8)) @ rng.normal(size=(8, 64))).astype(np.float32)
    seen += 0.1 * rng.normal(size=seen.shape).astype(np.float32)
    scales = channel_scales(weight, 1, codes)
    exact = seen[0] @ weight
    gain = sqnr(exact, seen[0] @ (rounding.rounded(weight, scales, 1, seen, codes) * scales))
    assert gain > 6 + sqnr(exact, seen[0] @ (nearest(weight, scales, 1, codes) * scales))
    dead = np.zeros_like(seen)
    assert np.array_equal(
        rounding.rounded(weight, scales, 1, dead, codes), nearest(weight, scales, 1, codes)
    )


@settings(max_examples=20)
@given(
    seed=SEEDS,
    groups=st.sampled_from([1, 2, 4]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    pad=st.integers(0, 2),
)
def test_columns_are_what_a_convolution_sums_over(
    seed: int, groups: int, stride: int, dilation: int, pad: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(8, 4 // groups, 3, 2)).astype(np.float32)
    settings: dict[str, Any] = {
        "group": groups,
        "strides": [stride, 1],
        "dilations": [1, dilation],
        "pads": [pad, 0, 1, pad],
    }
    model = graph([(("Conv", ["x", "w"], ["y"]), settings)], {"w": weight}, ["batch", 4, 7, 6])
    x = rng.normal(size=(2, 4, 7, 6)).astype(np.float32)
    exact = np.moveaxis(values(model, x)["y"], 1, -1).reshape(-1, groups, 8 // groups)
    seen = rounding.columns(model.graph[0], x, rows=len(exact))
    sums = np.einsum("grk,gok->rgo", seen, weight.reshape(groups, 8 // groups, -1))
    assert np.allclose(sums, exact, atol=1e-4)
    few = rounding.columns(model.graph[0], x, rows=5, seed=3)
    assert np.array_equal(few, rounding.columns(model.graph[0], x, rows=5, seed=3))
    assert few.shape == (groups, min(5, len(exact)), 4 // groups * 6)
