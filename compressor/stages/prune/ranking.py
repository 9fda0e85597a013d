"""How many units each group keeps, and which."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from compressor.stages.prune.group import Cut, Group
from compressor.stages.prune.rounding import kept

Scores = Sequence[tuple[Tensor, ...]]
"""For each group one tensor ``(width,)`` per strand."""


def chosen(group: Group, scores: Sequence[Tensor], count: int) -> Cut:
    """The cut that leaves the ``count`` units of each strand with the highest scores."""
    gone = []
    for strand in scores:
        order = strand.argsort(stable=True)
        gone.append(tuple(sorted(order[: group.width - count].tolist())))
    return Cut(group, tuple(gone))


Score = Callable[[Sequence[Group]], Scores]


def local(
    model: nn.Module, groups: Sequence[Group], ratio: float, floor: float, score: Score
) -> list[int]:
    """Every group loses ``ratio`` of its units: asked for layer by layer, so there is no floor."""
    return [kept(group.width, ratio, group.each) for group in groups]


def overall(
    model: nn.Module, groups: Sequence[Group], ratio: float, floor: float, score: Score
) -> list[int]:
    """The ``ratio`` of all units with the lowest scores goes, wherever they are.

    No group keeps less than :func:`least` of its units; what that saves, others lose.
    """
    return _lowest(groups, score(groups), ratio, floor)


def isomorphic(
    model: nn.Module, groups: Sequence[Group], ratio: float, floor: float, score: Score
) -> list[int]:
    """Groups of one structure are ranked together, and each such family loses ``ratio``.

    Scores of unlike structures cannot be compared (Fang et al. 2024, Isomorphic Pruning): a family
    are groups that touch the same kinds of layers along the same axes.
    """
    scores = score(groups)
    families: dict[object, list[int]] = defaultdict(list)
    for at, group in enumerate(groups):
        families[_structure(model, group)].append(at)
    counts = [0] * len(groups)
    for members in families.values():
        found = _lowest(
            [groups[at] for at in members], [scores[at] for at in members], ratio, floor
        )
        for at, count in zip(members, found, strict=True):
            counts[at] = count
    return counts


def _lowest(groups: Sequence[Group], scores: Scores, ratio: float, floor: float) -> list[int]:
    """Units kept when the lowest go one after the other; of equals, each group gives in turn."""
    order = []
    for at, strands in enumerate(scores):
        # Each strand gives its lowest: the n-th go together.
        level = torch.stack([strand.sort().values for strand in strands]).mean(0).tolist()
        order += [(value, rank / len(level), at) for rank, value in enumerate(level)]
    counts = [group.width for group in groups]
    going = round(ratio * sum(counts))
    for _, _, at in sorted(order):
        if going and counts[at] > least(groups[at], floor):
            counts[at] -= 1
            going -= 1
    return [
        max(least(group, floor), kept(group.width, 1 - count / group.width, group.each))
        for group, count in zip(groups, counts, strict=True)
    ]


def _structure(model: nn.Module, group: Group) -> tuple[object, ...]:
    parts = []
    for part in group.strands[0][0]:
        layer, _, tensor = part.parameter.rpartition(".")
        parts.append((type(model.get_submodule(layer)).__name__, tensor, part.dim))
    return (group.kind, *sorted(parts))


def least(group: Group, floor: float) -> int:
    """The units that a group keeps whatever its scores: ``floor`` of them, and at least one."""
    return max(1, math.ceil(floor * group.width - 1e-9))


RANKINGS: dict[str, Callable[..., list[int]]] = {
    "local": local,
    "global": overall,
    "isomorphic": isomorphic,
}
"""``(model, groups, scores, ratio, floor) -> units kept of each group``."""
