"""Cross-validation holds every example out once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from standing import at_rest, splits_of, task_of
from torch import nn

from compressor import InputError, Split, Splits, Task
from compressor.stages import distill, perform
from compressor.stages.folds import crossed
from compressor.task import UNLABELLED, labelled


def numbered(train: int, validate: int) -> Task:
    """A task whose examples are their own numbers; the test split must not be touched."""

    def never(at: Any) -> Any:
        raise AssertionError("the test split was read")

    count = train + validate
    x = np.arange(count, dtype=np.float32)[:, None]
    whole = Split.arrays(x, np.arange(count) % 2)
    parts = whole.take(np.arange(train)), whole.take(np.arange(train, count))
    splits = Splits(parts[0], parts[1], Split(never, np.arange(4)), Split(never, np.arange(4)))
    return task_of(nn.Linear(1, 2), (1,), splits=splits)


def numbers(split: Split) -> list[int]:
    inputs, targets = split.head(len(split))
    assert (targets == inputs[0][:, 0].astype(int) % 2).all()  # each with its own label
    return inputs[0][:, 0].astype(int).tolist()


@given(st.integers(4, 40), st.integers(2, 20), st.integers(2, 3))
def test_every_example_is_held_out_once(train: int, validate: int, folds: int) -> None:
    task, held = numbered(train, validate), Counter[int]()

    def trained(part: Task) -> nn.Module:
        assert part.splits is not None
        out, seen = numbers(part.splits.validate), numbers(part.splits.train)
        assert sorted(out + seen) == list(range(train + validate))
        held.update(out)
        return part.model()

    found = crossed(task, folds, trained)
    assert set(held.values()) == {1}
    assert len(held) == found["n"] == train + validate
    assert len(found["each"]) == found["folds"] == folds
    sizes = [round(len(held) / folds)]
    assert abs(sizes[0] * folds - len(held)) < folds
    assert found["mean"] == pytest.approx(np.mean(found["each"]))
    assert found["deviation"] == pytest.approx(np.std(found["each"], ddof=1))


def test_too_few_examples_are_one_line() -> None:
    with pytest.raises(InputError, match="folds = 5: there are 8 labelled examples of train and"):
        crossed(numbered(6, 2), 5, lambda part: part.model())


def test_the_stage_says_what_training_reaches(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((150, 4)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    task = task_of(net, (4,), splits=splits_of(x, y))
    source = at_rest(task, tmp_path)
    settings = {"epochs": 20, "learning_rate": 2e-2, "loss": "labels"}
    made = perform(distill, source, task, tmp_path / "r", folds=4, **settings)
    found = made.steps[-1]["facts"]["folds"]
    assert found["mean"] > 0.9
    assert made.steps[-1]["settings"]["folds"] == 4
    # The model itself is what it would be without: the folds are trained beside it.
    alone = perform(distill, source, task, tmp_path / "alone", **settings)
    assert alone.path.read_bytes() == made.path.read_bytes()


def test_only_examples_with_a_label_are_held_out() -> None:
    task = numbered(30, 10)
    assert task.splits is not None
    splits = replace(task.splits, train=hidden(task.splits.train, lambda x: x % 3 > 0))
    parts: list[Splits] = []

    def trained(part: Task) -> nn.Module:
        assert part.splits is not None
        parts.append(part.splits)
        return part.model()

    found = crossed(replace(task, splits=splits), 4, trained)
    assert found["n"] == 20
    for part in parts:
        assert labelled(part.validate.head(100)[1]).all()
        assert (~labelled(part.train.head(100)[1])).sum() == 20
    with pytest.raises(InputError, match="there are 20 labelled examples"):
        crossed(replace(task, splits=splits), 11, trained)


def test_every_fold_has_its_share_of_a_rare_class() -> None:
    x = np.arange(60, dtype=np.float32)[:, None]
    whole = Split.arrays(x, (x[:, 0] % 10 == 0).astype(np.int64))
    splits = Splits(whole.take(np.arange(50)), whole.take(np.arange(50, 60)), whole, whole)
    rare = []

    def trained(part: Task) -> nn.Module:
        assert part.splits is not None
        rare.append(int(part.splits.validate.head(60)[1].sum()))
        return part.model()

    crossed(task_of(nn.Linear(1, 2), (1,), splits=splits), 3, trained)
    assert rare == [2, 2, 2]


def hidden(split: Split, which: Any) -> Split:
    """The split, some of whose labels nobody knows."""

    def fetch(at: Any) -> Any:
        (x,), y = split.fetch(at)
        return (x,), np.where(which(x[:, 0]), UNLABELLED, y)

    return replace(split, fetch=fetch)
