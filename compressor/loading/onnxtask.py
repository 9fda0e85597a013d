"""An ONNX file as the model of a task: nothing in it can be trained, everything can be measured.

What runs the file is handed in as a module that answers for it: this layer knows no runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from compressor.data import Data
from compressor.errors import InputError
from compressor.loading import task as tasks
from compressor.loading.onnxfile import OnnxFile
from compressor.loading.task import first
from compressor.metrics import metric_of
from compressor.task import Array, Batch, Input, Kind, Split, Splits, Task

if TYPE_CHECKING:
    from onnx import ModelProto

NEEDED = "give the PyTorch model: a model.pt, weights with --arch, or a .pt2 program"


def task(
    file: OnnxFile,
    model: nn.Module,
    inputs: tuple[Input, ...],
    *,
    data: Data | None = None,
    metric: str | None = None,
    kind: Kind | None = None,
    seed: int = 0,
    functions: Mapping[str, Callable[..., Any]] = {},
) -> Task:
    """What must be preserved of an ONNX ``file``: ``model`` answers for it and takes ``inputs``.

    Without ``data`` the outputs tell the kind. Raises :class:`InputError` when the file and the
    data do not fit, and for an output that is a sigmoid's where labels are told from logits.
    """
    source = {"factory": file.path.name, "arguments": {}}
    name = file.path.stem
    if data is None:
        found = unjudged(name, model, inputs, metric=metric, kind=kind, seed=seed)
        with torch.inference_mode():
            shape = tuple(first(model(*map(torch.from_numpy, found.examples(3)))).shape)
        if shape[:1] != (3,):
            raise InputError(
                f"{file.path} turns a batch of 3 into shape {shape}: the first axis of its output "
                "must be the example"
            )
    else:
        found = tasks(model, data=data, metric=metric, kind=kind, seed=seed, functions=functions)
    labels = found.kind in ("binary", "multilabel")
    if file.last == "Sigmoid" and labels and ":" not in found.metric:
        raise InputError(
            f"{file.path} ends in a Sigmoid, and {found.kind} labels are told from logits (above 0 "
            "is yes): export it without its last layer, or add --metric PKG.MOD:FUNCTION"
        )
    return replace(found, name=name, source=source, inputs=inputs)


def unjudged(
    name: str,
    model: nn.Module,
    inputs: tuple[Input, ...],
    *,
    metric: str | None = None,
    kind: Kind | None = None,
    seed: int = 0,
    batch: int = 2,
) -> Task:
    """A task without data, whose kind the outputs for a made-up ``batch`` tell."""
    source = {"factory": name, "arguments": {}}
    found = Task(name, "regression", lambda: model, source, inputs, "mse", seed=seed)
    with torch.inference_mode():
        shape = first(model(*map(torch.from_numpy, found.examples(batch)))).shape
    known = kind or ("classification" if len(shape) == 2 and shape[1] > 1 else "regression")
    return replace(found, kind=known, metric=metric_of(known, metric))


def suited(data: Data, file: OnnxFile) -> Data:
    """The data with numbers of the types that ``file`` takes: floats as its floats, integers as its
    integers. What is of another kind, or another number of inputs, stays as it is."""
    dtypes = [np.dtype(slot.dtype) if slot.dtype != "string" else None for slot in file.slots]

    def cast(part: Array, dtype: np.dtype[Any] | None) -> Array:
        kinds = {part.dtype.kind, dtype.kind if dtype else ""}
        if dtype is None or part.dtype == dtype or not (kinds == {"f"} or kinds <= {"i", "u"}):
            return part
        with np.errstate(over="ignore"):  # too large for float16 is infinite, and said so below
            made = part.astype(dtype)
        lost = kinds == {"f"} and not np.isfinite(made).all()
        if lost or (kinds != {"f"} and not np.array_equal(made, part)):
            raise InputError(f"{file.path} takes {dtype}, which the data's numbers do not fit into")
        return made

    def alike(split: Split) -> Split:
        def fetch(at: Array) -> Batch:
            inputs, targets = split.fetch(at)
            if len(inputs) != len(dtypes):
                return inputs, targets
            return tuple(map(cast, inputs, dtypes)), targets

        return replace(split, fetch=fetch)

    parts = data.splits
    return replace(
        data,
        splits=Splits(*map(alike, (parts.train, parts.validate, parts.calibrate, parts.test))),
    )


# Files that take another form before anything is made of them.


def changes(file: OnnxFile) -> list[str]:
    """What has to change in the file before it can be measured at any batch; mostly nothing."""
    said = {
        "the batch axis was opened": file.batch is not None,
        "weights were taken into the file": bool(file.companions),
        "constants are no inputs any more": file.listed,
    }
    return [what for what, needed in said.items() if needed]


def opened(model: ModelProto, batch: int | None) -> None:
    """Makes :func:`changes` to a model whose tensors are in memory, in place.

    A fixed ``batch`` becomes an open axis of the inputs; shapes that were said of other values are
    dropped, and a constant shape that begins with the batch takes it from what is reshaped. Whether
    that gives the same answers is for the caller to try.
    """
    from onnx import numpy_helper

    graph = model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    given = [value for value in graph.input if value.name not in held]
    graph.ClearField("input")
    graph.input.extend(given)
    model.ir_version = max(model.ir_version, 4)  # the first whose constants are no inputs
    if batch is None:
        return
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    graph.ClearField("value_info")
    constants = {
        node.output[0]: one.t
        for node in graph.node
        if node.op_type == "Constant"
        for one in node.attribute
        if one.name == "value"
    }
    for at, node in enumerate(graph.node):
        tensor = (held | constants).get(node.input[1]) if node.op_type == "Reshape" else None
        if tensor is None:
            continue
        shape = numpy_helper.to_array(tensor)
        rest = shape[1:]
        # A 0 would copy the axis of what comes in, which may be another one: -1 is told by all.
        if shape.ndim == 1 and shape[:1] == batch and (rest > 0).all():
            free = np.concatenate([[-1], rest]).astype(shape.dtype)
        elif (
            shape.ndim == 1
            and shape[:1] == batch
            and not any(one.name == "allowzero" and one.i for one in node.attribute)
        ):
            free = np.concatenate([[0], rest]).astype(shape.dtype)
        else:
            continue
        name = f"{node.input[1]}/open{at}"  # others may read the same constant
        graph.initializer.append(numpy_helper.from_array(free, name))
        node.input[1] = name
