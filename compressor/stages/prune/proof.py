"""The proof that a cut is right: the dense model with the cut channels zeroed does the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compressor.errors import one_line
from compressor.loading.edits import apply
from compressor.loading.task import first
from compressor.task import Inputs

TOLERANCE = 1e-9
"""Largest difference allowed, in float64, relative to the largest output."""


def disproof(
    dense: nn.Module, edits: Sequence[dict[str, Any]], examples: Inputs
) -> tuple[float, str]:
    """The largest difference in the proof, and what is wrong with the cut (empty: nothing).

    Every element that an edit removes is zeroed in a copy of ``dense``. A removed channel then
    carries a constant that no kept weight reads, so a sound cut gives the same output, up to
    rounding. Layers that mix channels (channel shuffle, normalisation over channels) give another
    one. The cut model must also run at batch 1, 2 and 7 and have gradients.
    """
    masked = masked_copy(dense, edits).double()
    try:
        model = apply(copy.deepcopy(dense), edits).double()
        batch = tuple(_double(torch.from_numpy(part)) for part in examples)
        with torch.inference_mode():
            wanted = first(masked(*batch))
            for size in (1, 2, len(batch[0])):
                got = first(model(*(part[:size] for part in batch)))
        if got.shape != wanted.shape:
            return 0.0, "it would change the model's output"
        total = first(model.requires_grad_(True)(*batch)).sum()
        total.backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        return 0.0, f"the cut model does not run ({one_line(error, 100)})"
    difference = float((got - wanted).abs().max())
    if not difference <= TOLERANCE * (1 + float(wanted.abs().max())):
        return difference, f"the cut is not equivalent: outputs differ by {difference:.2g}"
    return difference, ""


def masked_copy(dense: nn.Module, edits: Sequence[dict[str, Any]]) -> nn.Module:
    """A copy of ``dense``, same shapes, with every element zeroed that the edits remove."""
    model = copy.deepcopy(dense)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for edit in edits:
            if edit["edit"] != "keep":
                continue
            tensor, dim = tensors[edit["parameter"]], edit["dim"]
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
            gone[torch.tensor(edit["indices"])] = False
            tensor.index_fill_(dim, gone.nonzero().flatten(), 0)
    return model.eval()


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
