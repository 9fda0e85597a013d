"""Augmentation: shapes, ranges, draws, each operation against PIL, and what users get told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import kornia
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from compressor.data.embedded import digits
from compressor.errors import InputError
from compressor.task import Split
from compressor.training import augment
from compressor.training.augment import (
    AUGMENTATIONS,
    AUGMIX,
    OPERATIONS,
    RANDAUGMENT,
    augmentation,
    checked,
    span,
)

NAMES = tuple(AUGMENTATIONS)


def shots(count: int = 16, channels: int = 3, side: int = 12, seed: int = 0) -> Tensor:
    """Made-up 8-bit pictures in [0, 1] that hold black and white in every channel."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (count, channels, side, side), generator=generator)
    levels[..., 0, 0], levels[..., -1, -1] = 0, 255
    return levels / 255


def built(
    *specs: str, like: Tensor, low: float = 0.0, high: float = 1.0, **functions: Callable[..., Any]
) -> Callable[[Tensor], Tensor]:
    bounds = (torch.full((like.shape[1],), value) for value in (low, high))
    own = {f"mine:{name}": function for name, function in functions.items()}
    return augmentation(specs, like, *bounds, own)


def seeded(change: Callable[[Tensor], Tensor], batch: Tensor, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return change(batch)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_come_back_as_pictures_at_every_strength(name: str, channels: int) -> None:
    known = AUGMENTATIONS[name]
    batch = shots(channels=channels)
    before = batch.clone()
    highest = 11 if name == "crop" else known.high
    for strength in (known.low, known.default, highest):
        found = seeded(built(f"{name}={strength:g}", like=batch), batch)
        assert (found.shape, found.dtype) == (batch.shape, batch.dtype)
        assert found.isfinite().all()
        assert torch.equal(batch, before)
        if name != "noise":
            assert found.min() >= -1e-6
            assert found.max() <= 1 + 1e-6
    assert not torch.equal(found, batch)


@settings(max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    shape=st.tuples(
        st.integers(1, 5), st.sampled_from((1, 2, 3, 5)), st.integers(5, 9), st.integers(5, 9)
    ),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16)),
    seed=st.integers(0, 10**6),
)
def test_any_channels_and_float_dtypes_are_kept(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    batch = (torch.randn(shape) * 3).to(dtype)
    if AUGMENTATIONS[name].sees and shape[1] not in (1, 3):
        with pytest.raises(InputError, match=rf"{name}.*1 or 3 channels"):
            built(name, like=batch)
        return
    found = built(name, like=batch, low=-5, high=4)(batch)
    assert (found.shape, found.dtype) == (batch.shape, batch.dtype)
    assert found.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_normalised_pictures_are_augmented_as_the_pictures_themselves(name: str) -> None:
    batch = shots()
    shift, size = torch.tensor([-2.0, 0.5, 7.0]), torch.tensor([4.0, 0.25, 3.0])
    there = [value.view(1, 3, 1, 1) for value in (shift, size)]
    normalised = batch * there[1] + there[0]
    plain = seeded(built(name, like=batch), batch)
    change = augmentation((name,), normalised, shift, shift + size, {})
    found = seeded(change, normalised)
    torch.testing.assert_close((found - there[0]) / there[1], plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_repeats_and_a_restored_state_goes_on(name: str) -> None:
    batch = shots(6)
    change = built(name, like=batch)
    torch.manual_seed(5)
    change(batch)
    state = torch.get_rng_state()
    rest = [change(batch) for _ in range(3)]
    assert not torch.equal(rest[0], rest[1])

    torch.set_rng_state(state)
    again = built(name, like=batch)  # nothing of the old function is needed
    assert all(torch.equal(again(batch), part) for part in rest)


@pytest.mark.parametrize("name", NAMES)
def test_each_example_has_its_own_draw(name: str) -> None:
    same = shots(1).expand(32, -1, -1, -1)
    found = seeded(built(name, like=same), same)
    distinct = {tuple(one.flatten().tolist()) for one in found}
    assert len(distinct) >= (2 if name == "flip" else 6)


def test_flips_mirror_half_of_the_examples_and_leave_the_others() -> None:
    batch = shots(400, 1, 4)
    found = seeded(built("flip", like=batch), batch)
    mirrored = (found - batch.flip(-1)).abs().amax((1, 2, 3)) < 1e-6
    kept = (found - batch).abs().amax((1, 2, 3)) < 1e-6
    assert (mirrored ^ kept).all()
    assert 160 < mirrored.sum() < 240
    assert torch.equal(built("flip=0", like=batch)(batch), batch)
    assert torch.equal(built("flip=1", like=batch)(batch), batch.flip(-1))


def test_crops_are_shifts_by_up_to_the_padding_with_background_behind() -> None:
    batch = shots(1, 2, 5).expand(500, -1, -1, -1) * 6 - 4
    found = seeded(built("crop=1", like=batch, low=-4, high=2), batch)
    padded = torch.full((2, 7, 7), -4.0)
    padded[:, 1:6, 1:6] = batch[0]
    seen = set()
    for one in found:
        fits = [
            (row, column)
            for row in range(3)
            for column in range(3)
            if torch.allclose(one, padded[:, row : row + 5, column : column + 5], atol=1e-5)
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 9


def test_rotations_turn_about_the_centre_and_leave_background() -> None:
    batch = torch.full((64, 1, 9, 9), 3.0)
    found = seeded(built("rotate=60", like=batch, low=-2, high=3), batch)
    torch.testing.assert_close(found[:, :, 4, 4], batch[:, :, 4, 4])
    assert (found >= -2.00001).all()
    assert (found[:, 0, 0, 0] < -1.9).any()
    still = built("rotate=0", like=batch, low=-2, high=3)(batch)
    torch.testing.assert_close(still, batch)


def test_rotation_angles_are_uniform_to_both_sides() -> None:
    # A bar to the right of the centre: its centre of mass tells the angle.
    batch = torch.zeros(400, 1, 41, 41)
    batch[:, :, 20, 30:36] = 1
    found = seeded(built("rotate=40", like=batch), batch)[:, 0]
    at = torch.arange(41) - 20.0
    down, right = (found.sum(2) * at).sum(1), (found.sum(1) * at).sum(1)
    angles = torch.rad2deg(torch.atan2(down, right))
    assert 38 < angles.abs().max() < 41
    assert angles.mean().abs() < 4
    assert angles.std().item() == pytest.approx(80 / 12**0.5, rel=0.1)


def test_noise_has_the_deviation_asked_for_in_units_of_the_range() -> None:
    batch = torch.zeros(40, 2, 30, 30)
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 10.0])
    found = seeded(augmentation(("noise=0.1",), batch, low, high, {}), batch)
    assert found[:, 0].std().item() == pytest.approx(0.2, rel=0.02)
    assert found[:, 1].std().item() == pytest.approx(1.0, rel=0.02)
    assert found.mean().abs() < 0.02


def test_erasing_fills_a_rectangle_with_background() -> None:
    batch = torch.full((600, 3, 20, 20), 2.0)
    found = seeded(built("erase=0.5", like=batch, low=-1, high=2), batch)
    gone = found < 0
    assert torch.equal(found, torch.where(gone, -1.0, 2.0))
    assert (gone == gone[:, :1]).all()
    gone = gone[:, 0]
    rows, columns = gone.any(2), gone.any(1)
    assert torch.equal(gone, rows[:, :, None] & columns[:, None, :])
    assert 240 < gone.flatten(1).any(1).sum() < 360
    areas = gone.float().mean((1, 2))[gone.flatten(1).any(1)]
    assert 0.01 < areas.min() < 0.06
    assert 0.25 < areas.max() < 0.36


@pytest.mark.parametrize("channels", [1, 3])
def test_color_changes_brightness_contrast_and_saturation_within_its_strength(
    channels: int,
) -> None:
    batch = shots(300, channels) * 0.2 + 0.4  # far from black and white: nothing is clipped
    found = seeded(built("color=0.2", like=batch), batch)
    weights = torch.tensor([0.299, 0.587, 0.114] if channels == 3 else [1.0]).view(-1, 1, 1)
    grey, before = ((part * weights).sum(1) for part in (found, batch))
    # Brightness alone moves the mean of the grey picture, saturation alone leaves it as it is.
    brightness = grey.mean((1, 2)) / before.mean((1, 2))
    contrast = grey.std((1, 2)) / before.std((1, 2)) / brightness
    factors = [brightness, contrast]
    if channels == 3:
        hue, hued = found - grey[:, None], batch - before[:, None]
        factors.append(hue.std((1, 2, 3)) / hued.std((1, 2, 3)) / brightness / contrast)
    for factor in factors:
        assert (factor - 1).abs().max() < 0.2 + 1e-4
        assert factor.std().item() == pytest.approx(0.4 / 12**0.5, rel=0.1)
    scale = (brightness * contrast).view(-1, 1, 1)
    line = scale * (before - before.mean((1, 2), keepdim=True)) + grey.mean((1, 2), keepdim=True)
    torch.testing.assert_close(grey, line, rtol=0, atol=1e-5)


PIL: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda picture, value: picture,
    "autocontrast": lambda picture, value: ImageOps.autocontrast(picture),
    "equalize": lambda picture, value: ImageOps.equalize(picture),
    "posterize": lambda picture, value: ImageOps.posterize(picture, int(np.ceil(value))),
    "solarize": lambda picture, value: ImageOps.solarize(picture, int(np.ceil(value * 255 - 1e-3))),
    "color": lambda picture, value: ImageEnhance.Color(picture).enhance(1 + value),
    "contrast": lambda picture, value: ImageEnhance.Contrast(picture).enhance(1 + value),
    "brightness": lambda picture, value: ImageEnhance.Brightness(picture).enhance(1 + value),
    "sharpness": lambda picture, value: ImageEnhance.Sharpness(picture).enhance(1 + value),
}
MOVING = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@settings(max_examples=40)
@example(name="solarize", channels=1, level=0.25, sign=1, seed=0)  # 192 of 255, to the last bit
@given(
    name=st.sampled_from(tuple(PIL)),
    channels=st.sampled_from((1, 3)),
    level=st.floats(0, 1),
    sign=st.sampled_from((1, -1)),
    seed=st.integers(0, 10**6),
)
def test_operations_are_those_of_pil(
    name: str, channels: int, level: float, sign: int, seed: int
) -> None:
    start, end = RANDAUGMENT[name]
    value = (start + (end - start) * level) * (sign if start == 0 else 1)
    # Between a quarter and three of the range, so that contrasts can be stretched.
    levels = (shots(2, channels, seed=seed) * 128 + 64).round()
    # As after a round trip through normalised values: a hair below the level.
    found = OPERATIONS[name](kornia, levels / 255 - 1e-6, torch.full((2,), value))
    for one, picture in zip(found, levels.byte(), strict=True):
        mode = Image.fromarray(picture.movedim(0, -1).squeeze(-1).numpy())
        wanted = np.asarray(PIL[name](mode, value)).reshape(12, 12, channels)
        # PIL rounds, and its grey and its means are whole numbers.
        apart = np.abs(one.movedim(0, -1).numpy() * 255 - wanted)
        assert apart.max() < 2.5, (apart.max(), value)


def test_operations_that_move_pixels_move_them_as_told() -> None:
    assert {*PIL, *MOVING} == set(OPERATIONS) == set(RANDAUGMENT)
    assert set(AUGMIX) < set(OPERATIONS)
    one = shots(1, 1, 5)

    def moved(name: str, value: float) -> Tensor:
        return OPERATIONS[name](kornia, one, torch.tensor([float(value)]))[0, 0]

    picture, close = one[0, 0], {"rtol": 0.0, "atol": 1e-5}
    torch.testing.assert_close(moved("rotate", 90), picture.rot90(1), **close)
    beyond = torch.zeros(5, 2)
    aside = torch.cat([beyond, picture[:, :3]], 1)
    torch.testing.assert_close(moved("translate_x", 0.4), aside, **close)
    torch.testing.assert_close(moved("translate_y", 0.4)[2:], picture[:3], **close)
    assert (moved("translate_y", 0.4)[:2] == 0).all()
    slanted = torch.zeros(5, 5)
    for row in range(5):
        slanted[row, row:] = picture[row, : 5 - row]
    torch.testing.assert_close(moved("shear_x", 1), slanted, **close)
    slanted = torch.zeros(5, 5)
    for column in range(5):
        slanted[column:, column] = picture[: 5 - column, column]
    torch.testing.assert_close(moved("shear_y", 1), slanted, **close)


def test_a_plain_picture_stays_plain_where_contrast_is_stretched() -> None:
    plain = torch.full((2, 3, 4, 4), 0.25)
    for name in ("autocontrast", "equalize"):
        found = OPERATIONS[name](kornia, plain, torch.zeros(2))
        torch.testing.assert_close(found, plain, rtol=0, atol=0.003)


def test_randaugment_begins_at_nothing_and_grows_with_its_magnitude(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("autocontrast", "equalize"):  # have no strength
        monkeypatch.setitem(OPERATIONS, name, OPERATIONS["identity"])
    batch = shots(200)
    apart = [
        (seeded(built(f"randaugment={magnitude}", like=batch), batch) - batch).abs().mean().item()
        for magnitude in (0, 3, 15, 30)
    ]
    assert apart[0] < 1e-6
    assert apart[0] < apart[1] < apart[2] < apart[3]


def test_randaugment_is_two_operations_and_augmix_three_chains_of_up_to_three(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values: dict[str, list[float]] = {}
    for name in OPERATIONS:

        def brighter(_: Any, images: Tensor, value: Tensor, name: str = name) -> Tensor:
            values.setdefault(name, []).extend(value.tolist())
            return images + 0.25

        monkeypatch.setitem(OPERATIONS, name, brighter)
    batch = torch.zeros(4000, 1, 3, 3)
    found = seeded(augment._randaugment(9, batch), batch)
    torch.testing.assert_close(found, torch.full_like(batch, 0.5))
    assert set(values) == set(RANDAUGMENT)
    for name, (start, end) in RANDAUGMENT.items():
        size = start + 0.3 * (end - start)
        wanted = {-size, size} if start == 0 else {size}
        assert sorted({round(value, 5) for value in values[name]}) == pytest.approx(
            sorted(wanted), abs=1e-4
        )
        assert len(values[name]) == pytest.approx(8000 / 14, rel=0.2)
    values.clear()

    found = seeded(augment._augmix(3, batch), batch)[:, 0, 0, 0] / 0.25
    assert set(values) == set(AUGMIX)
    for name, (start, end) in AUGMIX.items():
        sizes = np.abs(values[name])
        least, most = sorted((start + 0.01 * (end - start), start + 0.3 * (end - start)))
        assert sizes.min() == pytest.approx(least, abs=0.01 * abs(end - start))
        assert sizes.max() == pytest.approx(most, abs=0.01 * abs(end - start))
        assert (min(values[name]) < 0) == (start == 0 != end)
        assert len(sizes) == pytest.approx(3 * 2 * 4000 / 9, rel=0.1)
    assert (found >= 0).all()
    assert (found <= 3).all()
    # Weights add to 1, depths are 1, 2 or 3, and the share of the chains is uniform.
    assert found.mean().item() == pytest.approx(2 * 0.5, abs=0.03)
    assert found.max() > 2.5


def test_augmix_grows_with_its_severity() -> None:
    batch = torch.from_numpy(digits(0).splits.train.head(300)[0][0])
    apart = [
        (seeded(built(f"augmix={severity}", like=batch), batch) - batch).abs().mean().item()
        for severity in (1, 4, 10)
    ]
    assert apart[0] < apart[1] < apart[2]


def test_several_are_applied_in_order_to_real_digits() -> None:
    train = digits(0).splits.train
    batch = (torch.from_numpy(train.head(64)[0][0]) - 0.3) / 0.4
    split = Split.arrays(batch.numpy(), np.zeros(64))
    low, high = span(split)
    specs = ("crop=1", "rotate=15", "randaugment=9", "erase")
    found = seeded(augmentation(specs, batch, low, high, {}), batch)
    assert found.min() >= low.item() - 1e-5
    assert found.max() <= high.item() + 1e-5
    one = batch.clone()
    torch.manual_seed(0)
    for spec in specs:
        one = augmentation((spec,), batch, low, high, {})(one)
    assert torch.equal(found, one)
    assert torch.equal(augmentation((), batch, low, high, {})(batch), batch)


def test_span_is_each_channels_least_and_greatest_value() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(300, 3, 4, 5)).astype(np.float32)
    low, high = span(Split.arrays(images, np.zeros(300)))
    assert low.tolist() == images.min((0, 2, 3)).tolist()
    assert high.tolist() == images.max((0, 2, 3)).tolist()
    ids = np.arange(20).reshape(10, 2)
    assert [part.tolist() for part in span(Split.arrays(ids, np.zeros(10)))] == [[0, 1], [18, 19]]


def test_span_looks_all_over_a_sorted_split_but_not_at_all_of_it() -> None:
    fetched: list[int] = []

    def fetch(at: Any) -> Any:
        fetched.extend(at.tolist())
        return (at.astype(np.float32).reshape(-1, 1, 1, 1),), at

    low, high = span(Split(fetch, np.arange(50_000)))
    assert (low.item(), high.item()) == (0, 49_999)
    assert len(fetched) == 2000
    assert np.diff(fetched).max() < 30


def test_a_constant_channel_and_values_beyond_the_span_stay_finite() -> None:
    batch = torch.cat([torch.full((4, 1, 6, 6), 2.0), torch.randn(4, 2, 6, 6) * 9], 1)
    for name in NAMES:
        spec = "crop=2" if name == "crop" else name
        change = augmentation(
            (spec,), batch, torch.tensor([2.0, -1, -1]), torch.tensor([2.0, 1, 1]), {}
        )
        assert change(batch).isfinite().all(), name


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        (("blur",), r"'blur': known are flip, crop, rotate.*augmix, and functions of yours"),
        (("flip=2",), r"'flip=2': flip takes a probability from 0 to 1"),
        (("rotate=-1",), "from 0 to 180"),
        (("noise=nan",), "from 0 to 1"),
        (("randaugment=31",), "a magnitude from 0 to 30"),
        (("augmix=0",), "a severity from 1 to 10"),
        (("crop=much",), r"'much' is no number; crop takes pixels from 1 to 256"),
        (("crop=",), "'' is no number"),
        (("crop=1.5",), "whole ones"),
        (("flip", "crop", "flip=0.1"), "flip stands twice"),
        (("m:f", "m:f"), "m:f stands twice"),
        (("=3",), "known are flip"),
    ],
)
def test_wrong_specs_are_refused_in_one_line_before_kornia_is_needed(
    specs: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(InputError, match=said) as caught:
        checked(specs)
    assert "\n" not in str(caught.value)


def test_right_specs_pass_without_kornia_and_building_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    checked((*NAMES, "pkg.mod:function", "./file.py:function"))
    checked(("crop=2", "rotate=0", "color=1"))
    for name in NAMES:
        with pytest.raises(InputError, match=r"pip install 'compressor\[augment\]'"):
            built(name, like=shots())


def test_pixels_may_not_move_away_from_the_labels_of_a_segmentation() -> None:
    checked(("color", "noise", "erase", "m:f"), "segmentation")
    checked(NAMES, "classification")
    for name in ("flip", "crop", "rotate", "randaugment", "augmix"):
        with pytest.raises(InputError, match=rf"{name}.*segmentation; color, noise, erase do not"):
            checked((name,), "segmentation")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "batch",
    [torch.zeros(2, 30), torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2, 5, dtype=torch.int64)],
)
def test_what_is_no_picture_is_refused(name: str, batch: Tensor) -> None:
    with pytest.raises(InputError, match=rf"{name}.*float pictures.*leave {name} out") as caught:
        built(name, like=batch)
    assert str(tuple(batch.shape)) in str(caught.value)


def test_a_crop_that_can_lose_the_whole_picture_is_refused() -> None:
    batch = shots(side=8)
    built("crop=7", like=batch)
    with pytest.raises(InputError, match=r"crop=8.*8x8"):
        built("crop=8", like=batch)


def test_a_users_function_gets_the_batch_in_its_turn() -> None:
    ids = torch.arange(12).reshape(3, 4)

    def masked(batch: Tensor) -> Tensor:
        batch[:, 0] = 0  # in place: the caller's batch is not touched
        return batch

    found = built("mine:masked", like=ids, masked=masked)(ids)
    assert found[:, 0].tolist() == [0, 0, 0]
    assert torch.equal(found[:, 1:], ids[:, 1:])
    assert ids[1, 0] == 4

    batch = shots(2, 3) * 5 - 1
    seen = []
    change = built(
        "flip=1", "mine:look", like=batch, low=-1, high=4, look=lambda b: seen.append(b) or b
    )
    change(batch)
    torch.testing.assert_close(seen[0], batch.flip(-1))


def raising(batch: Tensor) -> Tensor:
    raise ValueError("two\nlines")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (raising, "it raised ValueError: two lines"),
        (lambda batch: None, "it gave NoneType; return a Tensor"),
        (lambda batch: batch[:, :, 1:], r"it gave float32 of shape \(4, 3, 5, 6\)"),
        (lambda batch: batch.double(), "it gave float64 of shape"),
        (lambda batch: batch / 0, "it gave NaN or infinite values"),
    ],
)
def test_a_users_function_that_fails_is_named(function: Callable[..., Any], said: str) -> None:
    batch = shots(4, side=6)
    change = built("mine:wrong", like=batch, wrong=function)
    with pytest.raises(InputError, match=f"'mine:wrong': {said}") as caught:
        change(batch)
    assert "\n" not in str(caught.value)


def test_a_function_that_was_not_passed_is_named() -> None:
    with pytest.raises(InputError, match="'mine:gone': there is no function"):
        built("mine:gone", like=shots())
