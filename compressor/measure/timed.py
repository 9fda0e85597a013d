"""One artifact in its worker, with the blocks that were timed so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from compressor.measure.process import Worker
from compressor.measure.statistics import Blocks
from compressor.measurement import Target


@dataclass
class Timed:
    """What the quantities are collected from; ``blocks`` are the worker's answers, in order."""

    artifact: str
    target: Target
    worker: Worker
    path: Path
    loaded: Mapping[str, Any]
    """The worker's answer to loading it."""
    first_ms: float
    calls: int = 1
    warmup: int = 0
    vram: int | None = None
    """Bytes of the GPU's memory, read before the next worker starts."""
    blocks: list[dict[str, Any]] = field(default_factory=list)
    medians: list[tuple[float]] = field(default_factory=list)
    """Of each block, in nanoseconds."""
    collected: dict[str, Blocks | str] = field(default_factory=dict)
    """Raw values of each quantity, or why there are none."""

    @cached_property
    def memory(self) -> dict[str, Any]:
        """The worker's answer about its memory, asked for once: after timing."""
        return self.worker.ask("memory")

    def add(self, block: dict[str, Any]) -> None:
        """One more block."""
        self.blocks.append(block)
        self.medians.append((float(np.median(block["ns"])),))
