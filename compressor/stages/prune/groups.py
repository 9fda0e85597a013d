"""Which channels belong together, how much each matters, and which must be left alone."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressor.errors import StageError, one_line
from compressor.loading.task import tensors
from compressor.task import Inputs

LEFT_ALONE: dict[type[nn.Module], str] = {
    nn.RNNBase: "feeds or is a recurrent layer, whose hidden units are not cut",
    nn.LayerNorm: "LayerNorm over the cut channels would change its statistics",
    nn.GroupNorm: "GroupNorm over the cut channels would change its statistics",
    nn.MultiheadAttention: "attention heads are not cut",
}
"""Layers whose presence in a group makes cutting it unsound."""


@dataclass(frozen=True)
class Group:
    """Channels that can only be cut together; ``scores[c]`` is the norm of channel ``c`` of root.

    ``layers`` are the names of all layers that the cut touches.
    """

    root: str
    layers: tuple[str, ...]
    scores: torch.Tensor


def traced(model: nn.Module, examples: Inputs) -> Any:
    """torch-pruning's dependency graph of ``model``, which it may change.

    Parameters are made trainable first: the graph is read off the backward pass, and frozen ones
    would be missed without a word.
    """
    import torch_pruning

    model.requires_grad_(True)
    with warnings.catch_warnings(action="ignore"):  # of raw parameters, which are refused below
        try:
            return torch_pruning.DependencyGraph().build_dependency(
                model,
                example_inputs=tuple(map(torch.from_numpy, examples)),
                output_transform=tensors,
                verbose=False,
            )
        except Exception as error:
            raise StageError(
                f"torch-pruning cannot trace the model ({type(error).__name__}: {one_line(error)})"
            ) from error


def groups_of(dense: nn.Module, examples: Inputs, norm: str) -> tuple[list[Group], dict[str, str]]:
    """The groups that may be cut, and by root layer why others may not."""
    import torch_pruning

    model = copy.deepcopy(dense).eval()
    graph = traced(model, examples)
    names = {module: name for name, module in model.named_modules()}
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=1 if norm == "l1" else 2)
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    tied = _tied(model)
    found: list[Group] = []
    left = {names[module]: LEFT_ALONE[nn.RNNBase] for module in recurrent}
    for group in graph.get_all_groups(
        ignored_layers=recurrent, root_module_types=[nn.modules.conv._ConvNd, nn.Linear]
    ):
        root = names[group[0].dep.target.module]
        reason = _reason(group, tied)
        if reason:
            left[root] = reason
            continue
        scores = importance(group)
        if scores is None or len(scores) != len(group[0].idxs):
            left[root] = "torch-pruning cannot rank its channels"
            continue
        targets = [item.dep.target.module for item in group]
        layers = {names[module] for module in targets if module in names}
        found.append(Group(root, tuple(sorted(layers)), scores.detach()))
    return found, left


def _tied(model: nn.Module) -> set[nn.Module]:
    """The layers that share a parameter with another layer."""
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    return set().union(*(sharing for sharing in owners.values() if len(sharing) > 1))


def _reason(group: Any, tied: set[nn.Module]) -> str:
    """Why this group must be left alone; empty when it may be cut."""
    for item in group:
        target = item.dep.target
        module = target.module
        if isinstance(module, nn.Parameter):
            return "a raw parameter shares its channels"
        if module in tied:
            return "shares its weights with another layer"
        for kind, why in LEFT_ALONE.items():
            if isinstance(module, kind):
                return why
        if isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups < module.out_channels:
            return "grouped convolution"
        outward = getattr(item.dep.handler, "__name__", "").endswith("out_channels")
        # TBackward nodes are transposed weights: they end nowhere and are not the output.
        if outward and not target.outputs and "TBackward" not in target.name:
            return "its channels are the model's output"
    return ""
