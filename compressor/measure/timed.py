"""One artifact in its worker, with the blocks that were timed so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from compressor.measure.process import Worker
from compressor.measurement import Target


@dataclass
class Timed:
    """What the quantities are collected from; ``blocks`` are the worker's answers, in order."""

    artifact: str
    target: Target
    worker: Worker
    load_ms: float
    session: dict[str, Any] = field(default_factory=dict)
    """The settings that it was opened with and the optimizers that were left out."""
    calls: int = 1
    warmup: int = 0
    blocks: list[dict[str, Any]] = field(default_factory=list)
