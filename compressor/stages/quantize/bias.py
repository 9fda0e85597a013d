"""Bias correction: what quantizing did to the mean of every channel is taken back.

After Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
section 4.2, with means from calibration data. They go layer by layer, a pass over the data each.
Here one pass serves all layers: what a layer's mean owes to the means of what it reads (its float
weight times their shift) is left to the layers before it, the rest is its own and is corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from compressor.stages.graph import constant
from compressor.stages.quantize.equalize import Layer, layer_of, put, unfolded
from compressor.task import Array

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST = 2**30
"""Steps of an integer bias: what is added to it in 32 bits still fits."""

Means = Callable[["ir.Model", Mapping[str, int]], Mapping[str, Array]]
"""Measures the mean ``(channels,)``, over calibration data, of values of a model by name.

The values are given with their axis of channels.
"""


class _Place(NamedTuple):
    """Where a bias is: input ``at`` of ``node``; with the float step of an integer one."""

    node: ir.Node
    at: int
    step: Array | None


def correct(
    model: ir.Model, original: ir.Model, means: Means, *, rounds: int = 3
) -> tuple[float, float]:
    """Moves, in place, the biases of a quantized ``model`` until its means are the ``original``'s.

    Layers are found by the names of what they write, which quantizing keeps; a bias is a constant
    vector of a Conv, Gemm or Add: float, or int32 behind a DequantizeLinear. ``means`` runs
    once on the original and after each of the ``rounds``; further rounds see to what the first
    could not know, the nonlinearities. They end where the means no longer get nearer, and the
    biases of the best one are kept, those at hand included.

    Returns how far the means were off before and after: the root mean square over channels, each
    layer relative to the spread of its means. ``(0, 0)`` where there is no bias to move.
    """
    biases, layers, asked = _biases(model), {}, dict[str, int]()
    there = {str(value.name) for node in model.graph for value in node.outputs}
    for node in original.graph:
        layer = layer_of(node)
        read = None if layer is None else node.inputs[0]
        if layer is None or read is None:
            continue
        name = str(layer.output.name)
        if name in biases and (read.is_graph_input() or read.name in there):
            layers[name] = layer
            asked[name] = layer.axis
            if not read.is_graph_input():
                asked[str(read.name)] = layer.axis
    if not layers:
        return 0.0, 0.0
    exact = means(original, asked)

    def off(seen: Mapping[str, Array]) -> float:
        parts = [
            np.mean(np.square(seen[name] - exact[name])) / max(float(np.var(exact[name])), 1e-12)
            for name in layers
        ]
        return float(np.sqrt(np.mean(parts)))

    seen = means(model, asked)
    before = best = off(seen)
    kept = {name: _held(biases[name]) for name in layers}
    for _ in range(rounds):
        for name, layer in layers.items():
            shift = exact[name] - seen[name]
            read = layer.node.inputs[0]
            given = "" if read is None else str(read.name)
            if given in seen:
                shift = shift + _handed(layer, seen[given] - exact[given])
            _moved(model, biases[name], shift)
        seen = means(model, asked)
        now = off(seen)
        if now >= best:
            break
        best, kept = now, {name: _held(biases[name]) for name in layers}
    for name, held in kept.items():
        put(model, biases[name].node, biases[name].at, held)
    return before, best


def biases(model: ir.Model) -> dict[str, Array]:
    """The biases that :func:`correct` can move, by the name of the value that they shift."""
    return {
        name: _held(place) * (1.0 if place.step is None else place.step.astype(np.float64))
        for name, place in _biases(model).items()
    }


def shift(model: ir.Model, shifts: Mapping[str, Array]) -> None:
    """Adds ``shifts`` to biases, in place; by the name of the value that they shift."""
    for name, place in _biases(model).items():
        if name in shifts:
            _moved(model, place, shifts[name])


def _handed(layer: Layer, shift: Array) -> Array:
    """What a ``shift`` of the mean of what a layer reads does to the mean of what it writes."""
    weight = constant(layer.node.inputs[1])
    assert weight is not None
    rows = unfolded(layer.node, weight).sum(-1)  # borders, where a kernel sees less, do not count
    return np.asarray(np.einsum("goi,gi->go", rows, shift.reshape(len(rows), -1)).ravel())


def _biases(model: ir.Model) -> dict[str, _Place]:
    """Biases by the name of the value that they shift."""
    found = {}
    for node in model.graph:
        if node.domain or node.op_type not in ("Conv", "Gemm", "Add"):
            continue
        for at in (0, 1) if node.op_type == "Add" else (2,):
            place = _place(node, at) if at < len(node.inputs) else None
            if place is not None:
                found[str(node.outputs[0].name)] = place
    for node in model.graph:  # an output of the graph keeps its name behind its 8 bits
        encoder = node.inputs[0].producer() if node.op_type == "DequantizeLinear" else None  # type: ignore[union-attr]
        if encoder is not None and encoder.op_type == "QuantizeLinear":
            source, name = str(encoder.inputs[0].name), str(node.outputs[0].name)  # type: ignore[union-attr]
            if source in found:
                found[name] = found[source]
    return found


def _place(node: ir.Node, at: int) -> _Place | None:
    """The bias at this input, if it is a constant vector."""
    value = node.inputs[at]
    source = None if value is None else value.producer()
    if source is not None and source.op_type == "DequantizeLinear":
        integers, step = constant(source.inputs[0]), constant(source.inputs[1])
        shared = value is not None and len(value.uses()) > 1
        if integers is None or step is None or shared or integers.dtype != np.int32:
            return None
        return _Place(source, 0, step) if integers.ndim == 1 else None
    held = constant(value)
    if (
        held is None
        or held.ndim != 1
        or held.size < 2
        or not np.issubdtype(held.dtype, np.floating)
    ):
        return None
    return _Place(node, at, None)


def _held(place: _Place) -> Array:
    held = constant(place.node.inputs[place.at])
    assert held is not None
    return held


def _moved(model: ir.Model, place: _Place, shift: Array) -> None:
    held = _held(place)
    if place.step is None:
        moved = (held + shift).astype(held.dtype)
    else:
        moved = held + np.rint(shift / place.step.astype(np.float64))
        moved = np.clip(moved, -LARGEST, LARGEST).astype(np.int32)
    put(model, place.node, place.at, moved)
