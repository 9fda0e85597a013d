"""Everything that trains, through the command line and the call, on real data."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from typer.testing import CliRunner

import compressor
from compressor import InputError, Report, pipeline
from compressor.cli import app
from compressor.demo import demo
from compressor.report import problem

OWN = """
import torch
import torch.nn.functional as F
from torch import nn

def student():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))

def wide():
    return nn.Linear(64, 11)

def loss(outputs, targets, teacher):
    return F.cross_entropy(outputs, targets) + F.mse_loss(outputs, teacher)

def nothing(outputs):
    return outputs.sum() * float("nan")

def shifted(batch):
    return batch + 0.01

def fraction(outputs, targets):
    return (outputs.argmax(1) == targets).astype(float)
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN, encoding="utf-8")
    return str(path)


def quick(model: Any, out: Path, **settings: Any) -> Report:
    """A run on one thread of the CPU."""
    report = pipeline.run(model, out=out, provider=("cpu",), threads=(1,), **settings)
    assert problem(json.loads(json.dumps(report.document))) is None
    return report


def row(report: Report, name: str) -> dict[str, Any]:
    return next(one for one in report.document["artifacts"] if one["name"] == name)


def facts(report: Report, name: str = "recovered", stage: str = "distill") -> dict[str, Any]:
    steps = row(report, name)["steps"]
    return next(step["facts"] for step in reversed(steps) if step["stage"] == stage)  # type: ignore[no-any-return]


def test_a_student_is_a_row_of_its_own(trained: Path, tmp_path: Path, own: str) -> None:
    report = quick(
        trained, tmp_path / "run", student=f"{own}:student", epochs=8, quantize="int8-static"
    )
    names = [one["name"] for one in report.document["artifacts"]]
    assert names == ["baseline", "student", "recovered", "int8-static"]
    accuracy = {name: row(report, name)["accuracy"]["accuracy"] for name in names}
    assert accuracy["student"] < 0.4 < 0.8 < accuracy["recovered"]
    assert row(report, "student")["params"] == row(report, "recovered")["params"] == 2970
    assert facts(report)["training"]["teacher"] == "the original"
    # What was found replays without the flags, but not without the name of the code.
    recipe = tmp_path / "run" / "recipe.toml"
    with pytest.raises(InputError, match=f"is code to run: add --student {own}:student"):
        quick(trained, tmp_path / "again", recipe=recipe)


def test_another_teacher_and_several(trained: Path, tmp_path: Path) -> None:
    other = demo("cnn", epochs=3, seed=5, out=tmp_path / "other.pt").path
    common: dict[str, Any] = {"prune": 0.5, "epochs": 1, "distill": True}
    two = quick(trained, tmp_path / "two", **common, teacher=[trained, other])
    alone = quick(trained, tmp_path / "alone", **common)
    same = quick(trained, tmp_path / "same", **common, teacher=[trained])
    shas = [row(report, "recovered")["sha256"] for report in (two, alone, same)]
    assert shas[0] != shas[1] == shas[2]
    assert facts(two)["training"]["teacher"] == "2 of --teacher"
    assert len({report.document["fingerprint"] for report in (two, alone, same)}) == 3


def test_functions_of_the_user_s_own_by_name_and_alive(
    trained: Path, tmp_path: Path, own: str
) -> None:
    def loss(outputs: Tensor, targets: Tensor, teacher: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + F.mse_loss(outputs, teacher)

    common: dict[str, Any] = {"prune": 0.5, "epochs": 2}
    named = quick(
        trained, tmp_path / "named", **common, loss=f"{own}:loss", augment=f"{own}:shifted",
        metric=f"{own}:fraction",
    )  # fmt: skip
    alive = quick(
        trained, tmp_path / "alive", **common, loss=loss, augment=[lambda batch: batch + 0.01],
        metric=lambda outputs, targets: (outputs.argmax(1) == targets).astype(float),
    )  # fmt: skip
    assert row(named, "recovered")["sha256"] == row(alive, "recovered")["sha256"]
    metric = named.document["task"]["metric"]
    assert metric == f"{own}:fraction"
    accuracy = row(named, "recovered")["accuracy"]
    assert accuracy[metric] == accuracy["accuracy"]
    assert facts(named)["losses"] == {f"{own}:loss": 1.0}


def test_a_recipe_cannot_name_code(trained: Path, tmp_path: Path) -> None:
    for setting in ('loss = "os:system"', 'augment = ["os:system"]'):
        path = tmp_path / "recipe.toml"
        path.write_text(f'[[step]]\nstage = "distill"\nepochs = 1\n{setting}\n', encoding="utf-8")
        with pytest.raises(InputError, match="'os:system' is code to run: add --"):
            quick(trained, tmp_path / "run", recipe=path)
    assert not (tmp_path / "run").exists()


def test_few_labels_and_none(trained: Path, tmp_path: Path) -> None:
    few = quick(trained, tmp_path / "few", data="digits?labelled=0.05", prune=0.5, epochs=3)
    assert row(few, "recovered")["accuracy"]["accuracy"] > 0.8
    rng = np.random.default_rng(0)
    from sklearn.datasets import load_digits

    pictures = (load_digits().images / 16).astype(np.float32)[:, None]
    bare = {"x": pictures[rng.permutation(len(pictures))]}
    none = quick(trained, tmp_path / "none", data=bare, prune=0.5, epochs=3)
    assert none.document["task"]["labels"] == "the model's own answers"
    assert row(none, "baseline")["accuracy"]["accuracy"] == 1.0  # it agrees with itself
    assert row(none, "recovered")["accuracy"]["accuracy"] > 0.85
    assert facts(none)["losses"] == {"kd": 1.0}
    with pytest.raises(InputError, match="loss labels: the data has none"):
        quick(trained, tmp_path / "never", data=bare, prune=0.5, distill=False)


def test_a_compressed_model_is_a_model_like_any_other(trained: Path, tmp_path: Path) -> None:
    first = quick(trained, tmp_path / "first", prune=0.5, epochs=2)
    pruned = tmp_path / "first" / "artifacts" / "recovered.safetensors"
    more = quick(pruned, tmp_path / "more", data="digits", prune=0.25, epochs=2)
    sizes = [row(report, name)["params"] for report, name in
             ((first, "recovered"), (more, "baseline"), (more, "recovered"))]  # fmt: skip
    assert sizes[0] == sizes[1] > sizes[2]
    again = compressor.load(tmp_path / "more" / "artifacts" / "recovered.safetensors")
    assert sum(one.numel() for one in again.parameters()) == sizes[2]


def test_what_is_asked_for_is_in_the_recipe_and_the_report(trained: Path, tmp_path: Path) -> None:
    report = quick(
        trained, tmp_path / "run", prune=0.5, epochs=3, loss="labels=0.3,kd=0.7", folds=3,
        train={"optimizer": "sgd", "schedule": "cosine", "learning_rate": 0.05, "ema": 0.9,
               "clip": 1.0, "smoothing": 0.1}, log=("csv", "json", "tensorboard", "trace"),
    )  # fmt: skip
    (step,) = [one for one in report.document["recipe"] if one["stage"] == "distill"]
    assert step["settings"] | {"optimizer": "sgd", "ema": 0.9} == step["settings"]
    said = facts(report)
    assert said["losses"] == {"labels": 0.3, "kd": 0.7}
    assert said["folds"]["folds"] == 3
    assert 0.5 < said["folds"]["mean"] <= 1
    assert said["training"]["optimizer"] == "sgd"
    assert said["training"]["examples_per_s"] > 0
    logs = tmp_path / "run" / "artifacts" / "logs"
    rows = list(csv.DictReader((logs / "recovered.csv").read_text("utf-8").splitlines()))
    assert [float(one["loss"]) for one in rows] == [one["loss"] for one in said["history"]]
    assert list((logs / "tensorboard" / "recovered").iterdir())
    assert "traceEvents" in json.loads((logs / "recovered.trace.json").read_text("utf-8"))
    page = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    for title in ("## Metrics", "## Training", "## Learning curves"):
        assert title in page
    again = quick(trained, tmp_path / "replay", recipe=tmp_path / "run" / "recipe.toml")
    assert row(again, "recovered")["sha256"] == row(report, "recovered")["sha256"]


def test_robustness_is_a_section(trained: Path, tmp_path: Path) -> None:
    report = quick(trained, tmp_path / "run", prune=0.5, epochs=1, robustness=True)
    for name in ("baseline", "pruned", "recovered"):
        seen = {one["what"] for one in row(report, name)["robustness"]}
        assert {"clean", "noise", "blur", "contrast", "fgsm", "pgd"} <= seen
    assert "## Robustness" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_without_any_data_pictures_are_made_up(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(288, 10))(torch.rand(64, 1, 8, 8))  # has statistics to draw from
    path, batch = tmp_path / "bare.pt2", torch.export.Dim("batch")
    with warnings.catch_warnings(action="ignore"):
        examples = (torch.zeros(2, 1, 8, 8),)
        shapes = ({0: batch},)
        torch.export.save(torch.export.export(net.eval(), examples, dynamic_shapes=shapes), path)
    report = quick(path, tmp_path / "run", prune=0.25, epochs=1, train={"synthesize": 16})
    assert facts(report)["losses"] == {"kd": 1.0}
    assert row(report, "recovered")["accuracy"] == {"skipped": "no data"}


def test_two_outputs_and_targets_of_any_shape(tmp_path: Path) -> None:
    """A whole training step of the user's own, for a task that no kind of ours describes."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
            self.where, self.what = nn.Linear(16, 2), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            seen = self.body(x)
            return self.where(seen), self.what(seen)

    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 4)).astype(np.float32)
    y = np.concatenate([x[:, :2], (x[:, 2:3] > 0)], axis=1).astype(np.float32)

    def step(model: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        where, what = model(*inputs)
        return F.mse_loss(where, targets[:, :2]) + F.cross_entropy(what, targets[:, 2].long())

    def near(outputs: Any, targets: Any) -> Any:
        return -np.abs(outputs - targets[:, :2]).mean(axis=1)

    torch.manual_seed(0)
    report = quick(Two(), tmp_path / "run", data=(x, y), epochs=20, loss=step, metric=near)
    assert report.document["task"]["kind"] == "custom"
    before, after = (row(report, name)["accuracy"] for name in ("baseline", "recovered"))
    assert after[report.document["task"]["metric"]] > before[report.document["task"]["metric"]]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"student": "{own}:wide"}, "--student"),
        ({"teacher": "none.pt"}, "none.pt"),
        ({"loss": "kl"}, "loss 'kl' is unknown: choose from labels"),
        ({"loss": "kd=x"}, "--loss 'kd=x': give one name"),
        ({"loss": "nowhere:loss"}, "--loss 'nowhere:loss': importing nowhere failed"),
        ({"augment": "spin"}, "augment 'spin'"),
        ({"augment": "flip=2"}, "flip"),
        ({"log": "paper"}, "--log 'paper' is unknown"),
        ({"train": {"optimiser": "sgd"}}, "distill has no setting 'optimiser'; it has epochs"),
        ({"train": {"optimizer": "lion"}}, "optimizer = 'lion'"),
        ({"train": {"precision": "fp16"}}, "precision = 'fp16' needs CUDA"),
        ({"train": {"device": "cuda"}}, "device = 'cuda': PyTorch sees no CUDA device here"),
        ({"folds": 2000}, "folds = 2000"),
        ({"processes": 2}, "--processes 2: 1 runs here; start them with torchrun"),
        ({"epochs": 0, "loss": "kd"}, "--epochs 0: nothing is trained, so loss has no use"),
    ],
)
def test_wrong_training_is_one_line(
    trained: Path, tmp_path: Path, own: str, wrong: dict[str, Any], said: str
) -> None:
    given = {
        key: value.format(own=own) if isinstance(value, str) else value
        for key, value in wrong.items()
    }
    with pytest.raises(InputError) as caught:
        quick(trained, tmp_path / "run", **{"prune": 0.5, "epochs": 1, **given})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists() or "folds" in wrong


def test_a_loss_that_is_no_number_is_one_line_and_names_the_step(
    trained: Path, tmp_path: Path, own: str
) -> None:
    with pytest.raises(compressor.StageError, match=r"the loss became nan in epoch 1, step 1;"):
        quick(
            trained, tmp_path / "run", prune=0.5, epochs=1, loss=f"{own}:nothing",
            quantize="int8-dynamic",
        )  # fmt: skip


def test_flags_become_the_recipe(trained: Path) -> None:
    found = CliRunner().invoke(
        app,
        ["run", str(trained), "--prune", "0.5", "--loss", "labels=0.3,hint=0.7", "--augment",
         "flip,crop=2", "--folds", "4", "--train", "optimizer=sgd", "--train", "ema=0.5",
         "--epochs", "3", "--dry-run"],
    )  # fmt: skip
    assert found.exit_code == 0
    for line in ('optimizer = "sgd"', "ema = 0.5", "folds = 4", "epochs = 3", "hint = 0.7"):
        assert line in found.output
    assert "crop=2" in found.output


@pytest.mark.slow
def test_training_that_was_killed_goes_on_and_ends_the_same(trained: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of training, the real command, the same again."""
    flags = ["--prune", "0.5", "--epochs", "12", "--threads", "1", "--provider", "cpu"]
    # A training that is over within SAVED seconds leaves nothing to go on from.
    often = "from compressor.training import loop; loop.SAVED = 0.0"
    start = f"{often}; from compressor.cli import main; main()"
    command = [sys.executable, "-c", start, "run", str(trained), *flags, "--out"]
    state = tmp_path / "run" / "artifacts" / "recovered.training"
    process = subprocess.Popen([*command, str(tmp_path / "run")], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = state.exists()
    ran = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    whole = quick(trained, tmp_path / "whole", prune=0.5, epochs=12)
    report = Report.read(tmp_path / "run")
    assert killed
    assert not state.exists()
    assert row(report, "recovered")["sha256"] == row(whole, "recovered")["sha256"]
    epochs = [one["epoch"] for one in facts(report)["history"]]
    assert epochs == list(range(1, 13))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"quantize": "int8-dynamic"},
        {"prune": 0.5, "distill": False},
        {"prune": 0.5, "epochs": 0},
    ],
)
def test_a_teacher_of_whom_nothing_is_learnt_is_one_line(
    trained: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="--teacher: nothing is learnt from it here"):
        quick(trained, tmp_path / "run", teacher=[trained], **given)
    assert not (tmp_path / "run").exists()


def test_distill_alone_trains_on(trained: Path) -> None:
    (step,) = pipeline.plan(distill=True)
    assert (step.stage, step.settings["loss"]) == ("distill", "distill")
    for distill in (True, False):
        with pytest.raises(InputError, match="--loss says what is learnt, and so does"):
            pipeline.plan(prune=0.5, distill=distill, train={"loss": "hint"})
