"""What it costs to start: the command's help, beside Python itself and beside importing torch."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from pytest_benchmark.fixture import BenchmarkFixture


def seconds(*words: str) -> float:
    """Wall time of one process."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - began


def test_help(benchmark: BenchmarkFixture) -> None:
    """``compressor --help``; the ratios are taken in turns in the same run."""
    benchmark.pedantic(seconds, ("-m", "compressor", "--help"), rounds=10, warmup_rounds=1)
    turns = [
        (
            seconds("-m", "compressor", "--help"),
            seconds("-c", "pass"),
            seconds("-c", "import torch"),
        )
        for _ in range(5)
    ]
    ours, python, torch = (statistics.median(column) for column in zip(*turns, strict=True))
    benchmark.extra_info["times python -c pass"] = ours / python
    benchmark.extra_info["share of import torch"] = ours / torch
