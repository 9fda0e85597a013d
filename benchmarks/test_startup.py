"""What it costs to start: the command's help, and a run that is finished, beside Python itself and
beside importing torch."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from compressor.demo import demo
from compressor.pipeline import run


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


def test_a_finished_run_again(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """``compressor run`` with the arguments of a finished run: its files are verified, its report
    is shown. The CNN of 1.2 M parameters on digits of 28x28."""
    model = demo("cnn", data="digits?size=28", epochs=1, out=tmp_path / "model.pt").path
    out = tmp_path / "run"
    run(model, quantize="int8-dynamic", provider="cpu", threads=(1,), out=out)
    words = ("-m", "compressor", "run", str(model), "--quantize", "int8-dynamic")
    words += ("--provider", "cpu", "--threads", "1", "--out", str(out))
    benchmark.pedantic(seconds, words, rounds=5, warmup_rounds=1)
    turns = [(seconds(*words), seconds("-c", "import torch")) for _ in range(3)]
    ours, torch = (statistics.median(column) for column in zip(*turns, strict=True))
    benchmark.extra_info["times import torch"] = ours / torch
    benchmark.extra_info["bytes verified"] = sum(
        file.stat().st_size for file in out.rglob("*") if file.is_file()
    )
