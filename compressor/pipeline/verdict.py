"""What the measurements say: drops, speed-ups, budgets, and the one artifact to recommend.

The best is chosen on the validation split and judged on the test split.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.measure.fidelity import fidelity
from compressor.measure.noise import conditions, flags
from compressor.measure.protocol import Observed
from compressor.measure.quantities import QUANTITIES
from compressor.measure.statistics import (
    Blocks,
    drops,
    mcnemar,
    noise_floor,
    speedup,
    verdict,
)
from compressor.measure.turns import CONTROL
from compressor.measurement import Measurement, Target
from compressor.metrics import metrics_of, scores, value
from compressor.recipe import BASELINE
from compressor.task import Array, Task

Row = dict[str, Any]

UNKNOWN = 0.05
"""The noise floor where nothing shows it."""

Outputs = Mapping[str, Mapping[str, Array]]
"""Artifact name -> split name -> the first output on the whole split."""


@dataclass(frozen=True)
class Choice:
    """The recommended artifact and the sentence that says why; ``held`` is the budget's fate."""

    best: str
    sentence: str
    held: bool


def rows(
    observed: Observed,
    target: Target,
    task: Task,
    primary: bool,
    reference: str = BASELINE,
    machine: Mapping[str, Any] = {},
) -> list[Row]:
    """One row of ``report.json``'s measurements for every artifact on this target.

    ``machine`` holds the conditions that are the same for all: ``load`` and ``governor``.
    """
    by_artifact: dict[str, dict[str, Measurement]] = {}
    for one in observed.measurements:
        by_artifact.setdefault(one.artifact, {})[one.quantity] = one
    times = {
        name: blocks
        for (name, _), blocks in observed.times().items()
        if name not in observed.failed
    }
    floor = floor_of(observed, reference)
    found = []
    for name, quantities in by_artifact.items():
        if name == CONTROL:
            continue
        row: Row = {"artifact": name, **target.to_json()}
        skipped = quantities["latency_ms"].skipped or observed.failed.get(name)
        if skipped:
            found.append({**row, "primary": primary, "skipped": skipped})
            continue
        for quantity, measurement in quantities.items():
            figure = QUANTITIES[quantity].figure
            row[quantity] = None if measurement.skipped else figure(measurement.values)
        row["primary"] = primary
        row["processes"] = len(observed.processes)
        row["speedup"] = _speedup(name, reference, times, observed, floor, task.seed)
        row["conditions"] = {
            **conditions(times[name], observed.processes),
            "cpu_share": _share(quantities, target),
            "switches_per_s": row.pop("switches_per_s"),
            "steal": observed.stolen,
            **machine,
        }
        row["noise"] = flags(row["conditions"], row["latency_ms"]["n"])
        if observed.uncontrolled:
            row["noise"].append(
                f"no control: the reference's second process failed ({observed.uncontrolled}), so "
                f"a noise floor of {UNKNOWN:.0%} is assumed"
            )
        row["session"] = observed.sessions.get(name)
        row["placement"] = observed.placements.get(name)
        row["load_curve"] = observed.loads.get(name)
        found.append(row)
    return found


def _share(quantities: Mapping[str, Measurement], target: Target) -> float | None:
    """CPU time over wall time; on one thread of a CPU only, where anything below 1 is waiting."""
    if target.provider != "cpu" or target.threads != 1:
        return None
    cpu, wall = (
        sum(block[0] for block in quantities["cpu_ms"].values),
        sum(sum(block) / len(block) for block in quantities["latency_ms"].values),
    )
    return min(1.0, cpu / wall)


def floor_of(observed: Observed, reference: str = BASELINE) -> Row | None:
    """``{"value", "n"}``: how far reference and control seem to differ; ``None`` without."""
    blocks = {name: taken for (name, _), taken in observed.times().items()}
    if reference not in blocks or CONTROL not in blocks:
        return None
    both = blocks[reference], blocks[CONTROL]
    return {"value": noise_floor(*both), "n": sum(map(len, both[1]))}


def _speedup(
    name: str,
    reference: str,
    times: Mapping[str, Blocks],
    observed: Observed,
    floor: Row | None,
    seed: int,
) -> Row | None:
    if reference not in times:
        return None
    if name == reference:
        ratio = {"value": 1.0, "low": 1.0, "high": 1.0}
        return {"versus": reference, **ratio, "verdict": "same"}
    ratio = speedup(times[reference], times[name], seed, observed.processes)
    said = verdict(ratio["low"], ratio["high"], floor["value"] if floor else UNKNOWN)
    return {"versus": reference, **ratio, "verdict": said}


def between(
    observed: Observed, first: Target, second: Target, floor: float, seed: int
) -> Row | None:
    """How many times faster a duel's ``second`` target is: a ratio and its verdict, if both ran."""
    blocks = {target: taken for (_, target), taken in observed.times().items()}
    if first not in blocks or second not in blocks:
        return None
    ratio = speedup(blocks[first], blocks[second], seed, observed.processes)
    return {**ratio, "verdict": verdict(ratio["low"], ratio["high"], floor)}


def runtimes(race: Row) -> str:
    """The sentence that says which runtime is faster for the recommended artifact."""
    said = {
        "faster": f"{race['runtime']} is the faster",
        "slower": f"{race['versus']} is the faster",
        "same": "both are as fast",
        "inconclusive": "which is faster is inconclusive",
    }[race["verdict"]]
    ratio = f"{race['value']:.2f}x [{race['low']:.2f}, {race['high']:.2f}]"
    sentence = (
        f"Of the runtimes for {race['artifact']}, {said}: "
        f"{race['runtime']} runs at {ratio} the speed of {race['versus']}"
    )
    if race["verdict"] == "faster" and not race["within_budget"]:
        does = "could not be judged" if race["drop"] is None else "do not hold the budget"
        sentence += f", but its outputs {does}"
    elif race["verdict"] == "faster" and (lost := race["drop"]):
        sentence += f", for a drop of {lost['value']:.4f} [{lost['low']:.4f}, {lost['high']:.4f}]"
    return f"{sentence}."


def left(found: Row) -> str:
    """The sentence that says what leaving PyTorch brings."""
    name = {"torch": "PyTorch eager", "torch-compile": "torch.compile"}.get(
        found["runtime"], found["runtime"]
    )

    def said(ratio: Row | None) -> str:
        if ratio is None:
            return "could not be timed"
        bounds = f"{ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        return f"runs at {bounds} its speed ({ratio['verdict']})"

    sentence = f"Against the model in {name}, the baseline {said(found['baseline'])}"
    if found["artifact"] != BASELINE:
        sentence += f" and {found['artifact']} {said(found['best'])}"
    return f"{sentence}."


def judged(
    task: Task,
    targets: Mapping[str, Array],
    outputs: Outputs,
    name: str,
    split: str,
    reference: str = BASELINE,
) -> tuple[Row, Row | None]:
    """The ``accuracy`` and ``fidelity`` fields of one artifact on one split.

    ``{metric: value, ..., "n", "drop"}``, where ``drop`` is against the reference on the same
    examples for the task's metric; a reason where there is nothing. Final rows, those of ``test``,
    have ``drops`` of every metric, and :func:`mcnemar` where an example is right or wrong.
    ``targets`` are those of whole splits, by name. Without data, fidelity is on made-up inputs.
    """
    row = as_run(task, targets, outputs, name, split, reference)
    if row["accuracy"] is None:
        taken = split in outputs.get(name, {})
        why = "its outputs have another shape" if taken else "its outputs could not be taken"
        why = why if task.splits else "no data"
        return {"skipped": why}, row["fidelity"]
    wanted, got = outputs.get(reference, {}).get(split), outputs[name][split]
    final, metrics = split == "test", metrics_of(task)
    asked = metrics if final else {task.metric: metrics[task.metric]}
    lost: dict[str, Row] = {}
    if name == reference:
        lost = {key: dict.fromkeys(("value", "low", "high"), 0.0) for key in asked}
    elif wanted is not None:
        lost = dict(drops(asked, wanted, got, targets[split], task.seed))
    accuracy: Row = {**row["accuracy"], "drop": lost.get(task.metric)}
    if final:
        accuracy["drops"] = {key: each for key, each in lost.items() if key in row["accuracy"]}
        if name != reference and wanted is not None and task.kind in ("classification", "binary"):
            right = (scores(metrics["accuracy"], one, targets[split]) for one in (wanted, got))
            accuracy["mcnemar"] = mcnemar(*(one for one in right if one is not None))
    return accuracy, row["fidelity"]


def as_run(
    task: Task,
    targets: Mapping[str, Array],
    outputs: Outputs,
    name: str,
    split: str,
    reference: str = BASELINE,
) -> Row:
    """``accuracy`` and ``fidelity`` as a measurement has them: no drop, ``None`` for nothing.

    A metric that these outputs do not define, such as ROC AUC where a class is absent, is left out.
    Outputs of another shape than those of the first artifact that has any are not compared.
    """
    on = split if task.splits else "synthetic"
    got, wanted = outputs.get(name, {}).get(on), outputs.get(reference, {}).get(on)
    shape = next((by[on].shape for by in outputs.values() if on in by), None)
    if got is not None and got.shape != shape:
        got = None
    found: Row = {"accuracy": None, "fidelity": None}
    if got is not None and wanted is not None:
        found["fidelity"] = fidelity(task.kind, wanted, got)
    if got is not None and task.splits:
        found["accuracy"] = {
            metric: figure
            for metric, how in metrics_of(task).items()
            if math.isfinite(figure := value(how, got, targets[on]))
        } | {"n": len(got)}
    return found


def within(accuracy: Row, budget: float) -> bool:
    """Whether an ``accuracy`` field holds the budget by its point estimate."""
    lost = accuracy.get("drop")
    return lost is not None and lost["value"] <= budget


def choose(
    task: Task,
    names: Sequence[str],
    primary: Sequence[Row],
    validated: Mapping[str, Row],
    tested: Mapping[str, Row],
    max_drop: float,
    narrowed: Collection[str] = (),
    reference: str = BASELINE,
) -> Choice:
    """The least latency on the primary target within the budget and not slower than ``reference``.

    Those of ``narrowed``, which have fewer bits, must be proven faster.

    ``validated`` chooses, ``tested`` judges; both are accuracy fields by artifact. Where the chosen
    one fails on test, or only the reference qualifies, the reference is recommended.
    """
    measured = {row["artifact"]: row for row in primary if "skipped" not in row}
    others = [name for name in names if name != reference]
    if task.splits is None:
        return Choice(
            reference,
            "Nothing is recommended over the baseline: without data nothing could be recovered "
            "or judged; add --data SPEC.",
            not others,
        )
    if reference not in measured:
        return Choice(
            reference, "Nothing could be measured on the primary target: see below.", False
        )
    if not others:
        return Choice(reference, "Only the baseline was measured: the recipe has no steps.", True)
    versus = "the baseline" if reference == BASELINE else reference
    why: dict[str, str] = {}
    fit: list[str] = []
    for name in others:
        lost = (validated.get(name) or {}).get("drop")
        if name not in measured:
            why[name] = "was not measured"
        elif lost is None:
            why[name] = "was not judged"
        elif not lost["value"] <= max_drop:
            why[name] = f"drops {lost['value']:.4f} on validate"
        elif measured[name]["speedup"]["verdict"] == "slower":
            why[name] = f"is slower ({measured[name]['speedup']['value']:.2f}x)"
        elif name in narrowed and measured[name]["speedup"]["verdict"] != "faster":
            # Fewer bits are a risk that only speed pays for.
            why[name] = f"is not faster beyond noise ({measured[name]['speedup']['value']:.2f}x)"
        else:
            fit.append(name)
    best = min([*fit, reference], key=lambda name: measured[name]["latency_ms"]["p50"])
    held = bool(fit)
    if best != reference:
        lost = tested[best].get("drop")
        if lost is not None and lost["value"] <= max_drop:
            return Choice(best, _praise(task, best, measured[best], lost, max_drop, versus), True)
        held = False
        on_test = "was not judged" if lost is None else f"drops {lost['value']:.4f}"
        why[best] = f"held the budget on validate but {on_test} on test"
    lagging = "is not faster" if best == reference else f"was not chosen: {best} was faster"
    for name in fit:
        why.setdefault(name, f"holds the budget on validate but {lagging}")
    reasons = "; ".join(f"{name} {reason}" for name, reason in why.items())
    return Choice(
        reference,
        f"Nothing is better than {versus} within a drop of {max_drop:g}, so it stays: {reasons}.",
        held,
    )


def _praise(task: Task, best: str, row: Row, lost: Row, max_drop: float, versus: str) -> str:
    ratio = row["speedup"]
    speed = f"{ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    speed += {
        "faster": f" faster than {versus}",
        "same": f", the same speed as {versus}",
        "inconclusive": f" of {versus}'s speed, which is inconclusive",
        "slower": f" of {versus}'s speed",
    }[ratio["verdict"]]
    proven = (
        "the whole interval holds the budget"
        if lost["high"] <= max_drop
        else "the interval reaches past the budget, so that is not proven"
    )
    unit = "" if metrics_of(task)[task.metric].higher_is_better else " (relative)"
    return (
        f"{best} is recommended: {speed}, for a drop in {task.metric}{unit} of {lost['value']:.4f} "
        f"[{lost['low']:.4f}, {lost['high']:.4f}] against a budget of {max_drop:g}; {proven}."
    )


def best_on(rows: Sequence[Row], target: Target, allowed: Sequence[str]) -> str | None:
    """The artifact of ``allowed`` with the least median latency on ``target``, if not slower."""
    here = target.to_json().items()
    fast = [
        row
        for row in rows
        if "skipped" not in row
        and row["artifact"] in allowed
        and here <= row.items()
        and not (row["speedup"] and row["speedup"]["verdict"] == "slower")
    ]
    least = min(fast, key=lambda row: row["latency_ms"]["p50"], default=None)
    return least["artifact"] if least else None
