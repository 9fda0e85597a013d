"""Pruning until the model costs a named fraction of what it did: MACs, params, size or latency.

A search walks down from the dense model and from plain ratios, one rung of one group's ladder at a
time, always the rung that damages least for what it saves. Damage comes from the work and the
sensitivity of a group, savings from what layers cost: multiply-accumulates, parameters, or the
milliseconds that onnxruntime takes for a layer of that shape on the target. That way the cut goes
where time is, which is not where MACs are. Where on this way the target lies is then found with the
real quantity of the whole model.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from torch import nn

from compressor.artifact import Artifact
from compressor.errors import StageError
from compressor.loading import torchfile
from compressor.loading.edits import Edit, apply
from compressor.measure import counting
from compressor.measure.costs import Dtype, table
from compressor.measure.protocol import observe
from compressor.measure.shapes import Layer, layers_of
from compressor.measure.statistics import summary
from compressor.stages.export import export
from compressor.stages.prune.cutting import shapes_of
from compressor.stages.prune.group import Group
from compressor.stages.prune.ranking import least
from compressor.stages.prune.rounding import kept, ladder
from compressor.stages.prune.sensitivity import Damage
from compressor.stages.quantize import quantize
from compressor.task import Task

Quantity = Literal["macs", "params", "size", "latency"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

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

SECONDS = 1.0
"""Of timing for each try."""

Counts = tuple[int, ...]
"""Units kept, for each group."""


class Call(NamedTuple):
    """A layer as it is priced: the shapes of its calls, and its parameters."""

    shapes: tuple[Layer, ...]
    params: int


Price = Callable[[Sequence[Call]], list[float]]
"""What each layer costs; asked for many at once, since some are measured."""


class Costs:
    """What a model costs layer by layer, for any counts of units kept."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], task: Task, price: Price) -> None:
        self.groups = groups
        self._price = price
        self._layers = layers_of(model, task.examples(1))
        self._modules = dict(model.named_modules())
        self._dense = shapes_of(model)
        # A tied parameter counts where it stands first.
        self._counted = {name for name, _ in model.named_parameters()}
        # What one unit of each group takes from each axis of each tensor.
        self._each: list[dict[tuple[str, int], int]] = []
        self._owners: dict[str, list[int]] = defaultdict(list)
        for at, group in enumerate(groups):
            taken: dict[tuple[str, int], int] = defaultdict(int)
            for strand in group.strands:
                for part in strand[0]:
                    taken[part.parameter, part.dim] += len(part.at)
            self._each.append(dict(taken))
            for layer in group.layers:
                self._owners[layer].append(at)

    def shape(self, layer: str, tensor: str, counts: Counts) -> list[int]:
        """The shape of a tensor once only ``counts`` are kept."""
        name = f"{layer}.{tensor}" if layer else tensor
        shape = list(self._dense[name])
        for at in self._owners.get(layer, ()):
            for dim in range(len(shape)):
                gone = self.groups[at].width - counts[at]
                shape[dim] -= gone * self._each[at].get((name, dim), 0)
        return shape

    def layers(self, name: str, counts: Counts) -> list[Layer]:
        """The calls of a layer, resized."""
        found = self._layers.get(name, [])
        module = self._modules[name]
        if not found or name not in self._owners:
            return found
        if isinstance(module, nn.RNNBase):
            hidden = self.shape(name, "weight_hh_l0", counts)
            state = self.shape(name, "weight_ih_l0", counts)
            gates = self._dense[f"{name}.weight_hh_l0"][0] // module.hidden_size
            return [
                replace(
                    layer,
                    inputs=state[1],
                    outputs=hidden[0] // gates,
                    projection=hidden[1] if layer.projection else 0,
                )
                for layer in found
            ]
        weight = self.shape(name, "weight", counts)
        return [_resized(layer, weight) for layer in found]

    def cost(self, names: Iterable[str], counts: Sequence[Counts]) -> list[float]:
        """What these layers cost together, for each of several counts."""
        names = list(names)
        calls = [
            Call(tuple(self.layers(name, each)), self._numel(name, each))
            for each in counts
            for name in names
        ]
        prices = iter(self._price(calls))
        return [sum(next(prices) for _ in names) for _ in counts]

    def _numel(self, name: str, counts: Counts) -> int:
        return sum(
            math.prod(self.shape(name, tensor, counts))
            for tensor, _ in self._modules[name].named_parameters(recurse=False)
            if (f"{name}.{tensor}" if name else tensor) in self._counted
        )

    def whole(self, counts: Counts) -> float:
        """What the model costs."""
        return self.cost(self._modules, [counts])[0]


def _resized(layer: Layer, weight: Sequence[int]) -> Layer:
    """A convolution or linear layer with the channels of its cut weight."""
    first, second = weight[0], weight[1]
    if layer.op == "linear":
        return layer.resized(inputs=second, outputs=first)
    if layer.op == "deconv":
        groups = first if 1 < layer.groups == layer.inputs else layer.groups
        return layer.resized(inputs=first, outputs=second * groups, groups=groups)
    if 1 < layer.groups == layer.inputs:
        groups = first * layer.groups // layer.outputs
        return layer.resized(inputs=groups, outputs=first, groups=groups)
    return layer.resized(inputs=second * layer.groups, outputs=first)


@contextmanager
def price_of(quantity: Quantity, task: Task, dtype: Dtype) -> Iterator[Price]:
    """The price by which the search walks."""
    if quantity in ("params", "size"):
        yield lambda calls: [float(call.params) for call in calls]
        return
    if quantity == "macs":
        yield lambda calls: [float(sum(shape.macs() for shape in call.shapes)) for call in calls]
        return
    with table(task.target, dtype=dtype) as price:

        def milliseconds(calls: Sequence[Call]) -> list[float]:
            found = price(shape for call in calls for shape in call.shapes)
            return [sum(found[shape] for shape in call.shapes) for call in calls]

        yield milliseconds


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


@contextmanager
def real_of(
    quantity: Quantity, dense: nn.Module, before: Sequence[Edit], task: Task, dtype: Dtype
) -> Iterator[Callable[[Sequence[Edit]], float]]:
    """The real quantity of the model after more edits, as a fraction of what it is now.

    ``before`` are the edits that made ``dense`` from the task's model. Size is that of the ONNX
    file; latency the ratio of median times in onnxruntime on the task's target, interleaved, of the
    exported models or, for ``int8``, of their static quantizations.
    """
    if quantity in ("macs", "params"):

        def count(model: nn.Module) -> int:
            if quantity == "params":
                return counting.params(model)
            return counting.macs(model, task.examples(1))

        whole = count(dense)
        yield lambda edits: count(apply(copy.deepcopy(dense), edits)) / whole
        return
    with tempfile.TemporaryDirectory(prefix="compressor-prune-") as folder:

        def made(name: str, edits: Sequence[Edit]) -> Artifact:
            path = Path(folder) / f"{name}{torchfile.SUFFIX}"
            model = apply(copy.deepcopy(dense), edits)
            torchfile.write(path, model, task.source, [*before, *edits])
            onnx = export(Artifact.of(path, "torch"), task, Path(folder) / name)
            if dtype == "int8" and quantity == "latency":
                return quantize(onnx, task, Path(folder) / f"{name}-int8", scheme="static")
            return onnx

        whole_model = made("original", ())

        def size(edits: Sequence[Edit]) -> float:
            return made("cut", edits).size_bytes / whole_model.size_bytes

        def latency(edits: Sequence[Edit]) -> float:
            cut = made("cut", edits)
            feed = task.examples(task.target.batch)
            seen = observe([whole_model, cut], task.target, feed, seconds=SECONDS, seed=task.seed)
            medians = {
                one.artifact: summary(one.values)["p50"]
                for one in seen.measurements
                if one.quantity == "latency_ms" and one.values
            }
            if cut.name not in medians or whole_model.name not in medians:
                raise StageError(f"latency on {task.target}: {next(iter(seen.failed.values()))}")
            return float(medians[cut.name] / medians[whole_model.name])

        yield size if quantity == "size" else latency
