"""The proof that a cut is right: the dense model with the cut channels zeroed does the same."""

from __future__ import annotations

import copy
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
            _run(copy.deepcopy(dense), examples, torch.float64)
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
    give others. The cut model must also run at batch 1, 2 and 7 and have gradients.
    """
    try:
        with torch.inference_mode():
            wanted = _run(masked_copy(dense, edits), examples, dtype)
        model = apply(copy.deepcopy(dense), edits).requires_grad_(True)
        for size in (1, 2):
            _run(model, tuple(part[:size] for part in examples), dtype)
        got = _run(model, examples, dtype)
        torch.stack([each.sum() for each in got if each.requires_grad]).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        return 0.0, f"the cut model does not run ({one_line(error, 100)})"
    if [each.shape for each in got] != [each.shape for each in wanted]:
        return 0.0, "it would change the shape of the model's output"
    worst = 0.0
    for ours, theirs in zip(got, wanted, strict=True):
        difference = float((ours.detach().double() - theirs.double()).abs().max())
        if not difference <= TOLERANCE[dtype] * (1 + float(theirs.abs().max())):
            return difference, f"the cut is not equivalent: outputs differ by {difference:.2g}"
        worst = max(worst, difference)
    return worst, ""


def masked_copy(dense: nn.Module, edits: Sequence[dict[str, Any]]) -> nn.Module:
    """A copy of ``dense``, same shapes, with every element zeroed that the edits remove."""
    model = copy.deepcopy(dense)
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
