"""Small ONNX graphs in onnx's own text form, for the tests of quantization."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
from onnx import numpy_helper

from compressor.stages.graph import opened
from compressor.stages.quantize.histogram import Range
from compressor.stages.quantize.plan import plan

if TYPE_CHECKING:
    from compressor.task import Array

HEAD = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]> g '


def drawn(text: str, **held: Array | np.float32) -> ir.Model:
    """The graph ``(inputs) => (outputs) { nodes }`` with these constants, types inferred.

    A node is named after its operator and its first output: ``y = Conv(x, w)`` is ``Conv_y``.
    """
    model = onnx.parser.parse_model(HEAD + text)
    for node in model.graph.node:
        node.name = f"{node.op_type}_{node.output[0]}"
    for name, value in held.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def floats(seed: int, *shapes: tuple[int, ...]) -> list[Array]:
    """Normal float32 arrays of these shapes."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def answers(model: ir.Model, **given: Array) -> dict[str, Array]:
    """What the graph makes of these inputs, by output."""
    names = [str(value.name) for value in model.graph.outputs]
    with opened(model) as run:
        return dict(zip(names, run(given), strict=True))


def ranges_of(
    model: ir.Model, given: Mapping[str, Array], left: Collection[str] = ()
) -> dict[str, Range]:
    """The range of each value that the plan wants one of, on these inputs."""
    wanted = plan(model, left).ranged
    other = model.clone()
    values = {str(out.name): out for node in other.graph for out in node.outputs}
    shown = {str(value.name) for value in other.graph.outputs}
    other.graph.outputs.extend(
        values[name] for name in wanted if name in values and name not in shown
    )
    seen = {**given, **answers(other, **given)}
    return {
        name: Range(min(float(seen[name].min()), 0.0), max(float(seen[name].max()), 0.0))
        for name in wanted
    }


def sqnr(exact: Array, seen: Array) -> float:
    """Decibels."""
    noise = np.square(exact.astype(np.float64) - seen).sum()
    return float(10 * np.log10(np.square(exact.astype(np.float64)).sum() / max(noise, 1e-300)))
