"""From cut channels to edits, by following dye through torch-pruning.

Every parameter and buffer of a copy is filled with the positions of its own elements ("dye"), the
copy is cut, and the dye that is left says which slices of which tensor survived. The cut model is
then always the original plus edits, the same edits that a file holds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressor.errors import StageError
from compressor.loading.edits import ATTRIBUTES
from compressor.stages.prune.groups import traced
from compressor.task import Inputs


@dataclass(frozen=True)
class Cut:
    """Output channels ``gone`` of the layer ``root``, which has ``width`` of them."""

    root: str
    gone: tuple[int, ...]
    width: int


def cut(dense: nn.Module, cuts: Sequence[Cut], examples: Inputs) -> list[dict[str, Any]]:
    """The edits that remove ``cuts`` and everything that depends on them; ``dense`` is unchanged.

    Raises :class:`StageError` when what is left of a tensor is not a set of whole slices.
    """
    import torch_pruning

    model = copy.deepcopy(dense).eval()
    graph = traced(model, examples)
    shapes = _dye(model)
    for one in cuts:
        root = model.get_submodule(one.root)
        function = torch_pruning.prune_conv_out_channels
        if isinstance(root, nn.Linear):
            function = torch_pruning.prune_linear_out_channels
        elif getattr(root, "groups", 1) > 1:
            function = torch_pruning.prune_depthwise_conv_out_channels
        group = graph.get_pruning_group(root, function, idxs=list(one.gone))
        if not graph.check_pruning_group(group):
            raise StageError(f"cutting {one.root} would leave a layer without channels")
        group.prune()
    return [*_slices(model, shapes), *_sizes(dense, model)]


def _dye(model: nn.Module) -> dict[str, torch.Size]:
    shapes = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        shapes[name] = tensor.shape
        # float64 holds every position exactly; gradients and integers are of no use here.
        tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    return shapes


def _slices(model: nn.Module, shapes: dict[str, torch.Size]) -> list[dict[str, Any]]:
    edits = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.shape == shapes[name]:
            continue
        origin = tensor.detach().long()
        strides = torch.empty(shapes[name], device="meta").stride()
        whole = torch.zeros_like(origin)
        for dim, (stride, size) in enumerate(zip(strides, shapes[name], strict=True)):
            line = origin[tuple(slice(None) if at == dim else 0 for at in range(origin.ndim))]
            indices = line // stride % size
            whole += (indices * stride).reshape(
                [-1 if at == dim else 1 for at in range(origin.ndim)]
            )
            if len(indices) < size:
                edits.append(
                    {"edit": "keep", "parameter": name, "dim": dim, "indices": indices.tolist()}
                )
        if not torch.equal(whole, origin):
            raise StageError(f"what is left of {name} is not a set of whole slices")
    return edits


def _sizes(dense: nn.Module, model: nn.Module) -> list[dict[str, Any]]:
    edits = []
    for name, module in model.named_modules():
        for attribute in ATTRIBUTES:
            value = getattr(module, attribute, None)
            if type(value) is int and value != getattr(dense.get_submodule(name), attribute):
                edits.append(
                    {"edit": "set_attribute", "module": name, "name": attribute, "value": value}
                )
    return edits
