"""Trains a zoo model on real data, so that there is something to compress."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from compressor import data as sources
from compressor import zoo
from compressor.errors import InputError
from compressor.loading import checkpoint
from compressor.loading.checkpoint import ZOO
from compressor.loading.task import SPLIT_SEED
from compressor.metrics import METRICS, metric_of
from compressor.task import Kind, Split
from compressor.training.evaluation import evaluate
from compressor.training.loop import Epoch, Watch, fit
from compressor.training.recovery import from_labels
from compressor.training.settings import Training


@dataclass(frozen=True)
class Trained:
    """A model file, its metric on the test split, and whether it was there before."""

    path: Path
    metric: str
    value: float
    examples: int
    existed: bool = False


def demo(
    model: str = "cnn",
    *,
    data: str | None = None,
    epochs: int | None = None,
    out: str | Path = "model.pt",
    seed: int = 0,
    fresh: bool = False,
    shown: Callable[[Epoch, int, float], None] = lambda facts, epochs, seconds: None,
) -> Trained:
    """Trains the zoo's ``model`` and writes a self-describing file to ``out``.

    ``data`` is a data spec, by default the model's natural small task. The same call again finds
    the file and leaves it. Raises :class:`InputError` when ``out`` holds something else.
    """
    path = Path(out)
    if model not in zoo.MODELS:
        raise InputError(f"--model {model!r} is unknown: choose from {', '.join(zoo.MODELS)}")
    if epochs is not None and epochs < 1:
        raise InputError(f"--epochs {epochs}: give 1 or more")
    if seed < 0:
        raise InputError(f"--seed {seed}: give 0 or more")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: the folder {path.parent} does not exist")
    entry = zoo.MODELS[model]
    asked = {
        "model": model,
        "data": data or entry.data,
        "epochs": epochs or entry.epochs,
        "seed": seed,
    }
    if path.exists() and not fresh:
        try:
            about = checkpoint.read(path).about
        except InputError:
            about = {}
        if about.get("demo") != asked:
            raise InputError(f"--out {path} holds something else: name another file or add --fresh")
        return Trained(path, about["metric"], about["value"], about["examples"], existed=True)
    given = sources.read(data or entry.data, SPLIT_SEED)
    if given.kind is None:
        raise InputError(f"--data {given.name!r} does not say its kind of task: use a built-in one")
    inputs, _ = given.splits.train.head(1)
    outputs = given.outputs or _width(given.kind, given.splits.train)
    arguments = zoo.arguments_for(model, inputs[0].shape[1:], outputs)
    torch.manual_seed(seed)
    network = zoo.build(model, arguments)
    metric = metric_of(given.kind)
    how = METRICS[given.kind][metric]
    fit(
        network,
        given.splits,
        from_labels(given.kind),
        Training(epochs=epochs or entry.epochs, learning_rate=entry.learning_rate),
        metric=(metric, how),
        seed=seed,
        watching=lambda resumed: nullcontext(Watch(shown)),
    )
    value = evaluate(network, given.splits.test, how)
    examples = len(given.splits.test)
    about = {"demo": asked, "metric": metric, "value": value, "examples": examples}
    checkpoint.save(
        network,
        path,
        factory=f"{ZOO}{model}",
        arguments=arguments,
        inputs=tuple(map(torch.from_numpy, given.splits.train.head(64)[0])),
        kind=given.kind,
        data=given.name,
        about=about,
    )
    return Trained(path, metric, value, examples)


def _width(kind: Kind, train: Split) -> int:
    """How many outputs the targets call for, where the data does not say."""
    targets = np.concatenate([targets for _, targets in train.batches(4096)])
    if kind in ("classification", "segmentation"):
        return int(targets.max()) + 1
    return 1 if targets.ndim == 1 else int(targets.shape[1])
