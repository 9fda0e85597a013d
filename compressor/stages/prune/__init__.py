"""Structured pruning: whole channels go, and every cut is proven before it is kept."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from compressor.artifact import Torch
from compressor.errors import InputError, Unsuitable
from compressor.loading import torchfile
from compressor.loading.edits import apply
from compressor.stages.prune.cutting import Cut, cut
from compressor.stages.prune.groups import groups_of
from compressor.stages.prune.proof import disproof
from compressor.stages.prune.rounding import kept
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
    are left alone (``fnmatch``).

    A cut is kept only when the dense model with the cut channels zeroed gives the same output as
    the cut model. Groups that fail are left alone and named with the reason in the facts.

    Raises :class:`InputError` for a pattern that matches nothing, :class:`Unsuitable` when nothing
    can be pruned.
    """
    dense, before = torchfile.open_model(artifact, task)
    layers = [name for name, _ in dense.named_modules() if name]
    for pattern in keep:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise InputError(
                f"--keep {pattern!r} matches no layer: layers are {', '.join(layers[:8])} ..."
            )
    found, left = groups_of(dense, task.examples(1), norm)
    cuts: list[Cut] = []
    for group in found:
        count = kept(len(group.scores), ratio)
        if any(fnmatchcase(layer, pattern) for pattern in keep for layer in group.layers):
            left[group.root] = "asked for with keep"
        elif count < len(group.scores):
            order = group.scores.argsort(stable=True)
            gone = sorted(order[: len(group.scores) - count].tolist())
            cuts.append(Cut(group.root, tuple(gone), len(group.scores)))
        elif ratio:
            left[group.root] = f"{ratio:g} of {len(group.scores)} channels rounds to none"
    sound, edits, error = _proven(dense, cuts, task, left)
    if not sound:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in list(left.items())[:3])
        raise Unsuitable(f"nothing could be pruned ({reasons or 'no layer with channels to cut'})")
    model = apply(copy.deepcopy(dense), edits)
    path = into.with_name(into.name + torchfile.SUFFIX)
    found_header = torchfile.header(artifact.path)
    assert found_header is not None
    torchfile.write(path, model, found_header["source"], [*before, *edits])
    removed, total = sum(len(one.gone) for one in sound), sum(one.width for one in sound)
    return artifact.then(
        path,
        "torch",
        "prune",
        {"ratio": ratio, "norm": norm, "keep": list(keep)},
        asked=ratio,
        reached=removed / total,
        layers={one.root: [one.width, one.width - len(one.gone)] for one in sound},
        left_alone=left,
        proof={"max_abs_diff": error, "dtype": "float64"},
    )


def _proven(
    dense: Any, cuts: list[Cut], task: Task, left: dict[str, str]
) -> tuple[list[Cut], list[dict[str, Any]], float]:
    """The cuts that are sound together, their edits and the proof's largest difference.

    All at once first, since that is the common case; where it fails, each group on its own, and
    then those that passed, added one after the other.
    """
    examples = task.examples(7)

    def attempt(tried: list[Cut]) -> tuple[list[dict[str, Any]], float, str]:
        try:
            edits = cut(dense, tried, task.examples(1))
        except Exception as error:
            return [], 0.0, f"torch-pruning cannot cut it ({type(error).__name__})"
        return edits, *disproof(dense, edits, examples)

    if not cuts:
        return [], [], 0.0
    edits, error, wrong = attempt(cuts)
    if not wrong:
        return cuts, edits, error
    sound: list[Cut] = []
    passed: tuple[list[dict[str, Any]], float] = ([], 0.0)
    for one in cuts:
        edits, error, wrong = attempt([*sound, one])
        if wrong:
            left[one.root] = wrong
        else:
            sound, passed = [*sound, one], (edits, error)
    return sound, *passed
