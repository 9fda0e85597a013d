"""Throughput: examples per second of a closed loop, measured over whole blocks."""

from __future__ import annotations

import statistics

from compressor.measure.statistics import Blocks
from compressor.measure.timed import Timed


def collect(timed: Timed) -> Blocks:
    """Examples per second of each block, from its first start to its last end."""
    batch = timed.target.batch
    return [[batch * len(block["ns"]) / (block["elapsed_ns"] / 1e9)] for block in timed.blocks]


def figure(blocks: Blocks) -> float:
    """Median over the blocks."""
    return statistics.median(value for block in blocks for value in block)
