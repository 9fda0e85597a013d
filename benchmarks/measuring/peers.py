"""Our protocol beside the usual ways to time two models, again and again.

    python benchmarks/measuring/peers.py A.onnx B.onnx --shape 1,28,28 --repeats 10 --out FILE.json

Each repeat times A and B by a plain loop (a fresh process, A after B, as onnxruntime_perf_test and
most scripts do), by torch.utils.benchmark (the same), and by ours, quick and normal. All open the
session with the same settings. The table has the medians, and how far apart the repeats are: what
somebody would see who measured on another day.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from compressor.artifact import Artifact, write_text
from compressor.measure.protocol import PROCESSES, SECONDS, observe
from compressor.measure.statistics import speedup, summary
from compressor.measurement import Target
from compressor.task import Input, Inputs

SECOND = 1.0
"""Seconds that a plain loop or torch.utils.benchmark runs each model."""

Times = tuple[float, float, dict[str, float] | None]
"""Milliseconds of A and of B, and the interval of their ratio where there is one."""


def main() -> None:
    """Prints the table, and every repeat of ours with its interval."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--shape", help="of one example, such as 3,224,224")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", choices=ALONE, help="one model in this process; for ourselves")
    given = parser.parse_args()
    feed = (Input("x", tuple(map(int, given.shape.split(",")))).synthetic(1, 0),)
    if given.alone:
        print(json.dumps(ALONE[given.alone](given.files[0], feed)))
        return
    found: dict[str, list[Times]] = {}
    for repeat in range(given.repeats):
        for name, taken in ways(given.files, given.shape, feed, repeat):
            found.setdefault(name, []).append(taken)
            print(f"repeat {repeat + 1}, {name}: {shown(taken)}", file=sys.stderr, flush=True)
    if given.out:
        write_text(given.out, json.dumps(found, indent=1) + "\n")
    rows = []
    for name, taken in found.items():
        first, ratios = [one[0] for one in taken], [one[0] / one[1] for one in taken]
        rows.append(
            [
                name,
                f"{statistics.median(first):.4f}",
                f"{statistics.median(one[1] for one in taken):.4f}",
                f"{max(first) / min(first) - 1:.1%}",
                f"{statistics.median(ratios):.3f}x",
                f"{max(ratios) / min(ratios) - 1:.1%}",
                held(taken),
            ]
        )
    header = ["way", "A ms", "B ms", "repeats of A apart", "A / B", "repeats apart", "in interval"]
    print(tabulate(rows, headers=header, tablefmt="pipe", disable_numparse=True))


def ways(files: list[Path], shape: str, feed: Inputs, repeat: int) -> list[tuple[str, Times]]:
    """Every way once."""
    both = [Artifact.of(path, "onnx") for path in files]
    found: list[tuple[str, Times]] = []
    for name in ALONE:
        first, second = (alone(name, path, shape) for path in files)
        found.append((name, (first, second, None)))
    for bench_time in ("quick", "normal"):
        seen = observe(
            both,
            Target(),
            feed,
            seconds=SECONDS[bench_time],
            processes=PROCESSES[bench_time],
            seed=repeat,
        )
        times = {name: blocks for (name, _), blocks in seen.times().items()}
        ours, theirs = (times[one.name] for one in both)
        ratio = speedup(ours, theirs, repeat, seen.processes)
        found.append((f"ours, {bench_time}", (summary(ours)["p50"], summary(theirs)["p50"], ratio)))
    return found


def alone(name: str, path: Path, shape: str) -> float:
    """Milliseconds of one model in a fresh process."""
    command = [sys.executable, __file__, str(path), "--shape", shape, "--alone", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def loop(path: Path, feed: Inputs) -> float:
    """The median of a plain loop."""
    session, named = opened(path, feed)
    for _ in range(10):
        session.run(None, named)
    taken: list[float] = []
    end = time.perf_counter() + SECOND
    while time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, named)
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken)


def torch_benchmark(path: Path, feed: Inputs) -> float:
    """The median of torch.utils.benchmark's blocks."""
    from torch.utils.benchmark import Timer

    session, named = opened(path, feed)
    timer = Timer("session.run(None, feed)", globals={"session": session, "feed": named})
    return timer.blocked_autorange(min_run_time=SECOND).median * 1e3


def opened(path: Path, feed: Inputs) -> tuple[Any, dict[str, Any]]:
    """A session with the settings that ours uses too."""
    from compressor.measure.runtime import open_session

    session = open_session(path)
    return session, {given.name: x for given, x in zip(session.get_inputs(), feed, strict=True)}


ALONE: dict[str, Callable[[Path, Inputs], float]] = {
    "plain loop": loop,
    "torch.utils.benchmark": torch_benchmark,
}


def shown(taken: Times) -> str:
    """One repeat in words."""
    first, second, ratio = taken
    said = f"{first:.4f} ms, {second:.4f} ms, {first / second:.3f}x"
    return said + (f" [{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio else "")


def held(taken: list[Times]) -> str:
    """How many intervals hold the median of all repeats' ratios."""
    intervals = [ratio for *_, ratio in taken if ratio]
    if not intervals:
        return "none given"
    middle = statistics.median(ratio["value"] for ratio in intervals)
    inside = sum(ratio["low"] <= middle <= ratio["high"] for ratio in intervals)
    return f"{inside} of {len(intervals)}"


if __name__ == "__main__":
    main()
