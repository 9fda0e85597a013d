"""Runs that torchrun starts: one report, the same weights, and nothing left of what was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from compressor import load
from compressor.cli import app
from compressor.demo import demo
from compressor.loading import task
from compressor.pipeline.folder import Folder
from compressor.pipeline.making import Maker
from compressor.recipe import Step
from compressor.report import Report
from compressor.stages import STAGES, bind, perform
from compressor.training.world import Lost

CLOSE = 1e-5
"""In float32: two processes add up in another order."""

FLAGS = ("--prune", "0.5", "--epochs", "4", "--threads", "1", "--provider", "cpu")
FLAGS += ("--train", "batch_size=33", "--loss", "./own.py:loss")

OWN = '''
import os
import time
from pathlib import Path

from torch.nn import functional as F

calls = 0


def loss(outputs, targets, teacher):
    """Of labels and teacher; notes its calls, and in one process waits or fails where asked to."""
    global calls
    calls += 1
    if calls == 1 and "HOLD" in os.environ:
        time.sleep(1.5)  # where training stands is written once a second at most
    if os.environ.get("RANK") == "1":
        Path("calls").write_text(str(calls))
        if os.environ.get("HOLD") == str(calls):
            Path("held").touch()
            time.sleep(300)
        if os.environ.get("FAIL") == str(calls):
            raise ValueError("a fault of one process")
    if os.environ.get("ALL_FAIL") == str(calls):
        raise ValueError("a fault of all processes")
    wanted = targets.reshape(outputs.shape).to(outputs.dtype)
    return F.binary_cross_entropy_with_logits(outputs, wanted) + F.mse_loss(outputs, teacher)
'''

MARK = "COMPRESSOR_TEST"
WAIT = 180
"""Seconds that a run may take, beside busy neighbours: only what hangs takes so long."""


@dataclass(frozen=True)
class Ended:
    """What a run said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """What our processes said went wrong; the launcher has much to say beside."""
        return [line for line in self.err.splitlines() if line.startswith("compressor: error")]


class Launch:
    """``torchrun --nproc-per-node 2 -m compressor run`` in a session and a folder of its own."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.folder = folder
        self.mark = f"{folder}-{time.monotonic_ns()}"
        (folder / "tmp").mkdir(exist_ok=True)
        (folder / "own.py").write_text(OWN, encoding="utf-8")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        given = {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp"), MARK: self.mark}
        self.process = subprocess.Popen(
            [*launcher, "-m", "compressor", "run", *arguments],
            cwd=folder,
            env={**os.environ, **given, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ended(self) -> Ended:
        """Waits for the end; a run that hangs is a failure, and ended by force."""
        try:
            out, err = self.process.communicate(timeout=WAIT)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            for one in self.left():
                os.kill(one, signal.SIGKILL)
            out, err = self.process.communicate()
            pytest.fail(f"it hung: {out}{err}")
        return Ended(self.process.returncode, out, err)

    def left(self, *, rank: str | None = None) -> list[int]:
        """Processes of this launch that are alive, or the one of a rank."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                environment = path.read_bytes().split(b"\0")
            except OSError:
                continue
            ranked = rank is None or f"RANK={rank}".encode() in environment
            if f"{MARK}={self.mark}".encode() in environment and ranked:
                found.append(int(path.parent.name))
        return found

    def held(self) -> None:
        """Waits until one process waits in the middle of training."""
        until = time.monotonic() + WAIT
        while not (self.folder / "held").exists():
            if self.process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"it did not come to train: {self.ended()}")
            time.sleep(0.05)
        (self.folder / "held").unlink()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLP: nothing in it looks at a whole batch, or draws."""
    return demo("mlp", epochs=3, out=tmp_path_factory.mktemp("mlp") / "model.pt").path


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        done = CliRunner().invoke(app, ["run", str(model), *FLAGS, "--out", "run"])
    assert done.exit_code == 0, done.output
    return Report.read(folder / "run")


@pytest.fixture(scope="module")
def launched(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """The same in two."""
    folder = tmp_path_factory.mktemp("launched")
    launch = Launch(folder, str(model), *FLAGS, "--processes", "2", "--out", "run")
    ended = launch.ended()
    assert ended.code == 0, ended.err
    assert not launch.left()
    return ended, folder


def trained(report: Report) -> dict[str, Any]:
    """What the last step of training left in the report."""
    (row,) = (one for one in report.document["artifacts"] if one["name"] == "recovered")
    facts: dict[str, Any] = next(one for one in row["steps"] if one["stage"] == "distill")["facts"]
    return facts


def learnt(report: Report) -> list[tuple[float, ...]]:
    """The history without what it took."""
    kept = ("epoch", "loss", "accuracy", "rate")
    return [tuple(one[key] for key in kept) for one in trained(report)["history"]]


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load(folder / "artifacts" / "recovered.safetensors").state_dict())


def bytes_of(folder: Path) -> bytes:
    return (folder / "artifacts" / "recovered.safetensors").read_bytes()


def files(folder: Path) -> list[str]:
    """What lies there; the launcher's own logs do not count."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(name for name in found if not name.startswith("torchelastic"))


def test_two_processes_give_what_one_does(alone: Report, launched: tuple[Ended, Path]) -> None:
    both = Report.read(launched[1] / "run")
    assert len(learnt(alone)) == 4
    for one, two in zip(learnt(alone), learnt(both), strict=True):
        assert two == pytest.approx(one, abs=CLOSE)
    ours = weights(launched[1] / "run")
    for name, one in weights(alone.folder).items():
        torch.testing.assert_close(ours[name], one, rtol=0, atol=CLOSE)
    start = load(alone.folder / "artifacts" / "pruned.safetensors").state_dict()
    assert max(float((one - start[name]).abs().max()) for name, one in ours.items()) > 100 * CLOSE


def test_the_report_says_how_many_they_were_and_has_all_else(
    alone: Report, launched: tuple[Ended, Path]
) -> None:
    both = Report.read(launched[1] / "run")
    assert trained(both)["training"]["processes"] == 2
    assert trained(alone)["training"]["processes"] == 1
    assert both.document.keys() == alone.document.keys()
    named = [[one["name"] for one in report.document["artifacts"]] for report in (alone, both)]
    assert named[0] == named[1]
    assert not both.document["failed"]


def test_one_process_writes_and_speaks(alone: Report, launched: tuple[Ended, Path]) -> None:
    ended, folder = launched
    assert files(folder / "run") == files(alone.folder)
    assert files(folder / "tmp") == []
    assert ended.out.count("report: ") == 1
    assert not ended.errors
    assert "Warning" not in ended.err


@pytest.fixture(scope="module")
def stopped(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    """One process is killed in the second epoch; all are interrupted in the third; then it ends."""
    folder = tmp_path_factory.mktemp("stopped")
    examples = trained_on(model)
    steps = -(-examples // 33)
    ended = []

    def launch(**environment: str) -> Launch:
        return Launch(folder, str(model), *FLAGS, "--out", "run", **environment)

    first = launch(HOLD=str(steps + 2))
    first.held()
    (victim,) = first.left(rank="1")
    os.kill(victim, signal.SIGKILL)
    ended.append(first.ended())
    assert not first.left()
    second = launch(HOLD=str(steps + 2))
    second.held()
    os.killpg(second.process.pid, signal.SIGINT)
    ended.append(second.ended())
    assert not second.left()
    (folder / "calls").unlink()
    ended.append(launch().ended())
    assert int((folder / "calls").read_text()) == 2 * steps, "training did not go on from epoch 2"
    return folder, ended


def trained_on(model: Path) -> int:
    """Examples in its training split."""
    splits = task(model).splits
    assert splits is not None
    return len(splits.train)


@pytest.mark.slow
def test_one_that_is_killed_is_a_clear_line(stopped: tuple[Path, list[Ended]]) -> None:
    killed = stopped[1][0]
    assert killed.code != 0
    (line,) = killed.errors
    assert "the same command goes on" in line
    assert "report: " not in killed.out


@pytest.mark.slow
def test_an_interrupt_is_a_clear_line(stopped: tuple[Path, list[Ended]]) -> None:
    interrupted = stopped[1][1]
    assert interrupted.code != 0
    assert interrupted.errors
    assert all("the same command goes on" in line for line in interrupted.errors)
    assert "report: " not in interrupted.out


@pytest.mark.slow
def test_the_same_command_goes_on_to_the_same_end(
    stopped: tuple[Path, list[Ended]], launched: tuple[Ended, Path]
) -> None:
    folder, ended = stopped
    assert ended[2].code == 0, ended[2].err
    assert bytes_of(folder / "run") == bytes_of(launched[1] / "run")
    assert learnt(Report.read(folder / "run")) == learnt(Report.read(launched[1] / "run"))
    assert files(folder / "run") == files(launched[1] / "run")


def test_without_torchrun_so_many_processes_are_refused(model: Path, tmp_path: Path) -> None:
    given = ["run", str(model), "--processes", "2", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert "--processes 2: 1 runs here" in line
    assert not (tmp_path / "run").exists()


def test_a_lost_process_ends_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no row of a report that is finished: the same command goes on from there."""

    def lost(stage: Any, *given: Any, **settings: Any) -> Any:
        if stage is STAGES["distill"]:
            raise Lost("another process is gone")
        return perform(stage, *given, **settings)

    monkeypatch.setattr("compressor.pipeline.making.perform", lost)
    folder, _ = Folder.open(tmp_path / "run", "key", "run", fresh=False)
    maker = Maker(task(model), folder, "", lambda text: None)
    with pytest.raises(Lost):
        maker.execute(bind([Step("distill", {"epochs": 1}, "recovered", "baseline")]))
    assert not maker.failed
    assert not maker.skipped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        (("--prune", "1.5"), {}, "--prune '1.5'"),
        (("--metric", "nonsense"), {}, "--metric 'nonsense'"),
        (("--train", "learning_rate=1e30"), {}, "recovered failed"),
        (("--loss", "./own.py:loss"), {"ALL_FAIL": "3"}, "a fault of all processes"),
        (("--loss", "./own.py:loss"), {"FAIL": "3"}, "a fault of one process"),
    ],
    ids=["input", "input of the task", "no number", "in all", "in one"],
)
def test_what_fails_is_a_line_and_no_hang(
    flags: tuple[str, ...], environment: dict[str, str], said: str, model: Path, tmp_path: Path
) -> None:
    start = ("--prune", "0.5", "--epochs", "2", "--threads", "1", "--provider", "cpu")
    launch = Launch(tmp_path, str(model), *start, *flags, "--out", "run", **environment)
    ended = launch.ended()
    assert ended.code != 0
    assert not launch.left()
    assert any(said in line for line in ended.errors), ended.errors
    # Others say, at most, that they met the same or that another one ended.
    others = [line for line in ended.errors if said not in line]
    assert all("its own messages say why" in line or "it ended" in line for line in others)
    assert len(ended.errors) <= 2
    assert "terminate called" not in ended.err
    assert files(tmp_path / "tmp") == []


@pytest.mark.slow
def test_what_trained_sharded_is_a_file_like_any_other(
    model: Path, alone: Report, tmp_path: Path
) -> None:
    launch = Launch(tmp_path, str(model), *FLAGS, "--train", "shard=true", "--out", "run")
    assert launch.ended().code == 0
    ours = weights(tmp_path / "run")
    for name, one in weights(alone.folder).items():
        torch.testing.assert_close(ours[name], one, rtol=0, atol=CLOSE)
