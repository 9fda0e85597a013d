"""Fidelity: how near a compressed model's outputs are to the original's, labels or not."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.task import Kind

FLOOR_DB = -100.0
"""The least ``sqnr_db``: worse does not matter, and a signal of zeros has no ratio to its noise."""


def fidelity(kind: Kind, reference: NDArray[Any], outputs: NDArray[Any]) -> dict[str, Any]:
    """How near ``outputs`` are to the original's, shapes alike, first axis the example.

    ``sqnr_db`` is the signal-to-quantization-noise ratio, ``None`` where nothing differs and never
    below :data:`FLOOR_DB`. ``top1_agreement`` is the share of equal decisions, ``None`` where the
    task decides nothing. Every number is finite. Raises ``ValueError`` when the shapes differ.
    """
    if reference.shape != outputs.shape:
        raise ValueError(f"outputs of the same examples: {reference.shape} and {outputs.shape}")
    wanted, got = reference.astype(np.float64), outputs.astype(np.float64)
    apart = wanted - got
    sqnr: float | None = None
    if apart.any():
        sqnr = max(_decibels(wanted) - _decibels(apart), FLOOR_DB) if wanted.any() else FLOOR_DB
    agreement: float | None = None
    if kind in ("classification", "segmentation"):
        agreement = float((wanted.argmax(axis=1) == got.argmax(axis=1)).mean())
    elif kind in ("binary", "multilabel"):
        agreement = float(((wanted > 0) == (got > 0)).mean())
    return {
        "sqnr_db": sqnr,
        "top1_agreement": agreement,
        "max_abs_diff": float(np.abs(apart).max()),
        "n": len(wanted),
    }


def _decibels(values: NDArray[np.float64]) -> float:
    """The power of values that are not all 0; scaled first, since squares overflow."""
    largest = float(np.abs(values).max())
    return 20 * float(np.log10(largest) + np.log10(np.linalg.norm((values / largest).ravel())))
