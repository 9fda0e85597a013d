"""Cross-layer equalisation: channels of one tensor get ranges alike, the function stays.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction". A
layer's channel may be divided by ``s`` and the next layer's weights for it multiplied by ``s``
when what lies between is positively homogeneous: ``f(x / s) = f(x) / s``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from compressor.stages.graph import constant, new_constant, swept
from compressor.task import Array

if TYPE_CHECKING:
    import onnx_ir as ir

HOMOGENEOUS = (
    "AveragePool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "Identity",
    "LeakyRelu",
    "MaxPool",
    "PRelu",
    "Relu",
)
"""``f(x / s) = f(x) / s`` for every channel and every s > 0. Not so Clip, Gelu or HardSwish."""

FARTHEST = 2.0**10
"""How far a channel may be scaled in all, up or down."""

CLOSE = 1e-4
"""Scales this near to 1 (as logarithms) end the iteration."""


class Layer(NamedTuple):
    """A Conv, Gemm or MatMul whose weight is constant, and where its bias is: a node's input."""

    node: ir.Node
    output: ir.Value
    bias: tuple[ir.Node, int] | None

    @property
    def axis(self) -> int:
        """Axis of channels in what it reads and in what it writes."""
        return 1 if self.node.op_type == "Conv" else -1


class _Pair(NamedTuple):
    first: Layer
    second: Layer
    clips: tuple[ir.Node, ...]


def layer_of(node: ir.Node) -> Layer | None:
    """``node`` as a layer; ``None`` for another operator or a weight that is computed.

    The Add of a constant that alone reads a MatMul is its bias.
    """
    if node.domain or node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    weight = constant(node.inputs[1])
    if weight is None or (node.op_type != "Conv" and weight.ndim != 2):
        return None
    if node.op_type == "Gemm" and _attribute(node, "transA", 0):
        return None
    output, bias = node.outputs[0], None
    if node.op_type != "MatMul":
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = (node, 2)
    elif len(output.uses()) == 1 and not output.is_graph_output():
        ((add, at),) = output.uses()
        added = constant(add.inputs[1 - at]) if add.op_type == "Add" else None
        if added is not None and added.shape in ((weight.shape[1],), (1,), ()):
            output, bias = add.outputs[0], (add, 1 - at)
    return Layer(node, output, bias)


def unfolded(node: ir.Node, weight: Array) -> Array:
    """A layer's weight as ``(groups, outputs of one, inputs of one, kernel)``, float64."""
    if node.op_type == "Conv":
        groups = _attribute(node, "group", 1)
        shape = (groups, weight.shape[0] // groups, weight.shape[1], -1)
        return weight.reshape(shape).astype(np.float64)
    rows = weight if _attribute(node, "transB", 0) else weight.T
    return rows[None, :, :, None].astype(np.float64)


def folded(node: ir.Node, weight: Array, like: Array) -> Array:
    """The way back from :func:`unfolded`, in the shape and dtype of ``like``."""
    if node.op_type != "Conv":
        weight = weight[0, :, :, 0] if _attribute(node, "transB", 0) else weight[0, :, :, 0].T
    return np.ascontiguousarray(weight.reshape(like.shape), dtype=like.dtype)


def put(model: ir.Model, node: ir.Node, index: int, array: Array) -> None:
    """Gives ``node`` another constant at input ``index``; nobody else who read the old one."""
    import onnx_ir as ir

    value = node.inputs[index]
    assert value is not None
    if value.is_initializer() and len(value.uses()) == 1:
        value.const_value = ir.tensor(array, name=value.name)
        value.shape, value.dtype = ir.Shape(array.shape), value.const_value.dtype
    else:
        name = f"{value.name}_of_{node.outputs[0].name}"
        node.replace_input_with(index, new_constant(model, name, array))


def places(model: ir.Model) -> dict[str, int]:
    """Names of the values between layers that :func:`equalize` can use ``peaks`` of.

    With each its axis of channels.
    """
    found = {}
    for pair in _pairs(model, None):
        for name in (_read(pair.second), *(str(clip.outputs[0].name) for clip in pair.clips)):
            found[name] = pair.first.axis
    return found


def equalize(
    model: ir.Model, peaks: Mapping[str, Array] | None = None, *, rounds: int = 50
) -> list[str]:
    """Evens out, in place, the channels between layers; returns the values that changed.

    Every two layers (Conv, also depthwise, and Conv; Gemm or MatMul and the same) with nothing but
    :data:`HOMOGENEOUS` operators and single readers between them are balanced until nothing moves
    (at most ``rounds`` times over the graph): ``s = sqrt(r1 / r2)``, with ``r1`` the largest
    weight (absolute) that makes a channel and ``r2`` the largest that reads it.

    ``peaks`` has for values (:func:`places`) the largest absolute element of every channel,
    shape ``(channels,)``, from calibration. It takes the place of ``r1``: weights have a scale for
    each output channel, so that what suffers is the tensor between, which has one. With it, a Clip
    from 0 to a bound that no channel reached becomes a Relu, and so no obstacle: the same function
    on the calibration data, not on data beyond it.
    """
    pairs = _pairs(model, {} if peaks is None else peaks)
    nodes = {layer.node for pair in pairs for layer in pair[:2]}
    weights = {node: unfolded(node, _array(node, 1)) for node in nodes}
    total: dict[ir.Node, Array] = {}
    for _ in range(rounds):
        moved = 0.0
        for first, second, _ in pairs:
            one, two = weights[first.node], weights[second.node]
            scale = total.setdefault(first.node, np.ones(one.shape[0] * one.shape[1]))
            peak = None if peaks is None else peaks.get(_read(second))
            made = np.abs(one).max((2, 3)).ravel() if peak is None else peak / scale
            taken = np.abs(two).max((1, 3)).ravel()
            alive = (made > 0) & (taken > 0)
            step = np.sqrt(np.divide(made, taken, out=np.ones_like(scale), where=alive))
            # A channel that calibration hardly saw must not be blown up.
            step = np.clip(step * scale, 1 / FARTHEST, FARTHEST) / scale
            one /= step.reshape(*one.shape[:2], 1, 1)
            two *= step.reshape(two.shape[0], 1, two.shape[2], 1)
            scale *= step
            moved = max(moved, float(np.abs(np.log(step)).max()))
        if moved < CLOSE:
            break
    changed = []
    for first, second, clips in pairs:
        scale = total[first.node]
        if np.abs(np.log(scale)).max() < CLOSE:
            continue
        if first.bias is not None:
            node, index = first.bias
            bias = _array(node, index)
            put(model, node, index, (bias / scale.reshape(_broad(bias, scale))).astype(bias.dtype))
        for clip in clips:
            _opened(model, clip)
        changed.append(_read(second))
    for node in nodes if changed else ():
        old = _array(node, 1)
        put(model, node, 1, folded(node, weights[node], old))
    if changed:
        swept(model)
    return changed


def _pairs(model: ir.Model, peaks: Mapping[str, Array] | None) -> list[_Pair]:
    """Layers that follow each other; without ``peaks`` every Clip at 0 is taken to be open."""
    found = []
    for node in model.graph:
        first = layer_of(node)
        if first is None or (first.bias is not None and constant(_bias(first)) is None):
            continue
        value, clips = first.output, list["ir.Node"]()
        while len(value.uses()) == 1 and not value.is_graph_output():
            ((reader, at),) = value.uses()
            second = layer_of(reader) if at == 0 else None
            if second is not None:
                if second.axis == first.axis and _matching(first, second):
                    found.append(_Pair(first, second, tuple(clips)))
                break
            if at or reader.domain or not (_open(reader, peaks) or reader.op_type in HOMOGENEOUS):
                break
            if reader.op_type == "Clip":
                clips.append(reader)
            if len([output for output in reader.outputs if output.uses()]) > 1:
                break
            value = reader.outputs[0]
    # A weight that several nodes read cannot be scaled for one of them without a second copy.
    return [
        pair
        for pair in found
        if all(len(layer.node.inputs[1].uses()) == 1 for layer in pair[:2])  # type: ignore[union-attr]
    ]


def _matching(first: Layer, second: Layer) -> bool:
    one = unfolded(first.node, _array(first.node, 1))
    two = unfolded(second.node, _array(second.node, 1))
    return bool(one.shape[0] * one.shape[1] == two.shape[0] * two.shape[2])


def _open(node: ir.Node, peaks: Mapping[str, Array] | None) -> bool:
    """Whether ``node`` is a Clip from 0 to a bound that was never reached."""
    if node.op_type != "Clip" or len(node.inputs) < 2:
        return False
    low, high = constant(node.inputs[1]), constant(node.inputs[2] if len(node.inputs) > 2 else None)
    if low is None or float(low) != 0:
        return False
    if peaks is None or high is None:
        return peaks is None or len(node.inputs) < 3
    peak = peaks.get(str(node.outputs[0].name))
    return peak is not None and bool(np.max(peak) < high)


def _opened(model: ir.Model, clip: ir.Node) -> None:
    """Puts a Relu in the place of ``clip``."""
    import onnx_ir as ir

    relu = ir.Node("", "Relu", clip.inputs[:1], name=clip.name)
    old, new = clip.outputs[0], relu.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    model.graph.insert_before(clip, relu)
    ir.convenience.replace_all_uses_with(old, new)
    model.graph.remove(clip, safe=True)


def _attribute(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _array(node: ir.Node, index: int) -> Array:
    array = constant(node.inputs[index])
    assert array is not None
    return array


def _bias(layer: Layer) -> ir.Value | None:
    node, index = layer.bias or (layer.node, 0)
    return node.inputs[index]


def _read(layer: Layer) -> str:
    value = layer.node.inputs[0]
    assert value is not None
    return str(value.name)


def _broad(bias: Array, scale: Array) -> tuple[int, ...]:
    """The shape in which ``scale`` meets ``bias``: a bias of one element becomes one of each."""
    return (1,) * max(bias.ndim - 1, 0) + scale.shape
