"""How artifacts are timed side by side: interleaved, in random order, with a control.

All artifacts of one target are alive at once, each in its own worker, and take turns: every round
runs one block of calls of each, in an order drawn anew. What slows the machine down for a while
slows all of them. The reference runs in a second worker as well; how far the two seem to differ
is the noise floor of this machine now.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compressor.artifact import Artifact
from compressor.measure.placement import placement
from compressor.measure.process import Worker, WorkerFailed
from compressor.measure.quantities import QUANTITIES
from compressor.measure.statistics import Blocks
from compressor.measure.timed import Timed
from compressor.measurement import Measurement, Target
from compressor.task import Array, Inputs

SECONDS = {"quick": 0.8, "normal": 4.0, "full": 20.0}
"""``--bench-time``: seconds of calls for each artifact on each target, at most :data:`CALLS`."""

CALLS = 200_000
"""Calls of each artifact after which more would say nothing new and only fill memory."""

BLOCK_MS = 8.0
"""Calls are grouped into blocks of about this long: above scheduler noise, below its drifts."""

ROUNDS = 8
"""Rounds that are taken even where time is up, so 11 calls of a slow model with its warm-up: fewer
give no interval."""

PART = 64
"""Examples that a worker is asked to predict at once: small, so that a slow model is not taken for
one that hangs."""

CONTROL = "baseline (again)"
"""The reference's second worker."""

DUEL = "best (duel)"
"""The best artifact where it runs in two runtimes by turns."""

Progress = Callable[[str], None]


@dataclass
class Observed:
    """What one target gave: raw measurements, and outputs where they were asked for."""

    measurements: list[Measurement] = field(default_factory=list)
    outputs: dict[str, dict[str, Array]] = field(default_factory=dict)
    """Artifact name -> split name -> first output of the whole split."""
    failed: dict[str, str] = field(default_factory=dict)
    """Artifact name -> why its outputs are missing."""
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Artifact name -> the settings it was opened with: ``{"settings", "disabled"}``."""
    placements: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """Artifact name -> which node ran where, for those whose runtime says so."""

    def times(self) -> dict[tuple[str, Target], Blocks]:
        """Milliseconds of every call, block by block, by artifact name and target."""
        return {
            (one.artifact, one.target): one.values
            for one in self.measurements
            if one.quantity == "latency_ms" and not one.skipped
        }


def observe(
    artifacts: Sequence[Artifact],
    target: Target,
    feed: Inputs,
    *,
    predict: Mapping[str, Inputs] | None = None,
    seconds: float = SECONDS["quick"],
    seed: int = 0,
    start: Callable[[], Worker] = Worker,
    clock: Callable[[], float] = time.monotonic,
    progress: Progress = lambda text: None,
) -> Observed:
    """Measures every quantity of ONNX ``artifacts`` on ``target``; the first is the reference.

    ``feed`` holds examples to time with (repeated to fill the batch); ``predict`` names whole
    splits whose outputs are wanted. An artifact that fails becomes a row with the reason; the
    others are finished.
    """
    observed = Observed()
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder, ExitStack() as stack:
        feeds = _stored(Path(folder), "feed", feed)
        runs: list[Timed] = []
        for artifact in artifacts:
            progress(f"{artifact.name} on {target}")
            try:
                runs.append(_opened(artifact, artifact.name, target, feeds, stack, start))
            except WorkerFailed as error:
                skip(observed, artifact.name, target, str(error))
        if runs and runs[0].artifact == artifacts[0].name:
            with suppress(WorkerFailed):  # the rest can be measured without a noise floor
                runs.append(_opened(artifacts[0], CONTROL, target, feeds, stack, start))
        progress(f"timing on {target}")
        _interleave(runs, observed, seconds, random.Random(seed), clock)
        for run in runs:
            _collect(run, observed)
        for split, inputs in (predict or {}).items():
            paths = _stored(Path(folder), split, inputs)
            for run in runs:
                if run.artifact == CONTROL or run.artifact in observed.failed:
                    continue
                progress(f"outputs of {run.artifact} on {split}")
                try:
                    outputs = _predicted(run, paths, len(inputs[0]), Path(folder) / "outputs.npy")
                    observed.outputs.setdefault(run.artifact, {})[split] = outputs
                except WorkerFailed as error:
                    observed.failed[run.artifact] = str(error)
        paths_of = {artifact.name: artifact.path.resolve() for artifact in artifacts}
        for run in runs:
            if run.artifact != CONTROL and run.artifact not in observed.failed:
                observed.sessions[run.artifact] = run.session
                progress(f"placement of {run.artifact} on {target}")
                with suppress(WorkerFailed):  # all that counts is measured by now
                    observed.placements[run.artifact] = placement(
                        run, paths_of[run.artifact], Path(folder) / "profile"
                    )
    return observed


def duel(
    entrants: Sequence[tuple[str, Artifact, Target]],
    feed: Inputs,
    *,
    seconds: float = SECONDS["quick"],
    seed: int = 0,
    start: Callable[[], Worker] = Worker,
    clock: Callable[[], float] = time.monotonic,
) -> Observed:
    """Every quantity of each entrant, which is a name, an artifact and a target of its own. They
    take turns as in a round of :func:`observe`: so that two runtimes are compared at the same time
    of day. One that fails is a row with the reason.
    """
    observed = Observed()
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder, ExitStack() as stack:
        feeds = _stored(Path(folder), "feed", feed)
        runs: list[Timed] = []
        for name, artifact, target in entrants:
            try:
                runs.append(_opened(artifact, name, target, feeds, stack, start))
            except WorkerFailed as error:
                skip(observed, name, target, str(error))
        _interleave(runs, observed, seconds, random.Random(seed), clock)
        for run in runs:
            _collect(run, observed)
    return observed


def disabled(artifact: Artifact) -> list[str]:
    """Optimizers of onnxruntime that slow this artifact down, as the stage that made it found."""
    made = artifact.steps[-1] if artifact.steps else {}
    return list(made.get("facts", {}).get("disabled", ()))


def _predicted(run: Timed, inputs: list[str], count: int, out: Path) -> Array:
    """The first output on all ``count`` examples, in whole batches but for the last."""
    size = run.target.batch * -(-PART // run.target.batch)
    parts = []
    for start in range(0, count, size):
        run.worker.ask("predict", inputs=inputs, start=start, stop=start + size, out=str(out))
        parts.append(np.load(out))
    return np.concatenate(parts)


def _stored(folder: Path, name: str, inputs: Inputs) -> list[str]:
    paths = []
    for position, array in enumerate(inputs):
        path = folder / f"{name}-{position}.npy"
        np.save(path, array)
        paths.append(str(path))
    return paths


def _opened(
    artifact: Artifact,
    name: str,
    target: Target,
    feeds: list[str],
    stack: ExitStack,
    start: Callable[[], Worker],
) -> Timed:
    worker = stack.enter_context(start())
    path = str(artifact.path.resolve())
    loaded = worker.ask(
        "load",
        path=path,
        provider=target.provider,
        threads=target.threads,
        disabled=disabled(artifact),
        runtime=target.runtime,
    )
    worker.ask("take", inputs=feeds, batch=target.batch)
    # The first call allocates; the second says how many calls make a block.
    worker.ask("time", calls=1)
    once = worker.ask("time", calls=1)["elapsed_ns"] / 1e6
    calls = max(1, min(1000, round(BLOCK_MS / max(once, 1e-6))))
    worker.ask("time", calls=calls)
    return Timed(
        name, target, worker, loaded["load_ms"], loaded["session"], calls, warmup=2 + calls
    )


def _interleave(
    runs: list[Timed],
    observed: Observed,
    seconds: float,
    order: random.Random,
    clock: Callable[[], float],
) -> None:
    end = clock() + seconds * len(runs)
    for taken in itertools.count():
        calls = min((taken * run.calls for run in runs), default=CALLS)
        if not runs or (taken >= ROUNDS and (calls >= CALLS or clock() >= end)):
            return
        for run in order.sample(runs, len(runs)):
            try:
                run.blocks.append(run.worker.ask("time", calls=run.calls))
            except WorkerFailed as error:
                runs.remove(run)
                if run.artifact != CONTROL:
                    skip(observed, run.artifact, run.target, str(error))


def _collect(run: Timed, observed: Observed) -> None:
    measurements = []
    try:
        for name, quantity in QUANTITIES.items():
            values = tuple(tuple(block) for block in quantity.collect(run))
            measurements.append(
                Measurement(run.artifact, run.target, name, quantity.unit, values, run.warmup)
            )
    except WorkerFailed as error:
        if run.artifact != CONTROL:
            skip(observed, run.artifact, run.target, str(error))
    else:
        observed.measurements += measurements
    run.blocks.clear()  # many small integers, and all that is needed of them is kept


def skip(observed: Observed, artifact: str, target: Target, reason: str) -> None:
    """Every quantity of ``artifact`` on ``target`` becomes a row with the reason."""
    observed.failed[artifact] = reason
    for name, quantity in QUANTITIES.items():
        observed.measurements.append(
            Measurement(artifact, target, name, quantity.unit, skipped=reason)
        )
