"""A model is judged on all examples of a split at once, however they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.data import read
from compressor.metrics import METRICS, Metric, own, value
from compressor.task import KINDS, Kind, Split
from compressor.training import evaluation
from compressor.training.evaluation import EVALUATED, device_of, evaluate, scored

RNG = np.random.default_rng(0)
EVERY = [(kind, name) for kind in KINDS for name in METRICS[kind]]


def split_of(kind: Kind, count: int, seed: int = 0) -> tuple[Split, nn.Module]:
    draw = np.random.default_rng(seed)
    torch.manual_seed(seed)
    x = draw.standard_normal((count, 2, 4, 4)).astype(np.float32)
    y: Any = {
        "classification": draw.integers(0, 3, count),
        "segmentation": draw.integers(0, 3, (count, 4, 4)),
        "binary": draw.integers(0, 2, count),
        "multilabel": draw.integers(0, 2, (count, 3)),
        "regression": draw.standard_normal((count, 3)).astype(np.float32),
    }[kind]
    width = 1 if kind == "binary" else 3
    if kind == "segmentation":
        return Split.arrays(x, y), nn.Conv2d(2, 3, 1)
    return Split.arrays(x, y), nn.Sequential(nn.Flatten(), nn.Linear(32, width))


def at_once(model: nn.Module, split: Split) -> tuple[Any, Any]:
    (inputs,), targets = split.head(len(split))
    with torch.no_grad():
        return model.eval()(torch.from_numpy(inputs)).numpy(), targets


@pytest.mark.parametrize(("kind", "name"), EVERY)
@given(count=st.integers(60, 600), seed=st.integers(0, 99))
@settings(max_examples=5)
def test_it_is_the_metric_of_all_outputs(kind: Kind, name: str, count: int, seed: int) -> None:
    split, model = split_of(kind, count, seed)
    how = METRICS[kind][name]
    wanted = value(how, *at_once(model, split))
    assert np.isfinite(wanted)
    assert evaluate(model, split, how) == pytest.approx(wanted, rel=1e-6)
    each = scored(model, split, how)
    assert (each is None) == (how.score is None)
    if each is not None:
        assert each.shape == (count,)
        np.testing.assert_allclose(each, how.score(*at_once(model, split)), rtol=1e-5, atol=1e-6)  # type: ignore[misc]


def test_what_a_metric_of_one_s_own_gives_is_of_all_examples() -> None:
    split, model = split_of("regression", 600)
    each = own("each", lambda outputs, targets: np.abs(outputs - targets).max(axis=1))
    one = own("one", lambda outputs, targets: np.abs(outputs - targets).max())
    outputs, targets = at_once(model, split)
    apart = np.abs(outputs - targets)
    assert evaluate(model, split, each) == pytest.approx(float(apart.max(1).mean()), rel=1e-6)
    assert evaluate(model, split, one) == pytest.approx(float(apart.max()), rel=1e-6)
    assert scored(model, split, one) is None


def test_a_metric_that_needs_all_classes_gets_all_examples() -> None:
    """Splits may lie sorted by class: no batch has both."""
    from sklearn.metrics import roc_auc_score

    split, model = split_of("binary", 600)
    (x,), y = split.head(600)
    order = np.argsort(y, kind="stable")
    split = Split.arrays(x[order], y[order])
    area = own("area", lambda outputs, targets: roc_auc_score(targets, outputs[:, 0]))
    wanted = roc_auc_score(*at_once(model, split)[::-1])
    assert evaluate(model, split, area) == pytest.approx(wanted)


class Counted(nn.Module):
    """Notes how many examples it is given, and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.LazyLinear(2), nn.Dropout(0.9))
        self.seen: list[int] = []
        self.modes: set[bool] = set()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(len(x))
        self.modes.add(self.training or torch.is_grad_enabled())
        out: Tensor = self.body(x)
        return out, x


def test_the_model_is_left_in_eval_mode_and_its_first_output_counts() -> None:
    data = read("digits").splits.validate
    model = Counted()
    model(torch.from_numpy(data.head(2)[0][0]))
    model.seen.clear()
    model.modes.clear()
    first = evaluate(model.train(), data, METRICS["classification"]["accuracy"])
    assert not any(each.training for each in model.modules())
    assert model.modes == {False}
    assert first == evaluate(model, data, METRICS["classification"]["accuracy"])
    assert model.seen == [256, len(data) - 256] * 2
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.parametrize(
    ("side", "largest"), [(16, 256), (128, 128), (724, 4), (1448, 1), (2048, 1)]
)
def test_few_large_inputs_are_evaluated_together(side: int, largest: int) -> None:
    def fetch(at: Any) -> Any:
        return (np.zeros((len(at), 1, side, side), np.float32),), np.zeros(len(at), np.int64)

    count = min(2 * largest + 1, 300)
    split = Split(fetch, np.arange(count))
    model = Counted()
    seen: list[int] = []
    model.forward = lambda x: seen.append(len(x)) or torch.zeros(len(x), 2)  # type: ignore[method-assign, func-returns-value]
    evaluate(model, split, METRICS["classification"]["accuracy"])
    assert sum(seen) == count
    assert max(seen) == largest
    assert max(seen) == 1 or max(seen) * side * side * 4 <= EVALUATED


@given(count=st.integers(1, 40), cap=st.integers(1, 9))
@settings(max_examples=20)
def test_how_many_at_once_changes_nothing(count: int, cap: int) -> None:
    split, model = split_of("regression", count)
    wanted = evaluate(model, split, METRICS["regression"]["mse"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "EVALUATED", cap * 2 * 4 * 4 * 4)
        found = evaluate(model, split, METRICS["regression"]["mse"])
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    "score",
    [
        lambda outputs, targets: np.full(len(outputs), np.nan),
        lambda outputs, targets: np.where(np.arange(len(outputs)) == 3, np.nan, 1.0),
    ],
)
def test_what_is_no_number_is_not_hidden(score: Callable[[Any, Any], Any]) -> None:
    split, model = split_of("regression", 300)
    assert np.isnan(evaluate(model, split, Metric(score)))


def test_a_model_without_tensors_is_on_the_cpu() -> None:
    assert device_of(nn.Flatten()) == torch.device("cpu")
    assert device_of(nn.BatchNorm1d(2, affine=False)) == torch.device("cpu")
    split, _ = split_of("classification", 30)
    how = METRICS["classification"]["accuracy"]
    model = nn.Sequential(nn.Flatten(), nn.AvgPool1d(10))
    assert 0 <= evaluate(model, split, how) <= 1
