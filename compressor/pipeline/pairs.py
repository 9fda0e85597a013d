"""Both files of a variant, as two reports name them, and examples that either takes.

A report may come from anywhere: nothing that it says is believed before it is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from compressor.artifact import Artifact, digest
from compressor.errors import InputError
from compressor.loading import onnxfile
from compressor.loading.onnxfile import Asked, OnnxFile, Slot
from compressor.measurement import Target
from compressor.report import Report
from compressor.task import Input


class Pair(NamedTuple):
    """Both files of a variant, and what they take."""

    old: Artifact
    new: Artifact
    inputs: tuple[Input, ...]


Opened = tuple[Artifact, OnnxFile]


class Unfit(Exception):
    """Why a variant cannot be timed again, and whose file is to blame: OLD's fails nothing."""

    def __init__(self, side: str, why: object) -> None:
        super().__init__(f"cannot be timed again: {why}")
        self.verdict = "fails" if side == "NEW" else "n/a"


def refuse(asked: Mapping[str, Asked], files: Iterable[tuple[Opened, Opened]]) -> None:
    """Raises :class:`InputError` for an ``--input`` that no file has."""
    known = {slot.name: slot for both in files for _, file in both for slot in file.slots}
    for name in asked:
        if known and name not in known:
            raise InputError(
                f"--input {name}: no file has such an input; known: {', '.join(known)}"
            )


def opened(made: Mapping[str, Any], report: Report, side: str) -> Opened:
    """The file that the report names, and what it says of itself.

    Raises :class:`Unfit` where it is gone, has changed or lies outside the report's folder.
    """
    path = report.folder / (made.get("path") or "")
    try:
        inside = bool(made.get("path")) and path.resolve().is_relative_to(report.folder.resolve())
    except (OSError, RuntimeError, ValueError):
        inside = False  # links in a circle, or what is no path at all
    if not inside:
        raise Unfit(side, f"{side} names no file of its folder for it; give the run folder")
    try:
        file = onnxfile.read(path)
    except InputError as error:
        raise Unfit(side, error) from None
    if digest(path, *file.companions) != made["sha256"]:
        raise Unfit(
            side, f"{side}'s {made['path']} is not the file that was measured: run it again"
        )
    return (
        Artifact(made["name"], path, "onnx", made["sha256"], _steps(made), file.companions),
        file,
    )


def _steps(made: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Optimizers to leave out, which is all that timing wants to know of how a file was made."""
    last = made["steps"][-1] if made["steps"] else {}
    names = last.get("facts", {}).get("disabled")
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return ({"facts": {"disabled": names}},) if listed else ()


def paired(
    before: Opened,
    after: Opened,
    asked: Mapping[str, Asked],
    reports: Sequence[Report],
    target: Target,
) -> Pair:
    """Both files, and the inputs that either takes.

    A length that one file leaves open is as in the other; one that both leave open is as ``asked``,
    or as the first of ``reports`` to say so was fed. Raises :class:`InputError` where nothing says
    it or ``asked`` does not fit, :class:`Unfit` where a file is to blame.
    """
    (was, old), (now, new) = before, after
    if len(old.slots) != len(new.slots) or not all(map(_alike, old.slots, new.slots)):
        raise Unfit(
            "NEW",
            f"OLD takes {', '.join(map(str, old.slots))} and NEW "
            f"{', '.join(map(str, new.slots))}: the two cannot be given the same inputs",
        )
    inputs: tuple[Input, ...] = ()
    for side, file, other in (("NEW", new, old), ("OLD", old, new)):
        slots = tuple(map(_closed, file.slots, other.slots))
        known = {**_fed(slots, reports), **asked}
        try:
            inputs = onnxfile.inputs(replace(file, slots=slots), known, batch=(target.batch,))
        except InputError as error:
            names = {slot.name for slot in slots}
            if names & asked.keys() or _open(slots) - known.keys():
                raise  # a flag is wrong or missing: neither file is to blame
            raise Unfit(side, error) from None
    return Pair(was, now, inputs)


def _alike(one: Slot, other: Slot) -> bool:
    """Whether some array fits both, whatever its batch."""
    if (one.name, one.dtype) != (other.name, other.dtype):
        return False
    if one.axes is None or other.axes is None:
        return True
    return len(one.axes) == len(other.axes) and all(
        a == b or isinstance(a, str) or isinstance(b, str)
        for a, b in zip(one.axes[1:], other.axes[1:], strict=True)
    )


def _closed(one: Slot, other: Slot) -> Slot:
    """``one`` with the lengths that only ``other`` says; the batch stays its own."""
    axes = one.axes
    if axes is None and other.axes is not None:
        axes = ("", *other.axes[1:])
    elif axes and other.axes:
        pairs = zip(axes[1:], other.axes[1:], strict=True)
        axes = (axes[0], *(b if isinstance(a, str) else a for a, b in pairs))
    return one._replace(axes=axes, high=min(one.high, other.high))


def _open(slots: Iterable[Slot]) -> set[str]:
    """Inputs with an axis, besides the batch, of unknown length."""
    return {
        slot.name
        for slot in slots
        if slot.axes is None or any(isinstance(size, str) for size in slot.axes[1:])
    }


def _fed(slots: Sequence[Slot], reports: Iterable[Report]) -> dict[str, Asked]:
    """What open inputs were fed, by the first report that says so and fits."""
    found: dict[str, Asked] = {}
    for report in reports:
        fed = report.document.get("inputs") or ()
        for slot, one in zip(slots, fed if len(fed) == len(slots) else (), strict=False):
            given = Slot(slot.name, ("", *one["shape"]), one["dtype"])
            if slot.name in _open(slots) and _alike(slot, given):
                found.setdefault(slot.name, Asked(tuple(one["shape"]), one["dtype"], one["high"]))
    return found
