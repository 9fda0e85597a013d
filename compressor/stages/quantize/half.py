"""Sixteen-bit graphs: fp16, which is CUDA's format, and bf16 where a provider computes in it.

Found with onnxruntime 1.31 on x64: the CPU provider runs fp16, and has no bf16 arithmetic: it
refuses such a graph. Its CUDA provider documents the operators in :data:`BFLOAT`; :func:`supports`
asks a provider for one product. For graphs that stay fp32 there is a session setting that
multiplies in bf16, ``mlas.enable_gemm_fastmath_arm64_bfloat16``; on x64 it changes no bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import Unsuitable, one_line
from compressor.measure.runtime import open_session
from compressor.stages.graph import (
    DOMAIN,
    constant,
    copied,
    new_constant,
    swept,
    typed,
    write,
)
from compressor.task import Array

if TYPE_CHECKING:
    import onnx_ir as ir

STRAYING = (
    *("Pow", "Exp", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "CumSum", "Softplus"),
    *("Log", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "Reciprocal", "Range"),
)
"""Operators whose results leave fp16's range or grid though what they read does not: 300 squared is
past 65504, and above 2048 not every integer is there. PyTorch's autocast runs such in fp32 too. It
does so with LayerNormalization and Softmax, whose results stay in range and whose sums are the
kernel's own business: these may be fp16 here."""

BOUNDING = ("Softmax", "LogSoftmax", "Sigmoid", "Tanh", "Clip", "LayerNormalization", "IsNaN")
"""Operators that bring numbers of any size back into range."""

SMALL = ("Add", "Max", "Clip", "Sqrt", "Expand", "Reshape", "Squeeze", "Unsqueeze", "Identity")
"""Operators that hand on a number too small for fp16, as an epsilon on its way to a division."""

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "GRU", "LSTM", "MatMul", "RNN")
"""Without one of these in 16 bits there is nothing to gain."""

BFLOAT = (
    *("Add", "Sub", "Mul", "Div", "Abs", "Neg", "Min", "Max", "Sqrt", "Erf", "Relu", "Sigmoid"),
    *("Tanh", "HardSigmoid", "HardSwish", "Gelu", "Softmax", "LayerNormalization"),
    *("RMSNormalization", "MatMul", "Gemm", "Conv", "AveragePool", "Where", "Expand", "Attention"),
    *("Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze"),
    *("Transpose", "Unsqueeze"),
)
"""Operators that onnxruntime's CUDA provider has in bf16, as its ``docs/BFloat16_Support.md`` says;
Conv only where the opset is 22 or later."""


GRID = {"FLOAT16": 2.0**-10, "BFLOAT16": 2.0**-7}
"""Relative error that a constant may have: twice what rounding alone makes at most."""

Lanes = tuple[tuple[int, ...], tuple[int, ...]]
"""Places of the inputs and outputs of a node that can change from fp32 to 16 bits."""


def half(model: ir.Model) -> ir.Model:
    """Another graph with fp16 weights and arithmetic; its inputs and outputs keep their types.

    Nodes stay fp32 that are in :data:`STRAYING`, that have a branch or a body, and those with a
    constant that fp16 does not hold: one past 65504, or so small that it would lose more than fp16
    rounds off (a weight matrix may well have a few such elements). Nodes that read what these make
    stay fp32 too, until the numbers are back in range. Casts stand where both worlds meet, one for
    each value and way.

    Raises :class:`Unsuitable` when no multiplication changes.
    """
    import onnx_ir as ir

    return _narrowed(model, ir.DataType.FLOAT16, "fp16")


def bfloat(model: ir.Model) -> ir.Model:
    """As :func:`half` in bf16, and only the operators in :data:`BFLOAT`.

    It runs on providers for which :func:`supports` has nothing to say.
    """
    import onnx_ir as ir

    return _narrowed(model, ir.DataType.BFLOAT16, "bf16", BFLOAT)


def supports(provider: str) -> str | None:
    """Why ``provider`` cannot multiply in bf16, or ``None``; found by asking it to."""
    import onnx_ir as ir

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 8]))
    product = ir.node("MatMul", [x, None], name="product")
    model = ir.Model(
        ir.Graph([x], product.outputs, nodes=[product], opset_imports={"": 20}), ir_version=10
    )
    product.replace_input_with(1, new_constant(model, "w", np.eye(8, dtype=np.float32)))
    product.outputs[0].name, product.outputs[0].dtype = "y", ir.DataType.FLOAT
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        path = Path(folder) / "probe.onnx"
        write(bfloat(model), path)
        try:
            open_session(path, provider).run(None, {"x": np.ones((1, 8), np.float32)})
        except Exception as error:
            return one_line(error, 200)
    return None


def _narrowed(
    model: ir.Model, to: ir.DataType, word: str, only: Collection[str] | None = None
) -> ir.Model:
    import onnx_ir as ir

    result = copied(model)
    result.graph.sort()
    lanes = _joined(
        {
            node: lane
            for node, lane in _fitting(result, to)
            if only is None or (node.op_type in only and not node.domain)
        }
    )
    if not lanes:
        raise Unsuitable(f"no {', '.join(PRODUCTS[:-1])} or {PRODUCTS[-1]} can run in {word}")
    made = [node.outputs[at] for node, (_, outs) in lanes.items() for at in outs]
    narrow = {value: value for value in made}
    for node, (ins, _) in lanes.items():
        for at in ins:
            value = node.inputs[at]
            assert value is not None
            if value not in narrow:
                narrow[value] = _lowered(result, value, to, f"{value.name}_{word}")
            node.replace_input_with(at, narrow[value])
    for value in made:
        value.type = ir.TensorType(to)  # not its dtype: copies share what holds that
        _restored(result, value, lanes, word)
    result.graph.sort()
    swept(result)
    return result


def _joined(lanes: dict[ir.Node, Lanes]) -> dict[ir.Node, Lanes]:
    """Without nodes among which nothing multiplies: they would not pay for the casts."""
    found = [node for node in lanes if node.op_type in PRODUCTS or node.domain]
    seen = set(found)
    while found:
        node = found.pop()
        ins, outs = lanes[node]
        near = [node.inputs[at] for at in ins]
        makers = [value.producer() for value in near if value is not None]
        readers = [use.node for at in outs for use in node.outputs[at].uses()]
        for other in (*makers, *readers):
            if other is not None and other in lanes and other not in seen:
                seen.add(other)
                found.append(other)
    return {node: lane for node, lane in lanes.items() if node in seen}


def _lowered(model: ir.Model, value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
    """The value in 16 bits: a constant, or made by a cast."""
    held, maker = constant(value), value.producer()
    if held is not None:
        return new_constant(model, name, held.astype(to.numpy()))
    if maker is not None and maker.op_type == "Cast" and maker.inputs[0] is not None:
        return _cast(model, maker.inputs[0], to, name)  # one cast, not two
    return _cast(model, value, to, name)


def _restored(model: ir.Model, value: ir.Value, lanes: dict[ir.Node, Lanes], word: str) -> None:
    """Gives readers of a 16-bit value that want fp32, and the caller of the graph, a cast of it."""
    import onnx_ir as ir

    outer = [
        use for use in value.uses() if use.node not in lanes or use.idx not in lanes[use.node][0]
    ]
    if not outer and not value.is_graph_output():
        return
    whole = _cast(model, value, ir.DataType.FLOAT, f"{value.name}_fp32")
    for use in outer:
        use.node.replace_input_with(use.idx, whole)
    if value.is_graph_output():
        places = [at for at, out in enumerate(model.graph.outputs) if out is value]
        name, value.name = value.name, f"{value.name}_{word}"
        whole.name = name  # callers know the output by it
        for at in places:
            model.graph.outputs[at] = whole


def _cast(model: ir.Model, value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
    import onnx_ir as ir

    node = ir.node("Cast", [value], {"to": to}, name=f"{name}_Cast")
    out = node.outputs[0]
    typed(out, value)
    out.name, out.dtype = name, to
    maker = value.producer()
    if maker is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(maker, node)
    return out


def _fitting(model: ir.Model, to: ir.DataType) -> Iterator[tuple[ir.Node, Lanes]]:
    """Nodes that may compute in 16 bits, each with its :data:`Lanes`."""
    kinds = _kinds(model)
    large: set[ir.Value] = set()
    small: set[ir.Value] = set()
    for node in model.graph:
        lanes = _lanes(model, node, kinds, to)
        lost = {_loss(constant(node.inputs[at]), to) for at in lanes[0]}
        grows = "large" in lost or any(value in large for value in node.inputs)
        shrinks = "small" in lost or any(value in small for value in node.inputs)
        if grows and node.op_type not in BOUNDING:
            large.update(node.outputs)
        if "small" in lost or (shrinks and node.op_type in SMALL):
            small.update(node.outputs)
        if lanes[0] and not (grows or shrinks) and node.op_type not in STRAYING:
            yield node, lanes


def _loss(held: Array | None, to: ir.DataType) -> str | None:
    """How a constant leaves the range of 16 bits, if it does."""
    if held is None:
        return None
    exact = held[np.isfinite(held)].astype(np.float64)
    with np.errstate(over="ignore"):
        near = exact.astype(np.float32).astype(to.numpy()).astype(np.float64)
    if not np.isfinite(near).all():
        return "large"
    off = np.linalg.norm(near - exact) > GRID[to.name] * np.linalg.norm(exact)
    return "small" if off else None


def _lanes(
    model: ir.Model, node: ir.Node, kinds: dict[ir.Value, ir.DataType | None], to: ir.DataType
) -> Lanes:
    import onnx_ir as ir

    schema = _schema(model, node)
    known = all(kinds.get(value) for value in (*node.inputs, *node.outputs) if value is not None)
    branches = any(
        found.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for found in node.attributes.values()
    )
    makes = node.op_type == "Cast" or (schema is None and node.domain != DOMAIN)
    if not known or branches or makes:
        return (), ()
    allowed = {} if schema is None else _allowed(schema)
    word = f"tensor({to.name.lower()})"

    def fits(values: Sequence[ir.Value | None], parameters: Sequence[Any]) -> tuple[int, ...]:
        return tuple(
            at
            for at, value in enumerate(values)
            if value is not None
            and kinds[value] == ir.DataType.FLOAT
            and (schema is None or word in allowed.get(_variable(parameters, at), ()))
        )

    return (
        fits(node.inputs, () if schema is None else schema.inputs),
        fits(node.outputs, () if schema is None else schema.outputs),
    )


def _kinds(model: ir.Model) -> dict[ir.Value, ir.DataType | None]:
    """The element type of every value of the main graph, ``None`` where nothing tells it."""
    given = (*model.graph.inputs, *model.graph.initializers.values())
    kinds: dict[ir.Value, ir.DataType | None] = {value: value.dtype for value in given}
    for node in model.graph:
        for at, out in enumerate(node.outputs):
            kinds[out] = out.dtype or _kind(model, node, at, kinds)
    return kinds


def _kind(
    model: ir.Model, node: ir.Node, at: int, kinds: dict[ir.Value, ir.DataType | None]
) -> ir.DataType | None:
    """The type of one output: what the node says, or that of the inputs that share its variable."""
    import onnx_ir as ir

    given = node.attributes
    for name in ("to", "dtype"):
        if name in given:
            return ir.DataType(given.get_int(name))
    if "value" in given:
        return given.get_tensor("value").dtype
    if node.op_type == "ConstantOfShape":
        return ir.DataType.FLOAT
    schema = _schema(model, node)
    read = [value for value in node.inputs if value is not None]
    if schema is None:
        return kinds.get(read[0]) if read and node.domain == DOMAIN else None
    variable = _variable(schema.outputs, at)
    for place, value in enumerate(node.inputs):
        if value is not None and _variable(schema.inputs, place) == variable:
            return kinds.get(value)
    only = _allowed(schema).get(variable, [variable])
    return getattr(ir.DataType, only[0][7:-1].upper(), None) if len(only) == 1 else None


def _schema(model: ir.Model, node: ir.Node) -> Any | None:
    """ONNX's own description of the operator; it has none of onnxruntime's."""
    import onnx

    version = model.graph.opset_imports.get(node.domain)
    try:
        return None if version is None else onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError:
        return None


def _allowed(schema: Any) -> dict[str, list[str]]:
    return {one.type_param_str: list(one.allowed_type_strs) for one in schema.type_constraints}


def _variable(parameters: Sequence[Any], at: int) -> str:
    """The type variable of a parameter; the last may stand for many."""
    return str(parameters[min(at, len(parameters) - 1)].type_str)
