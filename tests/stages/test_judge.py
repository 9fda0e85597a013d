"""The judge: decibels against the float graph, and accuracy lost against the original model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import drawn, floats
from hypothesis import given, settings
from hypothesis import strategies as st
from standing import splits_of, task_of
from torch import nn

from compressor import Split, StageError, Target, Task
from compressor.measure.fidelity import FLOOR_DB
from compressor.stages.quantize import judge
from compressor.stages.quantize.dynamic import dynamic, products
from compressor.stages.quantize.judge import PERFECT, Judge
from compressor.stages.quantize.kernels import Codes
from compressor.task import Array, Kind

X, W = floats(0, (200, 6), (6, 3))
LABELS = (X @ W).argmax(1)
HELD = [(X[:32],), (X[32:40],)]


def linear(w: Array, **more: Any) -> ir.Model:
    return drawn("(float[n, 6] x) => (float[n, 3] y) { y = MatMul(x, w) }", w=w, **more)


class Product(nn.Module):
    def __init__(self, w: Array) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.from_numpy(w.copy()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


def task(w: Array = W, kind: Kind = "classification", y: Array = LABELS, **more: Any) -> Task:
    return task_of(Product(w), (6,), kind=kind, splits=splits_of(X, y), **more)


# --- decibels


def test_the_same_graph_is_perfect() -> None:
    ours = Judge(linear(W), task(), HELD)
    assert ours.sqnr(linear(W)) == PERFECT
    assert ours.drop(linear(W)) == 0


@settings(max_examples=20)
@given(st.floats(1e-6, 10))
def test_noise_is_counted_in_decibels(part: float) -> None:
    factor = np.float32(1 + part)
    ours = Judge(linear(W), task(), HELD)
    assert ours.sqnr(linear(W * factor)) == pytest.approx(
        -20 * np.log10(float(factor) - 1), abs=0.5 if part < 1e-5 else 0.05
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_no_numbers_are_the_worst(value: float) -> None:
    ours = Judge(linear(W), task(), HELD)
    assert ours.sqnr(linear(np.full_like(W, value))) == FLOOR_DB


def test_a_graph_that_does_not_run_is_one_line() -> None:
    with pytest.raises(StageError, match="onnxruntime cannot run the graph") as caught:
        Judge(linear(W), task(), HELD).sqnr(linear(np.ones((5, 3), np.float32)))
    assert "\n" not in str(caught.value)


# --- accuracy


@settings(max_examples=20)
@given(st.integers(0, 2**16), st.floats(0, 2))
def test_a_drop_is_the_difference_of_accuracies(seed: int, noise: float) -> None:
    (other,) = floats(seed, W.shape)
    changed = (W + np.float32(noise) * other).astype(np.float32)
    ours = task()
    assert ours.splits is not None
    (x,), y = ours.splits.validate.head(1000)

    def accuracy(w: Array) -> float:
        return float(((x @ w).argmax(1) == y).mean())

    found = Judge(linear(W), ours, HELD).drop(linear(changed))
    assert found == pytest.approx(accuracy(W) - accuracy(changed))
    # Against the original, whatever graph the decibels are counted from.
    assert Judge(linear(changed), ours, HELD).drop(linear(changed)) == pytest.approx(found)


def test_errors_are_relative() -> None:
    y = (X @ W + 1).astype(np.float32)  # the original's mse is 1
    ours = Judge(linear(W), task(kind="regression", y=y), HELD)
    assert ours.drop(linear(W)) == pytest.approx(0, abs=1e-5)
    zero = ours.drop(linear(np.zeros_like(W)))
    validate = y[120:160]
    assert zero == pytest.approx(float((validate**2).mean()) - 1, rel=1e-4)


def test_errors_of_a_perfect_original_are_absolute() -> None:
    zero = np.zeros_like(W)
    ours = Judge(linear(zero), task(zero, "regression", np.zeros((200, 3), np.float32)), HELD)
    lost = ours.drop(linear(W))
    assert lost == pytest.approx(float(((X[120:160] @ W) ** 2).mean()), rel=1e-4)


def test_without_data_there_is_no_drop() -> None:
    assert Judge(linear(W), replace(task(), splits=None), HELD).drop(linear(W)) is None


def test_a_part_of_a_large_split_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "MOST", 10)
    given = task()
    assert given.splits is not None
    read: list[int] = []

    def fetch(at: Any) -> Any:
        read.extend(at)
        return given.splits.validate.fetch(at)

    def never(at: Any) -> Any:
        raise AssertionError

    validate = Split(fetch, given.splits.validate.indices)
    hidden = Split(never, np.arange(3))  # nobody looks at test or train
    splits = replace(given.splits, validate=validate, train=hidden, test=hidden, calibrate=hidden)
    assert Judge(linear(W), replace(given, splits=splits), HELD).drop(linear(W)) == 0
    assert set(read) == set(validate.indices[:10].tolist())


@pytest.mark.parametrize("batch", [1, 7])
def test_answers_that_hang_on_the_batch_get_the_targets(batch: int) -> None:
    """Dynamic graphs take one scale for the whole batch."""
    wild = X.copy()
    wild[::7] *= 3000
    y = (wild @ W).argmax(1)
    splits = splits_of(wild, y)
    ours = replace(task(), splits=splits, target=Target(batch=batch))
    made = dynamic(linear(W), products(linear(W)), Codes(signed=False, bits=8))
    together = Judge(linear(W), ours, HELD, together=True).drop(made)
    alone = Judge(linear(W), replace(ours, target=Target(batch=1)), HELD, together=True).drop(made)
    assert together is not None
    assert alone is not None
    assert together == alone if batch == 1 else together > alone + 0.2
