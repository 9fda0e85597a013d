"""Static 8-bit graphs: QuantizeLinear and DequantizeLinear around what computes in 8 bits.

A runtime with 8-bit kernels fuses each operator with the pairs around it; one without computes the
same in float. Values get one scale and zero point each, weights a scale for each output channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from compressor.stages.graph import constant, copied, new_constant, swept, typed
from compressor.stages.quantize.kernels import Codes
from compressor.stages.quantize.plan import Plan, axis_of
from compressor.task import Array

if TYPE_CHECKING:
    import onnx_ir as ir

    from compressor.stages.quantize.histogram import Range

Rounding = Callable[["ir.Node", Array, Array, int], Array]
"""``(node, weight, scales, axis) -> codes``: int8 of the weight's shape."""

TINY = float(np.finfo(np.float32).tiny)


def quantized(
    model: ir.Model,
    plan: Plan,
    ranges: Mapping[str, Range],
    codes: Codes,
    rounding: Rounding | None = None,
) -> ir.Model:
    """Another graph, in which the nodes inside ``plan`` compute in 8 bits.

    ``ranges`` has the range of every value of ``plan.ranged``.
    """
    result = copied(model)
    values = {
        str(value.name): value
        for node in result.graph
        for value in (*node.inputs, *node.outputs)
        if value is not None
    }
    scales: dict[str, tuple[np.float32, int]] = {
        name: affine(ranges[name], codes) for name in plan.ranged
    }
    inside = [node for node in result.graph if node.name in plan.inside]
    _weights(result, inside, plan, scales, codes, rounding)
    for name, source in plan.held.items():
        _pair(result, values[name], *scales[source], codes, plan)
    result.graph.sort()
    swept(result)
    return result


def affine(span: Range, codes: Codes) -> tuple[np.float32, int]:
    """Scale and zero point of 256 codes over ``span``, which holds 0; 0 has a code of its own.

    The scale is rounded so that codes reach no further than the range: a clamp whose bound that
    is can then be left to the codes.
    """
    scale = np.float32(max((span.high - span.low) / 255, TINY))
    if float(scale) * 255 > span.high - span.low > 0:
        scale = max(np.nextafter(scale, np.float32(0)), np.float32(TINY))
    zero = int(np.clip(round(-span.low / float(scale)), 0, 255))
    return scale, zero + codes.least


def channel_scales(weight: Array, axis: int, codes: Codes) -> Array:
    """float32 ``(channels,)``: the largest weight of each channel gets the largest code.

    A channel without weights gets the largest scale of the others: its bias has steps of it.
    """
    others = tuple(at for at in range(weight.ndim) if at != axis)
    peaks = np.abs(weight).max(axis=others)
    whole = peaks.max() or codes.largest
    scales = np.where(peaks > 0, peaks, whole) / codes.largest
    return np.maximum(scales, TINY).astype(np.float32)


def nearest(weight: Array, scales: Array, axis: int, codes: Codes) -> Array:
    """int8 codes of a weight, each the nearest."""
    shaped = scales.reshape([-1 if at == axis else 1 for at in range(weight.ndim)])
    return np.clip(np.rint(weight / shaped), -codes.largest, codes.largest).astype(np.int8)


def _weights(
    model: ir.Model,
    inside: list[ir.Node],
    plan: Plan,
    scales: Mapping[str, tuple[np.float32, int]],
    codes: Codes,
    rounding: Rounding | None,
) -> None:
    for node in inside:
        if node.name not in plan.weighted:
            continue
        given, value = node.inputs[0], node.inputs[1]
        weight, axis = constant(value), axis_of(node)
        assert given is not None
        assert value is not None
        assert weight is not None
        scale, _ = scales[plan.held[str(given.name)]]
        own = channel_scales(weight, axis, codes)
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is not None:
            # Bias and sum share 32 bits: a channel of tiny weights must not push them over.
            bias = bias.reshape(-1)
            least = np.abs(bias) / (float(scale) * 2.0**30)
            own = np.maximum(own, least).astype(np.float32)
        held = rounding(node, weight, own, axis) if rounding else nearest(weight, own, axis, codes)
        name = f"{value.name}_of_{node.name}" if len(value.uses()) > 1 else str(value.name)
        node.replace_input_with(1, _decoded(model, node, name, held, own, axis))
        if bias is not None:
            both = own * scale
            steps = np.rint(bias.astype(np.float64) / both).astype(np.int32)
            name = f"{node.name}_bias"
            node.replace_input_with(2, _decoded(model, node, name, steps, both, 0))


def _decoded(
    model: ir.Model, node: ir.Node, name: str, held: Array, scales: Array, axis: int
) -> ir.Value:
    """A constant in 8 or 32 bits and the node in front of ``node`` that decodes it."""
    import onnx_ir as ir

    decoder = ir.Node(
        "",
        "DequantizeLinear",
        [
            new_constant(model, f"{name}_quantized", held),
            new_constant(model, f"{name}_scale", scales.astype(np.float32)),
            new_constant(model, f"{name}_zero_point", np.zeros(len(scales), held.dtype)),
        ],
        attributes=[ir.AttrInt64("axis", axis)],
        name=f"{name}_DequantizeLinear",
    )
    decoder.outputs[0].name = f"{name}_dequantized"
    model.graph.insert_before(node, decoder)
    return decoder.outputs[0]


def _pair(
    model: ir.Model, value: ir.Value, scale: np.float32, zero: int, codes: Codes, plan: Plan
) -> None:
    """A value's way through 8 bits; who may read it in float goes on doing so."""
    import onnx_ir as ir

    name = str(value.name)
    readers = [
        use for use in value.uses() if name in plan.made or _quantized_reader(use.node, plan)
    ]
    pair = [
        new_constant(model, f"{name}_scale", np.array(scale, np.float32)),
        new_constant(model, f"{name}_zero_point", np.array(zero, codes_dtype(codes))),
    ]
    encoder = ir.Node("", "QuantizeLinear", [value, *pair], name=f"{name}_QuantizeLinear")
    encoder.outputs[0].name = f"{name}_quantized"
    decoder = ir.Node(
        "", "DequantizeLinear", [encoder.outputs[0], *pair], name=f"{name}_DequantizeLinear"
    )
    out = decoder.outputs[0]
    out.name = f"{name}_dequantized"
    typed(out, value)
    for use in readers:
        use.node.replace_input_with(use.idx, out)
    maker = value.producer()
    if maker is None:
        model.graph.insert_before(model.graph[0], [encoder, decoder])
    else:
        model.graph.insert_after(maker, [encoder, decoder])
    if name in plan.made and value.is_graph_output():
        at = model.graph.outputs.index(value)
        value.name, out.name = f"{name}_float", name  # callers know the output by its name
        model.graph.outputs[at] = out


def _quantized_reader(node: ir.Node, plan: Plan) -> bool:
    """Whether a reader computes on codes: it is inside, or moves what is held on both sides."""
    names = [str(value.name) for value in node.outputs]
    return node.name in plan.inside or any(plan.held.get(name, name) != name for name in names)


def codes_dtype(codes: Codes) -> type[np.int8] | type[np.uint8]:
    """NumPy's type of an activation's code."""
    return np.int8 if codes.signed else np.uint8
