"""Which channels meet where, found by letting a dye run through the model.

One channel of a layer's output is set to NaN ("dyed") and the model runs on. Whatever is computed
from that channel is NaN as well; where the NaN arrives, the channel arrives. Layers that mix
channels (convolution, linear, recurrent) note which of their input channels are dyed and answer
with the clean output of an earlier pass, so that a dye shows one stretch of the way, and a pass
costs little more than its element-wise operations. Views, transposes, concatenations, splits,
shuffles, gates and attention need no rules of their own: they do to the dye what they do to the
data.

Dyeing one channel a pass would take too many passes. All sources are dyed at once in a binary code
of their channels' positions, each bit in one pass and its complement in another: a channel that
exactly one position reaches shows a whole code. What several positions reach (normalisation over
channels, attention, gates made of two halves) shows none, and is dyed position by position.

torch-pruning (Fang et al. 2023, DepGraph) derives the same from rules per operation on the
backward graph. It cuts channel shuffles wrongly, cannot follow recurrent layers, embeddings or
code under ``no_grad``, and stops at splits that feed gates, which is why we trace ourselves.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence

from compressor.errors import StageError, one_line
from compressor.loading.task import tensors
from compressor.stages.prune import recurrent
from compressor.stages.prune.layers import Axis, Kind, channel_axis, depthwise, kind_of
from compressor.task import Inputs

ONE_BY_ONE = 1024
"""Positions that are dyed source by source; above, those of all sources together, which may couple
more than is coupled."""

SMALL = 64
"""Pixels of a side that are enough to see where channels go, where the model takes so few."""

Place = tuple[str, str]
"""The end of a stretch: a layer's name, and ``"in"``, ``"pass"`` or ``"state"`` of it."""


@dataclass(frozen=True)
class Source:
    """Where channels begin: the output of a layer, or an axis ``dim`` of a raw parameter."""

    name: str
    width: int
    dim: int | None = None


@dataclass
class Trace:
    """What the dye showed.

    ``meets[place][k]`` are the (source, position) pairs that arrive at channel ``k`` of a place.
    ``outward`` are the sources that reach the model's output, ``called`` the layers in the order in
    which they ran first.
    """

    sources: list[Source]
    meets: dict[Place, list[set[tuple[int, int]]]]
    outward: set[int] = field(default_factory=set)
    called: list[str] = field(default_factory=list)


class Dye:
    """A model whose mixing layers are cut short, ready for passes with dyed channels."""

    def __init__(self, dense: nn.Module, examples: Inputs) -> None:
        self.model = copy.deepcopy(dense).eval()
        self.inputs = tuple(map(torch.from_numpy, examples))
        self.names = {module: name for name, module in self.model.named_modules()}
        self.kinds = {module: kind for module in self.names if (kind := kind_of(module))}
        self.outputs: dict[nn.Module, list[Any]] = {}
        self.calls: dict[nn.Module, int] = {}
        self.dyed: dict[str, torch.Tensor] = {}
        self.seen: dict[Place, torch.Tensor] = {}
        opaque: set[nn.Module] = set()
        for module, kind in self.kinds.items():
            if kind.mixes:
                module.forward = partial(self._recorded, module, module.forward, opaque)
        self._run()
        for module in opaque:
            del self.kinds[module], self.outputs[module], module.forward
        self.called = [self.names[module] for module in self.outputs]
        for module, kind in self.kinds.items():
            if kind.mixes:
                module.forward = partial(self._mixed, module, kind)
            else:
                module.register_forward_pre_hook(partial(self._passed, kind), with_kwargs=True)
        owned = {
            parameter
            for module in self.kinds
            if module in self.outputs or not self.kinds[module].mixes
            for parameter in module.parameters(recurse=False)
        }
        self.raw = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter not in owned and parameter.is_floating_point()
        }
        self.sources = [*self._layers(), *self._raw()]
        self.sources = [source for at, source in enumerate(self.sources) if self._selects(at)]

    def _layers(self) -> Iterable[Source]:
        for name in self.called:
            module = self.model.get_submodule(name)
            if isinstance(module, nn.RNNBase):
                yield Source(name, recurrent.width(module))
            elif not depthwise(module):
                kind = self.kinds[module]
                output = self.outputs[module][0]
                yield Source(name, output.shape[channel_axis(module, kind, output.ndim)])

    def _raw(self) -> Iterable[Source]:
        for name, parameter in self.raw.items():
            for dim, size in enumerate(parameter.shape):
                if size > 1:
                    yield Source(name, size, dim)

    def _selects(self, at: int) -> bool:
        """Whether the positions of a raw parameter's axis go different ways.

        Those of a spatial bias or a position embedding reach all channels alike: that axis goes
        with no channel.
        """
        source = self.sources[at]
        if source.dim is None:
            return True
        one, _ = self.arrivals({at: [0]})
        whole, _ = self.arrivals({at: range(source.width)})
        return any(not torch.equal(one[place], whole[place]) for place in whole)

    def arrivals(self, dyed: Mapping[int, Iterable[int]]) -> tuple[dict[Place, torch.Tensor], bool]:
        """Runs once with these positions of these sources dyed.

        Gives, for every place, which channels the dye reached (bool, one for each), and whether it
        reached the output.
        """
        self.dyed, self.seen, self.calls = {}, {}, {}
        stained = []
        for at, positions in dyed.items():
            source = self.sources[at]
            where = torch.tensor(list(positions), dtype=torch.long)
            if source.dim is None:
                self.dyed[source.name] = where
            elif len(where):
                parameter = self.raw[source.name]
                stained.append((parameter, parameter.detach().clone()))
                parameter.data.index_fill_(source.dim, where, math.nan)
        try:
            outputs = tensors(self._run())
        finally:
            for parameter, clean in reversed(stained):
                parameter.data.copy_(clean)
        reached = any(bool(each.isnan().any()) for each in outputs if each.is_floating_point())
        return self.seen, reached

    def _run(self) -> Any:
        # Fused kernels bypass the layers' forward, or leave NaN out of a softmax.
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                return self.model(*self.inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def _recorded(
        self,
        module: nn.Module,
        forward: Any,
        opaque: set[nn.Module],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        output = forward(*args, **kwargs)
        if not _additive(
            module, self.kinds[module], forward, next(iter([*args, *kwargs.values()]))
        ):
            opaque.add(module)
        # Later layers may write into what they are given, such as ReLU in place.
        self.outputs.setdefault(module, []).append(_mapped(torch.clone, output))
        return output

    def _mixed(self, module: nn.Module, kind: Kind, *args: Any, **kwargs: Any) -> Any:
        name = self.names[module]
        call = self.calls[module] = self.calls.get(module, -1) + 1
        output = _mapped(torch.clone, self.outputs[module][call])
        given = [*args, *kwargs.values()]
        if isinstance(module, nn.RNNBase):
            for end, channels in recurrent.arrived(module, given):
                self._note((name, end), channels)
            return recurrent.stained(module, output, self.dyed.get(name, torch.tensor([])))
        axis = channel_axis(module, kind, output.ndim)
        if depthwise(module):
            arrived = _channels(module, kind, given[0])
            self._note((name, "pass"), arrived)
            where = (
                arrived.repeat_interleave(output.shape[axis] // len(arrived)).nonzero().flatten()
            )
        else:
            if given[0].is_floating_point():
                self._note((name, "in"), _channels(module, kind, given[0]))
            where = self.dyed.get(name, torch.tensor([], dtype=torch.long))
        return output.index_fill_(axis, where, math.nan)

    def _passed(self, kind: Kind, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = next(iter([*args, *kwargs.values()]))
        self._note((self.names[module], "pass"), _channels(module, kind, given))

    def _note(self, place: Place, channels: torch.Tensor) -> None:
        before = self.seen.get(place)
        self.seen[place] = channels if before is None else before | channels


def _additive(module: nn.Module, kind: Kind, forward: Any, given: Any) -> bool:
    """Whether zeros in a channel's weights do what zeros in the channel do, and nothing else.

    They do not where a subclass normalises its weights: what is left of a cut weight would be
    scaled anew, in the masked model of the proof as well, which would not notice.
    """
    if not kind.reads or type(module).forward.__module__.startswith("torch.nn."):
        return True

    def cleared(tensor: torch.Tensor, axes: tuple[Axis, ...]) -> torch.Tensor:
        name, dim = axes[0]
        # Of a grouped convolution an axis may hold one group's channels.
        apart = getattr(module, name).shape[dim]
        axis = channel_axis(module, kind, tensor.ndim)
        return tensor.index_fill(axis, torch.arange(0, tensor.shape[axis], apart), 0)

    def without(axes: tuple[Axis, ...]) -> torch.Tensor:
        clean = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
        for tensor, dim in axes:
            if getattr(module, tensor, None) is not None:
                getattr(module, tensor).data.index_fill_(dim, torch.tensor([0]), 0)
        output: torch.Tensor = forward(given)
        for name, before in clean.items():
            module.get_parameter(name).data.copy_(before)
        return output

    def alike(got: torch.Tensor, wanted: torch.Tensor) -> bool:
        return torch.allclose(got, wanted, rtol=1e-3, atol=1e-4 * (1 + float(wanted.abs().max())))

    unread, unmade = forward(cleared(given, kind.reads)), cleared(forward(given), kind.makes)
    return alike(without(kind.reads), unread) and alike(without(kind.makes), unmade)


def _mapped(function: Any, output: Any) -> Any:
    """``function`` of every tensor in what a layer returned."""
    if isinstance(output, PackedSequence):
        return PackedSequence(function(output.data), *output[1:])
    if isinstance(output, torch.Tensor):
        return function(output)
    if isinstance(output, tuple | list):
        return type(output)(_mapped(function, part) for part in output)
    return output


def _channels(module: nn.Module, kind: Kind, given: torch.Tensor) -> torch.Tensor:
    """Which channels of an input hold a NaN anywhere."""
    axis = channel_axis(module, kind, given.ndim)
    rest = [at for at in range(given.ndim) if at != axis]
    return given.isnan().any(dim=rest) if rest else given.isnan()


def traced(dense: nn.Module, examples: Inputs) -> Trace:
    """Where every channel of ``dense`` goes; the model is unchanged.

    Raises :class:`StageError` for a model that does not run with NaN in it.
    """
    try:
        return _traced(_dye(dense, examples))
    except Exception as error:
        raise StageError(
            f"channels cannot be followed through {_stopped(error) or 'the model'} "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error


def _stopped(error: Exception) -> str:
    """The name of the innermost layer in which a pass stopped."""
    names: Mapping[nn.Module, str] = {}
    name, trace = "", error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, Dye):
            names = owner.names
        elif isinstance(owner, nn.Module):
            name = names.get(owner) or name
        trace = trace.tb_next
    return name


def _dye(dense: nn.Module, examples: Inputs) -> Dye:
    """On small images where the model takes them: a dye goes the same way ten times faster."""
    small = tuple(
        part[..., :SMALL, :SMALL] if part.ndim == 4 and part.dtype.kind == "f" else part
        for part in examples
    )
    if any(each.shape != part.shape for each, part in zip(small, examples, strict=True)):
        with suppress(Exception):
            return Dye(dense, small)
    return Dye(dense, examples)


def _traced(dye: Dye) -> Trace:
    sources = dye.sources
    clean, _ = dye.arrivals({})
    meets: dict[Place, list[set[tuple[int, int]]]] = {
        place: [set() for _ in channels] for place, channels in clean.items()
    }
    trace = Trace(sources, meets, called=dye.called)
    # Who arrives anywhere at all: place -> (sources, channels).
    who = {place: torch.zeros(len(sources), len(found), dtype=torch.bool)
           for place, found in clean.items()}  # fmt: skip
    for at, source in enumerate(sources):
        seen, outward = dye.arrivals({at: range(source.width)})
        if outward:
            trace.outward.add(at)
        for place, channels in seen.items():
            who[place][at] = channels
    unclear = _decoded(dye, who, meets)
    unclear = _throughout(dye, who, meets, unclear)
    _one_by_one(dye, who, meets, unclear)
    return trace


Unclear = dict[Place, torch.Tensor]
"""Channels, by place, of which it is not known yet what they meet."""


def _decoded(
    dye: Dye,
    who: Mapping[Place, torch.Tensor],
    meets: Mapping[Place, list[set[tuple[int, int]]]],
) -> Unclear:
    """Reads the binary code; what shows a whole one goes into ``meets``, the rest comes back."""
    sources = dye.sources
    bits = max((source.width - 1).bit_length() for source in sources) if sources else 0
    shown: dict[Place, list[torch.Tensor]] = {place: [] for place in who}
    for bit in range(bits):
        for value in (0, 1):
            code = {
                at: [position for position in range(source.width) if position >> bit & 1 == value]
                for at, source in enumerate(sources)
            }
            seen, _ = dye.arrivals(code)
            for place in who:
                shown[place].append(seen[place])
    unclear: Unclear = {}
    for place, arrived in who.items():
        reached = arrived.any(0)
        code_of = torch.zeros(len(reached), dtype=torch.long)
        whole = torch.ones_like(reached)
        for bit in range(bits):
            zero, one = shown[place][2 * bit], shown[place][2 * bit + 1]
            whole &= zero != one
            code_of += one.long() << bit
        for k in (reached & whole).nonzero().flatten().tolist():
            position = int(code_of[k])
            origins = arrived[:, k].nonzero().flatten().tolist()
            if all(position < sources[at].width for at in origins):
                meets[place][k] = {(at, position) for at in origins}
            else:
                whole[k] = False
        unclear[place] = reached & ~whole
    return unclear


def _throughout(
    dye: Dye,
    who: Mapping[Place, torch.Tensor],
    meets: Mapping[Place, list[set[tuple[int, int]]]],
    unclear: Unclear,
) -> Unclear:
    """Channels that the first, the middle and the last position all reach meet every position.

    Normalisation over all channels makes them; telling them early saves most passes in
    transformers. Where it says too much, channels are coupled that need not be: less is cut.
    """
    if not any(bool(channels.any()) for channels in unclear.values()):
        return unclear
    everywhere = {place: channels.clone() for place, channels in unclear.items()}
    for share in (0.0, 0.5, 1.0):
        positions = {
            at: [round(share * (source.width - 1))] for at, source in enumerate(dye.sources)
        }
        seen, _ = dye.arrivals(positions)
        for place in everywhere:
            everywhere[place] &= seen[place]
    for place, channels in everywhere.items():
        for k in channels.nonzero().flatten().tolist():
            meets[place][k] = {
                (at, position)
                for at in who[place][:, k].nonzero().flatten().tolist()
                for position in range(dye.sources[at].width)
            }
    return {place: channels & ~everywhere[place] for place, channels in unclear.items()}


def _one_by_one(
    dye: Dye,
    who: Mapping[Place, torch.Tensor],
    meets: Mapping[Place, list[set[tuple[int, int]]]],
    unclear: Unclear,
) -> None:
    involved = {
        at
        for place, channels in unclear.items()
        for at in who[place][:, channels].any(1).nonzero().flatten().tolist()
    }
    single = sum(dye.sources[at].width for at in involved) <= ONE_BY_ONE
    for together in [[at] for at in involved] if single else [sorted(involved)]:
        for position in range(max((dye.sources[at].width for at in together), default=0)):
            here = [at for at in together if position < dye.sources[at].width]
            seen, _ = dye.arrivals({at: [position] for at in here})
            for place, channels in unclear.items():
                for k in (seen[place] & channels).nonzero().flatten().tolist():
                    meets[place][k] |= {(at, position) for at in here if who[place][at, k]}
