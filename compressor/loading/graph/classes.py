"""The layers of PyTorch that a file may name, and what each of their arguments may be.

A description of a layer is plain JSON that says its class and the arguments of its constructor,
nothing else: :mod:`compressor.loading.embedded` writes and reads it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (the name that the field uses)
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Check = Callable[[Any], bool]
Arguments = Mapping[str, Any]
Children = Mapping[str, nn.Module]

LARGEST = 2**31 - 1
LONGEST = 8
"""Numbers of a list: more axes than any layer has."""


class Known(NamedTuple):
    """A class that a file may name.

    ``arguments`` are those of its constructor with what each may be. The attribute of the same name
    holds the value, unless ``stored`` names another; of a tensor it says whether there is one.
    ``make(arguments, children)`` builds the layer where the constructor alone does not. Only a
    ``free`` class holds whatever layers it is given.
    """

    kind: type[nn.Module]
    arguments: Mapping[str, Check] = {}
    stored: Mapping[str, str] = {}
    make: Callable[[Arguments, Children], nn.Module] | None = None
    free: bool = False


def shown(value: Any) -> str:
    """A value for a message. A file may hold one whose whole text fills the memory."""
    short = reprlib.Repr()
    short.maxlevel = 2
    return f"{short.repr(value):.60}"


def whole(low: int, high: int = LARGEST) -> Check:
    """An integer from ``low`` to ``high``."""
    return lambda value: type(value) is int and low <= value <= high


def row(check: Check) -> Check:
    """One value, or a list of at most :data:`LONGEST`."""
    return lambda value: (
        len(value) <= LONGEST and all(map(check, value)) if type(value) is list else check(value)
    )


def maybe(check: Check) -> Check:
    """``None`` as well."""
    return lambda value: value is None or check(value)


def among(*values: str) -> Check:
    """One of these words."""
    return lambda value: type(value) is str and value in values


def either(*checks: Check) -> Check:
    """What one of them takes."""
    return lambda value: any(check(value) for check in checks)


def flag(value: Any) -> bool:
    """True or False."""
    return type(value) is bool


def number(value: Any) -> bool:
    """An integer of 64 bits or a float, infinite ones too."""
    return type(value) is float or whole(-(2**63), 2**63)(value)


SIZE, COUNT, INTEGER = whole(1), whole(0), whole(-LARGEST)
LAYERS = whole(1, 1000)
SIZES, COUNTS, INTEGERS = row(SIZE), row(COUNT), row(INTEGER)
INPLACE = {"inplace": flag}

CONV = {
    "in_channels": SIZE,
    "out_channels": SIZE,
    "kernel_size": SIZES,
    "stride": SIZES,
    "padding": either(COUNTS, among("same", "valid")),
    "dilation": SIZES,
    "groups": SIZE,
    "bias": flag,
    "padding_mode": among("zeros", "reflect", "replicate", "circular"),
}
TRANSPOSED = {**CONV, "padding": COUNTS, "output_padding": COUNTS}
NORM = {
    "num_features": SIZE,
    "eps": number,
    "momentum": maybe(number),
    "affine": flag,
    "track_running_stats": flag,
    "bias": flag,
}
MAX_POOL = {
    "kernel_size": SIZES,
    "stride": maybe(SIZES),
    "padding": COUNTS,
    "dilation": SIZES,
    "return_indices": flag,
    "ceil_mode": flag,
}
AVERAGE_POOL = {
    "kernel_size": SIZES,
    "stride": maybe(SIZES),
    "padding": COUNTS,
    "ceil_mode": flag,
    "count_include_pad": flag,
}
WIDE_AVERAGE_POOL = {**AVERAGE_POOL, "divisor_override": maybe(SIZE)}
POWER_POOL = {
    "norm_type": number,
    "kernel_size": SIZES,
    "stride": maybe(SIZES),
    "ceil_mode": flag,
}
FRACTIONAL = {
    "kernel_size": SIZES,
    "output_size": maybe(SIZES),
    "output_ratio": maybe(row(number)),
    "return_indices": flag,
}
UNPOOL = {"kernel_size": SIZES, "stride": maybe(SIZES), "padding": COUNTS}
ADAPTIVE = {"output_size": maybe(row(maybe(SIZE)))}
ADAPTIVE_MAX = {**ADAPTIVE, "return_indices": flag}
PAD = {"padding": INTEGERS}
FILLED_PAD = {**PAD, "value": number}
RECURRENT = {
    "input_size": SIZE,
    "hidden_size": SIZE,
    "num_layers": LAYERS,
    "bias": flag,
    "batch_first": flag,
    "dropout": number,
    "bidirectional": flag,
}
CELL = {"input_size": SIZE, "hidden_size": SIZE, "bias": flag}
NONLINEARITY = {"nonlinearity": among("tanh", "relu")}
DROP = {"p": number, "inplace": flag}
LINEAR = {"in_features": SIZE, "out_features": SIZE, "bias": flag}
RESPONSE = {"size": SIZE, "alpha": number, "beta": number, "k": number}
WINDOW = {"kernel_size": SIZES, "dilation": SIZES, "padding": COUNTS, "stride": SIZES}
TABLE = {
    "num_embeddings": SIZE,
    "embedding_dim": SIZE,
    "padding_idx": maybe(INTEGER),
    "max_norm": maybe(number),
    "norm_type": number,
    "scale_grad_by_freq": flag,
    "sparse": flag,
}
UPSAMPLED = {"size": maybe(SIZES), "scale_factor": maybe(row(number))}
ATTENTION = {
    "embed_dim": SIZE,
    "num_heads": SIZE,
    "dropout": number,
    "bias": flag,
    "add_bias_kv": flag,
    "add_zero_attn": flag,
    "kdim": SIZE,
    "vdim": SIZE,
    "batch_first": flag,
}

ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "relu": F.relu,
    "torch.relu": torch.relu,
    "gelu": F.gelu,
}
"""The functions that a transformer layer may have between its linear layers."""

# A module in that place is a child, so that the attribute is missing.
ENCODER_LAYER = {"activation": maybe(among(*ACTIVATIONS)), "norm_first": flag}
# PyTorch forgets a decoder's whenever the layer is copied, and takes ReLU.
DECODER_LAYER = {"activation": among(*ACTIVATIONS), "norm_first": flag}
NESTED = {"enable_nested_tensor": flag, "mask_check": flag}


def _encoder_layer(arguments: Arguments, children: Children) -> nn.Module:
    return _layer(nn.TransformerEncoderLayer, arguments, children)


def _decoder_layer(arguments: Arguments, children: Children) -> nn.Module:
    return _layer(nn.TransformerDecoderLayer, arguments, children)


def _layer(kind: Any, arguments: Arguments, children: Children) -> nn.Module:
    # Its sizes are those of its children, which replace the ones that are made here.
    activation = children.get("activation") or ACTIVATIONS[arguments.get("activation") or "relu"]
    made: nn.Module = kind(
        1, 1, 1, activation=activation, norm_first=arguments.get("norm_first", False)
    )
    return made


def _encoder(arguments: Arguments, children: Children) -> nn.Module:
    layers = children["layers"]
    assert isinstance(layers, nn.ModuleList)
    made = nn.TransformerEncoder(layers[0], 0, children.get("norm"), **arguments)  # type: ignore[arg-type]
    made.num_layers = len(layers)
    return made


def _decoder(arguments: Arguments, children: Children) -> nn.Module:
    layers = children["layers"]
    assert isinstance(layers, nn.ModuleList)
    made = nn.TransformerDecoder(layers[0], 0, children.get("norm"))  # type: ignore[arg-type]
    made.num_layers = len(layers)
    return made


def _transformer(arguments: Arguments, children: Children) -> nn.Module:
    return nn.Transformer(
        **arguments, custom_encoder=children["encoder"], custom_decoder=children["decoder"]
    )


CLASSES: dict[str, Known] = {
    known.kind.__name__: known
    for known in (
        Known(nn.Sequential, free=True),
        Known(nn.ModuleList, free=True),
        Known(nn.ModuleDict, free=True),
        Known(nn.Identity),
        Known(nn.Linear, LINEAR),
        Known(NonDynamicallyQuantizableLinear, LINEAR),
        Known(
            nn.Bilinear,
            {"in1_features": SIZE, "in2_features": SIZE, "out_features": SIZE, "bias": flag},
        ),
        Known(nn.Conv1d, CONV),
        Known(nn.Conv2d, CONV),
        Known(nn.Conv3d, CONV),
        Known(nn.ConvTranspose1d, TRANSPOSED),
        Known(nn.ConvTranspose2d, TRANSPOSED),
        Known(nn.ConvTranspose3d, TRANSPOSED),
        Known(nn.BatchNorm1d, NORM),
        Known(nn.BatchNorm2d, NORM),
        Known(nn.BatchNorm3d, NORM),
        Known(nn.SyncBatchNorm, NORM),
        Known(nn.InstanceNorm1d, NORM),
        Known(nn.InstanceNorm2d, NORM),
        Known(nn.InstanceNorm3d, NORM),
        Known(
            nn.GroupNorm,
            {
                "num_groups": SIZE,
                "num_channels": SIZE,
                "eps": number,
                "affine": flag,
                "bias": flag,
            },
        ),
        Known(
            nn.LayerNorm,
            {"normalized_shape": SIZES, "eps": number, "elementwise_affine": flag, "bias": flag},
        ),
        Known(
            nn.RMSNorm,
            {"normalized_shape": SIZES, "eps": maybe(number), "elementwise_affine": flag},
        ),
        Known(nn.LocalResponseNorm, RESPONSE),
        Known(nn.CrossMapLRN2d, RESPONSE),
        Known(nn.ReLU, INPLACE),
        Known(nn.ReLU6, INPLACE),
        Known(nn.SELU, INPLACE),
        Known(nn.SiLU, INPLACE),
        Known(nn.Mish, INPLACE),
        Known(nn.Hardswish, INPLACE),
        Known(nn.Hardsigmoid, INPLACE),
        Known(nn.ELU, {"alpha": number, "inplace": flag}),
        Known(nn.CELU, {"alpha": number, "inplace": flag}),
        Known(nn.LeakyReLU, {"negative_slope": number, "inplace": flag}),
        Known(nn.Hardtanh, {"min_val": number, "max_val": number, "inplace": flag}),
        Known(nn.RReLU, {"lower": number, "upper": number, "inplace": flag}),
        Known(nn.Threshold, {"threshold": number, "value": number, "inplace": flag}),
        Known(nn.PReLU, {"num_parameters": SIZE, "init": number}),
        Known(nn.GELU, {"approximate": among("none", "tanh")}),
        Known(nn.GLU, {"dim": INTEGER}),
        Known(nn.Softplus, {"beta": number, "threshold": number}),
        Known(nn.Softshrink, {"lambd": number}),
        Known(nn.Hardshrink, {"lambd": number}),
        Known(nn.Sigmoid),
        Known(nn.LogSigmoid),
        Known(nn.Tanh),
        Known(nn.Tanhshrink),
        Known(nn.Softsign),
        Known(nn.Softmax, {"dim": maybe(INTEGER)}),
        Known(nn.LogSoftmax, {"dim": maybe(INTEGER)}),
        Known(nn.Softmin, {"dim": maybe(INTEGER)}),
        Known(nn.Softmax2d),
        Known(nn.MaxPool1d, MAX_POOL),
        Known(nn.MaxPool2d, MAX_POOL),
        Known(nn.MaxPool3d, MAX_POOL),
        Known(nn.MaxUnpool1d, UNPOOL),
        Known(nn.MaxUnpool2d, UNPOOL),
        Known(nn.MaxUnpool3d, UNPOOL),
        Known(nn.AvgPool1d, AVERAGE_POOL),
        Known(nn.AvgPool2d, WIDE_AVERAGE_POOL),
        Known(nn.AvgPool3d, WIDE_AVERAGE_POOL),
        Known(nn.LPPool1d, POWER_POOL),
        Known(nn.LPPool2d, POWER_POOL),
        Known(nn.LPPool3d, POWER_POOL),
        Known(nn.FractionalMaxPool2d, FRACTIONAL),
        Known(nn.FractionalMaxPool3d, FRACTIONAL),
        Known(nn.AdaptiveAvgPool1d, ADAPTIVE),
        Known(nn.AdaptiveAvgPool2d, ADAPTIVE),
        Known(nn.AdaptiveAvgPool3d, ADAPTIVE),
        Known(nn.AdaptiveMaxPool1d, ADAPTIVE_MAX),
        Known(nn.AdaptiveMaxPool2d, ADAPTIVE_MAX),
        Known(nn.AdaptiveMaxPool3d, ADAPTIVE_MAX),
        Known(nn.ConstantPad1d, FILLED_PAD),
        Known(nn.ConstantPad2d, FILLED_PAD),
        Known(nn.ConstantPad3d, FILLED_PAD),
        Known(nn.ZeroPad1d, PAD),
        Known(nn.ZeroPad2d, PAD),
        Known(nn.ZeroPad3d, PAD),
        Known(nn.ReflectionPad1d, PAD),
        Known(nn.ReflectionPad2d, PAD),
        Known(nn.ReflectionPad3d, PAD),
        Known(nn.ReplicationPad1d, PAD),
        Known(nn.ReplicationPad2d, PAD),
        Known(nn.ReplicationPad3d, PAD),
        Known(nn.CircularPad1d, PAD),
        Known(nn.CircularPad2d, PAD),
        Known(nn.CircularPad3d, PAD),
        Known(nn.Dropout, DROP),
        Known(nn.Dropout1d, DROP),
        Known(nn.Dropout2d, DROP),
        Known(nn.Dropout3d, DROP),
        Known(nn.AlphaDropout, DROP),
        Known(nn.FeatureAlphaDropout, DROP),
        Known(nn.Embedding, TABLE),
        Known(
            nn.EmbeddingBag,
            {**TABLE, "mode": among("sum", "mean", "max"), "include_last_offset": flag},
        ),
        Known(nn.RNN, {**RECURRENT, **NONLINEARITY}),
        Known(nn.GRU, RECURRENT),
        Known(nn.LSTM, {**RECURRENT, "proj_size": COUNT}),
        Known(nn.RNNCell, {**CELL, **NONLINEARITY}),
        Known(nn.GRUCell, CELL),
        Known(nn.LSTMCell, CELL),
        Known(nn.MultiheadAttention, ATTENTION, {"bias": "in_proj_bias", "add_bias_kv": "bias_k"}),
        Known(nn.TransformerEncoderLayer, ENCODER_LAYER, make=_encoder_layer),
        Known(nn.TransformerDecoderLayer, DECODER_LAYER, make=_decoder_layer),
        Known(nn.TransformerEncoder, NESTED, make=_encoder),
        Known(nn.TransformerDecoder, make=_decoder),
        Known(
            nn.Transformer,
            {"d_model": SIZE, "nhead": SIZE, "batch_first": flag},
            make=_transformer,
        ),
        Known(nn.Flatten, {"start_dim": INTEGER, "end_dim": INTEGER}),
        Known(nn.Unflatten, {"dim": INTEGER, "unflattened_size": row(whole(-1))}),
        Known(nn.Fold, {"output_size": SIZES, **WINDOW}),
        Known(nn.Unfold, WINDOW),
        Known(
            nn.Upsample,
            {
                **UPSAMPLED,
                "mode": among("nearest", "linear", "bilinear", "bicubic", "trilinear"),
                "align_corners": maybe(flag),
                "recompute_scale_factor": maybe(flag),
            },
        ),
        Known(nn.UpsamplingNearest2d, UPSAMPLED),
        Known(nn.UpsamplingBilinear2d, UPSAMPLED),
        Known(nn.PixelShuffle, {"upscale_factor": SIZE}),
        Known(nn.PixelUnshuffle, {"downscale_factor": SIZE}),
        Known(nn.ChannelShuffle, {"groups": SIZE}),
        Known(nn.CosineSimilarity, {"dim": INTEGER, "eps": number}),
        Known(nn.PairwiseDistance, {"p": number, "eps": number, "keepdim": flag}, {"p": "norm"}),
    )
}
"""By their names. Losses are no part of a model; lazy layers have no weights yet."""
