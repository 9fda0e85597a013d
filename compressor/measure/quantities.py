"""The registry of what is measured of every artifact on every target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from compressor.measure import latency, memory, startup, throughput
from compressor.measure.statistics import Blocks
from compressor.measure.timed import Timed


class Quantity(NamedTuple):
    """Raw values are collected once; the figure in the report is derived from them."""

    unit: str
    collect: Callable[[Timed], Blocks]
    figure: Callable[[Blocks], Any]


QUANTITIES: dict[str, Quantity] = {
    "latency_ms": Quantity("ms", latency.collect, latency.figure),
    "throughput_per_s": Quantity("1/s", throughput.collect, throughput.figure),
    "peak_rss_bytes": Quantity("B", memory.collect, memory.figure),
    "load_ms": Quantity("ms", startup.collect, startup.figure),
}
"""Names are the fields of a measurement in ``report.json``."""
