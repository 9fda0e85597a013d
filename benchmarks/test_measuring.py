"""What measuring itself costs, and whether it disturbs what it measures."""

from __future__ import annotations

import resource
import statistics
import time

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from compressor.artifact import Artifact
from compressor.measure.process import Worker
from compressor.measure.protocol import observe
from compressor.measure.runtime import open_session
from compressor.measurement import Target
from compressor.task import Task


def test_a_quick_comparison(benchmark: BenchmarkFixture, task: Task, onnx_form: Artifact) -> None:
    """Five variants side by side, quick mode, one target: start of the workers included."""
    variants = [onnx_form] * 5

    def compare() -> float:
        parent = resource.getrusage(resource.RUSAGE_SELF)
        before, began = parent.ru_utime + parent.ru_stime, time.perf_counter()
        observe(variants, Target(), task.examples(1))
        parent = resource.getrusage(resource.RUSAGE_SELF)
        return (parent.ru_utime + parent.ru_stime - before) / (time.perf_counter() - began)

    shares = [benchmark.pedantic(compare, rounds=1)]
    benchmark.extra_info["share of the parent's CPU time"] = max(shares)


def test_a_timed_call(benchmark: BenchmarkFixture, task: Task, onnx_form: Artifact) -> None:
    """A call in a worker against a bare loop in this process, in turns: ratio of medians."""
    examples = task.examples(1)
    session = open_session(onnx_form.path)
    feed = {"input": examples[0]}

    def bare(calls: int) -> list[int]:
        taken = []
        for _ in range(calls):
            start = time.perf_counter_ns()
            session.run(None, feed)
            taken.append(time.perf_counter_ns() - start)
        return taken

    ratios = []
    with Worker() as worker:
        worker.ask("load", path=str(onnx_form.path), provider="cpu", threads=1)
        path = onnx_form.path.with_name("feed.npy")
        np.save(path, examples[0])
        worker.ask("take", inputs=[str(path)], batch=1)
        for _ in range(30):
            theirs = worker.ask("time", calls=20)["ns"]
            ratios.append(statistics.median(theirs) / statistics.median(bare(20)))
        benchmark.pedantic(worker.ask, ("time",), {"calls": 20}, rounds=10)
    benchmark.extra_info["times a bare loop"] = statistics.median(ratios)
