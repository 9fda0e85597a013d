"""Channel counts that the kernels of the target like."""

from __future__ import annotations

MULTIPLES = (16, 8, 4, 1)
"""fp32 kernels step every 16 channels, int8 kernels every 4."""

SLACK = 0.1
"""How far rounding may move a layer's ratio."""


def kept(width: int, ratio: float) -> int:
    """How many of ``width`` channels stay when ``ratio`` of them should go.

    The count is rounded to the largest of 16, 8, 4, 1 that moves the ratio by at most 0.1; ties
    keep more. At least one channel stays.

    >>> kept(64, 0.5), kept(24, 0.5), kept(10, 0.5), kept(40, 0.5)
    (32, 12, 4, 16)
    """
    wanted = width * (1 - ratio)
    for multiple in MULTIPLES:
        # Half-way goes up: floor(x + 1/2) keeps more, where there are more to keep.
        count = max(1, int(wanted / multiple + 0.5 + 1e-9)) * multiple
        if count > width:
            count -= multiple
        if count and abs(count - wanted) <= SLACK * width + 1e-9:
            return count
    return max(1, int(wanted + 0.5))
