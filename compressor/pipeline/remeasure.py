"""Timing the files of two reports again, side by side, and which of them are slower.

Times of two days differ by more than what a gate looks for. So both files of each variant are
started again and take turns in one job, and a slow-down counts only where the whole interval lies
above the limit, twice: the second round uses processes of its own.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from compressor.errors import InputError
from compressor.loading import onnxfile
from compressor.measure.environment import absent
from compressor.measure.process import Worker
from compressor.measure.protocol import SECONDS, duel
from compressor.measure.statistics import Blocks, speedup
from compressor.measurement import PLACES, TORCH, Target
from compressor.pipeline.pairs import Opened, Pair, Unfit, opened, paired, refuse
from compressor.report import Report
from compressor.report.table import primary
from compressor.task import Input, Inputs

PROCESSES = 3
"""Starts of each worker in a look, at least: where a start decides how fast a process is, a single
one looks like a slow-down. benchmarks/gate has how often."""

MORE = 5
"""Looks that are added where the first is in doubt, and that the second round takes besides: enough
to find a slow-down of 20 % where starts come in two speeds as far apart (benchmarks/gate)."""

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


def remeasure(
    old: Report,
    new: Report,
    limit: float,
    *,
    inputs: Sequence[str] = (),
    seconds: float = SECONDS["quick"],
    processes: int = PROCESSES,
    seed: int = 0,
    progress: Progress = silent,
    start: Callable[[], Worker] = Worker,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Row]:
    """What :func:`slower` says of every variant of both reports, on NEW's primary target.

    ``{"verdict": "ok"|"fails"|"inconclusive"|"n/a", "why", "target", "value", "low", "high",
    "rounds"}``; the last four are ``None`` where nothing was timed. ``seconds`` are those of each
    file in one look. Inputs are made up from what the files say that they take; the length of an
    axis that both leave open comes from ``inputs`` (``NAME=SHAPE[:DTYPE[<HIGH]]``), or else from
    what NEW's report was fed, or OLD's. A file of NEW that is gone, has changed or does not run
    fails with the reason; one of OLD is ``n/a``.

    Raises :class:`InputError`, before anything is timed, where the target is not to be had here or
    is PyTorch's, where a report holds no models, and for inputs that are unknown or do not fit.
    """
    asked, target = onnxfile.asked(inputs), _target(old, new)
    theirs, ours = (
        {made["name"]: made for made in report.document["artifacts"]} for report in (old, new)
    )
    found: dict[str, Row] = {}
    files: dict[str, tuple[Opened, Opened]] = {}
    for name in theirs:
        if name not in ours:
            continue
        try:
            after = opened(ours[name], new, "NEW")
            files[name] = opened(theirs[name], old, "OLD"), after
        except Unfit as error:
            found[name] = _row(error.verdict, str(error), target)
    refuse(asked, files.values())
    pairs: dict[str, Pair] = {}
    for name, (before, after) in files.items():
        if before[0].digest == after[0].digest:
            found[name] = _row("ok", "the same file", target)
            continue
        try:
            pairs[name] = paired(before, after, asked, (new, old), target)
        except Unfit as error:
            found[name] = _row(error.verdict, str(error), target)
    if pairs:
        _present(target, start)
    seeds = itertools.count(seed)

    def looks(names: Iterable[str]) -> dict[str, Look | Unfit]:
        """Both files of each variant in one job; the reason for one that failed."""
        chosen = {name: pairs[name] for name in names}
        progress(f"timing {', '.join(chosen)} again on {target}")
        fed = next(iter(chosen.values())).inputs
        entrants = [
            (f"{name} ({side})", getattr(pair, side), target)
            for name, pair in chosen.items()
            for side in ("old", "new")
        ]
        observed = duel(
            entrants,
            _feed(fed, target, seed),
            seconds=seconds,
            processes=max(processes, PROCESSES),
            seed=next(seeds),
            start=start,
            clock=clock,
        )
        times = observed.times()
        return {
            name: _failed(name, observed.failed)
            or Look(
                times[f"{name} (old)", target], times[f"{name} (new)", target], observed.processes
            )
            for name in chosen
        }

    def taken(look: Look | Unfit) -> Look:
        if isinstance(look, Unfit):
            raise look
        return look

    alike: dict[tuple[Input, ...], list[str]] = {}
    for name, pair in pairs.items():
        alike.setdefault(pair.inputs, []).append(name)
    for names in alike.values():
        for name, first in looks(names).items():

            def again(name: str = name) -> Look:
                return taken(looks([name])[name])

            try:
                found[name] = _judged(slower(taken(first), again, limit, seed), limit, target)
            except Unfit as error:
                found[name] = _row(error.verdict, str(error), target)
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


def _failed(name: str, failed: Mapping[str, str]) -> Unfit | None:
    """Why one of the two files did not run; NEW's is the one that counts."""
    for side in ("NEW", "OLD"):
        if why := failed.get(f"{name} ({side.lower()})"):
            return Unfit(side, f"{side}'s file: {why}")
    return None


def _target(old: Report, new: Report) -> Target:
    """NEW's primary target, where an ONNX file can be timed on it."""
    for side, report in (("OLD", old), ("NEW", new)):
        if "benchmarks" in report.document:
            raise InputError(
                f"--remeasure: {side} is the JSON of benchmarks, which holds no models: give run "
                "folders"
            )
    target = primary(new.document)
    if target is None:
        raise InputError("--remeasure: NEW has no measurement, so no target to measure on")
    if target.runtime in TORCH or (target.runtime, target.provider) not in PLACES.values():
        raise InputError(
            f"--remeasure: NEW's primary target is {target}, only ONNX files are timed again: "
            "measure it with another --provider first"
        )
    return target


def _present(target: Target, start: Callable[[], Worker]) -> None:
    with start() as worker:
        here = worker.ask("providers")["providers"]
    if why := absent(target, here):
        raise InputError(f"--remeasure on {target}: {why}: compare on a machine that has it")


def _feed(inputs: tuple[Input, ...], target: Target, seed: int) -> Inputs:
    """Made-up examples to fill one batch."""
    return tuple(
        given.synthetic(target.batch, seed + position) for position, given in enumerate(inputs)
    )
