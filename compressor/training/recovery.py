"""Training on towards a teacher: what recovery minimises, and with what beside it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from compressor.data.demand import targets
from compressor.errors import InputError, Unsuitable
from compressor.loading.task import answered, first
from compressor.metrics import metrics_of
from compressor.task import UNLABELLED, Kind, Split, Splits, Task, labelled
from compressor.training import logs, losses
from compressor.training.features import Features, pairs
from compressor.training.loader import steady
from compressor.training.loop import (
    Batch,
    Epoch,
    Fitted,
    Objective,
    Watch,
    Watching,
    fit,
)
from compressor.training.losses import LOSSES, Loss, Seen, total
from compressor.training.placing import device_for
from compressor.training.settings import Training
from compressor.training.synthesis import synthesize
from compressor.training.teacher import Teacher
from compressor.training.world import here

EXAMPLES = 60_000
"""Without ``epochs``: so many that about this many examples are seen ..."""

MOST_EPOCHS = 60
"""... but never more than this."""

SHORT = {"distill": "kd"}
"""``loss = "distill"`` is the teacher's part by logits."""


class Aim(NamedTuple):
    """What recovery minimises: ``weights`` of losses by name, and what these need to know.

    ``layers`` are pairs ``STUDENT=TEACHER`` for losses on hidden layers, ``None`` to find them.
    """

    weights: Mapping[str, float]
    temperature: float = 4.0
    layers: Sequence[str] | None = None


def aimed(
    task: Task,
    loss: str | Mapping[str, float] = "auto",
    weight: float = 0.5,
    temperature: float = 4.0,
    layers: Sequence[str] | None = None,
) -> Aim:
    """The aim that settings stand for: one loss by name has ``weight``, and labels the rest.

    ``auto`` is ``labels`` where all examples have one and nobody named a teacher or a student, else
    ``distill``.

    Raises :class:`InputError` for losses that the task does not have, and for labels where there
    are none.
    """
    if loss == "auto":
        asked = bool(task.teachers or task.students) or not task.labelled
        loss = "distill" if asked or not _all_labelled(task) else "labels"
    if not isinstance(loss, str):
        weights = dict(loss)
    elif loss == "labels" or ":" in loss:
        weights = {loss: 1.0}
    else:
        # Where nothing has a label, what the teacher says is all there is.
        share = weight if task.labelled else 1.0
        weights = {"labels": 1 - share, SHORT.get(loss, loss): share}
    weights = losses.checked(weights, task.kind)
    if "labels" in weights and not task.labelled:
        raise InputError(
            "loss labels: the data has none: distil from the teacher alone (loss = 'kd'), or give "
            "labelled data"
        )
    for name in weights:
        if ":" in name and name not in task.functions:
            raise InputError(f"loss {name!r} is code to run: add --loss {name} if you trust it")
    return Aim(weights, temperature, layers)


def _all_labelled(task: Task) -> bool:
    """Whether every training example has a label; a custom task says itself what it needs."""
    if task.splits is None or task.kind == "custom":
        return task.splits is None
    return all(labelled(told).all() for told in targets(task.splits.train, 4096))


def from_labels(kind: Kind) -> Objective:
    """The error on labels alone."""

    def objective(net: nn.Module, batch: Batch) -> Tensor:
        return losses.LABELS[kind](first(net(*batch.inputs)), batch.targets)

    return objective


def epochs_for(task: Task) -> int:
    """As many epochs as show about :data:`EXAMPLES` examples of the task's training split."""
    assert task.splits is not None
    return max(1, min(MOST_EPOCHS, math.ceil(EXAMPLES / len(task.splits.train))))


def recover(
    model: nn.Module,
    task: Task,
    training: Training,
    aim: Aim | None = None,
    *,
    penalty: Any = None,
    keep: Literal["best", "last"] = "best",
    into: Path | None = None,
    key: str = "",
) -> Fitted:
    """Trains ``model`` in place for ``training.epochs``, towards ``aim``.

    ``penalty()`` is added to the loss of every step. ``into``, without its suffix, is where
    training keeps what it needs to go on after a kill, under ``key``, and its logs; without it
    nothing is kept. Raises :class:`Unsuitable` where every parameter is frozen.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise Unsuitable("every parameter is frozen: nothing can be trained")
    assert task.splits is not None
    how = replace(training, epochs=training.epochs or epochs_for(task))
    aim = aim or aimed(task)
    own = {name: losses.own(name, task.functions[name]) for name in aim.weights if ":" in name}
    needs = {need for name in aim.weights for need in {**LOSSES, **own}[name].needs}
    splits = _meant(task.splits, needs)
    with ExitStack() as open_:
        objective, beside = open_.enter_context(
            imitating(model, task, splits, how, aim, own, needs, into)
        )
        fitted = fit(
            model,
            splits,
            objective if penalty is None else lambda net, at: objective(net, at) + penalty(),
            how,
            metric=(task.metric, metrics_of(task)[task.metric]),
            seed=task.seed,
            functions=task.functions,
            beside=beside,
            keep=keep,
            resume=None if into is None else (into.with_name(f"{into.name}{STANDS}"), key),
            watching=watching(task, how, into),
        )
    whose = f"{len(task.teachers)} of --teacher" if task.teachers else "the original"
    fitted.facts["teacher"] = whose if "teacher" in needs else None
    return fitted


def watching(task: Task, training: Training, into: Path | None) -> Watching:
    """What :func:`~compressor.training.loop.fit` opens to be watched: the task's logs, beside
    ``into``, and its line of progress. Of several processes the leader alone is."""

    @contextmanager
    def watched(resumed: int) -> Iterator[Watch]:
        def shown(facts: Epoch, epochs: int, seconds: float) -> None:
            task.watch(logs.line(facts, epochs, seconds))

        if not here().leader:
            yield Watch()
        elif into is None:
            yield Watch(shown)
        else:
            folder, title = into.with_name(LOGGED), into.name
            names = [name for name in task.logs if name != TRACE]
            trace = folder / f"{title}.trace.json" if TRACE in task.logs else None
            with (
                logs.opened(
                    names, folder, title, training.to_json(), warn=task.watch, resumed=resumed
                ) as wrote,
                logs.profiled(trace) as stepped,
            ):
                yield Watch(shown, wrote, stepped)

    return watched


LOGGED = "logs"
"""The folder of the logs of training, beside the artifacts."""

TRACE = "trace"
"""Among the names of logs: a profiler's trace of a few steps."""

STANDS = ".training"
"""Suffix of the file in which training keeps where it stands."""


TOLD = ".teacher.npy"
"""Suffix of the file with the teacher's outputs."""


def clean(into: Path) -> None:
    """Removes what training kept while it ran, which is of no use once its artifact is written."""
    for suffix in (STANDS, TOLD):
        into.with_name(f"{into.name}{suffix}").unlink(missing_ok=True)


def _meant(splits: Splits, needs: set[str]) -> Splits:
    """The splits, where labels are all that counts without the training examples that have none."""
    if "teacher" in needs:
        return splits
    has = np.concatenate([labelled(told) for told in targets(splits.train, 4096)])
    return splits if has.all() else replace(splits, train=splits.train.take(np.flatnonzero(has)))


@contextmanager
def imitating(
    model: nn.Module,
    task: Task,
    splits: Splits,
    training: Training,
    aim: Aim,
    own: Mapping[str, Loss],
    needs: set[str],
    into: Path | None,
) -> Iterator[tuple[Objective, list[nn.Module]]]:
    """The objective of ``aim``, and the modules that train along with ``model`` for it."""
    device = device_for(training)
    teacher = features = None
    beside: list[nn.Module] = []
    with ExitStack() as open_:
        if "teacher" in needs:
            builds = task.teachers or (task.model,)
            teacher = Teacher([build() for build in builds], device)
            still = not (training.augment or training.mixup or training.cutmix or own)
            still = still and training.epochs != 1 and "features" not in needs
            if still and into is not None and steady(splits.train):
                teacher.keep(splits.train, into.with_name(f"{into.name}{TOLD}"))
        if teacher and "features" in needs:
            head = tuple(torch.from_numpy(part).to(device) for part in splits.train.head(2)[0])
            model.to(device)
            names = pairs(model, teacher.models[0], head, aim.layers)
            features = Features(model, teacher.models[0], names, head, task.seed)
            beside.append(open_.enter_context(features).adapters)
        alone = bool(own) and all(_whole(task.functions[name]) for name in own)
        alone = alone and len(own) == len(aim.weights)

        def objective(net: nn.Module, batch: Batch) -> Tensor:
            # A user's whole training step runs the model itself.
            raw: Any = batch.targets.new_zeros(0) if alone else net(*batch.inputs)
            told = teacher.returned(batch) if teacher else None
            seen = Seen(
                task.kind,
                first(raw),
                batch.targets,
                first(told) if teacher else None,
                features.take() if features else (),
                aim.temperature,
                training.smoothing,
                batch.inputs,
                net,
                raw,
                told,
            )
            value = total(aim.weights, seen, own)
            if batch.partner is None:
                return value
            other = total(aim.weights, seen._replace(targets=batch.targets[batch.partner]), own)
            return batch.share * value + (1 - batch.share) * other

        yield objective, beside


def _whole(function: Any) -> bool:
    """Whether a user's function runs the model itself: it asks for it, and not for its outputs."""
    asked = inspect.signature(function).parameters
    return "model" in asked and not {"outputs", "teacher", "features"} & set(asked)


def made_up(task: Task, count: int) -> Task:
    """The task with ``count`` examples that are made from its teacher's batch statistics, and have
    no label; the teacher's own answers judge on a fifth of them.

    Raises :class:`InputError` where the teacher has no such statistics.
    """
    teacher = (task.teachers or (task.model,))[0]()
    made = synthesize(teacher, task.inputs, count, task.seed, kind=task.kind)
    bare = Split.arrays(made, np.full(count, UNLABELLED))
    judged = answered(bare.take(np.arange(count // 5)), teacher, task.kind)
    train = bare.take(np.arange(count // 5, count))
    return replace(task, labelled=False, splits=Splits(train, judged, train, judged))
