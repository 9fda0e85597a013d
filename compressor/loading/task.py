"""From a model and data, as handed in, to a task; checked before any work starts."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compressor import data as sources
from compressor import names
from compressor.data.demand import targets
from compressor.errors import InputError, one_line
from compressor.loading import checkpoint, embedded, formats
from compressor.loading.checkpoint import Described
from compressor.loading.formats import Arch, Factory, arch_name, live
from compressor.metrics import METRICS, Metric, metric_of, own
from compressor.task import Array, Batch, Input, Inputs, Kind, Split, Splits, Task, labelled

SPLIT_SEED = 0
"""Data is always carved the same way, whatever ``seed``: otherwise a model that was trained on one
split would be judged on a test split that holds its own training examples."""


def load(path: str | Path, arch: Arch = None, *, trust_pickle: bool = False) -> nn.Module:
    """The model in ``path`` as an ``nn.Module`` in eval mode, pruned structure included.

    ``path`` is one of the formats of :mod:`compressor.loading.formats`: a self-describing
    ``model.pt``, a torch-form artifact (``.safetensors``), weights together with ``arch`` (a
    factory or its name), a pickled module, a ``.pt2``, a model folder, ``timm:NAME``. Executes
    nothing that the file holds unless ``trust_pickle`` says so; raises :class:`InputError` for a
    file that cannot be read.
    """
    return formats.opened(path, arch, trusted=trust_pickle).model


def task(
    model: str | Path | nn.Module,
    *,
    data: Any = None,
    arch: Arch = None,
    metric: str | None = None,
    kind: Kind | None = None,
    seed: int = 0,
    teachers: Sequence[str | Path | nn.Module] = (),
    teacher_arch: Arch = None,
    student: Arch = None,
    functions: Mapping[str, Callable[..., Any]] = {},
    weights: str | None = None,
    trusted: bool = False,
) -> Task:
    """What must be preserved, from what the user has.

    ``model`` is a path or a live module; ``data`` a spec (``digits``, ``mnist:DIR``,
    ``PKG.MOD:FUNCTION`` ...), live data (see :func:`compressor.data.adopt`) or ``None`` for the
    data that the file names. ``metric`` is one that the kind of task has, or names a function of
    ``functions``, which are the user's own. ``teachers`` are imitated instead of the model;
    ``student`` builds another architecture to teach. ``weights`` is the key of a checkpoint's
    weights; ``trusted`` lets a pickled model execute its code. Raises :class:`InputError` when
    model and data do not fit.
    """
    given = None
    if isinstance(data, str):
        given = sources.read(data, SPLIT_SEED)
    elif data is not None:
        given = sources.adopt(data, SPLIT_SEED)
    if isinstance(model, nn.Module):
        reference, said = _copy(model).cpu().eval(), Described({})
        source: Mapping[str, Any] = {"factory": live(type(model)), "arguments": {}}
        name = re.sub(r"\W+", "-", type(model).__name__).lower()
    elif isinstance(model, str | Path):
        example = given.splits.train.head(2)[0] if given else None
        reference, source, said = formats.opened(
            model, arch, weights=weights, trusted=trusted, example=example
        )
        name = re.sub(r"[^\w.-]+", "-", Path(model).stem)
    else:
        raise InputError(f"the model is a {type(model).__name__}: give a path or an nn.Module")
    _check_weights(reference, name)
    if given is None and said.data is not None:
        given = sources.read(said.data, SPLIT_SEED, trusted=False)
    splits = given.splits if given else None
    inputs = _inputs(said, splits, name, given.columns if given else ())
    if source["factory"] == embedded.FACTORY:
        embedded.check(reference, inputs)  # a file may describe more work than there is memory
    outputs = _probe(reference, inputs, splits, name)
    output = outputs[0]
    notes = [] if len(outputs) == 1 else [OTHERS.format(count=len(outputs))]
    mine = {} if metric is None or ":" not in metric else {metric: own_metric(metric, functions)}
    known = kind or (given.kind if given else None) or said.kind
    if given is not None and splits is not None and given.labelled:
        head = splits.train.head(256)[1]
        if not labelled(head).all():  # as training examples may be, but no others
            judged = [part.head(256)[1] for part in (splits.validate, splits.test)]
            if all(labelled(one).all() for one in judged):
                head = head[labelled(head)] if labelled(head).any() else judged[0]
        known = known or _kind(output, head, bool(mine))
        check_targets(known, output, splits)
        if not mine:
            notes += _scores(reference, known, splits)
    known = known or (
        "classification" if output.ndim == 2 and output.shape[1] > 1 else "regression"
    )
    if given is not None and splits is not None and not given.labelled:
        splits = replace(
            splits,
            validate=answered(splits.validate, reference, known),
            test=answered(splits.test, reference, known),
        )
    masters = [_teacher(one, teacher_arch) for one in teachers]
    pupil = _student(student)
    for flag, other in [*(("--teacher", one) for one in masters),
                        *(("--student", build()) for build in pupil.values())]:  # fmt: skip
        _answers_alike(flag, other, output, inputs, splits)
    return Task(
        name=name,
        kind=known,
        model=lambda: copy.deepcopy(reference),
        source=source,
        inputs=inputs,
        metric=next(iter(mine), None) or metric_of(known, metric),
        splits=splits,
        data=given.name if given else None,
        seed=seed,
        labelled=given is None or given.labelled,
        teachers=tuple(partial(copy.deepcopy, one) for one in masters),
        students=pupil,
        functions=functions,
        metrics={**METRICS[known], **mine},
        notes=tuple(notes),
    )


OTHERS = (
    "the model has {count} outputs: only the first is judged, and only it is trained for (a "
    "function of your own can be given by --loss and --metric)"
)

SCORED = 64
"""Examples whose outputs show whether they are logits."""


def _scores(model: nn.Module, kind: Kind, splits: Splits) -> list[str]:
    """What is to be said of outputs that are probabilities, where logits are expected.

    Raises :class:`InputError` where that decides what is right: a label is taken where an output
    is above 0, and all probabilities are. Softmax changes no order, only what losses make of it.
    """
    if kind not in ("binary", "multilabel", "classification"):
        return []
    batch = splits.train.head(SCORED)[0]
    with torch.inference_mode():
        outputs = first(model(*map(torch.from_numpy, batch)))
    low, high = outputs.aminmax()
    if low < 0 or high > 1 or low == high or len(outputs) < SCORED:
        return []
    if kind != "classification":
        raise InputError(
            f"the model answers {len(outputs)} examples with {low:.3g} to {high:.3g}, as after a "
            "sigmoid; labels and losses need what comes before it (above 0 is yes): give the model "
            "without its sigmoid, or a --metric PKG.MOD:FUNCTION of your own"
        )
    if bool((outputs.sum(1) - 1).abs().max() > 1e-3):
        return []
    return [
        "the model ends in a softmax, on which the loss takes another: it learns slowly; give it "
        "without its softmax"
    ]


def _teacher(given: str | Path | nn.Module, arch: Arch) -> nn.Module:
    if isinstance(given, str | Path):
        return formats.opened(given, arch).model
    return _copy(given).cpu().eval()


def _student(arch: Arch) -> dict[str, Factory]:
    """What builds the student, by its name; the same weights at every call."""
    if arch is None:
        return {}
    name = arch_name(arch)
    found = names.function(arch, "--student") if isinstance(arch, str) else arch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SPLIT_SEED)
        built = names.call(found, name, "--student")
    if not isinstance(built, nn.Module):
        raise InputError(
            f"--student {name} gave a {type(built).__name__}: it must return an nn.Module"
        )
    return {name: partial(copy.deepcopy, built.cpu().eval())}


def _answers_alike(
    flag: str,
    other: nn.Module,
    output: torch.Tensor,
    inputs: tuple[Input, ...],
    splits: Splits | None,
) -> None:
    """Raises :class:`InputError` where a teacher or student does not answer as the model does."""
    theirs = _probe(other, inputs, splits, f"{flag} {type(other).__name__}")[0]
    if theirs.shape != output.shape:
        raise InputError(
            f"{flag}: {type(other).__name__} answers two examples with shape "
            f"{tuple(theirs.shape)}, the model with {tuple(output.shape)}: give one that answers "
            "the same"
        )


def own_metric(name: str, functions: Mapping[str, Callable[..., Any]]) -> Metric:
    """The user's own metric, which the command line or the call must name."""
    if name not in functions:
        raise InputError(f"--metric {name!r} is no function that was handed in")
    return own(name, functions[name])


def answered(split: Split, model: nn.Module, kind: Kind) -> Split:
    """The split with the model's own answers as labels: each is asked for once, and remembered."""
    known: dict[int, Array] = {}

    def fetch(at: Array) -> Batch:
        inputs, _ = split.fetch(at)
        new = [place for place, one in enumerate(at) if int(one) not in known]
        if new:
            with torch.inference_mode():
                outputs = first(model(*(torch.from_numpy(part[new]) for part in inputs))).numpy()
            answers = ANSWERS[kind](outputs)
            known.update({int(at[place]): one for place, one in zip(new, answers, strict=True)})
        return inputs, np.stack([known[int(one)] for one in at])

    return replace(split, fetch=fetch)


ANSWERS: dict[Kind, Callable[[Array], Array]] = {
    "classification": lambda outputs: outputs.argmax(axis=1),
    "segmentation": lambda outputs: outputs.argmax(axis=1),
    "binary": lambda outputs: (outputs > 0).astype(np.int64),
    "multilabel": lambda outputs: (outputs > 0).astype(np.int64),
    "regression": lambda outputs: outputs,
    "custom": lambda outputs: outputs,
}
"""From a model's outputs to the labels that they stand for."""


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied ({one_line(error, 120)}): give its state "
            "dict and --arch, or the model without what cannot be copied"
        ) from None


def _check_weights(model: nn.Module, name: str) -> None:
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{name}: weight {key!r} holds NaN or infinity: the model is broken")


def _inputs(
    said: Described, splits: Splits | None, name: str, columns: Sequence[str]
) -> tuple[Input, ...]:
    if splits is None:
        if not (said.inputs or said.usual):
            raise InputError(
                f"the input shape of {name} is unknown: add --data SPEC, whose examples say it"
            )
        return said.inputs or said.usual
    seen = checkpoint.inputs_like(splits.train.head(64)[0])
    for wanted, found in zip(said.inputs, seen, strict=False):
        if wanted.shape != found.shape:
            raise InputError(
                f"the data's examples have shape {found.shape}, {name} takes {wanted.shape}"
                + (f" ({', '.join(columns[:8])} ...)" if columns else "")
            )
    wanted_count = len(said.inputs or said.usual)
    if wanted_count and wanted_count != len(seen):
        raise InputError(f"the data has {len(seen)} inputs, {name} takes {wanted_count}")
    return seen


def _probe(
    model: nn.Module, inputs: tuple[Input, ...], splits: Splits | None, name: str
) -> list[torch.Tensor]:
    """The outputs of a forward pass over two examples, the first compared with one over three."""
    batch: Inputs
    if splits is None:
        batch = tuple(given.synthetic(2, 0) for given in inputs)
    else:
        batch = splits.train.head(2)[0]
    shapes = ", ".join(f"{part.dtype} {part.shape}" for part in batch)
    try:
        with torch.inference_mode():
            three = first(model(*(torch.from_numpy(part[[0, 1, 0]]) for part in batch)))
            outputs = tensors(model(*map(torch.from_numpy, batch)))
            output = outputs[0]
    except Exception as error:
        wanted = next((str(one.dtype).removeprefix("torch.") for one in model.parameters()), None)
        other = "dtype" in str(error) and wanted not in {str(part.dtype) for part in batch}
        raise InputError(
            f"{name} cannot take the data's examples ({shapes}): {one_line(error, 160)}"
            + (f": its weights are {wanted}; convert the data" if other else "")
        ) from None
    # A second batch size: a model of two classes that sums over its batch gives two numbers too.
    if output.ndim == 0 or output.shape[0] != 2 or three.shape != (3, *output.shape[1:]):
        raise InputError(
            f"{name} turns a batch of 2 into shape {tuple(output.shape)}: the first axis of its "
            "output must be the example"
        )
    if not all(torch.isfinite(each).all() for each in outputs):
        raise InputError(f"{name} gives NaN or infinity on the data's first examples")
    return outputs


def tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of what a model returned, in order: of tuples, lists and dicts, nested or not."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    if isinstance(output, str) or not isinstance(parts, Iterable):
        return []  # a flag or a None beside the tensors
    return [tensor for part in parts for tensor in tensors(part)]


def first(output: Any) -> torch.Tensor:
    """The first tensor of what a model returned: the one that metrics judge."""
    return tensors(output)[0]


def _kind(output: torch.Tensor, targets: np.ndarray[Any, Any], own: bool = False) -> Kind:
    """The kind of task that an output ``(2, ...)`` and targets ``(n, ...)`` speak of; with a metric
    of the user's ``own``, whatever else they may be is custom."""
    whole = np.issubdtype(targets.dtype, np.integer)
    # PyTorch's own binary losses want floats: both values, nothing else, are labels all the same.
    zero_one = set(np.unique(targets)) == {0, 1} or (whole and bool(np.isin(targets, (0, 1)).all()))
    width = output.shape[1] if output.ndim > 1 else 1
    if whole and targets.ndim == 1 and output.ndim == 2 and width > 1:
        return "classification"
    if zero_one and width == 1 and targets.size == len(targets):
        return "binary"
    if zero_one and targets.ndim == 2 and targets.shape[1:] == output.shape[1:]:
        if len(targets) > 1 and (targets.sum(axis=1) == 1).all():
            raise InputError(
                f"all {len(targets)} targets seen have one 1 among {width} numbers: give the "
                "number of the class instead, y.argmax(axis=1); or, of labels that do not exclude "
                "each other, the kind 'multilabel' with the data"
            )
        return "multilabel"
    if whole and output.ndim == 4 and targets.ndim == 3:
        return "segmentation"
    if not whole and targets.size // len(targets) == output.numel() // 2:
        return "regression"
    if own:
        return "custom"
    column = whole and targets.ndim == 2 and targets.shape[1] == 1 and width > 1
    raise InputError(
        f"targets {targets.dtype} {targets.shape} do not fit an output of shape "
        f"{tuple(output.shape)}: "
        + (
            "give labels as y[:, 0]"
            if column
            else "no task kind has both (regression targets are floats)"
        )
    )


def check_targets(kind: Kind, output: torch.Tensor, splits: Splits) -> None:
    """Raises :class:`InputError` for the first split whose targets the model cannot have meant."""
    if kind == "custom":
        return
    width = output.shape[1] if output.ndim > 1 else 1
    classes = width if kind in ("classification", "segmentation") else 2
    for name in ("train", "validate", "calibrate", "test"):
        for told in targets(getattr(splits, name), 4096):
            _check_targets(kind, name, classes, output, told)


def _check_targets(
    kind: Kind, name: str, classes: int, output: torch.Tensor, targets: Array
) -> None:
    if name in ("train", "calibrate"):  # whose examples may have no label
        targets = targets[labelled(targets)]
    if not len(targets):
        return
    shape = {
        "classification": (),
        "segmentation": tuple(output.shape[2:]),
    }.get(kind)
    if shape is None:
        fits = targets.size * 2 == output.numel() * len(targets)
    else:
        fits = targets.shape[1:] == shape
    if not fits:
        raise InputError(
            f"{kind} targets of {name} have shape {targets.shape}; the model's output for 2 "
            f"examples is {tuple(output.shape)}"
        )
    if kind == "regression":
        return
    if shape is not None and not np.issubdtype(targets.dtype, np.integer):
        raise InputError(f"{kind} targets of {name} are {targets.dtype}: give integer labels")
    low, high = targets.min(), targets.max()
    if low < 0 or high >= classes:
        raise InputError(
            f"labels of {name} run from {low:g} to {high:g}; the model has {classes} classes, so "
            f"they must be 0 to {classes - 1}"
        )
