"""Examples without a label stand in train and calibrate, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_data import Numbers, contents, ids, numbered, write_mnist
from torch.utils import data as torch_data

from compressor.data import Data, adopt, read
from compressor.data.demand import OnDemand, targets
from compressor.errors import InputError
from compressor.task import UNLABELLED, Array, Split, Splits

ALL = ("train", "validate", "calibrate", "test")


class Bare(Numbers):
    """Inputs alone, numbered from 1000 on."""

    def __getitem__(self, at: int) -> Any:
        return super().__getitem__(at)[0] + 1000


def more(count: int) -> Array:
    return numbered(count)[0] + 1000


BARE: dict[str, Callable[[int], object]] = {
    "array": more,
    "tensor": lambda count: torch.from_numpy(more(count)),
    "dataset": Bare,
    "tensors": lambda count: torch_data.TensorDataset(torch.from_numpy(more(count))),
    "loader": lambda count: torch_data.DataLoader(Bare(count), batch_size=7),
    "singles": lambda count: [(part,) for part in more(count)],
    "lists": lambda count: [part.tolist() for part in more(count)],
    "stream": lambda count: iter(np.array_split(more(count), 3)),
}


@given(st.integers(6, 60), st.integers(3, 60), st.integers(0, 3))
def test_they_join_train_after_the_cuts(count: int, extra: int, seed: int) -> None:
    x, y = numbered(count)
    plain = adopt((x, y), seed).splits
    mixed = adopt({"train": (x, y), "unlabelled": more(extra)}, seed).splits
    for name in ("validate", "test"):
        assert getattr(mixed, name).digest() == getattr(plain, name).digest()
    assert ids(mixed.train) == ids(plain.train) + list(range(1000, 1000 + extra))
    calibrate = ids(mixed.calibrate)
    assert sorted(calibrate) == sorted(ids(mixed.train))
    for split in (mixed.train, mixed.calibrate):
        seen_x, seen_y = contents(split)
        wanted = np.where(seen_x[:, 0] >= 1000, UNLABELLED, seen_x[:, 0] % 3)
        np.testing.assert_array_equal(seen_y, wanted)
        assert seen_y.dtype == np.int64


@pytest.mark.parametrize("labelled", [numbered(30), Numbers(30)], ids=["arrays", "on demand"])
@pytest.mark.parametrize("form", BARE)
def test_forms(form: str, labelled: object) -> None:
    data = adopt({"train": labelled, "unlabelled": BARE[form](20)})
    assert data.labelled
    train = data.splits.train
    assert sorted(ids(train))[-20:] == list(range(1000, 1020))
    # In any order, and in batches of both kinds, of one kind and of the other.
    order = np.random.default_rng(0).permutation(len(train))
    for size in (1, 7, len(train)):
        for at in np.array_split(order, range(size, len(train), size)):
            (x, *_), y = train.take(at).head(size)
            wanted = np.where(x[:, 0] >= 1000, UNLABELLED, x[:, 0] % 3)
            np.testing.assert_array_equal(y, wanted)
    assert np.concatenate(list(targets(train, 7))).tolist() == contents(train)[1].tolist()
    slow = isinstance(labelled, Numbers) or form in ("dataset", "loader", "singles", "lists")
    assert isinstance(train.fetch, OnDemand) == slow
    assert adopt(data) is data


@pytest.mark.parametrize(
    ("y", "none"),
    [
        (np.zeros((20, 3), np.float32), np.nan),
        (np.zeros(20), np.nan),
        (np.zeros((20, 4, 4), np.int32), UNLABELLED),
    ],
)
def test_no_label_has_the_form_of_a_label(y: Array, none: float) -> None:
    x = numbered(20)[0]
    data = adopt({"train": (x, y), "unlabelled": more(9)})
    _, told = contents(data.splits.train)
    assert told.dtype == (np.float32 if y.dtype.kind == "f" else np.int64)
    assert told.shape[1:] == y.shape[1:]
    np.testing.assert_array_equal(told[-9:], np.full((9, *y.shape[1:]), none))
    np.testing.assert_array_equal(told[:-9], 0)
    assert adopt(data) is data


def test_several_inputs() -> None:
    x, y = numbered(20)
    train = adopt({"train": ((x, -x), y), "unlabelled": (more(8), -more(8))}).splits.train
    (first, second), _ = train.head(len(train))
    np.testing.assert_array_equal(first, -second)


def test_on_demand_they_are_read_on_demand() -> None:
    many = Bare(100_000)
    adopt({"train": numbered(30), "unlabelled": many})
    assert many.reads <= 32


X, Y = numbered(20)


@pytest.mark.parametrize(
    ("given_data", "message"),
    [
        ({"train": (X, Y), "unlabelled": X[:, :0]}, r"unlabelled: its inputs are float32 \(0,\)"),
        ({"train": (X, Y), "unlabelled": X[:, 0]}, r"are float32 \(\), those of train float32"),
        ({"train": (X, Y), "unlabelled": X.astype(np.int8)}, r"its inputs are int8 \(1,\)"),
        ({"train": (X, Y), "unlabelled": (X, X)}, "make them alike"),
        ({"train": (X, Y), "unlabelled": (X, X[:3])}, "x1 has 3 examples and x0 has 20"),
        ({"train": (X, Y), "unlabelled": X * np.nan}, "split unlabelled: x holds nan"),
        ({"train": (X, Y), "unlabelled": X[:0]}, "split unlabelled: it is empty: leave it out"),
        ({"train": (X, Y), "unlabelled": Numbers(9)}, "is a tuple of Tensor, int; give its inputs"),
        ({"train": (X, Y), "unlabelled": "digits"}, "this str is no data; give an array or a Data"),
        ({"train": (X, Y), "unlabelled": [1 // (at - 2) for at in range(0)]}, "it is empty"),
        ({"unlabelled": X}, "no part 'train', only .'unlabelled'.: add it"),
        ({"x": X, "unlabelled": X}, "unknown part 'x'"),
        ({"x": X[:5]}, "too few examples to split: 5"),
        ({"x": X, "kind": "guess"}, "kind 'guess' is unknown"),
        ({"x": X + np.inf}, "split train: x holds"),
        # Data that the user calls labelled holds no mark of ours.
        ((X, np.where(Y == 1, UNLABELLED, Y)), "train: y holds the class label -1"),
        ({"train": (X, np.where(Y == 1, np.nan, Y)), "unlabelled": X}, "train: y holds nan"),
        ({"train": (X, Y - 1), "unlabelled": X}, "train: y holds the class label -1"),
        ({"train": (X, Y), "test": (X, Y - 1), "unlabelled": X}, "test: y holds the class label"),
        ([(part, UNLABELLED) for part in X], "train: y holds the class label -1"),
        (Splits(*[Split.arrays(X, Y - 1)] * 4), "split train: y holds the class label -1"),
        (Data("mine", Splits(*[Split.arrays(X, Y - 2)] * 4)), "train: y holds the class label -2"),
        (Data("mine", Splits(*[Split.arrays(X, Y - 1)] * 4)), "validate: y holds the class lab"),
        (
            Data("mine", Splits(*[Split.arrays(X, np.where(Y == 1, np.nan, Y))] * 4)),
            "split validate: y holds nan",
        ),
        (
            Data("mine", Splits(*[Split.arrays(X, np.where(Y == 1, np.inf, Y))] * 4)),
            "split train: y holds inf",
        ),
    ],
)
def test_what_is_wrong_is_refused(given_data: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        adopt(given_data)
    assert "\n" not in str(caught.value)


# No labels at all


@pytest.mark.parametrize("form", BARE)
def test_data_without_any_label(form: str) -> None:
    data = adopt({"x": BARE[form](40), "kind": "classification"}, seed=2)
    assert (data.labelled, data.kind, data.outputs) == (False, "classification", None)
    assert data.splits.sizes() == {"train": 24, "validate": 6, "calibrate": 24, "test": 10}
    parts = [ids(getattr(data.splits, name)) for name in ("train", "validate", "test")]
    assert sorted(chain.from_iterable(parts)) == list(range(1000, 1040))
    for name in ALL:
        split = getattr(data.splits, name)
        _, y = contents(split)
        assert (y.shape, y.dtype) == ((len(split),), np.int64)
        assert set(y.tolist()) == {UNLABELLED}
    assert adopt(data) is data


def test_a_function_without_labels(tmp_path: Path) -> None:
    file = tmp_path / "loaders.py"
    file.write_text("import numpy as np\ndef load():\n    return {'x': np.ones((40, 2))}\n")
    data = read(f"{file}:load")
    assert not data.labelled
    assert data.splits.sizes()["test"] == 10


def test_npz_without_labels(tmp_path: Path) -> None:
    x, y = numbered(40)
    path = tmp_path / "a.npz"
    np.savez(path, x0=x, x1=-x)
    data = read(f"arrays:{path}")
    (first, second), told = data.splits.test.head(10)
    np.testing.assert_array_equal(first, -second)
    assert (data.labelled, set(told.tolist())) == (False, {UNLABELLED})
    np.savez(path, x=x, y=y, x_unlabelled=more(9))
    data = read(f"arrays:{path}")
    assert data.labelled
    wanted = adopt({"train": (x, y), "unlabelled": more(9)}).splits
    for name in ALL:
        assert getattr(data.splits, name).digest() == getattr(wanted, name).digest()
    np.savez(path, x=x, y=y, x_unlabelled=more(9), y_unlabelled=y)
    with pytest.raises(InputError, match="holds 'y_unlabelled'"):
        read(f"arrays:{path}")


# A fraction of the labels


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_fraction_of_labels_is_stratified(fraction: float, seed: int) -> None:
    whole, part = read("digits", seed).splits, read(f"digits?labelled={fraction}", seed).splits
    for name in ("validate", "test"):
        assert getattr(part, name).digest() == getattr(whole, name).digest()
    for name in ("train", "calibrate"):
        (x, y), (seen_x, seen_y) = (contents(getattr(each, name)) for each in (whole, part))
        np.testing.assert_array_equal(seen_x, x)
        kept = seen_y != UNLABELLED
        np.testing.assert_array_equal(seen_y[kept], y[kept])
        if name == "train":
            assert kept.sum() == round(fraction * len(y))
            share = np.bincount(y, minlength=10) * fraction
            assert np.abs(np.bincount(y[kept], minlength=10) - share).max() <= 1.001
            labelled = {row.tobytes() for row, has in zip(x, kept, strict=True) if has}
    # An example that has no label in train has none in calibrate.
    for row, label in zip(seen_x, seen_y, strict=True):
        assert (row.tobytes() in labelled) == (label != UNLABELLED)
    data = read(f"digits?labelled={fraction}", seed)
    assert data.labelled
    assert adopt(data) is data


def test_the_fraction_follows_the_seed_and_one_is_all() -> None:
    once, again, other = (
        set(np.flatnonzero(contents(read("digits?labelled=0.1", seed).splits.train)[1] >= 0))
        for seed in (1, 1, 2)
    )
    assert once == again != other
    assert read("digits?labelled=1").splits.train.digest() == read("digits").splits.train.digest()


def test_a_fraction_of_mnist(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    splits = read(f"mnist:{tmp_path}?train=40&labelled=0.5").splits
    assert splits.sizes() == {"train": 40, "validate": 12, "calibrate": 40, "test": 12}
    assert (contents(splits.train)[1] != UNLABELLED).sum() == 20
    for split in (splits.validate, splits.test):
        assert contents(split)[1].min() >= 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digits?labelled=0", "greater than 0"),
        ("digits?labelled=1.5", "less than or equal to 1"),
        ("digits?labelled=nan", "option labelled='nan'"),
        ("digits?labelled=0.001", "labelled=0.001 keeps 1 of 1079 labels, none of class"),
        ("digits?labelled=0.0001", "labelled=0.0001 keeps 0 of 1079 labels, none of class 0"),
        ("wine?labelled=0.5", "unknown option 'labelled'"),
    ],
)
def test_wrong_fractions_are_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(spec)
