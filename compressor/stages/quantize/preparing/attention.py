"""Attention written out by the exporter -> com.microsoft.MultiHeadAttention.

What was written out differs by model: one Linear for queries, keys and values or three, heads
split by Reshape, Slice or Gather, sequence first or batch first. So nothing is matched but the
two products around a Softmax; how their operands came from the last arithmetic is found by running
its moves on the numbers 0, 1, 2 ... and looking where they end up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compressor.stages import graph
from compressor.stages.quantize.preparing.edit import (
    Size,
    attribute,
    emit,
    integers,
    only,
    replace,
    scalar,
    sizes,
    vector,
)
from compressor.task import Array

if TYPE_CHECKING:
    import onnx_ir as ir

MICROSOFT = "com.microsoft"

BATCHES = (2, 3)
"""Moves are run at two batch sizes: an accident of one is none of the other."""


@dataclass(frozen=True)
class Operand:
    """Queries, keys or values: ``[batch, steps, heads * width]`` of a source, from a channel on."""

    source: ir.Value
    first: int
    width: int
    sequence_first: bool
    scale: float


def attention(model: ir.Model) -> int:
    """Replaces Softmax(Q K' * scale + mask) V by one operator. Counts the layers.

    The guard against rows of which everything is masked (NaN becomes 0) moves to the output, where
    it is ``steps`` / ``width`` times cheaper; without a mask, or with a finite one, it is dropped.
    """
    done = 0
    masks: dict[tuple[str | None, int], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type == "Softmax":
            done += _fused(model, node, masks)
    if done:
        model.opset_imports.setdefault(MICROSOFT, 1)
    return done


def _fused(
    model: ir.Model, softmax: ir.Node, masks: dict[tuple[str | None, int], ir.Value]
) -> bool:
    shape = sizes(softmax.outputs[0])
    if shape is None or len(shape) != 4 or attribute(softmax, "axis", -1) not in {-1, 3}:
        return False
    batch, heads, steps, keys = shape
    # A sequence of unknown length cannot be told apart from the batch by running the moves.
    if not (isinstance(heads, int) and isinstance(steps, int) and isinstance(keys, int)):
        return False
    scores, mask = _masked(softmax.inputs[0])
    scores, scale = _scaled(scores)
    product = _maker(scores, "MatMul")
    guarded, after = _guard(softmax.outputs[0])
    if product is None or after is None or after.inputs[0] is not guarded:
        return False
    query = _operand(product.inputs[0], (batch, heads, steps))
    key = _operand(product.inputs[1], (batch, heads, keys), transposed=True)
    value = _operand(after.inputs[1], (batch, heads, keys))
    if query is None or key is None or value is None or query.width != key.width:
        return False
    if value.scale != 1:
        return False
    ending = _ending(after.outputs[0], (batch, heads, steps, value.width))
    if ending is None:
        return False
    bias = None
    if mask is not None:
        bias = _bias(model, softmax, mask, (batch, heads, steps, keys), masks)
        if bias is None:
            return False
    end, sequence_first = ending
    last = end.producer()
    assert last is not None
    parts = [_part(model, last, operand, heads) for operand in (query, key, value)]
    made = emit(
        last,
        "MultiHeadAttention",
        [*parts, None, None, bias],
        (batch, steps, heads * value.width),
        domain=MICROSOFT,
        like=after.outputs[0],
        num_heads=heads,
        scale=scale * query.scale * key.scale,
    )
    if guarded is not softmax.outputs[0] and not (mask is None or _finite(mask)):
        nan = emit(last, "IsNaN", [made], sizes(made), like=made)
        nan.dtype = _boolean()
        zero = graph.new_constant(model, f"{made.name}_zero", np.zeros((), np.float32))
        made = emit(last, "Where", [nan, zero, made], sizes(made), like=made)
    if sequence_first:
        turned = (steps, batch, heads * value.width)
        made = emit(last, "Transpose", [made], turned, like=made, perm=(1, 0, 2))
    wanted = sizes(end)
    if wanted != sizes(made):
        assert wanted is not None
        numbers = [size if isinstance(size, int) else -1 for size in wanted]
        made = emit(last, "Reshape", [made, vector(model, end, numbers)], wanted, like=made)
    replace(end, made)
    return True


def _boolean() -> ir.DataType:
    import onnx_ir as ir

    return ir.DataType.BOOL


def _maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node that made a value, if it is of this kind and nobody else reads the value."""
    node = None if value is None else value.producer()
    return node if value and node and node.op_type == kind and only(value) else None


def _masked(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Scores and what is added to them."""
    node = _maker(value, "Add")
    if node is None:
        return value, None
    for at in (0, 1):
        plain, _ = _scaled(node.inputs[at])
        if _maker(plain, "MatMul") is not None and sizes(plain) == sizes(value):
            return node.inputs[at], node.inputs[1 - at]
    return None, None


def _scaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """A value before it was multiplied with or divided by constant numbers, and their product."""
    scale = 1.0
    while (node := None if value is None else value.producer()) is not None:
        if node.op_type == "Mul":
            constants = [scalar(given) for given in node.inputs]
            at = next((at for at in (0, 1) if constants[at] is not None), None)
            if at is None:
                break
            factor, source = constants[at], node.inputs[1 - at]
        elif node.op_type == "Div" and scalar(node.inputs[1]):
            factor, source = 1 / (scalar(node.inputs[1]) or 1), node.inputs[0]
        else:
            break
        if sizes(source) != sizes(value) or source is None:
            break
        assert factor is not None
        scale, value = scale * factor, source
    return value, scale


def _guard(value: ir.Value) -> tuple[ir.Value, ir.Node | None]:
    """What is left of Where(IsNaN(value), 0, value), and the product that reads it."""
    readers = [use.node for use in value.uses()]
    if sorted(node.op_type for node in readers) == ["IsNaN", "Where"]:
        where = next(node for node in readers if node.op_type == "Where")
        nan = next(node for node in readers if node.op_type == "IsNaN")
        fits = where.inputs[0] is nan.outputs[0] and only(nan.outputs[0]) is where
        if not fits or where.inputs[2] is not value or scalar(where.inputs[1]) != 0:
            return value, None
        value = where.outputs[0]
    node = only(value)
    return value, node if node is not None and node.op_type == "MatMul" else None


def _finite(mask: ir.Value) -> bool:
    """Whether a mask can be seen to hold no infinity: then no row of scores is all infinite."""
    node = mask.producer()
    if node is not None and node.op_type == "Where":
        constants = [graph.constant(value) for value in node.inputs[1:]]
    else:
        constants = [graph.constant(mask)]
    return all(array is not None and np.isfinite(array).all() for array in constants)


def _moved(node: ir.Node, given: Array) -> Array | None:
    """What an operator that only moves numbers makes of them; ``None`` for any other."""
    rest = node.inputs[1:]
    match node.op_type:
        case "Transpose":
            return given.transpose(attribute(node, "perm", tuple(range(given.ndim))[::-1]))
        case "Identity":
            return given
        case "Reshape" if (shape := integers(rest[0])) is not None:
            if 0 in shape:
                return None
            return given.reshape(shape) if -1 in shape or math.prod(shape) == given.size else None
        case "Squeeze" if rest and (axes := integers(rest[0])) is not None:
            return np.squeeze(given, axes) if all(given.shape[at] == 1 for at in axes) else None
        case "Unsqueeze" if (axes := integers(rest[0])) is not None:
            return np.expand_dims(given, axes)
        case "Gather" if (index := graph.constant(rest[0])) is not None:
            return np.take(given, index, attribute(node, "axis", 0))
        case "Slice":
            numbers = [integers(value) for value in rest]
            if any(number is None for number in numbers):
                return None
            starts, ends, *more = [number for number in numbers if number is not None]
            axes = more[0] if more else tuple(range(len(starts)))
            steps = more[1] if len(more) > 1 else (1,) * len(starts)
            if min(steps) < 1:
                return None
            cut: list[slice] = [slice(None)] * given.ndim
            for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
                cut[axis] = slice(start, end, step)
            return given[tuple(cut)]
    return None


def _numbered(shape: tuple[Size, ...], batch: Size, count: int) -> Array | None:
    """A tensor of this shape, for a batch of so many, whose elements are all different."""
    if any(not isinstance(size, int) and (size is None or size != batch) for size in shape):
        return None
    concrete = [size if isinstance(size, int) else count for size in shape]
    return np.arange(math.prod(concrete)).reshape(concrete)


def _operand(
    value: ir.Value | None, wanted: tuple[Size, int, int], transposed: bool = False
) -> Operand | None:
    """Where ``[batch, heads, steps, width]`` (the last two swapped if so said) comes from."""
    batch, heads, steps = wanted
    shape = sizes(value)
    if shape is None or len(shape) != 4:
        return None
    width = shape[2 if transposed else 3]
    expected = (*wanted[:2], *((width, steps) if transposed else (steps, width)))
    if shape != expected or not isinstance(width, int):
        return None
    moves: list[ir.Node] = []
    scale = 1.0
    operand: Operand | None = None
    while value is not None:
        value, factor = _scaled(value)
        scale *= factor
        assert value is not None
        given = sizes(value)
        if given is not None and len(given) == 3:
            for sequence_first in (False, True):
                first = _traced(moves, given, (batch, heads, steps, width), sequence_first)
                if first is not None and transposed == first[1]:
                    # The furthest source is the best: what q, k and v share is moved once.
                    operand = Operand(value, first[0], width, sequence_first, scale)
        node = value.producer()
        if node is None or not _moves(node):
            break
        moves.append(node)
        value = node.inputs[0]
    return operand


def _moves(node: ir.Node) -> bool:
    """Whether an operator only moves numbers."""
    kinds = {"Transpose", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Gather", "Slice"}
    return node.domain == "" and node.op_type in kinds


def _traced(
    moves: list[ir.Node],
    given: tuple[Size, ...],
    wanted: tuple[Size, int, int, int],
    sequence_first: bool,
) -> tuple[int, bool] | None:
    """First channel of the source, and whether the last axes are swapped; ``None`` if otherwise."""
    batch, heads, steps, width = wanted
    axes = (steps, batch) if sequence_first else (batch, steps)
    if given[:2] != axes:
        return None
    found: tuple[int, bool] | None = None
    for count in BATCHES:
        start = dye = _numbered(given, batch, count)
        for node in reversed(moves):
            dye = None if dye is None else _moved(node, dye)
        if start is None or dye is None or dye.ndim != 4:
            return None
        first = int(dye.flat[0])
        ordered = start.transpose(1, 0, 2) if sequence_first else start
        part = ordered[..., first : first + heads * width]
        if first + heads * width > start.shape[2]:
            return None
        split = part.reshape(*part.shape[:2], heads, width).transpose(0, 2, 1, 3)
        if np.array_equal(dye, split):
            now = (first, False)
        elif np.array_equal(dye, split.swapaxes(2, 3)):
            now = (first, True)
        else:
            return None
        if found not in {None, now}:
            return None
        found = now
    return found


def _ending(value: ir.Value, shape: tuple[Size, int, int, int]) -> tuple[ir.Value, bool] | None:
    """The value that has the heads side by side again, and whether its sequence comes first."""
    moves: list[ir.Node] = []
    while (node := only(value)) is not None and _moves(node) and node.inputs[0] is value:
        moves.append(node)
        value = node.outputs[0]
        after = sizes(value)
        if after is None or sum(not isinstance(size, int) for size in after) > 1:
            continue
        for sequence_first in (False, True):
            if after[-1] == shape[1] * shape[3] and all(
                _joined(moves, shape, count, sequence_first) for count in BATCHES
            ):
                return value, sequence_first
    return None


def _joined(
    moves: list[ir.Node], shape: tuple[Size, int, int, int], count: int, sequence_first: bool
) -> bool:
    """Whether the moves put the heads side by side, batch or sequence first, in some shape."""
    start = dye = _numbered(shape, shape[0], count)
    for node in moves:
        dye = None if dye is None else _moved(node, dye)
    if start is None or dye is None:
        return False
    order = (2, 0, 1, 3) if sequence_first else (0, 2, 1, 3)
    return np.array_equal(dye.reshape(-1), start.transpose(order).reshape(-1))


def _part(model: ir.Model, anchor: ir.Node, operand: Operand, heads: int) -> ir.Value:
    """Batch first and only the channels meant, before ``anchor``; one copy for all that need it."""
    source, shape = operand.source, sizes(operand.source)
    assert shape is not None
    if operand.sequence_first:
        turned = (shape[1], shape[0], shape[2])
        source = _shared(source, "Transpose") or emit(
            _next(source, anchor), "Transpose", [source], turned, like=source, perm=(1, 0, 2)
        )
        shape = turned
    width = heads * operand.width
    if width == shape[2]:
        return source
    cut = [
        graph.new_constant(model, f"{source.name}_cut", np.array([number], np.int64))
        for number in (operand.first, operand.first + width, 2)
    ]
    return emit(anchor, "Slice", [source, *cut], (*shape[:2], width), like=source)


def _next(source: ir.Value, anchor: ir.Node) -> ir.Node:
    """The first node that may read a value: right after the one that makes it."""
    node = source.producer()
    if node is None or node.graph is None:
        return anchor
    nodes = list(node.graph)
    return nodes[nodes.index(node) + 1]


def _shared(source: ir.Value, kind: str) -> ir.Value | None:
    """The swap of batch and sequence that another operand has asked for."""
    for use in source.uses():
        if use.node.op_type == kind and attribute(use.node, "perm", None) == (1, 0, 2):
            return use.node.outputs[0]
    return None


def _bias(
    model: ir.Model,
    softmax: ir.Node,
    mask: ir.Value,
    shape: tuple[Size, int, int, int],
    masks: dict[tuple[str | None, int], ir.Value],
) -> ir.Value | None:
    """The mask as [1 or batch, 1 or heads, steps, keys], which the operator asks for."""
    given = sizes(mask)
    if given is None or len(given) > 4:
        return None
    full = (1,) * (4 - len(given)) + given
    if any(size not in {1, whole} for size, whole in zip(full, shape, strict=True)):
        return None
    wanted = (*full[:2], *shape[2:])
    if wanted == given:
        return mask
    if (mask.name, shape[2]) not in masks:
        numbers = vector(model, mask, [1, 1, *shape[2:]])
        masks[mask.name, shape[2]] = emit(softmax, "Expand", [mask, numbers], wanted, like=mask)
    return masks[mask.name, shape[2]]
