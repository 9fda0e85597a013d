"""From artifacts to measurements: every artifact on every target, and its outputs on the splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from compressor.artifact import Artifact
from compressor.measure import device, protocol, statistics
from compressor.measure.environment import absent, environment
from compressor.measure.process import Worker
from compressor.measure.protocol import PROCESSES, SECONDS, Observed, observe
from compressor.measure.statistics import speedup, summary
from compressor.measurement import TORCH, Measurement, Target
from compressor.pipeline import verdict
from compressor.pipeline.making import watched
from compressor.pipeline.verdict import Outputs, Row
from compressor.recipe import BASELINE
from compressor.report.table import target_of
from compressor.task import Array, Inputs, Task

SYNTHETIC = 256
"""Made-up examples on which fidelity is measured where there is no data."""


Place = tuple[str, str, int]


def place(target: Target) -> Place:
    """What outputs depend on: runtime, provider and batch size, but not the number of threads."""
    return target.runtime, target.provider, target.batch


@dataclass
class Measured:
    """What measuring gave. ``outputs`` are by :func:`place`, artifact and split; ``targets`` are
    those of whole splits; ``load`` is the machine's before measuring."""

    providers: list[str]
    load: float | None
    targets: dict[str, Array]
    rows: list[Row] = field(default_factory=list)
    raw: list[Measurement] = field(default_factory=list)
    outputs: dict[Place, Outputs] = field(default_factory=dict)
    broken: dict[Place, dict[str, str]] = field(default_factory=dict)
    """Why artifacts that could be timed have no outputs: true wherever outputs are the same."""
    floors: dict[Target, dict[str, Any]] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)


def measure(
    task: Task,
    artifacts: Sequence[Artifact],
    skipped: Mapping[str, str],
    targets: Sequence[Target],
    bench_time: str,
    say: Callable[[str], None],
    detail: Callable[[str], None],
    reference: str = BASELINE,
    arch: str | None = None,
) -> Measured:
    """Measures ONNX ``artifacts`` on ``targets``, the primary one first.

    Outputs are taken for each :func:`place`, whose batch size counts because dynamic quantization
    looks at the whole batch. ``skipped`` artifacts become rows with their reason. ``reference``
    names the artifact that the others are compared with, the first; load curves are taken on the
    primary target, unless ``bench_time`` is quick.
    """
    with Worker() as worker:
        present = worker.ask("providers")["providers"]
    inputs, known = _whole_splits(task)
    measured = Measured(present, environment()["load"], known)
    machine = {"load": measured.load, "governor": device.governor()}
    for target in targets:
        say(f"measure on {target}")
        with watched() as seen:
            observed = _observe(
                task, artifacts, target, targets[0], measured, inputs, bench_time, arch, detail
            )
        measured.stages.append(
            {"stage": "measure", "artifact": None, "cached": False, "target": str(target), **seen}
        )
        measured.raw += observed.measurements + observed.delays
        floor = verdict.floor_of(observed, reference)
        if floor is not None:
            measured.floors[target] = floor
        primary = target == targets[0]
        rows = verdict.rows(observed, target, task, primary, reference, machine)
        for row in rows:
            if "skipped" not in row:
                outputs = measured.outputs.get(place(target), {})
                name = row["artifact"]
                row |= verdict.as_run(task, known, outputs, name, "test", reference)
        measured.rows += rows
        measured.rows += [
            {"artifact": name, **target.to_json(), "primary": primary, "skipped": why}
            for name, why in skipped.items()
        ]
    return measured


def _observe(
    task: Task,
    artifacts: Sequence[Artifact],
    target: Target,
    primary: Target,
    measured: Measured,
    inputs: dict[str, Inputs],
    bench_time: str,
    arch: str | None,
    detail: Callable[[str], None],
) -> Observed:
    if why := absent(target, measured.providers):
        observed = Observed()
        for artifact in artifacts:
            protocol.skip(observed, artifact.name, target, why)
        return observed
    taken = place(target)
    predict = {} if taken in measured.outputs else inputs
    observed = observe(
        [artifact.checked() for artifact in artifacts],
        target,
        _feed(task, target),
        predict=predict,
        load=target == primary and bench_time != "quick",
        arch=arch,
        seconds=SECONDS[bench_time],
        processes=PROCESSES[bench_time],
        seed=task.seed,
        progress=detail,
    )
    if predict and observed.outputs:
        timed = {name for name, _ in observed.times()}
        measured.outputs[taken] = observed.outputs
        measured.broken[taken] = {
            name: why for name, why in observed.failed.items() if name in timed
        }
    observed.failed = {**measured.broken.get(taken, {}), **observed.failed}
    return observed


def rival(rows: Sequence[Row], best: str, primary: Target) -> Target | None:
    """The other runtime to serve with that ran ``best`` on the same provider, batch and threads."""
    ran = (target_of(row) for row in rows if row["artifact"] == best and "skipped" not in row)
    others = (target for target in ran if target.runtime not in (primary.runtime, *TORCH))
    return next(
        (target for target in others if replace(target, runtime=primary.runtime) == primary), None
    )


def race(
    task: Task,
    artifact: Artifact,
    primary: Target,
    other: Target,
    measured: Measured,
    bench_time: str,
    budget: float,
) -> Row | None:
    """The recommended artifact on ``primary`` against another runtime, by turns.

    ``{"artifact", "runtime", "versus", "value", "low", "high", "verdict", "drop",
    "within_budget"}``: how many times faster ``runtime`` is than ``versus``, and what its outputs
    lose on test against the baseline in the primary's runtime; the budget has to hold on both
    splits. ``None`` where one failed. Raw
    values are added to ``measured``.
    """
    observed = protocol.duel(
        [(protocol.DUEL, artifact.checked(), target) for target in (primary, other)],
        _feed(task, primary),
        seconds=SECONDS[bench_time],
        processes=PROCESSES[bench_time],
        seed=task.seed,
    )
    measured.raw += observed.measurements
    floor = measured.floors.get(primary, {"value": 0.0})["value"]
    ratio = verdict.between(observed, primary, other, floor, task.seed)
    if ratio is None:
        return None
    theirs = measured.outputs.get(place(other), {}).get(artifact.name, {})
    ours = measured.outputs.get(place(primary), {}).get(BASELINE, {})
    # Both may be the baseline: its drop is then not 0 by definition, but what the runtime adds.
    outputs = {BASELINE: ours, protocol.DUEL: theirs}
    chosen, judged = (
        verdict.judged(task, measured.targets, outputs, protocol.DUEL, split)[0]
        for split in ("validate", "test")
    )
    return {
        "artifact": artifact.name,
        "runtime": other.runtime,
        "versus": primary.runtime,
        **ratio,
        "drop": judged.get("drop"),
        "within_budget": verdict.within(chosen, budget) and verdict.within(judged, budget),
    }


def leave(
    task: Task,
    baseline: Artifact,
    best: Artifact,
    targets: Sequence[Target],
    measured: Measured,
    bench_time: str,
    arch: str | None = None,
) -> list[Row]:
    """What leaving PyTorch brings: its own rows of the baseline against the primary target's, by
    turns.

    A row for each of PyTorch's runtimes among ``targets`` that ran: ``{"runtime", "artifact",
    "p50", "baseline", "best"}``: how many times faster the baseline and the recommended
    ``artifact`` are on the primary target, ratios with their verdicts. Raw values are added to
    ``measured``.
    """
    primary = targets[0]
    rivals = [
        target
        for target in targets
        if target.runtime in TORCH
        and target != primary
        and replace(target, runtime=primary.runtime) == primary
        and any(
            row["artifact"] == BASELINE and "skipped" not in row and target_of(row) == target
            for row in measured.rows
        )
    ]
    if not rivals:
        return []
    ours = {f"{one.name} (duel)": one.checked() for one in (baseline, best)}
    first = f"{BASELINE} (duel)"
    observed = protocol.duel(
        [
            *((name, artifact, primary) for name, artifact in ours.items()),
            *((first, baseline, rival) for rival in rivals),
        ],
        _feed(task, primary),
        arch=arch,
        seconds=SECONDS[bench_time],
        processes=PROCESSES[bench_time],
        seed=task.seed,
    )
    measured.raw += observed.measurements
    floor = measured.floors.get(primary, {"value": 0.0})["value"]
    times = observed.times()

    def against(name: str, rival: Target) -> Row | None:
        if (name, primary) not in times:
            return None
        ratio = speedup(times[first, rival], times[name, primary], task.seed, observed.processes)
        return {**ratio, "verdict": statistics.verdict(ratio["low"], ratio["high"], floor)}

    return [
        {
            "runtime": rival.runtime,
            "artifact": best.name,
            "p50": summary(times[first, rival])["p50"],
            "baseline": against(first, rival),
            "best": against(f"{best.name} (duel)", rival),
        }
        for rival in rivals
        if (first, rival) in times
    ]


def _feed(task: Task, target: Target) -> Inputs:
    return task.splits.calibrate.head(target.batch)[0] if task.splits else task.examples(1)


def _whole_splits(task: Task) -> tuple[dict[str, Inputs], dict[str, Array]]:
    """The inputs on which outputs are wanted, and their targets, as whole arrays, read once."""
    if task.splits is None:
        return {"synthetic": task.examples(SYNTHETIC)}, {}
    inputs, targets = {}, {}
    for name in ("validate", "test"):
        batches = list(getattr(task.splits, name).batches(4096))
        parts = zip(*(batch[0] for batch in batches), strict=True)
        inputs[name] = tuple(np.concatenate(part) for part in parts)
        targets[name] = np.concatenate([batch[1] for batch in batches])
    return inputs, targets
