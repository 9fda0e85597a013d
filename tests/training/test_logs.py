"""Logs that go on, that fail and that are missing; the line of progress; the trace."""

from __future__ import annotations

import csv
import json
import math
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import InputError
from compressor.training import logs
from compressor.training.logs import LOGS, Log, checked, lasting, line, opened, profiled

SETTINGS = {"epochs": 3, "augment": [], "patience": None}


def facts(epoch: int, **more: float) -> dict[str, float]:
    """What the loop says of an epoch; the metric is taken after every second one."""
    seen = {} if epoch % 2 else {"accuracy": 1 - 0.1 / epoch}
    return {"epoch": epoch, "loss": 1 / 3 / epoch, **seen, "rate": 3e-3, **more}


def train(folder: Path, names: tuple[str, ...], last: int, resumed: int = 0) -> None:
    """Epochs ``resumed + 1`` to ``last``; a log that fails is a failure here."""
    with opened(names, folder, "recovered", SETTINGS, warn=pytest.fail, resumed=resumed) as write:
        for epoch in range(resumed + 1, last + 1):
            write(epoch, facts(epoch))


def break_off(
    names: tuple[str, ...], folder: Path, error: BaseException, warn: Callable[[str], Any]
) -> None:
    """Training that ends with ``error`` after its first epoch."""
    with opened(names, folder, "recovered", SETTINGS, warn=warn) as write:
        write(1, facts(1))
        raise error


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "recovered.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def objects(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "recovered.jsonl").read_text(encoding="utf-8")
    return [json.loads(row) for row in text.splitlines()]


def events(folder: Path) -> Iterator[Any]:
    """The events of all files, in the order in which TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted((folder / "tensorboard" / "recovered").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])  # a checksum of 4 bytes after it and at the end
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def shown(folder: Path) -> dict[tuple[str, int], list[float]]:
    """What TensorBoard shows: a restart hides the events from its step on."""
    found: dict[tuple[str, int], list[float]] = {}
    for event in events(folder):
        if event.HasField("session_log"):
            found = {key: values for key, values in found.items() if key[1] < event.step}
        for value in event.summary.value:
            if not value.HasField("tensor"):
                found.setdefault((value.tag, event.step), []).append(value.simple_value)
    return found


# Files.


def test_a_row_for_each_epoch_a_column_for_each_fact(tmp_path: Path) -> None:
    train(tmp_path / "not" / "there", ("csv", "json", "csv"), 3)
    rows = table(tmp_path / "not" / "there")
    assert list(rows[0]) == ["epoch", "loss", "rate", "accuracy"]
    assert [row["accuracy"] for row in rows] == ["", "0.95", ""]
    assert [float(row["loss"]) for row in rows] == [1 / 3, 1 / 6, 1 / 9]
    assert objects(tmp_path / "not" / "there") == [facts(epoch) for epoch in (1, 2, 3)]


def test_every_row_is_on_disk_when_it_is_written(tmp_path: Path) -> None:
    with opened(("csv", "json"), tmp_path, "recovered", {}, warn=pytest.fail) as write:
        for epoch in (1, 2, 3):
            write(epoch, facts(epoch))
            assert len(table(tmp_path)) == len(objects(tmp_path)) == epoch


def test_what_is_not_finite_is_json_all_the_same(tmp_path: Path) -> None:
    with opened(("csv", "json"), tmp_path, "recovered", {}, warn=pytest.fail) as write:
        write(1, {"epoch": 1, "loss": math.nan, "rate": math.inf})
    assert objects(tmp_path) == [{"epoch": 1, "loss": None, "rate": None}]
    assert table(tmp_path) == [{"epoch": "1", "loss": "nan", "rate": "inf"}]


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.binary(max_size=3)), max_size=4)
)
def test_broken_off_and_resumed_is_as_never_broken_off(
    breaks: list[tuple[int, int, bytes]],
) -> None:
    """Whatever was written after the epoch that is resumed from, and wherever a line was cut."""
    with TemporaryDirectory() as name:
        broken, whole = Path(name, "broken"), Path(name, "whole")
        last = 0
        for resumed, cut, rubbish in breaks:
            resumed = min(resumed, last)
            train(broken, ("csv", "json"), resumed + 3, resumed)
            last = resumed + 2  # the line of the last epoch is what a crash may have cut off
            for path in broken.iterdir():
                data = path.read_bytes()
                keep = len(data) - 1 - cut % len(data.splitlines(keepends=True)[-1])
                path.write_bytes(data[:keep] + rubbish.replace(b"\n", b"").replace(b"\r", b""))
        train(broken, ("csv", "json"), 6, last)
        train(whole, ("csv", "json"), 6)
        assert table(broken) == table(whole)
        assert objects(broken) == objects(whole)


def test_a_number_that_was_cut_off_is_no_epoch(tmp_path: Path) -> None:
    train(tmp_path, ("csv", "json"), 10)
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        path.write_bytes(data[: data.rfind(b"10") + 1])  # what is left reads as the first epoch
    train(tmp_path, ("csv", "json"), 10, resumed=9)
    assert [int(row["epoch"]) for row in table(tmp_path)] == list(range(1, 11))
    assert objects(tmp_path) == [facts(epoch) for epoch in range(1, 11)]


def test_files_of_somebody_else_are_no_rows_of_ours(tmp_path: Path) -> None:
    (tmp_path / "recovered.csv").write_text("name,age\nAda,36\n")
    (tmp_path / "recovered.jsonl").write_text('[1]\n3\n{"epoch": "one"}\n{"age": 36}\nnot json\n')
    train(tmp_path, ("csv", "json"), 3, resumed=2)
    assert [row["epoch"] for row in table(tmp_path)] == ["3"]
    assert objects(tmp_path) == [facts(3)]


# TensorBoard.


def test_tensorboard_goes_on_and_shows_no_epoch_twice(tmp_path: Path) -> None:
    train(tmp_path, ("tensorboard",), 3)
    with opened(
        ("tensorboard",), tmp_path, "recovered", SETTINGS, warn=pytest.fail, resumed=2
    ) as write:
        write(3, facts(3, loss=7.0))
        assert shown(tmp_path)["loss", 3] == [7.0]  # on disk already
        write(4, facts(4))
    found = shown(tmp_path)
    assert all(len(values) == 1 for values in found.values())
    loss = [found["loss", epoch][0] for epoch in (1, 2, 3, 4)]
    assert loss == pytest.approx([1 / 3, 1 / 6, 7.0, 1 / 12])
    assert {tag for tag, _ in found} == {"loss", "rate", "accuracy"}
    assert [epoch for tag, epoch in found if tag == "accuracy"] == [2, 4]


def test_tensorboard_on_a_full_disk_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboardX.record_writer import RecordWriter

    def full(self: RecordWriter, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    said: list[str] = []
    with opened(("tensorboard", "csv"), tmp_path, "recovered", {}, warn=said.append) as write:
        write(1, facts(1))
        monkeypatch.setattr(RecordWriter, "write", full)
        for epoch in range(2, 40):
            write(epoch, facts(epoch))
    assert len(table(tmp_path)) == 39
    (one,) = said
    assert one.startswith("--log tensorboard failed")
    assert one.endswith("No space left on device")


def test_tensorboard_starts_over(tmp_path: Path) -> None:
    train(tmp_path, ("tensorboard",), 4)
    train(tmp_path, ("tensorboard",), 1)
    assert [epoch for tag, epoch in shown(tmp_path) if tag == "loss"] == [1]
    texts = [
        (value.tag, text.decode())
        for event in events(tmp_path)
        for value in event.summary.value
        for text in value.tensor.string_val
    ]
    tag, text = texts[-1]
    assert tag == "settings/text_summary"
    assert "| patience | None |" in text


# Packages that may be missing, by stand-ins that record what is asked of them.


class Recorded(ModuleType):
    """A package whose functions note their calls; those in ``fail`` raise."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__file__ = f"/{name}/__init__.py"
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.fail: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def called(*args: Any, **named: Any) -> Any:
            self.calls.append((name, args, named))
            if name in self.fail:
                raise OSError(f"{name}: the disk\nis full")
            # wandb's run and mlflow's: each is what the package is asked for next.
            return SimpleNamespace(
                log=self.log, finish=self.finish, info=SimpleNamespace(run_id="7")
            )

        return called

    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls]


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name, _ in logs.QUIET.values():
        monkeypatch.setenv(name, "")  # so that it is taken back
        monkeypatch.delenv(name)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    monkeypatch.setitem(sys.modules, "wandb", module := Recorded("wandb"))
    return module


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    monkeypatch.setitem(sys.modules, "mlflow", module := Recorded("mlflow"))
    return module


def test_wandb_stays_offline(wandb: Recorded, tmp_path: Path) -> None:
    train(tmp_path, ("wandb",), 2, resumed=1)
    assert wandb.calls == [
        (
            "init",
            (),
            {
                "project": "compressor",
                "name": "recovered",
                "config": {**SETTINGS, "resumed": 1},
                "dir": str(tmp_path),
                "mode": "offline",
                "reinit": "create_new",
            },
        ),
        ("log", ({"loss": 1 / 6, "accuracy": 0.95, "rate": 3e-3},), {"step": 2}),
        ("finish", (), {"exit_code": 0}),
    ]
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert "WANDB_MODE" not in os.environ  # of other runs of the user's


def test_wandb_is_the_users(
    wandb: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"MODE": "online", "PROJECT": "mine", "DIR": "/there", "ERROR_REPORTING": "true"}
    for name, value in said.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    train(tmp_path, ("wandb",), 1)
    asked = wandb.calls[0][2]
    assert (asked["mode"], asked["project"], asked["dir"]) == ("online", "mine", "/there")
    assert os.environ["WANDB_ERROR_REPORTING"] == "true"


def test_mlflow(mlflow: Recorded, tmp_path: Path) -> None:
    train(tmp_path, ("mlflow",), 1)
    assert mlflow.calls == [
        ("start_run", (), {"run_name": "recovered", "nested": True}),
        ("log_params", ({**SETTINGS, "resumed": 0},), {}),
        ("log_metrics", ({"loss": 1 / 3, "rate": 3e-3},), {"step": 1, "run_id": "7"}),
        ("end_run", ("FINISHED",), {}),
    ]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert "WANDB_ERROR_REPORTING" not in os.environ  # it was not asked for


def test_mlflow_leaves_no_run_open_that_it_could_not_describe(
    mlflow: Recorded, tmp_path: Path
) -> None:
    mlflow.fail = {"log_params"}
    said: list[str] = []
    with opened(("mlflow",), tmp_path, "recovered", SETTINGS, warn=said.append) as write:
        write(1, facts(1))
    assert mlflow.calls[-1] == ("end_run", ("FAILED",), {})
    assert mlflow.names() == ["start_run", "log_params", "end_run"]
    assert len(said) == 1


def test_training_that_breaks_off_is_said_to_have_failed(
    wandb: Recorded, mlflow: Recorded, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        break_off(("wandb", "mlflow", "csv"), tmp_path, KeyboardInterrupt(), pytest.fail)
    assert wandb.calls[-1] == ("finish", (), {"exit_code": 1})
    assert mlflow.calls[-1] == ("end_run", ("FAILED",), {})
    assert len(table(tmp_path)) == 1


@pytest.mark.parametrize(("name", "package"), logs.PACKAGES.items())
def test_a_missing_package_is_told_before_anything_starts(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"^--log '{name}': .*: pip install {package}$"):
        checked(["csv", name])
    with (
        pytest.raises(InputError),
        opened(["csv", name], tmp_path / "out", "recovered", {}, warn=pytest.fail),
    ):
        pytest.fail("training began")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_runs_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [_OnlyFolders(tmp_path), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match="pip install wandb"):
        checked(["wandb"])
    sys.modules.pop("wandb", None)


class _OnlyFolders:
    """Finds ``wandb`` in one folder only, whether or not the package is installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        from importlib.machinery import PathFinder

        return PathFinder.find_spec(name, [str(self.folder)]) if name == "wandb" else None


def test_what_is_checked(wandb: Recorded) -> None:
    assert checked([]) == ()
    assert checked(["json", "wandb", "json"]) == ("json", "wandb")
    with pytest.raises(InputError, match=r"^--log 'txt' is unknown: choose from csv, json, "):
        checked(["csv", "txt"])
    assert wandb.calls == []


# Logs that fail.


def faulty(where: str, calls: list[str]) -> Any:
    """An opener whose log raises ``where``, and notes what was called."""

    def act(what: str) -> None:
        calls.append(what)
        if what == where:
            raise ValueError(f"{what} is\nbroken")

    def opener(folder: Path, title: str, settings: Mapping[str, Any], resumed: int) -> Log:
        act("open")
        return Log(lambda epoch, facts: act(f"write {epoch}"), lambda well: act(f"close {well}"))

    return opener


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("open", ["open"]),
        ("write 1", ["open", "write 1", "close False"]),
        ("write 2", ["open", "write 1", "write 2", "close False"]),
        ("close True", ["open", "write 1", "write 2", "write 3", "close True"]),
        ("never", ["open", "write 1", "write 2", "write 3", "close True"]),
    ],
)
def test_a_log_that_fails_is_closed_and_training_goes_on(
    where: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []
    said: list[str] = []
    monkeypatch.setitem(LOGS, "faulty", faulty(where, calls))
    names = ("json", "faulty", "csv")
    with opened(names, tmp_path, "recovered", SETTINGS, warn=said.append) as write:
        for epoch in (1, 2, 3):
            write(epoch, facts(epoch))
    assert calls == expected
    assert len(table(tmp_path)) == len(objects(tmp_path)) == 3
    told = f"--log faulty failed, training goes on without it: ValueError: {where} is broken"
    assert said == ([] if where == "never" else [told])


def test_all_logs_are_closed_when_training_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []
    said: list[str] = []
    monkeypatch.setitem(LOGS, "one", faulty("close False", calls))
    monkeypatch.setitem(LOGS, "two", faulty("close False", calls))
    with pytest.raises(ZeroDivisionError):
        break_off(("one", "two"), tmp_path, ZeroDivisionError(), said.append)
    assert calls == ["open", "open", "write 1", "write 1", "close False", "close False"]
    assert len(said) == 2


def test_a_log_that_cannot_be_written_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "recovered.csv").mkdir()
    said: list[str] = []
    with opened(("csv", "json"), tmp_path, "recovered", {}, warn=said.append) as write:
        write(1, facts(1))
    assert objects(tmp_path) == [facts(1)]
    (one,) = said
    assert one.startswith("--log csv failed")


# The line of progress.


def test_the_line_says_all() -> None:
    seen = {"epoch": 4, "loss": 0.123456, "accuracy": 0.98765, "rate": 1e-3, "seconds": 15.0}
    seen |= {"examples_per_s": 12_345.6, "train_accuracy": 0.999}
    assert line(seen, epochs=10, seconds=60.0) == (
        "epoch 4/10, loss 0.1235, accuracy 0.9877, 12346 examples/s, 1 min 30 s left"
    )
    # Two epochs in 60 s since it went on: the two before it took none of them.
    assert line(seen, epochs=10, seconds=60.0, resumed=2).endswith(", 3 min 00 s left")
    assert line(seen, epochs=4, seconds=60.0).endswith(" examples/s")


def test_the_line_leaves_out_what_is_not_known() -> None:
    assert line({"epoch": 1, "loss": 2.0}, epochs=2, seconds=1.26) == (
        "epoch 1/2, loss 2, 1.3 s left"
    )
    slow = {"epoch": 1, "loss": 2.0, "mse": 1234.5678, "examples_per_s": 0.456}
    assert line(slow, epochs=1, seconds=1.0) == "epoch 1/1, loss 2, mse 1235, 0.456 examples/s"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"),
        (185, "3 min 05 s"), (3599.6, "1 h 00 min"), (9000, "2 h 30 min"), (3.6e5, "100 h 00 min"),
    ],
)  # fmt: skip
def test_lasting(seconds: float, words: str) -> None:
    assert lasting(seconds) == words


# The trace.


def test_a_few_steps_are_traced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trace.json"
    model = torch.nn.Linear(4, 2)
    with profiled(path) as step:
        for _ in range(9):
            model(torch.zeros(3, 4)).sum().backward()
            step()
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert [name for name in names if str(name).startswith("ProfilerStep")] == [
        "ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4",
    ]  # fmt: skip
    assert names.count("aten::linear") == 3


def test_training_that_fails_leaves_the_trace_so_far(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    def fail() -> None:
        with profiled(path) as step:
            for _ in range(3):
                torch.zeros(3).sum()
                step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "aten::sum" in path.read_text()


def test_nothing_is_traced_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "profile", pytest.fail)
    with profiled(None) as step:
        step()
        step()
    with profiled(None) as step:
        step()
