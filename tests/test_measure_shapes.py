"""Layer shapes: found in models, counted as torch counts, and the same after JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor import zoo
from compressor.measure.counting import macs
from compressor.measure.shapes import Layer, layers_of

few = st.integers(1, 4)
examples = settings(max_examples=25)


class First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)[0]


class Cross(nn.Module):
    """Attends from the input to its own first half, with the arguments by name."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        half = x[:, : x.shape[1] // 2 + 1]
        return self.attention(query=x, key=half, value=half, need_weights=False)[0]


class Itself(nn.MultiheadAttention):
    """A subclass with one argument."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def total(model: nn.Module, *shape: int) -> int:
    found = layers_of(model, (np.zeros((1, *shape), dtype=np.float32),))
    return sum(layer.macs() for calls in found.values() for layer in calls)


def counted(model: nn.Module, *shape: int) -> int:
    return macs(model, (np.zeros((1, *shape), dtype=np.float32),))


CONVOLUTIONS: dict[tuple[bool, int], Any] = {
    (False, 1): nn.Conv1d,
    (False, 2): nn.Conv2d,
    (False, 3): nn.Conv3d,
    (True, 1): nn.ConvTranspose1d,
    (True, 2): nn.ConvTranspose2d,
    (True, 3): nn.ConvTranspose3d,
}


@examples
@given(st.data(), st.integers(1, 3), st.booleans())
def test_convolutions_count_as_torch_counts(
    data: st.DataObject, axes: int, transposed: bool
) -> None:
    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(axes))

    groups, kernel, dilation = data.draw(few), draw(1, 3), draw(1, 2)
    # A convolution whose padding is a word picks its own, also uneven where the kernel is even.
    same = not transposed and data.draw(st.booleans())
    model = CONVOLUTIONS[transposed, axes](
        groups * data.draw(few),
        groups * data.draw(few),
        kernel,
        stride=1 if same else draw(1, 3),
        padding="same" if same else draw(0, 1),
        dilation=dilation,
        groups=groups,
    )
    shape = (model.in_channels, *draw(5, 9))
    assert total(model, *shape) == counted(model, *shape)


@examples
@given(few, few, st.lists(few, max_size=2))
def test_linear_layers_count_as_torch_counts(inputs: int, outputs: int, between: list[int]) -> None:
    model = nn.Linear(inputs, outputs)
    assert total(model, *between, inputs) == counted(model, *between, inputs)


@examples
@given(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]), few, few, few, st.integers(1, 2), st.booleans())
def test_recurrent_layers_count_as_torch_counts(
    kind: Any, steps: int, inputs: int, hidden: int, layers: int, both: bool
) -> None:
    model = First(kind(inputs, hidden, layers, batch_first=True, bidirectional=both))
    assert total(model, steps, inputs) == counted(model, steps, inputs)


def test_projections_of_an_lstm_are_counted() -> None:
    """Two layers of 5 units that hand on 2, four gates, 6 steps; worked by hand."""
    model = First(nn.LSTM(3, 5, 2, batch_first=True, proj_size=2))
    gates = 4 * 5 * (3 + 2) + 4 * 5 * (2 + 2)
    assert total(model, 6, 3) == 6 * (gates + 2 * 2 * 5)


ATTENTION: dict[str, Callable[[int, int], nn.Module]] = {
    "cross": Cross,
    "itself": lambda width, heads: Itself(width, heads, batch_first=True),
    "encoder": lambda width, heads: nn.TransformerEncoderLayer(width, heads, 5, batch_first=True),
}


@examples
@given(few, few, st.integers(1, 7), st.sampled_from(list(ATTENTION)))
def test_attention_counts_as_torch_counts(heads: int, each: int, steps: int, kind: str) -> None:
    model = ATTENTION[kind](heads * each, heads)
    assert total(model, steps, heads * each) == counted(model, steps, heads * each)


SHAPES = {
    "digits": (1, 8, 8),
    "digits?size=16": (1, 16, 16),
    "digits?size=32": (1, 32, 32),
    "digits-rows": (8, 8),
    "digits-masks": (1, 8, 8),
    "breast-cancer": (30,),
}


@pytest.mark.parametrize("name", [n for n, entry in zoo.MODELS.items() if not entry.slow])
def test_layers_of_the_zoo_add_up_to_all_of_its_products(name: str) -> None:
    shape = SHAPES[zoo.MODELS[name].data]
    model = zoo.build(name, zoo.arguments_for(name, shape, 10))
    # The ViT's own code calls scaled_dot_product_attention: the part that is not seen.
    unseen = counted(model, *shape) - total(model, *shape)
    assert unseen > 0 if name == "vit" else unseen == 0


def test_every_call_of_a_shared_layer_is_there_and_a_subclass_is_found() -> None:
    class Named(nn.Conv2d):
        pass

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Named(3, 3, 3, groups=3)
            self.unused = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            return self.conv(self.conv(x)).relu()

    found = layers_of(Twice(), (np.zeros((4, 3, 9, 8), dtype=np.float32),))
    first = Layer("conv", 3, 3, (9, 8), (3, 3), (1, 1), (0,) * 4, (1, 1), groups=3)
    second = Layer("conv", 3, 3, (7, 6), (3, 3), (1, 1), (0,) * 4, (1, 1), groups=3)
    assert found == {"conv": [first, second]}


def test_an_axis_folded_into_the_batch_is_counted_in_copies() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 3)
            self.rnn = nn.GRU(4, 5)

        def forward(self, x: Tensor) -> Any:
            frames = self.conv(x.flatten(0, 1))
            return self.rnn(frames.permute(1, 0, 2))[0]

    model = Frames()
    found = layers_of(model, (np.zeros((1, 7, 2, 6), dtype=np.float32),))
    assert [calls[0].copies for calls in found.values()] == [7, 7]
    assert [calls[0].rows for calls in found.values()] == [1, 3]
    assert total(model, 7, 2, 6) == counted(model, 7, 2, 6)


def test_looking_leaves_the_model_and_torch_as_they_were() -> None:
    fast = torch.backends.mha.get_fastpath_enabled()
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        layers_of(model, (np.zeros((1, 3), dtype=np.float32),))
    assert not model._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled() == fast


numbers = st.integers(1, 64)
tuples = st.lists(st.integers(0, 9), max_size=3).map(tuple)
layers = st.builds(
    Layer,
    st.sampled_from(["conv", "deconv", "linear", "lstm", "gru", "rnn", "attention"]),
    numbers,
    numbers,
    tuples,
    tuples,
    tuples,
    tuples,
    tuples,
    *[numbers] * 6,
)


@given(layers)
def test_a_layer_survives_json(layer: Layer) -> None:
    again = Layer.from_json(json.loads(json.dumps(layer.to_json())))
    assert again == layer
    assert hash(again) == hash(layer)
    assert "\n" not in str(layer)


@given(layers, numbers, numbers, numbers)
def test_resizing_changes_widths_alone(
    layer: Layer, inputs: int, outputs: int, groups: int
) -> None:
    other = layer.resized(inputs, outputs, groups)
    assert (other.inputs, other.outputs, other.groups) == (inputs, outputs, groups)
    assert other.resized(layer.inputs, layer.outputs, layer.groups) == layer
    assert layer.resized() == layer


def test_a_layer_says_its_shape_in_one_line() -> None:
    layer = Layer("conv", 3, 8, (9, 9), (3, 3), (1, 1), (1,) * 4, (1, 1))
    assert str(layer) == (
        "conv inputs 3, outputs 8, size 9x9, kernel 3x3, stride 1x1, padding 1x1x1x1, dilation 1x1"
    )
    assert str(Layer("linear", 3, 8)) == "linear inputs 3, outputs 8"
