"""The search for the widths at which a model costs what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from compressor.loading.edits import Edit
from compressor.measure.costs import Dtype
from compressor.stages.prune.criteria import scored
from compressor.stages.prune.group import Cut, Group
from compressor.stages.prune.ranking import chosen, least
from compressor.stages.prune.rounding import ladder
from compressor.stages.prune.sensitivity import Damage, curves, damages
from compressor.stages.prune.sound import Sound
from compressor.stages.prune.targets import Costs, Counts, Quantity, price_of, real_of
from compressor.stages.prune.way import Landing, closer, land, walk
from compressor.task import Task


class Search(NamedTuple):
    """What is asked for, and what decides on the way to it."""

    quantity: Quantity
    amount: float
    dtype: Dtype
    criterion: str
    floor: float


class Refused(Exception):
    """A state on the way is not sound: these layers, with the reason, have to be left alone."""

    def __init__(self, left: Mapping[str, str]) -> None:
        super().__init__(dict(left))
        self.left = left


def searched(
    what: Search,
    sound: Sound,
    groups: Sequence[Group],
    before: Sequence[Edit],
    task: Task,
    left: dict[str, str],
) -> tuple[dict[str, int], dict[str, Any]]:
    """The units that each group keeps, and the facts of the search.

    Every state whose cost is taken is proven first; a group that is refused goes to ``left``, and
    the search begins again without it.
    """
    roots = [group.root for group in groups]
    scores = dict(zip(roots, scored(sound.model, groups, task, what.criterion), strict=True))

    def cuts(groups: Sequence[Group], counts: Sequence[int]) -> list[Cut]:
        return [
            chosen(group, scores[group.root], count)
            for group, count in zip(groups, counts, strict=True)
            if count < group.width
        ]

    lowest = [ladder(group.width, least(group, what.floor), group.each)[-1] for group in groups]
    holding = {cut.group.root for cut in sound.most(cuts(groups, lowest), left).cuts}
    groups = [group for group in groups if group.root in holding]
    found = curves(sound.model, groups, [scores[group.root] for group in groups], task)
    damage = dict(
        zip(
            (group.root for group in groups),
            damages(found, _work(sound, groups, task)),
            strict=True,
        )
    )
    with (
        price_of(what.quantity, task, what.dtype) as price,
        real_of(what.quantity, sound.dense, before, task, what.dtype) as real,
    ):
        while groups:
            costs = Costs(sound.model, groups, task, price)

            def cost(counts: Counts, groups: Sequence[Group] = groups) -> float:
                refused: dict[str, str] = {}
                proven = sound.most(cuts(groups, counts), refused)
                if refused:
                    raise Refused(refused)
                return real(proven.edits)

            try:
                landed = _landed(what, costs, [damage[group.root] for group in groups], cost)
            except Refused as error:
                left |= error.left
                groups = [group for group in groups if group.root not in error.left]
                continue
            goals = dict(zip((group.root for group in groups), landed.counts, strict=True))
            said = f"{what.quantity}={what.amount:g}: {landed.unreached}"
            return goals, {
                f"{what.quantity}_reached": landed.reached,
                "tried": [{"predicted": one, "real": two} for one, two in landed.tried],
                "unreached": said if landed.unreached else None,
            }
    return {}, {}


def _work(sound: Sound, groups: Sequence[Group], task: Task) -> list[float]:
    """For each group the share of the model's multiply-accumulates and parameters that goes when
    half its units go."""
    whole: Counts = tuple(group.width for group in groups)
    shares = [0.0] * len(groups)
    for quantity in ("macs", "params"):
        with price_of(quantity, task, "fp32") as price:
            costs = Costs(sound.model, groups, task, price)
        total = costs.whole(whole)
        for at, group in enumerate(groups):
            half = (*whole[:at], group.width // 2, *whole[at + 1 :])
            before, after = costs.cost(group.layers, [whole, half])
            shares[at] += (before - after) / total
    return shares


def _landed(
    what: Search, costs: Costs, damage: Sequence[Damage], cost: Callable[[Counts], float]
) -> Landing:
    exact = what.quantity != "latency"
    way = walk(costs, damage, what.floor, what.amount)
    landed = land(way, cost, what.amount, exact=exact)
    if exact and not landed.unreached:
        nearer = closer(costs, way.before(landed.counts), what.floor, what.amount)
        if nearer and nearer != landed.counts:
            share = cost(nearer)
            if landed.reached < share <= what.amount:
                return landed._replace(counts=nearer, reached=share)
    return landed
