"""From a model and data, as handed in, to a task; checked before any work starts."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compressor import data as sources
from compressor import names, zoo
from compressor.errors import InputError, one_line
from compressor.loading import checkpoint, torchfile
from compressor.loading.checkpoint import ZOO, Described
from compressor.metrics import metric_of
from compressor.task import Batch, Input, Inputs, Kind, Splits, Task

Factory = Callable[[], nn.Module]
Arch = str | Factory | None

SPLIT_SEED = 0
"""Data is always carved the same way, whatever ``seed``: otherwise a model that was trained on one
split would be judged on a test split that holds its own training examples."""


def load(path: str | Path, arch: Arch = None) -> nn.Module:
    """The model in ``path`` as an ``nn.Module`` in eval mode, pruned structure included.

    ``path`` is a self-describing ``model.pt``, a torch-form artifact (``.safetensors``), or weights
    together with ``arch``: a factory or its name. Executes nothing that the file holds; raises
    :class:`InputError` for a file that cannot be read.
    """
    return _loaded(Path(path), arch)[0]


def task(
    model: str | Path | nn.Module,
    *,
    data: Any = None,
    arch: Arch = None,
    metric: str | None = None,
    kind: Kind | None = None,
    seed: int = 0,
) -> Task:
    """What must be preserved, from what the user has.

    ``model`` is a path or a live module; ``data`` a spec (``digits``, ``mnist:DIR``,
    ``PKG.MOD:FUNCTION`` ...), live data (see :func:`compressor.data.adopt`) or ``None`` for the
    data that the file names. Raises :class:`InputError` when model and data do not fit.
    """
    if isinstance(model, nn.Module):
        reference, said = copy.deepcopy(model).cpu().eval(), Described({})
        where = f"{type(model).__module__}.{type(model).__qualname__}"
        source: Mapping[str, Any] = {"factory": f"live:{where}", "arguments": {}}
        name = re.sub(r"\W+", "-", type(model).__name__).lower()
    else:
        reference, source, said = _loaded(Path(model), arch)
        name = Path(model).stem
    _check_weights(reference, name)
    spec = data if data is not None else said.data
    given = None
    if isinstance(spec, str):
        given = sources.read(spec, SPLIT_SEED, trusted=data is not None)
    elif spec is not None:
        given = sources.adopt(spec, SPLIT_SEED)
    splits = given.splits if given else None
    inputs = _inputs(said, splits, name)
    output = _probe(reference, inputs, splits, name)
    known = kind or (given.kind if given else None) or said.kind
    if splits is not None:
        known = known or _kind(output, splits.train.head(256)[1])
        check_targets(known, output, splits)
    known = known or (
        "classification" if output.ndim == 2 and output.shape[1] > 1 else "regression"
    )
    return Task(
        name=name,
        kind=known,
        model=lambda: copy.deepcopy(reference),
        source=source,
        inputs=inputs,
        metric=metric_of(known, metric),
        splits=splits,
        data=given.name if given else None,
        seed=seed,
    )


def _loaded(path: Path, arch: Arch) -> tuple[nn.Module, Mapping[str, Any], Described]:
    if path.suffix == torchfile.SUFFIX and path.is_file() and torchfile.header(path):
        model, source = torchfile.rebuild(path, lambda source: _build(source, arch, path))
        return model, source, Described({})
    said = checkpoint.read(path)
    source = said.source or {"factory": _arch_name(arch), "arguments": {}}
    if not said.source and arch is None:
        raise InputError(
            f"{path} holds weights only: add --arch PKG.MOD:FACTORY, the function that builds "
            "its model"
        )
    model = _build(source, arch, path)
    return torchfile.load_state(model, said.state, path).eval(), source, said


def _build(source: Mapping[str, Any], arch: Arch, path: Path) -> nn.Module:
    """The untrained model. A name out of a file resolves to the zoo; any other must be given."""
    name = str(source["factory"])
    if arch is None and name.startswith(ZOO):
        return zoo.build(name.removeprefix(ZOO), source["arguments"])
    if arch is None:
        raise InputError(
            f"{path} names the factory {name!r}, which is not in the zoo and could run any code: "
            f"add --arch {name} to the command line if you trust it"
        )
    found = names.function(arch, "--arch") if isinstance(arch, str) else arch
    arguments = source["arguments"] if name == _arch_name(arch) else {}
    built = names.call(lambda: found(**arguments), _arch_name(arch), "--arch")
    if not isinstance(built, nn.Module):
        raise InputError(
            f"--arch {_arch_name(arch)} gave a {type(built).__name__}: it must return an nn.Module"
        )
    return built.cpu()


def _arch_name(arch: Arch) -> str:
    if arch is None or isinstance(arch, str):
        return arch or ""
    return f"live:{getattr(arch, '__module__', '')}.{getattr(arch, '__qualname__', 'factory')}"


def _check_weights(model: nn.Module, name: str) -> None:
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{name}: weight {key!r} holds NaN or infinity: the model is broken")


def _inputs(said: Described, splits: Splits | None, name: str) -> tuple[Input, ...]:
    if splits is None:
        if not said.inputs:
            raise InputError(
                f"the input shape of {name} is unknown: add --data SPEC, whose examples say it"
            )
        return said.inputs
    seen = checkpoint.inputs_like(splits.train.head(64)[0])
    for wanted, found in zip(said.inputs, seen, strict=False):
        if wanted.shape != found.shape:
            raise InputError(
                f"the data's examples have shape {found.shape}, {name} takes {wanted.shape}"
            )
    if said.inputs and len(said.inputs) != len(seen):
        raise InputError(f"the data has {len(seen)} inputs, {name} takes {len(said.inputs)}")
    return seen


def _probe(
    model: nn.Module, inputs: tuple[Input, ...], splits: Splits | None, name: str
) -> torch.Tensor:
    """The first output of one forward pass over two examples."""
    batch: Inputs
    if splits is None:
        batch = tuple(given.synthetic(2, 0) for given in inputs)
    else:
        batch = splits.train.head(2)[0]
    shapes = ", ".join(f"{part.dtype} {part.shape}" for part in batch)
    try:
        with torch.inference_mode():
            output = first(model(*map(torch.from_numpy, batch)))
    except Exception as error:
        raise InputError(
            f"{name} cannot take the data's examples ({shapes}): {one_line(error, 160)}"
        ) from None
    if output.ndim == 0 or output.shape[0] != 2:
        raise InputError(
            f"{name} turns a batch of 2 into shape {tuple(output.shape)}: the first axis of its "
            "output must be the example"
        )
    if not torch.isfinite(output).all():
        raise InputError(f"{name} gives NaN or infinity on the data's first examples")
    return output


def first(output: Any) -> torch.Tensor:
    """The first tensor of what a model returned: the one that metrics judge."""
    while not isinstance(output, torch.Tensor):
        parts = list(output.values()) if isinstance(output, Mapping) else output
        output = parts[0]
    return output


def _kind(output: torch.Tensor, targets: np.ndarray[Any, Any]) -> Kind:
    """The kind of task that an output ``(2, ...)`` and targets ``(n, ...)`` speak of."""
    whole = np.issubdtype(targets.dtype, np.integer)
    zero_one = bool(np.isin(targets, (0, 1)).all())
    width = output.shape[1] if output.ndim > 1 else 1
    if whole and targets.ndim == 1 and output.ndim == 2 and width > 1:
        return "classification"
    if whole and zero_one and width == 1 and targets.size == len(targets):
        return "binary"
    if whole and zero_one and targets.ndim == 2 and targets.shape[1:] == output.shape[1:]:
        return "multilabel"
    if whole and output.ndim == 4 and targets.ndim == 3:
        return "segmentation"
    if not whole and targets.size // len(targets) == output.numel() // 2:
        return "regression"
    raise InputError(
        f"targets {targets.dtype} {targets.shape} do not fit an output of shape "
        f"{tuple(output.shape)}: no task kind has both"
    )


def check_targets(kind: Kind, output: torch.Tensor, splits: Splits) -> None:
    """Raises :class:`InputError` for the first split whose targets the model cannot have meant."""
    width = output.shape[1] if output.ndim > 1 else 1
    classes = width if kind in ("classification", "segmentation") else 2
    for name in ("train", "validate", "calibrate", "test"):
        for batch in getattr(splits, name).batches(4096):
            _check_batch(kind, name, classes, output, batch)


def _check_batch(kind: Kind, name: str, classes: int, output: torch.Tensor, batch: Batch) -> None:
    targets = batch[1]
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
    low, high = targets.min(), targets.max()
    if low < 0 or high >= classes:
        raise InputError(
            f"labels of {name} run from {low:g} to {high:g}; the model has {classes} classes, so "
            f"they must be 0 to {classes - 1}"
        )
