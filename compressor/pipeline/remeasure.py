"""Timing the files of two reports again, side by side, and which of them are slower.

Times of two days differ by more than what a gate looks for. So both files of each variant are
started again and take turns in one job, and a slow-down counts only where the whole interval lies
above the limit, twice: the second round uses processes of its own.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from statistics import median
from typing import Any, NamedTuple

from compressor.artifact import Artifact, digest
from compressor.errors import InputError
from compressor.loading import onnxfile
from compressor.loading.onnxfile import Asked, OnnxFile
from compressor.measure.process import Worker, WorkerFailed
from compressor.measure.protocol import SECONDS, duel
from compressor.measure.statistics import Blocks, speedup
from compressor.measurement import Target
from compressor.report import Report
from compressor.report.table import primary
from compressor.task import Input, Inputs

PROCESSES = 3
"""Starts of each worker in a look, at least: where a start decides how fast a process is, a single
one looks like a slow-down. benchmarks/gate has how often."""

MORE = 3
"""Looks that are added where the first is in doubt, and that the second round takes besides."""

Progress = Callable[[str], None]
Row = dict[str, Any]


def silent(text: str) -> None:
    """A progress that shows nothing."""


class Look(NamedTuple):
    """Milliseconds of each call of the old file and of the new one, block by block, taken in the
    same rounds; ``processes`` are the rounds of each start of the workers."""

    old: Blocks
    new: Blocks
    processes: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """``ok``, ``slower`` or ``inconclusive``, and the slow-down that each round found: 1 is none,
    with its 95 % interval."""

    said: str
    rounds: tuple[dict[str, float], ...]


def slower(first: Look, again: Callable[[], Look], limit: float, seed: int = 0) -> Verdict:
    """Whether the new file is slower by more than ``limit`` (a share, such as 0.05).

    ``first`` is the first look; ``again`` takes another one, in processes of its own. Where the
    interval of the first reaches over the limit on both sides, :data:`MORE` looks are added to it,
    once. Only an interval that lies above the limit leads to the second round, of ``1 + MORE`` new
    looks, and only one that does so again is ``slower``: at most ``1 + MORE`` times two looks.
    """
    threshold = 1 + limit
    found = slowdown([first], seed)
    if found["low"] <= threshold < found["high"]:
        found = slowdown([first, *(again() for _ in range(MORE))], seed)
    if found["low"] <= threshold:
        return Verdict("ok" if found["high"] <= threshold else "inconclusive", (found,))
    second = slowdown([again() for _ in range(1 + MORE)], seed)
    if second["low"] > threshold:
        return Verdict("slower", (found, second))
    return Verdict("ok" if second["high"] <= threshold else "inconclusive", (found, second))


def slowdown(looks: Iterable[Look], seed: int = 0) -> dict[str, float]:
    """``{"value", "low", "high"}``: new time to old time, the median over the rounds of a start and
    the mean over starts.

    The two blocks of a round stand side by side in time, so their ratio is free of what slowed both
    down. Where calls come in two speeds the ratio of the overall medians jumps between them; the
    median of the rounds' ratios does not.
    """
    ratios: list[list[float]] = []
    processes: list[int] = []
    for look in looks:
        pairs = zip(look.old, look.new, strict=True)
        ratios += [[median(new) / median(old)] for old, new in pairs]
        processes += look.processes
    return speedup(ratios, [[1.0]] * len(ratios), seed, processes)


class Pair(NamedTuple):
    """Both files of a variant, and what they take."""

    old: Artifact
    new: Artifact
    inputs: tuple[Input, ...]


def remeasure(
    old: Report,
    new: Report,
    limit: float,
    *,
    seconds: float = SECONDS["quick"],
    processes: int = PROCESSES,
    seed: int = 0,
    progress: Progress = silent,
    start: Callable[[], Worker] = Worker,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Row]:
    """What :func:`slower` says of every variant of both reports, on NEW's primary target.

    ``{"verdict": "ok"|"fails"|"inconclusive", "why", "target", "value", "low", "high",
    "rounds"}``; the last four are ``None`` where nothing was timed. ``seconds`` are those of each
    file in one look. The inputs are made up from what the files say that they take. A file that is
    gone, has changed or does not run fails with the reason.
    """
    target = primary(new.document)
    if target is None:
        raise InputError("--remeasure: NEW has no measurement, so no target to measure on")
    theirs, ours = (_entries(report) for report in (old, new))
    found: dict[str, Row] = {}
    pairs: dict[str, Pair] = {}
    for name in theirs:
        if name not in ours:
            continue
        try:
            pair = _pair(name, old, new, target)
        except InputError as error:
            found[name] = _row("fails", f"cannot be timed again: {error}", target)
            continue
        if pair.old.digest == pair.new.digest:
            found[name] = _row("ok", "the same file", target)
        else:
            pairs[name] = pair
    seeds = itertools.count(seed)

    def looks(names: Iterable[str]) -> dict[str, Look | str]:
        """Both files of each variant in one job; the reason for one that failed."""
        chosen = {name: pairs[name] for name in names}
        progress(f"timing {', '.join(chosen)} again on {target}")
        inputs = next(iter(chosen.values())).inputs
        entrants = [
            (f"{name} ({side})", getattr(pair, side), target)
            for name, pair in chosen.items()
            for side in ("old", "new")
        ]
        observed = duel(
            entrants,
            _feed(inputs, target, seed),
            seconds=seconds,
            processes=max(processes, PROCESSES),
            seed=next(seeds),
            start=start,
            clock=clock,
        )
        times = observed.times()
        return {
            name: why
            if (why := _failed(name, observed.failed))
            else Look(
                times[f"{name} (old)", target], times[f"{name} (new)", target], observed.processes
            )
            for name in chosen
        }

    alike: dict[tuple[Input, ...], list[str]] = {}
    for name, pair in pairs.items():
        alike.setdefault(pair.inputs, []).append(name)
    for names in alike.values():
        for name, first in looks(names).items():

            def again(name: str = name) -> Look:
                look = looks([name])[name]
                if isinstance(look, str):
                    raise WorkerFailed(look)
                return look

            try:
                if isinstance(first, str):
                    raise WorkerFailed(first)
                found[name] = _judged(slower(first, again, limit, seed), limit, target)
            except WorkerFailed as error:
                found[name] = _row("fails", f"cannot be timed again: {error}", target)
    return {name: found[name] for name in theirs if name in found}


def _judged(verdict: Verdict, limit: float, target: Target) -> Row:
    last = verdict.rounds[-1]
    ratio = f"{last['value']:.3f}x the time [{last['low']:.3f}, {last['high']:.3f}]"
    confirmed = ", in a second round too" if len(verdict.rounds) > 1 else ""
    why = {
        "ok": ratio,
        "slower": ratio + confirmed,
        "inconclusive": f"{ratio} reaches over {1 + limit:g}; more time may tell: --bench-time",
    }[verdict.said]
    said = "fails" if verdict.said == "slower" else verdict.said
    return {**_row(said, why, target), **last, "rounds": list(verdict.rounds)}


def _row(verdict: str, why: str, target: Target) -> Row:
    nothing = dict.fromkeys(("value", "low", "high", "rounds"))
    return {"verdict": verdict, "why": why, "target": str(target), **nothing}


def _failed(name: str, failed: Mapping[str, str]) -> str | None:
    """Why one of the two files did not run."""
    sides = ((side, failed.get(f"{name} ({side})")) for side in ("old", "new"))
    return next((f"{side.upper()}'s file: {why}" for side, why in sides if why), None)


def _entries(report: Report) -> dict[str, Mapping[str, Any]]:
    return {made["name"]: made for made in report.document["artifacts"]}


def _pair(name: str, old: Report, new: Report, target: Target) -> Pair:
    """Both files as artifacts, each compared with the digest in its report."""
    (was, before), (now, after) = _opened(name, old, "OLD"), _opened(name, new, "NEW")
    taken, given = _inputs(before, after, target), _inputs(after, before, target)
    if [replace(one, high=2) for one in taken] != [replace(one, high=2) for one in given]:
        raise InputError(
            f"OLD takes {', '.join(map(str, before.slots))} and NEW "
            f"{', '.join(map(str, after.slots))}: the two cannot be given the same inputs"
        )
    both = zip(taken, given, strict=True)
    inputs = tuple(replace(one, high=min(one.high, other.high)) for one, other in both)
    return Pair(was, now, inputs)


def _opened(name: str, report: Report, side: str) -> tuple[Artifact, OnnxFile]:
    """The file that the report names, and what it says of itself; its digest must hold."""
    made = _entries(report)[name]
    relative = PurePosixPath(made.get("path") or "")
    if not relative.parts or relative.is_absolute() or ".." in relative.parts:
        raise InputError(f"{side} names no file of its folder for it; give the run folder")
    path = report.folder / relative
    file = onnxfile.read(path)
    if digest(path, *file.companions) != made["sha256"]:
        raise InputError(f"{side}'s {relative} is not the file that was measured: run it again")
    fields = {"steps": tuple(made["steps"]), "companions": file.companions}
    source = report.folder / made["source"] if made.get("source") else None
    return Artifact(name, path, "onnx", made["sha256"], source=source, **fields), file


def _inputs(file: OnnxFile, other: OnnxFile, target: Target) -> tuple[Input, ...]:
    """What ``file`` takes; an axis that it leaves open is as long as in the other file."""
    closed = {
        slot.name: Asked(tuple(int(size) for size in slot.axes[1:]))
        for slot in other.slots
        if slot.axes and slot.name not in _open(other)
    }
    known = {name: one for name, one in closed.items() if name in _open(file)}
    return onnxfile.inputs(file, known, batch=(target.batch,))


def _open(file: OnnxFile) -> set[str]:
    """Inputs with an axis, besides the batch, whose length the file does not say."""
    return {
        slot.name
        for slot in file.slots
        if slot.axes is None or any(isinstance(size, str) for size in slot.axes[1:])
    }


def _feed(inputs: tuple[Input, ...], target: Target, seed: int) -> Inputs:
    """Made-up examples to fill one batch."""
    return tuple(
        given.synthetic(target.batch, seed + position) for position, given in enumerate(inputs)
    )
