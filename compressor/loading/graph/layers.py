"""From an operator that reads parameters to the layer of PyTorch that owns them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from compressor.loading.graph.functions import Ref

Shape = tuple[int, ...]


class Call(NamedTuple):
    """An operator's arguments by their names, and the shapes of the values among them."""

    arguments: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    overload: str

    def get(self, name: str, usual: Any = None) -> Any:
        """An argument, ``usual`` where the program leaves it out."""
        return self.arguments.get(name, usual)

    def shape(self, name: str) -> Shape:
        """The shape of the value or weight that is an argument, as it was at export."""
        value = self.arguments[name]
        return self.shapes[value.name]

    def row(self, name: str, usual: Any, count: int) -> list[int]:
        """A list of ``count`` numbers, which the program may shorten to one."""
        value = self.get(name, usual)
        found = list(value) if isinstance(value, list) else [value]
        return found * count if len(found) == 1 else found


class Layer(NamedTuple):
    """A layer that stands for a call.

    ``tensors`` are its own names of the weights it takes over, ``inputs`` what it is called with,
    ``picks`` where in its result each output of the call lies.
    """

    kind: str
    arguments: dict[str, Any]
    tensors: dict[str, Ref]
    inputs: list[Any]
    picks: tuple[tuple[int, ...], ...] = ((),)


def _weights(**tensors: Any) -> dict[str, Ref]:
    return {name: value for name, value in tensors.items() if value is not None}


def _linear(call: Call) -> Layer:
    outputs, inputs = call.shape("weight")
    arguments = {
        "in_features": inputs,
        "out_features": outputs,
        "bias": call.get("bias") is not None,
    }
    return Layer("Linear", arguments, _owned(call), [call.get("input")])


def _owned(call: Call) -> dict[str, Ref]:
    return _weights(weight=call.get("weight"), bias=call.get("bias"))


def _conv(call: Call) -> Layer:
    weight = call.shape("weight")
    count, groups = len(weight) - 2, call.get("groups", 1)
    transposed = call.get("transposed", False)
    padding = call.get("padding", 0)
    arguments = {
        "in_channels": weight[0] if transposed else weight[1] * groups,
        "out_channels": weight[1] * groups if transposed else weight[0],
        "kernel_size": list(weight[2:]),
        "stride": call.row("stride", 1, count),
        "padding": padding if type(padding) is str else call.row("padding", 0, count),
        "dilation": call.row("dilation", 1, count),
        "groups": groups,
        "bias": call.get("bias") is not None,
    }
    if transposed:
        arguments["output_padding"] = call.row("output_padding", 0, count)
    kind = f"Conv{'Transpose' if transposed else ''}{count}d"
    return Layer(kind, arguments, _owned(call), [call.get("input")])


def _transposed(call: Call) -> Layer:
    return _conv(call._replace(arguments={**call.arguments, "transposed": True}))


AXES = {2: "1d", 3: "1d", 4: "2d", 5: "3d"}
"""Axes of what a normalisation reads, and the end of its name."""


def _batch_norm(call: Call) -> Layer | None:
    tracked = call.get("running_mean") is not None
    if bool(call.get("training", False)) is tracked:
        return None
    return _norm("BatchNorm", call, tracked, call.get("momentum", 0.1))


def _instance_norm(call: Call) -> Layer | None:
    tracked = call.get("running_mean") is not None
    if bool(call.get("use_input_stats", True)) is tracked:
        return None
    return _norm("InstanceNorm", call, tracked, call.get("momentum", 0.1))


def _norm(name: str, call: Call, tracked: bool, momentum: float) -> Layer | None:
    affine = call.get("weight") is not None
    if affine is not (call.get("bias") is not None):
        return None
    shape = call.shape("input")
    arguments = {
        "num_features": shape[1],
        "eps": call.get("eps", 1e-5),
        "momentum": momentum,
        "affine": affine,
        "track_running_stats": tracked,
    }
    tensors = _owned(call) | _weights(
        running_mean=call.get("running_mean"), running_var=call.get("running_var")
    )
    return Layer(f"{name}{AXES[len(shape)]}", arguments, tensors, [call.get("input")])


def _layer_norm(call: Call) -> Layer | None:
    affine, bias = call.get("weight") is not None, call.get("bias") is not None
    if bias and not affine:
        return None
    arguments = {
        "normalized_shape": call.get("normalized_shape"),
        "eps": call.get("eps", 1e-5),
        "elementwise_affine": affine,
        "bias": bias,
    }
    return Layer("LayerNorm", arguments, _owned(call), [call.get("input")])


def _rms_norm(call: Call) -> Layer:
    arguments = {
        "normalized_shape": call.get("normalized_shape"),
        "eps": call.get("eps"),
        "elementwise_affine": call.get("weight") is not None,
    }
    return Layer("RMSNorm", arguments, _owned(call), [call.get("input")])


def _group_norm(call: Call) -> Layer | None:
    affine = call.get("weight") is not None
    if affine is not (call.get("bias") is not None):
        return None
    arguments = {
        "num_groups": call.get("num_groups", call.get("group")),
        "num_channels": call.shape("input")[1],
        "eps": call.get("eps", 1e-5),
        "affine": affine,
    }
    return Layer("GroupNorm", arguments, _owned(call), [call.get("input")])


def _prelu(call: Call) -> Layer:
    (count,) = call.shape("weight")
    return Layer("PReLU", {"num_parameters": count}, _owned(call), [call.get("self")])


def _embedding(call: Call) -> Layer:
    rows, width = call.shape("weight")
    padding = call.get("padding_idx", -1)
    arguments = {
        "num_embeddings": rows,
        "embedding_dim": width,
        "padding_idx": None if padding < 0 else padding,
    }
    return Layer("Embedding", arguments, _owned(call), [call.get("indices")])


def _bilinear(call: Call) -> Layer:
    outputs, first, second = call.shape("weight")
    arguments = {
        "in1_features": first,
        "in2_features": second,
        "out_features": outputs,
        "bias": call.get("bias") is not None,
    }
    given = [call.get("input1"), call.get("input2")]
    return Layer("Bilinear", arguments, _owned(call), given)


def _recurrent(kind: str, nonlinearity: str | None = None) -> Callable[[Call], Layer | None]:
    def make(call: Call) -> Layer | None:
        if call.overload != "input" or call.get("train"):
            return None
        bias, two = call.get("has_biases"), call.get("bidirectional")
        weights, layers = call.get("params"), call.get("num_layers")
        per = len(weights) // (layers * (2 if two else 1))
        names = ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if bias else ())]
        projected = per == len(names) + 1
        names += ["weight_hr"] * projected
        ends = [f"_l{at}{back}" for at in range(layers) for back in ("", "_reverse")[: 1 + two]]
        rows, width = call.shapes[weights[1].name]
        hidden = rows // {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
        arguments = {
            "input_size": call.shapes[weights[0].name][1],
            "hidden_size": hidden,
            "num_layers": layers,
            "bias": bias,
            "batch_first": call.get("batch_first"),
            "dropout": call.get("dropout"),
            "bidirectional": two,
            **({"proj_size": width} if projected else {}),
            **({"nonlinearity": nonlinearity} if nonlinearity else {}),
        }
        tensors = dict(zip([name + end for end in ends for name in names], weights, strict=True))
        states = call.get("hx")
        given = [call.get("input"), tuple(states) if kind == "LSTM" else states]
        picks = ((0,), (1, 0), (1, 1)) if kind == "LSTM" else ((0,), (1,))
        return Layer(kind, arguments, tensors, given, picks)

    return make


LAYERS: dict[str, Callable[[Call], Layer | None]] = {
    "linear": _linear,
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "conv_transpose1d": _transposed,
    "conv_transpose2d": _transposed,
    "conv_transpose3d": _transposed,
    "convolution": _conv,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "native_layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "native_group_norm": _group_norm,
    "rms_norm": _rms_norm,
    "prelu": _prelu,
    "embedding": _embedding,
    "bilinear": _bilinear,
    "lstm": _recurrent("LSTM"),
    "gru": _recurrent("GRU"),
    "rnn_tanh": _recurrent("RNN", "tanh"),
    "rnn_relu": _recurrent("RNN", "relu"),
}
"""``None`` where no layer computes the same: then the operator stays one that reads weights."""

DROPOUTS = {"dropout": "Dropout", "feature_dropout": "Dropout2d", "alpha_dropout": "AlphaDropout"}
"""Switched off in an export; as layers they are back when the model is trained again."""
