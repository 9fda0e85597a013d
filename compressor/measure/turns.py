"""Workers that take turns: every round runs one block of calls of each, in an order drawn anew.

What slows the machine down for a while slows all of them. The processes are started again a few
times, since memory is laid out differently each time.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor.artifact import Artifact
from compressor.measure import device
from compressor.measure.process import Worker, WorkerFailed
from compressor.measure.quantities import QUANTITIES
from compressor.measure.statistics import ENOUGH, reach
from compressor.measure.timed import Timed
from compressor.measurement import GPUS, TORCH, Measurement, Target

CALLS = 200_000
"""Calls of each artifact after which more would say nothing new and only fill memory."""

PRECISE = 0.005
"""A process has seen enough when the standard error of every log ratio is below this: what a
restart changes is several times as much."""

BLOCK_MS = 8.0
"""Calls are grouped into blocks of about this long: above scheduler noise, below its drifts."""

ROUNDS = 8
"""Rounds that each process takes even where time is up, so 11 calls of a slow model with its
warm-up: fewer give no interval."""

CONTROL = "baseline (again)"
"""The reference's second worker. Where it fails in one start, no other has one."""

Progress = Callable[[str], None]
Key = tuple[str, Target]
Entrant = tuple[str, Artifact, Target]


def silent(text: str) -> None:
    """A progress that shows nothing."""


@dataclass
class Turns:
    """Everything that the workers share, and what they gave.

    ``feeds`` are the ``.npy`` files to time with. ``arch`` is the factory that was given for a
    model that is not in the zoo, which PyTorch's own rows need.
    """

    feeds: list[str]
    arch: str | None = None
    start: Callable[[], Worker] = Worker
    clock: Callable[[], float] = time.monotonic
    progress: Progress = silent
    processes: list[int] = field(default_factory=list)
    """Rounds that were taken in each start of the workers."""
    stolen: list[float] = field(default_factory=list)
    """Share of the CPU's time that went to other guests meanwhile, where the machine says so."""
    failed: dict[Key, str] = field(default_factory=dict)
    gathered: dict[Key, list[Timed]] = field(default_factory=dict)

    def take(
        self,
        entrants: Sequence[Entrant],
        seconds: float,
        processes: int,
        seed: int,
        finish: Callable[[Sequence[Timed]], None] = lambda runs: None,
    ) -> None:
        """Starts a worker for each entrant ``processes`` times and times them in turns.

        ``seconds`` are those of each entrant in all. ``finish`` gets the workers of the last start.
        """
        order = random.Random(seed)
        for process in range(processes):
            with ExitStack() as stack:
                runs: list[Timed] = []
                for entrant in entrants:
                    self._open(entrant, runs, stack)
                if not runs:
                    return
                self.progress(f"timing on {runs[0].target}")
                before = device.stolen()
                self.processes.append(
                    self._interleave(runs, seconds / processes, CALLS / processes, order)
                )
                share = device.share(before, device.stolen())
                self.stolen += [] if share is None else [share]
                for run in list(runs):
                    self._collect(run, runs)
                if process == processes - 1:
                    finish(runs)

    def measurements(self) -> Iterator[Measurement]:
        """Every quantity of everything that was started, or why there is none."""
        for (name, target), why in self.failed.items():
            if name != CONTROL:
                yield from skipped(name, target, why)
        for key, parts in self.gathered.items():
            if key not in self.failed:
                yield from _joined(parts)

    def _open(self, entrant: Entrant, runs: list[Timed], stack: ExitStack) -> None:
        name, artifact, target = entrant
        key = name, target
        without = name == CONTROL and (artifact.name, target) in self.failed
        if key in self.failed or without:
            return
        self.progress(f"{name} on {target}")
        try:
            run = self._opened(entrant, stack)
        except WorkerFailed as error:
            self.failed[key] = str(error)
        else:
            runs.append(run)
            self.gathered.setdefault(key, []).append(run)

    @contextmanager
    def another(self, artifact: Artifact, target: Target) -> Iterator[Worker]:
        """One more worker with the artifact, which is not timed."""
        with self.start() as worker:
            worker.ask("load", **request(artifact, target, self.feeds, self.arch))
            worker.ask("take", inputs=self.feeds, batch=target.batch)
            yield worker

    def _opened(self, entrant: Entrant, stack: ExitStack) -> Timed:
        name, artifact, target = entrant
        asked = request(artifact, target, self.feeds, self.arch)
        worker = stack.enter_context(self.start())
        loaded = worker.ask("load", **asked)
        worker.ask("take", inputs=self.feeds, batch=target.batch)
        # The first call allocates; the second says how many calls make a block.
        first = worker.ask("time", calls=1)["elapsed_ns"] / 1e6
        once = worker.ask("time", calls=1)["elapsed_ns"] / 1e6
        calls = max(1, min(1000, round(BLOCK_MS / max(once, 1e-6))))
        worker.ask("time", calls=calls)
        vram = worker.ask("vram")["vram_bytes"] if target.provider in GPUS else None
        path = Path(asked["path"])
        return Timed(name, target, worker, path, loaded, first, calls, 2 + calls, vram)

    def _interleave(
        self, runs: list[Timed], seconds: float, most: float, order: random.Random
    ) -> int:
        """Rounds until time is up or all is known well enough; their number."""
        end = self.clock() + seconds * len(runs)
        for taken in itertools.count():
            calls = min((taken * run.calls for run in runs), default=0)
            enough = calls >= most or self.clock() >= end
            if taken % ROUNDS == 0 and calls >= max(ENOUGH.values()):
                enough = enough or _precise(runs)
            if not runs or (taken >= ROUNDS and enough):
                return taken
            for run in order.sample(runs, len(runs)):
                try:
                    run.add(run.worker.ask("time", calls=run.calls))
                except WorkerFailed as error:
                    self._fail(run, runs, error)
        raise AssertionError("counting ends")

    def _collect(self, run: Timed, runs: list[Timed]) -> None:
        try:
            run.collected = {name: each.collect(run) for name, each in QUANTITIES.items()}
        except WorkerFailed as error:
            self._fail(run, runs, error)
        run.blocks.clear()  # many small integers, and all that is needed of them is kept

    def _fail(self, run: Timed, runs: list[Timed], error: WorkerFailed) -> None:
        self.failed[run.artifact, run.target] = str(error)
        runs.remove(run)


def request(
    artifact: Artifact, target: Target, feeds: Sequence[str], arch: str | None = None
) -> dict[str, Any]:
    """What a worker is asked to ``load`` for ``artifact`` on ``target``, to be fed ``feeds``.

    Raises :class:`WorkerFailed` where the target's runtime has nothing to open.
    """
    return {
        "path": str(_file(artifact, target)),
        "provider": target.provider,
        "threads": target.threads,
        "disabled": disabled(artifact),
        "runtime": target.runtime,
        "arch": arch,
        "inputs": len(feeds),
    }


def disabled(artifact: Artifact) -> list[str]:
    """Optimizers of onnxruntime that slow this artifact down, as the stage that made it found."""
    made = artifact.steps[-1] if artifact.steps else {}
    return list(made.get("facts", {}).get("disabled", ()))


def skipped(artifact: str, target: Target, reason: str) -> Iterator[Measurement]:
    """Every quantity of ``artifact`` on ``target`` as a row with the reason."""
    for name, quantity in QUANTITIES.items():
        yield Measurement(artifact, target, name, quantity.unit, skipped=reason)


def _file(artifact: Artifact, target: Target) -> Path:
    """What the target's runtime opens: PyTorch takes the file that the ONNX was exported from."""
    if target.runtime not in TORCH:
        return artifact.path.resolve()
    if artifact.source is None:
        raise WorkerFailed("it has no PyTorch form: it was made from ONNX")
    return artifact.source.resolve()


def _precise(runs: Sequence[Timed]) -> bool:
    """Whether more calls in these processes would hardly narrow any interval against the first."""
    return all(reach(runs[0].medians, run.medians) <= PRECISE for run in runs[1:])


def _joined(parts: Sequence[Timed]) -> Iterator[Measurement]:
    """Each quantity of one artifact on one target, from all the processes that it ran in."""
    first = parts[0]
    for name, quantity in QUANTITIES.items():
        found = [part.collected[name] for part in parts]
        why = next((one for one in found if isinstance(one, str)), None)
        kept = [tuple(map(tuple, one)) for one in found if not isinstance(one, str)]
        yield Measurement(
            first.artifact,
            first.target,
            name,
            quantity.unit,
            () if why else tuple(block for part in kept for block in part),
            first.warmup,
            why,
            () if why else tuple(map(len, kept)),
        )
