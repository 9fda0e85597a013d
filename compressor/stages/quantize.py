"""Post-training quantization of an ONNX file with onnxruntime's own tools."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from compressor.artifact import Onnx, replacing
from compressor.errors import StageError, Unsuitable, one_line
from compressor.measure.environment import has_vnni
from compressor.measure.runtime import Session, open_session
from compressor.stages.export import SUFFIX, cleaned
from compressor.task import Inputs, Task

DYNAMIC = ("MatMul", "Gemm", "LSTM")
"""Never Conv: ConvInteger is several times slower than fp32."""

CALIBRATION_BATCH = 32


def quantize(
    artifact: Onnx,
    task: Task,
    into: Path,
    *,
    scheme: Literal["dynamic", "static", "fp16"],
    samples: Annotated[int, Field(ge=1)] = 512,
) -> Onnx:
    """Writes an int8 (or fp16) version of the ONNX file.

    ``dynamic`` stores weights of MatMul, Gemm and LSTM as signed 8-bit, per channel, and quantizes
    activations while running. ``static`` puts Q/DQ pairs around every operator that has an 8-bit
    kernel: unsigned 8-bit activations with ranges from ``samples`` examples of the calibration
    split (minimum and maximum; made-up inputs where there is no data), signed weights per channel.
    Without 8-bit dot products in the CPU, weights get 7 bits, which keeps the sums from
    saturating. ``fp16`` halves weights and arithmetic, inputs and outputs stay fp32.

    Raises :class:`Unsuitable` when the graph has nothing to quantize.
    """
    model = _read(artifact.path)
    settings: dict[str, Any] = {"scheme": scheme, "samples": samples}
    facts: dict[str, Any] = {}
    path = into.with_name(into.name + SUFFIX)
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder, _quiet():
        source, made = Path(folder) / "source.onnx", Path(folder) / "made.onnx"
        try:
            if scheme == "static":
                facts["calibration"] = _static(artifact.path, source, made, task, samples)
            else:
                settings.pop("samples")
                SIMPLE[scheme](model, artifact.path, made)
        except Unsuitable:
            raise
        except Exception as error:
            raise StageError(
                f"onnxruntime cannot quantize {artifact.name} ({scheme}): {one_line(error, 200)}"
            ) from error
        result = _read(made)
        added = _operators(result) - _operators(model)
        if not added and scheme != "fp16":
            raise Unsuitable("quantizing changed nothing in the graph")
        cleaned(result)
        with replacing(path) as beside:
            beside.write_bytes(result.SerializeToString(deterministic=True))
            _check(beside, task, artifact.name, scheme)
    return artifact.then(path, "onnx", "quantize", settings, reduce_range=not has_vnni(), **facts)


def _dynamic(model: Any, source: Path, made: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    constants = {tensor.name for tensor in model.graph.initializer}
    if not any(
        node.op_type in DYNAMIC and any(name in constants for name in node.input[1:])
        for node in model.graph.node
    ):
        raise Unsuitable(f"no {', '.join(DYNAMIC[:-1])} or {DYNAMIC[-1]} with constant weights")
    quantize_dynamic(
        source,
        made,
        op_types_to_quantize=list(DYNAMIC),
        per_channel=True,
        weight_type=QuantType.QInt8,
        reduce_range=not has_vnni(),
    )


def _half(model: Any, source: Path, made: Path) -> None:
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    # The converter works in place, and appends its casts behind the nodes that read them.
    half = ONNXModel(convert_float_to_float16(copy.deepcopy(model), keep_io_types=True))
    half.topological_sort()
    onnx.save(half.model, made)


SIMPLE: dict[str, Callable[[Any, Path, Path], None]] = {"dynamic": _dynamic, "fp16": _half}
"""Schemes that need no calibration."""


def _static(path: Path, source: Path, made: Path, task: Task, samples: int) -> dict[str, Any]:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Hands out one small batch at a time; nothing is kept."""

        def __init__(self) -> None:
            self.batches = calibration(task, samples)

        def get_next(self) -> dict[str, Any] | None:
            inputs = next(self.batches, None)
            names = (given.name for given in task.inputs)
            return None if inputs is None else dict(zip(names, inputs, strict=True))

    quant_pre_process(path, source, skip_symbolic_shape=True)
    quantize_static(
        source,
        made,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=not has_vnni(),
        calibrate_method=CalibrationMethod.MinMax,
    )
    count = samples if task.splits is None else min(samples, len(task.splits.calibrate))
    return {"samples": count, "data": "synthetic" if task.splits is None else "calibrate"}


def calibration(task: Task, samples: int) -> Iterator[Inputs]:
    """At most ``samples`` examples in small batches: the calibration split, or made-up ones."""
    if task.splits is None:
        for start in range(0, samples, CALIBRATION_BATCH):
            # Every input has a seed of its own, counted from the task's.
            seeded = replace(task, seed=task.seed + start * len(task.inputs))
            yield seeded.examples(min(CALIBRATION_BATCH, samples - start))
        return
    split = task.splits.calibrate
    for inputs, _ in split.take(np.arange(min(samples, len(split)))).batches(CALIBRATION_BATCH):
        yield inputs


def _check(path: Path, task: Task, name: str, scheme: str) -> None:
    """Raises :class:`StageError` for a file that onnxruntime does not run."""
    try:
        Session(open_session(path))(*task.examples(2))
    except Exception as error:
        raise StageError(
            f"onnxruntime cannot run {name} quantized ({scheme}): {one_line(error, 200)}"
        ) from error


def _read(path: Path) -> Any:
    import onnx

    try:
        return onnx.load(path)
    except Exception as error:
        raise StageError(f"{path} is not an ONNX file: {one_line(error, 100)}") from None


def _operators(model: Any) -> set[str]:
    return {node.op_type for node in model.graph.node}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the advice that onnxruntime's tools log at every call."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        root.setLevel(level)
