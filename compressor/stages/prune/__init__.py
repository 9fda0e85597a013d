"""Structured pruning: whole channels go, and every cut is proven before it is kept."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from compressor.artifact import Torch
from compressor.errors import InputError, Unsuitable
from compressor.loading import torchfile
from compressor.loading.edits import apply
from compressor.stages.prune.cutting import Cut, cut
from compressor.stages.prune.groups import Group, groups_of
from compressor.stages.prune.proof import disproof, precision
from compressor.stages.prune.rounding import kept
from compressor.stages.threads import one_thread
from compressor.task import Task

__all__ = ["prune"]


def prune(
    artifact: Torch,
    task: Task,
    into: Path,
    *,
    ratio: Annotated[float, Field(ge=0, lt=1)],
    norm: Literal["l1", "l2"] = "l2",
    keep: tuple[str, ...] = (),
) -> Torch:
    """Removes ``ratio`` of the channels of every layer where that is sound.

    Channels that depend on each other are found with torch-pruning's dependency graph (Fang et al.
    2023, DepGraph) and ranked by the group's L1 or L2 norm. Counts are rounded for the kernels
    (:func:`~compressor.stages.prune.rounding.kept`). ``keep`` holds patterns of layer names that
    are left alone (``fnmatch``); a layer is also left alone when one that contains it matches.

    A cut is kept only when the dense model with the cut channels zeroed gives the same output as
    the cut model. Groups that fail are left alone and named with the reason in the facts.

    Raises :class:`InputError` for a pattern that matches nothing, :class:`Unsuitable` when nothing
    can be pruned.
    """
    if not ratio:
        raise Unsuitable("a ratio of 0 removes nothing")
    dense, before = torchfile.open_model(artifact, task)
    layers = [name for name, _ in dense.named_modules() if name]
    for pattern in keep:
        if not any(_within(layer, pattern) for layer in layers):
            raise InputError(
                f"--keep {pattern!r} matches no layer: layers are {', '.join(layers[:8])} ..."
            )
    with one_thread(), torch.enable_grad():
        found, left = groups_of(dense, task.examples(1), norm)
        cuts = _wanted(found, ratio, keep, left)
        proven = _proven(dense, cuts, task, left)
    if not proven.cuts:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in list(left.items())[:3])
        raise Unsuitable(f"nothing could be pruned ({reasons or 'no layer with channels to cut'})")
    path = into.with_name(into.name + torchfile.SUFFIX)
    torchfile.write(path, apply(dense, proven.edits), task.source, [*before, *proven.edits])
    return artifact.then(
        path,
        "torch",
        "prune",
        {"ratio": ratio, "norm": norm, "keep": list(keep)},
        asked=ratio,
        reached=sum(len(cut.gone) for cut in proven.cuts) / sum(cut.width for cut in proven.cuts),
        layers={cut.root: [cut.width, cut.width - len(cut.gone)] for cut in proven.cuts},
        left_alone=left,
        proof={"max_abs_diff": proven.difference, "dtype": proven.dtype},
    )


def _within(layer: str, pattern: str) -> bool:
    """Whether the layer or one that contains it matches: ``layer1`` keeps ``layer1.0.conv1``."""
    parts = layer.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _wanted(
    found: list[Group], ratio: float, keep: tuple[str, ...], left: dict[str, str]
) -> list[Cut]:
    """The cuts that were asked for; what is not cut goes into ``left`` with the reason."""
    cuts = []
    for group in found:
        width = len(group.scores)
        count = kept(width, ratio)
        if any(_within(layer, pattern) for pattern in keep for layer in group.layers):
            left[group.root] = "asked for with keep"
        elif count == width:
            left[group.root] = f"{ratio:g} of {width} channels rounds to none"
        else:
            order = group.scores.argsort(stable=True)
            cuts.append(Cut(group.root, tuple(sorted(order[: width - count].tolist())), width))
    return cuts


class Proven(NamedTuple):
    """Cuts that are sound together, their edits, and the largest difference in the proof."""

    cuts: list[Cut]
    edits: list[dict[str, Any]]
    difference: float
    dtype: str


def _proven(dense: nn.Module, cuts: list[Cut], task: Task, left: dict[str, str]) -> Proven:
    """As many of ``cuts`` as are sound together; the others go into ``left`` with the reason.

    All at once first, since that is the common case. Where it fails, each half is added on its
    own, halved again where that fails: a few unsound groups among many take few attempts.
    """
    examples = task.examples(7)
    dtype = precision(dense, examples)
    nothing = Proven([], [], 0.0, str(dtype).removeprefix("torch."))

    def added(sound: Proven, more: list[Cut]) -> Proven:
        if not more:
            return sound
        tried = [*sound.cuts, *more]
        try:
            edits = cut(dense, tried, task.examples(1))
            difference, wrong = disproof(dense, edits, examples, dtype)
        except Exception as error:
            wrong = f"torch-pruning cannot cut it ({type(error).__name__})"
        else:
            if not wrong:
                return sound._replace(cuts=tried, edits=edits, difference=difference)
        if len(more) == 1:
            left[more[0].root] = wrong
            return sound
        half = len(more) // 2
        return added(added(sound, more[:half]), more[half:])

    return added(nothing, cuts)
