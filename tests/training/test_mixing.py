"""Mixup and cutmix: what comes back is what ``share`` and ``partner`` say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compressor.data.embedded import digits
from compressor.errors import InputError
from compressor.training.mixing import fits, mix

ALPHAS = st.sampled_from((0.0, 0.2, 1.0, 8.0))


def flat(count: int, *shape: int) -> Tensor:
    """Example ``i`` is ``i + 1`` everywhere."""
    return (torch.arange(count, dtype=torch.float32) + 1).reshape(-1, *[1] * len(shape)) + (
        torch.zeros(count, *shape)
    )


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 9),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    mixup=ALPHAS,
    cutmix=ALPHAS,
    dtype=st.sampled_from((torch.float32, torch.float64, torch.float16)),
)
def test_every_example_holds_its_share_of_itself_and_the_rest_of_its_partner(
    seed: int,
    count: int,
    shape: tuple[int, int, int],
    mixup: float,
    cutmix: float,
    dtype: torch.dtype,
) -> None:
    inputs = (flat(count, *shape).to(dtype), flat(count, 5))
    before = [part.clone() for part in inputs]
    torch.manual_seed(seed)
    mixed, partner, share = mix(inputs, mixup, cutmix)

    assert all(map(torch.equal, inputs, before))
    assert 0 <= share <= 1
    assert partner.dtype == torch.int64
    assert partner.sort().values.tolist() == list(range(count))
    exact = 0.02 if dtype == torch.float16 else 1e-5
    for part, found in zip(inputs, mixed, strict=True):
        assert (found.shape, found.dtype) == (part.shape, part.dtype)
        own, other = part.double().flatten(1).mean(1), part.double().flatten(1).mean(1)[partner]
        wanted = share * own + (1 - share) * other
        torch.testing.assert_close(found.double().flatten(1).mean(1), wanted, rtol=exact, atol=0)


@given(seed=st.integers(0, 10**6), alpha=st.sampled_from((0.3, 1.0)))
def test_mixup_blends_every_value_alike(seed: int, alpha: float) -> None:
    pictures = digits(0).splits.train.head(16)[0][0]
    inputs = (torch.from_numpy(pictures), torch.randn(16, 3))
    torch.manual_seed(seed)
    mixed, partner, share = mix(inputs, alpha, 0)
    for part, found in zip(inputs, mixed, strict=True):
        assert torch.equal(found, share * part + (1 - share) * part[partner])


@given(seed=st.integers(0, 10**6))
def test_cutmix_exchanges_one_rectangle(seed: int) -> None:
    torch.manual_seed(seed)
    pictures = torch.randn(6, 2, 7, 10)
    (mixed,), partner, share = mix((pictures,), 0, 1)
    moved = partner != torch.arange(6)
    if not moved.any():
        return
    changed = (mixed != pictures)[moved].flatten(0, 1)
    assert (changed == changed[0]).all()
    rows, columns = changed[0].any(1), changed[0].any(0)
    assert torch.equal(changed[0], rows[:, None] & columns[None, :])
    for line in (rows, columns):
        assert len(torch.unique_consecutive(line)) <= 3
        assert (line.diff() != 0).sum() <= 2
    assert share == pytest.approx(1 - changed[0].float().mean().item(), abs=1e-6)
    assert torch.equal(mixed.where(changed[0], 0), pictures[partner].where(changed[0], 0))


@pytest.mark.parametrize("alpha", [0.1, 1.0, 4.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    torch.manual_seed(0)
    part = (torch.zeros(2, 1),)
    shares = torch.tensor([mix(part, alpha, 0)[2] for _ in range(2000)])
    # Mean and variance of Beta(alpha, alpha).
    assert shares.mean().item() == pytest.approx(0.5, abs=0.04)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_both_on_means_one_or_the_other_with_equal_chance() -> None:
    torch.manual_seed(0)
    pictures = torch.rand(8, 1, 6, 6)
    cut = 0
    for _ in range(600):
        (mixed,), partner, share = mix((pictures,), 1, 1)
        if torch.equal(mixed, share * pictures + (1 - share) * pictures[partner]):
            continue
        assert ((mixed == pictures) | (mixed == pictures[partner])).all()
        cut += 1
    assert 240 < cut < 360


def test_off_changes_and_draws_nothing() -> None:
    inputs = (torch.rand(3, 4),)
    state = torch.get_rng_state()
    mixed, partner, share = mix(inputs, 0, 0)
    assert torch.equal(mixed[0], inputs[0])
    assert (partner.tolist(), share) == ([0, 1, 2], 1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_restored_generator_goes_on_where_it_was_saved() -> None:
    pictures = (torch.rand(8, 1, 6, 6),)
    torch.manual_seed(3)
    for _ in range(4):
        mix(pictures, 1, 1)
    state = torch.get_rng_state()
    first = [mix(pictures, 1, 1) for _ in range(6)]
    torch.set_rng_state(state)
    for before, after in zip(first, [mix(pictures, 1, 1) for _ in range(6)], strict=True):
        assert torch.equal(before[0][0], after[0][0])
        assert torch.equal(before[1], after[1])
        assert before[2] == after[2]


@pytest.mark.parametrize(
    ("inputs", "mixup", "cutmix", "said"),
    [
        ((torch.zeros(2, 4, dtype=torch.int64),), 0.2, 0, "mixup 0.2: an input is int64"),
        ((torch.rand(2, 3), torch.ones(2, 4).bool()), 1, 0, "mixup 1: an input is bool"),
        ((torch.zeros(2, 1, 4, 4).byte(),), 0, 1, "cutmix 1: an input is uint8"),
        ((torch.rand(2, 30),), 0, 1, r"cutmix 1: the first input has shape \(2, 30\)"),
        ((torch.rand(2, 3), torch.rand(2, 1, 4, 4)), 0.5, 0.5, "cutmix 0.5: the first input"),
    ],
)
def test_what_cannot_be_mixed_is_refused_in_one_line(
    inputs: tuple[Tensor, ...], mixup: float, cutmix: float, said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        fits(inputs, mixup, cutmix)
    assert "\n" not in str(caught.value)
    assert "leave" in str(caught.value)
    fits(inputs, 0, 0)


def test_what_can_be_mixed_is_let_pass() -> None:
    fits((torch.rand(2, 1, 4, 4), torch.rand(2, 5)), 0.2, 1)
    fits((torch.rand(2, 5),), 0.2, 0)
