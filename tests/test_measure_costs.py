"""The table of layer costs: exact with a scripted worker, and once for real."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from compressor.errors import InputError
from compressor.measure.costs import FP32, INT8, costs, milliseconds, table
from compressor.measure.process import WorkerFailed
from compressor.measure.runtime import open_session
from compressor.measure.shapes import Layer, Op
from compressor.measure.worker import Holder
from compressor.measurement import Target

CONV = Layer("conv", 16, 32, (8, 8), (3, 3), (1, 1), (1,) * 4, (1, 1))
LINEAR = Layer("linear", 24, 10)
RECURRENT: tuple[Op, ...] = ("lstm", "gru", "rnn")
KINDS = [
    CONV,
    CONV.resized(32, 32, 32),
    Layer("conv", 4, 6, (9,), (3,), (2,), (1, 1), (1,), groups=2),
    Layer("deconv", 8, 4, (5, 5), (2, 2), (2, 2), (0,) * 4, (1, 1), groups=2),
    LINEAR,
    Layer("linear", 24, 10, rows=7),
    *(Layer(op, 6, 8, rows=5, layers=2, directions=2) for op in RECURRENT),
    Layer("attention", 16, 8, size=(9,), groups=4, rows=5, copies=2),
]


class Scripted:
    """A worker that answers kernels from a script and keeps what it was asked."""

    def __init__(self, *answers: float | str) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.started = 0

    def __call__(self) -> Any:
        self.started += 1
        return self

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        self.asked.append((do, request))
        if do != "kernels":
            return {}
        answer = self.answers.pop(0)
        if isinstance(answer, str):
            raise WorkerFailed(answer)
        return {"kernels": [{"op": "Conv", "us": [answer - 0.5] * 4}]}


def unused() -> Any:
    raise AssertionError("nothing was to be measured")


# --- the figure ---


def test_the_faster_half_of_every_node_but_the_edges_is_summed() -> None:
    kernels = [
        {"op": "ReorderInput", "us": [1000]},
        {"op": "Conv", "us": [30, 10, 900, 20]},
        {"op": "Add", "us": [5, 7, 99]},
        {"op": "DequantizeLinear", "us": [1000]},
    ]
    assert milliseconds(kernels) == ((10 + 20) / 2 + 0.5 + (5 + 7) / 2 + 0.5) / 1e3


# --- the table ---


def test_every_distinct_layer_is_measured_once_in_one_worker(tmp_path: Path) -> None:
    worker = Scripted(250.0, 40.0)
    target = Target(batch=3, threads=2)
    found = costs([CONV, LINEAR, CONV], target, cache=tmp_path, start=worker)
    assert found == {CONV: 0.25, LINEAR: 0.04}
    assert worker.started == 1
    assert [do for do, _ in worker.asked] == ["load", "take", "kernels"] * 2
    assert worker.asked[0][1]["threads"] == 2
    assert worker.asked[1][1]["batch"] == 3


def test_what_is_known_is_not_asked_again(tmp_path: Path) -> None:
    costs([CONV], Target(), cache=tmp_path, start=Scripted(250.0))
    assert costs([CONV], Target(), cache=tmp_path, start=unused) == {CONV: 0.25}
    both = costs([CONV, LINEAR], Target(), cache=tmp_path, start=Scripted(40.0))
    assert both == {CONV: 0.25, LINEAR: 0.04}
    assert costs([LINEAR, CONV], Target(), cache=tmp_path, start=unused) == both
    assert costs([], Target(), cache=tmp_path, start=unused) == {}


def test_a_search_has_one_worker_and_one_file(tmp_path: Path) -> None:
    worker = Scripted(250.0, 40.0)
    with table(Target(), cache=tmp_path, start=worker) as price:
        assert worker.started == 0
        assert price([]) == {}
        assert worker.started == 0, "nothing was to be measured yet"
        assert price([CONV]) == {CONV: 0.25}
        assert price(iter([LINEAR, CONV, LINEAR])) == {LINEAR: 0.04, CONV: 0.25}
        assert price([CONV]) == {CONV: 0.25}
        assert not list(tmp_path.iterdir()), "it is written at the end"
    assert worker.started == 1
    assert not worker.answers
    assert costs([CONV, LINEAR], Target(), cache=tmp_path, start=unused) == {
        CONV: 0.25,
        LINEAR: 0.04,
    }


def test_a_search_that_fails_keeps_what_was_measured(tmp_path: Path) -> None:
    def fails() -> None:
        with table(Target(), cache=tmp_path, start=Scripted(250.0)) as price:
            price([CONV])
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert costs([CONV], Target(), cache=tmp_path, start=unused) == {CONV: 0.25}


def test_what_another_search_measured_meanwhile_is_kept(tmp_path: Path) -> None:
    with table(Target(), cache=tmp_path, start=Scripted(250.0)) as price:
        price([CONV])
        costs([LINEAR], Target(), cache=tmp_path, start=Scripted(40.0))
    both = {CONV: 0.25, LINEAR: 0.04}
    assert costs([CONV, LINEAR], Target(), cache=tmp_path, start=unused) == both


def test_another_target_or_dtype_has_a_table_of_its_own(tmp_path: Path) -> None:
    for us, target in ((250.0, Target()), (500.0, Target(threads=2)), (750.0, Target(batch=2))):
        found = costs([CONV], target, cache=tmp_path, start=Scripted(us))
        assert found == {CONV: us / 1e3}
    found = costs([CONV], Target(), dtype="int8", cache=tmp_path, start=Scripted(40.0))
    assert found == {CONV: 0.04}
    files = list(tmp_path.iterdir())
    assert len(files) == 4, "and nothing else is left there"
    facts = [json.loads(file.read_text())["facts"] for file in files]
    assert {fact["onnxruntime"] for fact in facts} == {onnxruntime.__version__}
    assert all(fact["cpu"]["model"] for fact in facts)


@pytest.mark.parametrize("variable", [True, False])
def test_the_table_lies_under_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: bool
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if variable:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    costs([CONV], Target(), start=Scripted(250.0))
    (file,) = (tmp_path / ".cache" / "compressor").iterdir()
    assert file.suffix == ".json"


def row(ms: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda record: record | {"costs": [record["costs"][0] | {"ms": ms}]}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: None,
        lambda record: [],
        lambda record: {},
        lambda record: record | {"facts": record["facts"] | {"threads": 9}},
        lambda record: record | {"costs": [{"layer": {"op": "conv", "colour": 1}, "ms": 1}]},
        lambda record: record | {"costs": [{"layer": {"op": "conv"}, "ms": 1}]},
        lambda record: record | {"costs": 7},
        row("quick"),
        row(-1.0),
        row(0),
        row(float("nan")),
        row(float("inf")),
        row(None),
    ],
)
def test_a_table_that_is_not_ours_is_measured_anew(tmp_path: Path, spoil: Any) -> None:
    costs([CONV], Target(), cache=tmp_path, start=Scripted(250.0))
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps(spoil(json.loads(file.read_text()))))
    assert costs([CONV], Target(), cache=tmp_path, start=Scripted(40.0)) == {CONV: 0.04}
    assert costs([CONV], Target(), cache=tmp_path, start=unused) == {CONV: 0.04}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"\x80\x04K\x01.", b"[" * 100_000])
def test_a_broken_table_is_measured_anew(tmp_path: Path, content: bytes) -> None:
    costs([CONV], Target(), cache=tmp_path, start=Scripted(250.0))
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert costs([CONV], Target(), cache=tmp_path, start=Scripted(40.0)) == {CONV: 0.04}
    assert costs([CONV], Target(), cache=tmp_path, start=unused) == {CONV: 0.04}


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    inside = tmp_path / "file" / "cache"
    assert costs([CONV], Target(), cache=inside, start=Scripted(250.0)) == {CONV: 0.25}
    assert costs([CONV], Target(), cache=inside, start=Scripted(40.0)) == {CONV: 0.04}


# --- how it fails ---


def test_a_failure_names_the_layer_and_keeps_what_was_measured(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"^no cost of linear inputs 24, outputs 10: it burns$"):
        costs([CONV, LINEAR], Target(), cache=tmp_path, start=Scripted(250.0, "it burns"))
    assert costs([CONV], Target(), cache=tmp_path, start=unused) == {CONV: 0.25}


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        (Layer("lstm", 4, 4, projection=2), "no cost of lstm .*projections"),
        (CONV.resized(groups=3), "no cost of conv .*groups 3: 3 groups do not divide"),
    ],
)
def test_a_layer_that_cannot_be_built_is_one_line(tmp_path: Path, layer: Layer, line: str) -> None:
    with pytest.raises(InputError, match=line) as failed:
        costs([layer], Target(), cache=tmp_path, start=Scripted())
    assert "\n" not in str(failed.value)


def test_a_layer_that_does_not_run_is_one_line(tmp_path: Path) -> None:
    small = Layer("conv", 8, 4, (2, 2), (3, 3), (1, 1), (0,) * 4, (1, 1))
    with pytest.raises(
        WorkerFailed, match="no cost of conv inputs 8, outputs 4, size 2x2"
    ) as failed:
        costs([small], Target(), cache=tmp_path)
    assert "\n" not in str(failed.value)


def test_only_the_cpu_has_costs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="onnxruntime has them for the cpu only"):
        costs([CONV], Target(provider="cuda"), cache=tmp_path, start=unused)


# --- for real ---


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_every_kind_of_layer_has_a_cost(
    tmp_path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.measure.costs.MS", 0.0)
    found = costs(KINDS, Target(batch=2), dtype=dtype, cache=tmp_path)
    assert list(found) == KINDS
    assert all(ms > 0 for ms in found.values())


def test_eight_bit_layers_run_in_eight_bit_kernels(tmp_path: Path) -> None:
    """A scale that onnxruntime does not expect leaves a convolution in float, four times slower."""
    kernels = {}
    for layer in KINDS:
        model, inputs = INT8[layer.op](layer, layer.copies)
        path = tmp_path / "layer.onnx"
        path.write_bytes(model)
        holder = Holder()
        holder.load(str(path), "cpu", 1)
        holder.feed = {f"x{at}": array for at, array in enumerate(inputs)}
        ran = holder.kernels(str(path), 0.0, str(tmp_path / "kernels"))["kernels"]
        assert all(len(kernel["us"]) >= 5 for kernel in ran)
        kernels[layer] = {kernel["op"] for kernel in ran}
    for layer, ops in kernels.items():
        match layer.op:
            case "conv":
                assert "QLinearConv" in ops
            case "linear":
                assert ops & {"QGemm", "QLinearMatMul"}
            case "lstm":
                assert "DynamicQuantizeLSTM" in ops
            case _:
                assert not any("Quant" in op or op.startswith("Q") for op in ops)


@pytest.mark.parametrize("builders", [FP32, INT8], ids=["fp32", "int8"])
@pytest.mark.parametrize("layer", KINDS, ids=str)
def test_a_graph_is_that_of_its_layer(layer: Layer, builders: Any, tmp_path: Path) -> None:
    model, inputs = builders[layer.op](layer, 3)
    (tmp_path / "layer.onnx").write_bytes(model)
    opened = open_session(tmp_path / "layer.onnx")
    (output,) = opened.run(None, {f"x{at}": array for at, array in enumerate(inputs)})
    assert np.isfinite(output).all()
    match layer.op:
        case "conv" | "deconv":
            assert output.shape[:2] == (3, layer.outputs)
        case "linear":
            assert output.size == 3 * layer.rows * layer.outputs
        case "attention":
            heads = layer.groups
            assert output.shape == (3, heads, layer.rows, layer.outputs // heads)
        case _:
            assert output.shape == (layer.rows, 3, layer.directions * layer.outputs)
    if layer.op == "conv":
        once = layer.inputs // layer.groups * int(np.prod(layer.kernel))
        assert layer.macs() * 3 == output.size * once
