"""The registry of what is measured of every artifact on every target.

Raw values are collected once; the figure in the report is derived from them. Names are the fields
of a measurement in ``report.json``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from compressor.measure.statistics import Blocks, summary
from compressor.measure.timed import Timed
from compressor.measurement import GPUS


class Quantity(NamedTuple):
    """``collect`` gives the values of one start of the worker, or the reason why there are none."""

    unit: str
    collect: Callable[[Timed], Blocks | str]
    figure: Callable[[Blocks], Any]


def latency(run: Timed) -> Blocks:
    """Milliseconds of each call, block by block."""
    return [[ns / 1e6 for ns in block["ns"]] for block in run.blocks]


def throughput(run: Timed) -> Blocks:
    """Examples per second of a closed loop: of each block, from its first start to its last end."""
    batch = run.target.batch
    return [[batch * len(block["ns"]) / (block["elapsed_ns"] / 1e9)] for block in run.blocks]


def processor(run: Timed) -> Blocks:
    """Milliseconds of CPU time of one call, of all threads together: a mean for each block."""
    return [[block["cpu_ns"] / 1e6 / len(block["ns"])] for block in run.blocks]


def energy(run: Timed) -> Blocks | str:
    """Millijoules of one call: what all of the CPU's packages, or the GPU, drew in a stretch of
    calls without a pause. Their counters are too slow for a block."""
    found = run.worker.ask("draw", ms=STRETCH)["energy_mj"]
    return "no counter of energy (RAPL or NVML) can be read here" if found is None else [[found]]


def interruptions(run: Timed) -> Blocks:
    """Involuntary context switches a second, of each block: others wanted the core."""
    return [[block["switches"] / (block["elapsed_ns"] / 1e9)] for block in run.blocks]


def startup(run: Timed) -> Blocks:
    """Milliseconds from the file to a session, in a process that had loaded nothing before."""
    return [[run.loaded["load_ms"]]]


def first(run: Timed) -> Blocks:
    """Milliseconds of the first call, which allocates and may compile."""
    return [[run.first_ms]]


def memory(run: Timed) -> Blocks:
    """Bytes: the largest resident set of the process up to the end of timing."""
    return [[float(run.memory["peak_rss_bytes"])]]


def loading(run: Timed) -> Blocks:
    """Bytes: the largest resident set up to the end of loading, the runtime itself included."""
    return [[float(run.loaded["peak_rss_bytes"])]]


def running(run: Timed) -> Blocks | str:
    """Bytes: the largest resident set from the end of loading to the end of timing."""
    if run.memory["run_rss_bytes"] is None:
        return "the high-water mark cannot be set back here (it can on Linux)"
    return [[float(run.memory["run_rss_bytes"])]]


def video(run: Timed) -> Blocks | str:
    """Bytes of device memory that the process holds once it is warm, as NVML counts them."""
    if run.target.provider not in GPUS:
        return "not on a GPU of NVIDIA"
    found = run.vram
    return "NVML says nothing of this process" if found is None else [[float(found)]]


def device(run: Timed) -> Blocks | str:
    """Milliseconds of each call with inputs and outputs bound to the device and synchronised: no
    copies between host and device."""
    if run.target.runtime != "onnxruntime" or run.target.provider not in GPUS:
        return "not onnxruntime on a GPU of NVIDIA"
    answers = [run.worker.ask("bound", calls=run.calls) for _ in range(BOUND)]
    return [[ns / 1e6 for ns in answer["ns"]] for answer in answers]


STRETCH = 1500.0
"""Milliseconds of calls for energy: NVML's counter moves a few times a second."""

BOUND = 16
"""Blocks that are timed device-bound."""


def median(blocks: Blocks) -> float:
    """Over all values."""
    return statistics.median(value for block in blocks for value in block)


def mean(blocks: Blocks) -> float:
    """Over all values: for counters too coarse for the median of a block."""
    return statistics.fmean(value for block in blocks for value in block)


def largest(blocks: Blocks) -> int:
    """Of all values."""
    return int(max(value for block in blocks for value in block))


QUANTITIES: dict[str, Quantity] = {
    "latency_ms": Quantity("ms", latency, summary),
    "throughput_per_s": Quantity("1/s", throughput, median),
    "peak_rss_bytes": Quantity("B", memory, largest),
    "load_ms": Quantity("ms", startup, median),
    "first_ms": Quantity("ms", first, median),
    "cpu_ms": Quantity("ms", processor, mean),
    "switches_per_s": Quantity("1/s", interruptions, mean),
    "peak_load_bytes": Quantity("B", loading, largest),
    "peak_run_bytes": Quantity("B", running, largest),
    "vram_bytes": Quantity("B", video, largest),
    "energy_mj": Quantity("mJ", energy, mean),
    "device_ms": Quantity("ms", device, median),
}
