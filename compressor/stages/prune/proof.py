"""The proof that a cut is right: the dense model with the cut channels zeroed does the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compressor.errors import one_line
from compressor.loading.edits import apply
from compressor.loading.task import tensors
from compressor.task import Inputs

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference allowed, relative to the largest output: far above rounding (1e-15 and 1e-6
in the zoo), far below what a channel in the wrong place does (1e-2)."""


def precision(dense: nn.Module, examples: Inputs) -> torch.dtype:
    """float64, or float32 for a model whose own code insists on it (``torch.zeros`` states)."""
    try:
        with torch.inference_mode():
            _run(copy.deepcopy(dense), tuple(part[:1] for part in examples), torch.float64)
    except Exception:
        return torch.float32
    return torch.float64


def disproof(
    dense: nn.Module, edits: Sequence[dict[str, Any]], examples: Inputs, dtype: torch.dtype
) -> tuple[float, str]:
    """The largest difference in the proof, and what is wrong with the cut (empty: nothing).

    Every element that an edit removes is zeroed in a copy of ``dense``. A removed channel then
    carries a constant that no kept weight reads, so a sound cut gives the same outputs, all of
    them, up to rounding. Layers that mix channels (channel shuffle, normalisation over channels)
    give others. Outputs are compared on two of the 7 ``examples``; the cut model must also run at
    batch 1 and 7 with outputs of the right shape, and have gradients.

    They are compared once more with random weights in place of the model's: a layer that is dead,
    or a branch that is scaled by zero, would let any cut of it pass. What holds for random weights
    holds for all but a vanishing share of them (Schwartz and Zippel).
    """
    two = tuple(part[:2] for part in examples)
    difference, wrong = _compared(dense, edits, examples, two, dtype)
    if not wrong:
        random, wrong = _compared(shaken(dense), edits, two, two, dtype)
        if math.isnan(random):
            wrong = ""  # they overflow in this model and say nothing
    return difference, wrong


def _compared(
    dense: nn.Module,
    edits: Sequence[dict[str, Any]],
    examples: Inputs,
    two: Inputs,
    dtype: torch.dtype,
) -> tuple[float, str]:
    others = (1, 7) if len(examples[0]) >= 7 else ()
    try:
        with torch.inference_mode():
            wanted = _run(masked_copy(dense, edits), two, dtype)
            model = apply(copy.deepcopy(dense), edits)
            other = {size: _run(model, tuple(part[:size] for part in examples), torch.float32)
                     for size in others}  # fmt: skip
        # Edited again: what is scaled has to be scaled in this precision.
        model = apply(copy.deepcopy(dense).to(dtype), edits).requires_grad_(True)
        got = _run(model, two, dtype)
        torch.stack([each.sum() for each in got if each.requires_grad]).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        return 0.0, f"the cut model does not run ({one_line(error, 100)})"
    shapes = [each.shape for each in wanted]
    for size, outputs in {2: got, **other}.items():
        if [each.shape for each in outputs] != [_batched(shape, size) for shape in shapes]:
            return 0.0, "it would change the shape of the model's output"
    if not all(torch.isfinite(each).all() for each in wanted):
        return math.nan, "the masked model's outputs are not finite"
    return _difference(got, wanted, dtype)


def shaken(dense: nn.Module) -> nn.Module:
    """A copy with seeded random weights of a size that keeps activations alive.

    Weights of two axes or more are normal, scaled by their inputs (He et al. 2015); scales and
    variances uniform around 1; biases and means small. Other buffers stay.
    """
    model = copy.deepcopy(dense)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, tensor in held:
                if not tensor.is_floating_point() or (
                    name in module._buffers and name not in ("running_mean", "running_var")
                ):
                    continue
                noise = torch.randn(tensor.shape, generator=draw)
                if tensor.ndim > 1:
                    inputs = tensor[0].numel()
                    tensor.copy_(noise * (2 / inputs) ** 0.5)
                elif name in ("weight", "running_var"):
                    tensor.copy_(1 + noise.clamp(-2, 2) / 5)
                else:
                    tensor.copy_(noise / 10)
    return model


def _batched(shape: torch.Size, size: int) -> torch.Size:
    """The shape of an output for two examples, for ``size`` of them."""
    return torch.Size((size, *shape[1:])) if len(shape) and shape[0] == 2 else shape


def differ(one: nn.Module, other: nn.Module, examples: Inputs, dtype: torch.dtype) -> str:
    """How two models that should compute the same do not; empty where they do."""
    try:
        with torch.inference_mode():
            wanted = _run(copy.deepcopy(one), examples, dtype)
            got = _run(copy.deepcopy(other), examples, dtype)
    except Exception as error:
        return one_line(error, 100)
    return _difference(got, wanted, dtype)[1]


def _difference(
    got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[float, str]:
    worst = 0.0
    for ours, theirs in zip(got, wanted, strict=True):
        difference = float((ours.detach().double() - theirs.double()).abs().max())
        if not difference <= TOLERANCE[dtype] * (1 + float(theirs.abs().max())):
            return difference, f"the cut is not equivalent: outputs differ by {difference:.2g}"
        worst = max(worst, difference)
    return worst, ""


def masked_copy(dense: nn.Module, edits: Sequence[dict[str, Any]]) -> nn.Module:
    """A copy of ``dense``, rewritten where the edits say so, same shapes, with every element zeroed
    that the edits remove."""
    model = apply(copy.deepcopy(dense), (edit for edit in edits if edit["edit"] == "rewrite"))
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for edit in edits:
            if edit["edit"] != "keep":
                continue
            tensor, dim = named[edit["parameter"]], edit["dim"]
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
            gone[torch.tensor(edit["indices"])] = False
            tensor.index_fill_(dim, gone.nonzero().flatten(), 0)
    return model.eval()


def _run(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> list[torch.Tensor]:
    """All outputs of ``model``, turned to ``dtype`` in place."""
    given = map(torch.from_numpy, inputs)
    return tensors(model.to(dtype)(*(x.to(dtype) if x.is_floating_point() else x for x in given)))
