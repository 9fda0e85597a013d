"""Quantization in a run: its budgets, what it leaves on disk, what best.onnx needs beside it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import compressor
from compressor import pipeline
from compressor.artifact import digest
from compressor.cli import app
from compressor.pipeline import verdict
from compressor.pipeline.verdict import Choice
from compressor.report import Report
from compressor.stages import graph
from compressor.stages.quantize import search
from compressor.task import Task

X = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)).eval()


def labels() -> Any:
    with torch.inference_mode():
        return net()(torch.from_numpy(X)).argmax(1).numpy()


def ran(out: Path, **given: Any) -> Report:
    wanted = {"data": (X, labels()), "provider": ("cpu",), "threads": (1,), "out": out}
    return pipeline.run(net(), **{**wanted, **given})


class Stop(Exception):
    """Ends a run where the test has seen enough."""


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Runs end with their first stage; the tasks that they got."""
    tasks: list[Task] = []

    def made(task: Task, *given: Any) -> Any:
        tasks.append(task)
        raise Stop

    monkeypatch.setattr(pipeline, "Maker", made)
    return tasks


@pytest.mark.parametrize(("given", "budget"), [(None, 0.01), (0.05, 0.05), (0.0, 0.0)])
def test_the_budget_of_stages_is_that_of_the_report(
    handed: list[Task], tmp_path: Path, given: float | None, budget: float
) -> None:
    with pytest.raises(Stop):
        ran(tmp_path / "run", quantize="int8", max_drop=given)
    assert [task.budget for task in handed] == [budget]


@pytest.mark.parametrize("seconds", [None, 500.0])
def test_time_is_counted_from_the_beginning_of_the_run(
    handed: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float | None
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    with pytest.raises(Stop):
        ran(tmp_path / "run", quantize="int8", time_budget=seconds)
    assert [task.until for task in handed] == [None if seconds is None else 1500.0]


def test_other_budgets_are_another_run(handed: list[Task], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        ran(tmp_path / "run", quantize="int8")
    for other in ({"time_budget": 9.0}, {"max_drop": 0.2}):
        with pytest.raises(compressor.InputError, match="holds another run"):
            ran(tmp_path / "run", quantize="int8", **other)
    assert len(handed) == 1


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A run whose 8-bit models are too large for one file, with no time to search."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(graph, "LIMIT", 100)
        patched.setattr(verdict, "choose", lambda *given: Choice("int8-dynamic", "made up", True))
        return ran(
            tmp_path_factory.mktemp("large") / "run", quantize="int8-dynamic", time_budget=1e-6
        )


def test_a_late_search_makes_something_all_the_same(large: Report) -> None:
    step = large.document["artifacts"][-1]["steps"][-1]
    assert step["settings"]["left"] == []
    assert step["settings"]["repair"] == []
    assert "returned" not in step["facts"]


def test_tensors_beside_the_best_model_are_copied_with_it(large: Report, tmp_path: Path) -> None:
    folder = large.folder
    beside = sorted((folder / "artifacts").glob("int8-dynamic.onnx.*"))
    (name,) = [file.name for file in beside]  # of the versions of the search, only the last
    assert re.fullmatch(r"int8-dynamic\.onnx\.[0-9a-f]{8}\.data", name)
    assert [file.name for file in folder.glob("*.data")] == [name]
    assert (folder / name).read_bytes() == (folder / "artifacts" / name).read_bytes()
    assert json.loads((folder / "best.json").read_text())["sha256"] == digest(
        folder / "best.onnx", folder / name
    )
    found = compressor.session(folder)(X)
    assert np.array_equal(found, compressor.session(folder / "artifacts" / "int8-dynamic.onnx")(X))
    assert (found.argmax(1) == labels()).mean() > 0.9
    moved = tmp_path / "shipped"  # the two files are all that it takes
    moved.mkdir()
    for each in ("best.onnx", name):
        (moved / each).write_bytes((folder / each).read_bytes())
    assert np.array_equal(compressor.session(moved / "best.onnx")(X), found)


def test_ctrl_c_in_a_search_says_where_the_best_so_far_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "timed", lambda task: False)
    out = tmp_path / "run"
    best = out / "artifacts" / "int8-dynamic.onnx"
    with monkeypatch.context() as patched:
        patched.setattr(graph, "read", interrupted)  # there is nothing yet
        with pytest.raises(KeyboardInterrupt) as caught:
            ran(out, quantize="int8-dynamic")
        assert str(caught.value) == ""
        assert not best.exists()
    with monkeypatch.context() as patched:
        patched.setattr(search, "within", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            ran(out, quantize="int8-dynamic")
        assert str(caught.value) == f"the best of int8-dynamic so far is {best}"
    assert (compressor.session(best)(X).argmax(1) == labels()).mean() > 0.9
    assert not (out / "report.json").exists()
    # The same run goes on, and does not take what was interrupted for finished.
    report = ran(out, quantize="int8-dynamic")
    cached = {stage.get("artifact"): stage["cached"] for stage in report.document["stages"]}
    assert (cached["baseline"], cached["int8-dynamic"]) == (True, False)


def test_the_terminal_says_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any, **more: Any) -> Any:
        raise KeyboardInterrupt("the best of int8-static so far is x.onnx")

    monkeypatch.setattr(pipeline, "run", interrupted)
    result = CliRunner().invoke(app, ["run", "model.pt"])
    assert result.exit_code == 130
    assert "interrupted; the best of int8-static so far is x.onnx, what was" in result.stderr


def test_the_flag_reaches_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def noted(*given: Any, **more: Any) -> Any:
        seen.update(more)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", noted)
    CliRunner().invoke(app, ["run", "model.pt", "--time-budget", "60", "--max-drop", "0.02"])
    assert (seen["time_budget"], seen["max_drop"]) == (60.0, 0.02)
