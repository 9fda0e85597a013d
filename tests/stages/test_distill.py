"""Recovery: seeded, never worse than its start, and true to every kind of task."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from standing import at_rest, small_cnn, splits_of, task_of
from torch import Tensor, nn

from compressor import InputError, Split, Splits, StageError, Task, Unsuitable
from compressor.loading import torchfile
from compressor.metrics import METRICS
from compressor.recipe import Step
from compressor.stages import bind, distill, fitting, perform, prune
from compressor.task import Kind
from compressor.training.evaluation import evaluate
from compressor.training.loop import Batch, fit
from compressor.training.settings import Training

RNG = np.random.default_rng(0)
X = RNG.standard_normal((200, 4)).astype(np.float32)
Y = (X[:, 0] + X[:, 1] > 0).astype(np.int64) + (X[:, 2] > 0.5)


def mlp(outputs: int = 3, *, extra: tuple[nn.Module, ...] = ()) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), *extra, nn.ReLU(), nn.Linear(16, outputs))


def table(reference: nn.Module | None = None, **changes: Any) -> Task:
    return task_of(reference or mlp(), (4,), **{"splits": splits_of(X, Y), **changes})


def recovered(task: Task, folder: Path, **given: Any) -> tuple[nn.Module, dict[str, Any]]:
    settings = {"epochs": 2, **given}
    made = perform(distill, at_rest(task, folder), task, folder / "recovered", **settings)
    return torchfile.open_model(made, task)[0], dict(made.steps[-1])


def on_validate(model: nn.Module, task: Task) -> float:
    assert task.splits is not None
    return evaluate(model, task.splits.validate, METRICS[task.kind][task.metric])


def same(one: nn.Module, two: nn.Module) -> bool:
    others = two.state_dict()
    return all(torch.equal(value, others[name]) for name, value in one.state_dict().items())


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    task = table(mlp(extra=(nn.BatchNorm1d(16), nn.Dropout(0.3))))
    source = at_rest(task, tmp_path)
    one = perform(distill, source, task, tmp_path / "one", epochs=2).path.read_bytes()
    torch.rand(3)  # whatever the caller drew in between
    two = perform(distill, source, task, tmp_path / "two", epochs=2).path.read_bytes()
    assert one == two
    assert source.checked() is source


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    one, _ = recovered(table(seed=0), tmp_path)
    two, _ = recovered(table(seed=1), tmp_path)
    assert not same(one, two)


def test_the_caller_s_random_numbers_and_threads_stay(tmp_path: Path) -> None:
    task = table(mlp(extra=(nn.Dropout(),)))
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    recovered(task, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_it_learns_and_says_so(tmp_path: Path) -> None:
    task = table()
    before = on_validate(task.model(), task)
    model, step = recovered(task, tmp_path, epochs=15, learning_rate=5e-2, loss="labels")
    assert on_validate(model, task) > max(before, 0.8)
    history = step["facts"]["history"]
    assert [epoch["epoch"] for epoch in history] == list(range(1, 16))
    assert history[-1]["loss"] < history[0]["loss"]
    assert max(epoch["accuracy"] for epoch in history) == on_validate(model, task)
    assert step["settings"]["epochs"] == 15


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = mlp(extra=(nn.BatchNorm1d(16),)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("given", "asked"),
    [({"loss": "labels"}, 0), ({"weight": 0.0}, 0), ({"weight": 0.5}, 4), ({"weight": 1.0}, 4)],
)
def test_the_teacher_is_asked_once_a_batch_and_never_changed(
    tmp_path: Path, given: dict[str, Any], asked: int
) -> None:
    teacher, before = Counted().eval(), Counted()
    handed = iter([Counted(), teacher])  # first what the artifact is filled into
    source = at_rest(table(Counted()), tmp_path)
    task = table(Counted(), model=lambda: next(handed))
    how = {"loss": "distill", "epochs": 1, "batch_size": 32, **given}
    perform(distill, source, task, tmp_path / "r", **how)
    assert teacher.calls == asked
    assert same(teacher, before)
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_weight_is_the_teacher_s_share(tmp_path: Path) -> None:
    """With all of the weight on the teacher the labels do not matter, and the other way round."""
    wrong = splits_of(X, Y[::-1].copy())
    validate = splits_of(X, Y).validate
    wrong = Splits(wrong.train, validate, wrong.calibrate, wrong.test)
    student, _ = distinct(tmp_path, table(), weight=1.0)
    other, _ = distinct(tmp_path, table(splits=wrong), weight=1.0)
    assert same(student, other)
    third, _ = distinct(tmp_path, table(splits=wrong), weight=0.5)
    assert not same(student, third)


def distinct(folder: Path, task: Task, **given: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Recovery of a model that is not its teacher: the teacher's weights, halved."""
    start = task.model()
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.mul_(-0.5)
    path = folder / "start.safetensors"
    torchfile.write(path, start, task.source)
    source = type(at_rest(task, folder)).of(path, "torch")
    made = perform(distill, source, task, folder / "r", epochs=3, loss="distill", **given)
    return torchfile.open_model(made, task)[0], dict(made.steps[-1])


@pytest.mark.parametrize("learning_rate", [1.0, 100.0, 1e4])
def test_validation_never_ends_worse_than_it_began(tmp_path: Path, learning_rate: float) -> None:
    good, _ = recovered(table(), tmp_path, epochs=15, learning_rate=1e-2)
    task = table(good)
    model, _ = recovered(task, tmp_path, epochs=3, learning_rate=learning_rate)
    assert on_validate(model, task) >= on_validate(good, task)


def test_a_loss_that_is_no_number_ends_the_stage(tmp_path: Path) -> None:
    task = task_of(mlp(1), (4,), kind="regression", splits=splits_of(X, X[:, :1]))
    with pytest.raises(StageError) as caught:
        recovered(task, tmp_path, epochs=5, learning_rate=1e30)
    said = str(caught.value)
    assert said.startswith("the ")
    assert "lower learning_rate (1e+30)" in said
    assert "\n" not in said
    assert not (tmp_path / "recovered.safetensors").exists()


@pytest.mark.parametrize("where", ["loss", "metric"])
def test_what_diverged_holds_its_best_weights(where: str) -> None:
    model, task = mlp(), table()
    before = copy.deepcopy(model)
    assert task.splits is not None
    broken = Split.arrays(X[:10], Y[:10])
    nan = Split.arrays(np.full_like(X[:10], np.nan), X[:10, :3])
    calls = 0

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        size: Tensor = net(*batch.inputs).square().mean()
        return size * (torch.nan if where == "loss" and calls > 2 else 1.0)

    kind: Kind = "classification" if where == "loss" else "regression"
    metric = "accuracy" if where == "loss" else "mse"
    splits = Splits(task.splits.train, broken if where == "loss" else nan, broken, broken)
    with pytest.raises(
        StageError,
        match=r"the (loss became nan in epoch 1, step 3;|mse on validate is not defined on its 10)",
    ):
        fit(
            model,
            splits,
            loss,
            Training(epochs=2, learning_rate=1e-3, batch_size=32),
            metric=(metric, METRICS[kind][metric]),
            seed=0,
        )
    assert same(model, before)


@pytest.mark.parametrize("loss", ["distill", "labels"])
@pytest.mark.parametrize(
    ("kind", "model", "shape", "targets"),
    [
        ("classification", mlp(), (4,), Y),
        ("classification", mlp(), (4,), Y.astype(np.int32)),
        ("binary", mlp(1), (4,), Y % 2),
        ("binary", nn.Sequential(mlp(1), nn.Flatten(0)), (4,), Y % 2),
        ("binary", mlp(1), (4,), (Y % 2)[:, None].astype(np.float32)),
        ("multilabel", mlp(3), (4,), np.stack([Y % 2] * 3, 1)),
        ("regression", mlp(1), (4,), X[:, 0]),
        ("regression", nn.Sequential(mlp(1), nn.Flatten(0)), (4,), X[:, 0]),
        ("regression", mlp(2), (4,), X[:, :2].astype(np.float64)),
        ("segmentation", nn.Conv2d(1, 3, 3, padding=1), (1, 4, 4), None),
    ],
)
def test_every_kind_trains(
    tmp_path: Path, kind: Kind, model: nn.Module, shape: tuple[int, ...], targets: Any, loss: str
) -> None:
    x = RNG.standard_normal((200, *shape)).astype(np.float32)
    y = RNG.integers(0, 3, (200, 4, 4)) if targets is None else targets
    metric = {"regression": "mse", "segmentation": "pixel_accuracy"}.get(kind, "accuracy")
    task = task_of(model, shape, kind=kind, splits=splits_of(x, y), metric=metric)
    _, step = recovered(task, tmp_path, loss=loss)
    assert len(step["facts"]["history"]) == 2
    assert all(np.isfinite(epoch["loss"]) for epoch in step["facts"]["history"])


def test_the_cut_structure_is_kept(tmp_path: Path) -> None:
    x = RNG.standard_normal((100, 1, 8, 8)).astype(np.float32)
    task = task_of(small_cnn(), (1, 8, 8), splits=splits_of(x, np.arange(100) % 5))
    cut = prune(at_rest(task, tmp_path), task, tmp_path / "cut", ratio=0.5)
    made = perform(distill, cut, task, tmp_path / "r", epochs=2, batch_size=16)
    before, edits = torchfile.open_model(cut, task)
    after, same_edits = torchfile.open_model(made, task)
    assert edits
    assert edits == same_edits
    assert [value.shape for value in after.state_dict().values()] == [
        value.shape for value in before.state_dict().values()
    ]
    assert [step["stage"] for step in made.steps] == ["prune", "distill"]


def test_frozen_parameters_stay_as_they_are(tmp_path: Path) -> None:
    model = mlp()
    model.get_submodule("0").requires_grad_(False)
    task = table(model)
    found, _ = recovered(task, tmp_path, epochs=5, learning_rate=1e-2, loss="labels")
    assert same(found.get_submodule("0"), model.get_submodule("0"))
    assert not same(found.get_submodule("2"), model.get_submodule("2"))
    assert not found.get_submodule("0").weight.requires_grad


def test_nothing_to_train(tmp_path: Path) -> None:
    with pytest.raises(Unsuitable, match="every parameter is frozen"):
        recovered(table(mlp().requires_grad_(False)), tmp_path)
    with pytest.raises(Unsuitable, match="no data to train on: add --data SPEC"):
        recovered(table(splits=None), tmp_path)


@pytest.mark.parametrize("count", [33, 65])
def test_a_last_batch_of_one_does_not_stop_batch_normalisation(tmp_path: Path, count: int) -> None:
    whole = splits_of(X, Y)
    train = whole.train.take(np.arange(count))
    splits = Splits(train, whole.validate, train, whole.test)
    task = table(mlp(extra=(nn.BatchNorm1d(16),)), splits=splits)
    _, step = recovered(task, tmp_path, batch_size=32)
    assert len(step["facts"]["history"]) == 2


def test_epochs_follow_from_the_size_of_the_data(tmp_path: Path) -> None:
    assert recovered(table(), tmp_path, epochs=None)[1]["settings"]["epochs"] == 60


def test_no_grad_around_it_does_not_matter(tmp_path: Path) -> None:
    with torch.no_grad():
        recovered(table(), tmp_path)


def test_the_test_split_is_never_read(tmp_path: Path) -> None:
    def never(at: Any) -> Any:
        raise AssertionError

    whole = splits_of(X, Y)
    forbidden = Split(never, np.arange(10))
    splits = Splits(whole.train, whole.validate, forbidden, forbidden)
    recovered(table(splits=splits), tmp_path)


def test_data_is_not_made_up_where_there_is_some() -> None:
    with pytest.raises(InputError, match="synthesize 64 makes up examples where there are none"):
        fitting(*bind((Step("distill", {"synthesize": 64}, "r", "baseline"),)), table())


def test_volumes_train_with_channels_last(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    x = np.random.default_rng(0).standard_normal((60, 1, 4, 4, 4)).astype(np.float32)
    y = (x.mean(axis=(1, 2, 3, 4)) > 0).astype(np.int64)
    task = task_of(model, (1, 4, 4, 4), splits=splits_of(x, y))
    one, _ = recovered(task, tmp_path, channels_last=True)
    two, _ = recovered(task, tmp_path)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[name], rtol=1e-4, atol=1e-5)
