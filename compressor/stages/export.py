"""Export to ONNX: one file, dynamic batch, and the same outputs as PyTorch; or as an ONNX file that
was given."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from compressor.artifact import Artifact, Onnx, Torch
from compressor.errors import InputError, StageError, one_line
from compressor.loading import onnxtask, torchfile
from compressor.loading.onnxfile import OnnxFile
from compressor.loading.task import tensors
from compressor.measure.runtime import Session, open_session
from compressor.quiet import quiet
from compressor.stages import graph
from compressor.task import Array, Input, Inputs, Task

if TYPE_CHECKING:
    import onnx_ir as ir

SUFFIX = ".onnx"

BATCHES = (1, 2, 7)
"""Parity is checked at these; 7 is one that no power-of-two assumption survives."""

TOLERANCE = 2e-5
"""Largest difference allowed between onnxruntime and PyTorch, relative to 1 + the largest output.
All of the zoo stays below 3e-6; GELU by its tanh approximation is 4e-5 away in the zoo's ViT, a
wrong epsilon of batch normalisation (1e-4 for 1e-5) 2e-4 in ResNet-20."""

ROUNDING = 4.0
"""Or so many times what PyTorch itself rounds off, for a model that amplifies the last bit of
float32: two programs cannot agree better than each agrees with exact arithmetic."""

STEPS = 0.05
"""Allowed of a model with fake quantization: where a value lies on the border between two codes,
the last bit of float32 decides, and one step of 256 goes on from there. Up to 6.2e-3 was seen in
ResNet-20, in 6 to 20 % of the examples; the others agree to 1e-7."""

REARRANGING = ("Concat", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that only move numbers."""


def export(
    artifact: Torch,
    task: Task,
    into: Path,
    *,
    opset: Annotated[int, Field(ge=18, le=23)] = 20,
) -> Onnx:
    """Writes the model as a single ONNX file whose batch axis is dynamic.

    Raises :class:`StageError` when the exporter refuses the model, or when onnxruntime and PyTorch
    disagree at batch 1, 2 or 7 by more than rounding explains.
    """
    import onnx

    model, edits = torchfile.open_model(artifact, task)
    path = into.with_name(into.name + SUFFIX)
    differences: dict[str, float] = {}

    def check(file: Path) -> None:
        onnx.checker.check_model(file, full_check=True)
        differences.update(parity(file, model, task))
        worst = float(np.max(list(differences.values())))  # NaN stays NaN, unlike with max()
        stepped = any(edit["edit"] == "fake_quantize" for edit in edits)
        allowed = STEPS if stepped else TOLERANCE
        if not worst <= allowed and not stepped:
            allowed = max(allowed, ROUNDING * rounding(model, task))
        if not worst <= allowed:
            raise StageError(
                f"exporting {artifact.name}: onnxruntime and PyTorch differ by {worst:.2g} of the "
                f"largest output; allowed is {allowed:.2g}"
            )

    companions = graph.store(exported(model, task, opset), path, check)
    return artifact.then(
        path, "onnx", "export", {"opset": opset}, companions=companions, parity=differences
    )


def adopt(file: OnnxFile, inputs: Sequence[Input], into: Path) -> Onnx:
    """An ONNX file as a run takes it: the file itself, or one made of it beside ``into``.

    Its bytes stay as they are where it takes any batch, holds its weights and lists none of them
    among its inputs (:func:`compressor.loading.onnxtask.changes`). Raises :class:`InputError` for a
    fixed batch that the graph depends on: opened, it does not run at batch 1, 2 and 7, or answers
    otherwise than the file.
    """
    import onnx
    import onnx_ir as ir

    given = Artifact.of(file.path, "onnx", companions=file.companions)
    changes = onnxtask.changes(file)
    if not changes:
        return given
    model = onnx.load(file.path)
    onnxtask.opened(model, file.batch)
    path = into.with_name(into.name + SUFFIX)
    found: dict[str, float] = {}

    def check(written: Path) -> None:
        if file.batch is None:
            return
        try:
            found.update(_agreement(file, written, inputs))
        except Exception as error:
            raise _fixed(file, _why(error)) from error
        worst = float(np.max(list(found.values())))
        if not worst <= TOLERANCE:
            raise _fixed(file, f"with an open one its outputs differ by {worst:.2g}")

    companions = graph.store(ir.from_proto(model), path, check)
    return given.then(
        path, "onnx", IMPORT, {}, companions=companions, changes=changes, parity=found
    )


IMPORT = "import"
"""The stage of what was given as ONNX."""


def _fixed(file: OnnxFile, why: str) -> InputError:
    return InputError(
        f"{file.path} takes batches of {file.batch} only, and its graph depends on that ({why}): "
        "export it with a dynamic batch axis"
    )


def _agreement(file: OnnxFile, opened: Path, inputs: Sequence[Input]) -> dict[str, float]:
    """How far the opened file is from the fixed one by batch size, as :func:`apart` counts."""
    assert file.batch is not None
    ours, theirs = (Session(open_session(path)) for path in (file.path, opened))
    examples = [given.synthetic(max(BATCHES), seed) for seed, given in enumerate(inputs)]
    wanted: list[list[Array]] = []
    for at in range(0, max(BATCHES), file.batch):
        whole = np.arange(at, at + file.batch) % max(BATCHES)
        wanted.append(_listed(ours(*(each[whole] for each in examples))))
    joined = [np.concatenate(parts) for parts in zip(*wanted, strict=True)]
    return {
        str(size): apart(
            [each[:size] for each in joined], _listed(theirs(*(each[:size] for each in examples)))
        )
        for size in BATCHES
    }


def _listed(outputs: Any) -> list[Array]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def exported(model: nn.Module, task: Task, opset: int) -> ir.Model:
    """The model as an ONNX graph whose weights lie as they are used."""
    names = [given.name for given in task.inputs]
    batch = {0: torch.export.Dim("batch")}
    # The example has 2: an axis of 1 would be taken for a constant.
    examples = tuple(map(torch.from_numpy, task.examples(2)))
    # One entry for each argument of forward; that of ``*inputs`` is a tuple itself.
    given = inspect.signature(model.forward).bind(*examples).arguments.values()
    shapes = tuple((batch,) * len(at) if isinstance(at, tuple) else batch for at in given)
    _read_once()
    try:
        with quiet(), torch.no_grad():  # gradients slow it down
            program = torch.onnx.export(
                model,
                examples,
                dynamo=True,
                external_data=False,
                opset_version=opset,
                input_names=names,
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:
        raise StageError(f"PyTorch cannot export the model: {_why(error)}") from error
    assert program is not None
    _fold(program.model)
    return program.model


@cache
def _read_once() -> None:
    """Lets the exporter read the sources of its 500 operators once a process, not once a model.

    That is half of the time of a small model: 0.2 of 0.4 s. It is of PyTorch's own insides, and
    left alone where they are others.
    """
    with suppress(ImportError, AttributeError):
        known = import_module("torch.onnx._internal.exporter._registration").onnxscript_apis
        known.get_torchlib_ops = cache(known.get_torchlib_ops)


def _fold(model: Any) -> None:
    """Rearranges weights now rather than in every run, in place; no weight gets larger by it.

    The exporter leaves the gates of an LSTM of 64 units to be sliced and joined at run time, where
    quantization does not recognise them: folded, a two-layer LSTM of 256 units in dynamic int8 went
    from 1.25 to 0.52 ms and from 3.4 to 0.9 MB.
    """
    from onnxscript import optimizer

    optimizer.fold_constants(
        model,
        input_size_limit=sys.maxsize,
        output_size_limit=sys.maxsize,
        should_fold=lambda node: None if node.op_type in REARRANGING else False,
    )
    optimizer.remove_unused_nodes(model)


def _why(error: BaseException) -> str:
    """The first line of what was wrong at first; the exporter wraps it in advice and colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return one_line(StageError(text.splitlines()[0]), 200)


def parity(path: Path, model: nn.Module, task: Task) -> dict[str, float]:
    """Largest difference by batch size, relative to the largest output of PyTorch."""
    session = Session(open_session(path))
    found = {}
    for size in BATCHES:
        examples = task.examples(size)
        try:
            wanted, got = _outputs(model, examples, torch.float32), session(*examples)
        except Exception as error:
            raise StageError(
                f"the exported model does not run at batch {size}: {_why(error)}"
            ) from error
        found[str(size)] = apart(wanted, _listed(got))
    return found


def rounding(model: nn.Module, task: Task) -> float:
    """How far PyTorch's float32 is from its float64, as :func:`parity` counts; 0 if unknown."""
    examples = task.examples(BATCHES[-1])
    try:
        exact = _outputs(copy.deepcopy(model).double(), examples, torch.float64)
    except Exception:  # a model whose own code insists on float32
        return 0.0
    return apart(exact, _outputs(model, examples, torch.float32))


def apart(wanted: Sequence[Array], got: Sequence[Array]) -> float:
    """Largest difference between two lists of outputs, each relative to 1 + its largest value.

    NaN where either holds a NaN. Raises :class:`StageError` for other shapes or another number.
    """
    if [ours.shape for ours in wanted] != [theirs.shape for theirs in got]:
        raise StageError(
            f"onnxruntime gives outputs of shape {[theirs.shape for theirs in got]}, "
            f"wanted are {[ours.shape for ours in wanted]}"
        )
    worst = [0.0]
    for ours, theirs in zip(wanted, got, strict=True):
        exact = ours.astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinite on both sides is no agreement either
            largest = np.abs(exact).max(initial=0)
            worst.append(np.abs(exact - theirs).max(initial=0) / (1 + largest))
    return float(np.max(worst))


def _outputs(model: nn.Module, examples: Inputs, dtype: torch.dtype) -> list[Array]:
    given = map(torch.from_numpy, examples)
    with torch.inference_mode():
        found = tensors(model(*(x.to(dtype) if x.dtype == torch.float32 else x for x in given)))
    return [tensor.numpy() for tensor in found]
