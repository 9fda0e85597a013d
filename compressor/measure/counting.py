"""Parameters and multiply-accumulates: of a PyTorch model, and of a graph in an ONNX file."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compressor import guard
from compressor.errors import one_line
from compressor.loading.onnxfile import attribute, bodies, nodes_of, params_of
from compressor.task import Input, Inputs

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def params(model: nn.Module) -> int:
    """Elements of all parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, examples: Inputs) -> int:
    """Multiply-accumulates of one forward pass over ``examples`` (half of torch's FLOPs).

    Counts convolutions, matrix products and attention; elementwise work is not counted. Leaves
    ``model`` in evaluation mode.
    """
    # Fused kernels hide their products from the counter: recurrent layers in oneDNN, the fast
    # path of TransformerEncoderLayer, attention on the CPU. Convolutions keep oneDNN: without it
    # depthwise ones took up to a minute on a busy machine.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # it warns of Intel GPUs that are not there
            torch.backends.mkldnn.flags(enabled=not recurrent),
            sdpa_kernel(SDPBackend.MATH),
            torch.no_grad(),
            FlopCounterMode(display=False) as counter,
        ):
            model.eval()(*map(torch.from_numpy, examples))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2


# --- ONNX


class Counted(NamedTuple):
    """What an ONNX file costs. ``params`` are the elements of the constants that its nodes compute
    with. ``macs`` are the multiply-accumulates of one example; ``None`` where ``uncounted`` names
    the nodes whose products could not be counted, and why."""

    params: int
    macs: int | None
    uncounted: tuple[str, ...] = ()


Shapes = Mapping[str, tuple[int, ...]]
"""Of the values of a graph, as far as they are known."""

ONNX = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Domains whose operators are known."""

PRODUCTS = ("Attention", "Conv", "Gemm", "Linear", "LSTM", "MatMul", "MoE", "SVM")
"""Operators with such a word in their name multiply, or may do so."""

APART = ("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear")
"""Operators that do not, in spite of their name."""

SHAPING = 4096
"""Elements of a constant that may say a shape; larger ones only have one."""


def counted(path: Path, inputs: Sequence[Input]) -> Counted:
    """Counts the ONNX file at ``path``, which takes ``inputs``, as :func:`macs` does; nothing in it
    is run.

    Shapes are those that ONNX infers for a batch of 1, or of the size that the file fixes. The file
    is one that :func:`compressor.loading.onnxfile.read` has let pass.
    """
    import onnx
    from onnx import inliner, shape_inference

    model = onnx.load(path, load_external_data=False)
    weights = params_of(model)
    try:
        if model.functions:
            model = inliner.inline_local_functions(model)
        plain = onnx.ModelProto()
        plain.CopyFrom(model)
        batch = _settle(plain, path, inputs)
        inferred = shape_inference.infer_shapes(_folded(plain), data_prop=True).graph
    except Exception as error:  # ONNX's own C++ code raises what has no base of its own
        return Counted(weights, None, (f"no shapes: {one_line(error, 120)}",))
    shapes = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    total, uncounted = 0, []
    for at, node in enumerate(model.graph.node):
        if inner := [one.op_type for body in bodies(node) for one in nodes_of(body) if _heavy(one)]:
            uncounted.append(f"{node.op_type} around {', '.join(sorted(set(inner)))}")
        if not _heavy(node):
            continue
        rule = MACS.get(node.op_type) if node.domain in ONNX else None
        try:
            total += (rule or _unknown)(node, shapes)
        except (LookupError, ValueError):
            why = "unknown shapes" if rule else "an unknown operator"
            uncounted.append(f"{node.op_type} {node.name or at} ({why})")
    macs = None if uncounted else total // batch
    return Counted(weights, macs, tuple(dict.fromkeys(uncounted)))


def vetted(path: Path, inputs: Sequence[Input]) -> None:
    """Counts a file of somebody else's in the guard's child first: a few nodes may be made to
    describe shapes that no memory holds. Raises :class:`InputError` for such a file."""
    said = json.dumps([asdict(one) for one in inputs])
    guard.guarded(f"{__name__}:_vetted", path, imports=("onnxscript",), inputs=said)


def _vetted(path: Path, inputs: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    counted(path, [Input(**{**one, "shape": tuple(one["shape"])}) for one in json.loads(inputs)])
    return {}, {}


def _heavy(node: NodeProto) -> bool:
    """Whether the node sums up products, or may do so."""
    if node.domain not in ONNX or node.op_type in MACS:
        return True
    return node.op_type not in APART and any(word in node.op_type for word in PRODUCTS)


# Shapes.


def _settle(model: ModelProto, path: Path, inputs: Sequence[Input]) -> int:
    """Makes the graph, in place, one whose shapes ONNX can infer; returns its batch.

    Inputs get their sizes, what was said of other values is dropped, large constants keep their
    shapes only, and operators of onnxruntime give way to ONNX's with outputs of the same shape.
    """
    from onnx import external_data_helper, helper

    graph = model.graph
    held = {tensor.name for tensor in graph.initializer}
    given = [value for value in graph.input if value.name not in held]
    firsts = [value.type.tensor_type.shape.dim[:1] for value in given]
    batch = max([1, *(dim.dim_value for dims in firsts for dim in dims)])
    fed = [
        helper.make_tensor_value_info(
            value.name, value.type.tensor_type.elem_type, (batch, *one.shape)
        )
        for value, one in zip(given, inputs, strict=True)
    ]
    kept = []
    for tensor in graph.initializer:
        if math.prod(tensor.dims) > SHAPING:
            fed.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
            continue
        if external_data_helper.uses_external_data(tensor):
            external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
        kept.append(tensor)
    nodes = [_plain(node, fed) for node in graph.node]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    for name, values in {"input": fed, "initializer": kept, "node": nodes}.items():
        graph.ClearField(name)
        getattr(graph, name).extend(values)
    graph.ClearField("value_info")
    return int(batch)


def _folded(model: ModelProto) -> ModelProto:
    """The graph with the arithmetic on shapes done, which ONNX's own inference knows in parts."""
    import onnx_ir as ir
    from onnxscript import optimizer

    def folds(node: ir.Node) -> bool | None:
        if node.op_type == "ConstantOfShape":  # which may say any size
            size = node.inputs[0].const_value if node.inputs[0] is not None else None
            small = size is not None and math.prod(size.numpy().tolist()) <= SHAPING
            return None if small else False
        return None if node.op_type in SIZES else False

    made = ir.from_proto(model)
    optimizer.fold_constants(made, onnx_shape_inference=True, should_fold=folds)
    return ir.to_proto(made)


SIZES = (
    *("Add", "Cast", "Concat", "Constant", "Div", "Equal", "Gather", "Identity", "Mul", "Neg"),
    *("ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"),
)
"""Operators that sizes are reckoned with."""


def _plain(node: NodeProto, fed: list[Any]) -> NodeProto:
    """An operator of ONNX with outputs of the same shape, where the node is one of onnxruntime's;
    ``fed`` takes the shapes of the constants that it needs."""
    from onnx import TensorProto, helper

    if node.domain != "com.microsoft" or node.op_type not in ALIKE:
        return node
    op = ALIKE[node.op_type]
    given = list(node.input)
    if node.op_type in WIDTHS:
        shape = WIDTHS[node.op_type](node)
        given = [node.input[0], f"{node.output[0]}/{op}"]
        fed.append(helper.make_tensor_value_info(given[1], TensorProto.FLOAT, shape))
    plain = helper.make_node(op, given[: TAKES.get(op, len(given))], node.output[:1])
    if op not in TAKES:
        plain.attribute.extend(node.attribute)
    return plain


ALIKE = {
    "BiasGelu": "Identity",
    "DynamicQuantizeLSTM": "LSTM",
    "DynamicQuantizeMatMul": "MatMul",
    "FastGelu": "Identity",
    "FusedConv": "Conv",
    "FusedGemm": "Gemm",
    "Gelu": "Identity",
    "MatMulIntegerToFloat": "MatMul",
    "MatMulNBits": "MatMul",
    "MultiHeadAttention": "Identity",
    "QuickGelu": "Identity",
    "SkipLayerNormalization": "Identity",
    "SkipSimplifiedLayerNormalization": "Identity",
    "SimplifiedLayerNormalization": "Identity",
}
"""ONNX's operators whose first output has the shape that onnxruntime's own have."""

TAKES = {"Identity": 1, "MatMul": 2}
"""Of those, the ones without attributes, and how many inputs they have."""

WIDTHS: dict[str, Callable[[NodeProto], tuple[int, int]]] = {
    "MatMulNBits": lambda node: (attribute(node, "K", 0), attribute(node, "N", 0)),
}
"""Shapes of constants that are stored in another one."""


# Multiply-accumulates.


def _unknown(node: NodeProto, shapes: Shapes) -> int:
    raise LookupError(node.op_type)


def _conv(node: NodeProto, shapes: Shapes, weights: int = 1) -> int:
    """Each output sums over a filter; weights are (outputs, inputs / groups, *kernel)."""
    return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[weights]][1:])


def _deconv(node: NodeProto, shapes: Shapes) -> int:
    """Each input goes into a filter; weights are (inputs, outputs / groups, *kernel)."""
    return math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])


def _product(node: NodeProto, shapes: Shapes) -> int:
    """Each output sums over the last axis of the first factor, or the one before."""
    turned = attribute(node, "transA", 0)
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-2 if turned else -1]


def _blocks(node: NodeProto, shapes: Shapes) -> int:
    inner, outer = WIDTHS[node.op_type](node)
    return math.prod(shapes[node.input[0]][:-1]) * inner * outer


def _recurrent(node: NodeProto, shapes: Shapes) -> int:
    """All gates in every step, of the input and of the hidden state."""
    steps, batch, _ = shapes[node.input[0]]
    return steps * batch * sum(math.prod(shapes[node.input[at]]) for at in (1, 2))


def _einsum(node: NodeProto, shapes: Shapes) -> int:
    """Every combination of the indices of two factors."""
    left = attribute(node, "equation", b"").decode().replace(" ", "").partition("->")[0]
    terms = left.split(",")
    if len(terms) == 1:
        return 0
    if len(terms) > 2 or "." in left:
        raise LookupError(left)
    named = zip(terms, (shapes[name] for name in node.input), strict=True)
    sizes = {label: size for term, shape in named for label, size in zip(term, shape, strict=True)}
    return math.prod(sizes.values())


def _attention(node: NodeProto, shapes: Shapes) -> int:
    """Scores and their product with the values: three inputs (batch, rows, width) or (batch, heads,
    rows, width); fewer heads of keys and values serve all of the queries."""
    query, key, value = (shapes[name] for name in node.input[:3])
    past = shapes[node.input[4]][2] if len(node.input) > 4 and node.input[4] else 0
    if len(query) == 4:
        heads, wide, deep = query[1], query[3], value[3]
    else:
        heads = attribute(node, "q_num_heads", 0) or attribute(node, "num_heads", 1)
        wide = query[2] // heads
        deep = value[2] // (attribute(node, "kv_num_heads", 0) or heads)
    return query[0] * heads * query[-2] * (key[-2] + past) * (wide + deep)


def _separate(node: NodeProto, shapes: Shapes) -> int:
    """onnxruntime's ``MultiHeadAttention`` with queries, keys and values of their own."""
    if any(len(shapes[name]) != 3 for name in node.input[:3]) or len(node.input) > 6:
        raise LookupError(node.op_type)  # packed, or with a past
    return _attention(node, shapes)


def _projected(node: NodeProto, shapes: Shapes) -> int:
    """onnxruntime's ``Attention``, which holds the projections to queries, keys and values."""
    (batch, rows, _), weights = shapes[node.input[0]], shapes[node.input[1]]
    if len(node.input) > 4 and node.input[4]:
        raise LookupError("a past")
    sizes = attribute(node, "qkv_hidden_sizes", [weights[1] // 3] * 3)
    return batch * rows * (math.prod(weights) + rows * int(sizes[1] + sizes[2]))


MACS: dict[str, Callable[[NodeProto, Shapes], int]] = {
    "Attention": lambda node, shapes: (_projected if node.domain else _attention)(node, shapes),
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _deconv,
    "DynamicQuantizeLSTM": _recurrent,
    "DynamicQuantizeMatMul": _product,
    "Einsum": _einsum,
    "FusedConv": _conv,
    "FusedGemm": _product,
    "GRU": _recurrent,
    "Gemm": _product,
    "LSTM": _recurrent,
    "MatMul": _product,
    "MatMulInteger": _product,
    "MatMulIntegerToFloat": _product,
    "MatMulNBits": _blocks,
    "MultiHeadAttention": _separate,
    "QLinearConv": lambda node, shapes: _conv(node, shapes, 3),
    "QLinearMatMul": _product,
    "RNN": _recurrent,
}
"""Of one node, for the whole batch; ``LookupError`` or ``ValueError`` where it cannot be told."""
