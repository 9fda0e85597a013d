"""From a model and data to a task: what is inferred, and what does not fit."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor import Splits, Task, save, zoo
from compressor.errors import InputError
from compressor.loading.task import first, task, tensors
from compressor.task import Kind, Split

N = 40
RNG = np.random.default_rng(0)
X = RNG.standard_normal((N, 4)).astype(np.float32)
IMAGES = RNG.standard_normal((N, 1, 8, 8)).astype(np.float32)
CLASSES = np.arange(N) % 3
BITS = np.arange(N) % 2


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).squeeze(1)  # type: ignore[no-any-return]


class Of(nn.Module):
    """A linear layer, and a function of its output."""

    def __init__(self, function: Callable[[Tensor], Any], width: int = 3) -> None:
        super().__init__()
        self.body, self.function = nn.Linear(4, width), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.body(x))


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.body(x + y)  # type: ignore[no-any-return]


def refused(model: Any, **given: Any) -> str:
    with pytest.raises(InputError) as caught:
        task(model, **given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "x", "targets", "kind"),
    [
        (nn.Linear(4, 3), X, CLASSES, "classification"),
        (nn.Linear(4, 2), X, BITS, "classification"),
        (nn.Linear(4, 3), X, CLASSES.astype(np.int32), "classification"),
        (nn.Linear(4, 1), X, BITS, "binary"),
        (nn.Linear(4, 1), X, BITS[:, None], "binary"),
        (nn.Linear(4, 1), X, BITS.astype(bool), "binary"),
        (nn.Linear(4, 1), X, BITS.astype(np.float32), "binary"),
        (nn.Linear(4, 1), X, BITS[:, None].astype(np.float64), "binary"),
        (Squeezed(), X, BITS, "binary"),
        (nn.Linear(4, 3), X, np.stack([BITS, 1 - BITS, BITS], 1), "multilabel"),
        (nn.Linear(4, 3), X, np.stack([BITS, 1 - BITS, BITS], 1) * 1.0, "multilabel"),
        (nn.Linear(4, 1), X, X[:, 0], "regression"),
        (nn.Linear(4, 1), X, X[:, :1], "regression"),
        (Squeezed(), X, X[:, 0], "regression"),
        (nn.Linear(4, 3), X, X[:, :3], "regression"),
        (nn.Conv2d(1, 3, 1), IMAGES, RNG.integers(0, 3, (N, 8, 8)), "segmentation"),
        (nn.Conv2d(1, 1, 1), IMAGES, IMAGES, "regression"),
    ],
)
def test_the_kind_follows_from_output_and_targets(
    model: nn.Module, x: Any, targets: Any, kind: Kind
) -> None:
    assert task(model, data=(x, targets)).kind == kind


@pytest.mark.parametrize(
    ("width", "kind"), [(3, "classification"), (1, "regression")]
)  # fmt: skip
def test_without_data_the_output_tells(tmp_path: Path, width: int, kind: Kind) -> None:
    path = tmp_path / "m.pt"
    arguments = {"features": 4, "outputs": width, "hidden": []}
    model = zoo.build("mlp", arguments)
    save(model, path, factory="compressor.zoo:mlp", arguments=arguments, inputs=torch.zeros(1, 4))
    found = task(path)
    assert (found.kind, found.splits, found.data) == (kind, None, None)
    assert found.name == "m"
    assert task(path, kind="binary" if width == 1 else "multilabel").kind in (
        "binary",
        "multilabel",
    )


def test_a_kind_that_was_said_goes_before_one_that_is_guessed(tmp_path: Path) -> None:
    data = {"train": (X, BITS.astype(np.float32)), "kind": "regression"}
    assert task(nn.Linear(4, 1), data=data).kind == "regression"
    assert task(nn.Linear(4, 1), data=data, kind="binary").kind == "binary"
    save_as = {"factory": "compressor.zoo:mlp", "inputs": torch.zeros(1, 4), "kind": "binary"}
    path = tmp_path / "m.pt"
    arguments = {"features": 4, "outputs": 1, "hidden": []}
    save(zoo.build("mlp", arguments), path, arguments=arguments, **save_as)
    assert task(path).kind == "binary"


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        (nn.Linear(5, 3), (X, CLASSES), "cannot take the data's examples (float32 (2, 4)): m"),
        (nn.Linear(4, 3), (IMAGES, CLASSES), "cannot take the data's examples (float32 (2, 1, 8"),
        (nn.Linear(4, 3), ((X, X), CLASSES), "cannot take the data's examples (float32 (2, 4), fl"),
        (Sum(), (X, CLASSES), "cannot take the data's examples"),
        (nn.Embedding(4, 3), (X, CLASSES), "cannot take the data's examples"),
        (nn.Linear(4, 3), (X, CLASSES + 1), "run from 1 to 3; the model has 3 classes, so the"),
        (nn.Linear(4, 2), (X, CLASSES), "labels of train run from 0 to 2; the model has 2 classes"),
        (nn.Linear(4, 3), (X, CLASSES - 1), "labels start at 0"),
        (nn.Linear(4, 3), (X, np.stack([CLASSES - 1] * 3, 1)), "no task kind has both"),
        (nn.Linear(4, 3), (X, X[:, 0]), "do not fit an output of shape (2, 3)"),
        (nn.Linear(4, 1), (X, np.arange(N)), "has both (regression targets are floats)"),
        (nn.Linear(4, 2), (X, X[:, :3]), "no task kind has both"),
        (nn.Conv2d(1, 3, 1), (IMAGES, np.zeros((N, 4, 4), int)), "the model's output for 2 exa"),
        (nn.Conv2d(1, 2, 1), (IMAGES, np.full((N, 8, 8), 2)), "labels of train run from 2 to 2"),
        (Of(lambda y: y.sum(0), 2), (X, BITS), "turns a batch of 2 into shape (2,)"),
        (Of(lambda y: y.sum(0)), (X, CLASSES), "the first axis of its output must be the example"),
        (Of(lambda y: y.sum()), (X, CLASSES), "into shape (): the first axis"),
        (Of(lambda y: y / 0), (X, CLASSES), "gives NaN or infinity on the data's first examples"),
        (Of(lambda y: (y, y / 0)), (X, CLASSES), "gives NaN or infinity"),
        (Of(lambda y: None), (X, CLASSES), "cannot take the data's examples"),
        (Of(lambda y: {}), (X, CLASSES), "cannot take the data's examples"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(model: nn.Module, data: Any, said: str) -> None:
    assert said in refused(model, data=data)


@pytest.mark.parametrize(
    ("kind", "targets", "said"),
    [
        ("classification", X[:, 0], "targets of train are float32: give integer labels"),
        ("classification", X, "targets of train have shape"),
        ("binary", BITS, "binary targets of train have shape"),
        ("multilabel", np.stack([CLASSES] * 3, 1), "run from 0 to 2; the model has 2 classes"),
        ("regression", X[:, :2], "regression targets of train have shape"),
        ("segmentation", np.zeros((N, 8, 8), int), "segmentation targets of train have shape"),
    ],
)
def test_a_kind_that_was_said_is_checked(kind: Kind, targets: Any, said: str) -> None:
    assert said in refused(nn.Linear(4, 3), data=(X, targets), kind=kind)


@pytest.mark.parametrize("part", ["train", "validate", "calibrate", "test"])
def test_every_split_is_checked(part: str) -> None:
    splits = dict.fromkeys(("train", "validate", "calibrate", "test"), (X, CLASSES))
    bad = CLASSES.copy()
    bad[-1] = 3
    splits[part] = (X, bad)
    assert f"labels of {part} run from 0 to 3" in refused(nn.Linear(4, 3), data=splits)


def test_a_live_model_is_never_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    model[0].weight.requires_grad_(False)
    model.train()
    state = copy.deepcopy(model.state_dict())
    found = task(model, data=(X, CLASSES))
    changed = found.model()
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.zero_()
    assert model.training
    assert not changed.training
    assert [p.requires_grad for p in changed.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
        assert torch.equal(found.model().state_dict()[name], value)
    # And the task does not follow the model when that is trained on.
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(found.model().state_dict()["0.weight"], state["0.weight"])


def test_a_model_that_cannot_be_copied_is_one_line() -> None:
    model = nn.Linear(4, 3)
    model.cached = model.weight * 2  # type: ignore[assignment]
    assert "Linear cannot be copied (Only Tensors" in refused(model, data=(X, CLASSES))


def test_a_live_model_needs_data() -> None:
    said = refused(nn.Linear(4, 3))
    assert "the input shape of linear is unknown: add --data SPEC" in said


@pytest.mark.parametrize("model", [{"w": torch.zeros(1)}, 3, None, nn.Linear])
def test_what_is_no_model_is_one_line(model: Any) -> None:
    assert "give a path or an nn.Module" in refused(model, data=(X, CLASSES))


def test_broken_weights_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].bias[1] = torch.nan
    assert "weight '0.bias' holds NaN or infinity" in refused(model, data=(X, CLASSES))


def test_broken_weights_in_a_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    arguments = {"features": 4, "outputs": 3, "hidden": []}
    model = zoo.build("mlp", arguments)
    with torch.no_grad():
        model.get_submodule("head").weight[0, 0] = torch.inf  # type: ignore[index,operator]
    save(model, path, factory="compressor.zoo:mlp", arguments=arguments, inputs=torch.zeros(1, 4))
    assert "'head.weight' holds NaN or infinity" in refused(path)


def test_the_file_s_shape_and_the_data_s_must_be_one(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    arguments = {"features": 4, "outputs": 3, "hidden": []}
    model = zoo.build("mlp", arguments)
    save(model, path, factory="compressor.zoo:mlp", arguments=arguments, inputs=torch.zeros(1, 4))
    assert "examples have shape (1, 8, 8), m takes (4,)" in refused(path, data=(IMAGES, CLASSES))
    assert "the data has 2 inputs, m takes 1" in refused(path, data=((X, X), CLASSES))
    assert task(path, data=(X, CLASSES)).inputs[0].shape == (4,)


def test_a_function_that_a_file_names_as_its_data_is_not_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w')\ndef f():\n    return None\n")
    path = tmp_path / "m.pt"
    arguments = {"features": 4, "outputs": 3, "hidden": []}
    model = zoo.build("mlp", arguments)
    given = {"arguments": arguments, "inputs": torch.zeros(1, 4), "data": "./evil.py:f"}
    save(model, path, factory="compressor.zoo:mlp", **given)
    assert "add --data ./evil.py:f to the command line if you trust it" in refused(path)
    assert not (tmp_path / "ran").exists()


def test_inputs_are_read_off_the_data() -> None:
    ids = RNG.integers(0, 50, (N, 6))
    model = nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(24, 3))
    found = task(model, data=(ids, CLASSES))
    (given,) = found.inputs
    assert (given.name, given.shape, given.dtype) == ("input", (6,), "int64")
    assert given.high <= 50
    assert found.model()(torch.from_numpy(found.examples(3)[0])).shape == (3, 3)
    two = task(Sum(), data=((X, X), CLASSES))
    assert [each.name for each in two.inputs] == ["input_0", "input_1"]


def test_splits_pass_through_and_are_not_changed() -> None:
    part = Split.arrays(X, CLASSES)
    splits = Splits(part, part, part, part)
    found: Task = task(nn.Linear(4, 3), data=splits)
    assert found.splits is splits
    assert (found.metric, found.data) == ("accuracy", "live")


def test_all_tensors_of_an_output() -> None:
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    assert tensors(a) == [a]
    assert tensors((a, [b, {"c": c}])) == [a, b, c]
    assert tensors(OrderedDict(x=a, y=None, z="text")) == [a]
    assert first({"logits": b, "loss": a}) is b
