"""The accuracy budget: which layers go back to float so that it holds, the cheapest first.

Layers are ranked by the noise that they add alone for each millisecond that float costs; how many
of them have to go is found by bisection, since one after the other would take as many validations
as there are layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Drop = Callable[[frozenset[str]], float]
"""Accuracy lost with these layers in float."""

Keep = Callable[[frozenset[str], float], None]
"""Called with every better answer as soon as it is known."""


def ranked(noise: Mapping[str, float], cost: Mapping[str, float]) -> list[str]:
    """Layers by the noise power that leaving each in float removes per millisecond it costs.

    ``cost`` may be 0 or negative where float is as fast: such layers come first.
    """
    least = max([*cost.values(), 1e-9]) * 1e-3
    return sorted(noise, key=lambda name: -noise[name] / max(cost.get(name, least), least))


def returned(
    ranking: Sequence[str],
    drop: Drop,
    budget: float,
    keep: Keep,
    late: Callable[[], bool] = lambda: False,
) -> tuple[frozenset[str], float]:
    """The layers of ``ranking`` that stay float so that ``drop`` is at most ``budget``, and the
    drop that is left; the best that was found where it cannot be held or it is ``late``.

    At most ``2 log2(n) + 6`` drops are taken.
    """
    best: frozenset[str] = frozenset()
    least = drop(best)
    keep(best, least)
    if least <= budget or not ranking:
        return best, least

    def better(left: frozenset[str]) -> bool:
        """Takes the drop with ``left`` in float; whether the budget holds."""
        nonlocal best, least
        lost = drop(left)
        holds = lost <= budget
        if (holds and (least > budget or len(left) < len(best))) or lost < least > budget:
            best, least = left, lost
            keep(best, least)
        return holds

    low, high = 0, len(ranking)  # with `low` the budget does not hold, with `high` it may
    size = 1
    while size < high and not late():  # few layers are usually enough: look there first
        if better(frozenset(ranking[:size])):
            high = size
            break
        low, size = size, size * 2
    else:
        if late() or not better(frozenset(ranking)):
            return best, least
    while high - low > 1 and not late():
        middle = (low + high) // 2
        if better(frozenset(ranking[:middle])):
            high = middle
        else:
            low = middle
    # What came first for the noise of others may not be needed. The last layer is: without it the
    # budget did not hold.
    for parts in (2, 4):
        order = [name for name in ranking if name in best]
        size = -(-len(order) // parts)
        for start in range(0, len(order) - size, size) if least <= budget else ():
            if not late():
                better(best - set(order[start : start + size]))
    return best, least
