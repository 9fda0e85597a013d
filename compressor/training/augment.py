"""Augmentation of whole training batches of images, on kornia: an optional package.

Everything is drawn from torch's global generator, for each example by itself, so that the same
seed gives the same batches and a saved state of the generator goes on where it was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from compressor.errors import InputError, one_line
from compressor.task import Kind, Split

Change = Callable[[Tensor], Tensor]
"""A function of a batch: shape, dtype and device come back as they went in."""

NO_KORNIA = "kornia is not installed: pip install 'compressor[augment]'"

SEEN = 2000
"""Training examples that tell the range of the pictures."""


class Augmentation(NamedTuple):
    """``build(strength, pictures)`` gives a :data:`Change` of pictures in [0, 1].

    ``pictures`` is a batch ``(n, c, h, w)`` like those to come. Strengths go from ``low`` to
    ``high``, both included, and count ``unit``. ``moves`` says that pixels change their place,
    ``sees`` that ``c`` must be 1 or 3 and the sides 3 pixels or more.
    """

    default: float
    low: float
    high: float
    unit: str
    build: Callable[[float, Tensor], Change]
    moves: bool = False
    sees: bool = False


def checked(specs: Sequence[str], kind: Kind | None = None) -> None:
    """Checks specs such as ``("flip", "crop=4", "./mine.py:blur")``, without importing kornia.

    A spec is ``name`` or ``name=strength``; one with a colon is a user's own function.

    Raises :class:`InputError` for a name that is unknown or stands twice, for a strength that is
    no number or out of bounds, and for augmentations that move pixels where the ``kind`` of task
    has a label for each of them.
    """
    seen = set()
    for spec in specs:
        name = spec if ":" in spec else _parsed(spec)[0]
        if name in seen:
            raise InputError(f"augment {spec!r}: {name} stands twice; give it once")
        seen.add(name)
        if kind == "segmentation" and ":" not in spec and AUGMENTATIONS[name].moves:
            raise InputError(
                f"augment {spec!r}: it moves pixels away from their labels in a segmentation; "
                f"{', '.join(name for name, one in AUGMENTATIONS.items() if not one.moves)} do not"
            )


def span(split: Split) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each channel of the first input, float32 of shape ``(c,)``.

    Reads up to 2,000 examples, spread over the split: files often lie sorted by class.
    """
    count = min(SEEN, len(split))
    positions = np.linspace(0, len(split) - 1, count).round().astype(np.intp)
    lows, highs = [], []
    for inputs, _ in split.take(positions).batches(64):
        part = torch.from_numpy(inputs[0])
        values = part.reshape(len(part), part.shape[1] if part.ndim > 1 else 1, -1).float()
        lows.append(values.amin((0, 2)))
        highs.append(values.amax((0, 2)))
    return torch.stack(lows).amin(0), torch.stack(highs).amax(0)


def augmentation(
    specs: Sequence[str],
    example: Tensor,
    low: Tensor,
    high: Tensor,
    functions: Mapping[str, Callable[[Tensor], Tensor]],
) -> Change:
    """The function of a batch that applies ``specs`` one after the other.

    ``example`` is a batch like those to come: floats ``(n, c, h, w)``, normalised in whatever way.
    ``low`` and ``high``, shape ``(c,)``, are the values that black and white have in it
    (:func:`span`): pictures are augmented between 0 and 1 and mapped back, and what a crop, a
    rotation or an erased patch leaves empty is ``low``. ``functions`` has the user's own by their
    specs, called as ``function(batch)`` on any tensor; those draw from torch's generator too.

    Raises :class:`InputError` for batches that are no pictures and where kornia is missing; the
    function that comes back raises it when one of the user's fails, or gives another shape or
    dtype, or values that are not finite.
    """
    checked(specs)
    steps = [
        _own(spec, functions) if ":" in spec else _built(spec, example, low, high) for spec in specs
    ]

    def change(batch: Tensor) -> Tensor:
        with torch.no_grad():
            for step in steps:
                batch = step(batch)
        return batch

    return change


def _parsed(spec: str) -> tuple[str, float]:
    name, equals, text = spec.partition("=")
    if name not in AUGMENTATIONS:
        raise InputError(
            f"augment {spec!r}: known are {', '.join(AUGMENTATIONS)}, and functions of yours "
            "(PKG.MOD:FUNCTION or ./file.py:function)"
        )
    known = AUGMENTATIONS[name]
    allowed = f"{name} takes {known.unit} from {known.low:g} to {known.high:g}"
    if not equals:
        return name, known.default
    try:
        strength = float(text)
    except ValueError:
        raise InputError(f"augment {spec!r}: {text!r} is no number; {allowed}") from None
    if not known.low <= strength <= known.high:
        raise InputError(f"augment {spec!r}: {allowed}")
    if known.unit == "pixels" and not strength.is_integer():
        raise InputError(f"augment {spec!r}: {allowed}, whole ones")
    return name, strength


def _built(spec: str, example: Tensor, low: Tensor, high: Tensor) -> Change:
    name, strength = _parsed(spec)
    sees, shape = AUGMENTATIONS[name].sees, tuple(example.shape)
    pictures = len(shape) == 4 and example.is_floating_point()
    if not pictures or (sees and (shape[1] not in (1, 3) or min(shape[2:]) < 3)):
        more = " of 1 or 3 channels and 3x3 pixels or more" if sees else ""
        raise InputError(
            f"augment {spec!r}: it needs float pictures (n, channels, height, width){more}; the "
            f"batches are {_described(example)}: leave {name} out"
        )
    return _between(AUGMENTATIONS[name].build(strength, example), low, high)


def _between(change: Change, low: Tensor, high: Tensor) -> Change:
    """The change of pictures in [0, 1] as one of pictures between ``low`` and ``high``."""
    reach = torch.where(high > low, high - low, 1)  # a channel may be constant

    def mapped(batch: Tensor) -> Tensor:
        dtype = torch.promote_types(batch.dtype, torch.float32)  # kornia has no half on CPUs
        floor, size = (value.to(batch.device, dtype).reshape(1, -1, 1, 1) for value in (low, reach))
        return (change((batch.to(dtype) - floor) / size) * size + floor).to(batch.dtype)

    return mapped


def _own(spec: str, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Change:
    """The user's function, and what it gives checked."""
    if spec not in functions:
        raise InputError(f"augment {spec!r}: there is no function of this name; pass it")
    function = functions[spec]

    def change(batch: Tensor) -> Tensor:
        try:
            found = function(batch.clone())  # it may write into what it gets
        except Exception as error:
            raise InputError(
                f"augment {spec!r}: it raised {type(error).__name__}: {one_line(error)}"
            ) from error
        if not isinstance(found, Tensor):
            raise InputError(f"augment {spec!r}: it gave {type(found).__name__}; return a Tensor")
        if (found.shape, found.dtype, found.device) != (batch.shape, batch.dtype, batch.device):
            raise InputError(
                f"augment {spec!r}: it gave {_described(found)}; return what it gets, "
                f"{_described(batch)}"
            )
        if not found.isfinite().all():
            raise InputError(f"augment {spec!r}: it gave NaN or infinite values; return finite")
        return found

    return change


def _described(batch: Tensor) -> str:
    dtype = str(batch.dtype).removeprefix("torch.")
    return f"{dtype} of shape {tuple(batch.shape)} on {batch.device}"


def _kornia() -> Any:
    try:
        import kornia
    except ImportError:
        raise InputError(NO_KORNIA) from None
    return kornia


def _crop(padding: float, pictures: Tensor) -> Change:
    size = (pictures.shape[-2], pictures.shape[-1])
    if padding >= min(size):
        raise InputError(
            f"augment 'crop={padding:g}': pictures of {size[0]}x{size[1]} pixels would go whole; "
            "pad by less or leave crop out"
        )
    change: Change = _kornia().augmentation.RandomCrop(size, padding=int(padding), p=1.0)
    return change


def _color(strength: float, pictures: Tensor) -> Change:
    """Brightness, contrast and, of 3 channels, saturation, each times 1 - strength to 1 + it."""
    saturation = strength if pictures.shape[1] == 3 else 0.0
    change: Change = _kornia().augmentation.ColorJitter(strength, strength, saturation, p=1.0)
    return change


def _randaugment(magnitude: float, pictures: Tensor) -> Change:
    """Two operations on each picture (Cubuk et al. 2020, section 3).

    kornia's class draws the two once for the whole batch, and at its magnitude 15 of 30 leaves
    brightness, contrast, color and sharpness as they are. Here each picture has its own and all
    grow with the magnitude, as torchvision's do.
    """
    kornia = _kornia()

    def change(images: Tensor) -> Tensor:
        images = images.clamp(0, 1)
        level = torch.full((len(images),), magnitude / 30)
        for _ in range(2):
            which = torch.randint(len(RANDAUGMENT), (len(images),))
            images = _operated(kornia, images, RANDAUGMENT, which, level)
        return images

    return change


def _augmix(severity: float, pictures: Tensor) -> Change:
    """Three chains of one to three operations, mixed and mixed with the picture itself.

    Hendrycks et al. 2020, algorithm 1, width 3 and alpha 1; kornia has none.
    """
    kornia = _kornia()

    def change(images: Tensor) -> Tensor:
        images = images.clamp(0, 1)
        count = 3 * len(images)
        chains, depth = images.repeat(3, 1, 1, 1), torch.randint(1, 4, (count,))
        for step in range(3):
            which = torch.randint(len(AUGMIX), (count,))
            level = (0.1 + (severity - 0.1) * torch.rand(count)) / 10
            which = torch.where(step < depth, which, -1)
            chains = _operated(kornia, chains, AUGMIX, which, level)
        weights = torch.distributions.Dirichlet(torch.ones(3)).sample((len(images),)).to(images)
        mixed = torch.einsum("nk,knchw->nchw", weights, chains.reshape(3, *images.shape))
        share = torch.rand(len(images), 1, 1, 1).to(images)
        return (1 - share) * images + share * mixed

    return change


def _operated(
    kornia: Any,
    images: Tensor,
    table: Mapping[str, tuple[float, float]],
    which: Tensor,
    level: Tensor,
) -> Tensor:
    """Each image with the operation of ``table`` that ``which`` counts; -1 leaves it alone.

    ``level`` in [0, 1] is how far into its range; ``which`` and it are on the CPU, shape ``(n,)``.
    """
    changed, sign = images.clone(), torch.randint(0, 2, which.shape) * 2 - 1
    for number, (name, (start, end)) in enumerate(table.items()):
        rows = (which == number).nonzero().flatten()
        if len(rows):
            value = start + (end - start) * level[rows]
            value = value * sign[rows] if start == 0 else value
            changed[rows] = OPERATIONS[name](kornia, images[rows], value.to(images))
    return changed


def _contrasted(images: Tensor) -> Tensor:
    # kornia's makes a plain channel black; PIL's, which the papers used, leaves it.
    low, high = images.amin((-2, -1), keepdim=True), images.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp_min(1e-6), images)


def _levels(images: Tensor) -> Tensor:
    # kornia truncates to 8 bits: a level that was normalised and mapped back may lie just below.
    return (images * 255).round() / 255


def _along(axis: int, value: Tensor) -> Tensor:
    """Vectors ``(x, y)`` of shape ``(n, 2)`` that lie on one axis."""
    return value[:, None] * torch.eye(2).to(value)[axis]


NEAR = 1e-3
"""Of a level: float32 is not nearer to a whole one."""

OPERATIONS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "identity": lambda kornia, images, value: images,
    "autocontrast": lambda kornia, images, value: _contrasted(images),
    "equalize": lambda kornia, images, value: kornia.enhance.equalize(_levels(images)),
    "rotate": lambda kornia, images, value: kornia.geometry.transform.rotate(images, value),
    "shear_x": lambda kornia, images, value: kornia.geometry.transform.shear(
        images, _along(0, value)
    ),
    "shear_y": lambda kornia, images, value: kornia.geometry.transform.shear(
        images, _along(1, value)
    ),
    "translate_x": lambda kornia, images, value: kornia.geometry.transform.translate(
        images, _along(0, value * images.shape[-1])
    ),
    "translate_y": lambda kornia, images, value: kornia.geometry.transform.translate(
        images, _along(1, value * images.shape[-2])
    ),
    "posterize": lambda kornia, images, value: kornia.enhance.posterize(
        _levels(images), value.ceil().int()
    ),
    # From a whole level on, as PIL has them; half of one lower, for pictures a hair below theirs.
    "solarize": lambda kornia, images, value: kornia.enhance.solarize(
        images, ((255 * value - NEAR).ceil() - 0.5) / 255
    ),
    "color": lambda kornia, images, value: kornia.enhance.adjust_saturation_with_gray_subtraction(
        images, 1 + value
    ),
    "contrast": lambda kornia, images, value: kornia.enhance.adjust_contrast_with_mean_subtraction(
        images, 1 + value
    ),
    "brightness": lambda kornia, images, value: kornia.enhance.adjust_brightness_accumulative(
        images, 1 + value
    ),
    "sharpness": lambda kornia, images, value: kornia.enhance.sharpness(images, 1 + value),
}
"""What RandAugment and AugMix draw from: functions of images in [0, 1] and of a value for each.

Degrees, slopes, fractions of the side, bits kept, the threshold to invert from, factors less 1.
"""

RANDAUGMENT: dict[str, tuple[float, float]] = {
    "identity": (0, 0),
    "autocontrast": (0, 0),
    "equalize": (0, 0),
    "rotate": (0, 30),
    "shear_x": (0, 0.3),
    "shear_y": (0, 0.3),
    "translate_x": (0, 150 / 331),
    "translate_y": (0, 150 / 331),
    "posterize": (8, 4),
    "solarize": (256 / 255, 0),
    "color": (0, 0.9),
    "contrast": (0, 0.9),
    "brightness": (0, 0.9),
    "sharpness": (0, 0.9),
}
"""The value at magnitude 0 and at 30; those that begin at 0 get a random sign."""

AUGMIX: dict[str, tuple[float, float]] = {
    "autocontrast": (0, 0),
    "equalize": (0, 0),
    "rotate": (0, 30),
    "shear_x": (0, 0.3),
    "shear_y": (0, 0.3),
    "translate_x": (0, 1 / 3),
    "translate_y": (0, 1 / 3),
    "posterize": (4, 0),
    "solarize": (256 / 255, 0),
}
"""The value at severity 0 and at 10, of the operations that ImageNet-C does not test with."""

AUGMENTATIONS: dict[str, Augmentation] = {
    "flip": Augmentation(
        *(0.5, 0, 1, "a probability"),
        lambda strength, pictures: _kornia().augmentation.RandomHorizontalFlip(p=strength),
        moves=True,
    ),
    "crop": Augmentation(4, 1, 256, "pixels", _crop, moves=True),
    "rotate": Augmentation(
        *(15, 0, 180, "degrees"),
        lambda strength, pictures: _kornia().augmentation.RandomRotation(strength, p=1.0),
        moves=True,
    ),
    "color": Augmentation(0.4, 0, 1, "a strength", _color, sees=True),
    "noise": Augmentation(
        *(0.05, 0, 1, "a deviation"),
        lambda strength, pictures: _kornia().augmentation.RandomGaussianNoise(std=strength, p=1.0),
    ),
    # A rectangle of 2 to 33 % of the picture (Zhong et al. 2020).
    "erase": Augmentation(
        *(0.25, 0, 1, "a probability"),
        lambda strength, pictures: _kornia().augmentation.RandomErasing(p=strength),
    ),
    "randaugment": Augmentation(9, 0, 30, "a magnitude", _randaugment, moves=True, sees=True),
    "augmix": Augmentation(3, 1, 10, "a severity", _augmix, moves=True, sees=True),
}
