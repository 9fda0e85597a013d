"""Specs, sources and live objects become four splits that a run can trust."""

from __future__ import annotations

import contextlib
import gzip
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import data as torch_data

from compressor.data import SOURCES, Data, adopt, live, read
from compressor.data.idx import read_idx
from compressor.data.splitting import completed
from compressor.errors import InputError
from compressor.task import Array, Split, Splits

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"


def numbered(count: int) -> tuple[Array, Array]:
    """Inputs that say which example they are, and labels of three classes."""
    return np.arange(count, dtype=np.float32)[:, None], np.arange(count) % 3


def contents(split: Split) -> tuple[Array, Array]:
    (x, *_), y = split.head(len(split))
    return x, y


def ids(split: Split) -> list[int]:
    return [int(value) for value in contents(split)[0].ravel()]


# Splitting


@given(st.integers(6, 400), st.integers(0, 3), st.booleans())
def test_parts_are_disjoint_and_cover(count: int, seed: int, stratified: bool) -> None:
    x, y = numbered(count)
    splits = completed(Split.arrays(x, y), seed, labels=y if stratified else None)
    parts = [set(ids(part)) for part in (splits.train, splits.validate, splits.test)]
    assert sum(map(len, parts)) == count
    assert set.union(*parts) == set(range(count))
    assert set(ids(splits.calibrate)) <= parts[0]
    sizes = splits.sizes()
    assert sizes["test"] == max(2, count // 4)
    assert sizes["validate"] == max(2, (count - sizes["test"]) // 5)
    assert sizes["calibrate"] == min(512, sizes["train"])


@given(st.lists(st.integers(0, 4), min_size=40, max_size=200), st.integers(0, 9))
def test_every_class_has_its_share(labels: list[int], seed: int) -> None:
    y = np.array(labels)
    splits = completed(Split.arrays(np.zeros((len(y), 1), np.float32), y), seed, labels=y)
    seen = np.bincount(contents(splits.test)[1], minlength=5)
    assert np.abs(seen - np.bincount(y, minlength=5) * len(splits.test) / len(y)).max() <= 1


def test_splits_follow_the_seed() -> None:
    once, again, other = (adopt(numbered(100), seed).splits for seed in (3, 3, 4))
    for name in once.sizes():
        assert ids(getattr(once, name)) == ids(getattr(again, name))
        assert ids(getattr(once, name)) != ids(getattr(other, name))


def test_validate_and_calibrate_are_bounded() -> None:
    sizes = adopt(numbered(40_000)).splits.sizes()
    assert sizes == {"train": 25_000, "validate": 5000, "calibrate": 512, "test": 10_000}


# Live objects


def test_arrays_and_tensors_are_the_same_data() -> None:
    x, y = numbered(50)
    tensors = (torch.from_numpy(x).requires_grad_(), torch.from_numpy(y))
    assert adopt((x, y)).splits.test.digest() == adopt(tensors).splits.test.digest()


@pytest.mark.parametrize(
    ("x", "y", "inputs", "targets"),
    [
        (np.zeros((9, 2)), np.zeros(9, bool), "float32", "int64"),
        (np.zeros((9, 2), ">f8"), np.zeros(9, np.uint8), "float32", "int64"),
        (np.zeros((9, 2), np.float16), np.zeros(9), "float16", "float32"),
        (np.zeros((9, 2, 2), np.uint8), np.zeros((9, 1), np.int32), "uint8", "int64"),
        (np.zeros((9, 2), np.int32), np.zeros((9, 2), np.float16), "int32", "float32"),
    ],
)
def test_dtypes(x: Array, y: Array, inputs: str, targets: str) -> None:
    seen_x, seen_y = contents(adopt((x, y)).splits.train)
    assert (seen_x.dtype.name, seen_y.dtype.name) == (inputs, targets)


def test_several_inputs() -> None:
    x, y = numbered(20)
    tensors = [torch.from_numpy(part) for part in (x, -x, y)]
    for given_data in (((x, -x), y), ([x, -x], y), torch_data.TensorDataset(*tensors)):
        (first, second), _ = adopt(given_data).splits.train.head(5)
        np.testing.assert_array_equal(first, -second)


class Numbers(torch_data.Dataset[Any]):
    """Map-style, read on demand, counting its reads."""

    def __init__(self, count: int) -> None:
        self.count, self.reads = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: int) -> tuple[Any, int]:
        self.reads += 1
        return torch.tensor([float(at)]), at % 3


class Endless(torch_data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ((torch.tensor([float(at)]), at % 3) for at in range(40))


def tensor_dataset(count: int) -> torch_data.TensorDataset:
    return torch_data.TensorDataset(*map(torch.from_numpy, numbered(count)))


def halves(count: int) -> list[list[Any]]:
    x, y = numbered(count)
    return [[x[: count // 2], y[: count // 2]], [x[count // 2 :], y[count // 2 :]]]


@pytest.mark.parametrize(
    "given_data",
    [
        Numbers(40),
        tensor_dataset(40),
        Endless(),
        [(np.array([at], np.float32), at % 3) for at in range(40)],
        [([float(at)], at % 3) for at in range(40)],
        torch_data.Subset(torch_data.Subset(tensor_dataset(50), range(1, 50)), range(39)),
        torch_data.DataLoader(Numbers(40), batch_size=7, shuffle=True, drop_last=True),
        torch_data.DataLoader(tensor_dataset(40), batch_size=7),
        torch_data.DataLoader(Endless(), batch_size=7),
        torch_data.DataLoader(halves(40), batch_size=None),
        iter(halves(40)),
        (part for part in halves(40)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_set_is_split(given_data: object) -> None:
    splits = adopt(given_data).splits
    every = sorted(ids(splits.train) + ids(splits.validate) + ids(splits.test))
    assert every in (list(range(40)), list(range(1, 40)))
    assert splits.train.head(3)[0][0].shape == (3, 1)
    x, y = contents(splits.train)
    np.testing.assert_array_equal(x[:, 0] % 3, y)
    assert (x.dtype.name, y.dtype.name) == ("float32", "int64")


def test_examples_are_read_on_demand() -> None:
    dataset = Numbers(100_000)
    splits = adopt(dataset).splits
    assert dataset.reads <= 32
    assert len(splits.train.head(5)[1]) == 5


def test_train_and_test() -> None:
    given_data = (
        torch_data.DataLoader(Numbers(30), batch_size=4),
        torch_data.DataLoader(tensor_dataset(12), batch_size=4),
    )
    for pair in (given_data, list(given_data), (numbered(30), numbered(12))):
        splits = adopt(pair).splits
        assert splits.sizes() == {"train": 24, "validate": 6, "calibrate": 24, "test": 12}
        assert ids(splits.test) == list(range(12))


@pytest.mark.parametrize("alias", ["validate", "valid", "val"])
def test_dict_of_parts(alias: str) -> None:
    data = adopt(
        {
            "train": Numbers(30),
            alias: numbered(8),
            "calibrate": numbered(4),
            "test": adopt(numbered(40)).splits.test,
            "kind": "regression",
        }
    )
    assert data.splits.sizes() == {"train": 30, "validate": 8, "calibrate": 4, "test": 10}
    assert data.kind == "regression"


def test_splits_and_data_pass_through() -> None:
    data = adopt(numbered(40), name="mine")
    assert adopt(data) is data
    assert adopt(data.splits, name="other") == Data("other", data.splits)


def test_collate_fn_of_a_loader_is_used() -> None:
    def doubled(examples: list[Any]) -> Any:
        return torch.stack([2 * x for x, _ in examples]), torch.tensor([y for _, y in examples])

    for dataset in (Numbers(20), tensor_dataset(20)):
        loader = torch_data.DataLoader(dataset, collate_fn=doubled)
        splits = adopt((loader, numbered(4))).splits
        assert {value % 2 for value in ids(splits.train)} == {0}


@pytest.mark.parametrize("dataset", [Numbers(30), tensor_dataset(30)])
def test_samplers_keep_train_and_test_apart(dataset: Any) -> None:
    train = torch_data.SubsetRandomSampler(range(20))
    test = torch_data.BatchSampler(torch_data.SubsetRandomSampler(range(20, 30)), 4, True)
    splits = adopt(
        (
            torch_data.DataLoader(dataset, sampler=train, batch_size=7, drop_last=True),
            torch_data.DataLoader(dataset, batch_sampler=test),
        )
    ).splits
    assert sorted(ids(splits.train) + ids(splits.validate)) == list(range(20))
    assert sorted(ids(splits.test)) == list(range(20, 30))


def test_streams_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "STREAM_AT_MOST", 1000)
    with pytest.raises(InputError, match="generator is read into memory and gives more than 1,000"):
        adopt(numbered(10) for _ in range(1_000_000))


X, Y = numbered(20)
BROKEN: list[tuple[object, str]] = [
    ((X, Y[:-1]), "train: x has 20 examples and y has 19"),
    (((X, X[:3]), Y), "train: x1 has 3 examples and y has 20"),
    ((X[:0], Y[:0]), "it is empty"),
    ((X[:5], Y[:5]), "too few examples to split: 5; at least 6"),
    ({"train": (X, Y), "test": (X[:1], Y[:1])}, "split test: it has 1 example"),
    ({"train": (X, Y), "val": (X[:0], Y[:0])}, "split validate: it is empty"),
    ((np.where(X == 3, np.nan, X), Y), r"train: x holds nan \(1 of 20"),
    ((np.where(X == 3, 1e300, X.astype(float)), Y), "x holds 1e.300"),
    ((X, np.where(Y == 1, np.inf, Y)), "y holds inf"),
    ({"train": (X, Y), "test": (X - np.inf, Y)}, "split test: x holds -inf"),
    ((X, Y - 1), "train: y holds the class label -1"),
    ((X.astype(object), Y), "x is of dtype object"),
    ((X, Y.astype(str)), "y is of dtype <U"),
    ((torch.zeros(20, 1, dtype=torch.bfloat16), Y), "split train cannot be read: TypeError"),
    (X, "this ndarray is no data; give"),
    ((X, [1, 2]), "this ndarray is no data; give"),
    ((X, Y, X), "this tuple is no data"),
    ("digits", "this str is no data"),
    (None, "this NoneType is no data"),
    ({"x": X, "y": Y}, "unknown part 'x'; known: train"),
    ({"test": (X, Y)}, "no part 'train'"),
    ({"train": (X, Y), "val": (X, Y), "valid": (X, Y)}, "'validate' stands twice"),
    ({"train": (X, Y), "kind": "guess"}, "kind 'guess' is unknown; choose from class"),
    ([{"x": 1}] * 20, "an example or batch is a dict"),
    ([(np.zeros(at), 0) for at in range(20)], "cannot be read: ValueError: all input arrays must"),
    ([(np.array([np.nan]), 0)] * 20, "x holds nan"),
    ({"train": (X, Y), "test": {1: 2}}, "split test: this dict is no data"),
    (iter(()), "it is empty: the tuple_iterator gave no batch"),
    (torch_data.TensorDataset(torch.zeros(9)), "give \\(x, y\\)"),
    ((1 // (at - 2) for at in range(9)), "an example or batch is a int"),
    (((X, Y * (1 // (1 - at))) for at in range(9)), "train cannot be read: ZeroDivisionError"),
    (Splits(*[Split.arrays(X[:at], Y[:at]) for at in (9, 9, 9, 1)]), "split test: it has 1 ex"),
]


@pytest.mark.parametrize(("given_data", "message"), BROKEN)
def test_wrong_data_is_refused(given_data: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        adopt(given_data)
    assert "\n" not in str(caught.value)


def test_errors_name_the_split_when_it_is_read() -> None:
    class Broken(Numbers):
        def __getitem__(self, at: int) -> tuple[Any, int]:
            if at == 39:
                raise OSError("disk on fire")
            return super().__getitem__(at)

    given_data = {part: numbered(4) for part in ("validate", "calibrate", "test")}
    train = adopt({"train": Broken(40), **given_data}).splits.train
    with pytest.raises(InputError, match=r"^split train cannot be read: OSError: disk on fire"):
        train.head(40)
    with pytest.raises(InputError, match=r"^split train cannot be read: OSError: disk on fire"):
        adopt(torch_data.Subset(Broken(40), [39] * 40))


# Sources that are built in


@pytest.mark.parametrize(
    ("spec", "kind", "outputs", "count", "x", "y"),
    [
        ("digits", "classification", 10, 1797, (1, 8, 8), ()),
        ("digits?size=16", "classification", 10, 1797, (1, 16, 16), ()),
        ("digits?size=20", "classification", 10, 1797, (1, 20, 20), ()),
        ("digits-rows", "classification", 10, 1797, (8, 8), ()),
        ("digits-masks", "segmentation", 2, 1797, (1, 8, 8), (8, 8)),
        ("digits-masks?size=16", "segmentation", 2, 1797, (1, 16, 16), (16, 16)),
        ("breast-cancer", "binary", 1, 569, (30,), ()),
        ("wine", "classification", 3, 178, (13,), ()),
        ("diabetes", "regression", 1, 442, (10,), (1,)),
        ("line", "regression", 1, 512, (1,), (1,)),
    ],
)
def test_embedded_sources(
    spec: str, kind: str, outputs: int, count: int, x: tuple[int, ...], y: tuple[int, ...]
) -> None:
    data = read(spec, seed=1)
    assert (data.name, data.kind, data.outputs) == (spec, kind, outputs)
    sizes = data.splits.sizes()
    assert sizes["train"] + sizes["validate"] + sizes["test"] == count
    for name, size in sizes.items():
        seen_x, seen_y = contents(getattr(data.splits, name))
        assert (seen_x.shape, seen_y.shape) == ((size, *x), (size, *y))
        assert seen_x.dtype == np.float32
        assert seen_y.dtype == (np.float32 if kind == "regression" else np.int64)
        if kind != "regression":
            assert set(np.unique(seen_y)) == set(range(max(outputs, 2)))
        if spec.startswith("digits") and "masks" not in spec:
            assert 0 <= seen_x.min() < seen_x.max() <= 1
    assert adopt(data) is data
    assert read(spec, seed=1).splits.test.digest() == data.splits.test.digest()
    assert read(spec, seed=2).splits.test.digest() != data.splits.test.digest()


@pytest.mark.parametrize("spec", ["breast-cancer", "wine", "diabetes"])
def test_only_train_says_mean_and_deviation(spec: str) -> None:
    splits = read(spec, seed=5).splits
    x, y = contents(splits.train)
    columns = [x, y] if spec == "diabetes" else [x]
    for values in columns:
        np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(values.std(axis=0), 1, atol=1e-5)
    assert np.abs(contents(splits.test)[0].mean(axis=0)).max() > 1e-3


def test_enlarged_digits_are_the_digits() -> None:
    specs = ("digits", "digits?size=16", "digits?size=20")
    small, twice, odd = (read(spec).splits.test for spec in specs)
    (x,), _ = small.head(50)
    np.testing.assert_array_equal(twice.head(50)[0][0][:, :, ::2, 1::2], x)
    np.testing.assert_array_equal(odd.head(50)[0][0][:1], odd.head(1)[0][0])
    np.testing.assert_allclose(odd.head(50)[0][0].mean((1, 2, 3)), x.mean((1, 2, 3)), atol=0.02)


def test_line_is_the_line() -> None:
    x, y = contents(read("line").splits.train)
    np.testing.assert_array_equal(y, 2 * x + 1)
    assert -1 <= x.min() < x.max() <= 1


# Specs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "no such source; use digits, .* or PKG.MOD:FUNCTION"),
        ("", "no such source"),
        ("digits?size=4", "option size='4': Input should be greater than or equal to 8"),
        ("digits?size=1000000", "less than or equal to 256"),
        ("digits?size=big", "option size='big'.* valid integer"),
        ("digits?size=8&size=9", "option 'size' stands twice"),
        ("digits?sise=16", "unknown option 'sise'; known: size"),
        ("digits?", "unknown option ''; known: size"),
        ("digits?seed=1", "unknown option 'seed'"),
        ("wine?size=16", "unknown option 'size'; known: none"),
        ("digits:here", "built in and takes no location: remove :here"),
        ("mnist", "write mnist:PATH"),
        ("arrays:", "write arrays:PATH"),
        ("mnist:/nowhere?train=1", "option train='1': .* greater than or equal to 2"),
        ("mnist:/nowhere", "/nowhere has none of train-images-idx3-ubyte,"),
        ("arrays:/nowhere.npz", "there is no file /nowhere.npz"),
        ("not_there.mod:load", "ModuleNotFoundError: No module named 'not_there'"),
        ("os:not_there", "os has no function 'not_there'"),
        ("os:sep", "os has no function 'sep'"),
        ("os:", "write PKG.MOD:FUNCTION"),
        (":load", "write PKG.MOD:FUNCTION"),
        ("os:getcwd", "split train: this str is no data"),
        ("os:getcwd?size=1", "takes no options: remove [?]size=1"),
    ],
)
def test_wrong_specs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(spec)
    assert str(caught.value).startswith(f"data {spec!r}: ")
    assert "\n" not in str(caught.value)


LOADERS = """
import numpy as np

def pair():
    return np.ones((40, 2)), np.arange(40) % 3

def broken():
    raise RuntimeError("no\\nsuch disk")
"""


@pytest.fixture
def loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_loaders.py").write_text(LOADERS)
    return tmp_path / "my_loaders.py"


def test_functions_are_called(loaders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(loaders.parent)
    for spec in (f"{loaders}:pair", "./my_loaders.py:pair", "my_loaders:pair"):
        data = read(spec)
        assert data.name == spec
        assert data.splits.sizes()["test"] == 10
    with pytest.raises(InputError, match="broken: it raised RuntimeError: no such disk"):
        read(f"{loaders}:broken")


def test_a_file_that_is_missing() -> None:
    with pytest.raises(InputError, match=r"not_there\.py failed.*there is no such file"):
        read("./not_there.py:load")


def test_a_module_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "bad.py"
    file.write_text("def load(:\n")
    with pytest.raises(InputError, match=r"bad\.py failed: SyntaxError"):
        read(f"{file}:load")


def test_a_file_may_only_name_sources(loaders: Path) -> None:
    assert read("wine", trusted=False).outputs == 3
    for spec in (f"{loaders}:pair", "os:getcwd"):
        with pytest.raises(InputError, match=f"add --data {spec} to the command line"):
            read(spec, trusted=False)
    assert str(loaders.parent) not in sys.path


def test_importing_is_light() -> None:
    code = "import sys, compressor.data; print({'torch', 'sklearn', 'pydantic'} & {*sys.modules})"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "set()"


def test_every_source_resolves() -> None:
    from compressor.data import _source

    assert all(callable(_source(name)) for name in SOURCES)


# IDX files


def idx(values: Array, code: int) -> bytes:
    header = struct.pack(f">HBB{values.ndim}I", 0, code, values.ndim, *values.shape)
    return header + values.astype(values.dtype.newbyteorder(">")).tobytes()


CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_is_read(tmp_path: Path, dtype: str, zipped: bool) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    content = idx(values, CODES[dtype])
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(content) if zipped else content)
    seen = read_idx(path)
    np.testing.assert_array_equal(seen, values)
    assert seen.dtype == values.dtype


VALUES = np.arange(6, dtype=np.uint8).reshape(2, 3)
CONTENT = idx(VALUES, 0x08)


@pytest.mark.parametrize("zipped", [False, True])
def test_truncated_and_longer_files_are_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "file"
    whole = gzip.compress(CONTENT) if zipped else CONTENT
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match="file"):
            read_idx(path)
    longer = gzip.compress(CONTENT + b"\0") if zipped else CONTENT + b"\0"
    path.write_bytes(longer)
    with pytest.raises(InputError, match="more than 6 bytes where its header says 6"):
        read_idx(path)


@settings(max_examples=300)
@given(st.binary(min_size=0, max_size=16), st.integers(0, 12), st.booleans())
def test_changed_headers_never_surprise(
    tmp_path_factory: pytest.TempPathFactory, change: bytes, at: int, zipped: bool
) -> None:
    content = CONTENT[:at] + change + CONTENT[at + len(change) :]
    path = tmp_path_factory.getbasetemp() / "changed.idx"
    path.write_bytes(gzip.compress(content) if zipped else content)
    try:
        seen = read_idx(path)
    except InputError:
        return
    assert idx(seen, content[2]) == content


@given(st.binary(max_size=4), st.integers(0, 60))
def test_changed_gzip_never_surprises(
    tmp_path_factory: pytest.TempPathFactory, change: bytes, at: int
) -> None:
    whole = gzip.compress(CONTENT, mtime=0)
    path = tmp_path_factory.getbasetemp() / "changed.gz"
    path.write_bytes(whole[:at] + change + whole[at + len(change) :])
    with contextlib.suppress(InputError):
        np.testing.assert_array_equal(read_idx(path), VALUES)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "begins with nothing"),
        (b"\0\0\x0a\x01" + bytes(8), "no IDX file: it begins with 00 00 0a 01"),
        (b"\0\0\x08\0", "announces 0 dimensions"),
        (b"\0\0\x08\x41" + bytes(4 * 65), "announces 65 dimensions"),
        (b"\0\0\x08\x01" + bytes(4), r"shape \(0,\), 0 bytes"),
        (b"\0\0\x08\x02" + b"\xff" * 8, "at most 4294967296 can be read"),
        (b"\0\0\x08\x01\xff\xff\xff\xff" + bytes(9), "only 9 bytes where its header says 42949672"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(header)
    with pytest.raises(InputError, match=message):
        read_idx(path)


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(CONTENT + bytes(50_000_000)))
    given_out = 0
    plain = gzip.GzipFile.read

    def counted(file: gzip.GzipFile, size: int | None = -1) -> bytes:
        nonlocal given_out
        chunk = plain(file, size)
        given_out += len(chunk)
        return chunk

    monkeypatch.setattr(gzip.GzipFile, "read", counted)
    with pytest.raises(InputError, match="holds more than 6 bytes"):
        read_idx(path)
    assert given_out == len(CONTENT) + 1


def test_a_folder_is_no_idx_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_idx(tmp_path)


def write_mnist(folder: Path, train: int = 60, test: int = 12, mark: str = "-") -> None:
    draw = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-images{mark}idx3-ubyte").write_bytes(idx(images, 0x08))
        (folder / f"{part}-labels{mark}idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels, 0x08)))


@pytest.mark.parametrize("mark", "-.")
def test_mnist(tmp_path: Path, mark: str) -> None:
    write_mnist(tmp_path, mark=mark)
    data = read(f"mnist:{tmp_path}")
    assert (data.kind, data.outputs) == ("classification", 10)
    assert data.splits.sizes() == {"train": 48, "validate": 12, "calibrate": 48, "test": 12}
    x, y = contents(data.splits.test)
    pixels = read_idx(tmp_path / f"t10k-images{mark}idx3-ubyte")
    np.testing.assert_allclose(x[:, 0] * 0.3081 + 0.1307, pixels / 255, atol=1e-6)
    np.testing.assert_array_equal(y, np.arange(12) % 10)
    assert (x.shape, x.dtype.name, y.dtype.name) == ((12, 1, 28, 28), "float32", "int64")
    larger, _ = contents(read(f"mnist:{tmp_path}?size=56").splits.test)
    np.testing.assert_array_equal(larger[:, :, ::2, ::2], x)


def test_a_part_of_mnist(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    whole, part = read(f"mnist:{tmp_path}").splits, read(f"mnist:{tmp_path}?train=20").splits
    assert part.sizes() == {"train": 20, "validate": 12, "calibrate": 20, "test": 12}
    assert part.validate.digest() == whole.validate.digest()
    assert set(part.train.indices) <= set(whole.train.indices)
    with pytest.raises(InputError, match="option train=49: there are only 48 examples"):
        read(f"mnist:{tmp_path}?train=49")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("train-images-idx3-ubyte", np.zeros((60, 28, 27), np.uint8), r"shape \(60, 28, 27\)"),
        ("train-images-idx3-ubyte", np.zeros((59, 28, 28), np.uint8), "59 train images and 60 lab"),
        ("t10k-labels-idx1-ubyte", np.zeros((12, 1), np.uint8), r"labels .* shape \(12, 1\)"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, values: Array, message: str) -> None:
    write_mnist(tmp_path)
    (tmp_path / name).write_bytes(idx(values, 0x08))
    with pytest.raises(InputError, match=message):
        read(f"mnist:{tmp_path}")


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"the real MNIST is not at {MNIST}")
def test_the_real_mnist() -> None:
    data = read(f"mnist:{MNIST}?train=1000")
    assert data.splits.sizes() == {"train": 1000, "validate": 5000, "calibrate": 512, "test": 10000}
    _, y = contents(data.splits.test)
    assert y[:5].tolist() == [7, 2, 1, 0, 4]


# npz files


def test_npz(tmp_path: Path) -> None:
    x, y = numbered(40)
    path = tmp_path / "a.npz"
    np.savez(path, x=x, y=y, kind="classification")
    data = read(f"arrays:{path}", seed=2)
    assert data.kind == "classification"
    assert data.splits.test.digest() == adopt((x, y), seed=2).splits.test.digest()


def test_npz_with_parts_and_several_inputs(tmp_path: Path) -> None:
    x, y = numbered(40)
    columns = {f"x{at}_train": x + at for at in reversed(range(11))}
    np.savez_compressed(tmp_path / "a.npz", **columns, y_train=y, x_val=x[:5], y_val=y[:5])
    splits = read(f"arrays:{tmp_path / 'a.npz'}").splits
    inputs, _ = splits.train.head(1)
    assert [float((part - inputs[0])[0, 0]) for part in inputs] == list(range(11))
    assert splits.sizes() == {"train": 30, "validate": 5, "calibrate": 30, "test": 10}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x_train": X}, "needs x and y for train; it holds x_train"),
        ({"y": Y}, "needs x and y for train; it holds y"),
        ({"x": X, "y": Y, "x_test": X}, "needs x and y for test; it holds x, y, x_test"),
        ({"x_test": X, "y_test": Y}, "needs x and y for train"),
        ({"x": X, "y": Y, "z": Y}, "holds 'z'; known: x, y"),
        ({"x": X, "y": Y, "x_train": X}, "holds x of train twice"),
        ({"x": X, "y": Y[1:]}, "x has 20 examples and y has 19"),
        ({"x": X.astype(object), "y": Y}, "Object arrays cannot be loaded"),
        ({"x": X, "y": Y, "kind": np.array("cat")}, "kind 'cat' is unknown"),
    ],
)
def test_wrong_npz_is_refused(tmp_path: Path, content: dict[str, Array], message: str) -> None:
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(InputError, match=message):
        read(f"arrays:{tmp_path / 'a.npz'}")


def test_what_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X)
    with pytest.raises(InputError, match=r"no npz file: write one with numpy\.savez"):
        read(f"arrays:{tmp_path / 'a.npy'}")


@settings(max_examples=200)
@given(at=st.integers(0, 10_000), change=st.binary(min_size=1, max_size=8))
def test_changed_npz_never_surprises(
    tmp_path_factory: pytest.TempPathFactory, at: int, change: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.npz"
    np.savez(path, x=X, y=Y)
    content = path.read_bytes()
    at %= len(content)
    path.write_bytes(content[:at] + change + content[at + len(change) :])
    with contextlib.suppress(InputError):
        data = read(f"arrays:{path}")
        assert data.splits.test.digest() == adopt((X, Y)).splits.test.digest()


def test_no_byte_of_the_list_of_keys_takes_the_targets_away(tmp_path: Path) -> None:
    """Inputs alone are data too: without labels. One byte makes y the comment of x."""
    path = tmp_path / "a.npz"
    np.savez(path, x=X, y=Y)
    content = path.read_bytes()
    wanted = adopt((X, Y)).splits.test.digest()
    for at in range(content.index(b"PK\1\2"), len(content)):
        for changed in (1, content[at] ^ 1, content[at] ^ 128):
            path.write_bytes(content[:at] + bytes([changed]) + content[at + 1 :])
            with contextlib.suppress(InputError):
                data = read(f"arrays:{path}")
                assert data.labelled
                assert data.splits.test.digest() == wanted


def test_an_npz_that_unpacks_to_more_than_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.data.arrays.UNPACKED", 1 << 20)
    np.savez_compressed(
        tmp_path / "a.npz", x=np.zeros((1 << 20, 4), np.float32), y=np.zeros(1 << 20)
    )
    tracemalloc.start()
    with pytest.raises(InputError, match=r"would unpack 0 MB to 0\.0 GB of memory: write \.npy"):
        read(f"arrays:{tmp_path / 'a.npz'}", 0)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
