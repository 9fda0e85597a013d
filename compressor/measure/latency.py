"""Latency: milliseconds of each call, one after the other."""

from __future__ import annotations

from typing import Any

from compressor.measure.statistics import Blocks, summary
from compressor.measure.timed import Timed


def collect(timed: Timed) -> Blocks:
    """Milliseconds per call, block by block."""
    return [[ns / 1e6 for ns in block["ns"]] for block in timed.blocks]


def figure(blocks: Blocks) -> dict[str, Any]:
    """Minimum, percentiles and mean in milliseconds."""
    return summary(blocks)
