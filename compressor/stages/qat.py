"""Quantization-aware training: the model learns to live with 8 bits, then exports as int8."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from compressor.artifact import Torch
from compressor.errors import Unsuitable, one_line
from compressor.loading import fakequant, torchfile
from compressor.loading.edits import Edit, apply
from compressor.loading.rewrites import folds
from compressor.metrics import metrics_of
from compressor.stages.mask import held
from compressor.stages.quantize import calibration
from compressor.stages.quantize.kernels import codes
from compressor.task import Task
from compressor.training.evaluation import evaluate
from compressor.training.recovery import aimed, clean, epochs_for, recover
from compressor.training.settings import Training

GENTLE = Training(learning_rate=5e-4)

SHARE = 3
"""Without ``epochs``: recovery's, divided by this."""


def qat(
    artifact: Torch,
    task: Task,
    into: Path,
    *,
    training: Training = GENTLE,
    temperature: Annotated[float, Field(gt=0)] = 4.0,
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5,
    samples: Annotated[int, Field(ge=1)] = 512,
) -> Torch:
    """Trains on with fake quantization, so that the export is int8 (Jacob et al. 2018).

    Batch normalisation is folded first, its statistics frozen. Ranges of activations come from
    ``samples`` examples of the calibration split and are learnt from there (Esser et al. 2020);
    weights have 8 bits, 7 on a CPU without 8-bit dot products. The loss is that of recovery:
    ``weight`` on the outputs of the task's original model. ``epochs`` of ``None`` means a third of
    recovery's. The weights that do best on the validation split stay, those before training
    included: the artifact is never worse there than the ranges alone make it.

    Raises :class:`Unsuitable` without data, for a model without convolution and linear layers, and
    for one whose calls cannot be followed (:func:`compressor.loading.fakequant.survey`).
    """
    if task.splits is None:
        raise Unsuitable("no data to train on: add --data SPEC")
    how = replace(training, epochs=training.epochs or max(1, epochs_for(task) // SHARE))
    model, edits = torchfile.open_model(artifact, task)
    if any(edit["edit"] == "fake_quantize" for edit in edits):
        raise Unsuitable("it is trained for int8 already")
    metric = metrics_of(task)[task.metric]
    before = evaluate(model, task.splits.validate, metric)
    added: list[Edit] = [*folded(model, *next(_batches(task, samples)))]
    try:
        added.append(fakequant.survey(model, _batches(task, samples), codes().bits))
    except ValueError as error:
        raise Unsuitable(f"int8 training does not suit the model: {one_line(error)}") from None
    ranged = evaluate(model, task.splits.validate, metric)
    aim = aimed(task, "distill", weight, temperature)
    key = f"{artifact.digest} {how.to_json()} {aim} {samples} {task.reads} {task.seed}"
    with held(model, artifact):
        fitted = recover(model, task, how, aim, into=into, key=key)
    path = into.with_name(into.name + torchfile.SUFFIX)
    torchfile.write(path, model, torchfile.origin(artifact), [*edits, *added])
    clean(into)
    settings = {
        **how.to_json(),
        "temperature": temperature,
        "weight": weight,
        "samples": samples,
    }
    start = {"float": before, "ranges": ranged}
    return artifact.then(
        path,
        "torch",
        "qat",
        settings,
        validate=start,
        training=fitted.facts,
        history=fitted.history,
    )


def _batches(task: Task, samples: int) -> Iterator[tuple[Tensor, ...]]:
    for inputs in calibration(task, samples):
        yield tuple(map(torch.from_numpy, inputs))


class _Reading(TorchFunctionMode):
    """Notes which batch normalisation reads what which weight made, and who else reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.made = WeakTensorKeyDictionary()
        self.reads = WeakTensorKeyDictionary()
        self.weights: Counter[int] = Counter()
        self.norms: Counter[int] = Counter()
        self.pairs: list[tuple[int, int, list[int]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in fakequant.ASKING:
            for each in tree_leaves((args, kwargs)):
                if isinstance(each, Tensor) and each in self.reads:
                    self.reads[each][0] += 1
        found = func(*args, **(kwargs or {}))
        if name in fakequant.LAYERS:
            self.weights[id(args[1])] += 1
            self.made[found], self.reads[found] = id(args[1]), [0]
        if name == "batch_norm" and args[1] is not None:
            self.norms[id(args[1])] += 1
            if args[0] in self.made:
                self.pairs.append((self.made[args[0]], id(args[1]), self.reads[args[0]]))
        return found


def folded(model: nn.Module, *inputs: Tensor) -> list[Edit]:
    """Folds, in place, every batch normalisation that alone reads a layer; gives the edits.

    ``model`` is in eval mode and runs once on ``inputs``.
    """
    layers = {id(at._parameters.get("weight")): name for name, at in model.named_modules()}
    norms = {id(at._buffers.get("running_mean")): name for name, at in model.named_modules()}
    mode = _Reading()
    with torch.no_grad(), mode:
        model(*inputs)
    edits: list[Edit] = [
        {"edit": "rewrite", "module": norms[norm], "as": "fold", "into": layers[weight]}
        for weight, norm, reads in mode.pairs
        if reads == [1]
        and mode.weights[weight] == mode.norms[norm] == 1
        and weight in layers
        and norm in norms
        and folds(model.get_submodule(layers[weight]), model.get_submodule(norms[norm]))
    ]
    apply(model, edits)
    return edits
