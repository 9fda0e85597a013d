"""Which nodes of a graph compute in 8 bits, and which of its values are held in 8 bits for that."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compressor.stages.graph import constant
from compressor.stages.quantize.kernels import CLAMPING, COMPUTING, PASSING, WEIGHTED
from compressor.task import Array

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Plan:
    """Names of nodes and values of one graph.

    ``weighted`` are the nodes that quantization is for, in order; ``inside`` all that compute in 8
    bits. ``held`` maps every value that is held in 8 bits to the one whose range it has: its own
    name, or that of the value that it was moved from. ``made`` are those of them that come out of a
    node inside, so that nobody needs them in float.
    """

    weighted: tuple[str, ...]
    inside: frozenset[str]
    held: dict[str, str]
    made: frozenset[str]

    @property
    def ranged(self) -> tuple[str, ...]:
        """Values whose ranges are wanted, in order."""
        return tuple(dict.fromkeys(self.held.values()))


def plan(model: ir.Model, left: Collection[str] = ()) -> Plan:
    """What static quantization makes of ``model``, whose nodes have names of their own.

    Nodes named in ``left`` stay float. A node without weights is inside where all that it reads
    comes from inside and something inside reads what it makes; so no value is brought into 8 bits
    only for it.
    """
    nodes = list(model.graph)
    hearts = [node for node in nodes if weighted(node) and node.name not in left]
    inside = {*hearts, *(node for node in nodes if _computing(node) and node.name not in left)}
    absorbed = {node for node in nodes if _absorbed(node, inside)}
    while loose := {
        node
        for node in inside
        if not weighted(node)
        and not (
            all(_fed(value, inside, absorbed) for value in node.inputs if value is not None)
            and any(_read(value, inside, absorbed) for value in node.outputs)
        )
    }:
        inside -= loose
        absorbed = {node for node in nodes if _absorbed(node, inside)}
    held: dict[str, str] = {}
    made: set[str] = set()
    for node in nodes:  # in order, so that what a value was moved from is known
        if node in inside:
            for value in _activations(node):
                _hold(value, held, inside, absorbed)
            out = node.outputs[0]
            while (reader := _only(out)) in absorbed and reader is not None:
                out = reader.outputs[0]
            must = node.op_type == "Conv" or node.op_type in COMPUTING
            if must or _read(out, inside, absorbed):
                held.setdefault(str(out.name), str(out.name))
                made.add(str(out.name))
    return Plan(
        weighted=tuple(str(node.name) for node in hearts),
        inside=frozenset(str(node.name) for node in inside),
        held=held,
        made=frozenset(made),
    )


def weighted(node: ir.Node) -> bool:
    """Whether an 8-bit kernel can take the node with its constant weights."""
    if node.domain or node.op_type not in WEIGHTED or len(node.inputs) < 2:
        return False
    weight = constant(node.inputs[1])
    if weight is None or weight.dtype != np.float32 or constant(node.inputs[0]) is not None:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant(bias) is None:
        return False
    if node.op_type == "MatMul":
        return weight.ndim == 2
    if node.op_type == "Gemm":
        given = node.attributes
        plain = all(given.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
        added = constant(bias)
        rows = added is None or (
            added.ndim > 0 and added.size == added.shape[-1] == _width(node, weight)
        )
        return plain and rows and not given.get_int("transA", 0)
    return weight.ndim >= 3


def _width(node: ir.Node, weight: Array) -> int:
    return int(weight.shape[0 if node.attributes.get_int("transB", 0) else 1])


def axis_of(node: ir.Node) -> int:
    """The axis of a weighted node's weight that counts its output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return 1


def _computing(node: ir.Node) -> bool:
    if node.domain or node.op_type not in COMPUTING:
        return False
    if any(_integers(value) for value in (*node.inputs, *node.outputs)):
        return False
    if node.op_type in ("Add", "Mul"):  # of two activations: constants are left to other rewrites
        return all(constant(value) is None for value in node.inputs)
    return True


def _integers(value: ir.Value | None) -> bool:
    """Whether a value is known to be of another type than float32."""
    import onnx_ir as ir

    return value is not None and value.dtype is not None and value.dtype != ir.DataType.FLOAT


def _activations(node: ir.Node) -> Iterator[ir.Value]:
    """What a node inside reads that is neither a weight nor a bias."""
    count = 1 if node.op_type in WEIGHTED else len(node.inputs)
    for value in node.inputs[:count]:
        if value is not None and constant(value) is None:
            yield value


def _passing(node: ir.Node | None) -> bool:
    if node is None or node.domain or node.op_type not in PASSING:
        return False
    if node.op_type == "MaxPool" and len(node.outputs) > 1:
        return False
    if node.op_type == "Resize":
        return node.attributes.get_string("mode", "nearest") == "nearest"
    return not _integers(node.inputs[0])


def _only(value: ir.Value) -> ir.Node | None:
    """The one node that reads the value and that nothing else sees."""
    readers = value.consumers()
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return readers[0] if alone else None


def _absorbed(node: ir.Node, inside: Collection[ir.Node]) -> bool:
    """Whether the node only clamps what a node inside makes for it alone."""
    value = node.inputs[0] if node.inputs else None
    if node.domain or node.op_type not in CLAMPING or value is None or _only(value) is not node:
        return False
    if node.op_type == "Clip" and any(
        bound is not None and constant(bound) is None for bound in node.inputs[1:]
    ):
        return False
    return value.producer() in inside


def _fed(value: ir.Value, inside: Collection[ir.Node], absorbed: Collection[ir.Node]) -> bool:
    """Whether the value comes from inside, moved and clamped at most."""
    node = value.producer()
    while node is not None and node not in inside and (node in absorbed or _passing(node)):
        assert node.inputs[0] is not None
        node = node.inputs[0].producer()
    return node in inside


def _read(value: ir.Value, inside: Collection[ir.Node], absorbed: Collection[ir.Node]) -> bool:
    """Whether something inside reads the value, moved and clamped at most."""
    return any(
        reader in inside
        or (
            (reader in absorbed or (_passing(reader) and reader.inputs[0] is value))
            and any(_read(out, inside, absorbed) for out in reader.outputs)
        )
        for reader in value.consumers()
    )


def _hold(
    value: ir.Value,
    held: dict[str, str],
    inside: Collection[ir.Node],
    absorbed: Collection[ir.Node],
) -> str:
    """Holds a value, and what it was moved from, in the codes of the latter; gives its name."""
    name = str(value.name)
    if name in held:
        return held[name]
    node = value.producer()
    source = name
    if node is not None and node not in inside and _passing(node):
        assert node.inputs[0] is not None
        if constant(node.inputs[0]) is None and not _integers(node.inputs[0]):
            source = _hold(node.inputs[0], held, inside, absorbed)
    held[name] = source
    return source
