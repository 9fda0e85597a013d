"""The latency guard: what computes slower in 8 bits goes back to float, by measurement.

onnxruntime's profile says which nodes are suspects; a timing of the whole graph with and without
them, by turns, says whether they are guilty.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compressor.artifact import Artifact
from compressor.errors import StageError
from compressor.measure.costs import milliseconds
from compressor.measure.environment import cpu
from compressor.measure.process import Worker, WorkerFailed
from compressor.measure.protocol import duel
from compressor.measure.statistics import Blocks, speedup, summary
from compressor.stages.graph import write
from compressor.stages.quantize.kernels import codes
from compressor.task import Inputs, Task

if TYPE_CHECKING:
    import onnx_ir as ir

SECONDS = 0.6
"""Of calls for each graph of a comparison."""

MS = 40.0
"""Milliseconds of calls that are profiled."""

GAIN = 1.01
"""A change is kept where the whole interval of its speed-up lies above this."""

CONVERTING = 0.15
"""The share of conversions in a graph's time that explains by itself why it is slow."""

SMALL = 0.1
"""Milliseconds of a model in which the calls of kernels cost more than what they compute."""

HURTING = ("SkipLayerNormFusion",)
"""Fusions of onnxruntime that slow some models down on some CPUs; each is tried where it applies.
SkipLayerNormalization took 0.28 ms where Add and LayerNormalization took 0.06 (MiniLM)."""

SUFFIX = re.compile(r"(_token_\d+|_nchwc|_integer|_quantized|/\w+Fusion/.*)*$")
"""What onnxruntime and our own writers append to a node's name."""


def feed_of(task: Task) -> Inputs:
    """What graphs are timed with: examples of the calibration split, or made-up ones."""
    size = task.target.batch
    return task.splits.calibrate.head(size)[0] if task.splits else task.examples(size)


def race(
    models: Mapping[str, ir.Model],
    task: Task,
    disabled: Mapping[str, Sequence[str]] | None = None,
    seconds: float = SECONDS,
) -> dict[str, Blocks]:
    """Milliseconds of every call by name, block by block; all graphs take turns on the task's
    target. ``disabled`` are fusions that are switched off, by graph.

    Raises :class:`StageError` where a graph does not run.
    """
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        entrants = []
        for number, (name, model) in enumerate(models.items()):
            path = Path(folder) / f"{number}.onnx"
            beside = write(model, path)
            facts = {"disabled": list((disabled or {}).get(name, ()))}
            steps = ({"stage": "quantize", "settings": {}, "facts": facts},)
            artifact = Artifact.of(path, "onnx", steps=steps, companions=beside)
            entrants.append((name, artifact, task.target))
        seen = duel(entrants, feed_of(task), seconds=seconds, seed=task.seed)
    if seen.failed:
        raise StageError(f"timing on {task.target}: {next(iter(seen.failed.values()))}")
    return {name: blocks for (name, _), blocks in seen.times().items()}


def faster(times: Mapping[str, Blocks], name: str, than: str, seed: int = 0) -> bool:
    """Whether graph ``name`` is proven faster than graph ``than``."""
    return speedup(times[than], times[name], seed)["low"] > GAIN


def profile(model: ir.Model, task: Task, disabled: Sequence[str] = ()) -> dict[str, float]:
    """Milliseconds of every node of ``model`` in onnxruntime, by the name that it has there.

    Empty where the runtime has no profile.
    """
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder, Worker() as worker:
        path = Path(folder) / "model.onnx"
        write(model, path)
        feeds = []
        for at, array in enumerate(feed := feed_of(task)):
            feeds.append(f"{folder}/{at}.npy")
            np.save(feeds[-1], array)
        target = task.target
        try:
            worker.ask(
                "load",
                path=str(path),
                provider=target.provider,
                threads=target.threads,
                disabled=list(disabled),
            )
            worker.ask("take", inputs=feeds, batch=len(feed[0]))
            answer = worker.ask("kernels", path=str(path), ms=MS, out=f"{folder}/kernels")
        except WorkerFailed:
            return {}
    times: dict[str, float] = {}
    for kernel in answer["kernels"]:
        times[kernel["name"]] = times.get(kernel["name"], 0.0) + milliseconds([kernel])
    return times


def costs(model: ir.Model, names: Iterable[str], times: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of each named node: what onnxruntime calls its kernel may be the node's name, or
    that of a value which it makes, or makes once its neighbours are fused into it."""
    keys: dict[str, str] = {}
    wanted = set(names)
    for node in model.graph:
        if node.name in wanted:
            keys[str(node.name)] = str(node.name)
            out = node.outputs[0]
            for _ in range(4):  # BatchNorm, Add, activation: no fusion takes in more
                keys.setdefault(str(out.name), str(node.name))
                readers = out.consumers()
                if len(readers) != 1 or readers[0].name in wanted:
                    break
                out = readers[0].outputs[0]
    found: dict[str, float] = dict.fromkeys(wanted, 0.0)
    for kernel, ms in times.items():
        plain = SUFFIX.sub("", kernel.removeprefix("fused "))
        if plain in keys:
            found[keys[plain]] += ms
    return found


def suspects(
    model: ir.Model,
    names: Sequence[str],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> list[str]:
    """Nodes that took as long in 8 bits as in float, the worst first.

    ``before`` and ``after`` are profiles of the float graph and of the quantized one, whose
    weighted nodes are ``names``.
    """
    floats, eights = costs(model, names, before), costs(model, names, after)
    lost = {
        name: eights[name] - floats[name]
        for name in names
        if floats[name] and eights[name] and eights[name] >= floats[name]
    }
    return sorted(lost, key=lambda name: -lost[name])


def saved(
    model: ir.Model,
    island: tuple[Sequence[str], Sequence[str]],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> float:
    """Milliseconds that an island of weighted nodes and held values gains in 8 bits, what it takes
    to get there and back included; more than 0 where the profiles do not say."""
    names, values = island
    floats, eights = costs(model, names, before), costs(model, names, after)
    if not all(floats.values()) or not all(eights.values()):
        return 1.0
    ends = sum(
        after.get(f"{value}{end}", 0.0)
        for value in values
        for end in ("_QuantizeLinear", "_DequantizeLinear")
    )
    return sum(floats.values()) - sum(eights.values()) - ends


def reason(
    times: Blocks, before: Mapping[str, float], after: Mapping[str, float], bits: int | None = None
) -> str:
    """Why 8 bits gain nothing: ``times`` are those of the float graph, ``before`` and ``after`` the
    profiles of both."""
    if (codes().bits if bits is None else bits) < 8:
        known = "has no" if cpu()["features"] else "names no"
        return f"8 bits are not faster than float here: this CPU {known} 8-bit dot products (VNNI)"
    share = edges(after)
    if share > CONVERTING:
        return (
            f"8 bits are not faster than float here: {share:.0%} of the time goes into conversions"
        )
    ms = summary(times)["p50"]
    if ms < SMALL:
        return (
            f"8 bits are not faster than float here: the model is too small, {ms:.3g} ms in float"
        )
    return (
        "8 bits are not faster than float here: onnxruntime's float kernels keep up on these layers"
    )


def edges(times: Mapping[str, float]) -> float:
    """The share of a profile that conversions between float and 8 bits take."""
    whole = sum(times.values())
    ends = ("_QuantizeLinear", "_DequantizeLinear", "_Dynamic")
    return sum(ms for name, ms in times.items() if name.endswith(ends)) / whole if whole else 0.0


def fusions(model: ir.Model) -> Collection[str]:
    """Those of :data:`HURTING` that may apply to the graph."""
    has = {node.op_type for node in model.graph}
    return HURTING if "LayerNormalization" in has else ()
