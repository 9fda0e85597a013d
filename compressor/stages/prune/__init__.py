"""Structured pruning: whole channels go, and every cut is proven before it is kept."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import nn

from compressor.artifact import Torch
from compressor.errors import InputError, Unsuitable
from compressor.loading import torchfile
from compressor.loading.edits import Edit, apply
from compressor.measure.costs import Dtype
from compressor.measure.threads import one_thread
from compressor.stages.mask import held
from compressor.stages.prune.criteria import NEED_DATA, NEED_LABELS, scored
from compressor.stages.prune.group import Group
from compressor.stages.prune.ranking import RANKINGS, chosen
from compressor.stages.prune.search import Search, searched
from compressor.stages.prune.sensitivity import Curve, curves
from compressor.stages.prune.sound import Sound
from compressor.stages.prune.targets import QUANTITIES, Quantity
from compressor.task import Task
from compressor.training.recovery import recover
from compressor.training.settings import Training

__all__ = ["Curve", "Sound", "asked", "prune", "sensitivities", "suited"]

Fraction = Annotated[float, Field(gt=0, lt=1)]


def prune(
    artifact: Torch,
    task: Task,
    into: Path,
    *,
    ratio: Annotated[float, Field(ge=0, lt=1)] | None = None,
    macs: Fraction | None = None,
    params: Fraction | None = None,
    size: Fraction | None = None,
    latency: Fraction | None = None,
    dtype: Dtype = "fp32",
    criterion: Literal[
        "l1", "l2", "taylor", "hessian", "fpgm", "lamp", "bn", "activation", "random"
    ] = "l2",
    ranking: Literal["local", "global", "isomorphic"] = "local",
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1,
    attention: Literal["heads", "dimensions"] = "heads",
    keep: tuple[str, ...] = (),
    steps: Annotated[int, Field(ge=1)] = 1,
    epochs: Annotated[int, Field(ge=1)] = 1,
    widths: dict[str, Annotated[int, Field(ge=1)]] | None = None,
) -> Torch:
    """Removes channels, heads and hidden units where that is sound.

    How much is one of: ``ratio`` of the channels of every layer (or, with ``ranking`` ``global`` or
    ``isomorphic``, of all channels together), or until the model costs the given fraction of its
    ``macs``, ``params``, ``size`` (of the ONNX file) or ``latency`` (on the task's target, fp32 or
    with ``dtype`` int8 after static quantization). Counts are rounded for the kernels
    (:func:`~compressor.stages.prune.rounding.kept`). Searches and overall rankings leave every
    layer ``floor`` of its units. ``widths`` gives the units kept by layer, as a search found them.

    Which go is decided by ``criterion`` (:data:`~compressor.stages.prune.criteria.CRITERIA`), over
    everything that is cut together. ``attention`` cuts whole heads or dimensions of every head.
    ``keep`` holds patterns of layer names that are left alone (``fnmatch``); a layer is also left
    alone when one that contains it matches.

    With several ``steps`` the cut is made a part at a time, and after each but the last the model
    is trained for ``epochs`` with the original as teacher; units are ranked anew every time.

    A cut is kept only when the dense model with the cut channels zeroed gives the same output as
    the cut model. Groups that fail are left alone and named with the reason in the facts.

    Raises :class:`InputError` for a pattern that matches nothing, :class:`Unsuitable` when nothing
    can be pruned.
    """
    quantity, amount = asked(
        ratio=ratio, macs=macs, params=params, size=size, latency=latency, widths=widths
    )
    if quantity == "ratio" and not amount:
        raise Unsuitable("a ratio of 0 removes nothing")
    if steps > 1 and task.splits is None:
        raise Unsuitable("no data to train on between the steps: add --data SPEC")
    dense, before = torchfile.open_model(artifact, task)
    task = replace(task, source=torchfile.origin(artifact))  # a student is another than the task's
    _match(dense, keep)
    facts: dict[str, Any] = {"asked": amount}
    left: dict[str, str] = {}
    with one_thread(), torch.enable_grad():
        sound = Sound(dense, task, attention)
        groups = _allowed(sound, keep, left)
        if widths is not None:
            goals = _given(widths, groups)
        elif quantity == "ratio":
            counts = RANKINGS[ranking](
                sound.model,
                groups,
                amount,
                floor,
                lambda groups: scored(sound.model, groups, task, criterion),
            )
            goals = dict(zip((group.root for group in groups), counts, strict=True))
        else:
            what = Search(cast("Quantity", quantity), amount, dtype, criterion, floor)
            goals, seen = searched(what, sound, groups, before, task, left)
            facts |= seen
        for group in groups:
            if goals.get(group.root) == group.width:
                left[group.root] = _untouched(quantity, amount, group)
        taken = _taken(sound, artifact, task, goals, criterion, steps, epochs, left)
    if not taken.layers:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in list(left.items())[:3])
        raise Unsuitable(f"nothing could be pruned ({reasons or 'no layer with channels to cut'})")
    path = into.with_name(into.name + torchfile.SUFFIX)
    torchfile.write(path, taken.model, task.source, [*before, *taken.edits])
    settings: dict[str, Any] = {
        quantity: amount,
        "criterion": criterion,
        "ranking": ranking,
        "floor": floor,
        "attention": attention,
        "keep": list(keep),
        "steps": steps,
        "epochs": epochs,
    }
    if quantity == "latency":
        settings["dtype"] = dtype
    if quantity == "latency" or widths is not None:
        # What was measured decided: a replay takes the decision, not another measurement.
        settings["widths"] = {root: goals[root] for root in sorted(goals)}
    had, has = (sum(pair[at] for pair in taken.layers.values()) for at in (0, 1))
    return artifact.then(
        path,
        "torch",
        "prune",
        settings,
        **facts,
        reached=1 - has / had,
        layers=taken.layers,
        left_alone=left,
        proof={"max_abs_diff": taken.difference, "dtype": str(sound.dtype).partition(".")[2]},
    )


def _match(dense: nn.Module, keep: Sequence[str]) -> None:
    layers = [name for name, _ in dense.named_modules() if name]
    for pattern in keep:
        if not any(_within(layer, pattern) for layer in layers):
            raise InputError(
                f"--keep {pattern!r} matches no layer: layers are {', '.join(layers[:8])} ..."
            )


def _within(layer: str, pattern: str) -> bool:
    """Whether the layer or one that contains it matches: ``layer1`` keeps ``layer1.0.conv1``."""
    parts = layer.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _allowed(sound: Sound, keep: Sequence[str], left: dict[str, str]) -> list[Group]:
    """The groups that the user did not keep; the others go to ``left`` with the reason."""
    left |= sound.left
    groups = []
    for group in sound.groups:
        layers = (group.root, *group.layers)
        if any(_within(layer, pattern) for pattern in keep for layer in layers):
            left[group.root] = "asked for with keep"
        else:
            groups.append(group)
    return groups


def _given(widths: Mapping[str, int], groups: Sequence[Group]) -> dict[str, int]:
    """Widths that were handed in, compared with the model."""
    known = {group.root: group.width for group in groups}
    for root, count in widths.items():
        if root not in known:
            raise InputError(f"widths: {root!r} is no layer that can be cut: {', '.join(known)}")
        if count > known[root]:
            raise InputError(f"widths: {root!r} has {known[root]} units, so it cannot keep {count}")
    return dict(widths)


def _untouched(quantity: str, amount: float, group: Group) -> str:
    if quantity == "ratio":
        return f"{amount:g} of {group.width} {group.kind} rounds to none"
    return f"cutting it would cost more than it saves on the way to {quantity}={amount:g}"


class _Taken(NamedTuple):
    """The cut model, the edits that made it, and channels before and after by layer."""

    model: nn.Module
    edits: list[Edit]
    layers: dict[str, list[int]]
    difference: float


def _taken(
    sound: Sound,
    artifact: Torch,
    task: Task,
    goals: Mapping[str, int],
    criterion: str,
    steps: int,
    epochs: int,
    left: dict[str, str],
) -> _Taken:
    """Cuts down to ``goals``, an equal part of the way at every step, with training between."""
    model, worst = sound.dense, 0.0
    edits: list[Edit] = []
    layers: dict[str, list[int]] = {}
    widths = {group.root: group.width for group in sound.groups}
    for step in range(1, steps + 1):
        if step > 1:
            with held(model, artifact):
                recover(model, task, Training(epochs=epochs))
            sound = Sound(model, task, sound.attention)
        groups = [
            group for group in sound.groups if goals.get(group.root, group.width) < group.width
        ]
        scores = scored(sound.model, groups, task, criterion)
        cuts = []
        for group, each in zip(groups, scores, strict=True):
            whole, goal = widths[group.root], goals[group.root]
            count = whole - round((whole - goal) * step / steps)
            if count < group.width:
                cuts.append(chosen(group, each, count))
        proven = sound.most(cuts, left)
        for cut in proven.cuts:
            root, each_unit = cut.group.root, cut.group.each
            layers.setdefault(root, [widths[root] * each_unit, 0])[1] = cut.kept * each_unit
        edits += proven.edits
        worst = max(worst, proven.difference)
        model = apply(copy.deepcopy(model), proven.edits)
    return _Taken(model, edits, layers, worst)


def suited(task: Task, **settings: Any) -> None:
    """Raises :class:`InputError` for settings that do not fit the task, before any work."""
    build = next(iter(task.students.values()), task.model)
    _match(build(), settings["keep"])
    if task.splits is None and settings["criterion"] in NEED_DATA:
        raise InputError(
            f"criterion {settings['criterion']!r} needs data: add --data SPEC, or use l2"
        )
    if settings["criterion"] in NEED_LABELS and (task.kind == "custom" or not task.labelled):
        raise InputError(f"criterion {settings['criterion']!r} needs labels: use l2 or activation")


def asked(**settings: Any) -> tuple[str, float]:
    """The quantity that was asked for and how much of it.

    Raises :class:`InputError` unless exactly one was.
    """
    given = {
        name: settings[name] for name in ("ratio", *QUANTITIES) if settings.get(name) is not None
    }
    if len(given) != 1:
        said = ", ".join(f"{name} = {value:g}" for name, value in given.items()) or "none of them"
        raise InputError(f"prune takes one of ratio, {', '.join(QUANTITIES)}; it has {said}")
    return next(iter(given.items()))


def sensitivities(task: Task, criterion: str = "l2", attention: str = "heads") -> list[Curve]:
    """For every group that can be cut, what cutting it alone costs on the calibration split."""
    with one_thread():
        sound = Sound(task.model().eval(), task, attention)
        scores = scored(sound.model, sound.groups, task, criterion)
        return curves(sound.model, sound.groups, scores, task)
