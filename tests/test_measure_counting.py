"""Parameters and multiply-accumulates, against numbers worked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor import zoo
from compressor.measure.counting import macs, params


class First(nn.Module):
    """The first output of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)[0]


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


# Two sequences of 7 steps; 5 inputs, 6 hidden. Each gate is one product of each with the hidden.
STEPS, GATE = 2 * 7, 6 * (5 + 6)
# Two sequences of 5 steps of width 8: four projections, scores and their product with the values.
ATTENTION = 2 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8)

BY_HAND = [
    ("linear", nn.Linear(5, 7), (3, 5), 3 * 5 * 7),
    ("convolution", nn.Conv2d(4, 8, 3), (1, 4, 9, 9), 7 * 7 * 8 * 4 * 9),
    ("stride and padding", nn.Conv2d(4, 8, 3, 2, 1), (2, 4, 9, 9), 2 * 5 * 5 * 8 * 4 * 9),
    ("groups", nn.Conv2d(4, 8, 3, groups=2), (1, 4, 9, 9), 7 * 7 * 8 * 2 * 9),
    ("depthwise", nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 6, 6), 6 * 6 * 8 * 9),
    ("one dimension", nn.Conv1d(4, 6, 3), (1, 4, 8), 6 * 6 * 4 * 3),
    ("transposed", nn.ConvTranspose2d(4, 6, 2, 2), (1, 4, 3, 3), 3 * 3 * 4 * 6 * 4),
    ("lstm", First(nn.LSTM(5, 6, batch_first=True)), (2, 7, 5), STEPS * 4 * GATE),
    ("gru", First(nn.GRU(5, 6, batch_first=True)), (2, 7, 5), STEPS * 3 * GATE),
    (
        "two layers, both ways",
        First(nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True)),
        (2, 7, 5),
        STEPS * 2 * 4 * (GATE + 6 * (12 + 6)),
    ),
    ("attention", Attention(8, 2, batch_first=True), (2, 5, 8), ATTENTION),
    (
        "encoder layer",
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (2, 5, 8),
        ATTENTION + 2 * 5 * 2 * 8 * 16,
    ),
    ("no product", nn.Sequential(nn.ReLU(), nn.Flatten()), (2, 5, 8), 0),
]


@pytest.mark.parametrize(
    ("model", "shape", "count"), [case[1:] for case in BY_HAND], ids=[case[0] for case in BY_HAND]
)
def test_macs_worked_by_hand(model: nn.Module, shape: tuple[int, ...], count: int) -> None:
    assert macs(model, (np.zeros(shape, dtype=np.float32),)) == count


def test_macs_of_a_subclass_are_those_of_its_class() -> None:
    class Named(nn.Conv2d):
        pass

    x = (np.zeros((1, 4, 9, 9), dtype=np.float32),)
    assert macs(Named(4, 8, 3), x) == macs(nn.Conv2d(4, 8, 3), x)


def test_counting_leaves_torch_as_it_was() -> None:
    fast = torch.backends.mha.get_fastpath_enabled()
    model = nn.Linear(2, 2)
    macs(model, (np.zeros((1, 2), dtype=np.float32),))
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.backends.mkldnn.enabled
    assert torch.is_grad_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert not model.training
    with pytest.raises(RuntimeError):
        macs(model, (np.zeros((1, 3), dtype=np.float32),))
    assert torch.backends.mha.get_fastpath_enabled() == fast, "also after an error"


def test_params_worked_by_hand() -> None:
    assert params(nn.Linear(5, 7)) == 5 * 7 + 7
    assert params(nn.Conv2d(4, 8, 3, groups=2, bias=False)) == 8 * 2 * 9
    assert params(nn.LSTM(5, 6)) == 4 * (GATE + 2 * 6)
    assert params(nn.BatchNorm2d(8)) == 16, "running statistics are no parameters"


def test_tied_parameters_count_once() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert params(tied) == 4 * 4 + 4 + 4


SHAPES = {
    "digits": (1, 8, 8),
    "digits?size=16": (1, 16, 16),
    "digits?size=32": (1, 32, 32),
    "digits-rows": (8, 8),
    "digits-masks": (1, 8, 8),
    "breast-cancer": (30,),
}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_zoo_model_is_counted_in_proportion_to_its_batch(name: str) -> None:
    shape = SHAPES[zoo.MODELS[name].data]
    model = zoo.build(name, zoo.arguments_for(name, shape, 10))
    one, three = (macs(model, (np.zeros((n, *shape), dtype=np.float32),)) for n in (1, 3))
    assert one > 0
    assert three == 3 * one
    assert params(model) > 0
