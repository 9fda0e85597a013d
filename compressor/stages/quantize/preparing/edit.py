"""What the rewrites share: new nodes with shapes and names, and where values go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.stages import graph

if TYPE_CHECKING:
    import onnx_ir as ir

Size = int | str | None
"""An axis: its length, the name of a dynamic one (equal names, equal lengths), or unknown."""


def sizes(value: ir.Value | None) -> tuple[Size, ...] | None:
    """Axes of a value with the names of dynamic ones; ``None`` for an unknown rank."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


def emit(
    anchor: ir.Node,
    kind: str,
    inputs: Sequence[ir.Value | None],
    shape: Sequence[Size] | None,
    *,
    domain: str = "",
    like: ir.Value | None = None,
    **attributes: Any,
) -> ir.Value:
    """The output of a new node before ``anchor``; ``like`` lends its type and the stem of its name.

    ``shape`` is what later rewrites may rely on, ``None`` where it is not known.
    """
    import onnx_ir as ir

    assert anchor.graph is not None
    like = like or anchor.outputs[0]
    # Names are unique as those of the graph are; the count tells apart what one value gave rise to.
    taken = {value.name for node in anchor.graph for value in node.outputs}
    stem = name = f"{like.name}_{kind.lower()}"
    number = 0
    while name in taken:
        name, number = f"{stem}_{number}", number + 1
    node = ir.node(
        kind, list(inputs), attributes=attributes, domain=domain, name=name, num_outputs=1
    )
    made = node.outputs[0]
    made.name = name
    graph.typed(made, like)
    made.shape = None if shape is None else ir.Shape(shape)
    anchor.graph.insert_before(anchor, node)
    return made


def replace(old: ir.Value, new: ir.Value) -> None:
    """Whatever reads ``old`` reads ``new``; an output of the graph keeps its name."""
    import onnx_ir as ir

    if old.is_graph_output():
        name = old.name
        old.name = f"{name}_before"
        new.name = name
        graph.typed(new, old)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def only(value: ir.Value) -> ir.Node | None:
    """The single node that reads the value, unless the graph hands it out as well."""
    readers = list(value.uses())
    return readers[0].node if len(readers) == 1 and not value.is_graph_output() else None


def scalar(value: ir.Value | None) -> float | None:
    """A constant of one number."""
    array = graph.constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """A constant list of integers."""
    array = graph.constant(value)
    if array is None or not np.issubdtype(array.dtype, np.integer):
        return None
    return tuple(int(number) for number in array.reshape(-1))


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute, or its default."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def target(shape: Sequence[Size]) -> list[int] | None:
    """What to hand to Reshape for a tensor of this shape: at most one axis may be dynamic."""
    if sum(not isinstance(size, int) for size in shape) > 1 or 0 in shape:
        return None
    return [size if isinstance(size, int) else -1 for size in shape]


def vector(model: ir.Model, anchor: ir.Value, numbers: Sequence[int]) -> ir.Value:
    """A constant int64 vector, named after the value that it serves."""
    return graph.new_constant(model, f"{anchor.name}_numbers", np.array(numbers, np.int64))
