"""How long a file takes to become splits, beside the loops that people write: ratios of one run."""

from __future__ import annotations

import csv
import pickle
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from compressor.data import read
from compressor.task import Array

TURNS = 5
ROWS = 200_000


def beside(benchmark: BenchmarkFixture, ways: dict[str, Callable[[], object]]) -> None:
    """Milliseconds of each way, and how many times faster than the first: medians of turns."""
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seen[name].append(time.perf_counter() - began)
    first = next(iter(ways))
    for name, times in seen.items():
        benchmark.extra_info[f"{name}, ms"] = round(1000 * statistics.median(times), 1)
        pairs = zip(seen[first], times, strict=True)
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        benchmark.extra_info[f"{name}, times {first}"] = round(ratio, 2)
    benchmark.pedantic(list(ways.values())[-1], rounds=3)


def looped(path: Path) -> tuple[Array, Array]:
    """A table by hand: rows of strings, a column at a time, mean and deviation of all of it."""
    with path.open(newline="") as file:
        _, *rows = csv.reader(file)
    columns = []
    for values in list(zip(*rows, strict=True))[:-1]:
        try:
            numbers = np.array([float(value) if value else np.nan for value in values])
        except ValueError:
            columns += [
                np.array([value == known for value in values], np.float32)
                for known in sorted({*values} - {""})
            ]
            continue
        numbers = np.where(np.isnan(numbers), np.nanmedian(numbers), numbers)
        columns.append(((numbers - numbers.mean()) / numbers.std()).astype(np.float32))
    classes = sorted({row[-1] for row in rows})
    places = {value: at for at, value in enumerate(classes)}
    return np.stack(columns, axis=1), np.array([places[row[-1]] for row in rows])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten numbers, one of them with holes, two categories of 12 and a target, as CSV."""
    folder = tmp_path_factory.mktemp("table")
    draw = np.random.default_rng(0)
    numbers = draw.normal(size=(ROWS, 10)).round(4)
    words = draw.integers(0, 12, (ROWS, 2))
    labels = draw.integers(0, 3, ROWS)
    names = [*(f"n{at}" for at in range(10)), "c0", "c1", "y"]
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for at, (row, pair, label) in enumerate(zip(numbers, words, labels, strict=True)):
            first = "" if at % 10 == 0 else row[0]
            writer.writerow([first, *row[1:], *(f"word {each}" for each in pair), f"y{label}"])
    return folder


def test_tables(benchmark: BenchmarkFixture, table: Path) -> None:
    """200,000 rows of 13 columns, against Python's csv and NumPy."""
    arrow = pytest.importorskip("pyarrow.csv", reason="needs the extra compressor[tables]")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.read_csv(table / "a.csv"), table / "a.parquet")
    ways: dict[str, Callable[[], object]] = {
        "csv and NumPy": lambda: looped(table / "a.csv"),
        "pyarrow alone": lambda: arrow.read_csv(table / "a.csv"),
        "table:a.csv": lambda: read(f"table:{table / 'a.csv'}?target=y"),
        "table:a.parquet": lambda: read(f"table:{table / 'a.parquet'}?target=y"),
    }
    beside(benchmark, ways)


def unpickled(folder: Path) -> list[tuple[Array, Array]]:
    """What tutorials do with the Python version: run its pickles, make floats of all of it."""
    found = []
    for path in sorted(folder.glob("*_batch*")):
        with path.open("rb") as file:
            content = pickle.load(file, encoding="latin1")  # noqa: S301 - ours, written below
        pixels = content["data"].reshape(-1, 3, 32, 32).astype(np.float32) / 255
        mean, std = np.float32([0.4914, 0.4822, 0.4465]), np.float32([0.2470, 0.2435, 0.2616])
        pixels = (pixels - mean[:, None, None]) / std[:, None, None]
        found.append((pixels, np.array(content["labels"])))
    return found


def records(folder: Path) -> list[tuple[Array, Array]]:
    """The binary version, a record at a time."""
    found = []
    for path in sorted(folder.glob("*.bin")):
        images, labels = [], []
        with path.open("rb") as file:
            while record := file.read(3073):
                labels.append(record[0])
                images.append(np.frombuffer(record, np.uint8, offset=1).reshape(3, 32, 32))
        found.append((np.stack(images), np.array(labels)))
    return found


def every(spec: str) -> int:
    """Reads all of train once, normalised, as training does."""
    return sum(len(y) for _, y in read(spec).splits.train.batches(128))


def test_cifar(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Random pixels in files as large as CIFAR-10's: 60,000 images, 184 MB a version."""
    draw = np.random.default_rng(0)
    for at, name in enumerate([*(f"data_batch_{at}" for at in range(1, 6)), "test_batch"]):
        pixels = draw.integers(0, 256, (10_000, 3072), np.uint8)
        labels = draw.integers(0, 10, 10_000)
        for folder in ("bin", "py"):
            (tmp_path / folder).mkdir(exist_ok=True)
        content = np.hstack([labels[:, None].astype(np.uint8), pixels])
        (tmp_path / "bin" / f"{name}.bin").write_bytes(content.tobytes())
        files = [f"image_{at}_{row:05}.png" for row in range(10_000)]
        batch = {"data": pixels, "labels": labels.tolist(), "filenames": files, "batch_label": name}
        (tmp_path / "py" / name).write_bytes(pickle.dumps(batch, 3))
    ways: dict[str, Callable[[], object]] = {
        "pickle.load, all floats": lambda: unpickled(tmp_path / "py"),
        "records in a loop": lambda: records(tmp_path / "bin"),
        "cifar10:bin": lambda: read(f"cifar10:{tmp_path / 'bin'}"),
        "cifar10:py": lambda: read(f"cifar10:{tmp_path / 'py'}"),
        "cifar10:bin, and train once": lambda: every(f"cifar10:{tmp_path / 'bin'}"),
    }
    beside(benchmark, ways)
