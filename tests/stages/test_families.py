"""The test zoo of pruning is what it says: sizes worked by hand, layers by name, any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES
from torch import nn

from compressor.loading.task import tensors
from compressor.measure import counting
from compressor.stages.prune.rounding import kept

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_sizes_worked_by_hand(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    examples = tuple(x.synthetic(1, 0) for x in family.inputs)
    assert counting.params(model) == family.params
    assert counting.macs(model, examples) == family.macs


@every_family
def test_any_batch_gives_finite_outputs(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    assert not model.training
    examples = [x.synthetic(7, seed) for seed, x in enumerate(family.inputs)]
    with torch.inference_mode():
        whole = tensors(model(*map(torch.from_numpy, examples)))
        for size in (1, 2, 7):
            part = tensors(model(*(torch.from_numpy(x[:size]) for x in examples)))
            assert len(part) == len(whole) > 0
            for ours, all_seven in zip(part, whole, strict=True):
                assert torch.isfinite(ours).all()
                torch.testing.assert_close(ours, all_seven[:size], rtol=1e-4, atol=1e-5)
    assert all(each.std() > 0 for each in whole), "a flat output would hide a wrong cut"


@every_family
def test_outputs_have_gradients(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    examples = (torch.from_numpy(x.synthetic(2, 0)) for x in family.inputs)
    torch.stack([each.square().sum() for each in tensors(model(*examples))]).sum().backward()  # type: ignore[no-untyped-call]
    seen = [each.grad for each in model.parameters() if each.grad is not None]
    assert seen
    assert all(torch.isfinite(each).all() for each in seen)


@every_family
def test_the_same_weights_at_every_build(name: str) -> None:
    first, second = FAMILIES[name].build().state_dict(), FAMILIES[name].build().state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_building_does_not_touch_the_callers_randomness() -> None:
    before = torch.random.get_rng_state()
    FAMILIES["bert"].build()
    assert torch.equal(torch.random.get_rng_state(), before)


@every_family
def test_layers_that_are_cut_or_left_are_there(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    assert family.cut
    assert family.left
    assert not {*family.cut} & {*family.left}
    for layer in (*family.cut, *family.left):
        assert list(model.get_submodule(layer).parameters()), f"{layer} makes nothing"


@every_family
def test_both_ratios_remove_something_of_every_layer_to_cut(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    for layer in family.cut:
        width = units(model.get_submodule(layer))
        assert kept(width, 0.5) < kept(width, 0.3) < width


def units(layer: nn.Module) -> int:
    """Channels, hidden units or heads that the layer makes."""
    names = ("out_channels", "out_features", "hidden_size", "num_heads", "embedding_dim")
    return next(int(getattr(layer, name)) for name in names if hasattr(layer, name))


def test_vectors_differ_between_channels() -> None:
    """Equal biases or scales would hide a cut that takes them from the wrong place."""
    for name, family in FAMILIES.items():
        for key, parameter in family.build().named_parameters():
            if parameter.ndim == 1 and len(parameter) > 1:
                assert len(np.unique(parameter.detach())) == len(parameter), (name, key)
