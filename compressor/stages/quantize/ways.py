"""Ways from a float graph to one in 8 bits: what was seen of its data, repairs, and the writing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np

from compressor.stages.graph import constant, copied
from compressor.stages.quantize import bias, equalize, rounding, smooth
from compressor.stages.quantize.calibrate import calibrate, observed
from compressor.stages.quantize.dynamic import dynamic, products, recurrent
from compressor.stages.quantize.histogram import METHODS, Histogram, Range, best
from compressor.stages.quantize.judge import Judge
from compressor.stages.quantize.kernels import Codes
from compressor.stages.quantize.plan import Plan, axis_of, plan
from compressor.stages.quantize.qdq import channel_scales, nearest, quantized
from compressor.task import Array

if TYPE_CHECKING:
    import onnx_ir as ir

Ranges = Literal["auto", "minmax", "each", "mse", "percentile", "entropy"]
Repair = Literal["equalize", "smooth", "rounding", "bias"]

Feeds = Callable[[int], Iterator[Mapping[str, Array]]]
"""Calibration batches anew, inputs by name: at most so many examples."""

METHOD: dict[str, Callable[[Histogram], Range]] = {
    "minmax": METHODS["minmax"],
    "each": lambda histogram: best(histogram)[1],
    "mse": METHODS["mse"],
    "percentile": METHODS["percentile"],
    "entropy": METHODS["entropy"],
}
"""How the range of a value follows from its histogram; ``each`` takes for every value the method
that keeps its own SQNR highest."""

TRIAL = 128
"""Examples that a repair of the float graph is tried with."""

LOOK = 32
"""Examples of which means and samples are taken."""

MARGIN = 0.2
"""Decibels that a repair has to gain: less is the luck of the examples."""

ENOUGH = 40.0
"""Decibels at which nothing is left to repair: 1/10,000 of the output's power is noise."""

FAIR = 20.0
"""Decibels below which a repair may cost time: 1/100 of the output's power is noise. Smoothing puts
Muls into the graph, which took 3 % of MiniLM's time."""

ROWS = 1024
"""Samples of what a layer reads."""

SAMPLED = 64 << 20
"""Bytes of samples that are held at once."""


class Way:
    """A float graph on its way to 8 bits.

    ``model`` is the prepared float graph; repairs exchange it for one that computes the same, or
    choose other codes for its weights. ``feeds`` gives calibration data, ``samples`` examples in
    all.
    """

    repairs: ClassVar[tuple[Repair, ...]] = ()
    """What can be done on this way, in the order in which it is."""

    def __init__(
        self, model: ir.Model, feeds: Feeds, samples: int, codes: Codes, seed: int = 0
    ) -> None:
        self.model = model
        self.feeds = feeds
        self.samples = samples
        self.codes = codes
        self.seed = seed
        self.held: dict[str, tuple[Array, Array]] = {}
        self._last: tuple[frozenset[str], ir.Model] | None = None

    @property
    def weighted(self) -> list[str]:
        """Nodes whose constant weights get codes, but for LSTMs."""
        return products(self.model)

    @property
    def names(self) -> list[str]:
        """Nodes that can compute in 8 bits and have weights."""
        return [*self.weighted, *recurrent(self.model)]

    def written(self, left: Collection[str] = ()) -> ir.Model:
        """The graph in 8 bits, but for the nodes named in ``left``; nobody may change it.

        The last one is kept: a search ends with what it has looked at.
        """
        key = frozenset(left)
        if self._last is None or self._last[0] != key:
            self._last = key, self._written(key)
        return self._last[1]

    def _written(self, left: Collection[str]) -> ir.Model:
        nodes = [name for name in self.names if name not in left]
        return dynamic(self.model, nodes, self.codes, self.rounding)

    def _forget(self) -> None:
        self._last = None

    def _copied(self) -> Self:
        other = copy.copy(self)
        other._forget()
        return other

    def rounding(self, node: ir.Node, weight: Array, scales: Array, axis: int) -> Array:
        """Codes of a weight: those that were chosen for these scales, or the nearest."""
        steps, chosen = self.held.get(str(node.name), (None, None))
        if steps is None or chosen is None or not np.array_equal(steps, scales):
            return nearest(weight, scales, axis, self.codes)
        return chosen

    def calibrate(self, samples: int | None = None) -> None:
        """Looks at the data again, at all of it or at so many examples."""

    # --- repairs: each gives another way, or None where the graph has nothing for it

    def smooth(self) -> Self | None:
        """Outliers of activations move into weights (SmoothQuant)."""
        model = copied(self.model)
        wanted = smooth.places(model, insert=True)
        if not wanted:
            return None
        peaks = self._peaks(dict.fromkeys(wanted, -1))
        if not smooth.smooth(model, self._samples(wanted), peaks, insert=True):
            return None
        return self._with(model)

    def rounded(self) -> Self | None:
        """Weights get the codes that change what their layer makes of its data least (GPTQ)."""
        weighted = set(self.weighted)
        nodes = [node for node in self.model.graph if node.name in weighted]
        if not nodes:
            return None
        other = self._copied()
        other.held = {}
        for part in _parts(nodes):
            other.held |= self._rounded(part)
        return other

    def _rounded(self, nodes: Sequence[ir.Node]) -> dict[str, tuple[Array, Array]]:
        reads = {node: str(node.inputs[0].name) for node in nodes}  # type: ignore[union-attr]
        drawn: dict[ir.Node, list[Array]] = {node: [] for node in nodes}
        looked = LOOK // 2
        seen = observed(self.model, sorted(set(reads.values())), self.feeds(looked))
        for number, found in enumerate(seen):
            for node in nodes:
                given = found[reads[node]]
                rows = max(1, ROWS * len(given) // looked)
                drawn[node].append(rounding.columns(node, given, rows, self.seed + number))
        chosen = {}
        for node in nodes:
            weight, axis = constant(node.inputs[1]), axis_of(node)
            assert weight is not None
            scales = channel_scales(weight, axis, self.codes)
            samples = np.concatenate(drawn.pop(node), axis=1)
            held = rounding.rounded(weight, scales, axis, samples, self.codes)
            chosen[str(node.name)] = (scales, held)
        return chosen

    def _with(self, model: ir.Model) -> Self:
        """The same on another graph, of which less is looked at until it is kept."""
        other = self._copied()
        other.model, other.held = model, {}
        other.calibrate(min(TRIAL, self.samples))
        return other

    # --- looking at the data

    def _look(
        self, model: ir.Model, names: Iterable[str], count: int = LOOK
    ) -> Iterator[dict[str, Array]]:
        return observed(model, list(names), self.feeds(count))

    def _peaks(self, axes: Mapping[str, int]) -> dict[str, Array]:
        """The largest absolute element of each channel in all of the calibration, by value."""
        peaks: dict[str, Array] = {}
        for found in self._look(self.model, axes, self.samples):
            for name, x in found.items():
                peak = np.abs(x).max(_others(x, axes[name]))
                peaks[name] = np.maximum(peaks.get(name, peak), peak)
        return peaks

    def _means(self, model: ir.Model, axes: Mapping[str, int]) -> dict[str, Array]:
        """The mean of each channel, by value."""
        totals: dict[str, Array] = {}
        count: dict[str, int] = {}
        for found in self._look(model, axes):
            for name, x in found.items():
                part = x.sum(_others(x, axes[name]), dtype=np.float64)
                totals[name] = totals.get(name, 0.0) + part
                count[name] = count.get(name, 0) + x.size // part.size
        return {name: total / count[name] for name, total in totals.items()}

    def _samples(self, names: Sequence[str]) -> dict[str, Array]:
        """Rows of values whose channels are the last axis."""
        rng = np.random.default_rng(self.seed)
        rows: dict[str, list[Array]] = {}
        for found in self._look(self.model, names):
            for name, x in found.items():
                flat = x.reshape(-1, x.shape[-1])
                at = rng.choice(len(flat), min(ROWS // 8, len(flat)), replace=False)
                rows.setdefault(name, []).append(flat[np.sort(at)])
        return {name: np.concatenate(parts)[:ROWS] for name, parts in rows.items()}


class Dynamic(Way):
    """Activations get their codes while running: no range is needed."""

    repairs = ("smooth", "rounding")


class Static(Way):
    """Activations have ranges. ``histograms`` are of every value that may be held in 8 bits;
    ``method`` says how ranges follow from them."""

    repairs = ("equalize", "smooth", "rounding", "bias")
    method = "minmax"
    corrected = False
    _shifts: dict[str, Array] | None = None
    histograms: Mapping[str, Histogram] = {}

    @property
    def weighted(self) -> list[str]:
        """Nodes whose constant weights get codes, but for LSTMs."""
        return list(plan(self.model).weighted)

    def _forget(self) -> None:
        super()._forget()
        self._shifts = None

    def calibrate(self, samples: int | None = None) -> None:
        """Fills the histograms anew, from all examples or from so many."""
        self._forget()
        ranged = plan(self.model).ranged
        count = self.samples if samples is None else samples
        self.histograms = (
            calibrate(self.model, ranged, self.feeds(count), seed=self.seed) if ranged else {}
        )

    def _written(self, left: Collection[str]) -> ir.Model:
        ours = plan(self.model, left)
        ranges = {name: METHOD[self.method](self.histograms[name]) for name in ours.ranged}
        result = quantized(self.model, ours, ranges, self.codes, self.rounding)
        if self.corrected:
            self._shift(result, ours)
        cells = [name for name in recurrent(self.model) if name not in left]
        return dynamic(result, cells, self.codes)

    def _shift(self, result: ir.Model, ours: Plan) -> None:
        """Corrects the biases of what is in 8 bits.

        They are found once, for the graph in which all is: what a layer does to its own mean hardly
        depends on whether another is in float, and finding it takes several passes over the data.
        """
        if self._shifts is None:
            whole = copy.copy(self)
            whole.corrected = False
            made = whole._written(())
            before = bias.biases(made)
            bias.correct(made, self.model, self._means)
            after = bias.biases(made)
            self._shifts = {name: after[name] - held for name, held in before.items()}
        layers = (equalize.layer_of(node) for node in self.model.graph if node.name in ours.inside)
        names = {str(layer.output.name) for layer in layers if layer is not None}
        bias.shift(result, {name: by for name, by in self._shifts.items() if name in names})

    def by(self, method: str) -> Static:
        """The same with other ranges."""
        other = self._copied()
        other.method = method
        return other

    def equalize(self) -> Static | None:
        """Channels between layers get ranges alike (cross-layer equalisation)."""
        model = copied(self.model)
        changed = equalize.equalize(model, self._peaks(equalize.places(model)))
        return self._with(model) if changed else None

    def unbiased(self) -> Static | None:
        """The mean of every channel becomes that of the float graph (bias correction)."""
        if not self.weighted:
            return None
        other = self._copied()
        other.corrected = True
        return other


REPAIRS: dict[Repair, Callable[[Static], Way | None]] = {
    "equalize": Static.equalize,
    "smooth": Static.smooth,
    "rounding": Static.rounded,
    "bias": Static.unbiased,
}


def settled(
    way: Way,
    judge: Judge,
    ranges: Ranges,
    repair: Sequence[Repair] | None,
    late: Callable[[], bool],
) -> tuple[Way, list[Repair]]:
    """The way on which the output stays nearest to float, and its repairs.

    What is not ``auto`` or ``None`` is done as told.
    """
    if not way.names:
        return way, []
    way.calibrate()
    if isinstance(way, Static) and ranges != "auto":
        way = way.by(ranges)
    nearness = 0.0
    if ranges == "auto" or repair is None:
        way, nearness = _ranged(way, judge, ranges, late)
    done: list[Repair] = []
    # One order whatever was asked: codes of weights do not outlive another graph.
    for name in (name for name in way.repairs if repair is None or name in repair):
        if repair is None and (nearness >= ENOUGH or late()):
            break
        if repair is None and name == "smooth" and nearness >= FAIR:
            continue
        other = REPAIRS[name](way)  # type: ignore[arg-type]  # it has what its class names
        if other is None:
            continue
        again = other.model is not way.model
        if again and (ranges == "auto" or repair is None):
            # What range is best for a value depends on what was moved out of it.
            other, now = _ranged(other, judge, ranges, late)
        elif repair is None:
            now = judge.sqnr(other.written())
        if repair is None:
            if now < nearness + MARGIN:
                continue
            nearness = now
        if again:
            other.calibrate()
        way = other
        done.append(name)
    return way, done


def _ranged(way: Way, judge: Judge, ranges: Ranges, late: Callable[[], bool]) -> tuple[Way, float]:
    """The way with the method of ranges that keeps the output nearest to float, and how near."""
    if ranges != "auto" or not isinstance(way, Static):
        return way, judge.sqnr(way.written())
    best, nearness = way, -math.inf
    for name in METHOD:
        other = way.by(name)
        now = judge.sqnr(other.written())
        if now > nearness:
            best, nearness = other, now
        if nearness >= ENOUGH or late():
            break
    return best, nearness


def _parts(nodes: Sequence[ir.Node]) -> Iterator[list[ir.Node]]:
    """The nodes in parts whose samples fit into memory."""
    part: list[ir.Node] = []
    size = 0
    for node in nodes:
        weight = constant(node.inputs[1])
        assert weight is not None
        needed = ROWS * 4 * weight.size // weight.shape[axis_of(node)]
        needed *= node.attributes.get_int("group", 1)  # each group reads inputs of its own
        if part and size + needed > SAMPLED:
            yield part
            part, size = [], 0
        part.append(node)
        size += needed
    if part:
        yield part


def _others(x: Array, axis: int) -> tuple[int, ...]:
    return tuple(at for at in range(x.ndim) if at != axis % x.ndim)
