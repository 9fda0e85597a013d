"""From cut units to edits: which slices of which tensors stay, and the sizes that follow."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from compressor.stages.prune.group import Cut, Unit
from compressor.stages.prune.layers import depthwise, kind_of
from compressor.stages.prune.recurrent import GATES

Edits = list[dict[str, Any]]


def edits_of(dense: nn.Module, cuts: Sequence[Cut]) -> Edits:
    """The edits that remove ``cuts`` and everything that goes with them; ``dense`` is unchanged."""
    shapes = shapes_of(dense)
    gone: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for unit in (unit for one in cuts for unit in units(one)):
        for part in unit:
            gone[part.parameter][part.dim].update(part.at)
    edits: Edits = [
        {
            "edit": "scale",
            "parameter": part.parameter,
            "dim": part.dim,
            "indices": list(part.at),
            "factor": math.sqrt(one.kept / one.group.width),
        }
        for one in cuts
        for part in one.group.scales
    ]
    for name in shapes:  # in the model's own order
        for dim, positions in sorted(gone.get(name, {}).items()):
            indices = [at for at in range(shapes[name][dim]) if at not in positions]
            edits.append({"edit": "keep", "parameter": name, "dim": dim, "indices": indices})
            shapes[name][dim] = len(indices)
    layers = {name.rpartition(".")[0] for name in gone}
    for name, module in dense.named_modules():
        if name in layers:
            for attribute, value in _sizes(name, module, shapes):
                if value != getattr(module, attribute):
                    edits.append(_set(name, attribute, value))
    for one in cuts:
        edits += [
            _set(write.module, write.attribute, one.kept * write.each) for write in one.group.writes
        ]
    return edits


def units(cut: Cut) -> Iterator[Unit]:
    """The units that go."""
    for strand, gone in zip(cut.group.strands, cut.gone, strict=True):
        yield from (strand[at] for at in gone)


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """The shape of every parameter and buffer, by name."""
    everything = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {name: list(tensor.shape) for name, tensor in everything}


def _set(module: str, name: str, value: int) -> dict[str, Any]:
    return {"edit": "set_attribute", "module": module, "name": name, "value": value}


def _sizes(
    name: str, module: nn.Module, shapes: Mapping[str, list[int]]
) -> Iterator[tuple[str, int]]:
    """The attributes of a layer that count channels, and what they become."""
    prefix = f"{name}." if name else ""
    kind = kind_of(module)
    if kind is None:
        return
    if isinstance(module, nn.RNNBase):
        yield "input_size", shapes[f"{prefix}weight_ih_l0"][1]
        yield "hidden_size", shapes[f"{prefix}weight_hh_l0"][0] // GATES[module.mode]
        if module.proj_size:
            yield "proj_size", shapes[f"{prefix}weight_hr_l0"][0]
    elif isinstance(module, _ConvNd):
        out, inward = shapes[f"{prefix}weight"][:2]
        if module.transposed:
            out, inward = inward, out
        groups = module.groups
        if depthwise(module):
            groups = inward if module.transposed else out * groups // module.out_channels
            yield "groups", groups
            inward, out = groups, out * groups if module.transposed else out
        elif module.transposed:
            out *= groups
        else:
            inward *= groups
        yield "in_channels", inward
        yield "out_channels", out
    else:
        for attribute, (tensor, dim) in zip(kind.sizes, (*kind.reads, kind.makes[0]), strict=False):
            held = tensor if f"{prefix}{tensor}" in shapes else "running_mean"
            if f"{prefix}{held}" in shapes:
                yield attribute, shapes[f"{prefix}{held}"][dim]
        if isinstance(module, nn.GroupNorm):
            each = module.num_channels // module.num_groups
            yield "num_groups", shapes[f"{prefix}weight"][0] // each
