"""Fake quantization computes what its export will, and a file brings it back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.errors import InputError
from compressor.loading import torchfile
from compressor.loading.edits import apply
from compressor.loading.fakequant import (
    SMALLEST,
    Following,
    Grids,
    freeze,
    survey,
)


class Residual(nn.Module):
    """Everything that is followed: a shortcut, in-place ReLU, pooling, views, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.left = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.right = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(12 * 16, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.stem(x), inplace=True)
        y = self.right(nn.functional.relu6(self.left(x)))
        y += x
        y = torch.cat([y, x], 1)
        logits: Tensor = self.head(self.drop(nn.functional.max_pool2d(y, 2)).flatten(1))
        return logits


X = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Residual().eval()


def grids(model: nn.Module) -> Grids:
    return model.__dict__["quantization"]  # type: ignore[no-any-return]


def frozen(model: nn.Module, *inputs: Tensor) -> Any:
    """What the export computes, run here."""
    own = grids(model)
    return Following(own.put, own.constants).outputs(own.forward, *inputs)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), bits=st.sampled_from([7, 8]))
def test_training_and_export_compute_the_same(seed: int, bits: int) -> None:
    """The operators multiply by a reciprocal: a value on the border may go to the other side."""
    model = residual(seed)
    survey(model, [(X,)], bits)
    with torch.no_grad():
        trained, evaluated = model.train()(X), model.eval()(X)
        exported = frozen(model, X)
    assert torch.equal(trained, evaluated)  # no dropout, no statistics
    apart = (exported - evaluated).abs().amax(1)
    assert apart.median() < 1e-5
    assert apart.max() < 0.1 * evaluated.abs().max()


@settings(max_examples=50)
@given(st.floats(-5, 0), st.floats(0.01, 5), st.integers(0, 255))
def test_a_grid_holds_zero_and_keeps_what_is_on_it(low: float, high: float, step: int) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    survey(model, [(torch.tensor([[low, high]]),)], 8)
    at = grids(model).at
    with torch.no_grad():
        scale, zero = grids(model).log_scale[0].exp(), int(grids(model).zero_point[0])
        assert at(0, torch.zeros(1)) == 0
        on = torch.tensor([(step - zero) * scale])
        assert torch.equal(at(0, on), on)
        between = torch.linspace(low, high, 99)
        assert ((at(0, between) - between).abs() <= scale * 0.51 + (high - low) / 255).all()


def test_weights_are_on_the_grid_of_their_channel() -> None:
    model = residual()
    survey(model, [(X,)], 8)
    weight = model.get_parameter("left.weight")
    taken = grids(model).weights(1, weight, None, 1)
    assert taken is not None
    scale = weight.detach().flatten(1).abs().amax(1) / 127
    steps = taken[0].detach() / scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert (taken[0] - weight).abs().max() <= scale.max() / 2 * 1.001
    assert model.get_buffer("quantization_weight_1").dtype == torch.int8
    assert model.get_buffer("quantization_weight_1").abs().max() == 127


def test_a_bias_beside_dead_weights_fits_32_bits() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()
        model.get_parameter("0.bias").copy_(torch.tensor([3.0, 0.0]))
    x = torch.randn(4, 2)
    survey(model, [(x,)], 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.tensor([[3.0, 0.0]]).repeat(4, 1))
        torch.testing.assert_close(frozen(model, x), model(x))


def test_a_point_that_saw_zeros_only() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    survey(model, [(torch.zeros(3, 2),)], 8)
    assert grids(model).log_scale[0].exp().item() == pytest.approx(SMALLEST)
    assert model(torch.zeros(1, 2)).isfinite().all()


def test_gradients_reach_weights_biases_and_scales() -> None:
    model = residual()
    survey(model, [(X,)], 8)
    model(X).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0, name


def test_a_tensor_with_two_readers_has_one_point() -> None:
    edit = survey(residual(), [(X,)], 8)
    # input, relu (read by left, add and cat), relu6, right, the sum, the joined
    assert edit["points"] == 6
    assert [layer["point"] for layer in edit["layers"]] == [0, 1, 2, 5]
    assert [layer["bias"] for layer in edit["layers"]] == [
        "stem.bias",
        None,
        "right.bias",
        "head.bias",
    ]


def test_names_stay_and_two_are_added() -> None:
    model = residual()
    before = set(model.state_dict())
    survey(model, [(X,)], 8)
    added = {"quantization_log_scale", "quantization_zero_point"}
    assert set(model.state_dict()) == before | added


def test_a_file_brings_it_back_bit_for_bit(tmp_path: Path) -> None:
    model = residual()
    edit = survey(model, [(X,)], 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    path = tmp_path / "m.safetensors"
    torchfile.write(path, model, {"factory": "live:tests", "arguments": {}}, [edit])
    sketched = residual().to("meta")
    for build in (lambda *_: residual(1), lambda *_: sketched):
        again, _ = torchfile.rebuild(path, build)
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)
        freeze(model)
        with torch.no_grad():
            assert torch.equal(again(X), model(X))
            assert torch.equal(frozen(again, X), frozen(model, X))


def test_a_copy_is_its_own() -> None:
    model = residual()
    survey(model, [(X,)], 8)
    wanted = model(X)
    other = copy.deepcopy(model)
    assert torch.equal(other(X), wanted)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(X), wanted)


def test_an_earlier_rewrite_stays() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.view(-1, 32))  # type: ignore[no-any-return]

    model = Viewing()
    apply(model, [{"edit": "rewrite", "module": "", "as": "flatten", "size": 32}])
    wanted = model(X)
    survey(model, [(X,)], 8)
    assert (model(X) - wanted).abs().max() < 0.1


class Calls(nn.Module):
    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.how = nn.Conv1d(8, 8, 1), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.fc, x[:, 0])


def in_place(fc: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = fc(x)
    y.relu_()  # a ReLU of its own would be lost
    return fc(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda fc, x: x + 1, "no convolution and no linear layer"),
        (lambda fc, x: fc(fc(x) if x.mean() > 0 else x), "not make the same calls"),
        (in_place, "in place"),
        (lambda fc, x: fc(x / 0), "NaN or infinite"),
        (lambda fc, x: fc(fc(x)) if fc.training else fc(x), "other calls in training"),
    ],
)
def test_what_cannot_be_followed(forward: Callable[..., Tensor], why: str) -> None:
    model = Calls(forward).eval()
    with pytest.raises(ValueError, match=why):
        survey(model, [(X.abs(),), (-X.abs(),)], 8)


def test_a_weight_that_is_computed_stays_float() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.utils.parametrizations.weight_norm(model[0])
    edit = survey(model, [(torch.randn(8, 4),)], 8)
    assert edit["layers"][0] is None
    assert edit["layers"][1]["weight"] == "2.weight"


LAYER = {"weight": "stem.weight", "bias": "stem.bias", "point": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"points": 0},
        {"points": 2.0},
        {"points": True},
        {"bits": 4},
        {"bits": "8"},
        {"layers": 3},
        {"layers": [3]},
        {"layers": [{**LAYER, "point": 6}]},
        {"layers": [{**LAYER, "point": -1}]},
        {"layers": [{**LAYER, "weight": "absent"}]},
        {"layers": [{**LAYER, "bias": "forward"}]},
        {"layers": [{**LAYER, "more": 1}]},
        {"layers": [{"weight": "stem.weight"}]},
    ],
    ids=str,
)
def test_an_edit_that_does_not_fit_is_one_line(change: dict[str, Any]) -> None:
    edit = {"edit": "fake_quantize", "points": 6, "bits": 8, "layers": [LAYER], **change}
    with pytest.raises(InputError, match="an edit in the file does not fit its model") as caught:
        apply(residual(), [edit])
    assert "\n" not in str(caught.value)


def test_it_is_installed_once() -> None:
    model = residual()
    edit = survey(model, [(X,)], 8)
    with pytest.raises(InputError, match="has 'quantization' already"):
        apply(model, [edit])
