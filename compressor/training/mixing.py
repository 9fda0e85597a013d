"""Mixing the examples of a batch: mixup and cutmix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressor.errors import InputError


def fits(inputs: tuple[Tensor, ...], mixup: float, cutmix: float) -> None:
    """Raises :class:`InputError` where a batch like ``inputs`` cannot be mixed in these ways."""
    for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        whole = [
            str(part.dtype).removeprefix("torch.")
            for part in inputs
            if not part.is_floating_point()
        ]
        if alpha and whole:
            raise InputError(
                f"{name} {alpha:g}: an input is {whole[0]}, and only floating-point inputs can be "
                f"mixed; leave {name} out"
            )
    if cutmix and inputs[0].ndim != 4:
        raise InputError(
            f"cutmix {cutmix:g}: the first input has shape {tuple(inputs[0].shape)}, and patches "
            "are cut from pictures (n, channels, height, width); leave cutmix out, mixup needs none"
        )


def mix(
    inputs: tuple[Tensor, ...], mixup: float, cutmix: float
) -> tuple[tuple[Tensor, ...], Tensor, float]:
    """The batch with each example mixed with a partner: ``(inputs, partner, share)``.

    ``inputs`` are floats of shape ``(n, ...)`` and stay as they are; what comes back has their
    shapes and dtypes. ``partner``, int64 of shape ``(n,)``, is a permutation of the examples.
    ``share`` in [0, 1] is how much of each example is its own, so the loss is
    ``share * loss(outputs, y) + (1 - share) * loss(outputs, y[partner])``.

    ``mixup`` and ``cutmix`` are the alphas, at least 0, of the Beta(alpha, alpha) that ``share``
    is drawn from; 0 is off, and where both are on each batch is mixed in one of the two ways with
    equal chance. Mixup blends all values (Zhang et al. 2018, section 2). Cutmix puts a rectangle
    of the partner into the pictures ``(n, c, h, w)`` of the first input (Yun et al. 2019, section
    3.1); ``share`` is the area that is left, and further inputs are blended by it. Draws come
    from torch's global generator. Batches are those that :func:`fits` lets pass.
    """
    if not mixup and not cutmix:
        return inputs, torch.arange(len(inputs[0]), device=inputs[0].device), 1.0
    cut = bool(cutmix) and (not mixup or torch.rand(()).item() < 0.5)
    alpha = cutmix if cut else mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    partner = torch.randperm(len(inputs[0])).to(inputs[0].device)
    if not cut:
        return tuple(_blend(part, partner, share) for part in inputs), partner, share
    pictures, *others = inputs
    height, width = pictures.shape[-2:]
    side = math.sqrt(1 - share)
    rows, columns = _stretch(height, side), _stretch(width, side)
    mixed = pictures.clone()
    mixed[..., rows, columns] = pictures[partner][..., rows, columns]
    cut_out = (rows.stop - rows.start) * (columns.stop - columns.start)
    share = 1 - cut_out / (height * width)
    return (mixed, *(_blend(part, partner, share) for part in others)), partner, share


def _blend(part: Tensor, partner: Tensor, share: float) -> Tensor:
    return share * part + (1 - share) * part[partner]


def _stretch(length: int, side: float) -> slice:
    """A piece of ``side`` of the length about a uniform centre, clipped at the borders."""
    centre, half = int(torch.randint(length, ())), int(length * side) // 2
    return slice(max(centre - half, 0), min(centre + half, length))
