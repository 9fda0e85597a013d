"""Dynamic 8-bit graphs: weights are stored in 8 bits, activations get their codes while running."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from compressor.stages.graph import DOMAIN, constant, copied, new_constant, swept, typed
from compressor.stages.quantize.kernels import Codes
from compressor.stages.quantize.plan import axis_of, weighted
from compressor.stages.quantize.qdq import Rounding, channel_scales, nearest

if TYPE_CHECKING:
    import onnx_ir as ir

PRODUCTS = ("MatMul", "Gemm")
"""Never Conv: ConvInteger is several times slower than fp32."""


def products(model: ir.Model) -> list[str]:
    """Names of the matrix products that :func:`dynamic` can quantize, in order."""
    return [str(node.name) for node in model.graph if node.op_type in PRODUCTS and weighted(node)]


def recurrent(model: ir.Model) -> list[str]:
    """Names of the LSTMs that :func:`dynamic` can quantize, in order."""
    return [str(node.name) for node in model.graph if _recurrent(node)]


def dynamic(
    model: ir.Model, nodes: Collection[str], codes: Codes, rounding: Rounding | None = None
) -> ir.Model:
    """Another graph, in which the matrix products and LSTMs named in ``nodes`` compute in 8 bits.

    Activations are unsigned and get a scale for each call (the whole batch at once), weights are
    signed with a scale for each output channel. onnxruntime fuses what is written here into
    DynamicQuantizeMatMul or MatMulIntegerToFloat; ``DynamicQuantizeLSTM`` is its own operator.
    """
    result = copied(model)
    encoded: dict[str, tuple[ir.Value, ir.Value, ir.Value]] = {}
    for node in list(result.graph):
        if node.name not in nodes:
            continue
        if node.op_type == "LSTM":
            _lstm(result, node, codes)
        else:
            _product(result, node, codes, encoded, rounding)
    result.graph.sort()
    swept(result)
    return result


def _product(
    model: ir.Model,
    node: ir.Node,
    codes: Codes,
    encoded: dict[str, tuple[ir.Value, ir.Value, ir.Value]],
    rounding: Rounding | None,
) -> None:
    import onnx_ir as ir

    given, value, out = node.inputs[0], node.inputs[1], node.outputs[0]
    weight, axis = constant(value), axis_of(node)
    assert given is not None
    assert value is not None
    assert weight is not None
    scales = channel_scales(weight, axis, codes)
    taken = (
        rounding(node, weight, scales, axis) if rounding else nearest(weight, scales, axis, codes)
    )
    name = str(node.name)
    if str(given.name) not in encoded:
        encoder = ir.Node(
            "", "DynamicQuantizeLinear", [given], num_outputs=3, name=f"{given.name}_Dynamic"
        )
        for part, end in zip(encoder.outputs, ("quantized", "scale", "zero_point"), strict=True):
            part.name = f"{given.name}_{end}"
        model.graph.insert_before(node, encoder)
        encoded[str(given.name)] = (encoder.outputs[0], encoder.outputs[1], encoder.outputs[2])
    held, scale, zero = encoded[str(given.name)]
    stem = f"{value.name}_of_{name}" if len(value.uses()) > 1 else str(value.name)
    rows = new_constant(model, f"{stem}_quantized", taken.T if axis == 0 else taken)
    zeros = new_constant(model, f"{stem}_zero_point", np.zeros(len(scales), np.int8))
    steps = new_constant(model, f"{stem}_scale", scales)
    product = _node("MatMulInteger", [held, rows, zero, zeros], f"{name}_integer")
    cast = _node("Cast", [product.outputs[0]], f"{name}_cast", ir.AttrInt64("to", 1))
    step = _node("Mul", [scale, steps], f"{name}_step")
    made = [product, cast, step, _node("Mul", [cast.outputs[0], step.outputs[0]], f"{name}_scaled")]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        added_row = constant(bias)
        assert added_row is not None
        added = new_constant(model, f"{name}_bias", added_row.reshape(-1))
        made.append(_node("Add", [made[-1].outputs[0], added], f"{name}_added"))
    _instead(model, node, made, out)


def _recurrent(node: ir.Node) -> bool:
    """Whether the node is an LSTM whose weights are constant and whose cell is the usual one."""
    if node.domain or node.op_type != "LSTM":
        return False
    given = node.attributes
    names = [name.lower() for name in given.get_strings("activations", ())]
    usual = ["sigmoid", "tanh", "tanh"]
    plain = names in ([], usual, usual * 2) and "clip" not in given
    plain &= not given.get_int("layout", 0) and not given.get_int("input_forget", 0)
    peepholes = node.inputs[7] if len(node.inputs) > 7 else None
    weights = [constant(value) for value in node.inputs[1:3]]
    return plain and peepholes is None and all(weight is not None for weight in weights)


def _lstm(model: ir.Model, node: ir.Node, codes: Codes) -> None:
    """Weights ``(directions, gates, inputs)`` become codes ``(directions, inputs, gates)``."""
    import onnx_ir as ir

    inputs: list[ir.Value | None] = [*node.inputs, *[None] * (8 - len(node.inputs))]
    extra: list[ir.Value | None] = []
    for at in (1, 2):
        weight, value = constant(inputs[at]), inputs[at]
        assert weight is not None
        assert value is not None
        turned = np.ascontiguousarray(weight.transpose(0, 2, 1))
        peaks = np.abs(turned).max(axis=1)
        scales = np.where(peaks > 0, peaks / codes.largest, 1.0).astype(np.float32)
        held = np.rint(turned / scales[:, None]).astype(np.int8)
        inputs[at] = new_constant(model, f"{value.name}_quantized", held)
        extra += [
            new_constant(model, f"{value.name}_scale", scales),
            new_constant(model, f"{value.name}_zero_point", np.zeros(scales.shape, np.int8)),
        ]
    fast = ir.Node(
        DOMAIN,
        "DynamicQuantizeLSTM",
        [*inputs, *extra],
        attributes=[one for name, one in node.attributes.items() if name != "layout"],
        num_outputs=len(node.outputs),
        name=f"{node.name}_quantized",
    )
    model.opset_imports.setdefault(DOMAIN, 1)
    for old, new in zip(node.outputs, fast.outputs, strict=True):
        new.name = f"{old.name}_of_8_bits" if old.name else ""  # an output that nobody asked for
        typed(new, old)
    model.graph.insert_before(node, fast)
    for old, new in zip(node.outputs, fast.outputs, strict=True):
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        if new.is_graph_output():
            old.name, new.name = f"{old.name}_float", old.name
    model.graph.remove(node, safe=True)


def _node(op: str, inputs: list[ir.Value], name: str, *attributes: ir.Attr) -> ir.Node:
    import onnx_ir as ir

    node = ir.Node("", op, inputs, attributes=list(attributes), name=name)
    node.outputs[0].name = f"{name}_output"
    return node


def _instead(model: ir.Model, node: ir.Node, made: list[ir.Node], out: ir.Value) -> None:
    """``made`` computes what ``node`` did, under the same name."""
    import onnx_ir as ir

    last = made[-1].outputs[0]
    typed(last, out)
    model.graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(out, last, replace_graph_outputs=True)
    name = out.name
    model.graph.remove(node, safe=True)
    out.name, last.name = f"{name}_float", name
