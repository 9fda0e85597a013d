"""The closed set of edits that turn a model as its factory builds it into the compressed one.

An edit is plain JSON::

    {"edit": "rewrite", "module": "layers.0.self_attn", "as": "attention"}
    {"edit": "scale", "parameter": "q.weight", "dim": 0, "indices": [0, 2, 3], "factor": 1.4}
    {"edit": "keep", "parameter": "conv1.weight", "dim": 0, "indices": [0, 2, 3]}
    {"edit": "set_attribute", "module": "conv1", "name": "out_channels", "value": 3}
    {"edit": "rewrite", "module": "bn1", "as": "fold", "into": "conv1"}
    {"edit": "fake_quantize", "points": 9, "bits": 8, "layers": [...]}

``rewrite`` exchanges a layer for one of :mod:`compressor.loading.rewrites` that computes the same.
``scale`` multiplies slices, ``keep`` selects slices along one axis of a parameter or buffer.
``set_attribute`` may write only the sizes in :data:`ATTRIBUTES`, so that a file cannot change how a
model behaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from compressor.errors import InputError, one_line
from compressor.loading.fakequant import install
from compressor.loading.rewrites import REWRITES

Edit = Mapping[str, Any]

ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "groups",
    "num_features",
    "in_features",
    "out_features",
    "num_channels",
    "num_groups",
    "num_parameters",
    "input_size",
    "hidden_size",
    "proj_size",
    "embedding_dim",
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "nhead",
    "heads",
    "all_head_size",
    "inner_dim",
    "attn_dim",
    "embed_dim",
    "head_dim",
    "head_size",
    "attention_head_size",
    "dim_head",
)


def apply(model: nn.Module, edits: Iterable[Edit]) -> nn.Module:
    """Edits ``model`` in place, in order, and gives it back.

    Raises :class:`InputError` for an edit that is unknown or does not fit the model.
    """
    for edit in edits:
        try:
            EDITS[edit["edit"]](model, edit)
        except (KeyError, AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"an edit in the file does not fit its model: {dict(edit)!s:.120}: "
                f"{one_line(error, 160)}"
            ) from None
    return model


def _tensor(model: nn.Module, edit: Edit) -> torch.Tensor:
    place, _, name = str(edit["parameter"]).rpartition(".")
    owner = model.get_submodule(place)
    found = owner._parameters.get(name, owner._buffers.get(name))
    if found is None:
        raise KeyError(edit["parameter"])
    return found


def _positions(tensor: torch.Tensor, edit: Edit) -> list[int]:
    dim, indices = edit["dim"], edit["indices"]
    if type(dim) is not int or not 0 <= dim < tensor.ndim:
        raise ValueError(f"it has {tensor.ndim} axes")
    # A sketch has no elements, so PyTorch would not notice a position that is not there.
    size = tensor.shape[dim]
    if not indices or not all(type(at) is int and 0 <= at < size for at in indices):
        raise ValueError(f"positions on that axis are integers from 0 to {size - 1}")
    return list(indices)


def _keep(model: nn.Module, edit: Edit) -> None:
    old = _tensor(model, edit)
    indices = torch.tensor(_positions(old, edit), device=old.device)
    kept = old.detach().index_select(edit["dim"], indices)
    place, _, name = str(edit["parameter"]).rpartition(".")
    owner = model.get_submodule(place)
    if name in owner._parameters:
        kept = nn.Parameter(kept, requires_grad=old.requires_grad)
    setattr(owner, name, kept)


def _set_attribute(model: nn.Module, edit: Edit) -> None:
    name, value = edit["name"], edit["value"]
    if name not in ATTRIBUTES or type(value) is not int or value < 1:
        raise ValueError("not one of the sizes that an edit may set")
    owner = model.get_submodule(edit["module"])
    if type(getattr(owner, name)) is not int:
        raise ValueError("not a size of that layer")
    setattr(owner, name, value)


def _scale(model: nn.Module, edit: Edit) -> None:
    tensor, factor = _tensor(model, edit), edit["factor"]
    if type(factor) is not float or not 0 < factor < float("inf"):
        raise ValueError("a factor is a positive number")
    with torch.no_grad():
        where = [slice(None)] * edit["dim"] + [torch.tensor(_positions(tensor, edit))]
        tensor[tuple(where)] *= factor


def _rewrite(model: nn.Module, edit: Edit) -> None:
    REWRITES[edit["as"]](model, model.get_submodule(edit["module"]), edit)


EDITS: dict[str, Callable[[nn.Module, Edit], None]] = {
    "fake_quantize": install,
    "keep": _keep,
    "rewrite": _rewrite,
    "scale": _scale,
    "set_attribute": _set_attribute,
}
