"""Models that ``torch.export.save`` wrote (``.pt2``), read without PyTorch's own loader.

``torch.export.load`` unpickles what the archive holds; here its graph is parsed as JSON and its
weights are read as numbers. Operators become layers again, so that channels can be cut, and the
model takes any batch (:mod:`compressor.loading.graph.rebuild`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compressor.errors import InputError, one_line
from compressor.loading import embedded, torchfile
from compressor.loading.embedded import Description
from compressor.loading.graph.archive import Archive
from compressor.loading.graph.program import AS_IT_IS, Program, program
from compressor.loading.graph.rebuild import Rebuilding, Stuck, batch_of, other_batch
from compressor.task import Input

TOLERANCE = 1e-4
"""Largest difference of an output, relative to 1 + its largest value: sums of other lengths round
differently, wrong shapes give other numbers."""

COARSE = 2e-2
"""The same in 16 bits."""

ANY_BATCH = (
    "export it again with dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), one for each input"
)


def read(path: Path) -> tuple[Description, dict[str, Tensor], tuple[Input, ...]]:
    """The description of the model in ``path``, its tensors and what inputs it takes.

    Executes nothing that the file holds; sample inputs in it are not read. Inputs that an embedding
    reads are drawn below its number of rows. Raises :class:`InputError` for a file that is damaged
    or could take more memory than it is long, for steps outside the closed set of functions, and
    for a model that only takes the batch that it was exported with.
    """
    archive = Archive(path)
    try:
        found = program(archive)
        batch, any_batch = batch_of(found)
        inputs = _inputs(found)
        return *_rebuilt(found, inputs, batch, any_batch, path), inputs
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    except Stuck as error:
        raise InputError(
            f"{path} has a step that cannot be rebuilt: {one_line(error, 160)}; give the model and "
            f"--arch PKG.MOD:FACTORY, or, if you trust the file, {AS_IT_IS}"
        ) from None
    except Exception as error:
        raise InputError(
            f"{path} is not a program that PyTorch exported ({type(error).__name__}: "
            f"{one_line(error, 120)}): export it again with torch.export.save"
        ) from None


def _inputs(found: Program) -> tuple[Input, ...]:
    inputs = []
    for given in found.given:
        dtype = str(given.dtype).removeprefix("torch.")
        if dtype == "bfloat16":
            raise InputError(f"input {given.name!r:.60} is bfloat16: export the model in float32")
        inputs.append(Input(given.name, given.sizes[1:], dtype, _high(found, given.name)))
    return tuple(inputs)


def _high(found: Program, name: str) -> int:
    rows = [
        len(found.weights[step.arguments["weight"].value.name].tensor)
        for step in found.steps
        if step.target == "aten.embedding.default"
        and step.arguments["indices"].value == (name,)
        and step.arguments["weight"].value.name in found.weights
    ]
    return min(rows, default=2)


def _rebuilt(
    found: Program, inputs: tuple[Input, ...], batch: int, any_batch: bool, path: Path
) -> tuple[Description, dict[str, Tensor]]:
    """The graph that holds for any batch, after it was compared with the one that was exported."""
    plain = Rebuilding(found, regroup=False)
    said = plain.description()
    exported = _model(said, plain.state, path)
    embedded.check(exported, inputs, batch)
    other = other_batch(found)
    try:
        free = Rebuilding(found, regroup=True)
        description = free.description()
        model = _model(description, free.state, path)
        embedded.check(model, inputs, other)
        examples = tuple(torch.from_numpy(one.synthetic(other, 0)) for one in inputs)
        wanted = _run(exported, examples) if any_batch else _each(exported, examples, batch)
        short = any(one.dtype.itemsize < 4 for one in wanted if one.is_floating_point())
        if _apart(wanted, _run(model, examples)) <= (COARSE if short else TOLERANCE):
            return description, free.state
        why = "it computes something else there"
    except (Stuck, InputError, RuntimeError, ValueError, IndexError, TypeError) as error:
        why = one_line(error, 120)
    if any_batch:
        return said, plain.state
    raise InputError(
        f"{path} was exported for a batch of {batch} and does not run at another ({why}): "
        f"{ANY_BATCH}"
    )


def _model(description: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> nn.Module:
    return torchfile.load_state(embedded.build(description), state, path).eval()


def _run(model: nn.Module, examples: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [each for each in tree_leaves(model(*examples)) if isinstance(each, Tensor)]


def _each(model: nn.Module, examples: tuple[Tensor, ...], batch: int) -> list[Tensor]:
    """What the model gives for every example on its own, in a batch as it was exported with."""
    rows = []
    for at in range(len(examples[0])):
        repeated = tuple(one[at : at + 1].expand(batch, *one.shape[1:]).clone() for one in examples)
        rows.append([each[:1] for each in _run(model, repeated)])
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def _apart(wanted: list[Tensor], got: list[Tensor]) -> float:
    if [one.shape for one in wanted] != [one.shape for one in got]:
        return np.inf
    worst = 0.0
    for ours, theirs in zip(wanted, got, strict=True):
        first, second = ours.double(), theirs.double()
        largest = first.abs().max().item() if first.numel() else 0.0
        difference = (first - second).abs().max().item() if first.numel() else 0.0
        worst = float(np.maximum(worst, difference / (1 + largest)))  # NaN stays NaN
    return worst
