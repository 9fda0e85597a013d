"""Fidelity: how near a compressed model's outputs are to the original's, labels or not."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.task import Kind


def fidelity(kind: Kind, reference: NDArray[Any], outputs: NDArray[Any]) -> dict[str, Any]:
    """How near ``outputs`` are to the original's, shapes alike, first axis the example.

    ``sqnr_db`` is the signal-to-quantization-noise ratio, ``None`` where nothing differs.
    ``top1_agreement`` is the share of equal decisions, ``None`` where the task decides nothing.
    """
    wanted, got = reference.astype(np.float64), outputs.astype(np.float64)
    noise = float(((wanted - got) ** 2).sum())
    signal = float((wanted**2).sum())
    agreement: float | None = None
    if kind in ("classification", "segmentation"):
        agreement = float((wanted.argmax(axis=1) == got.argmax(axis=1)).mean())
    elif kind in ("binary", "multilabel"):
        agreement = float(((wanted > 0) == (got > 0)).mean())
    return {
        "sqnr_db": 10 * float(np.log10(signal / noise)) if noise and signal else None,
        "top1_agreement": agreement,
        "max_abs_diff": float(np.abs(wanted - got).max()),
        "n": len(wanted),
    }
