"""Two processes that train together take the steps of one: weights, history and what is kept.

Run by torchrun, this file is what each of the two does: every case, in order, into a folder.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor import Split, Splits, Task
from compressor.task import Input
from compressor.training import world
from compressor.training.recovery import Aim, recover
from compressor.training.settings import Training

CLOSE = 1e-9
"""In float64: two processes add up in another order, and that is all. In float32 it is 1e-5."""

EXAMPLES = 101
RNG = np.random.default_rng(0)
X = RNG.standard_normal((EXAMPLES + 60, 1, 6, 6))
Y = (X.mean(axis=(1, 2, 3)) > 0).astype(np.int64) + (X[:, 0, 0, 0] > 0.5)


def net(width: int = 6, *, seed: int = 0, normal: bool = False, spare: bool = False) -> nn.Module:
    """A small convolutional net in float64, without anything that looks at a whole batch."""
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(1, width, 3, padding=1),
        *([nn.BatchNorm2d(width)] if normal else []),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(9 * width, 3),
    ]
    model = nn.Sequential(*layers)
    return (Spare(model) if spare else model).double()


class Spare(nn.Module):
    """With a head that no step uses, as auxiliary ones are in evaluation."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.unused = body, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


def task_of(reference: nn.Module, examples: int = EXAMPLES, **changes: Any) -> Task:
    whole = Split.arrays(X, Y)
    train = whole.take(np.arange(examples))
    validate = whole.take(np.arange(EXAMPLES, EXAMPLES + 37))
    test = whole.take(np.arange(EXAMPLES + 37, len(Y)))
    given: dict[str, Any] = {
        "name": "model",
        "kind": "classification",
        "model": lambda: copy.deepcopy(reference).eval(),
        "source": {"factory": "live:tests", "arguments": {}},
        "inputs": (Input("input", (1, 6, 6), "float64"),),
        "metric": "cross_entropy",
        "splits": Splits(train, validate, train, test),
    }
    return Task(**{**given, **changes})


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.multi_margin_loss(outputs, targets)


def whole(model: Any, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """A user's whole step, which also looks at a layer of the model by its name."""
    weight: Tensor = model[0].weight
    return nn.functional.cross_entropy(model(*inputs), targets) + weight.square().sum()


def twice(model: Any, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """A user's step that runs the model two times."""
    apart = model(*inputs) - model(*(one.flip(-1) for one in inputs))
    return nn.functional.cross_entropy(model(*inputs), targets) + apart.square().mean()


FUNCTIONS = {f"tests:{one.__name__}": one for one in (margin, whole, twice)}


@dataclass(frozen=True)
class Case:
    """What is trained: a student, settings of training, the aim, and what is added to the loss."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    aim: Aim = Aim({"labels": 1.0})
    student: Callable[[], nn.Module] = net
    kept: bool = False
    penalty: float = 0.0

    def run(self, folder: Path) -> tuple[nn.Module, list[dict[str, float]], dict[str, Any]]:
        """The model after training, the history and the facts."""
        task = task_of(net(9, seed=7), functions=FUNCTIONS)
        # The last step has one example: fewer than there are processes.
        training = Training(**{"epochs": 2, "batch_size": 25, **self.settings})
        model = self.student()
        given: dict[str, Any] = {}
        if self.penalty:
            given["penalty"] = lambda: (
                self.penalty * sum(one.square().sum() for one in model.parameters())
            )
        if self.kept:
            given |= {"into": folder / "recovered", "key": "a case"}
        fitted = recover(model, task, training, self.aim, keep="last", **given)
        return model, fitted.history, fitted.facts


KD = Aim({"labels": 0.5, "kd": 0.5})
HINT = Aim({"labels": 0.5, "hint": 0.5})
CASES: dict[str, Case] = {
    "plain": Case(),
    "sgd, odd": Case({"optimizer": "nesterov", "schedule": "cosine", "batch_size": 17}),
    "smoothing": Case({"smoothing": 0.1, "weight_decay": 0.1}),
    "accumulate": Case({"accumulate": 3, "batch_size": 9}),
    "clip": Case({"clip": 0.05}),
    "clip, accumulate": Case({"clip": 0.05, "accumulate": 2, "batch_size": 13}),
    "ema": Case({"ema": 0.9}),
    "l1": Case({"l1": 0.01, "accumulate": 2}),
    "penalty": Case(penalty=0.01),
    "teacher": Case(aim=KD),
    "kept teacher": Case(aim=KD, kept=True),
    "hint": Case(aim=HINT),
    "hint, clip, accumulate": Case({"clip": 0.05, "accumulate": 2, "batch_size": 13}, HINT),
    "hint alone": Case(aim=Aim({"hint": 1.0}, layers=("2",))),
    "attention": Case(aim=Aim({"labels": 0.5, "attention": 0.5})),
    "own": Case(aim=Aim({"tests:margin": 0.5, "kd": 0.5})),
    "own step": Case(aim=Aim({"tests:whole": 1.0})),
    "own step, twice": Case(aim=Aim({"tests:twice": 1.0})),
    "spare": Case(student=partial(net, spare=True)),
    "spare, l1": Case({"l1": 0.01}, student=partial(net, spare=True)),
    "spare, penalty": Case(penalty=0.01, student=partial(net, spare=True)),
    "small batches": Case({"batch_size": 2, "epochs": 1}),
    "shard": Case({"shard": True}),
    "shard, sgd, odd": Case({"shard": True, "optimizer": "sgd", "batch_size": 17}),
    "shard, accumulate": Case({"shard": True, "accumulate": 3, "batch_size": 9}),
    "shard, clip": Case({"shard": True, "clip": 0.05}),
    "shard, l1": Case({"shard": True, "l1": 0.01}),
    "shard, penalty": Case({"shard": True}, penalty=0.01),
    "shard, teacher": Case({"shard": True}, KD, kept=True),
    "shard, hint": Case({"shard": True}, HINT),
    "shard, hint, clip": Case({"shard": True, "clip": 0.05}, HINT),
    "shard, own step": Case({"shard": True}, Aim({"tests:whole": 1.0})),
    "shard, spare": Case({"shard": True}, student=partial(net, spare=True)),
}


def each(folder: Path, names: list[str]) -> None:
    """What one of the processes does with each case."""
    torch.set_num_threads(1)
    world.PATIENCE = timedelta(seconds=40)
    with world.joined() as around:
        for name in names:
            own = folder / str(around.rank)
            own.mkdir(exist_ok=True)
            found: dict[str, Any]
            try:
                with world.together(around):
                    model, history, facts = CASES[name].run(own)
                found = {"state": model.state_dict(), "history": history, "facts": facts}
            except Exception as error:
                import traceback

                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            torch.save(found, own / f"{name}.pt")


if __name__ == "__main__":
    each(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
