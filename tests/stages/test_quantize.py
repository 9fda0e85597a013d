"""Quantization: what is in the graph, what was read to make it, and what is left alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from standing import exported, small_cnn, splits_of, task_of
from torch import nn

from compressor import Artifact, Split, Splits, StageError, Task, Unsuitable, session, zoo
from compressor.measure.environment import has_vnni
from compressor.stages import quantize
from compressor.stages.quantize import CALIBRATION_BATCH, calibration

IMAGE = (1, 8, 8)
X = np.random.default_rng(0).standard_normal((200, *IMAGE)).astype(np.float32)
Y = np.arange(200) % 5


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Task]:
    """Two convolutions and a linear layer, with data."""
    task = task_of(small_cnn(), IMAGE, splits=splits_of(X, Y))
    return exported(task, tmp_path_factory.mktemp("cnn")), task


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Task]:
    torch.manual_seed(0)
    task = task_of(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5)), (8,))
    return exported(task, tmp_path_factory.mktemp("mlp")), task


def graph_of(made: Artifact) -> Any:
    model = onnx.load(made.path)
    onnx.checker.check_model(model, full_check=True)
    return model.graph


def operators(made: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in graph_of(made).node)


def sqnr_db(made: Artifact, source: Artifact, task: Task) -> float:
    x = task.examples(64)
    exact, rounded = session(source.path)(*x), session(made.path)(*x)
    return float(10 * np.log10((exact**2).mean() / ((exact - rounded) ** 2).mean()))


# --- static


def test_static_is_qdq_unsigned_activations_signed_weights_per_channel(
    cnn: tuple[Artifact, Task], tmp_path: Path
) -> None:
    source, task = cnn
    made = quantize(source, task, tmp_path / "int8-static", scheme="static")
    graph = graph_of(made)
    tensors = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    used = operators(made)
    assert used["QuantizeLinear"] > 0
    assert used["Conv"] == 2
    assert used["Gemm"] + used["MatMul"] == 1
    assert not [name for name in used if "Integer" in name or name.startswith("QLinear")]
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            assert tensors[node.input[2]].dtype == np.uint8
            assert tensors[node.input[1]].size == 1
    fed = {out: node for node in graph.node for out in node.output}
    widths = {"Conv": {16, 32}, "Gemm": {5}, "MatMul": {5}}
    seen = []
    for node in graph.node:
        if node.op_type in widths:
            weight = fed[node.input[1]]
            assert weight.op_type == "DequantizeLinear"
            assert tensors[weight.input[0]].dtype == np.int8
            scales = tensors[weight.input[1]]
            assert scales.size in widths[node.op_type]
            assert not tensors[weight.input[2]].any()  # symmetric
            seen.append(scales.size)
    assert sorted(seen) == [5, 16, 32]
    assert sqnr_db(made, source, task) > 20
    assert made.path.stat().st_size < source.path.stat().st_size


def recording(split: Split, read: list[np.ndarray[Any, Any]]) -> Split:
    def fetch(at: Any) -> Any:
        read.append(at)
        return split.fetch(at)

    return replace(split, fetch=fetch)


def test_calibration_reads_its_own_split_in_small_batches(
    cnn: tuple[Artifact, Task], tmp_path: Path
) -> None:
    source, task = cnn
    assert task.splits is not None
    read: list[np.ndarray[Any, Any]] = []

    def never(at: Any) -> Any:
        raise AssertionError

    forbidden = Split(never, np.arange(10))
    calibrate = recording(task.splits.calibrate, read)
    given = replace(task, splits=Splits(forbidden, forbidden, calibrate, forbidden))
    made = quantize(source, given, tmp_path / "m", scheme="static", samples=70)
    assert [len(at) for at in read] == [32, 32, 6]
    assert np.concatenate(read).tolist() == calibrate.indices[:70].tolist()
    assert made.steps[-1]["facts"]["calibration"] == {"samples": 70, "data": "calibrate"}
    assert made.steps[-1]["settings"] == {"scheme": "static", "samples": 70}


def test_more_samples_than_there_are_means_all(cnn: tuple[Artifact, Task], tmp_path: Path) -> None:
    source, task = cnn
    made = quantize(source, task, tmp_path / "m", scheme="static", samples=10_000)
    assert made.steps[-1]["facts"]["calibration"] == {"samples": 120, "data": "calibrate"}


def test_without_data_made_up_inputs_calibrate_in_small_batches(
    cnn: tuple[Artifact, Task], tmp_path: Path
) -> None:
    source, task = cnn
    blind = replace(task, splits=None)
    batches = list(calibration(blind, 70))
    assert [len(part) for (part,) in batches] == [32, 32, 6]
    assert all(part.dtype == np.float32 for (part,) in batches)
    whole = np.concatenate([part for (part,) in batches])
    assert len(np.unique(whole.reshape(70, -1), axis=0)) == 70  # no batch is another's copy
    assert np.array_equal(whole, np.concatenate([part for (part,) in calibration(blind, 70)]))
    made = quantize(source, blind, tmp_path / "m", scheme="static", samples=70)
    assert made.steps[-1]["facts"]["calibration"] == {"samples": 70, "data": "synthetic"}
    assert sqnr_db(made, source, task) > 20


def test_ranges_are_those_of_the_calibration_examples(
    cnn: tuple[Artifact, Task], tmp_path: Path
) -> None:
    source, task = cnn
    made = quantize(source, task, tmp_path / "m", scheme="static", samples=64)
    graph = graph_of(made)
    tensors = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    (first,) = (node for node in graph.node if node.input[0] == "input")
    scale, zero = float(tensors[first.input[1]]), int(tensors[first.input[2]])
    assert -zero * scale == pytest.approx(X[:64].min(), abs=scale)
    assert (255 - zero) * scale == pytest.approx(X[:64].max(), abs=scale)


# --- dynamic


def test_dynamic_never_makes_integer_convolutions(
    cnn: tuple[Artifact, Task], tmp_path: Path
) -> None:
    source, task = cnn
    made = quantize(source, task, tmp_path / "m", scheme="dynamic")
    used = operators(made)
    assert used["Conv"] == 2
    assert used["ConvInteger"] == 0
    assert used["MatMulInteger"] == 1
    assert made.steps[-1]["settings"] == {"scheme": "dynamic"}


def test_dynamic_is_per_channel(mlp: tuple[Artifact, Task], tmp_path: Path) -> None:
    source, task = mlp
    made = quantize(source, task, tmp_path / "m", scheme="dynamic")
    scales = sorted(
        numpy_helper.to_array(each).size
        for each in graph_of(made).initializer
        if each.name.endswith("_scale") and numpy_helper.to_array(each).size > 1
    )
    assert scales == [5, 32]
    weights = [
        each for each in graph_of(made).initializer if numpy_helper.to_array(each).dtype == np.int8
    ]
    assert {numpy_helper.to_array(each).shape for each in weights} >= {(8, 32), (32, 5)}
    assert sqnr_db(made, source, task) > 20


def test_convolutions_alone_have_nothing_dynamic(tmp_path: Path) -> None:
    task = task_of(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), IMAGE)
    source = exported(task, tmp_path)
    with pytest.raises(Unsuitable, match="no MatMul, Gemm or LSTM with constant weights"):
        quantize(source, task, tmp_path / "m", scheme="dynamic")
    assert not (tmp_path / "m.onnx").exists()
    assert operators(quantize(source, task, tmp_path / "s", scheme="static"))["QuantizeLinear"] > 0


def onnx_artifact(path: Path, nodes: list[Any], *weights: tuple[str, Any]) -> Artifact:
    """A graph of these nodes from ``input`` (n, 8) to ``output``."""
    x = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 8])
    y = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    tensors = [
        numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return Artifact.of(path, "onnx")


def test_matrices_without_constant_weights_are_not_suitable(tmp_path: Path) -> None:
    task = task_of(nn.Identity(), (8,))
    nodes = [
        helper.make_node("Transpose", ["input"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["input", "t"], ["output"]),
    ]
    source = onnx_artifact(tmp_path / "a.onnx", nodes)
    with pytest.raises(Unsuitable, match="with constant weights"):
        quantize(source, task, tmp_path / "m", scheme="dynamic")


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_what_changed_nothing_is_not_suitable(tmp_path: Path, scheme: Any) -> None:
    task = task_of(nn.Identity(), (8,))
    node = helper.make_node("Erf", ["input"], ["output"])
    source = onnx_artifact(tmp_path / "a.onnx", [node])
    with pytest.raises(Unsuitable, match=r"changed nothing in the graph|no MatMul, Gemm or LSTM"):
        quantize(source, task, tmp_path / "m", scheme=scheme)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("name", ["lstm", pytest.param("gru", marks=pytest.mark.slow)])
def test_recurrent_nets(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    task = task_of(zoo.build(name, {"features": 8, "classes": 10}), (8, 8))
    source = exported(task, tmp_path)
    made = quantize(source, task, tmp_path / "dynamic", scheme="dynamic")
    used = operators(made)
    assert used["DynamicQuantizeLSTM" if name == "lstm" else "GRU"] == 1
    assert used["MatMulInteger"] == 1
    assert sqnr_db(made, source, task) > 15
    if name == "lstm":
        assert made.path.stat().st_size < source.path.stat().st_size / 2


# --- fp16


@pytest.mark.parametrize("which", ["cnn", "mlp"])
def test_fp16_keeps_fp32_at_both_ends(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source, task = request.getfixturevalue(which)
    made = quantize(source, task, tmp_path / "m", scheme="fp16")
    graph = graph_of(made)
    ends = [*graph.input, *graph.output]
    assert {each.type.tensor_type.elem_type for each in ends} == {TensorProto.FLOAT}
    weights = [each for each in graph.initializer if numpy_helper.to_array(each).ndim > 1]
    assert {each.data_type for each in weights if each.data_type != TensorProto.INT64} == {
        TensorProto.FLOAT16
    }
    assert sqnr_db(made, source, task) > 50
    assert made.steps[-1]["settings"] == {"scheme": "fp16"}


# --- all of them

SCHEMES = ("dynamic", "static", "fp16")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_twice_gives_the_same_bytes_and_the_source_stays(
    cnn: tuple[Artifact, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Any
) -> None:
    source, task = cnn
    one = quantize(source, task, tmp_path / "one", scheme=scheme)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    two = quantize(source, task, tmp_path / "elsewhere" / "two", scheme=scheme)
    content = one.path.read_bytes()
    assert two.path.read_bytes() == content
    assert source.checked() is source
    assert not list((tmp_path / "elsewhere").glob("*.onnx.*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "one.onnx"]
    for word in (b"/tmp", b"compressor-", b"site-packages", b"/root"):
        assert word not in content
    assert [step["stage"] for step in one.steps] == ["export", "quantize"]
    assert one.source is None
    for size in (1, 2, 7):
        assert session(one.path)(*task.examples(size)).shape == (size, 5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x07\x12\x00:\x02"])
def test_a_corrupt_file_is_one_line(tmp_path: Path, scheme: Any, content: bytes) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(StageError) as caught:
        quantize(
            Artifact.of(path, "onnx"), task_of(nn.Identity(), (8,)), tmp_path / "m", scheme=scheme
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_graph_that_does_not_run_is_one_line(tmp_path: Path, scheme: Any) -> None:
    task = task_of(nn.Identity(), (8,))
    node = helper.make_node("MatMul", ["input", "w"], ["output"])
    source = onnx_artifact(tmp_path / "a.onnx", [node], ("w", np.ones((7, 3))))
    with pytest.raises(StageError) as caught:
        quantize(source, task, tmp_path / "m", scheme=scheme)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()


def test_weights_have_seven_bits_where_sums_would_saturate(
    cnn: tuple[Artifact, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    source, task = cnn
    module = sys.modules[quantize.__module__]
    for fast in (True, False):
        monkeypatch.setattr(module, "has_vnni", lambda fast=fast: fast)
        made = quantize(source, task, tmp_path / "m", scheme="static")
        tensors = [numpy_helper.to_array(each) for each in graph_of(made).initializer]
        largest = max(
            int(np.abs(each.astype(int)).max()) for each in tensors if each.dtype == np.int8
        )
        assert largest == (127 if fast else 64)
        assert made.steps[-1]["facts"]["reduce_range"] is not fast


def test_the_fact_is_of_this_machine(mlp: tuple[Artifact, Task], tmp_path: Path) -> None:
    made = quantize(*mlp, tmp_path / "m", scheme="dynamic")
    assert made.steps[-1]["facts"]["reduce_range"] is not has_vnni()
    assert CALIBRATION_BATCH == 32
