"""Pictures made from a teacher alone, for distillation without data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.errors import InputError
from compressor.loading.task import first
from compressor.task import Array, Input, Inputs, Kind
from compressor.training.losses import LABELS

TOGETHER = 256
"""Pictures that are made in one batch: it is a batch whose statistics are to match."""

STATISTICS, ROUGH, LARGE = 2.0, 0.1, 0.01
"""Weights of the distance of statistics, of the total variation and of the L2 norm, beside the
cross-entropy of the outputs."""

LEARNING_RATE = 0.1
"""Of Adam, on pictures that begin as normal noise (as in the authors' code for CIFAR)."""


def synthesize(
    teacher: nn.Module,
    inputs: tuple[Input, ...],
    count: int,
    seed: int,
    *,
    kind: Kind = "classification",
    steps: int = 500,
) -> Inputs:
    """``count`` pictures for each of ``inputs``, shape ``(count, *shape)``, in its dtype.

    DeepInversion (Yin et al. 2020, section 3.2): noise is changed until the means and variances at
    every batch normalisation of ``teacher`` are those that it has seen in training, the pictures
    are smooth and small, and the outputs are confident: of a class each in turn where ``kind`` is a
    classification, of bits that are set as often as not where it is binary or multilabel; other
    kinds have no such goal. The same seed gives the same pictures on the same machine and threads.
    ``teacher`` stays as it is.

    Raises :class:`InputError` where ``teacher`` has no batch normalisation with running statistics,
    and for inputs other than floating pictures ``(channels, height, width)``.
    """
    for given in inputs:
        if len(given.shape) != 3 or not np.issubdtype(np.dtype(given.dtype), np.floating):
            raise InputError(
                f"input {given.name!r} is {given.dtype} {given.shape}: only floating pictures "
                "(channels, height, width) can be made up: give data to train on"
            )
    if not _normalisations(teacher):
        raise InputError(
            f"{type(teacher).__name__} has no batch normalisation with running statistics, from "
            "which pictures could be made: give data to train on"
        )
    random = torch.Generator().manual_seed(seed)
    sizes = [len(part) for part in np.array_split(np.arange(count), -(-count // TOGETHER))]
    with _still(teacher), torch.enable_grad():
        made = [_batch(teacher, inputs, size, random, kind, steps) for size in sizes]
    return tuple(
        np.concatenate(parts).astype(given.dtype)
        for given, parts in zip(inputs, zip(*made, strict=True), strict=True)
    )


def distance(teacher: nn.Module, examples: Inputs) -> float:
    """How far the statistics of ``examples``, as one batch, are from those that the batch
    normalisations of ``teacher`` hold: the sum of the L2 norms over means and over variances."""
    where = next(teacher.parameters()).device
    with _still(teacher), torch.no_grad(), _apart(teacher) as apart:
        teacher(*(torch.from_numpy(part).to(where) for part in examples))
        return float(torch.stack(apart).sum())


def _batch(
    teacher: nn.Module,
    inputs: tuple[Input, ...],
    size: int,
    random: torch.Generator,
    kind: Kind,
    steps: int,
) -> list[Array]:
    where = next(teacher.parameters()).device
    parts = [
        torch.randn((size, *given.shape), generator=random).to(where).requires_grad_()
        for given in inputs
    ]
    with torch.no_grad():
        goal = _goal(first(teacher(*parts)), random, kind)
    optimiser = torch.optim.Adam(parts, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with _apart(teacher) as apart:
        for _ in range(steps):
            apart.clear()
            outputs = first(teacher(*parts))
            loss = STATISTICS * torch.stack(apart).sum()
            for part in parts:
                loss = loss + ROUGH * _variation(part) + LARGE * part.square().mean()
            if goal is not None:
                loss = loss + LABELS[kind](outputs, goal)
            # The gradient of the pictures only: the teacher's parameters keep theirs.
            for part, gradient in zip(parts, torch.autograd.grad(loss, parts), strict=True):
                part.grad = gradient
            optimiser.step()
            schedule.step()
    return [part.detach().cpu().numpy() for part in parts]


def _goal(outputs: Tensor, random: torch.Generator, kind: Kind) -> Tensor | None:
    """Targets for ``outputs``, each class as often as any other."""
    if kind == "classification":
        return (torch.arange(len(outputs)) % outputs.shape[1]).to(outputs.device)
    if kind in ("binary", "multilabel"):
        return torch.randint(0, 2, outputs.shape, generator=random).to(outputs.device)
    return None


def _variation(pictures: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, down and right."""
    down = pictures.diff(dim=2).abs().sum()
    right = pictures.diff(dim=3).abs().sum()
    return (down + right) / pictures.numel()


def _normalisations(model: nn.Module) -> list[_BatchNorm]:
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


@contextmanager
def _apart(teacher: nn.Module) -> Iterator[list[Tensor]]:
    """Lists, forward pass by forward pass, how far each normalisation's input is from its
    statistics."""
    found: list[Tensor] = []

    def compare(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        axes = [at for at in range(inputs[0].ndim) if at != 1]
        variance, mean = torch.var_mean(inputs[0], dim=axes, correction=0)
        assert isinstance(layer, _BatchNorm)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        found.append((mean - layer.running_mean).norm() + (variance - layer.running_var).norm())

    handles = [layer.register_forward_pre_hook(compare) for layer in _normalisations(teacher)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """In eval mode for a while."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
