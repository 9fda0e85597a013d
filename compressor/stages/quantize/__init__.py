"""Post-training quantization of an ONNX file, held to a budget and timed against float."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from compressor.artifact import Onnx
from compressor.errors import InputError, StageError, Unsuitable, one_line
from compressor.measure.runtime import Session, open_session
from compressor.stages import graph
from compressor.stages.export import SUFFIX
from compressor.stages.quantize import search
from compressor.stages.quantize.half import bfloat, half, supports
from compressor.stages.quantize.judge import Judge
from compressor.stages.quantize.kernels import codes
from compressor.stages.quantize.prepare import prepare
from compressor.stages.quantize.ways import Dynamic, Ranges, Repair, Static, Way, settled
from compressor.stages.quantize.weights import matrices, weights
from compressor.task import Array, Inputs, Task

if TYPE_CHECKING:
    import onnx_ir as ir

Scheme = Literal["dynamic", "static", "weights", "int4", "fp16", "bf16"]

CALIBRATION_BATCH = 32

OPSET = 13
"""The first that has a scale for each channel."""

HELD = 32
"""Calibration examples from which no range is taken, a quarter at most: choices are judged on
them."""


def quantize(
    artifact: Onnx,
    task: Task,
    into: Path,
    *,
    scheme: Scheme,
    samples: Annotated[int, Field(ge=1)] = 512,
    ranges: Ranges = "auto",
    repair: tuple[Repair, ...] | None = None,
    left: tuple[str, ...] | None = None,
    disabled: tuple[str, ...] | None = None,
    synthetic: bool = False,
) -> Onnx:
    """Writes a version of the ONNX file with fewer bits.

    ``dynamic`` stores weights of MatMul, Gemm and LSTM in signed 8 bits, per channel, and gives
    activations their codes while running. ``static`` puts Q/DQ pairs around every operator that has
    an 8-bit kernel; ranges of activations come from ``samples`` examples of the calibration split.
    In which codes, the CPU's features decide (:mod:`~compressor.stages.quantize.kernels`).
    ``weights`` and ``int4`` store weights of matrix products in blocks of 8 or 4 bits; what runs
    through them stays float. ``fp16`` and ``bf16`` halve weights and arithmetic, inputs and outputs
    stay fp32.

    What is ``None`` or ``auto`` is searched for, and stands in the artifact's settings:

    - ``ranges``: how a range follows from what was seen; ``auto`` takes what keeps the output
      nearest to float on examples that no range was taken from;
    - ``repair``: those of :data:`~compressor.stages.quantize.ways.REPAIRS` that bring it nearer;
    - ``left``: nodes that stay float: those that are proven slower in 8 bits on the task's target,
      and as many more as it takes to hold the task's accuracy budget, the cheapest first;
    - ``disabled``: fusions of onnxruntime that slow the result down.

    The best graph so far is on disk at any time, and the search ends when the task's time is up.

    Raises :class:`Unsuitable` when the graph has nothing to quantize, and for ``static`` without
    data; ``synthetic`` calibrates on made-up inputs then, which serves to see the speed only.
    """
    if scheme == "static" and task.splits is None and not synthetic:
        raise Unsuitable("no data to calibrate with: add --data SPEC")
    model = graph.read(artifact.path)
    if (opset := model.opset_imports.get("", 0)) < OPSET:
        raise StageError(f"{artifact.name} has opset {opset}; quantization needs {OPSET} or newer")
    path = into.with_name(into.name + SUFFIX)

    def save(made: ir.Model) -> tuple[Path, ...]:
        return graph.store(made, path, lambda file: _check(file, task, artifact.name, scheme))

    settings: dict[str, Any] = {"scheme": scheme}
    if scheme in HALVED:
        companions = save(HALVED[scheme](model, task))
        return artifact.then(path, "onnx", "quantize", settings, companions=companions)

    def late() -> bool:
        return task.until is not None and time.monotonic() >= task.until

    facts: dict[str, Any] = {}
    notes: list[str] = []
    exact = graph.copied(model)
    facts["prepared"] = prepare(model, static=scheme == "static")
    whole = _count(task, samples)
    held = min(HELD, whole // 4)
    judge = Judge(exact, task, list(calibration(task, held or 1)), together=scheme == "dynamic")
    write: search.Write
    if scheme in WAYS:
        way: Way = WAYS[scheme](
            model, partial(_feeds, task, held), whole - held, codes(), task.seed
        )
        given = task.splits is not None or synthetic
        way, done = settled(way, judge, ranges, repair if given else (), late)
        settings |= {"samples": samples, "synthetic": synthetic, "repair": done}
        if isinstance(way, Static):
            settings["ranges"] = way.method
        facts["calibration"] = {
            "samples": whole,
            "data": "synthetic" if task.splits is None else "calibrate",
        }
        model, names, write = way.model, way.names, way.written
    else:
        names, write = WEIGHTS[scheme](model)
    if not names:
        raise Unsuitable(f"no {FITTING[scheme]} with constant weights")
    if unknown := [name for name in left or () if name not in names]:
        raise InputError(
            f"left names {unknown[0]!r}, which {scheme} cannot quantize anyway: it has "
            f"{', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
        )
    save(write(left or ()))  # from here on there is something to keep
    stay = frozenset(left or ())
    if left is None and not late():
        if search.timed(task):
            stay, why = search.slow(exact, model, write, names, task)
            notes.append(why)
        stay, found = search.within(model, write, names, stay, task, judge, late, save)
        notes.append(found.pop("note", ""))
        facts |= found
    if stay >= set(names):
        path.unlink(missing_ok=True)
        raise Unsuitable(f"every layer has to stay float to hold a drop of {task.budget:g}")
    made = write(stay)
    companions = save(made)
    if cells := [str(node.name) for node in made.graph if node.op_type in ("GRU", "RNN")]:
        why = f"onnxruntime has no 8-bit kernel for GRU and RNN: {', '.join(cells)} stay float"
        notes.insert(0, why)
    if disabled is None:
        disabled = search.hurting(made, task) if search.timed(task) and not late() else ()
    settings |= {"left": sorted(stay), "disabled": list(disabled)}
    facts |= {"sqnr_db": round(judge.sqnr(made), 2), "disabled": list(disabled)}
    facts["codes"] = asdict(codes())
    if any(notes):
        facts["note"] = "; ".join(filter(None, notes))
    return artifact.then(path, "onnx", "quantize", settings, companions=companions, **facts)


def fitted(scheme: str, **settings: Any) -> None:
    """Raises :class:`InputError` for a setting that the scheme has no use for."""
    defaults = {"ranges": "auto", "repair": None, "left": None, "disabled": None}
    for name in USELESS.get(scheme, ()):
        if settings.get(name, defaults[name]) != defaults[name]:
            raise InputError(f"{name} = {settings[name]!r}: {scheme} has no such choice")
    ways = WAYS[scheme].repairs if scheme in WAYS else ()
    for name in settings.get("repair") or ():
        if name not in ways:
            raise InputError(f"repair {name!r}: {scheme} has {', '.join(ways)}")


# --- schemes

USELESS = {
    "dynamic": ("ranges",),
    "weights": ("ranges", "repair"),
    "int4": ("ranges", "repair"),
    "fp16": ("ranges", "repair", "left", "disabled"),
    "bf16": ("ranges", "repair", "left", "disabled"),
}
"""Settings that say nothing to a scheme."""


WAYS: dict[str, type[Way]] = {"dynamic": Dynamic, "static": Static}
"""Schemes that look at data."""


def _weights(bits: Literal[4, 8], model: ir.Model) -> tuple[list[str], search.Write]:
    names = matrices(model, bits=bits)

    def write(left: Collection[str]) -> ir.Model:
        made = graph.copied(model)
        weights(made, bits=bits, left=left)
        return made

    return names, write


WEIGHTS: dict[str, Callable[[ir.Model], tuple[list[str], search.Write]]] = {
    "weights": partial(_weights, 8),
    "int4": partial(_weights, 4),
}
"""Schemes of weights alone: from the float graph to the names of what can be quantized, and to a
writer of graphs in which some of them are left in float."""


def _bfloat(model: ir.Model, task: Task) -> ir.Model:
    if reason := supports(task.target.provider):
        raise Unsuitable(reason)
    return bfloat(model)


HALVED: dict[str, Callable[[ir.Model, Task], ir.Model]] = {
    "fp16": lambda model, task: half(model),
    "bf16": _bfloat,
}

FITTING = {
    "dynamic": "MatMul, Gemm or LSTM",
    "static": "Conv, MatMul, Gemm or LSTM",
    "weights": "MatMul, Gemm or Gather worth storing in blocks",
    "int4": "MatMul, Gemm or Gather worth storing in blocks",
}
"""What a scheme looks for."""


# --- calibration data


def _count(task: Task, samples: int) -> int:
    return samples if task.splits is None else min(samples, len(task.splits.calibrate))


def calibration(task: Task, samples: int, start: int = 0) -> Iterator[Inputs]:
    """At most ``samples`` examples in small batches: the calibration split from ``start`` on, or
    made-up ones."""
    if task.splits is None:
        for at in range(start, start + samples, CALIBRATION_BATCH):
            # Every input has a seed of its own, counted from the task's.
            seeded = replace(task, seed=task.seed + at * len(task.inputs))
            yield seeded.examples(min(CALIBRATION_BATCH, start + samples - at))
        return
    split = task.splits.calibrate
    positions = np.arange(start, min(start + samples, len(split)))
    for inputs, _ in split.take(positions).batches(CALIBRATION_BATCH):
        yield inputs


def _feeds(task: Task, start: int, samples: int) -> Iterator[Mapping[str, Array]]:
    names = [given.name for given in task.inputs]
    for inputs in calibration(task, samples, start):
        yield dict(zip(names, inputs, strict=True))


def _check(path: Path, task: Task, name: str, scheme: str) -> None:
    """Raises :class:`StageError` for a file that onnxruntime does not run where it is meant to."""
    provider = task.target.provider if scheme == "bf16" else "cpu"  # which has no bf16
    try:
        Session(open_session(path, provider))(*task.examples(2))
    except Exception as error:
        raise StageError(
            f"onnxruntime cannot run {name} quantized ({scheme}): {one_line(error, 200)}"
        ) from error
