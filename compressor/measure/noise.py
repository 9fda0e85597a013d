"""Noise, said out loud: what a machine did while something was timed, and what makes it doubtful.

NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from compressor.measure.environment import cores
from compressor.measure.statistics import ENOUGH, Blocks

Conditions = Mapping[str, float | str | None]


class Sign(NamedTuple):
    """When a condition makes times doubtful, and what to do about it."""

    doubtful: Callable[[float], bool]
    remedy: str


SIGNS: dict[str, Sign] = {
    "iqr": Sign(
        lambda share: share > 0.25,
        "spread: the middle half spans over 25% of the median; close other programs",
    ),
    "drift": Sign(
        lambda share: abs(share) > 0.10,
        "drift: the halves differ by over 10%; let the machine settle",
    ),
    "cpu_share": Sign(
        lambda share: share < 0.9,
        "waiting: it had the CPU for less than 90% of the time; close other programs",
    ),
    "switches_per_s": Sign(
        lambda count: count > 100,
        "interrupted: over 100 involuntary switches a second; close other programs or pin the "
        "process to a core of its own",
    ),
    "steal": Sign(
        lambda share: share > 0.02,
        "steal: other guests took over 2% of the CPU's time; use a dedicated machine",
    ),
    "load": Sign(
        lambda count: count > cores() + 0.5,
        "load: more processes than cores wanted the CPU in the minute before; close other programs",
    ),
}
"""By the field of ``conditions`` in ``report.json``."""

SLOW_GOVERNORS = ("powersave", "conservative", "ondemand", "schedutil")


def conditions(blocks: Blocks, processes: tuple[int, ...] = ()) -> dict[str, float | None]:
    """``iqr``: the middle half over the median of all values; ``drift``: how much the second half
    of the rounds is above the first, the worst of the ``processes``, ``None`` for few rounds."""
    values = np.concatenate([np.asarray(block, dtype=float) for block in blocks])
    low, middle, high = np.percentile(values, [25, 50, 75])
    medians = np.array([np.median(block) for block in blocks])
    drifts = []
    for part in np.split(medians, np.cumsum(processes)[:-1].astype(int)):
        half = len(part) // 2
        if half >= 2:
            drifts.append(float(np.median(part[half:]) / np.median(part[:half]) - 1))
    return {
        "iqr": float((high - low) / middle),
        "drift": max(drifts, key=abs, default=None),
    }


def flags(found: Conditions, count: int) -> list[str]:
    """What makes ``count`` times doubtful, each with its remedy; empty when nothing does."""
    said = [
        sign.remedy
        for name, sign in SIGNS.items()
        if isinstance(value := found.get(name), int | float) and sign.doubtful(value)
    ]
    if found.get("governor") in SLOW_GOVERNORS:
        said.append(
            f"governor: {found['governor']} changes the clock while timing; set it to performance"
        )
    if count < ENOUGH["p90"]:
        said.append("few samples; give it longer with --bench-time normal or full")
    return said
