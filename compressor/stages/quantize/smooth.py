"""SmoothQuant: outliers of activations move into the weights that read them.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models". Channel j of what a layer reads is divided by ``s_j``, row j of its weight multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from compressor.stages.graph import constant, new_constant, swept
from compressor.stages.quantize.equalize import Layer, folded, layer_of, put, unfolded
from compressor.task import Array

if TYPE_CHECKING:
    import onnx_ir as ir

NORMS: dict[str, tuple[int, ...]] = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}
"""Normalisations, and the inputs that scale and shift what they write, per channel."""

ALPHAS = tuple(tenth / 10 for tenth in range(11))
"""How much of the outliers moves: 0 evens out the weights, 1 the activations."""

WORTH = 0.9
"""A scale is kept where it takes a layer's error below this much of the error without it."""


class _Site(NamedTuple):
    value: ir.Value
    layers: tuple[Layer, ...]
    norm: ir.Node | None
    maker: Layer | None


def places(model: ir.Model, *, insert: bool = False) -> list[str]:
    """Names of the values that :func:`smooth` wants samples of; channels are their last axis."""
    return [str(site.value.name) for site in _sites(model, insert)]


def smooth(
    model: ir.Model,
    samples: Mapping[str, Array],
    peaks: Mapping[str, Array] | None = None,
    *,
    insert: bool = False,
) -> dict[str, float]:
    """Smooths, in place, what MatMuls and Gemms read; returns each value changed and its alpha.

    All layers that read a value share ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)``. Where they
    are the only readers of a normalisation (:data:`NORMS`), the scale goes into its constants, and
    where they are those of an attention, into the layer that makes its values: that costs nothing.
    ``insert`` also smooths values that others read too (the residual of a BERT) or that nothing can
    take the scale of (Gelu), by one Mul in front of their layers.

    ``samples`` has rows ``(n, channels)`` of values (:func:`places`), and ``peaks`` their largest
    absolute element per channel ``(channels,)`` from all of the calibration (default: from the
    samples). Of :data:`ALPHAS` that one is chosen with the least error of the layers' outputs on
    every other row, activations quantized to 8 bits per tensor and weights per channel; it is kept
    where the error on the rest of the rows falls below :data:`WORTH` of what it was. Values
    without samples are left.
    """
    chosen = {}
    for site in _sites(model, insert):
        name = str(site.value.name)
        if name not in samples or len(samples[name]) < 2:
            continue
        weights = [_rows(layer) for layer in site.layers]
        peak = np.abs(samples[name]).max(0) if peaks is None else peaks[name]
        found = _search(samples[name].astype(np.float32), weights, peak.astype(np.float32))
        if found is None:
            continue
        alpha, scale = found
        chosen[name] = alpha
        for layer, weight in zip(site.layers, weights, strict=True):
            old = constant(layer.node.inputs[1])
            assert old is not None
            wide = (weight * scale[:, None]).T[None, :, :, None]
            put(model, layer.node, 1, folded(layer.node, wide, old))
        if site.norm is not None:
            for index in NORMS[site.norm.op_type]:
                held = constant(site.norm.inputs[index]) if index < len(site.norm.inputs) else None
                if held is not None:
                    put(model, site.norm, index, (held / scale).astype(held.dtype))
        elif site.maker is not None:
            made = constant(site.maker.node.inputs[1])
            assert made is not None
            thin = unfolded(site.maker.node, made) / scale[None, :, None, None]
            put(model, site.maker.node, 1, folded(site.maker.node, thin, made))
            if site.maker.bias is not None:
                node, index = site.maker.bias
                bias = constant(node.inputs[index])
                assert bias is not None
                put(model, node, index, (bias / scale).astype(bias.dtype))
        else:
            _divided(model, site, scale)
    if chosen:
        swept(model)
    return chosen


def _sites(model: ir.Model, insert: bool) -> list[_Site]:
    """Values that layers read, and the normalisation that writes each for them alone."""
    read: dict[ir.Value, list[Layer]] = {}
    for node in model.graph:
        layer = layer_of(node) if node.op_type != "Conv" else None
        value = node.inputs[0] if layer is not None else None
        if layer is not None and value is not None and constant(value) is None:
            read.setdefault(value, []).append(layer)
    sites = []
    for value, layers in read.items():
        norm, maker = value.producer(), None
        alone = len(value.uses()) == len(layers) and not value.is_graph_output()
        if norm is not None and alone:
            maker = _valuing(norm)
        if norm is None or not alone or not _takes(norm, value):
            norm = None
        if norm is not None or maker is not None or insert:
            sites.append(_Site(value, tuple(layers), norm, maker))
    return sites


def _valuing(attention: ir.Node) -> Layer | None:
    """The layer that makes the values of an attention, and nothing else: what the attention writes
    is linear in them, channel by channel."""
    if attention.op_type != "MultiHeadAttention" or len(attention.inputs) < 3:
        return None
    value = attention.inputs[2]
    if value is None or len(value.uses()) != 1 or len(attention.outputs) > 1:
        return None
    if any(given is not None for given in attention.inputs[3:4]):  # a bias of its own
        return None
    maker = value.producer()
    if maker is not None and maker.op_type == "Add":
        sources = [one.producer() for one in maker.inputs if one is not None]
        maker = next((node for node in sources if node is not None), None)
    layer = None if maker is None or maker.op_type == "Conv" else layer_of(maker)
    return layer if layer is not None and layer.output is value else None


def _takes(norm: ir.Node, value: ir.Value) -> bool:
    """Whether ``norm`` has constants of one element a channel that scale ``value``."""
    if norm.op_type not in NORMS or norm.outputs[0] is not value:
        return False
    held = [norm.inputs[at] for at in NORMS[norm.op_type] if at < len(norm.inputs)]
    arrays = [constant(one) for one in held if one is not None]
    return bool(arrays) and all(array is not None and array.ndim == 1 for array in arrays)


def _search(x: Array, weights: list[Array], peak: Array) -> tuple[float, Array] | None:
    fit, judge = x[::2], x[1::2]
    most = np.max([np.abs(weight).max(1) for weight in weights], axis=0)
    alive = (peak > 0) & (most > 0)
    if not alive.any():
        return None

    def scales(alpha: float) -> Array:
        scale = np.ones_like(peak)
        scale[alive] = peak[alive] ** alpha / most[alive] ** (1 - alpha)
        # One factor for all changes nothing; around 1 it keeps clear of float16's ends.
        scale[alive] /= np.exp(np.log(scale[alive]).mean())
        return scale

    alpha = min(ALPHAS, key=lambda alpha: _error(fit, weights, scales(alpha)))
    scale = scales(alpha)
    before = _error(judge, weights, np.ones_like(scale))
    return (alpha, scale) if _error(judge, weights, scale) < WORTH * before else None


def _error(x: Array, weights: list[Array], scale: Array) -> float:
    """Squared error of what the layers write, each relative to its power, summed."""
    even = x / scale
    low, high = min(float(even.min()), 0.0), max(float(even.max()), 0.0)
    step = (high - low) / 255 or 1.0
    zero = np.rint(-low / step)
    seen = (np.clip(np.rint(even / step) + zero, 0, 255) - zero) * step
    total = 0.0
    for weight in weights:
        wide = weight * scale[:, None]
        steps = np.abs(wide).max(0) / 127
        steps[steps == 0] = 1
        exact = x @ weight
        away = seen @ (np.rint(wide / steps) * steps) - exact
        total += float(np.square(away).sum() / max(np.square(exact).sum(), 1e-30))
    return total


def _divided(model: ir.Model, site: _Site, scale: Array) -> None:
    """Puts a Mul by ``1 / scale`` between the value and its layers."""
    import onnx_ir as ir

    name = str(site.value.name)
    factor = new_constant(model, f"{name}_smoothing", (1 / scale).astype(np.float32))
    node = ir.Node("", "Mul", [site.value, factor], name=f"{name}_smoothed")
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{name}_smoothed", site.value.shape, site.value.type
    first = min((layer.node for layer in site.layers), key=model.graph.index)
    model.graph.insert_before(first, node)
    for layer in site.layers:
        layer.node.replace_input_with(0, out)


def _rows(layer: Layer) -> Array:
    """The layer's weight as ``(inputs, outputs)``, float32."""
    weight = constant(layer.node.inputs[1])
    assert weight is not None
    return np.asarray(unfolded(layer.node, weight)[0, :, :, 0].T, dtype=np.float32)
