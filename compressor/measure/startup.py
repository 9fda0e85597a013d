"""Start-up: milliseconds from the file to a session that is ready to predict."""

from __future__ import annotations

import statistics

from compressor.measure.statistics import Blocks
from compressor.measure.timed import Timed


def collect(timed: Timed) -> Blocks:
    """One load, in a process that had loaded nothing before."""
    return [[timed.load_ms]]


def figure(blocks: Blocks) -> float:
    """Median over the loads."""
    return statistics.median(value for block in blocks for value in block)
