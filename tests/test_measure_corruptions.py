"""Corruptions and attacks: how far they go, where they stop, and what they are worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from compressor import data
from compressor.measure.corruptions import (
    ATTACKS,
    CORRUPTIONS,
    EPS,
    PART,
    Pictures,
    Scale,
    blur,
    brightness,
    contrast,
    corrupted,
    fgsm,
    noise,
    pgd,
    pixelate,
    unsuited,
)
from compressor.task import Array

SEVERITIES = range(1, 6)
seeds = st.integers(0, 2**32 - 1)
pictures = st.builds(
    lambda seed, count, channels, high, wide: (
        np.random.default_rng(seed).random((count, channels, high, wide)).astype(np.float32)
    ),
    seeds,
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(2, 40),
    st.integers(2, 40),
)


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def distance(before: Array, after: Array) -> float:
    return float(np.linalg.norm((after - before).astype(np.float64)))


# --- each corruption against its formula ---


@given(pictures, st.sampled_from(SEVERITIES))
@settings(max_examples=30)
def test_noise_brightness_and_contrast(images: Array, severity: int) -> None:
    at, drawn = severity - 1, rng().standard_normal(images.shape, dtype=np.float32)
    deviation = [0.08, 0.12, 0.18, 0.26, 0.38][at]
    assert noise(images, severity, rng()) == pytest.approx(
        np.minimum(np.maximum(images + deviation * drawn, 0), 1), abs=1e-6
    )
    lighter = np.minimum(images + [0.1, 0.2, 0.3, 0.4, 0.5][at], 1)
    assert brightness(images, severity, rng()) == pytest.approx(lighter, abs=1e-6)
    share = [0.4, 0.3, 0.2, 0.1, 0.05][at]
    for image, seen in zip(images, contrast(images, severity, rng()), strict=True):
        for before, after in zip(image, seen, strict=True):
            assert after == pytest.approx(share * before + (1 - share) * before.mean(), abs=1e-5)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("size", [(8, 8), (32, 20), (64, 96)])
def test_blur_is_scipys(size: tuple[int, int], severity: int) -> None:
    images = np.random.default_rng(1).random((2, 3, *size)).astype(np.float32)
    deviation = [0.4, 0.6, 0.7, 0.8, 1.0][severity - 1] * max(1, min(size) / 32)
    wanted = gaussian_filter(
        images.astype(np.float64),
        (0, 0, deviation, deviation),
        mode="reflect",
        radius=(0, 0, math.ceil(4 * deviation), math.ceil(4 * deviation)),
    )
    assert blur(images, severity, rng()) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(("severity", "small"), [(2, 10), (5, 5)])
def test_pixelate_is_pillows_where_blocks_are_whole(severity: int, small: int) -> None:
    image = np.random.default_rng(1).random((20, 20)).astype(np.float32)
    wanted = Image.fromarray(image).resize((small, small), Image.Resampling.BOX)
    wanted = wanted.resize((20, 20), Image.Resampling.BOX)
    found = pixelate(image[None, None], severity, rng())
    assert found[0, 0] == pytest.approx(np.asarray(wanted), abs=1e-6)


@given(pictures, st.sampled_from(SEVERITIES))
@settings(max_examples=30)
def test_pixelate_twice_is_once(images: Array, severity: int) -> None:
    once = pixelate(images, severity, rng())
    assert pixelate(once, severity, rng()) == pytest.approx(once, abs=1e-5)
    assert once.mean(axis=(2, 3)) == pytest.approx(images.mean(axis=(2, 3)), abs=1e-5)
    for side, values in zip(images.shape[2:], (once[0, 0, :, 0], once[0, 0, 0]), strict=True):
        share = [0.6, 0.5, 0.4, 0.3, 0.25][severity - 1]
        jumps = np.abs(np.diff(values)) > 1e-5
        assert jumps.sum() < max(1, int(side * share))


# --- what holds for all ---


@given(pictures, seeds)
@settings(max_examples=30)
def test_more_severe_is_farther(images: Array, seed: int) -> None:
    for name in ("noise", "blur", "contrast", "brightness"):
        far = [distance(images, corrupted((images,), name, one, seed)[0]) for one in SEVERITIES]
        assert all(b >= a * (1 - 1e-4) for a, b in pairwise(far)), (name, far)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_more_severe_is_farther_for_digits(name: str) -> None:
    (images,), _ = data.read("digits?size=24").splits.test.head(100)
    far = [distance(images, corrupted((images,), name, one, 0)[0]) for one in SEVERITIES]
    assert far == sorted(far)
    assert 0 < far[0] < 0.7 * far[-1]


@given(pictures, st.sampled_from(list(CORRUPTIONS)), st.sampled_from(SEVERITIES), seeds)
@settings(max_examples=60)
def test_a_channel_keeps_its_range_in_any_unit(
    images: Array, name: str, severity: int, seed: int
) -> None:
    channels = images.shape[1]
    drawn = np.random.default_rng(seed)
    factor = drawn.uniform(0.1, 300, (channels, 1, 1)).astype(np.float32)
    offset = drawn.uniform(-3, 3, (channels, 1, 1)).astype(np.float32)
    plain = corrupted((images,), name, severity, seed)[0]
    given_ = images * factor + offset
    kept = given_.copy()
    moved = corrupted((given_,), name, severity, seed)[0]
    assert (moved.dtype, moved.shape) == (images.dtype, images.shape)
    assert (given_ == kept).all()
    low, high = Scale.of(given_)
    assert ((moved >= low) & (moved <= high)).all()
    assert (moved - offset) / factor == pytest.approx(plain, abs=2e-3)


def test_no_rounding_leads_out_of_the_range() -> None:
    images = (100 * np.random.default_rng(0).standard_normal((1, 2000, 2, 2))).astype(np.float32)
    low, high = Scale.of(images)
    moved = corrupted((images,), "brightness", 5, 0)[0]
    assert (moved <= high).all()
    assert moved.max(axis=(2, 3), keepdims=True) == pytest.approx(high[None], rel=1e-5)
    assert (corrupted((images,), "noise", 5, 0)[0] >= low).all()


def test_a_flat_channel_stays() -> None:
    images = np.random.default_rng(0).random((3, 2, 8, 8)).astype(np.float32)
    images[:, 1] = 7.0
    for name in CORRUPTIONS:
        moved = corrupted((images,), name, 5, 0)[0]
        assert (moved[:, 1] == 7.0).all()
        assert (moved[:, 0] != images[:, 0]).any()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_says_all(name: str) -> None:
    images = np.random.default_rng(0).random((PART + 3, 1, 8, 8)).astype(np.float32)
    first, again, other = (corrupted((images,), name, 3, seed)[0] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first == other).all() == (name != "noise")


def test_no_two_pictures_get_the_same_noise() -> None:
    images = np.full((3 * PART, 1, 4, 4), 0.5, np.float32)
    images[0, 0, 0, :2] = 0, 1  # the channel's range
    moved = corrupted((images,), "noise", 1, 0)[0][1:] - 0.5
    assert len(np.unique(moved.reshape(len(moved), -1), axis=0)) == len(moved)
    assert moved.std() == pytest.approx(0.08, rel=0.05)


# --- what is no picture ---


@given(seeds, st.sampled_from([(5,), (4, 3), (2, 6, 1)]))
@settings(max_examples=30)
def test_tables_and_sequences_get_noise_by_their_deviation(
    seed: int, shape: tuple[int, ...]
) -> None:
    drawn = np.random.default_rng(seed)
    values = drawn.standard_normal((200, *shape)) * drawn.uniform(0.1, 100, shape)
    values[:, 0] = 3.0
    values = values.astype(np.float32)
    one, five = (corrupted((values,), "noise", severity, seed)[0] for severity in (1, 5))
    assert one.dtype == np.float32
    assert (one[:, 0] == 3.0).all()
    spread = values[:, 1:].std(axis=0)
    unit = (one[:, 1:] - values[:, 1:]) / (0.08 * spread)
    assert unit.std() == pytest.approx(1, abs=0.15)
    assert (five[:, 1:] - values[:, 1:]) / (0.38 * spread) == pytest.approx(unit, abs=1e-3)
    assert unsuited((values,), "noise") is None
    for name in {*CORRUPTIONS, *ATTACKS} - {"noise"}:
        assert unsuited((values,), name) == "its inputs are no pictures"


def test_whole_numbers_are_left_alone() -> None:
    tokens = np.arange(12).reshape(3, 4)
    for name in (*CORRUPTIONS, *ATTACKS):
        assert "whole numbers" in (unsuited((tokens,), name) or "")
    with pytest.raises(ValueError, match="noise: its inputs are whole numbers"):
        corrupted((tokens,), "noise", 1, 0)
    images = np.random.default_rng(0).random((3, 1, 8, 8)).astype(np.float32)
    table = np.random.default_rng(1).random((3, 4)).astype(np.float32)
    blurred = corrupted((tokens, images, table), "blur", 5, 0)
    noisy = corrupted((tokens, images, table), "noise", 5, 0)
    assert blurred[0] is noisy[0] is tokens
    assert blurred[2] is table
    assert all((one != old).any() for one, old in zip(noisy[1:], (images, table), strict=True))
    assert (blurred[1] != images).any()


# --- attacks ---


def linear(seed: int, weights: Tensor) -> tuple[Pictures, Tensor]:
    drawn = np.random.default_rng(seed)
    images = drawn.uniform(-3, 5, (6, *weights.shape)).astype(np.float32)
    return (torch.from_numpy(images),), torch.from_numpy(drawn.integers(0, 2, 6).astype(np.float32))


@given(seeds, st.floats(0.001, 0.5))
@settings(max_examples=30)
def test_of_a_linear_model_the_worst_is_a_corner(seed: int, eps: float) -> None:
    weights = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 3, 4))).float()
    images, targets = linear(seed, weights)

    def loss(given: Pictures) -> Tensor:
        logits = (given[0] * weights).sum(dim=(1, 2, 3)) / 50
        return F.binary_cross_entropy_with_logits(logits, targets)

    scale = Scale.of(images[0].numpy())
    span = torch.from_numpy(scale.high - scale.low)
    away = (1 - 2 * targets)[:, None, None, None] * weights.sign()
    corner = (images[0] + eps * span * away).numpy().clip(scale.low, scale.high)
    for attack in (fgsm, pgd):
        (moved,) = attack(loss, images, [scale], 3, eps=eps)
        assert moved.numpy() == pytest.approx(corner, abs=1e-5)
        assert loss((moved,)) >= loss(images)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5)
    ).eval()


@given(st.integers(0, 2**31), st.sampled_from([EPS, 0.1]))
@settings(max_examples=20)
def test_an_attack_stays_in_its_ball_and_raises_the_loss(seed: int, eps: float) -> None:
    model, drawn = network(seed), np.random.default_rng(seed)
    images = drawn.normal(0.5, 2, (16, 2, 8, 8)).astype(np.float32)
    images[:, 1] *= 40
    labels = torch.from_numpy(drawn.integers(0, 5, 16))
    scale, before = Scale.of(images), torch.from_numpy(images)

    def loss(given: Pictures) -> Tensor:
        return F.cross_entropy(model(given[0]), labels)

    found = {}
    for name in ATTACKS:
        attack = {"fgsm": fgsm, "pgd": pgd}[name]  # with their own eps
        with torch.no_grad():
            (moved,) = attack(loss, (before,), [scale], seed, eps=eps)
        again, other = (attack(loss, (before,), [scale], seed + k, eps=eps)[0] for k in (0, 1))
        assert torch.equal(moved, again)
        assert torch.equal(moved, other) == (name == "fgsm")
        reach = np.abs(scale.unit(moved.numpy()) - scale.unit(images)).max()
        assert 0.5 * eps < reach <= eps * (1 + 1e-4)
        assert ((moved.numpy() >= scale.low) & (moved.numpy() <= scale.high)).all()
        found[name] = loss((moved,)).item()
    clean = loss((before,)).item()
    assert found["pgd"] >= clean
    assert found["pgd"] >= found["fgsm"] * 0.98
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_start_is_drawn_from_the_whole_ball() -> None:
    images = (torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)),)
    scale = Scale.of(images[0].numpy())
    (moved,) = pgd(lambda given: 0 * given[0].sum(), images, [scale], 0)
    apart = (moved - images[0]) / EPS
    assert apart.abs().max() <= 1.01
    assert apart.std() == pytest.approx(1 / math.sqrt(3), abs=0.08)  # uniform between -1 and 1


@pytest.mark.parametrize("attack", ATTACKS)
def test_without_a_gradient_there_is_no_attack(attack: str) -> None:
    images = (torch.rand(2, 1, 4, 4),)
    weight = torch.ones(1, requires_grad=True)
    losses: list[Callable[[Pictures], Tensor]] = [
        lambda given: given[0].detach().sum(),
        lambda given: (weight * given[0].detach()).sum(),
    ]
    for loss in losses:
        with pytest.raises(ValueError, match="has no gradient with respect to the pictures"):
            ATTACKS[attack](loss, images, [Scale.of(images[0].numpy())], 0)


def test_pictures_that_a_model_does_not_look_at_are_not_climbed() -> None:
    images = (torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4))
    scales = [Scale.of(image.numpy()) for image in images]
    seen, unseen = fgsm(lambda given: given[0].sum(), images, scales, 0)
    assert torch.equal(unseen, images[1])
    assert not torch.equal(seen, images[0])
