"""A model as a list of layer shapes: all that decides how long its heavy layers take."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.task import Inputs

Op = Literal["conv", "deconv", "linear", "lstm", "gru", "rnn", "attention"]

GATES: dict[str, int] = {"lstm": 4, "gru": 3, "rnn": 1}
"""Products of input and hidden state in one step of a recurrent cell."""


@dataclass(frozen=True)
class Layer:
    """The shape of one call of a layer on one example.

    ``inputs`` and ``outputs`` are channels or features; ``outputs`` is the hidden size of a
    recurrent layer. What the other fields hold depends on ``op``:

    - ``conv``, ``deconv``: ``size`` is the spatial size of the input; ``kernel``, ``stride``,
      ``dilation`` have one entry for each spatial axis, ``padding`` two as in ONNX: all begins,
      then all ends.
    - ``linear``: ``rows`` is the product of all axes between batch and features.
    - ``lstm``, ``gru``, ``rnn``: ``rows`` steps, ``layers``, ``directions`` (1 or 2), and the size
      of the ``projection`` (0: none).
    - ``attention``: the two products of attention without its projections. ``inputs`` is the
      width of queries and keys over all heads, ``outputs`` that of the values, ``groups`` the
      heads, ``rows`` the queries and ``size`` the number of keys.

    ``copies`` is how often one example of the model is an example of the layer, where the model
    folds another axis (windows, frames) into the batch.
    """

    op: Op
    inputs: int
    outputs: int
    size: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    rows: int = 1
    layers: int = 1
    directions: int = 1
    projection: int = 0
    copies: int = 1

    def __str__(self) -> str:
        said = {key: value for key, value in self.to_json().items() if key != "op"}
        usual = asdict(Layer(self.op, 0, 0))
        return f"{self.op} " + ", ".join(
            f"{key} {'x'.join(map(str, value)) if isinstance(value, list) else value}"
            for key, value in said.items()
            if value and value != usual[key]
        )

    def macs(self) -> int:
        """Multiply-accumulates per example, as :func:`compressor.measure.counting.macs` counts."""
        match self.op:
            case "conv":
                once = math.prod(self.positions()) * self._weights()
            case "deconv":
                once = math.prod(self.size) * self._weights()
            case "linear":
                once = self.rows * self.inputs * self.outputs
            case "attention":
                once = self.rows * self.size[0] * (self.inputs + self.outputs)
            case "lstm" | "gru" | "rnn":
                state = self.projection or self.outputs
                features = [self.inputs, *[self.directions * state] * (self.layers - 1)]
                gates = sum(GATES[self.op] * self.outputs * (given + state) for given in features)
                projected = self.layers * self.projection * self.outputs
                once = self.rows * self.directions * (gates + projected)
        return self.copies * once

    def _weights(self) -> int:
        return self.inputs * self.outputs // self.groups * math.prod(self.kernel)

    def positions(self) -> Iterator[int]:
        """Spatial size of a convolution's output."""
        axes = len(self.size)
        for axis, size in enumerate(self.size):
            padded = size + self.padding[axis] + self.padding[axes + axis]
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            yield (padded - reach) // self.stride[axis] + 1

    def resized(
        self, inputs: int | None = None, outputs: int | None = None, groups: int | None = None
    ) -> Layer:
        """This layer with other widths; what is not given stays."""
        return replace(
            self,
            inputs=self.inputs if inputs is None else inputs,
            outputs=self.outputs if outputs is None else outputs,
            groups=self.groups if groups is None else groups,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; tuples as lists."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Layer:
        """The layer that :meth:`to_json` described; ``TypeError`` for other fields."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in record.items()
        }
        return cls(**fields)


def layers_of(model: nn.Module, examples: Inputs) -> dict[str, list[Layer]]:
    """Name of each heavy module -> the shape of each of its calls, for one example.

    Runs the first of ``examples``, arrays of shape ``(n, ...)``, and leaves ``model`` in evaluation
    mode. Convolutions, ``nn.Linear``, recurrent layers and their subclasses are found, and
    ``nn.MultiheadAttention`` as four linear layers (queries, keys, values, output) and the product
    of attention. Products that a module's own code computes (``scaled_dot_product_attention``,
    ``matmul``) are not seen: they are part of what the sum of the layers leaves unexplained.
    """
    found: dict[str, list[Layer]] = {}

    def note(
        name: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        found.setdefault(name, []).extend(
            _padded(layer, output) for layer in _layers(module, given, named)
        )

    with ExitStack() as stack:
        stack.enter_context(_slow_path())
        for name, module in model.named_modules():
            if isinstance(module, _HEAVY):
                hook = module.register_forward_hook(partial(note, name), with_kwargs=True)
                stack.callback(hook.remove)
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # of the user's model, again
        stack.enter_context(torch.no_grad())
        model.eval()(*(torch.from_numpy(array[:1]) for array in examples))
    return found


@contextmanager
def _slow_path() -> Iterator[None]:
    """The fast path of ``TransformerEncoderLayer`` calls none of its modules."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DECONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_HEAVY = (*_CONVS, *_DECONVS, nn.Linear, nn.LSTM, nn.GRU, nn.RNN, nn.MultiheadAttention)


def _layers(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> list[Layer]:
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module, *(_argument(given, named, at) for at in range(3)))
    x: Tensor = given[0] if given else named["input"]
    match module:
        case nn.Linear():
            rows = x.numel() // module.in_features
            return [Layer("linear", module.in_features, module.out_features, rows=rows)]
        case nn.RNNBase():
            return [_recurrent(module, x)]
        case _:
            assert isinstance(module, (*_CONVS, *_DECONVS))
            return [_convolution(module, x)]


def _padded(layer: Layer, output: Any) -> Layer:
    """A convolution that pads its input in its own code, with the padding that its output shows."""
    if layer.op != "conv":
        return layer
    axes = len(layer.size)
    shown = tuple(output.shape[-axes:])
    if tuple(layer.positions()) == shown:
        return layer
    padding = [
        max(0, (count - 1) * stride + dilation * (kernel - 1) + 1 - size)
        for count, stride, dilation, kernel, size in zip(
            shown, layer.stride, layer.dilation, layer.kernel, layer.size, strict=True
        )
    ]
    begins = tuple(whole // 2 for whole in padding)
    ends = tuple(whole - begin for whole, begin in zip(padding, begins, strict=True))
    return replace(layer, padding=(*begins, *ends))


def _convolution(module: Any, x: Tensor) -> Layer:
    axes = len(module.kernel_size)
    twice = module._reversed_padding_repeated_twice  # the last axis first, begin and end of each
    begins, ends = twice[::2][::-1], twice[1::2][::-1]
    return Layer(
        "deconv" if isinstance(module, _DECONVS) else "conv",
        module.in_channels,
        module.out_channels,
        size=tuple(x.shape[-axes:]),
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=(*begins, *ends),
        dilation=tuple(module.dilation),
        groups=module.groups,
        copies=x.shape[0] if x.dim() == axes + 2 else 1,
    )


def _recurrent(module: nn.RNNBase, x: Tensor) -> Layer:
    ops: dict[type[nn.RNNBase], Op] = {nn.LSTM: "lstm", nn.GRU: "gru", nn.RNN: "rnn"}
    steps, copies = _sequence(module.batch_first, x)
    return Layer(
        next(op for kind, op in ops.items() if isinstance(module, kind)),
        module.input_size,
        module.hidden_size,
        rows=steps,
        layers=module.num_layers,
        directions=2 if module.bidirectional else 1,
        projection=module.proj_size,
        copies=copies,
    )


def _argument(given: tuple[Any, ...], named: dict[str, Any], at: int) -> Tensor:
    """Query, key or value; a subclass that attends to its one argument is given no others."""
    name = ("query", "key", "value")[at]
    found: Tensor = given[at] if at < len(given) else named[name] if name in named else given[0]
    return found


def _attention(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> list[Layer]:
    queries, copies = _sequence(module.batch_first, query)
    keys, _ = _sequence(module.batch_first, key)
    width = module.embed_dim
    attended = keys + (module.bias_k is not None) + module.add_zero_attn
    return [
        Layer("linear", width, width, rows=copies * queries),
        Layer("linear", key.shape[-1], width, rows=copies * keys),
        Layer("linear", value.shape[-1], width, rows=copies * keys),
        Layer(
            "attention",
            width,
            width,
            size=(attended,),
            groups=module.num_heads,
            rows=queries,
            copies=copies,
        ),
        Layer("linear", width, width, rows=copies * queries),
    ]


def _sequence(batch_first: bool, x: Tensor) -> tuple[int, int]:
    """Steps and sequences of ``x``."""
    if x.dim() == 2:
        return x.shape[0], 1
    return (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
