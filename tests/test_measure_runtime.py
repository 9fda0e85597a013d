"""Sessions: the settings that are honoured, and each refusal in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, save_model

import compressor
from compressor.errors import InputError
from compressor.measure import runtime
from compressor.measure.environment import cores
from compressor.measure.runtime import RUNTIMES, ProviderAbsent, open_session, session
from compressor.measurement import OPENVINO, PLACES, SETTINGS, TORCH


@pytest.fixture
def best(tmp_path: Path) -> Path:
    """``best.onnx``: sum and product of two inputs of shape (n, 2)."""

    def value(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2])

    nodes = [
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Mul", ["a", "b"], ["product"]),
    ]
    names = "a", "b", "sum", "product"
    a, b, total, product = map(value, names)
    graph = helper.make_graph(nodes, "both", [a, b], [total, product])
    opset = [helper.make_opsetid("", 17)]
    save_model(helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "best.onnx")
    return tmp_path / "best.onnx"


def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``session`` asks of ``open_session``."""
    seen: dict[str, Any] = {}

    def opened(
        path: Path, provider: str, threads: int, settings: Any, disabled: Any, runtime: str
    ) -> Any:
        seen.update(path=path, provider=provider, threads=threads, settings=settings)
        seen.update(disabled=disabled, runtime=runtime)
        return open_session(path, "cpu", threads, settings, disabled)

    monkeypatch.setattr(runtime, "open_session", opened)
    return seen


def test_a_session_predicts(best: Path) -> None:
    one, two = np.array([[1, 2]], dtype=np.float32), np.array([[3, 4]], dtype=np.float32)
    total, product = compressor.session(best)(one, two)
    assert (total.tolist(), product.tolist()) == ([[4, 6]], [[3, 8]])


@pytest.mark.parametrize("given", [0, 1, 3])
def test_another_number_of_inputs_is_refused(best: Path, given: int) -> None:
    with pytest.raises(InputError, match=rf"takes 2 inputs \(a, b\), {given} were given"):
        session(best)(*[np.zeros((1, 2), dtype=np.float32)] * given)


def test_the_runs_settings_are_used(best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "runtime": "openvino",
        "provider": "cuda",
        "threads": 1,
        "settings": {"session.intra_op.allow_spinning": "0"},
        "disabled": ["SkipLayerNormFusion"],
    }
    best.with_suffix(".json").write_text(json.dumps(said))
    for path in (best, best.parent, str(best.parent)):
        seen = asked(monkeypatch)
        session(path)
        assert seen == {"path": best, **said}


def test_any_other_file_gets_the_cpu_and_every_core(
    best: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = asked(monkeypatch)
    other = best.rename(best.with_name("model.onnx"))
    other.with_suffix(".json").write_text("a file of somebody else")
    session(other)
    assert seen == {
        "path": other,
        "runtime": "onnxruntime",
        "provider": "cpu",
        "threads": cores(),
        "settings": {},
        "disabled": (),
    }


@pytest.mark.parametrize("name", ["missing.onnx", "."])
def test_no_model_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"onnx does not exist: give a run folder or an ONNX file"):
        session(tmp_path / name)


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(InputError, match=r"text\.onnx cannot be opened: .*Protobuf") as refused:
        session(tmp_path / "text.onnx")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("said", ["", "{", "[1]"])
def test_settings_that_are_none_are_one_line(best: Path, said: str) -> None:
    best.with_suffix(".json").write_text(said)
    with pytest.raises(InputError, match=r"best\.json does not hold a run's settings"):
        session(best)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is here"
)
def test_an_absent_provider_is_named(best: Path) -> None:
    with pytest.raises(
        ProviderAbsent, match=r"onnxruntime here has no CUDAExecutionProvider, only .*CPU"
    ):
        open_session(best, "cuda")
    best.with_suffix(".json").write_text('{"provider": "cuda"}')
    with pytest.raises(ProviderAbsent):
        session(best)


def test_an_unknown_provider_is_named(best: Path) -> None:
    with pytest.raises(ProviderAbsent, match=r"provider 'tpu': choose from cpu, cuda"):
        open_session(best, "tpu")


def test_threads_and_settings_reach_onnxruntime(
    best: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = onnxruntime.InferenceSession

    def watched(path: str, options: Any, providers: list[str], **more: Any) -> Any:
        seen.append((options, providers, more))
        return real(path, options, providers=providers, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    open_session(best, threads=2, disabled=("SkipLayerNormFusion",))
    ((options, providers, more),) = seen
    assert more == {"disabled_optimizers": ["SkipLayerNormFusion"]}
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert providers == ["CPUExecutionProvider"]
    for key, value in SETTINGS.items():
        assert options.get_session_config_entry(key) == value


def test_a_session_that_falls_back_is_refused(best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in: onnxruntime claims CUDA and opens the CPU."""
    present = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: present)
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: real(path, options, providers=providers[1:]),
    )
    with pytest.raises(ProviderAbsent, match="fell back to CPUExecutionProvider"):
        open_session(best, "cuda")


@pytest.mark.parametrize(
    ("runtime_", "provider", "said"),
    [
        ("tflite", "cpu", "runtime 'tflite': choose from onnxruntime, openvino"),
        ("openvino", "cuda", "provider 'cuda' of OpenVINO: only cpu"),
    ],
)
def test_a_runtime_that_cannot_be_meant_is_named(
    best: Path, runtime_: str, provider: str, said: str
) -> None:
    with pytest.raises(ProviderAbsent, match=said):
        open_session(best, provider, runtime=runtime_)


def test_without_openvino_the_line_says_how_to_install_it(
    best: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    best.with_suffix(".json").write_text('{"runtime": "openvino"}')
    with pytest.raises(ProviderAbsent, match=r"pip install 'compressor\[openvino\]'"):
        session(best)


def test_openvino_gives_the_same_numbers_by_its_own_runtime(best: Path) -> None:
    pytest.importorskip("openvino")
    best.with_suffix(".json").write_text('{"runtime": "openvino", "threads": 1}')
    a = np.arange(10, dtype=np.float32).reshape(5, 2)
    for batch in (a, a[:1]):
        total, product = session(best)(batch, batch)
        np.testing.assert_array_equal(total, 2 * batch)
        np.testing.assert_array_equal(product, batch * batch)


@pytest.mark.parametrize(("kind", "hint"), [("FLOAT", "f32"), ("FLOAT16", "f16")])
def test_openvino_keeps_the_files_precision(tmp_path: Path, kind: str, hint: str) -> None:
    pytest.importorskip("openvino")
    of = [helper.make_tensor_value_info(n, getattr(TensorProto, kind), ["n", 2]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", of[:1], of[1:])
    opset = [helper.make_opsetid("", 17)]
    save_model(helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "one.onnx")
    opened = open_session(tmp_path / "one.onnx", runtime="openvino")
    assert opened.settings == {**OPENVINO, "INFERENCE_PRECISION_HINT": hint}


def test_openvino_starts_without_its_telemetry() -> None:
    pytest.importorskip("openvino")
    code = (
        "import sys; from compressor.measure.runtime import import_openvino; import_openvino();"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_place_has_a_runtime_that_can_open_it() -> None:
    assert {runtime for runtime, _ in PLACES.values()} == set(RUNTIMES)
    assert set(TORCH) < set(RUNTIMES)


def test_telemetry_is_off_in_this_process() -> None:
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
