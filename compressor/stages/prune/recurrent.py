"""Recurrent layers: their gates, layers and directions share one count of hidden units.

A hidden unit that is cut has zero weights in the dense model, so its state stays what it starts
as, zero: tanh(0) = 0 whatever the gates say. That makes the proof exact for LSTM, GRU and RNN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from compressor.stages.prune.group import Slice, Unit

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def directions(module: nn.RNNBase) -> int:
    """1, or 2 for a bidirectional layer."""
    return 2 if module.bidirectional else 1


def states(module: nn.RNNBase) -> int:
    """How many numbers a layer and direction hands on: hidden units, or their projection."""
    return module.proj_size or module.hidden_size


def width(module: nn.RNNBase) -> int:
    """Positions of the source: every layer and direction has :func:`states` of them."""
    return module.num_layers * directions(module) * states(module)


def arrived(module: nn.RNNBase, given: list[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The ends that a dye reached: ``in``, the features, and ``state``, of given initial states."""
    x = given[0].data if isinstance(given[0], PackedSequence) else given[0]
    yield "in", x.isnan().flatten(0, -2).any(0)
    first = given[1] if len(given) > 1 else None
    for state in (first if isinstance(first, tuple) else (first,))[: 1 if module.proj_size else 2]:
        if state is not None:
            # (layers x directions, batch, states), or without a batch.
            flat = state.isnan() if state.ndim == 2 else state.isnan().any(1)
            yield "state", flat.flatten()


def stained(module: nn.RNNBase, output: Any, where: torch.Tensor) -> Any:
    """The layer's clean output with these positions of its source dyed."""
    sequence, final = output
    size, sides = states(module), directions(module)
    flat = sequence.data if isinstance(sequence, PackedSequence) else sequence
    h = final[0] if isinstance(final, tuple) else final
    for position in where.long().tolist():
        layer, unit = divmod(position, size)
        h[layer, ..., unit] = math.nan
        if isinstance(final, tuple) and not module.proj_size:
            final[1][layer, ..., unit] = math.nan
        last = layer - (module.num_layers - 1) * sides
        if last >= 0:
            flat[..., last * size + unit] = math.nan
    return output


def reads(name: str, module: nn.RNNBase, channel: int) -> Unit:
    """What goes with feature ``channel`` of the input."""
    return tuple(Slice(f"{name}.weight_ih_l0{side}", 1, (channel,)) for side in _sides(module))


def makes(name: str, module: nn.RNNBase, position: int) -> Unit:
    """What goes with one position of the source: a hidden unit, or one number of its projection."""
    at, unit = divmod(position, states(module))
    layer, side = divmod(at, directions(module))
    here = f"l{layer}{_sides(module)[side]}"
    own: tuple[Slice, ...]
    if module.proj_size:
        own = (Slice(f"{name}.weight_hr_{here}", 0, (unit,)),)
    else:
        own = _gates(name, module, here, unit)
    column = side * states(module) + unit
    onward = tuple(
        Slice(f"{name}.weight_ih_l{layer + 1}{other}", 1, (column,))
        for other in _sides(module)
        if layer + 1 < module.num_layers
    )
    return (*own, Slice(f"{name}.weight_hh_{here}", 1, (unit,)), *onward)


def cells(name: str, module: nn.RNNBase) -> tuple[tuple[Unit, ...], ...]:
    """The hidden units behind a projection, which nobody outside sees: a strand for each layer and
    direction."""
    return tuple(
        tuple(
            (
                *_gates(name, module, f"l{layer}{side}", unit),
                Slice(f"{name}.weight_hr_l{layer}{side}", 1, (unit,)),
            )
            for unit in range(module.hidden_size)
        )
        for layer in range(module.num_layers)
        for side in _sides(module)
    )


def _gates(name: str, module: nn.RNNBase, here: str, unit: int) -> Unit:
    rows = tuple(gate * module.hidden_size + unit for gate in range(GATES[module.mode]))
    tensors = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]
    return tuple(Slice(f"{name}.{tensor}_{here}", 0, rows) for tensor in tensors)


def _sides(module: nn.RNNBase) -> list[str]:
    return ["", "_reverse"] if module.bidirectional else [""]
