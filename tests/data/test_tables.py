"""Tables: what the columns become, by train alone, and what no table may do."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import contents

from compressor.data import columns, read, tables
from compressor.errors import InputError
from compressor.task import Split

pa = pytest.importorskip("pyarrow", reason="needs the extra compressor[tables]")
parquet = pytest.importorskip("pyarrow.parquet")

PARTS = ("train", "validate", "test")
Row = Sequence[object]


def written(path: Path, names: Sequence[str], rows: Sequence[Row], separator: str = ",") -> Path:
    """A file as Python's csv module writes it; ``None`` is an empty field."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([names, *rows])
    return path


def stored(path: Path, **given: Any) -> Path:
    parquet.write_table(pa.table(given), path, row_group_size=7)
    return path


def expected(train: Sequence[Any], each: Any) -> list[float]:
    """What a value becomes, from the values of train: one column at a time, without NumPy."""
    present = [value for value in train if value is not None]
    if isinstance(present[0], str):
        found = [float(each == known) for known in sorted(set(present))]
        return [*found, float(each is None)] if None in train else found
    median = statistics.median(present)
    filled = [median if value is None else value for value in train]
    mean, deviation = statistics.fmean(filled), statistics.pstdev(filled)
    moved = (median if each is None else each) - mean
    scaled = moved / deviation if max(filled) > min(filled) else moved
    return [scaled, float(each is None)] if None in train else [scaled]


# Rows are told apart by a column of their own.
numbers = st.none() | st.integers(-1000, 1000) | st.floats(-1000, 1000, width=16)
words = st.none() | st.sampled_from(
    ["a", "b", "c d", 'q"uote', "semi;colon", "com,ma", "new\nline"]
)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(numbers, words, st.none() | st.booleans()), min_size=12, max_size=40),
    st.sampled_from([".csv", ".tsv", ".csv.gz", ".parquet"]),
    st.integers(0, 3),
)
def test_columns_are_what_train_makes_them(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Row], ending: str, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / f"drawn{ending}"
    rows = [(at, *row, "yn"[at % 2]) for at, row in enumerate(drawn)]
    names = ("id", "number", "word", "flag", "y")
    if ending == ".parquet":
        kinds = (pa.int16(), pa.float64(), pa.string(), pa.bool_(), pa.string())
        every = zip(names, zip(*rows, strict=True), kinds, strict=True)
        stored(path, **{name: pa.array(values, kind) for name, values, kind in every})
    else:
        written(path, names, rows, "\t" if ending == ".tsv" else ",")
    plain = read(f"table:{path}?target=y&scale=0&drop=number,word,flag", seed).splits
    places = {part: contents(getattr(plain, part))[0][:, 0].astype(int) for part in PARTS}
    assert sorted(np.concatenate(list(places.values()))) == list(range(len(rows)))
    train = [rows[at] for at in places["train"]]
    known = [[row[at] for row in train] for at in range(4)]
    if any(all(value is None for value in column) for column in known):
        with pytest.raises(InputError, match="has no value"):
            read(f"table:{path}?target=y", seed)
        return
    data = read(f"table:{path}?target=y", seed)
    for part in PARTS:
        x, y = contents(getattr(data.splits, part))
        assert (x.dtype, y.dtype) == (np.float32, np.int64)
        assert y.tolist() == [1 - at % 2 for at in places[part]]
        for seen, at in zip(x, places[part], strict=True):
            wanted = [
                number
                for column, value in zip(known, rows[at], strict=False)
                for number in expected(column, value)
            ]
            np.testing.assert_allclose(seen, wanted, rtol=1e-4, atol=1e-4)
    assert len(data.columns) == x.shape[1]
    assert data.columns[:2] == ("id", "number")


def test_columns_are_named(tmp_path: Path) -> None:
    rows = [
        (at, None if at % 2 else at, "ab"[at % 2] if at % 3 else None, at % 2) for at in range(30)
    ]
    path = written(tmp_path / "a.csv", ("id", "age", "job", "y"), rows)
    data = read(f"table:{path}?target=y&drop=id")
    assert data.columns == ("age", "age is missing", "job=a", "job=b", "job is missing")
    assert (data.kind, data.outputs) == ("binary", 1)
    assert data.name == f"table:{path}?target=y&drop=id"


def test_real_tables_are_those_of_scikit_learn(tmp_path: Path) -> None:
    """The same rows, cuts and numbers as the built-in sources, through a file."""
    from sklearn import datasets

    for name, load in (
        ("wine", datasets.load_wine),
        ("breast-cancer", datasets.load_breast_cancer),
        ("diabetes", datasets.load_diabetes),
    ):
        x, y = load(return_X_y=True)
        rows = np.column_stack([x, y]).tolist()
        if name != "diabetes":
            rows = [(*row[:-1], f"class {int(row[-1])}") for row in rows]
        names = [*(f"x{at}" for at in range(x.shape[1])), "y"]
        built_in = read(name, 5)
        for ending in (".csv", ".parquet"):
            path = tmp_path / f"{name}{ending}"
            if ending == ".csv":
                written(path, names, rows)
            else:
                stored(path, **dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
            data = read(f"table:{path}?target=y", 5)
            assert (data.kind, data.outputs) == (built_in.kind, built_in.outputs)
            for part in (*PARTS, "calibrate"):
                seen, same = getattr(data.splits, part), getattr(built_in.splits, part)
                for mine, theirs in zip(contents(seen), contents(same), strict=True):
                    assert mine.shape == theirs.shape
                    np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_test_rows_change_nothing_in_train(tmp_path: Path) -> None:
    """Statistics, categories and classes are of train: another test file leaves it as it was."""
    draw = np.random.default_rng(0)
    names = ("a", "b", "y")
    rows = [(draw.normal(), "uv"[at % 2], at % 3) for at in range(40)]
    path = written(tmp_path / "train.csv", names, rows)
    tame = written(tmp_path / "tame.csv", names, rows[:5])
    # Other order, more columns, a number that is whole no longer, a category that train has not.
    wild_rows = [("x", 2, None, 1e6), ("x", 1, "w", 0.5), ("x", 0, "u", 3)]
    wild = written(tmp_path / "wild.csv", ("more", "y", "b", "a"), wild_rows)
    one, other = (read(f"table:{path}?target=y&test={each}") for each in (tame, wild))
    assert one.splits.train.digest() == other.splits.train.digest()
    assert one.columns == other.columns == ("a", "b=u", "b=v")
    x, y = contents(other.splits.test)
    assert y.tolist() == [2, 1, 0]
    assert x[:, 1:].tolist() == [[0, 0], [0, 0], [1, 0]]
    train, validate = (len(getattr(one.splits, part)) for part in ("train", "validate"))
    assert (train, validate, len(one.splits.test)) == (32, 8, 5)


def test_whole_numbers_may_have_fractions_in_the_second_file(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", ("a", "y"), [(at, at % 2) for at in range(20)])
    more = written(tmp_path / "b.csv", ("a", "y"), [(0.5, 0), (1.25, 1)])
    x, _ = contents(read(f"table:{path}?target=y&test={more}&scale=0").splits.test)
    assert x.ravel().tolist() == [0.5, 1.25]
    stored(tmp_path / "a.parquet", a=list(range(20)), y=["n", "y"] * 10)
    stored(tmp_path / "b.parquet", a=[0.5, 1.25], y=["n", "y"])
    spec = f"table:{tmp_path / 'a.parquet'}?target=y&scale=0&test={tmp_path / 'b.parquet'}"
    assert contents(read(spec).splits.test)[0].ravel().tolist() == [0.5, 1.25]


def test_what_only_others_lack_has_no_column_of_its_own(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.csv", ("a", "b", "y"), [(at, "uv"[at % 2], at % 2) for at in range(21)]
    )
    more = written(tmp_path / "b.csv", ("a", "b", "y"), [(None, None, 0), (1, "u", 1)])
    data = read(f"table:{path}?target=y&test={more}&scale=0")
    assert data.columns == ("a", "b=u", "b=v")
    train, _ = contents(data.splits.train)
    x, _ = contents(data.splits.test)
    assert x.tolist() == [[np.median(train[:, 0]), 0, 0], [1, 1, 0]]


def test_lines_in_values_and_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of several lines may lie across the blocks that a file is parsed in."""
    rows = [(at, "one\ntwo" if at % 2 else "one,\n\ntwo", "ny"[at % 2]) for at in range(200)]
    path = written(tmp_path / "a.csv", ("id", "text", "y"), rows)
    whole = read(f"table:{path}?target=y")
    for size in (64, 65, 66, 67, 100):
        monkeypatch.setattr(columns, "BLOCK", size)
        cut = read(f"table:{path}?target=y")
        assert cut.columns == whole.columns
        assert cut.splits.train.digest() == whole.splits.train.digest()


TARGETS: list[tuple[list[Any], str, str, int, list[Any]]] = [
    (["no", "yes"] * 10, "", "binary", 1, [0, 1] * 10),
    (["no", "yes"] * 10, "&kind=classification", "classification", 2, [0, 1] * 10),
    (["b", "c", "a", "c"] * 5, "", "classification", 3, [1, 2, 0, 2] * 5),
    ([7, 3, 9, 3] * 5, "", "classification", 3, [1, 0, 2, 0] * 5),
    ([1.0, 2.0, 3.0, 1.0] * 5, "&kind=classification", "classification", 3, [0, 1, 2, 0] * 5),
    ([-1, 1] * 10, "", "binary", 1, [0, 1] * 10),
    ([True, False] * 10, "", "binary", 1, [1, 0] * 10),
    ([1, 2, 3, 4] * 5, "&kind=regression&scale=0", "regression", 1, [[1], [2], [3], [4]] * 5),
    ([0.5, 1.5] * 10, "&scale=0", "regression", 1, [[0.5], [1.5]] * 10),
]


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
@pytest.mark.parametrize(("values", "options", "kind", "outputs", "wanted"), TARGETS)
def test_targets(
    tmp_path: Path,
    values: list[Any],
    options: str,
    kind: str,
    outputs: int,
    wanted: list[Any],
    ending: str,
) -> None:
    path = tmp_path / f"a{ending}"
    if ending == ".csv":
        written(path, ("x", "y"), list(enumerate(values)))
    else:
        stored(path, x=list(range(len(values))), y=values)
    data = read(f"table:{path}?target=y{options}{'' if 'scale' in options else '&scale=0'}")
    assert (data.kind, data.outputs) == (kind, outputs)
    for part in PARTS:
        x, y = contents(getattr(data.splits, part))
        assert y.tolist() == [wanted[int(at)] for at in x[:, 0]]
        assert y.dtype == (np.float32 if kind == "regression" else np.int64)


def test_regression_targets_are_standardised_by_train(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    path = written(tmp_path / "a.csv", ("x", "y"), [tuple(draw.normal(9, 4, 2)) for _ in range(80)])
    splits = read(f"table:{path}?target=y").splits
    for values in contents(splits.train):
        np.testing.assert_allclose(values.mean(), 0, atol=1e-5)
        np.testing.assert_allclose(values.std(), 1, atol=1e-5)
    assert abs(contents(splits.test)[1].mean()) > 1e-3
    assert splits.train.head(3)[1].shape == (3, 1)


def test_types_of_parquet(tmp_path: Path) -> None:
    count = 24
    path = stored(
        tmp_path / "a.parquet",
        small=pa.array(range(count), pa.uint8()),
        half=pa.array([np.float16(at) for at in range(count)], pa.float16()),
        exact=pa.array([decimal.Decimal(at) for at in range(count)], pa.decimal128(9, 2)),
        holes=pa.array([math.nan if at % 2 else at for at in range(count)]),
        packed=pa.array(["a", "b"] * (count // 2)).dictionary_encode(),
        large=pa.array(["c", "d"] * (count // 2), pa.large_string()),
        y=pa.array(["u", "v", "u"] * (count // 3)).dictionary_encode(),
    )
    data = read(f"table:{path}?target=y&scale=0")
    assert data.columns == (
        *("small", "half", "exact", "holes", "holes is missing"),
        *("packed=a", "packed=b", "large=c", "large=d"),
    )
    x, y = contents(data.splits.train)
    ids = x[:, 0].astype(int)
    np.testing.assert_array_equal(x[:, 1:3], x[:, :1].repeat(2, axis=1))
    np.testing.assert_array_equal(x[:, 4], ids % 2)
    np.testing.assert_array_equal(x[:, [6, 8]], (ids % 2)[:, None].repeat(2, axis=1))
    np.testing.assert_array_equal(y, [at % 3 == 1 for at in ids])


def test_byte_order_marks_quotes_and_separators(tmp_path: Path) -> None:
    rows = "".join(f'"{at}";"a ""b""; c\nd";{at % 2}\n' for at in range(20))
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f'"i;d";R&D;y\n{rows}'.encode())
    data = read(f"table:{path}?target=y&separator=;")
    assert data.columns[0] == "i;d"
    assert data.columns[1] == r'R&D=a "b"; c\nd'
    assert len(data.columns) == 2
    data = read(f"table:{path}?target=y&separator=;&drop=R%26D")
    assert data.columns == ("i;d",)


def test_splits_follow_the_seed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", ("x", "y"), [(at, "abc"[at % 3]) for at in range(60)])
    one, again, other = (read(f"table:{path}?target=y", seed).splits for seed in (3, 3, 4))
    assert one.test.digest() == again.test.digest() != other.test.digest()
    # Every class has its share.
    assert np.bincount(contents(one.test)[1]).tolist() == [5, 5, 5]


# What is refused


def csv_of(names: str, *rows: str, count: int = 1) -> bytes:
    return "\n".join([names, *(list(rows) * count), ""]).encode()


DAY = datetime.date(2020, 1, 1)
REFUSED: list[tuple[str, bytes | dict[str, Any], str, str]] = [
    ("a.csv", b"", "target=y", "a.csv is empty: its first line names the columns"),
    ("a.csv", b"\n\n\n", "target=y", "is empty"),
    ("a.csv", b"x,y\n", "target=y", "has no rows"),
    ("a.csv", csv_of("x,y", "1,a", "2,b"), "target=y", "too few examples to split: 2"),
    ("a.csv", csv_of("x,y", "1,a", "2", count=9), "target=y", "Expected 2 columns, got 1"),
    ("a.csv", csv_of("x,x", "1,a", "2,b", count=9), "target=x", "has the column 'x' twice"),
    ("a.csv", csv_of("x,y", "1,a", count=9), "target=z", "no column 'z', only 'x', 'y'$"),
    ("a.csv", csv_of("x;y", "1;a", count=9), "target=y", "one column 'x;y': say separator=;"),
    ("a.csv", csv_of("x,y", "1,a", count=9), "target=y&drop=q", "no column 'q'"),
    ("a.csv", csv_of("x,y", "1,a", count=9), "target=y&drop=y", "drop=y holds the target"),
    ("a.csv", csv_of("y", "a", "b", count=9), "target=y", "no columns but the target 'y'"),
    ("a.csv", csv_of("x,y", "1,a", count=9), "target=y", r"1 different values \('a'\): at least"),
    ("a.csv", csv_of("x,y", "1,a", "1,", count=9), "target=y", "missing in 9 of 18 rows.* row 2"),
    ("a.csv", csv_of("x,y", "1,2.5", "1,nan", count=9), "target=y", "is missing in 9 of 18 rows"),
    ("a.csv", csv_of("x,y", "1,2.5", "1,inf", count=9), "target=y", "is inf in row 2: remove that"),
    ("a.csv", csv_of("x,y", "1,2.5", "-inf,1", count=9), "target=y", "'x' is -inf in row 2: repl"),
    ("a.csv", csv_of("x,y", "1,2.5", "1e400,1", count=9), "target=y", "'x' is inf in row 2"),
    (
        "a.csv",
        csv_of("x,y", "1,2", "1e308,1", count=9),
        "target=y",
        "too large for float32: divide",
    ),
    ("a.csv", csv_of("x,y", "1,2.5", "2,1e308", count=9), "target=y", "'y' holds numbers up to 1e"),
    (
        "a.csv",
        csv_of("x,y", "1,2.5", "2,1", count=9),
        "target=y&kind=binary",
        "holds 2.5, no class",
    ),
    (
        "a.csv",
        csv_of("x,y", "1,a", "2,b", "3,c", count=9),
        "target=y&kind=binary",
        "has 3 different values .*: two are needed",
    ),
    ("a.csv", csv_of("x,y", "1,a", "2,b", count=9), "target=y&kind=regression", "holds strings"),
    ("a.csv", csv_of("x,y", "1,a", "2,b", count=9), "target=y&kind=guess", "option kind='guess'"),
    (
        "a.csv",
        csv_of("x,y", *(f"1,{at}" for at in range(101))),
        "target=y",
        "has 101 different values .*, more than 100: say kind=classification or kind=regression",
    ),
    (
        "a.csv",
        csv_of("x,y", *(f"w{at},{at % 2}" for at in range(600))),
        "target=y",
        "'x' has 360 different values in train .*, more than 256: drop it",
    ),
    ("a.csv", csv_of("x,y", ",a", ",b", count=9), "target=y", "no value at all: add drop='x'"),
    ("a.csv", csv_of("d,y", "2020-01-01,a", count=9), "target=y", "'d' holds times"),
    ("a.csv", csv_of("d,y", "2020-01-01 10:00:00,a", count=9), "target=y", "holds times"),
    ("a.csv", csv_of("d,y", "10:00:00,a", count=9), "target=y", "'d' holds times"),
    ("a.csv", csv_of("y,x", "2020-01-01,a", count=9), "target=y", "target 'y' is of type date32"),
    ("a.csv", csv_of("x,y", "1,a").replace(b"1", b"\xff"), "target=y", "'x' is not UTF-8"),
    ("a.csv", csv_of("x,y", "1,a").replace(b"x", b"\xff"), "target=y", "first line is not UTF-8"),
    ("a.csv", csv_of("x,y", "1,a").decode().encode("utf-16"), "target=y", "not UTF-8"),
    ("a.csv", b'x,y\n"1,a\n2,b\n', "target=y", "cannot be read: CSV parse error"),
    ("a.csv", b"," * 30_000 + b"\n", "target=y", "begins with 30,001 names of columns"),
    ("a.csv", b"\0" * 50, "target=y", "a.csv"),
    ("a.csv", csv_of("\x1b[31mx,y", "1,a", count=9), "target=z", r"only '\\x1b\[31mx', 'y'"),
    ("a.csv", csv_of("x,y", "1,a", count=9), "", "option target is missing: add [?]target="),
    ("a.csv", csv_of("x,y", "1,a", count=9), "target=y&separator=ab", "option separator='ab'"),
    ("a.txt", csv_of("x,y", "1,a", count=9), "target=y", "a.txt is no table: give a .csv"),
    ("a.csv.gz", csv_of("x,y", "1,a", count=9), "target=y", "cannot be read: Not a gzipped file"),
    (
        "a.csv.gz",
        gzip.compress(csv_of("x,y", "1,a", count=99), mtime=0)[:-9],
        "target=y",
        "cannot be read",
    ),
    ("a.parquet", b"PAR1" * 9, "target=y", "a.parquet cannot be read: "),
    ("a.parquet", {"x": [DAY] * 20, "y": ["a", "b"] * 10}, "target=y", "'x' holds times"),
    ("a.parquet", {"x": [[1]] * 20, "y": ["a", "b"] * 10}, "target=y", "'x' is of type list"),
    ("a.parquet", {"x": [b"1"] * 20, "y": ["a", "b"] * 10}, "target=y", "'x' is of type binary"),
    ("a.parquet", {"x": [None] * 20, "y": ["a", "b"] * 10}, "target=y", "no value at all"),
    ("a.parquet", {"x": [1.0] * 20, "y": [[1]] * 20}, "target=y", "target 'y' is of type list"),
    ("a.parquet", {"x": [1.0] * 20, "y": [0.5, math.nan] * 10}, "target=y", "missing in 10 of 20"),
    ("a.parquet", {"x": [], "y": []}, "target=y", "has no rows"),
]


@pytest.mark.parametrize(("name", "content", "options", "said"), REFUSED)
def test_wrong_tables_are_refused(
    tmp_path: Path, name: str, content: bytes | dict[str, Any], options: str, said: str
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        stored(path, **content)
    with pytest.raises(InputError, match=said) as caught:
        read(f"table:{path}?{options}" if options else f"table:{path}")
    told = str(caught.value)
    assert told.isprintable()
    assert len(told) < 500


@pytest.mark.parametrize(
    ("names", "rows", "said"),
    [
        (("x", "y"), [("big", "a"), (1, "b")], "conversion error to double: invalid value 'big'"),
        (("x", "y"), [(1, "a"), (1, "c")], "holds 'c', none of train's classes"),
        (("x",), [(1,), (2,)], "has no column 'y', only 'x'"),
        (("y",), [("a",), ("b",)], "has no column 'x'"),
        (("x", "y"), [(1, "a"), (2, None)], "target 'y' is missing in 1 of 2 rows, first in row 2"),
        (("x", "y"), [(1, "a")], "split test: it has 1 example"),
        (("x", "y"), [("inf", "a"), (1, "b")], "'x' is inf"),
    ],
)
def test_wrong_second_files_are_refused(
    tmp_path: Path, names: Sequence[str], rows: list[Row], said: str
) -> None:
    path = written(tmp_path / "a.csv", ("x", "y"), [(at, "ab"[at % 2]) for at in range(20)])
    more = written(tmp_path / "b.csv", names, rows)
    with pytest.raises(InputError, match=said) as caught:
        read(f"table:{path}?target=y&test={more}")
    assert str(caught.value).isprintable()


def test_second_parquet_files_have_the_same_types(tmp_path: Path) -> None:
    stored(tmp_path / "a.parquet", x=list(range(20)), y=["a", "b"] * 10)
    spec = f"table:{tmp_path / 'a.parquet'}?target=y&test={tmp_path / 'b.parquet'}"
    for x, kind in ((["1", "2"], "string"), ([True, False], "bool")):
        stored(tmp_path / "b.parquet", x=x, y=["a", "b"])
        with pytest.raises(InputError, match=f"'x' is of type {kind}, in train of double: make"):
            read(spec)
    stored(tmp_path / "a.parquet", x=list(range(20)), y=[1, 2] * 10)
    stored(tmp_path / "b.parquet", x=[1, 2], y=[1.5, 2.0])
    with pytest.raises(InputError, match=r"target 'y' holds 1\.5, no class"):
        read(spec)
    stored(tmp_path / "b.parquet", x=[1, 2], y=[1.0, 2.0])
    assert contents(read(spec).splits.test)[1].tolist() == [0, 1]


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(at, "ab"[at % 2]) for at in range(4000)]
    plain = written(tmp_path / "a.csv", ("x", "y"), rows)
    packed = written(tmp_path / "a.csv.gz", ("x", "y"), rows)
    stored(tmp_path / "a.parquet", x=list(range(4000)), y=["a", "b"] * 2000)
    monkeypatch.setattr(columns, "TEXT_AT_MOST", 10_000)
    for path in (plain, packed):
        with pytest.raises(InputError, match="more than 10,000 bytes of text: write it as"):
            read(f"table:{path}?target=y")
    monkeypatch.setattr(columns, "HELD_AT_MOST", 10_000)
    with pytest.raises(InputError, match="its columns take more than 10,000 bytes"):
        read(f"table:{tmp_path / 'a.parquet'}?target=y")
    monkeypatch.undo()
    monkeypatch.setattr(tables, "BYTES_AT_MOST", 10_000)
    with pytest.raises(InputError, match="its inputs take more than 10,000 bytes"):
        read(f"table:{plain}?target=y")


def test_without_pyarrow_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.csv", ("x", "y"), [(at, at % 2) for at in range(20)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'compressor\[tables\]'$"):
        read(f"table:{path}?target=y")


# Whatever a file holds

ROWS = [(at, at / 3 if at % 5 else None, "abc"[at % 3], "ny"[at % 2]) for at in range(30)]


def every(spec: str) -> list[Split]:
    """All there is, read, or refused in one line."""
    try:
        splits = read(spec).splits
    except InputError as error:
        return [] if str(error).isprintable() else pytest.fail(f"{error!r}")
    for part in PARTS:
        x, y = contents(getattr(splits, part))
        assert np.isfinite(x).all()
        assert (x.dtype, y.dtype) == (np.float32, np.int64)
    return [getattr(splits, part) for part in PARTS]


@given(st.integers(0, 10_000), st.binary(max_size=4), st.integers(0, 4))
def test_changed_csv_never_surprises(
    tmp_path_factory: pytest.TempPathFactory, at: int, change: bytes, gone: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.csv"
    content = written(path, ("id", "a", "b", "y"), ROWS).read_bytes()
    at %= len(content)
    path.write_bytes(content[:at] + change + content[at + gone :])
    every(f"table:{path}?target=y")


@given(st.integers(0, 100_000), st.binary(min_size=1, max_size=4))
def test_changed_parquet_never_surprises(
    tmp_path_factory: pytest.TempPathFactory, at: int, change: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.parquet"
    made = dict(zip(("id", "a", "b", "y"), zip(*ROWS, strict=True), strict=True))
    content = stored(path, **{name: list(values) for name, values in made.items()}).read_bytes()
    at %= len(content)
    path.write_bytes(content[:at] + change + content[at + len(change) :])
    every(f"table:{path}?target=y")


@given(st.text(alphabet='abc,;"\n\t\x1b\x00é\ufeff?', max_size=200))
def test_any_text_is_a_table_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_text(content, encoding="utf-8")
    every(f"table:{path}?target=a")


def test_the_unchanged_table_is_read(tmp_path: Path) -> None:
    """Else the tests before this one would hold for a source that refuses everything."""
    path = written(tmp_path / "a.csv", ("id", "a", "b", "y"), ROWS)
    assert [len(part) for part in every(f"table:{path}?target=y")] == [19, 4, 7]


LOOKS = {
    "a decimal comma": [f"{at},5" for at in range(20)],
    "a dash where one is missing": ["-", *(f"{at / 8}" for at in range(19))],
    "thousands": [f"{at},001.5" for at in range(1, 21)],
    "percent": [f"{at} %" for at in range(20)],
    "dates": [f"{at + 1}/02/2024" for at in range(20)],
}


@pytest.mark.parametrize("looks", LOOKS)
@pytest.mark.parametrize("where", ["a", "y"])
def test_numbers_that_were_not_read_as_such_are_no_categories(
    tmp_path: Path, looks: str, where: str
) -> None:
    values = LOOKS[looks] * 3
    rows = [(one, at % 2) if where == "a" else (at, one) for at, one in enumerate(values)]
    path = written(tmp_path / "t.csv", ("a", "y"), rows)
    what = "dates" if looks == "dates" else "numbers"
    with pytest.raises(InputError, match=rf"column '{where}' holds {what} as text") as caught:
        read(f"table:{path}?target=y")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_words_with_digits_stay_categories(tmp_path: Path) -> None:
    rooms = ["1", "2", "3", "4+"] * 10
    versions = [f"1.{at}.{at}" for at in range(20)] * 2
    rows = [*zip(rooms, versions, [0, 1] * 20, strict=True)]
    path = written(tmp_path / "t.csv", ("rooms", "version", "y"), rows)
    found = read(f"table:{path}?target=y").columns
    assert found[:4] == ("rooms=1", "rooms=2", "rooms=3", "rooms=4+")
    known = stored(tmp_path / "t.parquet", zip=[f"{at:05}" for at in range(20)] * 2, y=[0, 1] * 20)
    assert read(f"table:{known}?target=y").columns[0] == "zip=00000"  # which its writer meant


@pytest.mark.parametrize(
    ("text", "said"),
    [("a,y\n", "has no rows"), ("a;y\n1;2\n", "has one column 'a;y': say separator=;")],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        read(f"table:{tmp_path / 't.csv'}?target=y")
