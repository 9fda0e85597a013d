"""Training that pulls whole units towards zero, so that the cut that follows costs less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.artifact import Torch
from compressor.errors import Unsuitable
from compressor.loading import torchfile
from compressor.measure.threads import one_thread
from compressor.stages.mask import held
from compressor.stages.prune.group import Group
from compressor.stages.prune.rewriting import attentions
from compressor.stages.prune.sound import Sound
from compressor.task import Task
from compressor.training.recovery import clean, epochs_for, recover
from compressor.training.settings import DEFAULT, Training

STRENGTH = {"bn": 1e-4, "group": 3e-3}
"""Without ``strength``. Network Slimming's own for scales; for groups, 1e-4 did nothing on a CNN
for the digits that kept its accuracy through a cut by half after 3e-3."""

SMALL = 0.01
"""Units are counted as small below this fraction of the median of their layer before training."""


def sparsify(
    artifact: Torch,
    task: Task,
    into: Path,
    *,
    penalty: Literal["bn", "group"] = "group",
    strength: Annotated[float, Field(gt=0)] | None = None,
    training: Training = DEFAULT,
) -> Torch:
    """Trains as :func:`~compressor.stages.distill.distill` does, and adds ``strength`` * penalty.

    ``bn``: the sum of absolute BatchNorm scales (Network Slimming, Liu et al. 2017). ``group``: the
    group lasso over the units that pruning would cut (Wen et al. 2016; over coupled layers as in
    Fang et al. 2023): the sum over units of ``sqrt(elements) * L2 norm`` of all their trainable
    slices, biases included since a unit with a bias still says something. An element in two slices
    of a unit counts twice. Attention layers of PyTorch are rewritten as pruning would.

    The weights of the last epoch stay. Those that do best on the validation split, which recovery
    keeps, would often be the first ones: the penalty gives accuracy away for zeros. ``history``
    says how much. ``epochs`` of ``None`` means as many as show about 60,000 examples, 1 to 60.

    The facts have before and after training: ``penalty``, in loss units; ``shares``, each layer's
    part of it; ``small``, how many of all ``units`` have a norm under 1 % of the median of their
    layer before training.

    Raises :class:`Unsuitable` without data, and where nothing can be penalised.
    """
    if task.splits is None:
        raise Unsuitable("no data to train on: add --data SPEC")
    how = replace(training, epochs=training.epochs or epochs_for(task))
    model, edits = torchfile.open_model(artifact, task)
    if penalty == "bn":
        units = scales_of(model)
        if not units.layers:
            raise Unsuitable("no BatchNorm with scales to train: use penalty group")
    else:
        with one_thread(), torch.enable_grad():
            sound = Sound(model, task, "heads")
        if sound.model is not model:
            edits, model = [*edits, *attentions(model)], sound.model
        units = units_of(model, sound.groups)
        if not units.layers:
            raise Unsuitable("no units that can be cut and trained")
    strength = STRENGTH[penalty] if strength is None else strength

    with torch.no_grad():
        before = units.norms()
    with held(model, artifact):
        fitted = recover(
            model,
            task,
            how,
            penalty=lambda: strength * units.penalty(),
            keep="last",
            into=into,
            key=f"{artifact.digest} {how.to_json()} {penalty} {strength} {task.reads} {task.seed}",
        )
    with torch.no_grad():
        after = units.norms()
    path = into.with_name(into.name + torchfile.SUFFIX)
    torchfile.write(path, model, torchfile.origin(artifact), edits)
    clean(into)
    settings = {
        "penalty": penalty,
        "strength": strength,
        **how.to_json(),
    }
    shares = [units.shares(norms) for norms in (before, after)]
    return artifact.then(
        path,
        "torch",
        "sparsify",
        settings,
        training=fitted.facts,
        history=fitted.history,
        penalty=[strength * float(norms @ units.scale) for norms in (before, after)],
        shares={layer: [share[layer] for share in shares] for layer in shares[0]},
        units=len(before),
        small=[units.small(norms, before) for norms in (before, after)],
    )


class Units(NamedTuple):
    """Units of a model, laid out so that all their norms are a few operations.

    ``axes`` are parameters and one axis of each. Laid end to end, slice ``at[i]`` of these axes is
    of unit ``unit[i]``. The norm of unit ``j`` counts ``scale[j]`` times. ``layers`` are names and
    how many units each has, in order.
    """

    axes: tuple[tuple[nn.Parameter, int], ...]
    at: Tensor
    unit: Tensor
    scale: Tensor
    layers: tuple[tuple[str, int], ...]

    def norms(self) -> Tensor:
        """The L2 norm of every unit, shape ``(units,)``. At zero its gradient is zero."""
        squares = [
            parameter.square().movedim(axis, 0).flatten(1).sum(1)
            if parameter.ndim > 1
            else parameter.square()
            for parameter, axis in self.axes
        ]
        elements = torch.cat(squares)  # where the model trains, which may be a GPU
        at, unit, scale = (one.to(elements.device) for one in (self.at, self.unit, self.scale))
        summed = torch.zeros_like(scale).index_add(
            0, unit, elements.index_select(0, at).to(scale.dtype)
        )
        return summed.clamp_min(torch.finfo(summed.dtype).tiny).sqrt()

    def penalty(self) -> Tensor:
        """The sum of all norms, each times its scale."""
        norms = self.norms()
        return norms @ self.scale.to(norms.device)

    def shares(self, norms: Tensor) -> dict[str, float]:
        """Each layer's part of the penalty, in all 1."""
        parts = torch.split(norms * self.scale, [count for _, count in self.layers])
        whole = float(norms @ self.scale)
        shares: dict[str, float] = {}
        for (layer, _), part in zip(self.layers, parts, strict=True):
            shares[layer] = shares.get(layer, 0.0) + float(part.sum()) / whole
        return shares

    def small(self, norms: Tensor, before: Tensor) -> int:
        """How many norms are below :data:`SMALL` of the median ``before`` of their layer."""
        sizes = [count for _, count in self.layers]
        pairs = zip(torch.split(norms, sizes), torch.split(before, sizes), strict=True)
        return sum(int((now < SMALL * then.median()).sum()) for now, then in pairs)


def scales_of(model: nn.Module) -> Units:
    """Every trainable BatchNorm scale as a unit of its own."""
    found = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.affine and module.weight.requires_grad
    }
    layers = tuple((name, len(scale)) for name, scale in found.items())
    at = torch.arange(sum(count for _, count in layers))
    axes = tuple((scale, 0) for scale in found.values())
    return Units(axes, at, at, torch.ones(len(at)), layers)


def units_of(model: nn.Module, groups: Sequence[Group]) -> Units:
    """The units of ``groups``, whose parameters are ``model``'s; those all frozen are left out."""
    trained = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }
    starts: dict[tuple[str, int], int] = {}
    end = 0
    at: list[int] = []
    owner: list[int] = []
    elements: list[int] = []
    layers: list[tuple[str, int]] = []
    for group in groups:
        count = len(elements)
        for unit in (unit for strand in group.strands for unit in strand):
            parts = [part for part in unit if part.parameter in trained]
            for name, dim, positions in parts:
                if (name, dim) not in starts:
                    starts[name, dim] = end
                    end += trained[name].shape[dim]
                at += [starts[name, dim] + position for position in positions]
                owner += [len(elements)] * len(positions)
            if parts:
                sizes = ((trained[name], dim, len(where)) for name, dim, where in parts)
                elements.append(sum(one.numel() // one.shape[dim] * n for one, dim, n in sizes))
        if len(elements) > count:
            layers.append((group.root, len(elements) - count))
    return Units(
        tuple((trained[name], dim) for name, dim in starts),
        torch.tensor(at, dtype=torch.long),
        torch.tensor(owner, dtype=torch.long),
        torch.tensor(elements).sqrt(),
        tuple(layers),
    )
