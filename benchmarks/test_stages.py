"""What the stages cost, on the CNN of the MNIST examples."""

from __future__ import annotations

from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from compressor.artifact import Artifact
from compressor.stages import STAGES
from compressor.task import Task


def test_prune(benchmark: BenchmarkFixture, task: Task, torch_form: Artifact, into: Path) -> None:
    """Half of the channels, proof included."""
    made = benchmark.pedantic(
        STAGES["prune"], (torch_form, task, into), {"ratio": 0.5}, rounds=5, warmup_rounds=1
    )
    benchmark.extra_info["largest difference in the proof"] = made.steps[-1]["facts"]["proof"]


def test_export(benchmark: BenchmarkFixture, task: Task, torch_form: Artifact, into: Path) -> None:
    """To ONNX, parity at three batch sizes included."""
    benchmark.pedantic(STAGES["export"], (torch_form, task, into), rounds=3, warmup_rounds=1)


def test_quantize_static(
    benchmark: BenchmarkFixture, task: Task, onnx_form: Artifact, into: Path
) -> None:
    """Calibrated on 512 examples."""
    made = benchmark.pedantic(
        STAGES["quantize"],
        (onnx_form, task, into),
        {"scheme": "static", "samples": 512},
        rounds=3,
        warmup_rounds=1,
    )
    benchmark.extra_info["size ratio"] = onnx_form.size_bytes / made.size_bytes


def test_quantize_dynamic(
    benchmark: BenchmarkFixture, task: Task, onnx_form: Artifact, into: Path
) -> None:
    """Weights of the two linear layers."""
    made = benchmark.pedantic(
        STAGES["quantize"],
        (onnx_form, task, into),
        {"scheme": "dynamic"},
        rounds=3,
        warmup_rounds=1,
    )
    benchmark.extra_info["size ratio"] = onnx_form.size_bytes / made.size_bytes
