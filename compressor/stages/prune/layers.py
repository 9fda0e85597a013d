"""Where the layers of PyTorch keep their channels: the table that tracing and cutting read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

Axis = tuple[str, int]
"""A tensor of the layer, by its own name, and one of its axes."""


@dataclass(frozen=True)
class Kind:
    """What a layer does to channels.

    ``reads`` are the axes that go with its input channels, ``makes`` those with its output
    channels. A layer that ``mixes`` computes every output from all inputs, so that channels end in
    it and new ones begin. One that does not has ``makes`` only: its channels are those it gets.
    ``sizes`` are the attributes that count them: of the input, of the output.
    """

    reads: tuple[Axis, ...]
    makes: tuple[Axis, ...]
    mixes: bool = True
    sizes: tuple[str, ...] = ()
    axis: int = -1
    """The axis of activations that the channels lie on; 0 for convolutions, whose axis is left of
    their spatial ones."""


NORM = (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0))

KINDS: dict[type[nn.Module], Kind] = {
    _ConvTransposeNd: Kind(
        (("weight", 0),),
        (("weight", 1), ("bias", 0)),
        axis=0,
        sizes=("in_channels", "out_channels"),
    ),
    _ConvNd: Kind(
        (("weight", 1),),
        (("weight", 0), ("bias", 0)),
        axis=0,
        sizes=("in_channels", "out_channels"),
    ),
    nn.Linear: Kind(
        (("weight", 1),), (("weight", 0), ("bias", 0)), sizes=("in_features", "out_features")
    ),
    nn.Embedding: Kind((), (("weight", 1),), sizes=("embedding_dim",)),
    nn.RNNBase: Kind((), ()),  # its gates are in recurrent.py
    _BatchNorm: Kind((), NORM, mixes=False, sizes=("num_features",), axis=1),
    _InstanceNorm: Kind((), NORM, mixes=False, sizes=("num_features",), axis=1),
    nn.GroupNorm: Kind((), NORM[:2], mixes=False, sizes=("num_channels",), axis=1),
    nn.PReLU: Kind((), (("weight", 0),), mixes=False, sizes=("num_parameters",), axis=1),
    nn.LayerNorm: Kind((), NORM[:2], mixes=False),
}
"""First match decides, so a subclass stands before its base."""


def kind_of(layer: nn.Module) -> Kind | None:
    """The entry of ``layer``; ``None`` for a layer that is not in the table, and for one whose
    weights are computed from others or rescaled as they are read."""
    if nn.utils.parametrize.is_parametrized(layer) or getattr(layer, "max_norm", None) is not None:
        return None
    return next((kind for known, kind in KINDS.items() if isinstance(layer, known)), None)


def depthwise(layer: nn.Module) -> bool:
    """A convolution whose every output channel comes from one input channel."""
    return isinstance(layer, _ConvNd) and 1 < layer.groups == layer.in_channels


def channel_axis(layer: nn.Module, kind: Kind, dims: int) -> int:
    """The axis of an activation with ``dims`` axes that holds the channels of ``layer``."""
    if isinstance(layer, _ConvNd):
        return dims - len(layer.kernel_size) - 1
    if isinstance(layer, nn.LayerNorm):
        return dims - len(layer.normalized_shape)
    return kind.axis % dims
