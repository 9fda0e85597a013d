"""ONNX files as users have them: what one takes and what belongs to it, without running it.

Only the file's own message is parsed. External data is looked at by name and size, never read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from compressor.errors import InputError, one_line
from compressor.loading.checkpoint import LARGEST_EXAMPLE
from compressor.task import Input

if TYPE_CHECKING:
    from onnx import GraphProto, TensorProto, ValueInfoProto

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
    """What :func:`read` found. ``params`` are the elements of all initializers: weights, but also
    folded constants and the scales of quantized ones."""

    path: Path
    slots: tuple[Slot, ...]
    companions: tuple[Path, ...]
    params: int


def read(path: Path) -> OnnxFile:
    """What the ONNX file at ``path`` says of itself.

    Raises :class:`InputError`, one line, for what is no ONNX file, and for external data that lies
    outside its folder, is a link, is missing or is too short.
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
    return OnnxFile(
        path,
        tuple(_slot(path, value, graph) for value in given),
        _companions(path, model),
        sum(math.prod(tensor.dims) for tensor in graph.initializer),
    )


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
        raise InputError(f"{of} is {slot}; an example of --input or --data is {one}")
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


def _companions(path: Path, model: Any) -> tuple[Path, ...]:
    """The files that hold external data, each checked."""
    from onnx.external_data_helper import uses_external_data

    ends: dict[str, int] = {}
    for tensor in _tensors(model):
        if uses_external_data(tensor):
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


def _end(path: Path, tensor: TensorProto, said: Mapping[str, str]) -> int:
    """Where a tensor ends in its file."""
    from onnx import helper

    try:
        start = int(said.get("offset", 0))
        whole = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        length = int(said.get("length", whole))
    except (KeyError, TypeError, ValueError):
        start = length = -1
    if start < 0 or length < 0:
        raise InputError(f"{path}: the place of {tensor.name!r:.60} is broken: export it again")
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
    size = file.stat().st_size
    if size < end:
        raise InputError(
            f"{path}: its weights {location!r:.80} are cut off at {size:,} of {end:,} bytes: "
            "copy them again"
        )
    return file
