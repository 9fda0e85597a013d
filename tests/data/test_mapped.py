"""Arrays on disk: the same data as in memory, without ever being there as a whole."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data import contents, numbered
from test_unlabelled import more

from compressor.data import adopt, read
from compressor.data.demand import OnDemand, targets
from compressor.errors import InputError
from compressor.task import UNLABELLED, Array
from compressor.training.loader import automatic, batches, resident

ALL = ("train", "validate", "calibrate", "test")
X, Y = numbered(40)


def write(folder: Path, **files: Array) -> Path:
    folder.mkdir(exist_ok=True)
    for name, values in files.items():
        np.save(folder / f"{name}.npy", values)
    return folder


@given(
    st.integers(6, 80),
    st.sampled_from(["<f4", ">f4", "<f8", "|u1", "<i2", "<f2"]),
    st.sampled_from([("<i8", ()), ("|u1", ()), ("<f8", ()), (">f4", (3,)), ("<i4", (2, 2))]),
    st.booleans(),
)
def test_mapped_arrays_are_the_arrays(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    dtype: str,
    target: tuple[str, tuple[int, ...]],
    fortran: bool,
) -> None:
    x = (np.arange(count * 6) % 100).reshape(count, 2, 3).astype(dtype, order="FC"[not fortran])
    y = np.zeros((count, *target[1]), target[0])
    y += (np.arange(count) % 3).astype(target[0]).reshape(count, *(1 for _ in target[1]))
    folder = write(tmp_path_factory.getbasetemp() / "mapped", x=x, y=y)
    mapped, held = read(f"arrays:{folder}").splits, adopt((x, y)).splits
    for name in ALL:
        one, other = getattr(mapped, name), getattr(held, name)
        assert one.digest() == other.digest()
        assert np.concatenate(list(targets(one, 7))).tolist() == contents(other)[1].tolist()
        assert isinstance(one.fetch, OnDemand)


def test_parts_inputs_and_a_kind(tmp_path: Path) -> None:
    x, y = X, Y
    folder = write(tmp_path, x0_train=x, x1_train=-x, y_train=y, kind=np.array("classification"))
    write(tmp_path, x0_test=x[:9] + 40, x1_test=-x[:9] - 40, y_test=y[:9])
    write(tmp_path, x0_unlabelled=more(6), x1_unlabelled=-more(6))
    data = read(f"arrays:{folder}")
    assert data.kind == "classification"
    assert data.splits.sizes() == {"train": 38, "validate": 8, "calibrate": 38, "test": 9}
    for name in ALL:
        (first, second), told = getattr(data.splits, name).head(99)
        np.testing.assert_array_equal(first, -second)
        np.testing.assert_array_equal(
            told, np.where(first[:, 0] < 1000, (first[:, 0] % 40) % 3, -1)
        )
    train = data.splits.train
    np.testing.assert_array_equal(np.concatenate(list(targets(train, 5))), contents(train)[1])


def test_one_file_goes_with_the_targets_beside_it(tmp_path: Path) -> None:
    folder = write(tmp_path, x=X, y=Y, x_test=X[:9], y_test=Y[:9])
    data = read(f"arrays:{folder / 'x.npy'}")
    assert data.splits.sizes()["test"] == 10
    write(tmp_path, x_train=X, y_train=Y)
    assert len(read(f"arrays:{folder / 'x_train.npy'}").splits.test) == 10
    (folder / "y.npy").unlink()
    data = read(f"arrays:{folder / 'x.npy'}")
    assert not data.labelled
    assert set(contents(data.splits.train)[1].tolist()) == {UNLABELLED}
    assert set(np.concatenate(list(targets(data.splits.test, 4))).tolist()) == {UNLABELLED}


def test_an_array_of_a_tebibyte(tmp_path: Path) -> None:
    """Mostly holes: to read it all would take hours, to hold it more memory than there is."""
    rows, width = 1 << 20, 1 << 18
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (rows, width))
    np.save(tmp_path / "y.npy", np.arange(rows) % 3)
    train = read(f"arrays:{tmp_path}").splits.train.take(np.arange(2))
    ((x,), _), *_ = batches(train, [np.array([1])], workers=1, pin=False)
    assert x.shape == (1, width)
    assert resident(train, 1 << 20) is train


def test_mapped_arrays_are_live_data_too(tmp_path: Path) -> None:
    folder = write(tmp_path, x=X, y=Y)
    x = np.load(folder / "x.npy", mmap_mode="r")
    splits = adopt((x, Y)).splits
    assert isinstance(splits.train.fetch, OnDemand)
    assert automatic(splits.train) >= 1
    assert splits.test.digest() == adopt((X, Y)).splits.test.digest()
    held = resident(splits.train, 1 << 20)
    assert held.digest() == splits.train.digest()


def test_rows_are_checked_as_they_are_read(tmp_path: Path) -> None:
    splits = read(f"arrays:{write(tmp_path, x=X, y=Y)}").splits
    # Not among the first of train or calibrate, which are looked at before anything starts.
    first = splits.calibrate.indices[:8]
    place = next(at for at in range(8, 24) if splits.train.indices[at] not in first)
    x = X.copy()
    x[splits.train.indices[place]] = np.nan
    train = read(f"arrays:{write(tmp_path, x=x, y=Y)}").splits.train
    train.head(place)
    with pytest.raises(InputError, match=rf"^split train: x holds nan \(1 of {place + 1} values"):
        train.head(place + 1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no .npy file: write x.npy and y.npy"),
        ({"y": Y}, "needs x and y for train; it holds y"),
        ({"x": X, "y": Y, "x_test": X}, "needs x and y for test"),
        ({"x": X, "y": Y, "z": Y}, "holds 'z'; known: x, y"),
        ({"x": X, "y": Y[1:]}, "split train: x has 40 examples and y has 39"),
        ({"x0": X, "x1": X[1:]}, "split train: x1 has 39 examples and x0 has 40"),
        ({"x": X, "y": Y - 1}, "train: y holds the class label -1"),
        ({"x": X, "y": Y.astype(str)}, "y is of dtype <U"),
        ({"x": X.astype(str), "y": Y}, "x is of dtype <U"),
        ({"x": np.full_like(X, np.nan), "y": Y}, "train: x holds nan"),
        ({"x": X[:0], "y": Y[:0]}, "it is empty"),
        ({"x": np.array(3.0), "y": Y}, "no data"),
        ({"x": X, "y": Y, "kind": np.array("cat")}, "kind 'cat' is unknown"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, files: dict[str, Array], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(f"arrays:{write(tmp_path, **files)}")
    assert "\n" not in str(caught.value)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    write(tmp_path, x=X.astype(object), y=Y)
    with pytest.raises(InputError, match=r"x\.npy cannot be read: .*Python objects"):
        read(f"arrays:{tmp_path}")


@given(at=st.integers(0, 10_000), change=st.binary(min_size=1, max_size=8))
def test_changed_headers_never_surprise(
    tmp_path_factory: pytest.TempPathFactory, at: int, change: bytes
) -> None:
    folder = write(tmp_path_factory.getbasetemp() / "changed", x=X, y=Y)
    content = (folder / "x.npy").read_bytes()
    at %= 128
    (folder / "x.npy").write_bytes(content[:at] + change + content[at + len(change) :])
    with contextlib.suppress(InputError):
        assert len(contents(read(f"arrays:{folder}").splits.train)[1]) == 24


def test_files_that_end_early(tmp_path: Path) -> None:
    folder = write(tmp_path, x=X, y=Y)
    content = (folder / "x.npy").read_bytes()
    for end in (0, 5, 60, 128, len(content) - 1):
        (folder / "x.npy").write_bytes(content[:end])
        with pytest.raises(InputError, match=r"x\.npy cannot be read"):
            read(f"arrays:{folder}")
