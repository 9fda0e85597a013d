"""Peak memory: the kernel's high-water mark of the worker's resident set, in bytes."""

from __future__ import annotations

from compressor.measure.statistics import Blocks
from compressor.measure.timed import Timed


def collect(timed: Timed) -> Blocks:
    """The high-water mark after loading and timing, before any other work in that process."""
    return [[float(timed.worker.ask("memory")["peak_rss_bytes"])]]


def figure(blocks: Blocks) -> int:
    """The largest."""
    return int(max(value for block in blocks for value in block))
