"""What the measurements say: drops, speed-ups, budgets, and the one artifact to recommend.

The best is chosen on the validation split and judged on the test split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.measure.fidelity import fidelity
from compressor.measure.protocol import CONTROL, Observed
from compressor.measure.quantities import QUANTITIES
from compressor.measure.statistics import Blocks, drop, noise_flags, noise_floor, speedup, verdict
from compressor.measurement import Measurement, Target
from compressor.metrics import METRICS
from compressor.recipe import BASELINE
from compressor.task import Array, Splits, Task

Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """The recommended artifact and the sentence that says why; ``held`` is the budget's fate."""

    best: str
    sentence: str
    held: bool


def rows(observed: Observed, target: Target, task: Task, primary: bool) -> list[Row]:
    """One row of ``report.json``'s measurements for every artifact on this target."""
    by_artifact: dict[str, dict[str, Measurement]] = {}
    for one in observed.measurements:
        by_artifact.setdefault(one.artifact, {})[one.quantity] = one
    reference = by_artifact.get(BASELINE, {}).get("latency_ms")
    floor = floor_of(by_artifact)
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
            row[quantity] = QUANTITIES[quantity].figure(measurement.values)
        blocks = quantities["latency_ms"].values
        row["primary"] = primary
        row["speedup"] = _speedup(name, reference, blocks, floor, task.seed)
        row["noise"] = noise_flags(blocks)
        row["accuracy"], row["fidelity"] = None, None
        found.append(row)
    return found


def floor_of(by_artifact: Mapping[str, Mapping[str, Measurement]]) -> float | None:
    """The noise floor: the baseline against its control; ``None`` where one of them is missing."""
    both = [by_artifact.get(name, {}).get("latency_ms") for name in (BASELINE, CONTROL)]
    if any(one is None or one.skipped for one in both):
        return None
    first, second = (one.values for one in both if one is not None)
    return noise_floor(first, second)


def _speedup(
    name: str, reference: Measurement | None, blocks: Blocks, floor: float | None, seed: int
) -> Row | None:
    if reference is None or reference.skipped:
        return None
    if name == BASELINE:
        ratio = {"value": 1.0, "low": 1.0, "high": 1.0}
        return {"versus": BASELINE, **ratio, "verdict": "same"}
    ratio = speedup(reference.values, blocks, seed)
    said = verdict(ratio["low"], ratio["high"], floor or 0.0)
    return {"versus": BASELINE, **ratio, "verdict": said}


def judged(task: Task, outputs: Mapping[str, Mapping[str, Array]], name: str, split: str) -> Row:
    """``{metric: value, ..., "n", "drop"}`` of one artifact on one split.

    ``drop`` is against the baseline on the same examples, for the task's metric.
    """
    targets = targets_of(task, split)
    found: Row = {}
    for metric, how in METRICS[task.kind].items():
        found[metric] = float(how.score(outputs[name][split], targets).mean())
    how = METRICS[task.kind][task.metric]
    found["n"] = len(targets)
    if BASELINE not in outputs:
        return {**found, "drop": None}
    scores = [how.score(outputs[one][split], targets) for one in (BASELINE, name)]
    lost = drop(*scores, higher_is_better=how.higher_is_better, seed=task.seed)
    if name == BASELINE:
        lost = {"value": 0.0, "low": 0.0, "high": 0.0}
    return {**found, "drop": lost}


def targets_of(task: Task, split: str) -> Array:
    """The targets of a whole split, shape ``(n, ...)``."""
    assert isinstance(task.splits, Splits)
    return np.concatenate([targets for _, targets in getattr(task.splits, split).batches(4096)])


def accuracy_and_fidelity(
    task: Task, outputs: Mapping[str, Mapping[str, Array]], name: str, split: str
) -> tuple[Row, Row | None]:
    """An artifact's ``accuracy`` and ``fidelity`` fields; a reason where there is nothing."""
    if name not in outputs or split not in outputs[name]:
        return {"skipped": "its outputs could not be taken"}, None
    near = None
    if BASELINE in outputs:
        near = fidelity(task.kind, outputs[BASELINE][split], outputs[name][split])
    if task.splits is None:
        return {"skipped": "no data"}, near
    return judged(task, outputs, name, split), near


def choose(
    task: Task,
    names: Sequence[str],
    primary: Sequence[Row],
    validated: Mapping[str, Row],
    tested: Mapping[str, Row],
    max_drop: float,
) -> Choice:
    """The least latency on the primary target within the budget and not slower than baseline.

    ``validated`` chooses, ``tested`` judges; both are accuracy fields by artifact. Where the chosen
    one fails on test, or only the baseline qualifies, the baseline is recommended.
    """
    measured = {row["artifact"]: row for row in primary if "skipped" not in row}
    others = [name for name in names if name != BASELINE]
    if task.splits is None:
        return Choice(
            BASELINE,
            "Nothing is recommended over the baseline: without data nothing could be recovered "
            "or judged; add --data SPEC.",
            not others,
        )
    if BASELINE not in measured:
        return Choice(
            BASELINE, "Nothing could be measured on the primary target: see below.", False
        )
    if not others:
        return Choice(BASELINE, "Only the baseline was measured: the recipe has no steps.", True)
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
        else:
            fit.append(name)
    fit.sort(key=lambda name: measured[name]["latency_ms"]["p50"])
    if fit and measured[fit[0]]["latency_ms"]["p50"] <= measured[BASELINE]["latency_ms"]["p50"]:
        best = fit[0]
        lost = tested[best]["drop"]
        if lost["value"] <= max_drop:
            return Choice(best, _praise(task, best, measured[best], lost, max_drop), True)
        why[best] = f"held the budget on validate but drops {lost['value']:.4f} on test"
    for name in fit:
        why.setdefault(name, "is not faster than the baseline")
    reasons = "; ".join(f"{name} {reason}" for name, reason in why.items())
    return Choice(
        BASELINE,
        f"The baseline stays: nothing is better within a drop of {max_drop:g}: {reasons}.",
        False,
    )


def _praise(task: Task, best: str, row: Row, lost: Row, max_drop: float) -> str:
    ratio = row["speedup"]
    speed = f"{ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    speed += {
        "faster": " faster than the baseline",
        "same": ", the same speed as the baseline",
        "inconclusive": " of the baseline's speed, which is inconclusive",
        "slower": " of the baseline's speed",
    }[ratio["verdict"]]
    proven = (
        "the whole interval holds the budget"
        if lost["high"] <= max_drop
        else "the interval reaches past the budget, so that is not proven"
    )
    unit = "" if METRICS[task.kind][task.metric].higher_is_better else " (relative)"
    return (
        f"{best} is recommended: {speed}, with a {task.metric} drop{unit} of {lost['value']:.4f} "
        f"[{lost['low']:.4f}, {lost['high']:.4f}] against a budget of {max_drop:g}; {proven}."
    )


def best_on(found: Sequence[Row], allowed: Sequence[str]) -> str | None:
    """The artifact of ``allowed`` with the least median latency among these rows."""
    fast = [row for row in found if "skipped" not in row and row["artifact"] in allowed]
    fast = [row for row in fast if not row["speedup"] or row["speedup"]["verdict"] != "slower"]
    least = min(fast, key=lambda row: row["latency_ms"]["p50"], default=None)
    return least["artifact"] if least else None


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
