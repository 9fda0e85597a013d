"""From what the dye showed to units and groups, and why others must be left alone."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

from compressor.stages.prune import recurrent
from compressor.stages.prune.group import Group, Slice, Unit, Write
from compressor.stages.prune.layers import depthwise, kind_of
from compressor.stages.prune.tracing import Place, Source, Trace, traced
from compressor.task import Inputs

OUTPUT = "its channels are the model's output"
TIED = "shares its weights with another layer"
UNREAD = "nothing reads its channels"
WHOLE = "all its channels depend on each other"
NORMALISED = "{} over the cut channels would change its statistics"
UNEVEN = "its layers and directions cannot lose equally many hidden units"

Node = tuple[str, int, int] | tuple[Place, int]
"""A position of a source ``("source", source, position)`` or a channel of a place."""


def groups_of(dense: nn.Module, examples: Inputs) -> tuple[list[Group], dict[str, str]]:
    """The groups that may be cut, in the order of their roots, and by layer why others may not.

    Raises :class:`StageError` for a model whose channels cannot be followed.
    """
    return _Builder(dense, traced(dense, examples)).groups()


class _Builder:
    def __init__(self, dense: nn.Module, trace: Trace) -> None:
        self.dense = dense
        self.modules = dict(dense.named_modules())
        self.trace = trace
        self.tied = _tied(dense)
        self.sets = _Sets()
        self.bare: dict[Slice, list[Write]] = {}
        self.plain: dict[int | Place, list[tuple[str, int, int]] | None] = {}
        for place, channels in trace.meets.items():
            for k, origins in enumerate(channels):
                for at, position in origins:
                    self.sets.join((place, k), ("source", at, position))
            self._bound(place)
        for at, source in enumerate(trace.sources):
            self._strided(at, source)
            for position in range(source.width):
                self.sets.add(("source", at, position))

    def _bound(self, place: Place) -> None:
        """Couplings that a layer itself makes between channels of its input."""
        name, end = place
        module, channels = self.modules[name], self.trace.meets[place]
        if end == "state":
            at = next(at for at, s in enumerate(self.trace.sources) if s.name == name)
            for k, origins in enumerate(channels):
                if origins:
                    self.sets.join((place, k), ("source", at, k))
        elif end == "in" and isinstance(module, _ConvNd) and module.groups > 1:
            # One weight holds the same input positions of every group: they go together.
            apart = len(channels) // module.groups
            for k in range(apart, len(channels)):
                if channels[k] and channels[k % apart]:
                    self.sets.join((place, k), (place, k % apart))

    def _strided(self, at: int, source: Source) -> None:
        if source.dim is None:
            module = self.modules[source.name]
            if isinstance(module, _ConvNd) and module.groups > 1:
                apart = source.width // module.groups
                for k in range(apart, source.width):
                    self.sets.join(("source", at, k), ("source", at, k % apart))

    def groups(self) -> tuple[list[Group], dict[str, str]]:
        found: dict[object, list[tuple[int, int, Unit]]] = defaultdict(list)
        left: dict[str, str] = {}
        for nodes in self.sets.all():
            unit = self._unit(nodes)
            root, position = min(self._origins(nodes))
            reason = self._reason(nodes, unit)
            if reason:
                left.setdefault(self._name(root), reason)
                continue
            # Units of one group come from the same strands and take the same from the same tensors.
            strands = frozenset(strand for node in nodes for strand in self._strand(node))
            shape = tuple((part.parameter, part.dim, len(part.at)) for part in unit)
            if (strands, shape) not in found:
                self.bare[unit[0]] = list(self._bare(nodes))
            found[strands, shape].append((root, position, unit))
        strands_of = [sorted(units) for units in found.values()]
        ordered = sorted(self._merged(strands_of, left), key=lambda group: group[0][0][:2])
        groups = []
        for strands_found in ordered:
            root = strands_found[0][0][0]
            units = tuple(tuple(unit for _, _, unit in strand) for strand in strands_found)
            name = self._name(root)
            if len(units[0]) < 2:
                left.setdefault(name, self._coupled(units[0][0]))
                continue
            groups.append(self._group(root, units))
        groups += self._cells()
        for group in groups:
            left.pop(group.root, None)
        return groups, left

    def _group(self, root: int, strands: tuple[tuple[Unit, ...], ...]) -> Group:
        name = self._name(root)
        layers = {part.parameter.rpartition(".")[0] for strand in strands for part in strand[0]}
        source = self.trace.sources[root]
        first, dim, size = _first_made(self.dense, source)
        at = next(
            (part.at for part in strands[0][0] if part.parameter == first and part.dim == dim), ()
        )
        runs = len(at) > 1 and any(b - a == 1 for a, b in itertools.pairwise(at))
        module = self.modules[name] if source.dim is None else None
        kind = "channels"
        if isinstance(module, nn.RNNBase):
            kind = "hidden units"
        elif isinstance(module, nn.Linear) and runs:
            kind = "heads"
        return Group(
            name,
            tuple(sorted(layers)),
            strands,
            kind=kind,  # type: ignore[arg-type]
            # A tensor with an axis for one group of a convolution stands for as many channels.
            each=1 if kind == "hidden units" else max(1, len(at) * source.width // size),
            writes=next((tuple(w) for u in strands[0] if (w := self.bare.get(u[0]))), ()),
        )

    def _bare(self, nodes: Iterable[Node]) -> Iterator[Write]:
        """Sizes of layers that count channels but have no tensors of that length."""
        through: dict[str, int] = defaultdict(int)
        for node in nodes:
            if node[0] != "source" and node[0][1] == "pass":
                through[node[0][0]] += 1
        for name, each in through.items():
            module = self.modules[name]
            kind = kind_of(module)
            if kind and kind.sizes and not any(True for _ in module.parameters()):
                if getattr(module, "running_mean", None) is None:
                    yield Write(name, kind.sizes[0], each)
                if isinstance(module, nn.GroupNorm):
                    yield Write(name, "num_groups", each * module.num_groups // module.num_channels)

    def _cells(self) -> Iterator[Group]:
        """Hidden units behind a projection: nobody outside sees them."""
        for name in self.trace.called:
            module = self.modules[name]
            if isinstance(module, nn.RNNBase) and module.proj_size and module not in self.tied:
                yield Group(
                    f"{name} (cells)", (name,), recurrent.cells(name, module), kind="hidden units"
                )

    def _merged(
        self, strands: list[list[tuple[int, int, Unit]]], left: dict[str, str]
    ) -> Iterator[list[list[tuple[int, int, Unit]]]]:
        """Puts together the strands of layers that have one size for all of them."""
        sets = _Sets()
        for at, units in enumerate(strands):
            sets.add(("strand", at, 0))
            for layer in self._recurrent(units[0][2]):
                sets.join(("strand", at, 0), ("layer", layer, 0))
        for nodes in sets.all():
            together = [strands[node[1]] for node in nodes if node[0] == "strand"]
            together.sort(key=lambda units: units[0][:2])
            if len({len(units) for units in together}) > 1:
                left[self._name(together[0][0][0])] = UNEVEN
            elif together:
                yield together

    def _recurrent(self, unit: Unit) -> set[int]:
        """The sources that are recurrent layers of whose hidden units (not only inputs) it has."""
        found = set()
        for part in unit:
            name, _, tensor = part.parameter.rpartition(".")
            module = self.modules[name]
            if isinstance(module, nn.RNNBase) and tensor.startswith("weight_hh"):
                found |= {at for at, s in enumerate(self.trace.sources) if s.name == name}
        return found

    def _strand(self, node: Node) -> Iterator[object]:
        if node[0] == "source":
            at, position = node[1], node[2]
            source = self.trace.sources[at]
            module = self.modules[source.name] if source.dim is None else None
            if isinstance(module, nn.RNNBase):
                yield at, position // recurrent.states(module)
            else:
                yield at, 0

    def _origins(self, nodes: Iterable[Node]) -> list[tuple[int, int]]:
        """Sources and positions; layers come before raw parameters."""
        return [(node[1], node[2]) for node in nodes if node[0] == "source"]

    def _name(self, at: int) -> str:
        return self.trace.sources[at].name

    def _unit(self, nodes: Iterable[Node]) -> Unit:
        merged: dict[tuple[str, int], set[int]] = defaultdict(set)
        for node in nodes:
            head: int | Place
            head, k = node[1:] if node[0] == "source" else node  # type: ignore[misc]
            plain = self._plain(head)
            if plain is None:
                for part in self._slices(head, k):
                    merged[part.parameter, part.dim].update(part.at)
            else:
                for name, dim, size in plain:
                    # A grouped convolution's second axis holds one group's channels.
                    merged[name, dim].add(k % size)
        return tuple(
            Slice(name, dim, tuple(sorted(at))) for (name, dim), at in sorted(merged.items())
        )

    def _plain(self, head: int | Place) -> list[tuple[str, int, int]] | None:
        """Tensors, axes and their sizes that hold one position for each channel; ``None`` for a
        layer that keeps its channels otherwise."""
        if head not in self.plain:
            self.plain[head] = self._tensors(head)
        return self.plain[head]

    def _tensors(self, head: int | Place) -> list[tuple[str, int, int]] | None:
        if isinstance(head, int):
            source = self.trace.sources[head]
            if source.dim is not None:
                return [(source.name, source.dim, source.width)]
            name, end = source.name, "out"
        else:
            name, end = head
        module = self.modules[name]
        if isinstance(module, nn.RNNBase) or (end == "pass" and depthwise(module)):
            return None
        kind = kind_of(module)
        assert kind is not None
        return [
            (f"{name}.{tensor}", dim, held.shape[dim])
            for tensor, dim in (kind.reads if end == "in" else kind.makes)
            if (held := getattr(module, tensor, None)) is not None
        ]

    def _slices(self, head: int | Place, k: int) -> Iterator[Slice]:
        name, end = (self._name(head), "out") if isinstance(head, int) else head
        module = self.modules[name]
        if not isinstance(module, nn.RNNBase):
            yield from self._depthwise(name, module, k)
        elif end != "state":
            yield from (recurrent.reads if end == "in" else recurrent.makes)(name, module, k)

    def _depthwise(self, name: str, module: nn.Module, k: int) -> Iterator[Slice]:
        assert isinstance(module, _ConvNd)
        times = module.out_channels // module.in_channels
        out = tuple(range(k * times, (k + 1) * times))
        yield Slice(f"{name}.weight", 0, (k,) if module.transposed else out)
        if module.bias is not None:
            yield Slice(f"{name}.bias", 0, out)

    def _reason(self, nodes: list[Node], unit: Unit) -> str:
        """Why this unit must be left alone; empty when it may be cut."""
        origins = self._origins(nodes)
        if any(at in self.trace.outward for at, _ in origins):
            return OUTPUT
        if self.tied and any(
            self.modules[part.parameter.rpartition(".")[0]] in self.tied for part in unit
        ):
            return TIED
        if len(nodes) == len(origins) and not self._recurrent(unit):
            return UNREAD
        return ""

    def _coupled(self, unit: Unit) -> str:
        """Why a layer is one unit only."""
        for part in unit:
            module = self.modules[part.parameter.rpartition(".")[0]]
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                return NORMALISED.format(type(module).__name__)
        return WHOLE


def _first_made(dense: nn.Module, source: Source) -> tuple[str, int, int]:
    """The tensor, axis and its size on which the channels of a source are counted."""
    if source.dim is not None:
        return source.name, source.dim, source.width
    module = dense.get_submodule(source.name)
    kind = kind_of(module)
    if kind is None or not kind.makes:
        return source.name, 0, source.width
    tensor, dim = kind.makes[0]
    return f"{source.name}.{tensor}", dim, getattr(module, tensor).shape[dim]


def _tied(model: nn.Module) -> set[nn.Module]:
    """The layers that share a parameter with another layer."""
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    return set().union(*(sharing for sharing in owners.values() if len(sharing) > 1))


class _Sets:
    """Disjoint sets of nodes (union-find)."""

    def __init__(self) -> None:
        self._up: dict[Node, Node] = {}

    def add(self, node: Node) -> Node:
        """The representative of the set that ``node`` is in, a new one of its own at first."""
        self._up.setdefault(node, node)
        while self._up[node] != node:
            self._up[node] = self._up[self._up[node]]
            node = self._up[node]
        return node

    def join(self, one: Node, other: Node) -> None:
        self._up[self.add(one)] = self.add(other)

    def all(self) -> list[list[Node]]:
        found: dict[Node, list[Node]] = {}
        for node in self._up:
            found.setdefault(self.add(node), []).append(node)
        return list(found.values())
