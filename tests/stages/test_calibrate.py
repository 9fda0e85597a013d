"""Calibration: which tensors are watched, in which portions, and what is counted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor import StageError
from compressor.stages.quantize import calibrate as module
from compressor.stages.quantize.calibrate import calibrate, observed
from compressor.task import Array

X = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)


def graph() -> ir.Model:
    """relu = Relu(x), sum = Add(relu, weight), whole = Cast(sum) to int64, y = Sqrt(relu)."""
    x, w = (
        ir.Value(name="x", shape=ir.Shape(["batch", 6]), type=ir.TensorType(ir.DataType.FLOAT)),
        ir.Value(name="weight", const_value=ir.tensor(np.full(6, 2, np.float32), name="weight")),
    )
    w.shape, w.dtype = ir.Shape([6]), ir.DataType.FLOAT
    relu = ir.Node("", "Relu", [x], name="a")
    add = ir.Node("", "Add", [relu.outputs[0], w], name="b")
    cast = ir.Node("", "Cast", [add.outputs[0]], attributes=[ir.AttrInt64("to", 7)], name="c")
    root = ir.Node("", "Sqrt", [relu.outputs[0]], name="d")
    for node, name in ((relu, "relu"), (add, "sum"), (cast, "whole"), (root, "y")):
        node.outputs[0].name = name
    root.outputs[0].shape, root.outputs[0].dtype = x.shape, ir.DataType.FLOAT
    made = ir.Graph(
        [x],
        root.outputs,
        nodes=[relu, add, cast, root],
        initializers=[w],
        opset_imports={"": 20},
        name="g",
    )
    return ir.Model(made, ir_version=10)


def batches(x: Array, size: int = 32) -> Iterator[dict[str, Array]]:
    for start in range(0, len(x), size):
        yield {"x": x[start : start + size]}


def test_observed_tensors_are_those_of_the_model() -> None:
    model = graph()
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    found = list(observed(model, ["x", "relu", "sum", "whole", "y"], batches(X)))
    whole = {name: np.concatenate([run[name] for run in found]) for name in found[0]}
    relu = np.maximum(X, 0)
    wanted = {"relu": relu, "sum": relu + 2, "y": np.sqrt(relu), "x": X}
    assert set(whole) == set(wanted)  # the integers are left out
    for name, values in wanted.items():
        np.testing.assert_allclose(whole[name], values, rtol=1e-6)
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


@settings(max_examples=10)
@given(st.integers(1, 40), st.integers(1, 400), st.integers(1, 32))
def test_runs_stay_below_the_limit(count: int, limit: int, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RUN_BYTES", limit)
        runs = [run["sum"] for run in observed(graph(), ["sum"], batches(X[:count], size))]
    assert sum(map(len, runs)) == count
    assert len(runs[0]) == 1
    assert all(len(run) == 1 or run.nbytes <= limit for run in runs)


@settings(max_examples=10)
@given(st.integers(1, 32), st.integers(1, 32))
def test_division_into_batches_changes_nothing(one: int, other: int) -> None:
    here, there = (calibrate(graph(), ["relu"], batches(X, size)) for size in (one, other))
    np.testing.assert_array_equal(here["relu"].counts, there["relu"].counts)
    assert here["relu"].total == X.size
    assert (here["relu"].low, here["relu"].high) == (0, X.max())


def test_a_large_tensor_is_sampled_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 2)
    model, x = graph(), np.random.default_rng(1).standard_normal((600, 6)).astype(np.float32)
    feeds = list(batches(x, 100))
    one, same, other = (calibrate(model, ["sum"], feeds, seed=s)["sum"] for s in (3, 3, 4))
    np.testing.assert_array_equal(one.counts, same.counts)
    assert (one.counts != other.counts).any()
    assert (one.low, one.total) == (2, x.size)
    assert one.high == pytest.approx(2 + x.max())
    assert one.counts.sum() + one.zeros == pytest.approx(x.size, rel=0.05)


@given(st.integers(1, 5000), st.floats(1.01, 500), st.integers(0, 9))
def test_one_place_in_each_part(size: int, stride: float, seed: int) -> None:
    at = module._places(size, stride, np.random.default_rng(seed))
    assert at is not None
    assert len(at) == int(np.ceil(size / stride))
    assert at.min() >= 0
    assert at.max() < size
    parts = np.floor((at + 0.5) / size * len(at))
    assert np.abs(parts - np.arange(len(at))).max() <= 1


def test_what_is_not_finite_is_named() -> None:
    x = X.copy()
    x[7, 3] = np.nan
    with pytest.raises(StageError, match="activations of tensor sum are not finite"):
        calibrate(graph(), ["sum"], batches(x))


def test_no_examples_and_unknown_tensors_are_errors() -> None:
    with pytest.raises(StageError, match="no examples"):
        calibrate(graph(), ["sum"], [])
    with pytest.raises(StageError, match="no tensor other"):
        calibrate(graph(), ["other"], batches(X))
    with pytest.raises(StageError, match="onnxruntime cannot calibrate"):
        calibrate(graph(), ["sum"], [{"x": X[:, :3]}])
