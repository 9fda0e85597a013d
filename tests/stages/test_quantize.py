"""Quantization: what is in the graph, what was read to make it, and what is left alone."""

from __future__ import annotations

import re
import sys
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

from compressor import (
    Artifact,
    InputError,
    Split,
    Splits,
    StageError,
    Task,
    Unsuitable,
    session,
    zoo,
)
from compressor.stages import graph, quantize
from compressor.stages.quantize import CALIBRATION_BATCH, calibration, search
from compressor.stages.quantize.judge import Judge
from compressor.stages.quantize.kernels import Codes, codes

IMAGE = (1, 8, 8)
PLAIN: dict[str, Any] = {"left": (), "disabled": ()}
"""No search."""

STATIC: dict[str, Any] = PLAIN | {"scheme": "static", "ranges": "minmax", "repair": ()}

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
    made = quantize(source, task, tmp_path / "int8-static", **STATIC)
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
    made = quantize(source, given, tmp_path / "m", samples=70, **STATIC)
    # A quarter is held back to judge by, the rest is read in batches.
    assert [len(at) for at in read] == [17, 32, 21]
    assert np.concatenate(read).tolist() == calibrate.indices[:70].tolist()
    assert made.steps[-1]["facts"]["calibration"] == {"samples": 70, "data": "calibrate"}
    assert made.steps[-1]["settings"] == {
        "scheme": "static",
        "samples": 70,
        "synthetic": False,
        "ranges": "minmax",
        "repair": [],
        "left": [],
        "disabled": [],
    }


def test_more_samples_than_there_are_means_all(cnn: tuple[Artifact, Task], tmp_path: Path) -> None:
    source, task = cnn
    made = quantize(source, task, tmp_path / "m", samples=10_000, **STATIC)
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
    made = quantize(source, blind, tmp_path / "m", samples=70, synthetic=True, **STATIC)
    assert made.steps[-1]["facts"]["calibration"] == {"samples": 70, "data": "synthetic"}
    assert sqnr_db(made, source, task) > 20


def test_ranges_are_those_of_the_calibration_examples(
    cnn: tuple[Artifact, Task], tmp_path: Path
) -> None:
    source, task = cnn
    made = quantize(source, task, tmp_path / "m", samples=64, **STATIC)
    whole = graph_of(made)
    tensors = {each.name: numpy_helper.to_array(each) for each in whole.initializer}
    first = next(node for node in whole.node if node.op_type == "QuantizeLinear")
    scale, zero = float(tensors[first.input[1]]), int(tensors[first.input[2]])
    seen = X[16:64]  # the first quarter is held back
    assert -zero * scale == pytest.approx(seen.min(), abs=scale)
    assert (255 - zero) * scale == pytest.approx(seen.max(), abs=scale)


# --- dynamic


def test_dynamic_never_makes_integer_convolutions(
    cnn: tuple[Artifact, Task], tmp_path: Path
) -> None:
    source, task = cnn
    made = quantize(source, task, tmp_path / "m", scheme="dynamic", **PLAIN)
    used = operators(made)
    assert used["Conv"] == 2
    assert used["ConvInteger"] == 0
    assert used["MatMulInteger"] == 1
    assert settings_of(made)["scheme"] == "dynamic"


def test_dynamic_is_per_channel(mlp: tuple[Artifact, Task], tmp_path: Path) -> None:
    source, task = mlp
    made = quantize(source, task, tmp_path / "m", scheme="dynamic", **PLAIN)
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
    made = quantize(source, task, tmp_path / "s", synthetic=True, **STATIC)
    assert operators(made)["QuantizeLinear"] > 0


def test_without_data_static_says_which_flag(tmp_path: Path) -> None:
    task = task_of(small_cnn(), IMAGE)
    with pytest.raises(Unsuitable, match="add --data SPEC"):
        quantize(exported(task, tmp_path), task, tmp_path / "m", scheme="static")


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
        quantize(source, task, tmp_path / "m", scheme="dynamic", **PLAIN)


@pytest.mark.parametrize("scheme", ["dynamic", "static", "weights", "int4"])
def test_a_graph_without_weights_is_not_suitable(tmp_path: Path, scheme: Any) -> None:
    task = task_of(nn.Identity(), (8,))
    node = helper.make_node("Erf", ["input"], ["output"])
    source = onnx_artifact(tmp_path / "a.onnx", [node])
    with pytest.raises(Unsuitable, match="with constant weights"):
        quantize(source, task, tmp_path / "m", scheme=scheme, synthetic=True)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("name", ["lstm", pytest.param("gru", marks=pytest.mark.slow)])
def test_recurrent_nets(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    task = task_of(zoo.build(name, {"features": 8, "classes": 10}), (8, 8))
    source = exported(task, tmp_path)
    for scheme in ("dynamic", "static"):
        given = {**STATIC, "scheme": scheme, "synthetic": True}
        made = quantize(source, task, tmp_path / scheme, **given)
        used = operators(made)
        assert used["DynamicQuantizeLSTM" if name == "lstm" else "GRU"] == 1
        assert used["MatMulInteger" if scheme == "dynamic" else "DequantizeLinear"] >= 1
        assert sqnr_db(made, source, task) > 15
    if name == "lstm":
        assert made.path.stat().st_size < source.path.stat().st_size / 2


# --- fewer bits of weights alone, and half of all


@pytest.mark.parametrize(("scheme", "bits", "db"), [("weights", 8, 30), ("int4", 4, 10)])
def test_weights_alone(tmp_path: Path, scheme: Any, bits: int, db: float) -> None:
    wide = task_of(nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 5)), (8,))
    made = quantize(exported(wide, tmp_path), wide, tmp_path / "m", scheme=scheme, **PLAIN)
    nodes = [node for node in onnx.load(made.path).graph.node if node.op_type == "MatMulNBits"]
    assert nodes
    for node in nodes:
        assert {at.name: at.i for at in node.attribute}["bits"] == bits
    assert made.steps[-1]["facts"]["sqnr_db"] > db


@pytest.mark.parametrize("which", ["cnn", "mlp"])
def test_fp16_keeps_fp32_at_both_ends(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source, task = request.getfixturevalue(which)
    made = quantize(source, task, tmp_path / "m", scheme="fp16")
    graph = onnx.load(made.path).graph
    ends = [*graph.input, *graph.output]
    assert {each.type.tensor_type.elem_type for each in ends} == {TensorProto.FLOAT}
    weights = [each for each in graph.initializer if numpy_helper.to_array(each).ndim > 1]
    assert {each.data_type for each in weights} == {TensorProto.FLOAT16}
    assert sqnr_db(made, source, task) > 50
    assert made.steps[-1]["settings"] == {"scheme": "fp16"}


# --- the search


def settings_of(made: Artifact) -> dict[str, Any]:
    return dict(made.steps[-1]["settings"])


def test_what_the_search_found_makes_the_same_file_again(
    cnn: tuple[Artifact, Task], tmp_path: Path
) -> None:
    source, task = cnn
    found = quantize(source, task, tmp_path / "one", scheme="static")
    settings = settings_of(found)
    assert settings["ranges"] != "auto"
    again = quantize(source, task, tmp_path / "two", **settings)
    assert again.path.read_bytes() == found.path.read_bytes()
    assert settings_of(again) == settings


def test_every_repair_makes_the_same_file_again(cnn: tuple[Artifact, Task], tmp_path: Path) -> None:
    source, task = cnn
    asked = {**STATIC, "repair": ("bias", "rounding", "equalize"), "ranges": "mse"}
    one = quantize(source, task, tmp_path / "one", **asked)
    assert settings_of(one)["repair"] == ["equalize", "rounding", "bias"]
    two = quantize(source, task, tmp_path / "two", **settings_of(one))
    assert two.path.read_bytes() == one.path.read_bytes()
    plain = quantize(source, task, tmp_path / "plain", **{**asked, "repair": ()})
    assert plain.path.read_bytes() != one.path.read_bytes()


def test_a_layer_that_is_not_there_cannot_be_left(
    cnn: tuple[Artifact, Task], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="left names 'node_conv9'"):
        quantize(*cnn, tmp_path / "m", **{**STATIC, "left": ("node_conv9",)})


def test_all_layers_in_float_is_no_quantization(mlp: tuple[Artifact, Task], tmp_path: Path) -> None:
    source, task = mlp
    names = ("node_linear", "node_linear_1")
    with pytest.raises(Unsuitable, match="every layer has to stay float"):
        quantize(source, task, tmp_path / "m", scheme="dynamic", left=names, disabled=())
    assert not (tmp_path / "m.onnx").exists()


class Spoilt(nn.Module):
    """A classifier whose second layer does not survive 8 bits: one weight dwarfs the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 5)
        with torch.no_grad():
            self.one.bias[0] = 4000.0  # and so one value dwarfs all others of its tensor
            self.two.weight[:, 0] = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(torch.relu(self.two(torch.relu(self.one(x)))))


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Task]:
    """With data that the float model gets right, so that every change costs accuracy."""
    model = Spoilt().eval()
    x = np.random.default_rng(1).standard_normal((300, 8)).astype(np.float32)
    with torch.inference_mode():
        y = model(torch.from_numpy(x)).argmax(1).numpy()
    task = task_of(model, (8,), splits=splits_of(x, y))
    return exported(task, tmp_path_factory.mktemp("spoilt")), task


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_layers_go_back_to_float_until_the_budget_holds(
    spoilt: tuple[Artifact, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Any
) -> None:
    source, task = spoilt
    monkeypatch.setattr(search, "timed", lambda task: False)
    given: dict[str, Any] = {"scheme": scheme, "ranges": "minmax", "repair": ()}
    loose = quantize(source, replace(task, budget=1.0), tmp_path / "loose", **given)
    assert settings_of(loose)["left"] == []
    assert loose.steps[-1]["facts"]["drop"] > 0.1
    tight = quantize(source, replace(task, budget=0.05), tmp_path / "tight", **given)
    assert settings_of(tight)["left"] == ["node_linear_1"]
    assert tight.steps[-1]["facts"]["drop"] <= 0.05
    again = quantize(source, replace(task, budget=0.05), tmp_path / "x", **settings_of(tight))
    assert again.path.read_bytes() == tight.path.read_bytes()
    nodes = Counter(node.op_type for node in onnx.load(tight.path).graph.node)
    assert nodes["Gemm" if scheme == "dynamic" else "QuantizeLinear"] > 0


def test_the_search_ends_when_time_is_up(
    spoilt: tuple[Artifact, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, task = spoilt

    def never(*given: Any) -> Any:
        raise AssertionError

    for name in ("slow", "within", "hurting"):
        monkeypatch.setattr(search, name, never)
    late = replace(task, until=0.0)
    made = quantize(source, late, tmp_path / "m", scheme="static")
    assert settings_of(made) == {
        "scheme": "static",
        "samples": 512,
        "synthetic": False,
        "ranges": "minmax",
        "repair": [],
        "left": [],
        "disabled": [],
    }


def test_what_was_found_before_ctrl_c_is_on_disk(
    spoilt: tuple[Artifact, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, task = spoilt

    def interrupted(*given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "within", interrupted)
    monkeypatch.setattr(search, "timed", lambda task: False)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, task, tmp_path / "m", scheme="dynamic")
    assert session(tmp_path / "m.onnx")(*task.examples(3)).shape == (3, 5)


def test_a_model_that_is_over_the_budget_in_float_stays_in_8_bits(
    cnn: tuple[Artifact, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, task = cnn  # an untrained model, judged against another one
    monkeypatch.setattr(search, "timed", lambda task: False)
    monkeypatch.setattr(Judge, "drop", lambda self, model: 0.5)
    made = quantize(source, task, tmp_path / "m", scheme="dynamic")
    assert settings_of(made)["left"] == []
    assert "the float model it was made from drops 0.5" in made.steps[-1]["facts"]["note"]


# --- all of them

SCHEMES = ("dynamic", "static", "int4", "fp16")


def given(scheme: str) -> dict[str, Any]:
    """Settings that leave nothing to search for."""
    whole = {**STATIC, "scheme": scheme, "synthetic": True}
    return {"scheme": scheme} if scheme == "fp16" else whole


@pytest.mark.parametrize("scheme", SCHEMES)
def test_twice_gives_the_same_bytes_and_the_source_stays(
    cnn: tuple[Artifact, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Any
) -> None:
    source, task = cnn
    one = quantize(source, task, tmp_path / "one", **given(scheme))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    two = quantize(source, task, tmp_path / "elsewhere" / "two", **given(scheme))
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
def test_models_too_large_for_one_file_keep_their_tensors_beside_it(
    cnn: tuple[Artifact, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Any
) -> None:
    source, task = cnn
    whole = quantize(source, task, tmp_path / "whole", **given(scheme))
    monkeypatch.setattr(graph, "LIMIT", 100)
    made = quantize(source, task, tmp_path / "m", **given(scheme))
    (beside,) = made.companions
    assert re.fullmatch(r"m\.onnx\.[0-9a-f]{8}\.data", beside.name)
    assert made.path.stat().st_size < whole.path.stat().st_size
    x = task.examples(3)
    assert np.array_equal(session(made.path)(*x), session(whole.path)(*x))
    assert len(graph.read(made.path).graph) == len(graph.read(whole.path).graph)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x07\x12\x00:\x02"])
def test_a_corrupt_file_is_one_line(tmp_path: Path, scheme: Any, content: bytes) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(StageError) as caught:
        quantize(
            Artifact.of(path, "onnx"), task_of(nn.Identity(), (8,)), tmp_path / "m", **given(scheme)
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_graph_that_does_not_run_is_one_line(tmp_path: Path, scheme: Any) -> None:
    task = task_of(nn.Identity(), (8,))
    node = helper.make_node("MatMul", ["input", "w"], ["output"])
    source = onnx_artifact(tmp_path / "a.onnx", [node], ("w", np.ones((70, 30))))
    with pytest.raises(StageError) as caught:
        quantize(source, task, tmp_path / "m", **given(scheme))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_old_opset_is_one_line(tmp_path: Path, scheme: Any) -> None:
    task = task_of(nn.Identity(), (8,))
    node = helper.make_node("MatMul", ["input", "w"], ["output"])
    source = onnx_artifact(tmp_path / "a.onnx", [node], ("w", np.ones((8, 3))))
    old = onnx.load(source.path)
    old.opset_import[0].version = 11
    onnx.save(old, source.path)
    with pytest.raises(StageError, match="has opset 11; quantization needs 13 or newer"):
        quantize(Artifact.of(source.path, "onnx"), task, tmp_path / "m", **given(scheme))


def test_activations_that_are_not_finite_are_one_line(
    cnn: tuple[Artifact, Task], tmp_path: Path
) -> None:
    source, task = cnn
    broken = X.copy()
    broken[100] = np.nan
    spoiled = replace(task, splits=splits_of(broken, Y))
    with pytest.raises(StageError, match="not finite"):
        quantize(source, spoiled, tmp_path / "m", **STATIC)
    assert not (tmp_path / "m.onnx").exists()


def test_constant_activations_are_quantized_all_the_same(tmp_path: Path) -> None:
    task = task_of(small_cnn(), IMAGE, splits=splits_of(np.zeros_like(X), Y))
    source = exported(task, tmp_path)
    made = quantize(source, task, tmp_path / "m", **STATIC)
    x = np.zeros((2, *IMAGE), np.float32)
    assert np.allclose(session(made.path)(x), session(source.path)(x), atol=0.05)


def test_weights_have_seven_bits_where_sums_would_saturate(
    cnn: tuple[Artifact, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, task = cnn
    module = sys.modules[quantize.__module__]
    for features, largest in (
        (["avx2"], 63),
        (["avx512f", "avx512_vnni"], 127),
        (["asimddp"], 127),
    ):
        monkeypatch.setattr(module, "codes", lambda features=features: codes(features))
        made = quantize(source, task, tmp_path / "m", **STATIC)
        nodes = [node for node in graph_of(made).node if node.op_type == "DequantizeLinear"]
        tensors = {one.name: numpy_helper.to_array(one) for one in graph_of(made).initializer}
        weights = [tensors[node.input[0]] for node in nodes if node.input[0] in tensors]
        eights = [held for held in weights if held.dtype == np.int8]
        assert max(int(np.abs(held.astype(int)).max()) for held in eights) == largest
        zeros = {tensors[node.input[2]].dtype for node in nodes if node.input[0] not in tensors}
        assert zeros == {np.dtype(np.int8 if "asimddp" in features else np.uint8)}
        assert sqnr_db(made, source, task) > 15
    assert made.steps[-1]["facts"]["codes"] == {"signed": True, "bits": 8}


def test_codes_follow_the_features() -> None:
    assert codes(["avx512_vnni"]) == Codes(signed=False, bits=8)
    assert codes(["avx2"]) == Codes(signed=False, bits=7)
    assert codes(["asimddp", "i8mm"]) == Codes(signed=True, bits=8)
    assert CALIBRATION_BATCH == 32
