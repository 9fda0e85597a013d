"""Pictures made from a teacher have its statistics, and teach what noise does not."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from compressor import InputError, data, loading, zoo
from compressor.measure.threads import one_thread
from compressor.task import Array, Input, Split
from compressor.training.losses import softened
from compressor.training.synthesis import distance, synthesize

INPUTS = (Input("input", (1, 8, 8)),)
COUNT = 256


def net(width: int, *, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * width, classes),
    )


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.read("digits", 0)


@pytest.fixture(scope="module")
def teacher(digits: data.Data) -> nn.Module:
    """A small net with batch normalisation after a few epochs on the digits."""
    torch.manual_seed(0)
    model, order = net(16), np.random.default_rng(0)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    with one_thread():
        for _ in range(4):
            for (x,), y in digits.splits.train.batches(64, order):
                loss = F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def made(teacher: nn.Module) -> Array:
    with one_thread():
        return synthesize(teacher, INPUTS, COUNT, seed=0, steps=100)[0]


@pytest.fixture(scope="module")
def noise() -> Array:
    return np.random.default_rng(0).standard_normal((COUNT, 1, 8, 8)).astype(np.float32)


def accuracy(model: nn.Module, split: Split) -> float:
    (x,), y = split.head(len(split))
    model.eval()
    with torch.no_grad():
        return float((model(torch.from_numpy(x)).argmax(1).numpy() == y).mean())


def taught(teacher: nn.Module, pictures: Array) -> nn.Module:
    """A narrower net that has seen nothing but the teacher's outputs on ``pictures``."""
    torch.manual_seed(1)
    student, x = net(8), torch.from_numpy(pictures)
    optimiser = torch.optim.Adam(student.parameters(), 3e-3)
    with torch.no_grad():
        goal = teacher(x)
    for _ in range(20):
        for at in torch.randperm(len(x)).split(64):
            loss = softened(student(x[at]), goal[at], 4.0)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return student


def test_the_statistics_are_those_of_training(
    teacher: nn.Module, made: Array, noise: Array, digits: data.Data
) -> None:
    assert made.shape == (COUNT, 1, 8, 8)
    assert made.dtype == np.float32
    assert np.isfinite(made).all()
    assert distance(teacher, (made,)) < 0.01 * distance(teacher, (noise,))
    # As near as real pictures of the same number.
    assert distance(teacher, (made,)) < distance(teacher, digits.splits.train.head(COUNT)[0])


def test_each_class_is_there_as_often(teacher: nn.Module, made: Array) -> None:
    with torch.no_grad():
        sure = teacher(torch.from_numpy(made)).softmax(1)
    counts = np.bincount(sure.argmax(1), minlength=10)
    assert counts.min() >= 0.8 * COUNT / 10
    assert sure.amax(1).mean() > 0.9


def test_a_student_learns_from_nothing_but_them(
    teacher: nn.Module, made: Array, noise: Array, digits: data.Data
) -> None:
    """More than from noise, and from noise with the mean and deviation of real digits too."""
    test = digits.splits.test
    real = digits.splits.train.head(COUNT)[0][0]
    near = (noise * real.std() + real.mean()).astype(np.float32)
    found = [accuracy(taught(teacher, each), test) for each in (made, near, noise)]
    assert accuracy(teacher, test) > 0.95
    assert found[0] > 0.85, found
    assert found[0] > found[1] + 0.05, found
    assert found[0] > found[2] + 0.25, found


def test_the_distance_is_that_of_means_and_variances(teacher: nn.Module, noise: Array) -> None:
    wanted, x = 0.0, torch.from_numpy(noise).double()
    for layer in copy.deepcopy(teacher).double().children():  # type: ignore[operator]
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            flat = x.transpose(0, 1).flatten(1).detach().numpy()
            wanted += float(np.linalg.norm(flat.mean(1) - layer.running_mean.numpy()))
            wanted += float(np.linalg.norm(flat.var(1) - layer.running_var.numpy()))
        x = layer(x)
    assert distance(teacher, (noise,)) == pytest.approx(wanted, rel=1e-4)


def test_the_same_seed_gives_the_same_pictures(teacher: nn.Module) -> None:
    one = synthesize(teacher, INPUTS, 20, seed=0, steps=5)[0]
    torch.rand(3)  # whatever the caller drew in between
    two, other = (synthesize(teacher, INPUTS, 20, seed=seed, steps=5)[0] for seed in (0, 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_the_teacher_stays_as_it_is(teacher: nn.Module) -> None:
    model = copy.deepcopy(teacher).train()
    model.get_submodule("1").eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    with torch.no_grad():
        synthesize(model, INPUTS, 8, seed=0, steps=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_many_are_made_in_even_batches(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch of one, whose statistics would be nothing."""
    monkeypatch.setattr("compressor.training.synthesis.TOGETHER", 8)
    sizes = []
    handle = teacher.register_forward_hook(lambda module, x, y: sizes.append(len(y)))
    try:
        found = synthesize(teacher, INPUTS, 17, seed=0, steps=1)[0]
    finally:
        handle.remove()
    assert found.shape == (17, 1, 8, 8)
    assert set(sizes) == {5, 6}
    assert len(np.unique(found, axis=0)) == 17


class Two(nn.Module):
    """Two pictures in, a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = net(2, classes=3), net(2, classes=3)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"scores": self.left(left) + self.right(right)}


@pytest.mark.parametrize("kind", ["classification", "binary", "multilabel", "regression"])
def test_other_kinds_and_more_inputs(kind: str) -> None:
    torch.manual_seed(0)
    teacher = Two() if kind != "binary" else net(2, classes=1)
    for _ in range(50):  # what it has seen: pictures that are brighter than noise
        teacher(*torch.randn(1 + (kind != "binary"), 64, 1, 8, 8) + 2)
    inputs = tuple(Input(str(at), (1, 8, 8), "float16") for at in range(1 + (kind != "binary")))
    made = synthesize(teacher, inputs, 12, 0, kind=kind, steps=40)  # type: ignore[arg-type]
    assert [part.shape for part in made] == [(12, 1, 8, 8)] * len(inputs)
    assert {part.dtype for part in made} == {np.dtype("float16")}
    begun = synthesize(teacher, inputs, 12, 0, kind=kind, steps=1)  # type: ignore[arg-type]
    each = [tuple(part.astype(np.float32) for part in parts) for parts in (made, begun)]
    assert distance(teacher, each[0]) < 0.5 * distance(teacher, each[1])


@pytest.mark.parametrize("given", [Input("rows", (8,)), Input("words", (1, 8, 8), "int64")])
def test_only_pictures_are_made_up(teacher: nn.Module, given: Input) -> None:
    with pytest.raises(InputError, match=f"input '{given.name}' is {given.dtype}") as caught:
        synthesize(teacher, (given,), 8, 0)
    assert "only floating pictures (channels, height, width)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_statistics_there_is_nothing_to_match(trained: Path) -> None:
    """The zoo's cnn has no batch normalisation; others may not keep what they saw."""
    forgetful = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten())
    for model in (loading.load(trained), forgetful):
        with pytest.raises(InputError) as caught:
            synthesize(model, INPUTS, 8, 0)
        assert str(caught.value) == (
            "Sequential has no batch normalisation with running statistics, from which pictures "
            "could be made: give data to train on"
        )
    deep = zoo.build("resnet20", {"in_channels": 1, "classes": 10})
    assert synthesize(deep, INPUTS, 2, 0, steps=1)[0].shape == (2, 1, 8, 8)
