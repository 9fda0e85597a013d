"""The way down from the dense model to one that costs a named fraction of it, and where to stop.

A search walks down from the dense model and from plain ratios, one rung of one group's ladder at a
time, always the rung that damages least for what it saves. Damage comes from the work and the
sensitivity of a group, savings from what layers cost. With the time of layers the cut goes where
time is, which is not where MACs are. Where on this way the target lies is then found with the real
quantity of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from compressor.stages.prune.group import Group
from compressor.stages.prune.ranking import least
from compressor.stages.prune.rounding import kept, ladder
from compressor.stages.prune.sensitivity import Damage
from compressor.stages.prune.targets import Costs, Counts

AHEAD = 6
"""Rungs that the search looks down: kernels step, so that the next rung alone may save nothing and
the one after it a lot."""

RATIOS = tuple(step / 20 for step in range(19))
STARTS = (0.0, 0.2, 0.4, 0.6, 0.8)
"""Plain ratios whose states are looked at, and those from which a walk starts."""

WORTH = 1e-3
"""Of the whole model's cost: what a rung has to save."""

NEAR = 0.05
"""A latency this near to the target, relative to it, is there."""

TRIES = 5
"""Models that are exported and measured on the way to a target ..."""

MOST = 9
"""... and where none of them is near, with the neighbours of the nearest."""

BEYOND = 0.6
"""Of the goal: how far below it, by prediction, a walk goes."""


class Walk(NamedTuple):
    """States from the dense one on, and the fraction of its cost that each is predicted to have."""

    states: list[Counts]
    predicted: list[float]

    def before(self, counts: Counts) -> Counts:
        """The state before this one; the dense one has none and stays."""
        return self.states[max(self.states.index(counts) - 1, 0)]


def walk(costs: Costs, damages: Sequence[Damage], floor: float, goal: float) -> Walk:
    """The way down: each state costs less than the one before, and no state that was seen damages
    less for at most its cost.

    Seen are the states of plain ratios and, from some of them, those of a walk that takes the
    cheapest rung of all groups again and again. One walk alone gets stuck where two groups have to
    shrink together before anything is saved. Walks go a good way beyond the goal, since the
    prediction may be off, and end where no group has a rung left that saves anything.
    """
    groups = costs.groups
    dense: Counts = tuple(group.width for group in groups)
    whole = costs.whole(dense)
    seen = {dense: 1.0}
    for ratio in RATIOS:
        start: Counts = tuple(
            max(least(group, floor), kept(group.width, ratio, group.each)) for group in groups
        )
        seen[start] = costs.whole(start) / whole
        if ratio in STARTS:
            seen |= _down(costs, damages, floor, goal, start, whole)
    front: list[tuple[float, Counts]] = []
    lowest = math.inf
    for predicted, damage, counts in sorted(
        (predicted, _total(damages, groups, counts), counts) for counts, predicted in seen.items()
    ):
        if predicted <= 1 and damage < lowest:
            lowest = damage
            front.append((predicted, counts))
    front.reverse()
    return Walk([counts for _, counts in front], [predicted for predicted, _ in front])


def _total(damages: Sequence[Damage], groups: Sequence[Group], counts: Counts) -> float:
    return sum(
        damage(1 - count / group.width)
        for damage, group, count in zip(damages, groups, counts, strict=True)
    )


def _down(
    costs: Costs,
    damages: Sequence[Damage],
    floor: float,
    goal: float,
    counts: Counts,
    whole: float,
) -> dict[Counts, float]:
    """The states of one walk and what they cost, as fractions of ``whole``."""
    ladders = [ladder(group.width, least(group, floor), group.each) for group in costs.groups]
    total = costs.whole(counts)
    seen: dict[Counts, float] = {}
    offers: dict[int, Offer | None] = {}
    while total > whole * goal * BEYOND:
        for at, steps in enumerate(ladders):
            if at not in offers:
                near = [counts[at], *(count for count in steps if count < counts[at])]
                offers[at] = _offer(costs, damages[at], counts, at, near[: 1 + AHEAD], whole)
        open_now = [(offer, at) for at, offer in offers.items() if offer]
        if not open_now:
            break
        taken, at = min(open_now)
        total -= taken.saved
        counts = (*counts[:at], taken.units, *counts[at + 1 :])
        seen[counts] = total / whole
        changed = set(costs.groups[at].layers)
        offers = {
            other: found
            for other, found in offers.items()
            if not changed & set(costs.groups[other].layers)
        }
    return seen


class Offer(NamedTuple):
    """Going down to so many ``units`` in one group: the damage for what is saved, and that."""

    price: float
    units: int
    saved: float


def _offer(
    costs: Costs, damage: Damage, counts: Counts, at: int, near: Sequence[int], whole: float
) -> Offer | None:
    """The cheapest of the next rungs; ``None`` where none saves anything."""
    tried = [(*counts[:at], count, *counts[at + 1 :]) for count in near]
    now, *later = costs.cost(costs.groups[at].layers, tried)
    width = costs.groups[at].width
    already = damage(1 - near[0] / width)
    offers = [
        Offer((damage(1 - count / width) - already) / (now - cost), count, now - cost)
        for count, cost in zip(near[1:], later, strict=True)
        if now - cost > WORTH * whole
    ]
    return min(offers, default=None)


class Landing(NamedTuple):
    """Where the search ended: the counts, the fraction of the original that they really cost, all
    that were tried as ``(predicted, real)``, and what is wrong when the target is out of reach."""

    counts: Counts
    reached: float
    tried: list[tuple[float, float]]
    unreached: str


def land(way: Walk, real: Callable[[Counts], float], goal: float, *, exact: bool) -> Landing:
    """The state whose real cost is the goal: the first that is at most it where the quantity is
    ``exact``, else the nearest.

    An exact quantity is found by halving. A measured one is found by correcting the prediction with
    what was measured; where no state is near enough, the neighbours of the nearest are measured,
    and the first that is below the goal is taken: kernels step, and the walk went there because it
    is cheap.
    """
    seen: dict[int, float] = {0: 1.0}
    last = len(way.states) - 1

    def look(at: int) -> float:
        if at not in seen:
            seen[at] = real(way.states[at])
        return seen[at]

    if exact:
        low, high = 0, last
        if look(high) <= goal:
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if look(middle) > goal else (low, middle)
        found = high
    else:
        for _ in range(TRIES):
            at = next((at for at in range(1, last + 1) if _likely(way, seen, at) <= goal), last)
            if at in seen or abs(look(at) - goal) <= NEAR * goal / 2:
                break
        found = _nearest(seen, goal)
        while abs(seen[found] - goal) > NEAR * goal and len(seen) <= MOST:
            beside = [at for at in (found - 1, found + 1) if 0 < at <= last and at not in seen]
            if not beside:
                break
            for at in beside:
                look(at)
            found = _nearest(seen, goal)
        below = [at for at in seen if seen[at] <= goal]
        if abs(seen[found] - goal) > NEAR * goal and below:
            found = min(below)
    tried = [(way.predicted[at], seen[at]) for at in sorted(seen)]
    unreached = ""
    if min(seen.values()) > goal * (1 if exact else 1 + NEAR):
        unreached = f"{seen[found]:.3f} of the original is the least that was reached"
    return Landing(way.states[found], seen[found], tried, unreached)


def closer(costs: Costs, above: Counts, floor: float, goal: float) -> Counts | None:
    """One rung from the last state above the goal to the state that is nearest below it.

    The rung that the walk took is the cheapest in damage, and may go far beyond the goal; this is
    the smallest that reaches it. ``None`` where no single rung does.
    """
    whole = costs.whole(tuple(group.width for group in costs.groups))
    now = costs.whole(above)
    best: tuple[float, Counts] | None = None
    for at, group in enumerate(costs.groups):
        lower = [
            count
            for count in ladder(group.width, least(group, floor), group.each)
            if count < above[at]
        ]
        tried = [above, *((*above[:at], count, *above[at + 1 :]) for count in lower)]
        here, *others = costs.cost(group.layers, tried)
        for counts, cost in zip(tried[1:], others, strict=True):
            share = (now - here + cost) / whole
            if share <= goal and (best is None or share > best[0]):
                best = share, counts
    return best and best[1]


def _nearest(seen: dict[int, float], goal: float) -> int:
    """Of the states that were looked at, the dense one only where there is no other."""
    return min((at for at in seen if at or len(seen) == 1), key=lambda at: abs(seen[at] - goal))


def _likely(way: Walk, seen: dict[int, float], at: int) -> float:
    """The real cost of a state, from those that are known: straight lines between them, and beyond
    the last in proportion."""
    known = sorted(seen)
    if at > known[-1]:
        return seen[known[-1]] * way.predicted[at] / way.predicted[known[-1]]
    # np.interp wants rising positions, and costs fall along the way.
    positions = [way.predicted[each] for each in reversed(known)]
    return float(np.interp(way.predicted[at], positions, [seen[each] for each in reversed(known)]))
