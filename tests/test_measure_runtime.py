"""Sessions: the settings that are honoured, and each refusal in one line."""

from __future__ import annotations

import json
import os
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
from compressor.measure.runtime import ProviderAbsent, open_session, session
from compressor.measurement import SETTINGS


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

    def opened(path: Path, provider: str, threads: int, settings: Any) -> Any:
        seen.update(path=path, provider=provider, threads=threads, settings=settings)
        return open_session(path, "cpu", threads, settings)

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
    said = {"provider": "cuda", "threads": 1, "settings": {"session.intra_op.allow_spinning": "0"}}
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
    assert seen == {"path": other, "provider": "cpu", "threads": cores(), "settings": {}}


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

    def watched(path: str, options: Any, providers: list[str]) -> Any:
        seen.append((options, providers))
        return real(path, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    open_session(best, threads=2)
    ((options, providers),) = seen
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


def test_telemetry_is_off_in_this_process() -> None:
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
