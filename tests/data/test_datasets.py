"""Folders of Hugging Face's datasets: every form of them is the same rows, and nothing else runs.

The files are made as datasets 5.2 makes them (``save_to_disk``, ``to_parquet``, its cache).
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import contents

from compressor.data import columns, datasets, read
from compressor.data.demand import OnDemand, targets
from compressor.errors import InputError
from compressor.task import UNLABELLED, Array, Split
from compressor.training.loader import batches

pa = pytest.importorskip("pyarrow", reason="needs the extra compressor[tables]")
parquet = pytest.importorskip("pyarrow.parquet")

NAMES = ["negative", "unused", "positive"]
FEATURES = {
    "sentence": {"dtype": "string", "_type": "Value"},
    "image": {"_type": "Image"},
    "label": {"names": NAMES, "_type": "ClassLabel"},
    "score": {"dtype": "float32", "_type": "Value"},
}
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COUNTS = {"train": 60, "validation": 20, "test": 15}


def picture(shade: int) -> bytes:
    """A gray picture of one colour, which says which row it is."""
    stream = io.BytesIO()
    Image.fromarray(np.full((6, 5), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def table(start: int, count: int, **other: Any) -> Any:
    """Rows ``start`` and on; a row of even number is negative, the others are positive."""
    rows = range(start, start + count)
    given = {
        "sentence": pa.array([f"row {at}" for at in rows]),
        "image": pa.array(
            [{"bytes": picture(at), "path": f"/away/{at}.png"} for at in rows], PICTURE
        ),
        "label": pa.array([at % 2 * 2 for at in rows], pa.int64()),
        "score": pa.array([at / 7 for at in rows], pa.float32()),
        **other,
    }
    about = json.dumps({"info": {"features": FEATURES}})
    return pa.table(given).replace_schema_metadata({"huggingface": about})


def arrow_file(path: Path, rows: Any, packed: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = pa.ipc.IpcWriteOptions(compression=packed)
    with pa.ipc.new_stream(str(path), rows.schema, options=options) as writer:
        writer.write_table(rows, max_chunksize=8)
    return path


def saved(folder: Path, rows: Any, shards: int = 1, **how: Any) -> Path:
    """A folder of ``Dataset.save_to_disk``."""
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(rows) // shards)
    names = [f"data-{at:05}-of-{shards:05}.arrow" for at in range(shards)]
    for at, name in enumerate(names):
        arrow_file(folder / name, rows.slice(at * size, size), **how)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": n} for n in names]})
    )
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    return folder


def parts() -> dict[str, Any]:
    starts = {"train": 0, "validation": 60, "test": 80}
    return {name: table(starts[name], count) for name, count in COUNTS.items()}


def in_a_dict(root: Path) -> Path:
    for name, rows in parts().items():
        saved(root / name, rows, 3 if name == "train" else 1)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(COUNTS)}))
    return root


def of_files(pattern: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        for name, rows in parts().items():
            path = root / pattern.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".arrow":
                arrow_file(path, rows)
            else:
                parquet.write_table(rows, path, row_group_size=11)
        return root

    return make


FORMS: dict[str, Callable[[Path], Path]] = {
    "save_to_disk": in_a_dict,
    "hub": of_files("data/{}-00000-of-00001.parquet"),
    "hub, with a digest": of_files("{}-00000-of-00001-0a1b2c3d4e5f.parquet"),
    "files": of_files("{}.parquet"),
    "folders": of_files("{}/0000.parquet"),
    "cache": of_files("imdb-{}.arrow"),
}
GRAY = "image=image&size=4&gray=1"


def rows_of(split: Split) -> list[int]:
    return [round(float(value) * 255) for value in contents(split)[0][:, 0, 0, 0]]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_data(tmp_path: Path, form: str) -> None:
    root = FORMS[form](tmp_path / "set")
    data = read(f"dataset:{root}?{GRAY}&target=label", 3)
    # The class that no row has counts: its number is the model's.
    assert (data.kind, data.outputs, data.labelled) == ("classification", 3, True)
    sizes = {"train": 60, "validate": 20, "calibrate": 60, "test": 15}
    assert data.splits.sizes() == sizes
    assert rows_of(data.splits.validate) == list(range(60, 80))
    assert rows_of(data.splits.test) == list(range(80, 95))
    for part in sizes:
        split = getattr(data.splits, part)
        x, y = contents(split)
        assert (x.dtype, x.shape[1:], y.dtype) == (np.float32, (1, 4, 4), np.int64)
        assert y.tolist() == [row % 2 * 2 for row in rows_of(split)]
        np.testing.assert_array_equal(np.concatenate(list(targets(split, 7))), y)
    assert sorted(rows_of(data.splits.train)) == list(range(60))


@pytest.mark.parametrize("described", ["dataset_info.json", "schema", "nowhere"])
def test_one_set_is_split(tmp_path: Path, described: str) -> None:
    rows = table(0, 60)
    if described != "schema":
        rows = rows.replace_schema_metadata(None)
    root = saved(tmp_path / "one", rows, shards=2)
    if described != "dataset_info.json":
        (root / "dataset_info.json").unlink()
    data = read(f"dataset:{root}?{GRAY}&target=label", 1)
    assert data.outputs == (2 if described == "nowhere" else 3)
    found = [rows_of(getattr(data.splits, part)) for part in ("train", "validate", "test")]
    assert sorted(row for part in found for row in part) == list(range(60))
    assert [len(part) for part in found] == [36, 9, 15]
    for part, seen in zip(("train", "validate", "test"), found, strict=True):
        label = 1 if described == "nowhere" else 2
        assert contents(getattr(data.splits, part))[1].tolist() == [at % 2 * label for at in seen]


@settings(max_examples=25)
@given(st.integers(8, 70), st.integers(1, 4), st.integers(1, 9), st.data())
def test_rows_are_found_wherever_they_lie(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    shards: int,
    chunk: int,
    drawn: st.DataObject,
) -> None:
    """Files of several batches, the positions in any order, one of them twice."""
    folder = tmp_path_factory.mktemp("rows")
    rows = pa.table({"n": list(range(count)), "s": [f"row {at}" for at in range(count)]})
    files = []
    for at in range(shards):
        piece = rows.slice(at * count // shards, (at + 1) * count // shards - at * count // shards)
        path = folder / f"{at}.arrow"
        with pa.ipc.new_stream(str(path), piece.schema) as writer:
            writer.write_table(piece, max_chunksize=chunk)
        files.append(path)
    found = datasets._rows(files, ["s", "n"])
    assert len(found) == count
    asked = drawn.draw(st.lists(st.integers(0, count - 1), max_size=20))
    at = np.array(asked, np.intp)
    assert found.values("n", at) == asked
    assert found.values("s", at) == [f"row {each}" for each in asked]
    assert found.column("n").to_pylist() == list(range(count))


def test_regression_and_no_labels(tmp_path: Path) -> None:
    root = saved(tmp_path / "one", table(0, 60))
    data = read(f"dataset:{root}?{GRAY}&target=score")
    assert (data.kind, data.outputs) == ("regression", 1)
    _, y = contents(data.splits.test)
    assert (y.shape, y.dtype) == ((15, 1), np.float32)
    np.testing.assert_allclose(y[:, 0], np.array(rows_of(data.splits.test)) / 7, rtol=1e-6)
    bare = read(f"dataset:{root}?{GRAY}")
    assert (bare.labelled, bare.kind) == (False, None)
    assert set(contents(bare.splits.train)[1]) == {UNLABELLED}


def test_pictures_are_those_of_a_folder(tmp_path: Path) -> None:
    """The same pixels as ``images:``, with the same options; as plain bytes, too."""
    shades = [picture(at) for at in range(30)]
    for at, content in enumerate(shades):
        (tmp_path / "files" / "ab"[at % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / "ab"[at % 2] / f"{at:02}.png").write_bytes(content)
    rows = pa.table({"picture": pa.array(shades, pa.binary()), "y": ["a", "b"] * 15})
    root = saved(tmp_path / "set", rows)
    (root / "dataset_info.json").unlink()
    options = "size=5&mean=0.485,0.456,0.406&std=0.229,0.224,0.225"
    one = read(f"images:{tmp_path / 'files'}?{options}")
    other = read(f"dataset:{root}?image=picture&target=y&{options}")
    assert (other.kind, other.outputs) == ("classification", 2)

    def by_value(split: Split) -> dict[float, tuple[int, bytes]]:
        x, y = contents(split)
        return {float(a[0, 0, 0]): (int(b), a.tobytes()) for a, b in zip(x, y, strict=True)}

    def every(splits: Any) -> dict[float, tuple[int, bytes]]:
        seen = (by_value(getattr(splits, part)) for part in ("train", "validate", "test"))
        return {key: value for part in seen for key, value in part.items()}

    assert every(one.splits) == every(other.splits)


def test_mapped_rows_are_read_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = saved(tmp_path / "one", table(0, 200), shards=4)
    before = pa.total_allocated_bytes()
    decoded: list[int] = []
    plain = Image.open

    def counted(file: Any, *rest: Any, **more: Any) -> Image.Image:
        decoded.append(1)
        return plain(file, *rest, **more)

    monkeypatch.setattr(Image, "open", counted)
    train = read(f"dataset:{root}?{GRAY}&target=label").splits.train
    assert isinstance(train.fetch, OnDemand)
    assert len(decoded) == 32  # the first 8 of each part
    # The labels are looked at; the pictures stay where they are.
    assert pa.total_allocated_bytes() - before < 20_000
    steps = np.array_split(np.random.default_rng(0).permutation(len(train)), 9)
    alone, together = (
        [x.numpy().tobytes() for (x,), _ in batches(train, steps, workers=count, pin=False)]
        for count in (0, 3)
    )
    assert alone == together


def test_texts(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs the extra compressor[transformers]")
    from test_text import folder, said

    words = pa.array([f"n{at % 60}" for at in range(60)])
    root = saved(tmp_path / "one", table(0, 60, sentence=words))
    model = folder(tmp_path / "model")
    data = read(f"dataset:{root}?text=sentence&target=label&tokenizer={model}&length=6")
    (ids, mask), y = data.splits.train.head(99)
    assert ids.shape == mask.shape == (36, 6)
    assert y.tolist() == [int(said(each)[0][1:]) % 2 * 2 for each in ids]


def test_a_part_without_labels_is_named(tmp_path: Path) -> None:
    """Benchmarks hide the labels of their test rows: -1."""
    root = in_a_dict(tmp_path / "set")
    saved(root / "test", table(80, 15, label=pa.array([-1] * 15, pa.int64())))
    spec = f"dataset:{root}?{GRAY}&target=label"
    with pytest.raises(InputError, match=r"no labels .*: name a part that has, test=validation"):
        read(spec)
    splits = read(f"{spec}&test=validation").splits
    assert splits.sizes() == {"train": 48, "validate": 12, "calibrate": 48, "test": 20}
    assert rows_of(splits.test) == list(range(60, 80))


# What is refused


def every(spec: str) -> list[Array]:
    """The inputs of all parts."""
    splits = read(spec).splits
    return [contents(getattr(splits, part))[0] for part in ("train", "validate", "test")]


def change(path: str, content: Any) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / path).write_text(content if isinstance(content, str) else json.dumps(content))

    return make


def replaced(rows: Any) -> Callable[[Path], None]:
    return lambda root: arrow_file(root / "train" / "data-00001-of-00003.arrow", rows) and None


def emptied(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


LIST = {"_data_files": [{"filename": "../../secret.arrow"}]}
NULLS = pa.array([None] * 20, pa.int64())
REFUSED: list[tuple[Callable[[Path], object], str, str]] = [
    (lambda _: None, "", "give one of text=COLUMN and image=COLUMN"),
    (lambda _: None, f"text=sentence&{GRAY}", "give one of text=COLUMN and image=COLUMN"),
    (lambda _: None, "text=sentence", "option tokenizer is missing: add tokenizer=FOLDER"),
    (lambda _: None, "image=gone", "no column 'gone', only 'sentence', 'image', 'label', 'score'"),
    (lambda _: None, f"{GRAY}&target=gone", "no column 'gone'"),
    (lambda _: None, "image=label&target=label", "column 'label' is asked for twice"),
    (lambda _: None, "image=sentence&size=4", "'sentence' of row .* is the path of a file"),
    (lambda _: None, "image=score&size=4", "'score' of row .* is missing, no picture"),
    (lambda _: None, "image=sentence&target=image", "target 'image' is of type struct"),
    (lambda _: None, f"{GRAY}&target=label&test=dev", "option test=dev: .* has test, train, vali"),
    (lambda _: None, f"{GRAY}&std=0", "option std=0: give numbers above 0"),
    (change("dataset_dict.json", "{"), GRAY, "dataset_dict.json is no JSON"),
    (change("dataset_dict.json", {"splits": "train"}), GRAY, "lists no splits"),
    (
        change("dataset_dict.json", {"splits": ["../set"]}),
        GRAY,
        "only names in its folder are read",
    ),
    (change("dataset_dict.json", {"splits": ["dev", "test"]}), GRAY, "holds no train, only 'dev',"),
    (
        change("dataset_dict.json", {"splits": ["train", "validation", "val"]}),
        GRAY,
        "holds the part 'validate' twice: remove 'val'",
    ),
    (change("train/state.json", LIST), GRAY, "only names in its folder are read"),
    (change("train/state.json", {"_data_files": 3}), GRAY, "state.json lists no files"),
    (
        change("train/state.json", {"_indices_files": [{"filename": "i.arrow"}]}),
        GRAY,
        "flatten_ind",
    ),
    (emptied("train/data-00002-of-00003.arrow"), GRAY, "is not there, and state.json lists it"),
    (change("train/data-00001-of-00003.arrow", ""), GRAY, "data-00001-of-00003.arrow cannot be"),
    (change("train/data-00001-of-00003.arrow", "x" * 90), GRAY, "arrow cannot be read"),
    (replaced(table(0, 20).drop_columns(["image"])), GRAY, "no column 'image', only"),
    (
        replaced(table(0, 20, label=pa.array([1.0] * 20))),
        f"{GRAY}&target=label",
        "has columns of other types than",
    ),
    (
        replaced(table(0, 20, label=NULLS)),
        f"{GRAY}&target=label",
        "'label' is missing in 20 of 60 rows, first in row 21",
    ),
    (
        replaced(table(0, 20, label=pa.array([3] * 20, pa.int64()))),
        f"{GRAY}&target=label",
        "'label' holds 3, none of train's classes",
    ),
    (
        replaced(
            table(0, 20, image=pa.array([{"bytes": b"no picture", "path": ""}] * 20, PICTURE))
        ),
        GRAY,
        r"'image' of row \d+ cannot be decoded: cannot identify image file: replace",
    ),
    (
        replaced(table(0, 20, image=pa.array([{"bytes": None, "path": "/a.png"}] * 20, PICTURE))),
        GRAY,
        r"'image' of row \d+ is the path of a file, no picture: save the data set with its pict",
    ),
]


@pytest.mark.parametrize(("broken", "options", "said"), REFUSED)
def test_wrong_folders_are_refused(
    tmp_path: Path, broken: Callable[[Path], object], options: str, said: str
) -> None:
    root = in_a_dict(tmp_path / "set")
    broken(root)
    with pytest.raises(InputError, match=said) as caught:
        every(f"dataset:{root}?{options}" if options else f"dataset:{root}")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_folders_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        read(f"dataset:{tmp_path / 'gone'}?{GRAY}")
    (tmp_path / "loader.py").write_text("raise SystemExit")
    with pytest.raises(InputError, match=r"holds no train, no \.arrow or \.parquet: give a folder"):
        read(f"dataset:{tmp_path}?{GRAY}")


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(table(0, 60), tmp_path / "train.parquet")
    for module in (columns, datasets):
        monkeypatch.setattr(module, "HELD_AT_MOST", 4000)
    with pytest.raises(InputError, match="take more than 4,000 bytes of memory"):
        read(f"dataset:{tmp_path}?{GRAY}&target=label")
    # Two files of which each could be held.
    two = tmp_path / "two"
    two.mkdir()
    for at in range(2):
        half = table(30 * at, 30).select(["image", "label"])
        parquet.write_table(half, two / f"{at}.parquet")
    monkeypatch.setattr(columns, "HELD_AT_MOST", 8000)
    with pytest.raises(InputError, match=r"two: its columns take more than .*: save the set with"):
        read(f"dataset:{two}?{GRAY}&target=label")


@pytest.mark.parametrize("packed", ["lz4", "zstd"])
@pytest.mark.parametrize("words", [False, True])
def test_compressed_files_are_not_unpacked(tmp_path: Path, packed: str, words: bool) -> None:
    """A few bytes may be gigabytes of zeros; in a dictionary of another column, too."""
    rows = table(0, 60)
    if words:
        rows = rows.set_column(0, "sentence", rows["sentence"].dictionary_encode())
    plain = saved(tmp_path / "plain", rows)
    assert read(f"dataset:{plain}?{GRAY}&target=label").outputs == 3
    with pytest.raises(InputError, match="is compressed, which cannot be mapped: save it without"):
        read(f"dataset:{saved(tmp_path / 'packed', rows, packed=packed)}?{GRAY}&target=label")


@pytest.mark.parametrize("packed", [None, "lz4", "zstd"])
def test_every_message_says_whether_it_is_compressed(tmp_path: Path, packed: str | None) -> None:
    rows = table(0, 20).add_column(0, "words", pa.array(["a", "b"] * 10).dictionary_encode())
    path = arrow_file(tmp_path / "a.arrow", rows, packed)
    seen = [
        (message.type, datasets._compressed(message))
        for message in pa.ipc.MessageReader.open_stream(path.read_bytes())
    ]
    assert [kind for kind, _ in seen] == ["schema", "dictionary", *["record batch"] * 3]
    assert [told for _, told in seen] == [False, *[packed is not None] * 4]


def test_feathers_form_is_refused(tmp_path: Path) -> None:
    rows = table(0, 60)
    with pa.ipc.new_file(str(tmp_path / "train.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    with pytest.raises(InputError, match="is of Feather's form: save the data set with save_to_di"):
        read(f"dataset:{tmp_path}?{GRAY}")


def test_what_an_arrow_file_says_of_its_memory_is_not_believed(tmp_path: Path) -> None:
    """Offsets that lead out of a column: read as they are, the memory behind it would be shown."""
    root = saved(tmp_path / "one", table(0, 8, image=pa.array([b"12345678"] * 8, pa.binary())))
    path = root / "data-00000-of-00001.arrow"
    content = path.read_bytes()
    offsets = np.arange(9, dtype="<i4") * 8
    assert content.count(offsets.tobytes()) == 1
    wild = offsets.copy()
    wild[3] = 1 << 30
    path.write_bytes(content.replace(offsets.tobytes(), wild.tobytes()))
    with pytest.raises(InputError, match=r"cannot be read: .*ffset"):
        read(f"dataset:{root}?image=image&target=label&size=4")


def test_without_pyarrow_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = saved(tmp_path / "one", table(0, 20))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'compressor\[tables\]'$"):
        read(f"dataset:{root}?{GRAY}")


@given(st.integers(0, 100_000), st.binary(min_size=1, max_size=4), st.booleans())
def test_changed_files_never_surprise(
    tmp_path_factory: pytest.TempPathFactory, at: int, change: bytes, mapped: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "changed-set"
    rows = CHANGED.select(["image", "label"])
    for path in folder.glob("*"):
        path.unlink()
    if mapped:
        path = arrow_file(folder / "train.arrow", rows)
    else:
        folder.mkdir(exist_ok=True)
        path = folder / "train.parquet"
        parquet.write_table(rows, path)
    content = path.read_bytes()
    at %= len(content)
    path.unlink()
    path.write_bytes(content[:at] + change + content[at + len(change) :])
    seen: Sequence[Array] = []
    told = ""
    try:
        seen = every(f"dataset:{folder}?{GRAY}&target=label")
    except InputError as error:
        told = str(error)
    assert told.isprintable()
    assert all(x.shape[1:] == (1, 4, 4) for x in seen)


CHANGED = table(0, 30)
