"""The protocol: what one target is asked, artifact beside artifact, and what came of it.

All artifacts of one target are alive at once, each in its own worker, and take turns (see
:mod:`compressor.measure.turns`). The reference runs in a second worker as well; how far the two
seem to differ is the noise floor of this machine now.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compressor.artifact import Artifact
from compressor.errors import InputError, one_line
from compressor.measure.outputs import predict as predicted
from compressor.measure.outputs import stored
from compressor.measure.placement import placement
from compressor.measure.process import Worker, WorkerFailed
from compressor.measure.statistics import Blocks, summary
from compressor.measure.timed import Timed
from compressor.measure.turns import (
    CALLS,
    CONTROL,
    ROUNDS,
    Entrant,
    Progress,
    Turns,
    silent,
    skipped,
)
from compressor.measurement import Measurement, Target
from compressor.task import Array, Inputs

SECONDS = {"quick": 0.8, "normal": 4.0, "full": 20.0}
"""``--bench-time``: seconds of calls for each artifact on each target, at most."""

PROCESSES = {"quick": 1, "normal": 3, "full": 9}
"""How often the workers are started anew meanwhile."""

DUEL = "best (duel)"
"""The best artifact where it runs in two runtimes by turns."""

OFFERED = (0.3, 0.5, 0.7, 0.8, 0.9)
"""Rates of a load curve, as shares of what a closed loop serves."""


@dataclass
class Observed:
    """What one target gave: raw measurements, and outputs where they were asked for."""

    measurements: list[Measurement] = field(default_factory=list)
    processes: tuple[int, ...] = ()
    """Rounds that were taken in each start of the workers, in order."""
    outputs: dict[str, dict[str, Array]] = field(default_factory=dict)
    """Artifact name -> split name -> first output of the whole split."""
    failed: dict[str, str] = field(default_factory=dict)
    """Artifact name -> why its outputs are missing."""
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Artifact name -> the settings it was opened with: ``{"settings", "disabled"}``."""
    placements: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """Artifact name -> which node ran where, for those whose runtime says so."""
    loads: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Artifact name -> its load curve, where one was asked for and there was time for it."""
    delays: list[Measurement] = field(default_factory=list)
    """The raw values of the load curves."""
    uncontrolled: str | None = None
    """Why there is no control, where there should be."""
    stolen: float | None = None
    """The largest share of the CPU's time that went to other guests in a start of the workers."""

    def times(self) -> dict[tuple[str, Target], Blocks]:
        """Milliseconds of every call, block by block, by artifact name and target."""
        return {
            (one.artifact, one.target): one.values
            for one in self.measurements
            if one.quantity == "latency_ms" and not one.skipped
        }


def check(bench_time: str, seed: int) -> None:
    """Raises :class:`InputError` for a ``--bench-time`` or ``--seed`` that does not exist."""
    if seed < 0:
        raise InputError(f"--seed {seed}: give 0 or more")
    if bench_time not in SECONDS:
        raise InputError(f"--bench-time {bench_time!r}: choose from {', '.join(SECONDS)}")


def observe(
    artifacts: Sequence[Artifact],
    target: Target,
    feed: Inputs,
    *,
    predict: Mapping[str, Inputs] | None = None,
    load: bool = False,
    arch: str | None = None,
    seconds: float = SECONDS["quick"],
    processes: int = 1,
    seed: int = 0,
    start: Callable[[], Worker] = Worker,
    clock: Callable[[], float] = time.monotonic,
    progress: Progress = silent,
) -> Observed:
    """Measures every quantity of ONNX ``artifacts`` on ``target``; the first is the reference.

    ``feed`` holds examples to time with (repeated to fill the batch); ``predict`` names whole
    splits whose outputs are wanted; ``load`` asks for load curves. ``arch`` is the factory that was
    given for a model that is not in the zoo, which PyTorch's own rows need. An artifact that fails
    becomes a row with the reason; the others are finished.
    """
    observed = Observed()
    entrants = [(artifact.name, artifact, target) for artifact in artifacts]
    named = {artifact.name: artifact for artifact in artifacts}
    control = (CONTROL, artifacts[0], target)
    with tempfile.TemporaryDirectory(prefix="compressor-") as name:
        folder = Path(name)

        def finish(runs: Sequence[Timed]) -> None:
            shown = [run for run in runs if run.artifact != CONTROL]
            for run in shown if load else ():
                progress(f"load curve of {run.artifact}")
                try:
                    _burden(run, seconds, seed, observed)
                except WorkerFailed as error:
                    observed.failed[run.artifact] = str(error)
            for split, inputs in (predict or {}).items():
                paths = stored(folder, split, inputs)
                for run in shown:
                    if run.artifact not in observed.failed:
                        progress(f"outputs of {run.artifact} on {split}")
                        another = partial(turns.another, named[run.artifact], target)
                        try:
                            found = predicted(run, paths, len(inputs[0]), folder, another)
                        except (WorkerFailed, ValueError) as error:
                            observed.failed[run.artifact] = one_line(error)
                        else:
                            observed.outputs.setdefault(run.artifact, {})[split] = found
            for run in shown:
                if run.artifact not in observed.failed:
                    observed.sessions[run.artifact] = dict(run.loaded["session"])
                    progress(f"placement of {run.artifact} on {target}")
                    with suppress(WorkerFailed):  # all that counts is measured by now
                        observed.placements[run.artifact] = placement(
                            run, run.path, folder / "profile"
                        )

        turns = Turns(stored(folder, "feed", feed), arch, start, clock, progress)
        turns.take([*entrants, control], seconds, processes, seed, finish)
    return _seen(turns, observed)


def duel(
    entrants: Sequence[Entrant],
    feed: Inputs,
    *,
    arch: str | None = None,
    seconds: float = SECONDS["quick"],
    processes: int = 1,
    seed: int = 0,
    start: Callable[[], Worker] = Worker,
    clock: Callable[[], float] = time.monotonic,
    progress: Progress = silent,
) -> Observed:
    """Every quantity of each entrant, which is a name, an artifact and a target of its own. They
    take turns as in a round of :func:`observe`: so that two runtimes are compared at the same time
    of day. One that fails is a row with the reason.
    """
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        turns = Turns(stored(Path(folder), "feed", feed), arch, start, clock, progress)
        turns.take(entrants, seconds, processes, seed)
    return _seen(turns, Observed())


def skip(observed: Observed, artifact: str, target: Target, reason: str) -> None:
    """Every quantity of ``artifact`` on ``target`` becomes a row with the reason."""
    observed.failed[artifact] = reason
    observed.measurements += skipped(artifact, target, reason)


def _seen(turns: Turns, observed: Observed) -> Observed:
    observed.measurements += turns.measurements()
    observed.processes = tuple(turns.processes)
    observed.stolen = max(turns.stolen, default=None)
    observed.failed |= {name: why for (name, _), why in turns.failed.items() if name != CONTROL}
    why = {name: why for (name, _), why in turns.failed.items()}
    observed.uncontrolled = why.get(CONTROL)
    return observed


def _burden(run: Timed, seconds: float, seed: int, observed: Observed) -> None:
    """The load curve: milliseconds from arrival to answer, where batches arrive at random times
    (a Poisson process, as in the server scenario of MLPerf Inference, Reddi et al. 2020) at shares
    of the rate that a closed loop serves. ``seconds`` are those of the whole curve; a model for
    which they are too few has none."""
    served = float(np.median([one for block in run.collected["throughput_per_s"] for one in block]))
    points = []
    for share in OFFERED:
        rate = share * served / run.target.batch
        count = min(CALLS, round(rate * seconds / len(OFFERED)))
        if count < ROUNDS:
            return
        answer = run.worker.ask("offer", rate=rate, count=count, seed=seed)
        delays = tuple(ns / 1e6 for ns in answer["ns"])
        found = summary([delays])
        observed.delays.append(
            Measurement(run.artifact, run.target, f"delay_ms at {share:.0%}", "ms", (delays,))
        )
        points.append(
            {
                "share": share,
                "offered_per_s": share * served,
                "served_per_s": count * run.target.batch / (answer["elapsed_ns"] / 1e9),
                **{name: found[name] for name in ("p50", "p90", "p99", "n")},
            }
        )
    observed.loads[run.artifact] = points
