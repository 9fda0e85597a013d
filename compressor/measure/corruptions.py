"""Inputs off the test distribution: corrupted as cameras do it, and attacked along the gradient.

Compression may keep the accuracy on clean examples and lose it on others (Hooker et al. 2019, "What
Do Compressed Deep Neural Networks Forget?"). The corruptions follow Hendrycks and Dietterich (2019,
"Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"), the attacks
Goodfellow et al. (2015) and Madry et al. (2018).

Pictures are float arrays ``(n, channels, height, width)`` in whatever units a model takes. They are
worked on between 0 and 1, which stand for the least and the largest value of each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from compressor.task import Array, Inputs

DEVIATIONS = (0.08, 0.12, 0.18, 0.26, 0.38)
"""Of :func:`noise`, by severity."""

EPS = 8 / 255
"""How far an attack may move a pixel, of the channel's range."""

STEPS = 10
STRIDE = 2.5
"""Steps of PGD, and how many times ``eps`` they reach together: enough to cross the ball and turn
(Madry et al. 2018)."""

PART = 64
"""Pictures that are corrupted at once: what it takes in memory is several times their size."""

Corruption = Callable[[Array, int, np.random.Generator], Array]
Pictures = tuple[Tensor, ...]


class Scale(NamedTuple):
    """What 0 and 1 stand for in each channel; two arrays of shape ``(channels, 1, 1)``."""

    low: Array
    high: Array

    @classmethod
    def of(cls, images: Array) -> Scale:
        """The least and the largest value of each channel of ``(n, channels, height, width)``."""
        axes = (0, 2, 3)
        return cls(images.min(axes)[:, None, None], images.max(axes)[:, None, None])

    def unit(self, images: Array) -> Array:
        """Between 0 and 1; a channel of one value is 0."""
        span = self.high - self.low
        return np.asarray((images - self.low) / np.where(span > 0, span, 1).astype(span.dtype))

    def back(self, images: Array) -> Array:
        """The inverse of :meth:`unit`."""
        return np.asarray(self.low + images * (self.high - self.low))


# Pictures (n, channels, height, width) between 0 and 1, severity, generator -> the same, corrupted.
# The figures are ImageNet-C's, by severity from 1 to 5.


def noise(images: Array, severity: int, rng: np.random.Generator) -> Array:
    """Gaussian noise of deviation 0.08, 0.12, 0.18, 0.26, 0.38."""
    drawn = rng.standard_normal(images.shape, dtype=np.float32)
    return np.asarray(np.clip(images + DEVIATIONS[severity - 1] * drawn, 0, 1))


def blur(images: Array, severity: int, rng: np.random.Generator) -> Array:
    """Gaussian blur, mirrored at the edges, of deviation 0.4, 0.6, 0.7, 0.8, 1 pixels (those of
    CIFAR-10-C) at a side of 32 or less, and in proportion at a longer one."""
    deviation = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1] * max(1.0, min(images.shape[2:]) / 32)
    return _mixed(images, lambda side: _gaussian(side, deviation))


def contrast(images: Array, severity: int, rng: np.random.Generator) -> Array:
    """Each picture at 0.4, 0.3, 0.2, 0.1, 0.05 of its distance from its channels' means."""
    mean = images.mean(axis=(2, 3), keepdims=True)
    return np.asarray(mean + (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] * (images - mean))


def brightness(images: Array, severity: int, rng: np.random.Generator) -> Array:
    """Brighter by 0.1, 0.2, 0.3, 0.4, 0.5 in every channel."""
    return np.clip(images + (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1], 0, 1)


def pixelate(images: Array, severity: int, rng: np.random.Generator) -> Array:
    """Means over blocks: 0.6, 0.5, 0.4, 0.3, 0.25 as many along each side."""
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    return _mixed(images, lambda side: _blocks(side, share))


CORRUPTIONS: dict[str, Corruption] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "brightness": brightness,
    "pixelate": pixelate,
}
"""Name of a corruption, and the function that makes it; only ``noise`` suits what is no picture."""


def pictured(array: Array) -> bool:
    """Whether an input is pictures: floats ``(n, channels, height, width)``, no side of 1."""
    return array.ndim == 4 and array.dtype.kind == "f" and min(array.shape[2:]) > 1


def unsuited(inputs: Inputs, name: str) -> str | None:
    """Why a corruption or an attack leaves these inputs as they are; ``None`` where it does not."""
    if any(map(pictured, inputs)):
        return None
    if not any(one.dtype.kind == "f" for one in inputs):
        return "its inputs are whole numbers, to which nothing small can be added"
    return None if name == "noise" else "its inputs are no pictures"


def corrupted(inputs: Inputs, name: str, severity: int, seed: int) -> Inputs:
    """The inputs, first axis the example, after one of :data:`CORRUPTIONS`; dtypes stay.

    Pictures keep each channel's range. Other floats (tables, sequences) get noise only: normal, of
    :func:`noise`'s shares of the deviation that each feature has over the examples; whole numbers
    stay. The same seed gives the same inputs, and noise that differs between severities in its
    size alone. Raises ``ValueError`` where :func:`unsuited` says why.
    """
    if why := unsuited(inputs, name):
        raise ValueError(f"{name}: {why}")
    rng = np.random.default_rng(seed)
    return tuple(
        _pictures(one, name, severity, rng)
        if pictured(one)
        else _features(one, severity, rng)
        if name == "noise" and one.dtype.kind == "f"
        else one
        for one in inputs
    )


def _pictures(images: Array, name: str, severity: int, rng: np.random.Generator) -> Array:
    scale, made = Scale.of(images), np.empty_like(images)
    for start in range(0, len(images), PART):
        part = scale.unit(images[start : start + PART])
        moved = scale.back(CORRUPTIONS[name](part, severity, rng))
        # Rounded, the way back may end a hair outside.
        made[start : start + PART] = np.clip(moved, scale.low, scale.high)
    return made


def _features(values: Array, severity: int, rng: np.random.Generator) -> Array:
    size = DEVIATIONS[severity - 1] * values.std(axis=0)
    moved = values + size * rng.standard_normal(values.shape, dtype=np.float32)
    return np.asarray(moved, values.dtype)


def _mixed(images: Array, matrix: Callable[[int], Array]) -> Array:
    """Rows and columns of each picture mixed by the ``(side, side)`` matrices of its sides."""
    down, across = (matrix(side).astype(images.dtype) for side in images.shape[2:])
    return np.asarray(down @ images @ across.T)


def _gaussian(side: int, deviation: float) -> Array:
    reach = int(np.ceil(4 * deviation))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    mirrored = np.pad(np.eye(side), ((reach, reach), (0, 0)), "symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(mirrored, len(kernel), axis=0)
    return np.asarray(windows @ (kernel / kernel.sum()))


def _blocks(side: int, share: float) -> Array:
    block = np.arange(side) * max(1, int(side * share)) // side
    same = block[:, None] == block[None, :]
    return np.asarray(same / same.sum(axis=1, keepdims=True))


# Attacks: pictures as they are, what is to be raised, their scales, seed -> pictures near to them.
# ``loss`` gives one number for the pictures of a batch, and nothing in it is trained.

Loss = Callable[[Pictures], Tensor]


def fgsm(
    loss: Loss, images: Pictures, scales: Sequence[Scale], seed: int, *, eps: float = EPS
) -> Pictures:
    """One step of ``eps`` along the gradient's signs (Goodfellow et al. 2015).

    ``images`` hold ``(n, channels, height, width)`` each, ``scales`` the range of each, of which
    ``eps`` is a share. No pixel leaves its range. Raises ``ValueError`` where ``loss`` has no
    gradient.
    """
    balls = _balls(images, scales, eps)
    return _climbed(loss, images, [eps * span for span in _spans(images, scales)], balls)


def pgd(
    loss: Loss,
    images: Pictures,
    scales: Sequence[Scale],
    seed: int,
    *,
    eps: float = EPS,
    steps: int = STEPS,
) -> Pictures:
    """``steps`` smaller ones from a random start, none of which leaves the L-infinity ball of
    ``eps`` (Madry et al. 2018); otherwise as :func:`fgsm`."""
    balls, spans = _balls(images, scales, eps), _spans(images, scales)
    drawn = torch.Generator().manual_seed(seed)
    moved = tuple(
        _within(image + eps * span * (2 * torch.rand(image.shape, generator=drawn) - 1), ball)
        for image, span, ball in zip(images, spans, balls, strict=True)
    )
    strides = [STRIDE * eps / steps * span for span in spans]
    for _ in range(steps):
        moved = _climbed(loss, moved, strides, balls)
    return moved


ATTACKS: dict[str, Callable[[Loss, Pictures, Sequence[Scale], int], Pictures]] = {
    "fgsm": fgsm,
    "pgd": pgd,
}
"""Name of an attack, and the function that makes it."""

Ball = tuple[Tensor, Tensor]
"""The least and the largest that each pixel may become."""


def _spans(images: Pictures, scales: Sequence[Scale]) -> list[Tensor]:
    pairs = zip(images, scales, strict=True)
    return [torch.from_numpy(scale.high - scale.low).to(image) for image, scale in pairs]


def _balls(images: Pictures, scales: Sequence[Scale], eps: float) -> list[Ball]:
    found = []
    for image, scale, span in zip(images, scales, _spans(images, scales), strict=True):
        low, high = (torch.from_numpy(bound).to(image) for bound in scale)
        found.append(
            (torch.maximum(image - eps * span, low), torch.minimum(image + eps * span, high))
        )
    return found


def _within(image: Tensor, ball: Ball) -> Tensor:
    return torch.minimum(torch.maximum(image, ball[0]), ball[1])


def _climbed(
    loss: Loss, images: Pictures, strides: Sequence[Tensor], balls: Sequence[Ball]
) -> Pictures:
    """The pictures one stride up the loss, held in their balls."""
    leaves = tuple(image.detach().requires_grad_() for image in images)
    with torch.enable_grad():
        value = loss(leaves)
    known = value.requires_grad
    gradients = torch.autograd.grad(value, leaves, allow_unused=True) if known else ()
    if not any(gradient is not None for gradient in gradients):
        raise ValueError("its loss has no gradient with respect to the pictures")
    return tuple(
        image if gradient is None else _within(image + stride * gradient.sign(), ball)
        for image, stride, gradient, ball in zip(images, strides, gradients, balls, strict=True)
    )
