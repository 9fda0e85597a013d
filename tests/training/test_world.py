"""Two processes that train together take the steps of one: weights, history and what is judged.

Started by torchrun, this file is what each of the two does: every case in order, into a folder.
"""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor import InputError, Split, Splits, StageError, Task
from compressor.artifact import Artifact
from compressor.loading import torchfile
from compressor.metrics import METRICS
from compressor.recipe import Step
from compressor.stages import bind, distill, mask, perform
from compressor.task import Input
from compressor.training import world
from compressor.training.evaluation import evaluate
from compressor.training.recovery import TOLD, Aim, recover
from compressor.training.settings import Training

CLOSE = 1e-7
"""Of weights in float64. Adapters of hidden layers are float32, and losses are added up in it."""

EXAMPLES = 101
RNG = np.random.default_rng(0)
X = RNG.standard_normal((EXAMPLES + 60, 1, 6, 6))
Y = (X.mean(axis=(1, 2, 3)) > 0).astype(np.int64) + (X[:, 0, 0, 0] > 0.5)


def net(
    width: int = 6, *, seed: int = 0, normal: bool = False, spare: bool = False, drop: float = 0.0
) -> nn.Module:
    """A small convolutional net in float64."""
    torch.manual_seed(seed)
    body = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width) if normal else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Dropout(drop),
        nn.Flatten(),
        nn.Linear(9 * width, 3),
    )
    return (Spare(body) if spare else body).double()


class Spare(nn.Module):
    """With a head that no step uses."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.unused = body, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


def task_of(reference: nn.Module, **changes: Any) -> Task:
    whole, last = Split.arrays(X, Y), EXAMPLES + 37
    train = whole.take(np.arange(EXAMPLES))
    validate = whole.take(np.arange(EXAMPLES, last))
    given: dict[str, Any] = {
        "name": "model",
        "kind": "classification",
        "model": lambda: copy.deepcopy(reference).eval(),
        "source": {"factory": "live:tests", "arguments": {}},
        "inputs": (Input("input", (1, 6, 6), "float64"),),
        "metric": "cross_entropy",
        "splits": Splits(train, validate, train, whole.take(np.arange(last, len(Y)))),
    }
    return Task(**{**given, **changes})


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.multi_margin_loss(outputs, targets)


def step(model: Any, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """A user's whole step: it runs the model two times, and knows a layer of it by its place."""
    apart = model(*inputs) - model(*(one.flip(-1) for one in inputs))
    own: Tensor = model[0].weight
    loss = nn.functional.cross_entropy(model(*inputs), targets)
    return loss + apart.square().mean() + 0.1 * own.square().sum()


FUNCTIONS = {f"tests:{one.__name__}": one for one in (margin, step)}
LABELS = Aim({"labels": 1.0})
TAUGHT = Aim({"labels": 0.5, "kd": 0.5})
HINT = Aim({"labels": 0.5, "hint": 0.5})


@dataclass(frozen=True)
class Case:
    """What is trained, and how. Of batches of 25 the last has one example: less than one for each
    process."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    aim: Aim = LABELS
    student: Callable[[], nn.Module] = net
    into: bool = False
    penalty: float = 0.0
    keep: Literal["best", "last"] = "last"

    def run(self, folder: Path) -> dict[str, Any]:
        """The weights after training, the history and the facts."""
        model, given = self.student(), dict[str, Any]()
        if self.penalty:
            given["penalty"] = lambda: (
                self.penalty * sum(one.square().sum() for one in model.parameters())
            )
        if self.into:
            given |= {"into": folder / "recovered", "key": "a case"}
            if not world.here().leader:  # what it kept went with its process
                (folder / f"recovered{TOLD}").unlink(missing_ok=True)
        task = task_of(net(9, seed=7), functions=FUNCTIONS)
        training = Training(**{"epochs": 2, "batch_size": 25, **self.settings})
        fitted = recover(model, task, training, self.aim, keep=self.keep, **given)
        return {"state": model.state_dict(), "history": fitted.history, "facts": fitted.facts}


CASES: dict[str, Case] = {
    "plain": Case(),
    "odd": Case({"optimizer": "nesterov", "schedule": "cosine", "batch_size": 17}),
    "tiny": Case({"batch_size": 2, "epochs": 1}),
    "accumulate": Case({"accumulate": 3, "batch_size": 9}),
    "accumulate, the last alone": Case({"accumulate": 3}),
    "clip": Case({"clip": 0.05}),
    "clip, accumulate": Case({"clip": 0.05, "accumulate": 2, "batch_size": 13}),
    "ema": Case({"ema": 0.9}),
    "smoothing": Case({"smoothing": 0.1, "weight_decay": 0.1}),
    "l1": Case({"l1": 0.01, "accumulate": 2}),
    "penalty": Case(penalty=0.01),
    "teacher": Case(aim=TAUGHT),
    "kept teacher": Case(aim=TAUGHT, into=True),
    "kept teacher, before": Case({"epochs": 3}, TAUGHT, into=True),
    "hint": Case(aim=HINT),
    "hint, clip, accumulate": Case({"clip": 0.05, "accumulate": 2, "batch_size": 13}, HINT),
    "hint alone": Case(aim=Aim({"hint": 1.0}, layers=("2",))),
    "attention": Case(aim=Aim({"labels": 0.5, "attention": 0.5})),
    "own": Case(aim=Aim({"tests:margin": 0.5, "kd": 0.5})),
    "own step": Case(aim=Aim({"tests:step": 1.0})),
    "spare": Case(student=partial(net, spare=True)),
    "spare, l1": Case({"l1": 0.01}, student=partial(net, spare=True)),
    "spare, penalty": Case(penalty=0.01, student=partial(net, spare=True)),
    "shard": Case({"shard": True}),
    "shard, odd": Case({"shard": True, "optimizer": "sgd", "batch_size": 17}),
    "shard, accumulate": Case({"shard": True, "accumulate": 3, "batch_size": 9}),
    "shard, clip": Case({"shard": True, "clip": 0.05}),
    "shard, kept teacher": Case({"shard": True}, TAUGHT, into=True),
    "shard, hint": Case({"shard": True}, HINT),
    "shard, hint, clip": Case({"shard": True, "clip": 0.05}, HINT),
    "shard, spare": Case({"shard": True}, student=partial(net, spare=True)),
}

NORMAL = partial(net, normal=True, drop=0.2)
OTHERS: dict[str, Case] = {
    "normal": Case({"learning_rate": 0.02}, student=NORMAL, keep="best"),
    "normal, ema": Case({"learning_rate": 0.02, "ema": 0.5}, student=NORMAL, keep="best"),
    "normal, shard": Case({"shard": True}, student=NORMAL, keep="best"),
    "infinite": Case({"learning_rate": 1e30, "optimizer": "sgd"}),
}
"""What is not the same as in one process."""

JUDGED = {
    f"{kind}, {name}, {count}": (kind, name, count)
    for kind, metrics in METRICS.items()
    for name in metrics
    for count in (1, 2, 7, 601)
}


def judged(kind: Any, name: str, count: int) -> float:
    """A metric of made-up outputs; 16-bit labels are what masks and large tables have."""
    draw = np.random.default_rng(count)
    pixels = (4, 4) if kind == "segmentation" else ()
    outputs = draw.standard_normal((count, 3, *pixels)).astype(np.float32)
    labels = draw.integers(0, 3, (count, *pixels)).astype(np.int16)
    bits = draw.integers(0, 2, (count, 3)).astype(np.uint8)
    given = {"regression": outputs + draw.standard_normal(outputs.shape).astype(np.float32),
             "binary": bits, "multilabel": bits}  # fmt: skip
    split = Split.arrays(outputs, given.get(kind, labels))
    return evaluate(nn.Identity(), split, METRICS[kind][name])


def each(folder: Path) -> None:
    """What one of the processes does with every case."""
    torch.set_num_threads(1)
    world.PATIENCE = timedelta(seconds=60)
    with world.joined() as around:
        own = folder / str(around.rank)
        own.mkdir()

        def done(run: Callable[[], Any]) -> Any:
            try:
                with world.together(around):
                    return run()
            except Exception as error:
                return f"{type(error).__name__}: {error}"

        for name, case in {**CASES, **OTHERS}.items():
            torch.save(done(partial(case.run, own)), own / f"{name}.pt")
        values = {name: done(partial(judged, *given)) for name, given in JUDGED.items()}
        torch.save(values, own / "judged.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what each of two processes made of every case."""
    folder = tmp_path_factory.mktemp("both")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [sys.executable, *launcher, __file__, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,  # what a crash left undone is missed below
        timeout=200,
        capture_output=True,
    )
    return folder


def made(folder: Path, name: str) -> dict[str, Any]:
    """What the two processes made of a case, which has to be the same."""
    one, two = (torch.load(folder / rank / f"{name}.pt") for rank in ("0", "1"))
    assert isinstance(one, dict), one
    assert one["history"][-1]["loss"] == two["history"][-1]["loss"]
    assert all(torch.equal(value, two["state"][key]) for key, value in one["state"].items())
    return one  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(name: str, both: Path, tmp_path: Path) -> None:
    ours, alone = made(both, name), CASES[name].run(tmp_path)
    start = CASES[name].student().state_dict()
    assert max(float((one - start[key]).abs().max()) for key, one in ours["state"].items()) > 1e-3
    for key, one in alone["state"].items():
        torch.testing.assert_close(ours["state"][key], one, rtol=0, atol=CLOSE)
    for one, two in zip(alone["history"], ours["history"], strict=True):
        for key in ("epoch", "loss", "cross_entropy", "rate"):
            assert two[key] == pytest.approx(one[key], abs=1e-6)
    assert (alone["facts"]["processes"], ours["facts"]["processes"]) == (1, 2)


@pytest.mark.parametrize("name", ["normal", "normal, ema", "normal, shard"])
def test_with_batch_statistics_what_was_judged_is_what_stays(name: str, both: Path) -> None:
    """Each process has statistics of its own share; those of the first are judged and kept."""
    ours = torch.load(both / "0" / f"{name}.pt")
    model, task = NORMAL(), task_of(net())
    model.load_state_dict(ours["state"])
    assert task.splits is not None
    kept = evaluate(model, task.splits.validate, METRICS["classification"]["cross_entropy"])
    best = min(epoch["cross_entropy"] for epoch in ours["history"])
    assert kept == pytest.approx(best, abs=1e-12)


def test_a_loss_that_is_no_number_is_the_same_line_everywhere(both: Path) -> None:
    one, two = (torch.load(both / rank / "infinite.pt") for rank in ("0", "1"))
    assert one == two
    assert one.startswith("StageError: the loss became ")
    assert "lower learning_rate (1e+30)" in one


def test_evaluation_is_shared(both: Path) -> None:
    one, two = (torch.load(both / rank / "judged.pt") for rank in ("0", "1"))
    alone = {name: judged(*given) for name, given in JUDGED.items()}
    assert one == pytest.approx(alone, abs=1e-12, nan_ok=True)
    assert two == pytest.approx(one, abs=0, nan_ok=True)


@pytest.mark.parametrize(
    ("stage", "settings"), [("distill", {"l1": 0.1}), ("sparsify", {}), ("qat", {})]
)
def test_what_looks_at_whole_weights_is_not_sharded(stage: str, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="shard"):
        bind([Step(stage, {**settings, "shard": True}, "recovered", "baseline")])


def test_masked_weights_are_not_sharded(tmp_path: Path) -> None:
    task = task_of(net())
    torchfile.write(tmp_path / "model.safetensors", task.model(), task.source)
    source = Artifact.of(tmp_path / "model.safetensors", "torch")
    masked = perform(mask, source, task, tmp_path / "masked", sparsity=0.5)
    with pytest.raises(InputError, match="shard"):
        perform(distill, masked, task, tmp_path / "recovered", epochs=1, shard=True)


def free() -> str:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return str(one.getsockname()[1])


@pytest.mark.parametrize("rank", ["0", "1"])
def test_nobody_waits_for_ever_for_processes_that_do_not_come(
    rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "MEETING", timedelta(seconds=1))
    given = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free()}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="do not find each other") as raised, world.joined():
        pass
    assert "\n" not in str(raised.value)
    assert world.here() is world.ALONE


@pytest.mark.parametrize(
    ("environment", "asked", "said"),
    [
        ({}, 2, "--processes 2: 1 runs here"),
        ({"WORLD_SIZE": "1"}, 2, "--processes 2: 1 runs here"),
        ({"WORLD_SIZE": "2"}, 3, "--processes 3: 2 run here"),
        ({"WORLD_SIZE": "2"}, None, "do not find each other"),
        ({"WORLD_SIZE": "many"}, None, "WORLD_SIZE"),
    ],
)
def test_a_wrong_number_of_processes_is_one_line(
    environment: dict[str, str], asked: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said) as raised, world.joined(asked):
        pass
    assert "\n" not in str(raised.value)


def test_one_process_is_a_world_of_one() -> None:
    with world.joined() as around, world.joined(1) as same:
        assert around is same is world.here() is world.ALONE
    values = torch.arange(6.0).reshape(3, 2)
    assert world.ALONE.gathered(values, 3) is values
    assert world.ALONE.told(values) is values
    assert list(world.ALONE.mine([1, 2, 3])) == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (RuntimeError("Expected a tensor of rank 3, got 2"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_only_an_error_of_the_connection_is_a_lost_process(error: Exception, lost: bool) -> None:
    raised = pytest.raises(world.Lost if lost else RuntimeError)
    with raised as found, world.together(world.World(0, 2)):
        raise error
    assert isinstance(found.value, StageError) is lost
    assert world.here() is world.ALONE


if __name__ == "__main__":
    each(Path(sys.argv[1]))
