"""Another architecture is taught, pruned and quantized like the original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from standing import at_rest, small_cnn, splits_of, task_of
from torch import nn

from compressor import InputError, load
from compressor.loading import torchfile
from compressor.recipe import Step
from compressor.stages import bound, distill, export, fitting, perform, prune
from compressor.stages.student import student

RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 1, 8, 8)).astype(np.float32)


def narrow() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )


BUILD = {"shop:narrow": narrow}


def test_what_follows_works_on_the_student(tmp_path: Path) -> None:
    task = task_of(small_cnn(), (1, 8, 8), splits=splits_of(X, np.arange(60) % 5), students=BUILD)
    source = at_rest(task, tmp_path)
    made = student(source, task, tmp_path / "s", factory="shop:narrow")
    cut = perform(prune, made, task, tmp_path / "cut", ratio=0.5)
    taught = perform(distill, cut, task, tmp_path / "taught", epochs=1)
    for artifact, width in ((made, 16), (cut, 8), (taught, 8)):
        model, _ = torchfile.open_model(artifact, task)
        assert model[0].weight.shape == (width, 1, 3, 3)  # type: ignore[index]
        assert torchfile.origin(artifact)["factory"] == "shop:narrow"
    assert [step["stage"] for step in taught.steps] == ["student", "prune", "distill"]
    # The original is still the original, and what was made from it as well.
    model, _ = torchfile.open_model(source, task)
    assert model[0].weight.shape == (16, 1, 3, 3)  # type: ignore[index]
    assert len(model) == len(small_cnn())  # type: ignore[arg-type]
    assert export(taught, task, tmp_path / "onnx").path.is_file()


def test_it_is_built_with_the_weights_of_its_factory(tmp_path: Path) -> None:
    task = task_of(small_cnn(), (1, 8, 8), students=BUILD)
    made = student(at_rest(task, tmp_path), task, tmp_path / "s", factory="shop:narrow")
    model, _ = torchfile.open_model(made, task)
    for name, value in narrow().state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_its_file_loads_by_its_factory(tmp_path: Path) -> None:
    task = task_of(small_cnn(), (1, 8, 8), splits=splits_of(X, np.arange(60) % 5), students=BUILD)
    made = student(at_rest(task, tmp_path), task, tmp_path / "s", factory="shop:narrow")
    cut = perform(prune, made, task, tmp_path / "cut", ratio=0.5)
    with pytest.raises(InputError, match="add --arch shop:narrow"):
        load(cut.path)
    again = load(cut.path, arch=narrow)
    model, _ = torchfile.open_model(cut, task)
    x = torch.from_numpy(X)
    assert torch.equal(again(x), model(x))


def test_a_factory_that_nobody_named_is_refused() -> None:
    task = task_of(small_cnn(), (1, 8, 8))
    step = bound(Step("student", {"factory": "os:system"}, name="s"))
    with pytest.raises(InputError, match="student 'os:system' is code to run: add --student os:sy"):
        fitting(step, task)


def test_the_teacher_is_the_original(tmp_path: Path) -> None:
    """A student that sees no label comes to agree with the original."""
    y = np.arange(60) % 5
    wrong = splits_of(X, y)
    task = task_of(small_cnn(), (1, 8, 8), splits=wrong, students=BUILD)
    made = student(at_rest(task, tmp_path), task, tmp_path / "s", factory="shop:narrow")
    settings = {"epochs": 40, "loss": "kd", "weight": 1.0, "learning_rate": 2e-2}
    taught = perform(distill, made, task, tmp_path / "t", **settings)
    history = taught.steps[-1]["facts"]["history"]
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
