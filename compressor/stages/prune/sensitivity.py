"""What it costs in accuracy to cut one group alone: the curves that steer a search."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from compressor.loading.task import tensors
from compressor.measure.counting import macs
from compressor.measure.threads import threads_for
from compressor.metrics import metrics_of, value
from compressor.stages.prune.cutting import units
from compressor.stages.prune.group import Cut, Group
from compressor.stages.prune.ranking import Scores, chosen
from compressor.task import Array, Inputs, Task, labelled
from compressor.training.losses import LABELS

SHARES = (0.25, 0.5, 0.75)
"""Parts of a group's units that are cut, one after the other."""

WORK = 5e11
"""Multiply-accumulates that all curves together may take: about ten seconds."""

FEWEST, MOST = 8, 512
"""Examples of the calibration split for each point."""


WORST = 1e6
"""What a loss that is not finite counts."""


@dataclass(frozen=True)
class Curve:
    """What is lost when a share of one group's units is zeroed, all else whole.

    ``loss`` is the rise of the label loss, plus the squared change of outputs that labels do not
    judge (without data: of all) over their variance; ``metric`` the task's metric (NaN without
    data). Both start at share 0.
    """

    root: str
    shares: tuple[float, ...]
    loss: tuple[float, ...]
    metric: tuple[float, ...]

    def at_half(self) -> float:
        """The rise of the loss when about half the units go: finite, at least 0."""
        # A loss that is no number is as bad as can be.
        loss = np.nan_to_num(self.loss, nan=WORST, posinf=WORST, neginf=0.0)
        level = np.maximum.accumulate(np.clip(loss, 0, WORST))
        return float(np.interp(0.5, self.shares, level))


class Damage(NamedTuple):
    """What cutting a share of a group counts: ``weight`` at half, rising as 1 / (1 - share)^2.

    The curves alone mislead: each is taken with all else whole, and after recovery little is left
    of small rises, so that a search by them empties some layers and spares others, and ends below
    plain ratio pruning. Each further unit therefore costs more than the one before, in proportion
    to what the group does (its multiply-accumulates and parameters): with nothing else known, all
    layers lose the same share, and where time is not where work is, or layers are not equally
    sensitive, the shares move apart.
    """

    weight: float

    def __call__(self, share: float) -> float:
        return self.weight * (max(1 - share, 1e-3) ** -2 - 1) / 3


def damages(curves: Sequence[Curve], work: Sequence[float]) -> list[Damage]:
    """A damage for each group: its part of the ``work``, times how sensitive it is.

    That is the square root of its curve at half over the median of those that rise, between 1/3
    and 3.
    """
    half = np.array([curve.at_half() for curve in curves])
    middle = float(np.median(half[half > 1e-9])) if (half > 1e-9).any() else 1.0
    factors = np.clip(np.sqrt(half / middle), 1 / 3, 3)
    return [Damage(float(part * factor)) for part, factor in zip(work, factors, strict=True)]


def curves(model: nn.Module, groups: Sequence[Group], scores: Scores, task: Task) -> list[Curve]:
    """One curve for each group, on the calibration split or on made-up examples.

    Units go in the order of ``scores``. ``model`` has the tensors that groups name and is left as
    it was.
    """
    model = copy.deepcopy(model).eval()
    work = max(1, macs(model, task.examples(1))) * (len(groups) * len(SHARES) + 1)
    count = int(np.clip(WORK / work, FEWEST, MOST))
    inputs: Inputs
    targets = None
    if task.splits is None:
        inputs = task.examples(min(count, 32))
    else:
        inputs, given = task.splits.calibrate.head(count)
        # Without a label for each, only what becomes of the outputs tells.
        targets = given if task.kind != "custom" and labelled(given).all() else None
    with threads_for(model, task.examples(1), 32), torch.inference_mode():
        whole = _outputs(model, inputs)
        found = []
        for group, strands in zip(groups, scores, strict=True):
            points = [_judged(task, whole, whole, targets)]
            cuts = [chosen(group, strands, _left(group, share)) for share in SHARES]
            for cut in cuts:
                with zeroed(model, cut):
                    points.append(_judged(task, _outputs(model, inputs), whole, targets))
            shares = (0.0, *(1 - cut.kept / group.width for cut in cuts))
            loss = tuple(point[0] - points[0][0] for point in points)
            found.append(Curve(group.root, shares, loss, tuple(point[1] for point in points)))
    return found


def _left(group: Group, share: float) -> int:
    return max(1, round(group.width * (1 - share)))


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All outputs, each of all examples."""
    parts = []
    for at in range(0, len(inputs[0]), 32):
        parts.append(tensors(model(*(torch.from_numpy(part[at : at + 32]) for part in inputs))))
    return [torch.cat(batches) for batches in zip(*parts, strict=True)]


def _judged(
    task: Task, outputs: Sequence[Tensor], whole: Sequence[Tensor], targets: Array | None
) -> tuple[float, float]:
    changes = [
        float((ours - theirs).square().mean() / theirs.var().clamp_min(1e-12))
        for ours, theirs in zip(outputs, whole, strict=True)
    ]
    if targets is None:
        return sum(changes), float("nan")
    # Labels judge the first output; what others say must not change either.
    loss = float(LABELS[task.kind](outputs[0], torch.from_numpy(targets)))
    judged = value(metrics_of(task)[task.metric], outputs[0].numpy(), targets)
    return loss + sum(changes[1:]), judged


@contextmanager
def zeroed(model: nn.Module, cut: Cut) -> Iterator[None]:
    """In the block, ``model`` has zeros where the cut's units are."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = []
    for unit in units(cut):
        for part in unit:
            tensor, at = tensors[part.parameter], torch.tensor(part.at)
            before.append((tensor, part.dim, at, tensor.index_select(part.dim, at)))
            tensor.index_fill_(part.dim, at, 0)
    try:
        yield
    finally:
        for tensor, dim, at, values in reversed(before):
            tensor.index_copy_(dim, at, values)
