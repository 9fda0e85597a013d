"""How fast examples are read, beside the loops that people write: ratios of one run, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture
from torch.utils import data as torch_data

from compressor.data import adopt, read
from compressor.measure.environment import cores
from compressor.task import Split
from compressor.training.loader import automatic, batches, resident

BATCH = 32
TURNS = 7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Photos(torch_data.Dataset[Any]):
    """A folder as torchvision reads it: the whole picture, resized, the middle, normalised."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*/*.jpg"))
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[at]) as image:
            whole = image.convert("RGB")
        scale = 224 / min(whole.size)
        whole = whole.resize(
            (round(whole.width * scale), round(whole.height * scale)), Image.Resampling.BILINEAR
        )
        left, top = (whole.width - 224) // 2, (whole.height - 224) // 2
        pixels = np.array(whole.crop((left, top, left + 224, top + 224)))
        x = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255
        return (x - self.mean) / self.std, int(self.paths[at].parent.name)


class Rows(torch_data.Dataset[Any]):
    """Mapped files, an example at a time."""

    def __init__(self, folder: Path) -> None:
        self.x, self.y = (np.load(folder / name, mmap_mode="r") for name in ("x.npy", "y.npy"))

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.array(self.x[at])), int(self.y[at])


@pytest.fixture(scope="module", params=[(500, 375), (2560, 1708)], ids=["500x375", "2560x1708"])
def photos(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pieces of scikit-learn's two photographs as JPEG files, of the size of the web or a phone."""
    from sklearn import datasets

    width, height = request.param
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for label, path in enumerate(sorted(Path(datasets.__file__).parent.glob("images/*.jpg"))):
        (folder / str(label)).mkdir()
        with Image.open(path) as photo:
            for at in range(64 if width < 1000 else 16):
                left, top = draw.integers(0, 100, 2).tolist()
                piece = photo.resize((width, height), box=(left, top, left + 500, top + 320))
                piece.save(folder / str(label) / f"{at}.jpg", quality=90)
    return folder


def every(split: Split, workers: int) -> int:
    """Reads all of a split, in an order of its own, as training does."""
    order = np.random.default_rng(0).permutation(len(split))
    steps = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return sum(len(y) for _, y in batches(split, steps, workers=workers, pin=False))


def loaded(dataset: torch_data.Dataset[Any], workers: int) -> int:
    loader = torch_data.DataLoader(dataset, BATCH, shuffle=True, num_workers=workers)
    return sum(len(y) for _, y in loader)


def beside(benchmark: BenchmarkFixture, ways: dict[str, Callable[[], int]]) -> None:
    """Examples a second of each way, and how many times those of the first: medians of turns."""
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            began = time.perf_counter()
            count = way()
            seen[name].append(count / (time.perf_counter() - began))
    first = next(iter(ways))
    for name, rates in seen.items():
        benchmark.extra_info[f"{name}, a second"] = round(statistics.median(rates), 1)
        pairs = zip(rates, seen[first], strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        benchmark.extra_info[f"{name}, times {first}"] = round(ratio, 2)
    benchmark.pedantic(list(ways.values())[-1], rounds=3)


def test_pictures(benchmark: BenchmarkFixture, photos: Path) -> None:
    """Photographs at 224x224, against Pillow in a loop and in a DataLoader."""
    options = f"size=224&mean={','.join(map(str, MEAN))}&std={','.join(map(str, STD))}"
    # All of the pictures: what is carved out of them is read with them.
    part = read(f"images:{photos}?{options}").splits.train
    dataset = Photos(photos)
    whole = Split(part.fetch, np.arange(len(dataset)))
    held = resident(whole, 1 << 30)
    several = cores()
    beside(
        benchmark,
        {
            "Pillow in a loop": lambda: loaded(dataset, 0),
            f"DataLoader, {several} processes": lambda: loaded(dataset, several),
            "images:, this thread": lambda: every(whole, 0),
            f"images:, {automatic(whole)} threads": lambda: every(whole, automatic(whole)),
            "images:, resident": lambda: every(held, 0),
        },
    )


def test_mapped(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Rows of 48 KiB out of a mapped file of 384 MiB in the page cache, against one at a time."""
    x = np.random.default_rng(0).standard_normal((8192, 3, 64, 64), np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.arange(len(x)) % 10)
    part = read(f"arrays:{tmp_path}").splits.train
    whole = Split(part.fetch, np.arange(len(x)))
    memory = Split.arrays(x, np.arange(len(x)) % 10)
    dataset, several = Rows(tmp_path), cores()
    beside(
        benchmark,
        {
            "memmap in a loop": lambda: loaded(dataset, 0),
            f"DataLoader, {several} processes": lambda: loaded(dataset, several),
            "arrays:, this thread": lambda: every(whole, 0),
            f"arrays:, {automatic(whole)} threads": lambda: every(whole, automatic(whole)),
            "in memory": lambda: every(memory, 0),
        },
    )


class Python(torch_data.Dataset[Any]):
    """Examples that a user's Python computes, which only one thread at a time can."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
        total = sum((at * step) % 7 for step in range(20_000))
        return torch.full((16,), float(total)), at % 3


def test_pure_python(benchmark: BenchmarkFixture) -> None:
    """Where threads cannot help and processes could: why what fits is kept in memory instead."""
    part = adopt(Python()).splits.train
    whole = Split(part.fetch, np.arange(256))
    held = resident(whole, 1 << 20)
    beside(
        benchmark,
        {
            "in a loop": lambda: loaded(Python(), 0),
            f"DataLoader, {cores()} processes": lambda: loaded(Python(), cores()),
            "1 thread": lambda: every(whole, 1),
            f"{cores()} threads": lambda: every(whole, cores()),
            "resident": lambda: every(held, 0),
        },
    )
