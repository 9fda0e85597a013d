"""Recurrent layers without the zeros that they start from anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.stages import graph

if TYPE_CHECKING:
    import onnx_ir as ir

STATES = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}
"""Inputs with the initial state, by operator."""

KEEPING = {
    *("Cast", "Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Tile"),
    *("Transpose", "Unsqueeze"),
}
"""Operators that make zeros out of zeros."""


def states(model: ir.Model) -> int:
    """Drops initial states that are zero: the exporter builds them at run time, at every step of
    the stack, and zero is the default. Counts the inputs dropped."""
    done = 0
    for node in list(model.graph):
        for at in STATES.get(node.op_type, ()):
            if at < len(node.inputs) and node.inputs[at] is not None and _zero(node.inputs[at]):
                node.replace_input_with(at, None)
                done += 1
    return done


def _zero(value: ir.Value | None) -> bool:
    """Whether a value is zero whatever the input is."""
    while value is not None:
        array = graph.constant(value)
        if array is not None:
            return not array.any()
        node = value.producer()
        if node is None:
            return False
        if node.op_type == "ConstantOfShape":
            filled = node.attributes.get("value")
            return filled is None or not filled.as_tensor().numpy().any()
        if node.op_type not in KEEPING:
            return False
        value = node.inputs[0]
    return False
