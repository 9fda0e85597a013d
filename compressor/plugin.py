"""The pytest plugin: ONNX files side by side in a benchmark of pytest-benchmark.

::

    def test_int8(variants):
        rows = variants({"fp32": "model.onnx", "int8": "model-int8.onnx"})

times the files in turns, the first as the reference. pytest-benchmark's own row, and so its
``--benchmark-compare``, has the calls of the *last* file: real milliseconds, one round a call. The
ratios, which are what a busy machine leaves unharmed, stand in ``extra_info`` of its JSON, in the
summary below its table and in what the fixture returns. ``extra_info["compressor"]`` has the fields
of ``report.json``, so that ``compressor compare OLD.json NEW.json`` reads the files.

It is loaded into every pytest of everyone who has this package, and so imports nothing else of it
until a test asks for ``variants``. (PYTEST_DONT_REWRITE: there is nothing to assert here.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import pytest

if TYPE_CHECKING:
    from compressor.artifact import Artifact
    from compressor.measure.protocol import Observed
    from compressor.measurement import Target
    from compressor.task import Inputs, Task

    File = str | Path | Artifact
    Files = File | Mapping[str, File] | Sequence[File]

Row = dict[str, Any]
Variants = Callable[..., dict[str, Row]]

MEASURED = pytest.StashKey[list[tuple[str, Row]]]()
"""Of the whole session: each test and what it put into ``extra_info["compressor"]``."""


class Recorded:
    """A timer for pytest-benchmark that plays times back which workers took.

    Its ``timer`` option is how pytest-benchmark takes another clock, and ``pedantic`` how it is
    told what a round is. In between :meth:`reset` and :meth:`step` exactly one recorded call goes
    by.
    """

    def __init__(self) -> None:
        self.__name__ = "recorded"
        self.now = 0.0
        self.seconds: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def reset(self) -> None:
        """Back to zero, so that a difference of two readings is the very number recorded."""
        self.now = 0.0

    def step(self) -> None:
        """One call went by."""
        self.now = next(self.seconds, 0.0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Gives the benchmark of a test that uses ours a timer of ours; all others keep theirs."""
    if "compressor_times" in getattr(item, "fixturenames", ()):
        marker = item.get_closest_marker("benchmark")
        options = {**(marker.kwargs if marker else {}), "timer": Recorded()}
        item.add_marker(pytest.mark.benchmark(**options), append=False)


@pytest.fixture
def compressor_times(request: pytest.FixtureRequest) -> Recorded:
    """The timer of this test's benchmark."""
    timer: Recorded = request.node.get_closest_marker("benchmark").kwargs["timer"]
    return timer


@pytest.fixture
def variants(
    compressor_times: Recorded, benchmark: Any, request: pytest.FixtureRequest
) -> Variants:
    """Times ONNX files side by side, once in a test.

    ``variants(files, feed=None, *, target=None, bench_time="quick", seed=0)``: ``files`` are paths
    by name, or paths alone, which go by their stems; the first is the reference. ``feed`` holds
    arrays for its inputs, in order, first axis the example (repeated to fill the batch); by default
    they are made up. ``target`` says where (:class:`compressor.Target`; default: CPU, batch 1, one
    thread), ``bench_time`` how long: ``quick``, ``normal`` or ``full``.

    Returns ``report.json``'s row of each file by its name, with ``["speedup"]`` among the fields:
    ``{"value", "low", "high", "verdict"}``. Under ``--benchmark-disable`` each file runs once,
    nothing is measured and no row is returned. The test fails with the reason where a file does not
    exist, does not run or gives NaN.
    """

    def measure(
        files: Files,
        feed: Inputs | None = None,
        *,
        target: Target | None = None,
        bench_time: str = "quick",
        seed: int = 0,
    ) -> dict[str, Row]:
        from compressor.errors import CompressorError

        # A benchmark that fails before it is used would also be blamed for not being used.
        try:
            bench = _bench(request.node.name, files, feed, target, seed)
            if not benchmark.enabled:
                benchmark.pedantic(_tried, (bench,))
                return {}
            found, seconds = _measured(bench, bench_time)
        except CompressorError as error:
            return dict(benchmark.pedantic(_fail, (error,)))
        rows = {row["artifact"]: row for row in found["measurements"]}
        benchmark.extra_info["compressor"] = found
        for name, row in rows.items():
            if row["speedup"]["versus"] != name:
                benchmark.extra_info[f"speedup of {name}"] = row["speedup"]["value"]
                benchmark.extra_info[f"speedup of {name}, low"] = row["speedup"]["low"]
                benchmark.extra_info[f"speedup of {name}, high"] = row["speedup"]["high"]
        request.config.stash.setdefault(MEASURED, []).append((request.node.nodeid, found))
        compressor_times.seconds = iter(seconds)
        benchmark.pedantic(compressor_times.step, setup=compressor_times.reset, rounds=len(seconds))
        return rows

    return measure


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The ratios, which pytest-benchmark's own table has no column for."""
    measured = terminalreporter.config.stash.get(MEASURED, [])
    if not measured:
        return
    from compressor.report import table as tables

    terminalreporter.section("compressor: side by side")
    for test, found in measured:
        size = {one["name"]: one["size_bytes"] for one in found["artifacts"]}
        rows = [
            [
                tables.plain(row["artifact"]),
                tables.size(size[row["artifact"]]),
                tables.milliseconds(row["latency_ms"]["p50"]),
                tables.size(row["peak_rss_bytes"]),
                tables.ratio(row["speedup"], row["artifact"]),
            ]
            for row in found["measurements"]
        ]
        where = tables.label(tables.target_of(found["measurements"][0]))
        header = [f"{test} ({where})", "size", "p50 ms", "peak memory", "speed-up"]
        terminalreporter.write_line(tables.render(header, rows, markdown=False))
        for flag in dict.fromkeys(flag for row in found["measurements"] for flag in row["noise"]):
            terminalreporter.write_line(f"noisy: {flag}")


# What a call of the fixture does.


class Bench(NamedTuple):
    """What is asked for, checked: nothing was run yet."""

    artifacts: list[Artifact]
    params: dict[str, int]
    task: Task
    feed: Inputs
    target: Target


def _bench(name: str, files: Files, feed: Inputs | None, target: Target | None, seed: int) -> Bench:
    from compressor.errors import InputError, Unsuitable
    from compressor.loading import onnxfile
    from compressor.measurement import Target
    from compressor.task import Task

    target = target or Target()
    artifacts = _artifacts(files)
    read = {artifact.name: onnxfile.read(artifact.path) for artifact in artifacts}
    if len(read) < len(artifacts) or not read:
        stems = ", ".join(artifact.name for artifact in artifacts) or "none"
        raise InputError(f"variants of the names {stems}: give each a name, as a mapping to files")

    def model() -> NoReturn:
        raise Unsuitable("an ONNX file has no PyTorch model")

    first = read[artifacts[0].name]
    inputs = onnxfile.inputs(first, {}, batch=(target.batch,)) if feed is None else ()
    task = Task(name, "regression", model, {}, inputs, "mse", seed=seed)
    params = {of: file.params for of, file in read.items()}
    given = task.examples(target.batch) if feed is None else feed
    return Bench(artifacts, params, task, given, target)


def _artifacts(files: Files) -> list[Artifact]:
    from dataclasses import replace

    from compressor.artifact import Artifact
    from compressor.loading import onnxfile

    def one(file: File, name: str | None = None) -> Artifact:
        if isinstance(file, Artifact):
            return replace(file, name=name or file.name)
        companions = onnxfile.read(Path(file)).companions
        made = Artifact.of(Path(file), "onnx", companions=companions)
        return replace(made, name=name or made.name)

    if isinstance(files, str | Path | Artifact):
        return [one(files)]
    if isinstance(files, Mapping):
        return [one(file, name) for name, file in files.items()]
    return [one(file) for file in files]


def _tried(bench: Bench) -> None:
    """Runs each file once. Raises :class:`WorkerFailed` with its name and the reason."""
    import tempfile

    import numpy as np

    from compressor.measure.process import Worker, WorkerFailed
    from compressor.measure.turns import request

    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        paths = [str(Path(folder) / f"{at}.npy") for at in range(len(bench.feed))]
        for path, array in zip(paths, bench.feed, strict=True):
            np.save(path, array)
        for artifact in bench.artifacts:
            try:
                asked = request(artifact, bench.target, paths)
                with Worker() as worker:
                    worker.ask("load", **asked)
                    worker.ask("take", inputs=paths, batch=bench.target.batch)
                    worker.ask("time", calls=1)
            except WorkerFailed as error:
                raise WorkerFailed(f"{artifact.name}: {error}") from None


def _measured(bench: Bench, bench_time: str) -> tuple[Row, list[float]]:
    """``extra_info["compressor"]``, and the seconds of each call of the last file.

    Raises :class:`WorkerFailed` with its name and the reason where a file could not be measured.
    """
    from compressor.errors import InputError
    from compressor.measure import device
    from compressor.measure.environment import environment
    from compressor.measure.process import Worker, WorkerFailed
    from compressor.measure.protocol import PROCESSES, SECONDS, observe
    from compressor.pipeline import verdict

    if bench_time not in SECONDS:
        raise InputError(f"bench_time {bench_time!r}: one of {', '.join(SECONDS)}")
    before = environment()
    observed = observe(
        bench.artifacts,
        bench.target,
        bench.feed,
        seconds=SECONDS[bench_time],
        processes=PROCESSES[bench_time],
        seed=bench.task.seed,
    )
    reference = bench.artifacts[0].name
    machine = {"load": before["load"], "governor": device.governor()}
    rows = verdict.rows(observed, bench.target, bench.task, True, reference, machine)
    for row in rows:
        if "skipped" in row:
            raise WorkerFailed(f"{row['artifact']}: {row['skipped']}")
        row |= {"accuracy": None, "fidelity": None}
    with Worker() as worker:
        present = worker.ask("providers")["providers"]
    found = {
        "schema": 1,
        "task": {
            "name": bench.task.name,
            "kind": "custom",
            "data": None,
            "splits": None,
            "metric": None,
            "higher_is_better": None,
        },
        "environment": {
            **before,
            "providers": present,
            "threads": {},
            "noise_floor": verdict.floor_of(observed, reference),
        },
        "artifacts": [_described(one, bench.params[one.name]) for one in bench.artifacts],
        "measurements": rows,
    }
    return found, _seconds(observed, bench)


def _described(artifact: Artifact, params: int) -> Row:
    return {
        "name": artifact.name,
        "path": artifact.path.name,
        "sha256": artifact.digest,
        "form": artifact.form,
        "source": None,
        "steps": [dict(step) for step in artifact.steps],
        "size_bytes": artifact.size_bytes,
        "params": params,
        "macs": None,
        "best": False,
        "within_budget": None,
        "proven": None,
        "accuracy": {"skipped": "not judged: a benchmark has no data"},
        "fidelity": None,
    }


def _seconds(observed: Observed, bench: Bench) -> list[float]:
    blocks = observed.times()[bench.artifacts[-1].name, bench.target]
    return [ms / 1e3 for block in blocks for ms in block]


def _fail(error: Exception) -> NoReturn:
    raise error
