"""The average of weights is its formula, and wearing it leaves nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compressor.training.average import Average


def model() -> nn.Module:
    torch.manual_seed(0)
    tied = nn.Linear(3, 3)
    return nn.ModuleList([tied, nn.BatchNorm1d(3), tied, nn.Linear(3, 2).half()])


def shift(one: nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in one.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=random))
            else:
                tensor.add_(seed)


@given(decay=st.floats(0.01, 0.999), seeds=st.lists(st.integers(1, 10**6), min_size=1, max_size=30))
def test_the_average_is_its_formula(decay: float, seeds: list[int]) -> None:
    one = model()
    average = Average(one, decay)
    wanted = {name: value.double().numpy() for name, value in one.state_dict().items()}
    for at, seed in enumerate(seeds):
        shift(one, seed)
        average.update()
        rate = min(decay, (1 + at) / (10 + at))
        for name, value in one.state_dict().items():
            own = value.double().numpy()
            floats = value.is_floating_point()
            wanted[name] = rate * wanted[name] + (1 - rate) * own if floats else own
    assert average.updates == len(seeds)
    for name, value in average.state.items():
        assert value.dtype == one.state_dict()[name].dtype
        exact = 2e-2 if value.dtype == torch.float16 else 1e-5
        np.testing.assert_allclose(value.double().numpy(), wanted[name], rtol=0, atol=exact)


@given(seeds=st.lists(st.integers(1, 10**6), min_size=1, max_size=5), fails=st.booleans())
def test_what_is_worn_is_taken_off_again(seeds: list[int], fails: bool) -> None:
    one = model()
    average = Average(one, 0.9)
    for seed in seeds:
        shift(one, seed)
        average.update()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    addresses = [value.data_ptr() for value in one.state_dict().values()]
    kept = {name: value.clone() for name, value in average.state.items()}
    try:
        with average.worn():
            for name, value in one.state_dict().items():
                assert torch.equal(value, average.state[name])
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    for name, value in one.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(average.state[name], kept[name])
    assert [value.data_ptr() for value in one.state_dict().values()] == addresses


@given(seeds=st.lists(st.integers(1, 10**6), min_size=2, max_size=12), at=st.integers(0, 11))
def test_a_restored_average_goes_on(seeds: list[int], at: int) -> None:
    one = model()
    average, other = Average(one, 0.99), Average(one, 0.99)
    for done, seed in enumerate(seeds):
        if done == min(at, len(seeds) - 1):
            other = Average(model(), 0.99)
            other.restore(average.state, average.updates)
            other = _moved(other, one, average)
        shift(one, seed)
        average.update()
        if done >= min(at, len(seeds) - 1):
            other.update()
    assert other.updates == average.updates
    for name, value in average.state.items():
        assert torch.equal(value, other.state[name])


def _moved(restored: Average, one: nn.Module, average: Average) -> Average:
    """An average of ``one`` that was restored from what another process would have kept."""
    fresh = Average(one, 0.99)
    fresh.restore({name: value.clone() for name, value in restored.state.items()}, average.updates)
    return fresh


def test_an_average_follows_the_model_that_it_was_made_of() -> None:
    one = nn.Linear(2, 2)
    average = Average(one, 0.5)
    first = average.state["weight"].clone()
    with torch.no_grad():
        one.weight.add_(1)
    assert torch.equal(average.state["weight"], first)
    average.update()  # a tenth of the old is kept in the first update
    torch.testing.assert_close(average.state["weight"], first + 0.9)
    assert one.weight.grad is None
    assert average.state["weight"].requires_grad is False


def test_weights_that_need_a_gradient_are_averaged_without_one() -> None:
    one = nn.Linear(2, 2)
    average = Average(one, 0.5)
    one(torch.ones(1, 2)).sum().backward()
    with torch.enable_grad():
        average.update()
        with average.worn():
            pass
    assert one.weight.is_leaf
    assert one.weight.grad is not None
    assert average.state["weight"].grad_fn is None


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_no_decay_is_the_model_itself(decay: float) -> None:
    one = nn.Linear(2, 2)
    average = Average(one, decay)
    for seed in range(1, 4):
        shift(one, seed)
        average.update()
    if decay == 0:
        assert torch.equal(average.state["weight"], one.weight)
    else:  # the slow start bounds it
        assert not torch.equal(average.state["weight"], one.weight)
