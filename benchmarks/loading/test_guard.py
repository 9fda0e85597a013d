"""What the guard costs: a checkpoint read in a limited child, beside ``torch.load`` in turns.

Every tensor that comes back is summed in both: what is mapped and never looked at costs nothing.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from compressor import guard
from compressor.guard import server
from compressor.loading import readers

ROUNDS = 31


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def total(state: Mapping[str, torch.Tensor]) -> float:
    """The sum of all tensors."""
    return sum(float(tensor.sum()) for tensor in state.values())


@pytest.mark.parametrize("megabytes", [1, 100])
def test_guarded(benchmark: BenchmarkFixture, tmp_path: Path, megabytes: int) -> None:
    """A state dict of 20 tensors, by a server that is already there."""
    path = tmp_path / "model.pt"
    torch.save({f"w{at}": torch.rand(megabytes * 12_500) for at in range(20)}, path)

    def ours() -> float:
        return total(readers.read(path).state)

    def bare() -> float:
        return total(torch.load(path, weights_only=True))

    assert ours() == bare()
    benchmark.pedantic(ours, rounds=10)
    turns = [(seconds(ours), seconds(bare)) for _ in range(ROUNDS)]
    benchmark.extra_info["bare torch.load, ms"] = 1e3 * statistics.median(bare for _, bare in turns)
    benchmark.extra_info["guarded, ms"] = 1e3 * statistics.median(ours for ours, _ in turns)
    benchmark.extra_info["more than bare, ms"] = 1e3 * statistics.median(
        ours - bare for ours, bare in turns
    )
    benchmark.extra_info["times bare torch.load"] = statistics.median(
        ours / bare for ours, bare in turns
    )
    print(benchmark.extra_info)


def test_first(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """The first file, for which the server starts, beside a fresh process for each file."""
    path = tmp_path / "model.pt"
    torch.save({"w": torch.rand(250_000)}, path)

    def first() -> None:
        guard.close()
        readers.read(path)

    def spawned() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server, "FORKING", False)
            readers.read(path)

    def imported() -> None:
        subprocess.run([sys.executable, "-c", "import torch"], check=True)

    benchmark.pedantic(first, rounds=3, warmup_rounds=1)
    turns = [(seconds(first), seconds(spawned), seconds(imported)) for _ in range(7)]
    for name, column in zip(
        ("the first file, s", "a process for each file, s", "import torch, s"),
        zip(*turns, strict=True),
        strict=True,
    ):
        benchmark.extra_info[name] = statistics.median(column)
    print(benchmark.extra_info)
