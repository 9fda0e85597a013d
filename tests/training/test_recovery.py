"""What recovery minimises, and from which examples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor import InputError, Split, Splits, Task, Unsuitable
from compressor.loading import task as tasks
from compressor.task import UNLABELLED, Input
from compressor.training import recovery
from compressor.training.evaluation import evaluate
from compressor.training.loop import Batch
from compressor.training.recovery import Aim, aimed, epochs_for, made_up, recover
from compressor.training.settings import Training

RNG = np.random.default_rng(0)
X = RNG.standard_normal((120, 4)).astype(np.float32)
Y = (X[:, 0] + X[:, 1] > 0).astype(np.int64) + (X[:, 2] > 0.5)


def mlp(width: int = 16, outputs: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, outputs))


def around(reference: nn.Module, y: Any = Y, train: Any = None, **changes: Any) -> Task:
    part = Split.arrays(X[:60], y[:60] if train is None else train)
    held = Split.arrays(X[60:], y[60:])
    splits = Splits(part, held, part, held)
    given: dict[str, Any] = {
        "name": "model",
        "kind": "classification",
        "model": lambda: copy.deepcopy(reference.eval()),
        "source": {"factory": "live:tests", "arguments": {}},
        "inputs": (Input("x", (4,)),),
        "metric": "accuracy",
        "splits": splits,
    }
    return Task(**{**given, **changes})


def trained(task: Task, *, student: nn.Module | None = None, **how: Any) -> nn.Module:
    model = student or mlp(seed=1)
    settings = {key: how.pop(key) for key in ("into", "key", "keep") if key in how}
    recover(
        model,
        task,
        Training(epochs=2, batch_size=16),
        aimed(task, **{"loss": "distill", **how}),
        **{"keep": "last", **settings},  # the best may be those before
    )
    return model


def same(one: nn.Module, two: nn.Module) -> bool:
    others = two.state_dict()
    return all(torch.equal(value, others[name]) for name, value in one.state_dict().items())


@given(st.sampled_from(["kd", "dkd", "dist", "hint", "mse", "distill"]), st.floats(0, 1))
def test_a_name_shares_the_weight_with_labels(loss: str, weight: float) -> None:
    weights = aimed(around(mlp()), loss, weight).weights
    name = "kd" if loss == "distill" else loss
    assert weights.get(name, 0.0) == weight
    assert weights.get("labels", 0.0) == 1 - weight
    assert all(weights.values())


def test_what_is_aimed_at_by_itself() -> None:
    """The teacher counts where labels are missing, or where somebody named one."""
    alone, both = {"labels": 1.0}, {"labels": 0.5, "kd": 0.5}
    few = np.where(np.arange(60) < 2, Y[:60], UNLABELLED)
    assert aimed(around(mlp())).weights == alone
    assert aimed(around(mlp(), train=few)).weights == both
    assert aimed(around(mlp(), teachers=(mlp,))).weights == both
    assert aimed(around(mlp(), students={"shop:small": mlp})).weights == both
    assert aimed(around(mlp(), labelled=False)).weights == {"kd": 1.0}


def test_labels_alone_ask_no_teacher() -> None:
    def never() -> nn.Module:
        raise AssertionError("the teacher was built")

    task = around(mlp(), model=never)
    trained(task, loss="labels")
    assert aimed(task, "labels").weights == {"labels": 1.0}


@pytest.mark.parametrize(
    ("loss", "changes", "said"),
    [
        ("kl", {}, "loss 'kl' is unknown: choose from labels, kd"),
        ({"kd": 0.0}, {}, "no loss has a weight above 0"),
        ("labels", {"labelled": False}, "loss labels: the data has none"),
        ({"labels": 0.1, "kd": 0.9}, {"labelled": False}, "the data has none: distil from"),
        ("./mine.py:loss", {}, "is code to run: add --loss ./mine.py:loss if you trust it"),
        ("dkd", {"kind": "regression"}, "loss 'dkd' is none for regression: choose from labels"),
        ("distill", {"kind": "custom"}, "is none for custom: choose from hint, attention, mse"),
    ],
)
def test_an_aim_that_the_task_does_not_have_is_one_line(
    loss: Any, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        aimed(around(mlp(), **changes), loss)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", [UNLABELLED, None])
def test_examples_without_a_label_teach_through_the_teacher_alone(missing: int | None) -> None:
    """Two labels of 60: what the others' labels would be changes nothing."""
    few = np.where(np.arange(60) < 2, Y[:60], UNLABELLED)
    task = around(mlp(), train=few)
    student = trained(task)
    batch = Batch((torch.from_numpy(X[:60]),), torch.from_numpy(few), np.arange(60))
    aim = aimed(task)
    with recovery.imitating(
        student, task, task.splits, Training(epochs=1), aim, {}, {"labels", "teacher"}, None
    ) as (objective, _):
        value = objective(student, batch).item()
    outputs = student(batch.inputs[0])
    by_hand = 0.5 * F.cross_entropy(outputs[:2], batch.targets[:2], reduction="sum") / 60
    by_hand = by_hand + 0.5 * 16 * F.kl_div(
        F.log_softmax(outputs / 4, 1),
        F.log_softmax(task.model()(batch.inputs[0]) / 4, 1),
        log_target=True,
        reduction="batchmean",
    )
    assert value == pytest.approx(by_hand.item(), rel=1e-5)


def test_fine_tuning_leaves_out_what_has_no_label() -> None:
    few = np.where(np.arange(60) % 3 == 0, Y[:60], UNLABELLED)
    task = around(mlp(), train=few)
    only = Split.arrays(X[:60][few >= 0], few[few >= 0])
    assert task.splits is not None
    bare = around(mlp(), splits=Splits(only, task.splits.validate, only, task.splits.test))
    assert same(trained(task, loss="labels"), trained(bare, loss="labels"))


def test_without_labels_the_teacher_is_all_there_is() -> None:
    teacher = mlp(32, seed=5)
    bare = around(teacher, train=np.full(60, UNLABELLED), labelled=False)
    assert same(trained(bare), trained(around(teacher), weight=1.0))


def test_several_teachers_are_their_mean() -> None:
    one, two = mlp(8, seed=3), mlp(24, seed=4)

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = one, two

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.one(x), self.two(x)]).mean(dim=0)

    both = around(mlp(), teachers=(lambda: copy.deepcopy(one), lambda: copy.deepcopy(two)))
    assert same(trained(both, weight=1.0), trained(around(Mean()), weight=1.0))
    assert not same(trained(both, weight=1.0), trained(around(mlp()), weight=1.0))


def test_what_is_kept_of_the_teacher_changes_nothing(tmp_path: Path) -> None:
    task = around(mlp(32, seed=5))
    kept = trained(task, into=tmp_path / "r", key="k")
    for name, value in trained(task).state_dict().items():
        # Its outputs were computed in other batches.
        torch.testing.assert_close(kept.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert (tmp_path / "r.teacher.npy").is_file()
    recovery.clean(tmp_path / "r")
    assert not list(tmp_path.glob("r*"))


@pytest.mark.parametrize("how", [{"mixup": 0.4}, {"augment": ("./a.py:f",)}])
def test_what_changes_a_batch_is_told_the_teacher(tmp_path: Path, how: dict[str, Any]) -> None:
    """Outputs on the examples as they are would be wrong for those that were changed."""
    task = around(mlp(), functions={"./a.py:f": lambda batch: batch + 1.0})
    aim = aimed(task, "distill")
    recover(mlp(seed=1), task, Training(epochs=2, **how), aim, into=tmp_path / "r", key="k")
    assert not (tmp_path / "r.teacher.npy").exists()


def test_mixed_examples_have_a_share_of_both_labels() -> None:
    task = around(mlp())
    model = mlp(seed=1)
    x, y = torch.from_numpy(X[:8]), torch.from_numpy(Y[:8])
    partner = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    batch = Batch((x,), y, np.arange(8), partner, 0.25)
    with recovery.imitating(
        model, task, task.splits, Training(epochs=1), aimed(task, "labels"), {}, {"labels"}, None
    ) as (objective, _):
        value = objective(model, batch)
    outputs = model(x)
    soft = 0.25 * F.one_hot(y, 3) + 0.75 * F.one_hot(y[partner], 3)
    torch.testing.assert_close(value, F.cross_entropy(outputs, soft.float()))


def own(outputs: Tensor, targets: Tensor, teacher: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) + F.mse_loss(outputs, teacher)


def whole(model: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    return F.cross_entropy(model(*inputs), targets)


def test_a_loss_of_the_user_s_own_is_minimised() -> None:
    task = around(mlp(32, seed=5), functions={"m:own": own, "m:whole": whole})
    mixed = trained(task, loss={"labels": 1.0, "mse": 1.0})
    for name, value in trained(task, loss="m:own").state_dict().items():
        torch.testing.assert_close(value, mixed.state_dict()[name], rtol=1e-4, atol=1e-6)
    assert same(trained(task, loss="m:whole"), trained(task, loss="labels"))


def test_a_whole_step_runs_the_model_once() -> None:
    calls = 0

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(seed=1)

        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += self.training
            return self.body(x)  # type: ignore[no-any-return]

    task = around(mlp(), functions={"m:whole": whole})
    trained(task, student=Counting(), loss="m:whole")
    assert calls == 2 * 4  # two epochs of 60 examples, 16 at a time


def test_features_are_hints_even_where_layers_have_other_widths() -> None:
    teacher = mlp(32, seed=5)
    task = around(teacher)
    student = mlp(8, seed=1)
    start = copy.deepcopy(student)
    aim = Aim({"hint": 1.0}, layers=["0=0"])
    fitted = recover(student, task, Training(epochs=20, learning_rate=1e-2), aim, keep="last")
    losses = [one["loss"] for one in fitted.history]
    assert losses[-1] < 0.7 * losses[0]
    assert not same(student, start)
    assert fitted.facts["teacher"] == "the original"
    assert not student[0]._forward_hooks  # type: ignore[index]


@given(st.integers(1, 200_000))
def test_epochs_show_about_sixty_thousand_examples(count: int) -> None:
    task = around(mlp())
    assert task.splits is not None
    train = Split(task.splits.train.fetch, np.zeros(count, np.intp))
    many = around(mlp(), splits=Splits(train, train, train, train))
    epochs = epochs_for(many)
    assert 1 <= epochs <= recovery.MOST_EPOCHS
    assert epochs == recovery.MOST_EPOCHS or epochs * count >= recovery.EXAMPLES
    assert epochs == 1 or (epochs - 1) * count < recovery.EXAMPLES


def test_a_frozen_model_is_not_trained() -> None:
    with pytest.raises(Unsuitable, match="every parameter is frozen"):
        trained(around(mlp()), student=mlp().requires_grad_(False))


def test_made_up_examples_teach_and_judge(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks(trained)
    made: Callable[..., Any] = recovery.synthesize

    def short(*given: Any, **how: Any) -> Any:
        return made(*given, **how, steps=2)

    teacher = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 10)
    ).eval()
    monkeypatch.setattr(recovery, "synthesize", short)
    bare = Task(
        name="m", kind="classification", model=lambda: copy.deepcopy(teacher),
        source=task.source, inputs=task.inputs, metric="accuracy",
    )  # fmt: skip
    found = made_up(bare, 40)
    assert found.splits is not None
    assert not found.labelled
    assert found.splits.sizes() == {"train": 32, "validate": 8, "calibrate": 32, "test": 8}
    _, targets = found.splits.train.head(32)
    assert (targets == UNLABELLED).all()
    # Judged by the teacher's own answers, of which it gets all right.
    how = recovery.metrics_of(found)["accuracy"]
    assert evaluate(teacher, found.splits.validate, how) == 1.0
    pictures = found.splits.train.head(32)[0][0]
    assert not set(map(bytes, pictures)) & set(map(bytes, found.splits.validate.head(8)[0][0]))
