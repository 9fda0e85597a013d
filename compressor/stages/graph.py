"""ONNX graphs at hand: read, looked into, written. The library is onnx_ir."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.artifact import replacing
from compressor.errors import StageError, one_line
from compressor.measure.runtime import open_session
from compressor.task import Array

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "com.microsoft"
"""Of onnxruntime's own operators."""

LIMIT = 2**31 - 2**20
"""Bytes that one ONNX file may hold; larger models keep their tensors in a file beside it."""


def read(path: Path) -> ir.Model:
    """The graph at ``path`` with its tensors in memory; every node has a name of its own.

    Raises :class:`StageError` for a file that is not ONNX.
    """
    import onnx_ir as ir

    try:
        model = ir.load(path)
        ir.external_data.load_to_model(model)
        taken: set[str] = set()
        for node in model.graph:
            name, number = node.name or f"node_{node.outputs[0].name}", 1
            while name in taken:
                name, number = f"{node.name}_{number}", number + 1
            node.name = name
            taken.add(name)
    except Exception as error:
        raise StageError(f"{path} is not an ONNX file: {one_line(error, 100)}") from None
    return model


def write(model: ir.Model, path: Path, name: str | None = None) -> tuple[Path, ...]:
    """Writes ``model``: the same graph gives the same bytes.

    A model over :data:`LIMIT` bytes leaves its tensors to a file beside it, named after ``name``
    (by default after ``path``) and its content, so that no other model's file is touched; the paths
    of such files come back.
    """
    import onnx
    import onnx_ir as ir

    if sum(value.const_value.nbytes for value in _constants(model)) <= LIMIT:
        proto = ir.serde.serialize_model(model)
        cleaned(proto)
        path.write_bytes(proto.SerializeToString(deterministic=True))
        return ()
    total = hashlib.sha256()
    for value in _constants(model):
        total.update(value.const_value.tobytes())
    beside = path.with_name(f"{name or path.name}.{total.hexdigest()[:8]}.data")
    with tempfile.TemporaryDirectory(prefix=".compressor-", dir=path.parent) as folder:
        whole = Path(folder) / path.name
        ir.save(copied(model), whole, external_data=beside.name)
        proto = onnx.load(whole, load_external_data=False)
        cleaned(proto)
        path.write_bytes(proto.SerializeToString(deterministic=True))
        with replacing(beside) as part:
            (Path(folder) / beside.name).replace(part)
    return (beside,)


def store(model: ir.Model, path: Path, check: Callable[[Path], object]) -> tuple[Path, ...]:
    """:func:`write` to ``path`` so that a reader sees the old model or the new one, never a part.

    ``check`` gets the new file before it takes the old one's place, and stops that by raising.
    """
    before = set(path.parent.glob(f"{path.name}.*.data"))
    companions: tuple[Path, ...] = ()
    try:
        with replacing(path) as beside:
            companions = write(model, beside, path.name)
            check(beside)
    except BaseException:
        for file in set(companions) - before:
            file.unlink(missing_ok=True)
        raise
    for file in before - set(companions):
        file.unlink(missing_ok=True)
    return companions


def _constants(model: ir.Model) -> list[Any]:
    held = model.graph.initializers.values()
    return [value for value in held if value.const_value is not None]


def cleaned(proto: Any) -> None:
    """Removes, in place, what differs between machines or misleads the quantizer.

    Stack traces and paths are no part of a model; the exporter's shapes of initialisers break
    ``quantize_dynamic`` ("Inferred shape and existing shape differ").
    """
    owners = [proto, *proto.functions]
    graphs = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while graphs:
        graph = graphs.pop()
        del graph.value_info[:]
        owners += [graph, *graph.input, *graph.output, *graph.initializer]
        nodes += graph.node
        while nodes:
            node = nodes.pop()
            owners.append(node)
            for attribute in node.attribute:  # the branches of an If, the body of a Loop
                graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
    for owner in owners:
        owner.ClearField("doc_string")
        owner.ClearField("metadata_props")


@contextmanager
def opened(
    model: ir.Model, threads: int = 1
) -> Iterator[Callable[[Mapping[str, Array]], list[Array]]]:
    """The graph in onnxruntime, in this process: inputs by name to all outputs, in order."""
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        path = Path(folder) / "model.onnx"
        write(model, path)
        session = open_session(path, threads=threads)
        yield lambda feed: list(session.run(None, dict(feed)))


def copied(model: ir.Model) -> ir.Model:
    """Another graph of the same nodes; constants are shared, as nobody writes into them."""
    return model.clone()


def constant(value: ir.Value | None) -> Array | None:
    """What a constant value holds; ``None`` for one that is computed, given or absent."""
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor().numpy()
    return None


def shape(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """Sizes of a value's axes, ``None`` where one is dynamic; ``None`` for an unknown rank."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def new_constant(model: ir.Model, name: str, array: Array) -> ir.Value:
    """A constant of the graph. Names are unique: a used one gets a number."""
    import onnx_ir as ir

    taken = model.graph.initializers
    unique, number = name, 1
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    held = np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis
    value = ir.Value(name=unique, const_value=ir.tensor(held, name=unique))
    value.shape = ir.Shape(held.shape)
    value.dtype = value.const_value.dtype  # type: ignore[union-attr]
    model.graph.register_initializer(value)
    return value


def typed(value: ir.Value, like: ir.Value) -> None:
    """Gives ``value`` the shape and type of ``like``, as far as they are known."""
    value.shape = like.shape
    if like.dtype is not None:
        value.dtype = like.dtype


def swept(model: ir.Model) -> None:
    """Removes, in place, nodes and constants that nothing reads."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
