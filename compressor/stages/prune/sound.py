"""Which cuts may be made: the groups of a model, and the proof that keeps or refuses them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from compressor.loading.edits import apply
from compressor.stages.prune import heads
from compressor.stages.prune.cutting import Edits, edits_of
from compressor.stages.prune.group import Cut, Group
from compressor.stages.prune.groups import groups_of
from compressor.stages.prune.proof import differ, disproof, precision
from compressor.stages.prune.rewriting import attentions, views
from compressor.task import Task

WHY = {
    "heads": "how its code counts heads could not be found, so none can go",
    "dimensions": "which of its dimensions belong together could not be found",
}
"""What is wrong with attention of which nothing can be cut."""

ATTENTION = {"heads": heads.written, "dimensions": heads.dimensions}
"""What ``attention`` may say: whole heads go, or dimensions of every head."""


class Proven(NamedTuple):
    """Cuts that are sound together, their edits, and the largest difference in the proof."""

    cuts: list[Cut]
    edits: Edits
    difference: float


def _one(group: Group) -> Cut:
    """The cut of a group's first units."""
    return Cut(group, tuple((0,) for _ in group.strands))


def _distinct(groups: Sequence[Group]) -> list[Group]:
    """The groups with roots that name them: parts of one layer are ``conv`` and ``conv (2)``."""
    seen: dict[str, int] = defaultdict(int)
    found = []
    for group in groups:
        seen[group.root] += 1
        number = f" ({seen[group.root]})" if seen[group.root] > 1 else ""
        found.append(replace(group, root=group.root + number))
    return found


class Sound:
    """A dense model, its groups, and the judge of cuts of them.

    ``model`` is the dense model with the layers rewritten that have to be (parameter names are
    its); ``groups`` may be cut, ``left`` says by layer why others may not. Edits start from the
    model as it was given.
    """

    def __init__(self, dense: nn.Module, task: Task, attention: str) -> None:
        self.dense = dense
        self.attention = attention
        self.examples = task.examples(7)
        self.dtype = precision(dense, self.examples)
        self.model = dense
        self._attentions: Edits = []
        self._views: Edits = []
        self._asked_views = views(dense, task.examples(2))
        if rewrites := attentions(dense):
            rewritten = apply(copy.deepcopy(dense), rewrites)
            if not differ(dense, rewritten, self.examples, self.dtype):
                self.model, self._attentions = rewritten, rewrites
        found, left = groups_of(self.model, task.examples(2))
        self.left = left
        self.groups: list[Group] = []
        for group in self._joined(found):
            settled: Group | None = group
            if group.kind == "heads":
                settled = ATTENTION[attention](self.model, group, self.holds)
                # Heads are those of the layer as it was given, whose projections have no names.
                group = replace(group, root=self._known(group.root))
            if settled is None:
                self.left[group.root] = WHY[attention]
            else:
                self.groups.append(replace(settled, root=group.root))
        self.groups = _distinct(self.groups)

    def _joined(self, found: Sequence[Group]) -> list[Group]:
        """The parts of one layer that go different ways, as one group where they have to lose
        equally many: code that halves what it is given finds its halves in the middle."""
        parts: dict[str, list[Group]] = defaultdict(list)
        for group in found:
            parts[group.root].append(group)
        joined: list[Group] = []
        for together in parts.values():
            first = together[0]
            strands = tuple(strand for group in together for strand in group.strands)
            alike = len({(group.width, group.each) for group in together}) == 1
            if len(together) > 1 and alike and not all(map(self.holds, map(_one, together))):
                layers = {layer for group in together for layer in group.layers}
                writes = tuple(write for group in together for write in group.writes)
                whole = replace(
                    first,
                    layers=tuple(sorted(layers)),
                    strands=strands,
                    each=sum(group.each * len(group.strands) for group in together),
                    writes=writes,
                )
                if self.holds(_one(whole)):
                    together = [whole]
            joined += together
        return joined

    def _known(self, root: str) -> str:
        """The name of a layer in the model as it was given."""
        homes = (edit["module"] for edit in self._attentions)
        return next((home for home in homes if root.startswith(f"{home}.")), root)

    def edits(self, cuts: Sequence[Cut]) -> Edits:
        """The edits that make ``cuts``, with the rewriting that they need first."""
        made = edits_of(self.model, cuts)
        touched = [str(edit.get("parameter", edit.get("module"))) for edit in made]
        needed = [
            edit
            for edit in self._attentions
            if any(name.startswith(f"{edit['module']}.") for name in touched)
        ]
        return [*needed, *self._views, *made]

    def holds(self, cut: Cut) -> bool:
        """Whether this cut alone is sound."""
        return not self.disproof([cut])[1]

    def disproof(self, cuts: Sequence[Cut]) -> tuple[float, str]:
        """The largest difference in the proof, and what is wrong (empty: nothing)."""
        difference, wrong = disproof(self.dense, self.edits(cuts), self.examples, self.dtype)
        if wrong and len(self._views) < len(self._asked_views):
            before, self._views = self._views, self._asked_views
            again, still = disproof(self.dense, self.edits(cuts), self.examples, self.dtype)
            if not still:
                return again, ""
            self._views = before
        return difference, wrong

    def most(self, cuts: Sequence[Cut], left: dict[str, str]) -> Proven:
        """As many of ``cuts`` as are sound together; the others go into ``left`` with the reason.

        All at once first, since that is the common case. Where it fails, each half is added on its
        own, halved again where that fails: a few unsound groups among many take few attempts.
        """

        worst = 0.0

        def added(sound: list[Cut], more: Sequence[Cut]) -> list[Cut]:
            nonlocal worst
            if not more:
                return sound
            difference, wrong = self.disproof([*sound, *more])
            if not wrong:
                worst = difference
                return [*sound, *more]
            if len(more) == 1:
                left[more[0].group.root] = wrong
                return sound
            half = len(more) // 2
            return added(added(sound, more[:half]), more[half:])

        kept = added([], list(cuts))
        for view in list(self._views):
            # What runs without it computes its sizes itself.
            before = self._views
            self._views = [other for other in before if other is not view]
            if disproof(self.dense, self.edits(kept), self.examples, self.dtype)[1]:
                self._views = before
        return Proven(kept, self.edits(kept) if kept else [], worst)
