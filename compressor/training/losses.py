"""What recovery minimises: the error on labels, and the distance to the teacher's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from compressor.task import Kind


class Loss(NamedTuple):
    """``labels(outputs, targets)`` and ``teacher(outputs, teacher_outputs, temperature)``."""

    labels: Callable[[Tensor, Tensor], Tensor]
    teacher: Callable[[Tensor, Tensor, float], Tensor]


def softened(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Divergence of softened distributions, classes on axis 1 (Hinton et al. 2015, section 2).

    Scaled by the temperature squared, so that gradients keep their size.
    """
    ours = F.log_softmax(outputs / temperature, dim=1)
    theirs = F.log_softmax(teacher / temperature, dim=1)
    apart = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1).mean()
    return apart * temperature**2


def softened_bits(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The same for independent sigmoid logits: cross-entropy of softened probabilities."""
    goal = torch.sigmoid(teacher / temperature)
    apart = F.binary_cross_entropy_with_logits(outputs / temperature, goal)
    return apart * temperature**2


def labelled(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits, classes on axis 1, and integer labels."""
    return F.cross_entropy(outputs, targets.long())


def bits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of logits, shapes alike up to axes of length 1."""
    return F.binary_cross_entropy_with_logits(outputs, targets.reshape(outputs.shape).float())


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error, shapes alike up to axes of length 1."""
    return F.mse_loss(outputs, targets.reshape(outputs.shape).to(outputs.dtype))


def matched(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean squared error to the teacher's outputs; a regression has no temperature."""
    return squared(outputs, teacher)


LOSSES: dict[Kind, Loss] = {
    "classification": Loss(labelled, softened),
    "segmentation": Loss(labelled, softened),
    "binary": Loss(bits, softened_bits),
    "multilabel": Loss(bits, softened_bits),
    "regression": Loss(squared, matched),
}
