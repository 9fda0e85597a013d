"""ONNX files as users have them: what one takes and what belongs to it, without running it.

Only the file's own message is parsed. External data is looked at by name and size, never read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from compressor.errors import InputError, one_line
from compressor.loading.checkpoint import LARGEST_EXAMPLE
from compressor.task import Input

if TYPE_CHECKING:
    from onnx import (
        FunctionProto,
        GraphProto,
        ModelProto,
        NodeProto,
        TensorProto,
        ValueInfoProto,
    )

SUFFIX = ".onnx"

FED = re.compile("float(16|32|64)|bool|u?int(8|16|32|64)")
"""NumPy types that can be made up and handed over."""

ASKED = re.compile(
    r"(?P<name>.+)=(?P<shape>(\d+(x\d+)*)?)(:(?P<dtype>[a-z]+\d*)(<(?P<high>\d+))?)?"
)

KEEPING = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators after which integers are still the same."""

LOOKUPS = {"Gather", "GatherBlockQuantized"}

STORED = {"Cast", "DequantizeLinear", "Identity"}
"""Operators after which a table still has its rows."""

DOMAINS = {
    *("", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training"),
    *("com.microsoft", "com.microsoft.nchwc"),
}
"""Whose operators ONNX or onnxruntime defines; what others do, no file can say."""

BESIDE: dict[str, tuple[int, ...]] = {
    "BatchNormalization": (3, 4),
    "Clip": (1, 2),
    "ConvInteger": (2, 3),
    "DequantizeLinear": (1, 2),
    "DynamicQuantizeLSTM": (8, 9, 10, 11),
    "DynamicQuantizeMatMul": (2, 3),
    "GatherBlockQuantized": (2, 3),
    "MatMulInteger": (2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    "MatMulNBits": (2, 3),
    "Pad": (1, 2),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "QuantizeLinear": (1, 2),
    "Resize": (1, 2),
}
"""Where operators read constants that are no parameters: scales, zero points, running statistics,
bounds."""

CODES = ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")
"""Integers that stand for numbers wherever they are read; wider ones where they are decoded."""

NESTING = 16
"""Graphs within graphs (branches, loop bodies), and functions that call functions."""

NODES = 1_000_000
"""That a graph may have once its functions are written out: two calls of the next in each of a few
dozen functions are more than any memory holds."""

BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
"""Of the types that share bytes."""


class Slot(NamedTuple):
    """An input as the file has it. ``axes`` are sizes or names (``""``: none), batch first, and
    ``None`` for an unknown rank; integers are looked up in a table of ``high`` rows, or 2."""

    name: str
    axes: tuple[int | str, ...] | None
    dtype: str
    high: int = 2

    def __str__(self) -> str:
        axes = ["?"] if self.axes is None else [str(size or "?") for size in self.axes]
        return f"{self.dtype} [{', '.join(axes)}]"


class Asked(NamedTuple):
    """What is known of an input from elsewhere: the shape of one example, without the batch."""

    shape: tuple[int, ...]
    dtype: str | None = None
    high: int | None = None

    def __str__(self) -> str:
        return f"{self.dtype or ''} {'x'.join(map(str, self.shape)) or 'no axis'}".strip()


@dataclass(frozen=True)
class OnnxFile:
    """What :func:`read` found.

    ``params`` are the elements of the constants that nodes compute with: no running statistics,
    scales and bounds, and nothing without an axis. What an exporter folded into other constants is
    gone: batch normalisation behind a convolution has no parameters left. ``last`` is the operator
    that the first output comes from; ``listed`` says that constants stand among the inputs, as they
    had to in old files.
    """

    path: Path
    slots: tuple[Slot, ...]
    companions: tuple[Path, ...]
    params: int
    last: str = ""
    listed: bool = False

    @property
    def batch(self) -> int | None:
        """The only batch size that the file takes; ``None`` where the axis is open."""
        firsts = (slot.axes[0] for slot in self.slots if slot.axes)
        return next((size for size in firsts if isinstance(size, int)), None)


def read(path: Path, domains: Collection[str] = ()) -> OnnxFile:
    """What the ONNX file at ``path`` says of itself.

    Raises :class:`InputError`, one line, for what is no ONNX file; for external data that lies
    outside its folder, is a link of either kind, is missing or is too short; for tensors whose size
    is not that of their shape; for operators of a domain that is neither in :data:`DOMAINS` nor one
    of ``domains``; for graphs nested too deep, functions that call themselves, and nodes that lack
    what their operators take.
    """
    import onnx

    if path.suffix != SUFFIX:
        raise InputError(f"{path} is no {SUFFIX} file: export the model to ONNX")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}: give an ONNX file such as model.onnx")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own has no base of its own
        raise InputError(f"{path} is not ONNX or cut off: {one_line(error, 100)}") from None
    graph = model.graph
    if not model.ir_version or not graph.output:
        raise InputError(f"{path} holds no graph with outputs: export the model again")
    held = {tensor.name for tensor in graph.initializer}
    given = [value for value in graph.input if value.name not in held]
    if not given:
        raise InputError(f"{path} takes no inputs: there is nothing to measure it with")
    _check_operators(path, model, {*DOMAINS, *domains})
    try:
        return OnnxFile(
            path,
            tuple(_slot(path, value, graph) for value in given),
            _companions(path, model),
            params_of(model),
            _last(graph),
            len(given) < len(graph.input),
        )
    except (IndexError, ValueError, TypeError, OverflowError) as error:
        raise InputError(
            f"{path} has a node without what its operator takes ({one_line(error, 80)}): export "
            "the model again"
        ) from None


def asked(texts: Sequence[str]) -> dict[str, Asked]:
    """What ``--input`` says, by the name of the input.

    >>> asked(["ids=128:int64<30522"])
    {'ids': Asked(shape=(128,), dtype='int64', high=30522)}

    Raises :class:`InputError` for anything else.
    """
    found: dict[str, Asked] = {}
    for text in texts:
        match = ASKED.fullmatch(text)
        if not match or match["high"] == "0":
            raise InputError(
                f"--input {text!r}: write NAME=SHAPE[:DTYPE[<HIGH]] without the batch, such as "
                "image=3x224x224 or 'ids=128:int64<30522'"
            )
        if match["name"] in found:
            raise InputError(f"--input {match['name']} stands twice: keep one")
        shape = tuple(int(size) for size in match["shape"].split("x") if size)
        high = int(match["high"]) if match["high"] else None
        found[match["name"]] = Asked(shape, match["dtype"], high)
    return found


def inputs(
    file: OnnxFile,
    given: Mapping[str, Asked],
    *,
    like: Sequence[Input] = (),
    batch: Sequence[int] = (1,),
) -> tuple[Input, ...]:
    """The inputs of ``file``, in its order: names, shapes of one example, dtypes.

    The first axis is the batch. Other open axes come from ``given``, by name, or from ``like``, the
    data's inputs in order. Integers stay below what was given, or the rows of the table that they
    are looked up in, or 2.

    Raises :class:`InputError` for an open axis, for what was given and does not fit, and for a
    fixed batch axis that is not every one of ``batch``.
    """
    if like and len(like) != len(file.slots):
        names = ", ".join(slot.name for slot in file.slots)
        raise InputError(
            f"{file.path} takes {len(file.slots)} inputs ({names}), the data has {len(like)}"
        )
    known = {
        slot.name: Asked(one.shape, one.dtype, one.high)
        for slot, one in zip(file.slots, like, strict=False)
    }
    return tuple(_input(file, slot, {**known, **given}, batch) for slot in file.slots)


def _input(file: OnnxFile, slot: Slot, given: Mapping[str, Asked], batch: Sequence[int]) -> Input:
    of = f"{file.path}: input {slot.name!r}"
    if not FED.fullmatch(slot.dtype):
        raise InputError(f"{of} is of type {slot.dtype}: only numbers of NumPy can be given to it")
    axes, one = slot.axes, given.get(slot.name)
    if axes == ():
        raise InputError(f"{of} is a single number: its first axis must be the batch")
    size = axes[0] if axes else ""
    if isinstance(size, int) and set(batch) != {size}:
        raise InputError(
            f"{of} takes batches of {size} only: add --batch {size}, or export it with a dynamic "
            "batch axis"
        )
    rest = axes[1:] if axes else None
    if rest is None or not all(isinstance(size, int) for size in rest):
        if one is None:
            pattern = "SHAPE" if rest is None else "x".join(str(size or "N") for size in rest)
            raise InputError(
                f"{of} is {slot}: its shape cannot be guessed, add --input {slot.name}={pattern} "
                "with numbers"
            )
        rest = one.shape if rest is None else rest
    if one and not _fits(rest, slot.dtype, one):
        last = len(one.shape) > 2 and _fits(rest, slot.dtype, Asked((*one.shape[1:], one.shape[0])))
        turned = ": the file has channels last, give such data" if last else ""
        raise InputError(f"{of} is {slot}; an example of --input or --data is {one}{turned}")
    shape = one.shape if one else tuple(int(size) for size in rest)
    if math.prod(shape) > LARGEST_EXAMPLE or 0 in shape:
        raise InputError(f"{of} of shape {'x'.join(map(str, shape))} cannot be meant: check it")
    return Input(slot.name, shape, slot.dtype, (one and one.high) or slot.high)


def _fits(rest: Sequence[int | str], dtype: str, one: Asked) -> bool:
    if len(rest) != len(one.shape) or one.dtype not in (dtype, None):
        return False
    pairs = zip(rest, one.shape, strict=True)
    return all(isinstance(mine, str) or mine == size for mine, size in pairs)


def _slot(path: Path, value: ValueInfoProto, graph: GraphProto) -> Slot:
    from onnx import helper

    if not value.type.HasField("tensor_type"):
        raise InputError(f"{path}: input {value.name!r} is no tensor: only tensors can be given")
    held = value.type.tensor_type
    try:
        dtype = str(np.dtype(helper.tensor_dtype_to_np_dtype(held.elem_type)))
    except (KeyError, TypeError):
        dtype = f"unknown type {held.elem_type}"
    axes: tuple[int | str, ...] | None = None
    if held.HasField("shape"):
        # Some converters write 0 or -1 for an open axis.
        axes = tuple(
            dim.dim_value if dim.dim_value > 0 else dim.dim_param for dim in held.shape.dim
        )
    return Slot(value.name, axes, "string" if dtype == "object" else dtype, _rows(graph, value))


def _rows(graph: GraphProto, value: ValueInfoProto) -> int:
    """Rows of the smallest table that the integers of an input are looked up in; 2 without one."""
    tables = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    same, found = {value.name}, []
    for node in graph.node:  # in topological order, as ONNX has it
        first = node.input[0] if node.input else ""
        if node.op_type in LOOKUPS and node.input[1] in same and first in tables:
            axis = next((each.i for each in node.attribute if each.name == "axis"), 0)
            found += [tables[first]] if axis == 0 else []
        if node.op_type in KEEPING and first in same:
            same.add(node.output[0])
        if node.op_type in STORED and first in tables:
            tables[node.output[0]] = tables[first]
    return int(min(found, default=2))


def _last(graph: GraphProto) -> str:
    makers = {name: node for node in graph.node for name in node.output}
    name = graph.output[0].name
    while name in makers and makers[name].op_type in KEEPING and makers[name].input:
        name = makers.pop(name).input[0]
    return makers[name].op_type if name in makers else ""


def _check_operators(path: Path, model: ModelProto, domains: Collection[str]) -> None:
    """Domains, nesting and functions; see :func:`read`."""
    calls = {
        (one.domain, one.name): Counter((node.domain, node.op_type) for node in nodes_of(one, path))
        for one in model.functions
    }
    whole = Counter((node.domain, node.op_type) for node in nodes_of(model.graph, path))
    for held in (whole, *calls.values()):
        for domain, name in held:
            if domain not in domains and (domain, name) not in calls:
                raise InputError(
                    f"{path}: operator {name!r:.60} of domain {domain!r:.60} is neither ONNX's nor "
                    f"onnxruntime's: add --domain {domain:.60} if your onnxruntime has it"
                )
    sizes: dict[tuple[str, str], int] = {}

    def size(held: Counter[tuple[str, str]], depth: int = 0) -> int:
        if depth > NESTING:
            raise InputError(
                f"{path}: its functions call themselves, or each other more than {NESTING} deep: "
                "export it again"
            )
        for key in held.keys() & calls.keys() - sizes.keys():
            sizes[key] = size(calls[key], depth + 1)
        return sum(count * sizes.get(key, 1) for key, count in held.items())

    if (total := size(whole)) > NODES:
        raise InputError(
            f"{path}: its functions written out are {total:.1e} nodes: that cannot be meant"
        )


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The branches of an If, the body of a Loop."""
    for each in node.attribute:
        yield from [each.g] if each.HasField("g") else each.graphs


def nodes_of(graph: GraphProto | FunctionProto, path: Path | str = "") -> Iterator[NodeProto]:
    """The nodes of a graph or function, and of all graphs in them.

    Raises :class:`InputError`, naming ``path``, for graphs that lie too deep in each other.
    """
    levels = [iter(graph.node)]
    while levels:
        node = next(levels[-1], None)
        if node is None:
            levels.pop()
            continue
        yield node
        if inner := [each for body in bodies(node) for each in body.node]:
            levels.append(iter(inner))
        if len(levels) > NESTING + 1:
            raise InputError(
                f"{path}: its graphs lie more than {NESTING} deep in each other: export it again"
            )


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute; text comes as bytes."""
    from onnx import helper

    return next(
        (helper.get_attribute_value(one) for one in node.attribute if one.name == name), default
    )


def params_of(model: ModelProto) -> int:
    """Elements of the constants of a model, as :class:`OnnxFile` has them."""
    from onnx import TensorProto

    nodes = [each for one in (model.graph, *model.functions) for each in nodes_of(one)]
    graphs = [model.graph, *(body for node in nodes for body in bodies(node))]
    constants = {tensor.name: tensor for graph in graphs for tensor in graph.initializer}
    read: set[str] = set()  # as numbers
    decoded: set[str] = set()
    packed: dict[str, int] = {}
    for node in nodes:
        beside = BESIDE.get(node.op_type, ())
        here = {name for at, name in enumerate(node.input) if at not in beside}
        (decoded if node.op_type == "DequantizeLinear" else read).update(here)
        if node.op_type == "MatMulNBits":  # whose bytes hold several each
            sizes = attribute(node, "K", 0), attribute(node, "N", 0)
            if not all(type(size) is int and size >= 0 for size in sizes):
                raise ValueError(f"MatMulNBits of {sizes[0]!r:.40} x {sizes[1]!r:.40}")
            packed[node.input[1]] = math.prod(sizes)
        if node.op_type == "Constant" and (held := attribute(node, "value", None)) is not None:
            constants[node.output[0]] = held

    def counts(name: str, kind: str) -> bool:
        whole = "FLOAT" in kind or kind == "DOUBLE" or kind in CODES
        return name in decoded or (name in read and whole)

    return sum(
        packed.get(name, math.prod(tensor.dims))
        for name, tensor in constants.items()
        if tensor.dims and counts(name, TensorProto.DataType.Name(tensor.data_type))
    )


def _companions(path: Path, model: Any) -> tuple[Path, ...]:
    """The files that hold external data, each checked; other tensors are looked at, too."""
    from onnx.external_data_helper import uses_external_data

    ends: dict[str, int] = {}
    for tensor in _tensors(model):
        if not uses_external_data(tensor):
            _check_size(path, tensor)
        else:
            said = {entry.key: entry.value for entry in tensor.external_data}
            location = said.get("location", "")
            ends[location] = max(ends.get(location, 0), _end(path, tensor, said))
    return tuple(_companion(path, location, end) for location, end in sorted(ends.items()))


def _tensors(message: Any) -> Iterator[TensorProto]:
    """All tensors of a message, wherever they stand: initializers, attributes, subgraphs."""
    from onnx import TensorProto

    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in [value] if hasattr(value, "ListFields") else value:
                if isinstance(one, TensorProto):
                    yield one
                else:
                    yield from _tensors(one)


def _bytes(tensor: TensorProto) -> int:
    """Of a tensor's numbers, by its shape and type; ``ValueError`` for what has neither."""
    from onnx import TensorProto, helper

    if any(size < 0 for size in tensor.dims):
        raise ValueError(tensor.dims)
    item = 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    bits = int(BITS.get(TensorProto.DataType.Name(tensor.data_type), item))
    return int(-(-math.prod(tensor.dims) * bits // 8))


TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
"""Fields of a tensor that hold a number in each entry: of complex ones half, of the small ones of
:data:`BITS` several."""


def _check_size(path: Path, tensor: TensorProto) -> None:
    """Raises :class:`InputError` where a tensor in the file does not hold what its shape says."""
    from onnx import TensorProto

    try:
        whole, count = _bytes(tensor), math.prod(tensor.dims)
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: {tensor.name!r:.60} has no shape or type: export it again"
        ) from None
    entries = max(len(getattr(tensor, field)) for field in TYPED)
    each = 8 // BITS.get(TensorProto.DataType.Name(tensor.data_type), 8)
    fits = len(tensor.raw_data) == whole if tensor.raw_data else count <= each * entries
    if not fits:
        raise InputError(
            f"{path}: {tensor.name!r:.60} has {len(tensor.raw_data) or entries:,} "
            f"{'bytes' if tensor.raw_data else 'numbers'}, its shape asks for "
            f"{whole if tensor.raw_data else count:,}: export it again"
        )


def _end(path: Path, tensor: TensorProto, said: Mapping[str, str]) -> int:
    """Where a tensor ends in its file."""
    try:
        whole, start = _bytes(tensor), int(said.get("offset", 0))
        length = int(said.get("length", whole))
    except (KeyError, TypeError, ValueError):
        whole = start = length = -1
    if start < 0 or length < 0:
        raise InputError(f"{path}: the place of {tensor.name!r:.60} is broken: export it again")
    if length != whole:
        raise InputError(
            f"{path}: {tensor.name!r:.60} has {length:,} bytes of external data, its shape asks "
            f"for {whole:,}: export it again"
        )
    return start + length


def _companion(path: Path, location: str, end: int) -> Path:
    parts = PurePosixPath(location).parts
    inside = parts and ".." not in parts and not PurePosixPath(location).is_absolute()
    if not inside or PureWindowsPath(location).anchor or "\\" in location:
        raise InputError(
            f"{path} keeps its weights in {location!r:.80}, outside its folder: put them beside it"
        )
    file = path.parent
    for part in parts:
        file = file / part
        if file.is_symlink():
            raise InputError(
                f"{path}: its weights {location!r:.80} are a link: copy the file there"
            )
    if not file.is_file():
        raise InputError(f"{path}: its weights {location!r:.80} are missing: put them beside it")
    if file.stat().st_nlink > 1:  # a file of somebody else's under another name
        raise InputError(
            f"{path}: its weights {location!r:.80} are a hard link: copy the file there"
        )
    size = file.stat().st_size
    if size < end:
        raise InputError(
            f"{path}: its weights {location!r:.80} are cut off at {size:,} of {end:,} bytes: "
            "copy them again"
        )
    return file
