"""Shapes of a graph as the dynamo exporter leaves it, and the arithmetic on shapes made constant.

``onnx.shape_inference`` gives every Reshape with a -1 a new unknown axis, and all that follows
broadcasts unknown with known: after the first attention no batch is left. Element counts and
broadcasting rules say which of these unknowns are the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compressor.stages import graph
from compressor.stages.quantize.preparing.edit import (
    Size,
    attribute,
    emit,
    integers,
    replace,
    scalar,
    sizes,
    target,
    vector,
)

if TYPE_CHECKING:
    import onnx_ir as ir

UNKNOWN = "unk__"
"""What onnx calls an axis about which it knows nothing."""

BROADCASTING = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Where", "MatMul", "Max", "Min", "And", "Or", "Xor"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
}


Count = tuple[int, tuple[str, ...]]
"""A length as a product: a number and the names of dynamic axes, sorted."""


def shapes(model: ir.Model) -> int:
    """Gives values their shapes, axes of equal length the same name. Counts the axes named."""
    import onnx_ir as ir
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    known: dict[str, Count] = {}
    for node in model.graph:
        for value in node.outputs:
            axes = sizes(value)
            if axes is None:
                continue
            for at, size in enumerate(axes):
                if isinstance(size, str) and size.startswith(UNKNOWN) and size not in known:
                    found = _size(node, axes, at, known)
                    if found is not None and found[1] != (size,):
                        known[size] = found
            value.shape = ir.Shape([_plain(size, known) for size in axes])
    return len(known)


def _plain(size: Size, known: dict[str, Count]) -> Size:
    """A length by its simplest name; a multiple of a dynamic axis keeps its own."""
    number, names = known.get(size, (0, ())) if isinstance(size, str) else (0, ())
    if names:
        return names[0] if (number, len(names)) == (1, 1) else size
    return number or size


def _size(node: ir.Node, axes: tuple[Size, ...], at: int, known: dict[str, Count]) -> Count | None:
    """How long an axis of unknown length must be."""
    if node.op_type == "Reshape":
        given = sizes(node.inputs[0])
        return None if given is None else _missing(given, axes, at, known)
    if node.op_type == "Range":
        plain = scalar(node.inputs[0]) == 0 and scalar(node.inputs[2]) == 1
        size = _length(node.inputs[1]) if plain else None
        return None if size is None else _product([size], known)
    if node.op_type in BROADCASTING:
        back = at - len(axes)
        if node.op_type == "MatMul" and back >= -2:
            return None
        found = set()
        for source in node.inputs:
            shape = sizes(source)
            if shape is None:
                return None
            found.add(shape[back] if -back <= len(shape) else 1)
        # Of two different lengths that nobody knows, either may be 1.
        found -= {1}
        return _product(list(found), known) if len(found) == 1 else None
    return None


def _product(axes: Sequence[Size], known: dict[str, Count]) -> Count | None:
    """All lengths multiplied; ``None`` if one has no name."""
    number, names = 1, list[str]()
    for size in axes:
        if size is None:
            return None
        factor, more = (size, ()) if isinstance(size, int) else known.get(size, (1, (size,)))
        number *= factor
        names += more
    return number, tuple(sorted(names))


def _missing(
    given: tuple[Size, ...], wanted: tuple[Size, ...], at: int, known: dict[str, Count]
) -> Count | None:
    """The length of one axis of a reshaped tensor: both have as many elements."""
    whole = _product(given, known)
    rest = _product(wanted[:at] + wanted[at + 1 :], known)
    if whole is None or rest is None or not rest[0] or whole[0] % rest[0]:
        return None
    left = list(whole[1])
    for name in rest[1]:
        if name not in left:
            return None
        left.remove(name)
    return whole[0] // rest[0], tuple(left)


def _length(value: ir.Value | None) -> Size:
    """The axis whose length a scalar holds: what one number of a Shape is, however taken."""
    at = None
    while value is not None and (node := value.producer()) is not None:
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "Shape":
            axes, start = sizes(source), attribute(node, "start", 0)
            if at is None and sizes(value) == (1,):
                at = start
            elif at is None or start or attribute(node, "end", None) is not None:
                return None
            return axes[at] if axes is not None and -len(axes) <= at < len(axes) else None
        if node.op_type == "Gather" and at is None:
            index = integers(node.inputs[1])
            if index is None or len(index) != 1:
                return None
            at = index[0]
        elif node.op_type not in {"Squeeze", "Reshape", "Cast", "Identity"}:
            return None
        value = source
    return None


def reshapes(model: ir.Model) -> int:
    """Reshape to constant shapes, one for two in a row, and for a Transpose that moves nothing.

    A Transpose that keeps the order of all axes longer than 1 is a copy; a Reshape costs nothing.
    """
    done = 0
    for node in list(model.graph):
        if node.op_type not in {"Reshape", "Transpose"} or node.inputs[0] is None:
            continue
        source: ir.Value | None = node.inputs[0]
        made = node.outputs[0]
        shape, given = sizes(made), sizes(source)
        if source is None or shape is None or given is None or (wanted := target(shape)) is None:
            continue
        if node.op_type == "Transpose":
            order = attribute(node, "perm", range(len(given))[::-1])
            moved = [axis for axis in order if given[axis] != 1]
            if moved != sorted(moved):
                continue
        above = source.producer()
        twice = above is not None and above.op_type == "Reshape"
        numbers = integers(node.inputs[1]) if node.op_type == "Reshape" else None
        fixed = numbers is not None and 0 not in numbers  # 0 copies an axis
        if fixed and not twice:
            continue
        if twice:
            assert above is not None
            source = above.inputs[0]
        replace(made, emit(node, "Reshape", [source, vector(model, made, wanted)], shape))
        done += 1
    return done


def selections(model: ir.Model) -> int:
    """Takes one index before a Transpose rather than after, where that makes it needless."""
    done = 0
    for node in list(model.graph):
        if node.op_type != "Gather" or node.inputs[0] is None:
            continue
        above, index = node.inputs[0].producer(), graph.constant(node.inputs[1])
        if above is None or above.op_type != "Transpose" or index is None or index.ndim:
            continue
        order = list(attribute(above, "perm", ()))
        if not order:
            continue
        axis = order.pop(attribute(node, "axis", 0))
        if order == sorted(order):
            inputs = [above.inputs[0], node.inputs[1]]
            made = node.outputs[0]
            replace(made, emit(node, "Gather", inputs, sizes(made), axis=axis))
            done += 1
    return done
