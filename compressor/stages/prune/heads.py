"""Attention: whole heads, or the same dimensions of every head, and the attributes that say so.

A head shows itself in the trace: a dyed query or key reaches, through the softmax, every value of
its head and none of another. What code keeps beside the weights (a count of heads, a width, a
scale) is found by trying the attributes of that value and name, and kept when the proof holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from compressor.stages.prune.group import Cut, Group, Slice, Unit, Write

COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
WIDTHS = ("all_head_size", "inner_dim", "attn_dim")
ALSO_WIDTHS = ("embed_dim",)
"""Most often this is the width of the model, which stays."""
DIMENSIONS = ("head_dim", "head_size", "attention_head_size", "dim_head")

Holds = Callable[[Cut], bool]


def written(dense: nn.Module, group: Group, holds: Holds) -> Group | None:
    """The group of heads with the attributes that have to follow it; ``None`` if none are right.

    ``holds`` proves a cut.
    """
    width = group.width * group.each
    counts = _attributes(dense, group, COUNTS, group.width, 1)
    widths = _attributes(dense, group, WIDTHS, width, group.each)
    also = _attributes(dense, group, ALSO_WIDTHS, width, group.each)
    tries = (counts + widths, counts + widths + also, counts, ())
    for writes in dict.fromkeys(tries):
        found = replace(group, writes=writes)
        if holds(Cut(found, tuple((0,) for _ in found.strands))):
            return found
    return None


def dimensions(dense: nn.Module, group: Group, holds: Holds) -> Group | None:
    """The group whose units are one dimension of every head: queries and keys, and values apart.

    Which projection is which is found by proof as well. Where the scale of the scores follows the
    width of a head, the queries that stay are multiplied to undo that.
    """
    parts = _parts(group)
    if parts is None:
        return None
    *projections, output = parts
    size = output.size
    dims = _attributes(dense, group, DIMENSIONS, size, 1)
    widths = _attributes(dense, group, WIDTHS, group.width * size, group.width)
    also = _attributes(dense, group, ALSO_WIDTHS, group.width * size, group.width)
    for value in reversed(projections):  # values most often come last
        query, key = (each for each in projections if each is not value)
        strands = tuple(
            tuple(_dimension(group, owners, at) for at in range(size))
            for owners in ((query, key), (value, output))
        )
        queries = tuple(
            Slice(name, dim, _everywhere(group, query, name, dim)) for name, dim in query.tensors
        )
        for scales in ((), queries):
            for writes in dict.fromkeys((dims + widths, dims + widths + also, dims, ())):
                found = replace(
                    group,
                    strands=strands,
                    kind="head dimensions",
                    each=group.width * group.each // size,
                    writes=writes,
                    scales=scales,
                )
                if size > 1 and holds(Cut(found, ((0,), (1,)))):
                    return found
    return None


class _Part(NamedTuple):
    """One projection of all heads: its tensors, and where its positions begin in a unit's slice."""

    tensors: tuple[tuple[str, int], ...]
    start: int
    size: int


def _parts(group: Group) -> list[_Part] | None:
    """Three projections and the output's columns; ``None`` where the unit looks otherwise."""
    unit = group.strands[0][0]
    columns = [part for part in unit if part.dim == 1]
    if len(columns) != 1 or len(group.strands) != 1:
        return None
    size = len(columns[0].at)
    owners: dict[str, list[Slice]] = {}
    for part in unit:
        if part.dim == 0:
            owners.setdefault(part.parameter.rpartition(".")[0], []).append(part)
    found = [
        _Part(tuple((part.parameter, 0) for part in parts), start, size)
        for parts in owners.values()
        for start in range(0, len(parts[0].at), size)
    ]
    if len(found) != 3:
        return None
    return [*found, _Part(((columns[0].parameter, 1),), 0, size)]


def _at(unit: Unit, parameter: str, dim: int) -> tuple[int, ...]:
    return next((part.at for part in unit if (part.parameter, part.dim) == (parameter, dim)), ())


def _everywhere(group: Group, owner: _Part, name: str, dim: int) -> tuple[int, ...]:
    """The positions of a tensor that belong to ``owner``, of all heads."""
    stretch = slice(owner.start, owner.start + owner.size)
    return tuple(sorted(at for unit in group.strands[0] for at in _at(unit, name, dim)[stretch]))


def _dimension(group: Group, owners: tuple[_Part, ...], position: int) -> Unit:
    """Dimension ``position`` of every head, in the tensors of these projections."""
    merged: dict[tuple[str, int], set[int]] = {}
    for owner in owners:
        for tensor in owner.tensors:
            merged.setdefault(tensor, set()).update(
                _at(unit, *tensor)[owner.start + position] for unit in group.strands[0]
            )
    return tuple(Slice(name, dim, tuple(sorted(at))) for (name, dim), at in sorted(merged.items()))


def _attributes(
    dense: nn.Module, group: Group, names: tuple[str, ...], value: int, each: int
) -> tuple[Write, ...]:
    """Attributes of that name and value on the layers that hold the root."""
    parts = group.root.split(".")[:-1]
    found = []
    for depth in (len(parts), len(parts) - 1):
        place = ".".join(parts[: max(depth, 0)])
        module = dense.get_submodule(place)
        found += [
            Write(place, name, each)
            for name in names
            if type(getattr(module, name, None)) is int and getattr(module, name) == value
        ]
    return tuple(dict.fromkeys(found))
