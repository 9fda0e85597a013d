"""Channel counts that the kernels of the target like."""

from __future__ import annotations

import math

MULTIPLES = (16, 8, 4, 1)
"""fp32 kernels step every 16 channels, int8 kernels every 4."""

RUNGS = 16
"""Of a search's ladder, at most."""

SLACK = 0.1
"""How far rounding may move a layer's ratio."""


def kept(width: int, ratio: float, each: int = 1) -> int:
    """How many of ``width`` units stay when ``ratio`` of them should go.

    A unit is ``each`` channels. The count of channels is rounded to the largest of 16, 8, 4, 1 that
    moves the ratio by at most 0.1; ties keep more. At least one unit stays.

    >>> kept(64, 0.5), kept(24, 0.5), kept(10, 0.5), kept(40, 0.5), kept(16, 0.5, each=4)
    (32, 12, 4, 16, 8)
    """
    wanted = width * (1 - ratio)
    for multiple in MULTIPLES:
        step = multiple // math.gcd(multiple, each)
        # Half-way goes up: floor(x + 1/2) keeps more, where there are more to keep.
        count = max(1, int(wanted / step + 0.5 + 1e-9)) * step
        if count > width:
            count -= step
        if count and abs(count - wanted) <= SLACK * width + 1e-9:
            return count
    return max(1, int(wanted + 0.5))


def ladder(width: int, least: int, each: int = 1) -> list[int]:
    """The counts that a search tries, from ``width`` down to ``least`` or the next above it.

    Steps are multiples of the largest of 16, 8, 4, 1 channels that is at most an eighth of the
    width, since counts that are not rounded give back the time that they save; and at least a
    sixteenth of the width, which is near enough to a target.

    >>> ladder(64, 7), ladder(10, 1), len(ladder(1280, 1))
    ([64, 56, 48, 40, 32, 24, 16, 8], [10, 9, 8, 7, 6, 5, 4, 3, 2, 1], 16)
    """
    multiple = next((m for m in MULTIPLES if 8 * m <= width * each), 1)
    step = multiple // math.gcd(multiple, each)
    step *= max(1, math.ceil(width / RUNGS / step))
    lower = range(width - 1, max(least, 1) - 1, -1)
    return [width, *(count for count in lower if count % step == 0)]
