"""Robustness: what each artifact keeps on examples that are corrupted, or made to fool it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.artifact import Artifact
from compressor.errors import one_line
from compressor.loading.task import first
from compressor.loading.torchfile import open_model
from compressor.measure.corruptions import (
    ATTACKS,
    CORRUPTIONS,
    Pictures,
    Scale,
    corrupted,
    pictured,
    unsuited,
)
from compressor.measure.outputs import PART, stored, taken
from compressor.measure.process import Worker, WorkerFailed
from compressor.measure.statistics import drop
from compressor.measure.threads import threads_for
from compressor.measure.turns import Progress, request, silent
from compressor.metrics import METRICS, Metric, metrics_of, scores
from compressor.recipe import BASELINE
from compressor.task import Array, Inputs, Split, Task
from compressor.training.evaluation import EVALUATED
from compressor.training.losses import LABELS

Row = dict[str, Any]
Judged = tuple[str, NDArray[np.float64]]
"""A metric's name, and what it gives each example, shape ``(n,)``."""

EXAMPLES = 1000
"""Of the test split, at most."""

SEVERITIES = (1, 3, 5)
"""Of the five: each is a pass over the examples, one after another, by every artifact."""

ATTACKED = ("classification", "binary", "multilabel")
"""Kinds whose examples have few decisions, which an attack can turn."""

CLEAN = "clean"
NO_DATA = "no data: add --data SPEC"


class Condition(NamedTuple):
    """What is done to the examples; a corruption of no severity is the mean over all of them."""

    what: str
    severity: int | None = None


class Examples(NamedTuple):
    """The same for all artifacts, first axis the example."""

    inputs: Inputs
    targets: Array


CONDITIONS = (
    Condition(CLEAN),
    *(Condition(what, severity) for what in CORRUPTIONS for severity in SEVERITIES),
    *(Condition(what) for what in ATTACKS),
)


def robustness(
    task: Task,
    onnx: Mapping[str, Artifact],
    float_of: Callable[[str], Artifact],
    reference: str = BASELINE,
    examples: int = EXAMPLES,
    seed: int = 0,
    *,
    start: Callable[[], Worker] = Worker,
    progress: Progress = silent,
) -> dict[str, list[Row]]:
    """What each artifact of ``onnx`` keeps under :data:`CONDITIONS`, by name.

    Rows are ``{"what", "severity", "how", "metric", "value", "drop", "n"}``, first the clean
    examples; or ``{"what", "severity", "how", "skipped"}`` with the reason: nothing here ends a
    run. ``severity`` is ``None`` where there is none, and in the row of a corruption that has each
    example's mean over :data:`SEVERITIES`. ``metric`` is the task's, or its kind's first where that
    is no mean over examples. ``drop`` is :func:`compressor.measure.statistics.drop` against
    ``reference`` on the same examples, ``None`` where that has no scores.

    At most ``examples`` of the test split are read, drawn with ``seed``. Every artifact sees the
    same corrupted inputs. An attack is crafted anew for each on the float model ``float_of(name)``,
    a torch-form artifact: ``"white-box"`` where the artifact is its export, ``"transfer"`` where it
    computes with fewer bits, which have no gradient: it may then seem safer than it is. Outputs are
    the ONNX file's, on ``task.target``.
    """
    if task.splits is None:
        return {name: [_skipped(Condition(CLEAN), None, NO_DATA)] for name in onnx}
    try:
        given = _drawn(task.splits.test, examples, seed)
    except Exception as error:  # the data is read by code of the user's own
        return {name: [_skipped(Condition(CLEAN), None, one_line(error))] for name in onnx}
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        found = {}
        for name, artifact in onnx.items():

            def changed(condition: Condition, name: str = name) -> Inputs:
                what, severity = condition
                progress(f"robustness of {name}: {what}")
                if what in ATTACKS:
                    return _attacked(task, given, what, float_of(name), seed, Path(folder))
                if severity is None:
                    return given.inputs
                return corrupted(given.inputs, what, severity, seed)

            found[name] = _scores(task, artifact, given, changed, Path(folder), start)
    return {
        name: list(_rows(task, judged, found.get(reference, {}), _how(onnx[name])))
        for name, judged in found.items()
    }


def _drawn(test: Split, count: int, seed: int) -> Examples:
    """At most ``count`` examples of the split, in its order: it may be sorted by class."""
    drawn = np.random.default_rng(seed).permutation(len(test))[:count]
    batches = list(test.take(np.sort(drawn)).batches(PART))
    parts = zip(*(inputs for inputs, _ in batches), strict=True)
    targets = np.concatenate([targets for _, targets in batches])
    return Examples(tuple(map(np.concatenate, parts)), targets)


def _how(artifact: Artifact) -> str:
    narrowed = any(step["stage"] in ("quantize", "qat") for step in artifact.steps)
    return "transfer" if narrowed else "white-box"


def _scores(
    task: Task,
    artifact: Artifact,
    given: Examples,
    changed: Callable[[Condition], Inputs],
    folder: Path,
    start: Callable[[], Worker],
) -> dict[Condition, Judged | str]:
    """The score of each example under each condition, or why there are none.

    What fails on clean examples is not asked further.
    """
    found: dict[Condition, Judged | str] = {}
    with ExitStack() as stack:
        worker: Worker | None = None
        for condition in CONDITIONS:
            if why := _unsuited(task, given, condition):
                found[Condition(condition.what)] = why
                continue
            try:
                paths = stored(folder, "input", changed(condition))
                if worker is None:
                    worker = stack.enter_context(start())
                    worker.ask("load", **request(artifact.checked(), task.target, paths))
                    worker.ask("take", inputs=paths, batch=task.target.batch)
                outputs = taken([worker], paths, len(given.targets), task.target.batch, folder)
                found[condition] = _judged(task, outputs, given.targets)
            except Exception as error:  # a model or an attack may fail in any way
                found[condition] = one_line(error)
                if isinstance(error, WorkerFailed):  # it may be gone: the next condition's is new
                    stack.close()
                    worker = None
            if isinstance(found[Condition(CLEAN)], str):
                break
    return found


def _known(task: Task) -> Mapping[str, Metric]:
    return {**METRICS[task.kind], **metrics_of(task)}


def _judged(task: Task, outputs: Array, targets: Array) -> Judged:
    """By the task's metric, or by its kind's first where that has no scores of single examples."""
    known = _known(task)
    for name in (task.metric, next(iter(known))):
        found = scores(known[name], outputs, targets)
        if found is not None:
            return name, found
    raise AssertionError("the first metric of every kind is a mean")


def _unsuited(task: Task, given: Examples, condition: Condition) -> str | None:
    """Why a condition is not for this task."""
    if condition.what == CLEAN:
        return None
    if condition.what in ATTACKS and task.kind not in ATTACKED:
        return f"attacks are made for {', '.join(ATTACKED)}; this is {task.kind}"
    return unsuited(given.inputs, condition.what)


def _attacked(
    task: Task, given: Examples, attack: str, source: Artifact, seed: int, folder: Path
) -> Inputs:
    """The examples after an attack on the float model ``source``; what is no picture stays.

    They are kept in ``folder``: several artifacts are made from the same float model.
    """
    places = range(len(given.inputs))
    paths = [folder / f"{source.digest}-{attack}-{place}.npy" for place in places]
    if not all(path.is_file() for path in paths):
        made = _crafted(task, given, attack, source, seed)
        for path, array in zip(paths, made, strict=True):
            np.save(path, array)
    return tuple(map(np.load, paths))


def _crafted(task: Task, given: Examples, attack: str, source: Artifact, seed: int) -> Inputs:
    model, _ = open_model(source.checked(), task)
    labels = LABELS[task.kind]
    at = [place for place, one in enumerate(given.inputs) if pictured(one)]
    scales = [Scale.of(given.inputs[place]) for place in at]
    made = tuple(one.copy() for one in given.inputs)
    example = tuple(one[:1] for one in given.inputs)
    size = max(1, min(256, EVALUATED // sum(one.nbytes for one in example)))
    with threads_for(model, example, size):
        for begin in range(0, len(given.targets), size):
            part = slice(begin, begin + size)
            whole = [torch.from_numpy(one[part]) for one in given.inputs]
            known = torch.from_numpy(given.targets[part])

            def loss(
                pictures: Pictures, whole: Sequence[Tensor] = whole, known: Tensor = known
            ) -> Tensor:
                moved = dict(zip(at, pictures, strict=True))
                inputs = (moved.get(place, one) for place, one in enumerate(whole))
                return labels(first(model(*inputs)), known)

            pictures = tuple(whole[place] for place in at)
            moved = ATTACKS[attack](loss, pictures, scales, seed + begin)
            for place, picture in zip(at, moved, strict=True):
                made[place][part] = picture.numpy()
    return made


def _rows(
    task: Task,
    judged: Mapping[Condition, Judged | str],
    reference: Mapping[Condition, Judged | str],
    how: str,
) -> Iterator[Row]:
    versus = _with_means(reference)
    for condition, mine in _with_means(judged).items():
        crafted = how if condition.what in ATTACKS else None
        if isinstance(mine, str):
            yield _skipped(condition, crafted, mine)
            continue
        metric, own = mine
        theirs, lost = versus.get(condition), None
        if judged is reference:
            lost = {"value": 0.0, "low": 0.0, "high": 0.0}
        elif theirs is not None and not isinstance(theirs, str):
            better = _known(task)[metric].higher_is_better
            lost = drop(theirs[1], own, higher_is_better=better, seed=task.seed)
        yield {
            "what": condition.what,
            "severity": condition.severity,
            "how": crafted,
            "metric": metric,
            "value": float(own.mean()),
            "drop": lost,
            "n": len(own),
        }


def _with_means(judged: Mapping[Condition, Judged | str]) -> dict[Condition, Judged | str]:
    """With each corruption's mean over its severities before them."""
    found: dict[Condition, Judged | str] = {}
    for condition, one in judged.items():
        if condition.what in CORRUPTIONS and Condition(condition.what) not in found:
            every = [judged[other] for other in judged if other.what == condition.what]
            found[Condition(condition.what)] = _mean(every)
        found.setdefault(condition, one)
    return found


def _mean(every: Sequence[Judged | str]) -> Judged | str:
    """Each example's mean, or the first reason why it has none."""
    known = []
    for one in every:
        if isinstance(one, str):
            return one
        known.append(one)
    return known[0][0], np.mean([own for _, own in known], axis=0)


def _skipped(condition: Condition, how: str | None, reason: str) -> Row:
    return {"what": condition.what, "severity": condition.severity, "how": how, "skipped": reason}
