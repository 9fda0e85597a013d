"""How much each unit matters: the least go first.

The reduction over a group's tensors and the normalisation are torch-pruning's (Fang et al. 2023,
DepGraph); it is handed every tensor of a strand as a matrix with one row per unit, so that gates,
heads and flattened inputs are ranked the way convolutions are. Counted are parameters of two axes
or more and the scales of normalisation layers; not biases, and not running statistics.

Scores can be compared between groups. Taylor and Hessian are left as they are, in units of the
loss: every tensor of a unit gives an estimate of what the loss loses with it, and the mean over the
tensors is one more, whatever the group. The others have no common unit and are divided by the mean
of their strand; LAMP brings its own scale, at most 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from compressor.errors import InputError, StageError
from compressor.loading.task import first
from compressor.stages.prune.group import Group, Unit
from compressor.task import Batch, Task
from compressor.training.losses import LABELS

EXAMPLES = 256
"""At most so many examples of ``calibrate`` are read."""

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

Strand = tuple[Unit, ...]
Criterion = Callable[[nn.Module, Sequence[Strand], Task], list[Tensor]]


class Item:
    """What torch-pruning reads of a member of its groups."""

    def __init__(self, dep: Any, idxs: list[int], root_idxs: list[int]) -> None:
        self.dep, self.idxs, self.root_idxs = dep, idxs, root_idxs

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dep, self.idxs))


class Member(NamedTuple):
    """One tensor of a strand along one axis: row ``i`` of ``rows`` is of unit ``units[i]``."""

    units: tuple[int, ...]
    rows: Tensor


def scored(
    model: nn.Module, groups: Sequence[Group], task: Task, criterion: str
) -> list[tuple[Tensor, ...]]:
    """For each group one float64 tensor ``(width,)`` per strand: finite, and at least 0.

    ``criterion`` is a key of :data:`CRITERIA`. ``model``, in eval mode, has the tensors that the
    groups name and is not changed; frozen parameters are scored like others. Taylor, Hessian and
    activation read the first 256 examples of ``task.splits.calibrate``.

    Raises :class:`InputError` for an unknown criterion or one that needs data that the task lacks,
    :class:`StageError` for a strand without weights and for weights or gradients that are not
    finite.
    """
    if criterion not in CRITERIA:
        raise InputError(f"criterion {criterion!r} is unknown: use one of {', '.join(CRITERIA)}")
    strands = [strand for group in groups for strand in group.strands]
    scores = iter(CRITERIA[criterion](model, strands, task))
    return [tuple(next(scores) for _ in group.strands) for group in groups]


def l1(model: nn.Module, strands: Sequence[Strand], task: Task) -> list[Tensor]:
    """Sum of absolute weights (Li et al. 2017), over the group (Fang et al. 2023)."""
    return _magnitude(_parameters(model, strands), strands, p=1)


def l2(model: nn.Module, strands: Sequence[Strand], task: Task) -> list[Tensor]:
    """Sum of squared weights over the group: the group's L2 norm squared, as in torch-pruning."""
    return _magnitude(_parameters(model, strands), strands, p=2)


def lamp(model: nn.Module, strands: Sequence[Strand], task: Task) -> list[Tensor]:
    """Squared weights by the sum of all that are not smaller (Lee et al. 2021): at most 1."""
    return _magnitude(_parameters(model, strands), strands, p=2, normalizer="lamp")


def fpgm(model: nn.Module, strands: Sequence[Strand], task: Task) -> list[Tensor]:
    """Distance to all other units: what is near the geometric median can go (He et al. 2019).

    As in torch-pruning the distances are those of squared weights, and scales are not counted.
    Unlike there the many inputs that a flattened channel feeds are one unit, not many.
    """
    import torch_pruning

    importance = torch_pruning.importance.FPGMImportance()
    weights = {
        name: weight for name, weight in _parameters(model, strands).items() if weight.ndim > 1
    }
    return [_reduced(_members(strand, weights), len(strand), importance) for strand in strands]


def bn(model: nn.Module, strands: Sequence[Strand], task: Task) -> list[Tensor]:
    """Absolute BatchNorm scale (Liu et al. 2017).

    A strand of which not every unit is scaled by a BatchNorm is ranked by its L2 norm: like a
    scale it doubles when the weights do, and it has the same mean of 1.
    """
    weights = _parameters(model, strands)
    scales = {
        name: weight
        for name, weight in weights.items()
        if isinstance(_owner(model, name), nn.modules.batchnorm._BatchNorm)
    }
    squares = iter(_magnitude(weights, strands, p=2))
    scores = []
    for strand in strands:
        members = _members(strand, scales)
        root = next(squares).sqrt()
        if _covered(members, len(strand)):
            scores += _magnitude(scales, [strand], p=1)
        else:
            scores.append(root / root.mean() if root.any() else root)
    return scores


def taylor(model: nn.Module, strands: Sequence[Strand], task: Task) -> list[Tensor]:
    """``|weight * gradient|`` of the label loss, first order (Molchanov et al. 2019), loss units.

    The paper squares each product; absolute ones are losses. Mean over batches of 32, as in the
    paper: over all examples the gradient of a trained model is about zero and says nothing.
    """
    # Not torch-pruning's own: it looks for the scale of a BatchNorm under GroupNorm's function.
    return _salient(model, strands, task, "taylor", 32, lambda w, g: (w * g).abs())


def hessian(model: nn.Module, strands: Sequence[Strand], task: Task) -> list[Tensor]:
    """``weight^2 E[gradient^2] / 2``: Optimal Brain Damage (LeCun et al. 1989), loss units.

    The diagonal of the Hessian is taken from the empirical Fisher matrix. Its gradients are those
    of single examples: a batch's gradient is a mean, whose square shrinks with the batch.
    """
    # Not torch-pruning's own: it looks gradients up by name but keeps them by parameter, so that
    # every example overwrites the one before.
    return _salient(model, strands, task, "hessian", 1, lambda w, g: w.square() * g.square() / 2)


def activation(model: nn.Module, strands: Sequence[Strand], task: Task) -> list[Tensor]:
    """Mean absolute value of what the unit's consumers read.

    Consumers are linear and convolutional layers of which the unit has a slice on the input axis.
    A strand of which not every unit has one that can be watched is ranked by L2: attention and
    recurrent layers read their inner weights without a layer's forward.
    """
    read = _read(model, task)
    squares = iter(l2(model, strands, task))
    importance = _importance(p=1)
    scores = []
    for strand in strands:
        members = [
            Member(units, read[name].values[at].mean(dim=1, keepdim=True))
            for name, dim, units, at in _places(strand)
            if name in read and read[name].dim == dim
        ]
        fallback = next(squares)
        covered = _covered(members, len(strand))
        scores.append(_reduced(members, len(strand), importance) if covered else fallback)
    return scores


def random(model: nn.Module, strands: Sequence[Strand], task: Task) -> list[Tensor]:
    """Uniform in [0, 1), seeded by the task: what any criterion must beat."""
    generator = torch.Generator().manual_seed(task.seed)
    return [torch.rand(len(strand), dtype=torch.float64, generator=generator) for strand in strands]


CRITERIA: dict[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "taylor": taylor,
    "hessian": hessian,
    "fpgm": fpgm,
    "lamp": lamp,
    "bn": bn,
    "activation": activation,
    "random": random,
}

NEED_DATA = ("taylor", "hessian", "activation")
"""Criteria that read the calibration split."""

NEED_LABELS = ("taylor", "hessian")
"""Those of them that read its labels, by a loss of ours."""


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _parameters(model: nn.Module, strands: Sequence[Strand]) -> dict[str, Tensor]:
    """The parameters that count, of those that the strands name."""
    named = {part.parameter for strand in strands for unit in strand for part in unit}
    return {
        name: tensor
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if name in named
        and (
            tensor.ndim > 1
            or (name.rpartition(".")[2] == "weight" and isinstance(_owner(model, name), NORMS))
        )
    }


class Place(NamedTuple):
    """Where units are in one tensor: row ``i`` of ``at`` is of unit ``units[i]``."""

    parameter: str
    dim: int
    units: tuple[int, ...]
    at: Tensor


def _places(strand: Strand) -> list[Place]:
    """Tensors and axes of the strand. After a split some hold only a part of the units."""
    found: dict[tuple[str, int, int], dict[int, tuple[int, ...]]] = {}
    for position, unit in enumerate(strand):
        whole: dict[tuple[str, int], tuple[int, ...]] = {}
        for name, dim, at in unit:
            whole[name, dim] = whole.get((name, dim), ()) + at
        for (name, dim), at in whole.items():
            found.setdefault((name, dim, len(at)), {})[position] = at
    return [
        Place(name, dim, tuple(rows), torch.tensor(list(rows.values())))
        for (name, dim, _), rows in found.items()
    ]


def _members(strand: Strand, tensors: Mapping[str, Tensor]) -> list[Member]:
    return [
        Member(units, tensors[name].detach().cpu().movedim(dim, 0)[at].flatten(1).double())
        for name, dim, units, at in _places(strand)
        if name in tensors
    ]


def _covered(members: Sequence[Member], width: int) -> bool:
    return len({unit for member in members for unit in member.units}) == width


def _importance(p: int, normalizer: str | None = "mean") -> Any:
    import torch_pruning

    return torch_pruning.importance.GroupMagnitudeImportance(p=p, normalizer=normalizer)


def _magnitude(
    tensors: Mapping[str, Tensor], strands: Sequence[Strand], p: int, normalizer: str = "mean"
) -> list[Tensor]:
    importance = _importance(p, normalizer)
    return [_reduced(_members(strand, tensors), len(strand), importance) for strand in strands]


def _reduced(members: Sequence[Member], width: int, importance: Any) -> Tensor:
    """torch-pruning's ``importance`` of stand-in layers that hold the rows of ``members``."""
    from torch_pruning.pruner.function import prune_linear_out_channels

    if not members:
        raise StageError("a group has no weights to rank its units by")
    peak = float(torch.stack([member.rows.abs().max() for member in members]).max())
    if not np.isfinite(peak):
        raise StageError("weights or gradients are not finite: units cannot be ranked")
    if not peak:
        return torch.zeros(width, dtype=torch.float64)
    # The first decides the width there; it is whole but where no tensor has all units.
    most, *others = sorted(members, key=lambda member: -len(member.units))
    whole = torch.zeros(width, most.rows.shape[1], dtype=torch.float64)
    whole[list(most.units)] = most.rows
    items = []
    for units, rows in (Member(tuple(range(width)), whole), *others):
        layer = nn.Linear(1, 1, bias=False, device="meta")  # on meta it draws no random numbers
        # Sums there are float32: small saliencies would vanish in it, large ones overflow.
        layer.weight = nn.Parameter(rows / peak, requires_grad=False)
        dependency = SimpleNamespace(layer=layer, pruning_fn=prune_linear_out_channels)
        items.append(Item(dependency, list(range(len(units))), list(units)))
    # Units that are all alike have no distance: their mean is 0.
    scores: Tensor = importance(items).double().nan_to_num(nan=0.0)
    return scores if importance.normalizer else scores * peak**importance.p


def _batches(task: Task, criterion: str, size: int) -> Iterator[Batch]:
    if task.splits is None:
        raise InputError(f"criterion {criterion!r} needs data: add --data SPEC, or use l2")
    calibrate = task.splits.calibrate
    return calibrate.take(np.arange(min(EXAMPLES, len(calibrate)))).batches(size)


def _salient(
    model: nn.Module,
    strands: Sequence[Strand],
    task: Task,
    criterion: str,
    size: int,
    saliency: Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """Mean over batches of ``size`` of ``saliency(weight, gradient)``, reduced, in loss units."""
    batches = _batches(task, criterion, size)
    trial = copy.deepcopy(model).eval().requires_grad_(True)
    weights = _parameters(trial, strands)
    total = {
        name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()
    }
    examples = 0
    for inputs, targets in batches:
        with torch.enable_grad():
            outputs = first(trial(*map(torch.from_numpy, inputs)))
            loss = LABELS[task.kind](outputs, torch.from_numpy(targets))
            gradients = torch.autograd.grad(loss, [*weights.values()], materialize_grads=True)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            total[name] += saliency(weight.detach().double(), gradient.double()) * len(targets)
        examples += len(targets)
    # The sum of squares of roots is the sum of saliencies, and torch-pruning sums squares.
    roots = {name: (summed / examples).sqrt() for name, summed in total.items()}
    importance = _importance(p=2, normalizer=None)
    return [_reduced(_members(strand, roots), len(strand), importance) for strand in strands]


class Read(NamedTuple):
    """What the input axis ``dim`` of a weight meets: mean absolute values, ``(size,)``."""

    dim: int
    values: Tensor


def _read(model: nn.Module, task: Task) -> dict[str, Read]:
    """By weight what linear and convolutional layers read on ``calibrate``."""
    batches = _batches(task, "activation", 32)
    trial = copy.deepcopy(model).eval().requires_grad_(True)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, layer: nn.Linear | nn.modules.conv._ConvNd) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = (*args, *kwargs.values())[0].detach()
            each = given.movedim(1 - layer.weight.ndim, 0).flatten(1).abs().double()
            sums[name] = sums.get(name, 0) + each.sum(dim=1)
            counts[name] = counts.get(name, 0) + each.shape[1]

        layer.register_forward_pre_hook(hook, with_kwargs=True)

    for name, layer in trial.named_modules():
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            watch(name, layer)
    # With gradients transformers take the way through their layers, not the fused one.
    with torch.enable_grad():
        for inputs, _ in batches:
            trial(*map(torch.from_numpy, inputs))
    read = {}
    for name, summed in sums.items():
        layer = trial.get_submodule(name)
        mean = summed / counts[name]
        if getattr(layer, "transposed", False):
            found = Read(0, mean)
        else:  # the parts of a grouped convolution read through the same positions of the weight
            found = Read(1, mean.reshape(getattr(layer, "groups", 1), -1).mean(dim=0))
        read[f"{name}.weight".removeprefix(".")] = found
    return read
