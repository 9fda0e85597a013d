"""Which nodes stay float: those that 8 bits make slower, and those that the budget needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from compressor.measure.environment import cores
from compressor.stages.quantize import budget, guard
from compressor.stages.quantize.judge import Judge
from compressor.stages.quantize.kernels import CLAMPING
from compressor.stages.quantize.plan import plan
from compressor.task import Task

if TYPE_CHECKING:
    import onnx_ir as ir

Write = Callable[[Collection[str]], "ir.Model"]
"""The quantized graph with these nodes left in float."""


def timed(task: Task) -> bool:
    """Whether this machine's onnxruntime can say where the time goes on the task's target."""
    target = task.target
    here = target.threads <= cores()
    return (target.runtime, target.provider) == ("onnxruntime", "cpu") and here


def slow(
    exact: ir.Model, source: ir.Model, write: Write, names: Sequence[str], task: Task
) -> tuple[frozenset[str], str]:
    """Nodes that are faster in float on the task's target, proven by timing both by turns; and why
    8 bits gain nothing here, where that is so.

    ``source`` is the float graph that ``write`` quantizes, ``names`` its weighted nodes, ``exact``
    the graph as it was given. Where even the rest of the nodes is no faster in 8 bits than
    ``exact``, none is named: such a graph serves its size, and half of it would serve nothing.
    """
    whole = write(())
    before, after = guard.profile(source, task), guard.profile(whole, task)
    suspects = guard.suspects(source, names, before, after)
    suspects += [
        name
        for island in islands(source, names)
        if guard.saved(source, island, before, after) <= 0
        for name in island[0]
        if name not in suspects
    ]
    left = frozenset(suspects)
    models = {"float": exact, "whole": whole}
    if left and left != frozenset(names):
        models["without"] = write(left)
    times = guard.race(models, task)
    if "without" in models and all(
        guard.faster(times, "without", other, task.seed) for other in ("whole", "float")
    ):
        return left, ""
    if guard.faster(times, "whole", "float", task.seed):
        return frozenset(), ""
    return frozenset(), guard.reason(times["float"], before, after)


def islands(model: ir.Model, names: Collection[str]) -> list[tuple[list[str], list[str]]]:
    """Parts of a static graph that are in 8 bits together: weighted nodes and held values."""
    ours = plan(model)
    parts: list[tuple[set[str], set[str], set[str]]] = []
    for node in model.graph:
        if node.name not in ours.inside:
            continue
        values = {
            ours.held[str(value.name)]
            for value in (*node.inputs, *node.outputs)
            if value is not None and value.name in ours.held
        }
        # A clamp stands between what a node makes and what is held of it.
        out = node.outputs[0]
        while out.name not in ours.held and _clamped(out):
            out = out.consumers()[0].outputs[0]
        values |= {ours.held[str(out.name)]} if out.name in ours.held else set()
        whole: tuple[set[str], set[str], set[str]] = ({str(node.name)}, values, set())
        for part in [part for part in parts if part[1] & values]:
            whole = (whole[0] | part[0], whole[1] | part[1], set())
            parts.remove(part)
        parts.append(whole)
    return [
        ([name for name in names if name in part[0]], sorted(part[1]))
        for part in parts
        if part[0] & set(names)
    ]


def _clamped(value: ir.Value) -> bool:
    readers = value.consumers()
    return len(readers) == 1 and readers[0].op_type in CLAMPING


def hurting(model: ir.Model, task: Task) -> tuple[str, ...]:
    """Fusions of onnxruntime without which the graph is faster, proven by timing both by turns."""
    found: tuple[str, ...] = ()
    for fusion in guard.fusions(model):
        names = {"with": list(found), "without": [*found, fusion]}
        times = guard.race(dict.fromkeys(names, model), task, names)
        if guard.faster(times, "without", "with", task.seed):
            found = (*found, fusion)
    return found


def within(
    source: ir.Model,
    write: Write,
    names: Sequence[str],
    left: frozenset[str],
    task: Task,
    judge: Judge,
    late: Callable[[], bool],
    keep: Callable[[ir.Model], object],
) -> tuple[frozenset[str], dict[str, Any]]:
    """As many nodes more than ``left`` in float as it takes to hold the task's budget on the
    validation split, and what is worth knowing.

    ``keep`` gets every better graph as soon as it is known.
    """
    drop = judge.drop(write(left))
    if drop is None or drop <= task.budget:
        return left, {} if drop is None else {"drop": _finite(drop)}
    whole = judge.drop(source)
    assert whole is not None
    if whole > task.budget:
        note = f"layers stay in 8 bits: the float model it was made from drops {whole:.4f} already"
        return left, {"drop": _finite(drop), "note": note}
    rest = [name for name in names if name not in left]
    noise = {}
    for name in rest:
        if late():
            break
        alone = judge.sqnr(write([other for other in names if other != name]))
        noise[name] = 10 ** (-alone / 10)
    cost: dict[str, float] = {}
    if timed(task):
        floats = guard.costs(source, rest, guard.profile(source, task))
        eights = guard.costs(source, rest, guard.profile(write(left), task))
        cost = {name: floats[name] - eights[name] for name in rest}

    def taken(more: frozenset[str]) -> float:
        lost = judge.drop(write(left | more))
        assert lost is not None
        return lost

    def better(more: frozenset[str], lost: float) -> None:
        keep(write(left | more))

    more, least = budget.returned(budget.ranked(noise, cost), taken, task.budget, better, late=late)
    facts: dict[str, Any] = {"drop": _finite(least), "returned": len(more)}
    if least > task.budget:
        facts["note"] = f"no part of it in 8 bits was found that drops less than {least:.4f}"
    return left | more, facts


def _finite(drop: float) -> float | None:
    """For JSON, which has no infinity."""
    return drop if math.isfinite(drop) else None
