"""One trained task for every benchmark: the MNIST-sized CNN on digits, 28x28."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.artifact import Artifact
from compressor.demo import demo
from compressor.loading import task as tasks
from compressor.loading import torchfile
from compressor.stages import STAGES
from compressor.task import Task


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The cnn of 1.2 M parameters, one epoch old: enough to time, not to judge."""
    path = tmp_path_factory.mktemp("model") / "model.pt"
    return tasks(demo("cnn", data="digits?size=28", epochs=1, out=path).path)


@pytest.fixture(scope="session")
def torch_form(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The model at rest, as stages take it."""
    path = tmp_path_factory.mktemp("torch") / "baseline.safetensors"
    torchfile.write(path, task.model(), task.source)
    return Artifact.of(path, "torch")


@pytest.fixture(scope="session")
def onnx_form(
    task: Task, torch_form: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """The same, exported."""
    return STAGES["export"](torch_form, task, tmp_path_factory.mktemp("onnx") / "baseline")


@pytest.fixture
def into(tmp_path: Path) -> Path:
    """Where a stage writes."""
    return tmp_path / "made"
