"""Export to ONNX: one file, dynamic batch, and the same outputs as PyTorch."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from compressor.artifact import Onnx, Torch, replacing
from compressor.errors import StageError, one_line
from compressor.loading import torchfile
from compressor.measure.runtime import Session, open_session
from compressor.task import Inputs, Task

SUFFIX = ".onnx"

BATCHES = (1, 2, 7)
"""Parity is checked at these; 7 is one that no power-of-two assumption survives."""

TOLERANCE = 1e-4
"""Largest difference allowed between onnxruntime and PyTorch, relative to the largest output."""


def export(
    artifact: Torch,
    task: Task,
    into: Path,
    *,
    opset: Annotated[int, Field(ge=18, le=23)] = 20,
) -> Onnx:
    """Writes the model as a single ONNX file whose batch axis is dynamic.

    Raises :class:`StageError` when the exporter refuses the model, or when onnxruntime and PyTorch
    disagree at batch 1, 2 or 7.
    """
    model, _ = torchfile.open_model(artifact, task)
    path = into.with_name(into.name + SUFFIX)
    proto = exported(model, task, opset)
    with replacing(path) as beside:
        beside.write_bytes(proto.SerializeToString(deterministic=True))
    differences = parity(path, model, task)
    worst = max(differences.values())
    if not worst <= TOLERANCE:
        path.unlink()
        raise StageError(
            f"exporting {artifact.name}: onnxruntime and PyTorch differ by {worst:.2g} of the "
            f"largest output; allowed is {TOLERANCE:g}"
        )
    return artifact.then(path, "onnx", "export", {"opset": opset}, parity=differences)


def exported(model: nn.Module, task: Task, opset: int) -> Any:
    """The ``onnx.ModelProto``, without stack traces, paths and stale shapes."""
    import onnx

    names = [given.name for given in task.inputs]
    batch = torch.export.Dim("batch")
    # The example has 2: an axis of 1 would be taken for a constant.
    examples = tuple(map(torch.from_numpy, task.examples(2)))
    noise = logging.getLogger("torch.onnx")
    level = noise.level
    noise.setLevel(logging.ERROR)
    try:
        # The exporter's own deprecations are not the user's; gradients slow it down.
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            program = torch.onnx.export(
                model,
                examples,
                dynamo=True,
                external_data=False,
                opset_version=opset,
                input_names=names,
                dynamic_shapes=tuple({0: batch} for _ in examples),
                verbose=False,
            )
    except Exception as error:
        raise StageError(f"PyTorch cannot export the model: {one_line(error, 200)}") from error
    finally:
        noise.setLevel(level)
    assert program is not None
    proto = program.model_proto
    cleaned(proto)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def cleaned(proto: Any) -> None:
    """Removes, in place, what differs between machines or misleads the quantizer.

    Stack traces and paths are no part of a model; the exporter's shapes of initialisers break
    ``quantize_dynamic`` ("Inferred shape and existing shape differ").
    """
    graph = proto.graph
    del graph.value_info[:]
    for owner in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        owner.ClearField("doc_string")
        owner.ClearField("metadata_props")


def parity(path: Path, model: nn.Module, task: Task) -> dict[str, float]:
    """Largest difference by batch size, relative to the largest output of PyTorch."""
    session = Session(open_session(path))
    found = {}
    for size in BATCHES:
        examples = task.examples(size)
        with torch.inference_mode():
            wanted = tensors(model(*map(torch.from_numpy, examples)))
        found[str(size)] = _apart(wanted, session, examples)
    return found


def tensors(output: Any) -> list[Any]:
    """All tensors of a model's output, in order, as arrays."""
    if isinstance(output, torch.Tensor):
        return [output.numpy()]
    parts = output.values() if isinstance(output, dict) else output
    return [array for part in parts for array in tensors(part)]


def _apart(wanted: list[Any], session: Session, examples: Inputs) -> float:
    got = session(*examples)
    outputs = got if isinstance(got, tuple) else (got,)
    worst = 0.0
    for ours, theirs in zip(wanted, outputs, strict=True):
        if ours.shape != theirs.shape:
            raise StageError(f"onnxruntime gives shape {theirs.shape}, PyTorch {ours.shape}")
        worst = max(worst, float(np.abs(ours - theirs).max() / (1 + np.abs(ours).max())))
    return worst
