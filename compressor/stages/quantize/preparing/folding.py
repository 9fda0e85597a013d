"""What can be computed, or left out, before a model ever runs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from compressor.stages import graph
from compressor.stages.quantize.preparing.edit import (
    attribute,
    emit,
    integers,
    only,
    replace,
    sizes,
    vector,
)

if TYPE_CHECKING:
    import onnx_ir as ir

LIMIT = 2**20
"""Bytes up to which a constant is computed beforehand: a larger one costs more to read."""


def constants(model: ir.Model) -> int:
    """Computes what depends on constants only. Counts the nodes that are gone."""
    from onnx_ir.passes.common import LiftConstantsToInitializersPass
    from onnxscript import optimizer

    before = model.graph.num_nodes()
    noise = logging.getLogger("onnxscript.optimizer")
    level = noise.level
    noise.setLevel(logging.ERROR)  # what onnx cannot compute stays, which is no news to the user
    try:
        optimizer.fold_constants(model, input_size_limit=LIMIT, output_size_limit=LIMIT)
    finally:
        noise.setLevel(level)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    graph.swept(model)
    return before - model.graph.num_nodes()


def needless(model: ir.Model) -> int:
    """Removes Identity and Dropout, which do nothing at inference."""
    done = 0
    for node in list(model.graph):
        source, made = (node.inputs or (None,))[0], node.outputs[0]
        if node.op_type not in {"Dropout", "Identity"} or node.domain or source is None:
            continue
        if node.op_type == "Dropout":
            training = node.inputs[2] if len(node.inputs) > 2 else None
            off = training is None or graph.constant(training) == np.False_
            if not off or any(mask.uses() or mask.is_graph_output() for mask in node.outputs[1:]):
                continue
        # The graph's outputs keep their names, which its inputs cannot take over.
        if made.is_graph_output() and (source.producer() is None or source.is_graph_output()):
            continue
        replace(made, source)
        done += 1
    return done


def norms(model: ir.Model) -> int:
    """Folds BatchNormalization into the convolution or linear layer before it."""
    done = 0
    for node in list(model.graph):
        above = node.inputs[0].producer() if node.inputs and node.inputs[0] else None
        if node.op_type != "BatchNormalization" or above is None or node.domain:
            continue
        held = [graph.constant(value) for value in node.inputs[1:5]]
        weight = graph.constant(above.inputs[1]) if len(above.inputs) > 1 else None
        if weight is None or any(array is None for array in held) or len(node.outputs) > 1:
            continue
        axis = {
            "Conv": 0,
            "ConvTranspose": 1 if attribute(above, "group", 1) == 1 else None,
            "Gemm": 1 - attribute(above, "transB", 0),
        }.get(above.op_type)
        if axis is None or only(above.outputs[0]) is not node:
            continue
        if any(attribute(above, name, 1.0) != 1.0 for name in ("alpha", "beta")):
            continue
        scale, shift, mean, variance = (np.float64(array) for array in held if array is not None)
        bias = above.inputs[2] if len(above.inputs) > 2 else None
        old = np.zeros_like(mean) if bias is None else graph.constant(bias)
        if old is None or attribute(node, "training_mode", 0):
            continue
        factor = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        along = factor.reshape([-1 if at == axis else 1 for at in range(weight.ndim)])
        name = node.outputs[0].name
        inputs = [
            above.inputs[0],
            graph.new_constant(model, f"{name}_weight", (weight * along).astype(weight.dtype)),
            graph.new_constant(
                model, f"{name}_bias", ((old - mean) * factor + shift).astype(weight.dtype)
            ),
        ]
        kept = {key: found.value for key, found in above.attributes.items()}
        replace(node.outputs[0], emit(node, above.op_type, inputs, sizes(node.outputs[0]), **kept))
        done += 1
    return done


def pools(model: ir.Model) -> int:
    """The mean over an image -> GlobalAveragePool, which has an 8-bit kernel."""
    done = 0
    for node in list(model.graph):
        if node.op_type != "ReduceMean" or node.domain or node.inputs[0] is None:
            continue
        shape, made = sizes(node.inputs[0]), node.outputs[0]
        given = node.inputs[1] if len(node.inputs) > 1 else None
        axes = attribute(node, "axes", None) if given is None else integers(given)
        if shape is None or len(shape) != 4 or axes is None:
            continue
        if {at % 4 for at in axes} != {2, 3}:
            continue
        pooled = emit(node, "GlobalAveragePool", [node.inputs[0]], (*shape[:2], 1, 1))
        if not attribute(node, "keepdims", 1):
            pooled = emit(node, "Squeeze", [pooled, vector(model, made, (2, 3))], shape[:2])
        replace(made, pooled)
        done += 1
    return done
