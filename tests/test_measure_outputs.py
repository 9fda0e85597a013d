"""Outputs on whole splits: the same whoever computes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from compressor.measure import outputs
from compressor.measure.outputs import PART, predict, stored
from compressor.measure.process import Worker, WorkerFailed
from compressor.measure.timed import Timed
from compressor.measurement import Target

COUNT = 5 * PART + 7


@pytest.fixture
def model(tmp_path: Path) -> Path:
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        graph (float[n, 3] x) => (float[n, 3] y) { s = Sin(x) y = Mul(s, x) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


class Machine:
    """Workers with the model, real ones; how many were started, and which of them fail."""

    def __init__(self, model: Path, folder: Path, batch: int) -> None:
        x = np.random.default_rng(0).random((COUNT, 3)).astype(np.float32)
        self.model, self.batch, self.started = model, batch, 0
        self.folder = folder
        self.paths = stored(folder, "test", (x,))
        self.wanted = np.sin(x) * x
        self.fails = False

    @contextmanager
    def another(self) -> Iterator[Worker]:
        self.started += 1
        if self.fails:
            raise WorkerFailed("no memory for another")
        with Worker() as worker:
            worker.ask("load", path=str(self.model), provider="cpu", threads=1)
            worker.ask("take", inputs=self.paths, batch=self.batch)
            yield worker

    def outputs(self, ns: float, threads: int = 1, **target: Any) -> Any:
        with self.another() as worker:
            self.started = 0
            where = Target(batch=self.batch, threads=threads, **target)
            run = Timed("m", where, worker, self.model, {}, 0.0, medians=[(ns,)])
            found = predict(run, self.paths, COUNT, self.folder, self.another)
        assert not list(self.folder.glob("outputs-*"))
        return found


@pytest.mark.parametrize("batch", [1, 3, PART])
def test_outputs_are_the_same_whoever_computes_them(
    batch: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "cores", lambda: 3)
    machine = Machine(model, tmp_path, batch)
    alone = machine.outputs(ns=1.0)
    assert machine.started == 0
    shared = machine.outputs(ns=1e10)
    assert machine.started == 2
    assert np.array_equal(alone, shared)
    np.testing.assert_allclose(shared, machine.wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("cores", "threads", "seconds", "started"),
    [(1, 1, 100, 0), (4, 4, 100, 0), (4, 2, 100, 1), (4, 1, 9, 1), (4, 1, 11, 2), (9, 1, 100, 5)],
)
def test_as_many_as_there_is_work_and_cores_for(
    cores: int,
    threads: int,
    seconds: float,
    started: int,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outputs, "cores", lambda: cores)
    machine = Machine(model, tmp_path, PART)
    machine.outputs(ns=seconds * 1e9 / -(-COUNT // PART), threads=threads)
    assert machine.started == started


def test_one_that_does_not_start_is_done_without(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "cores", lambda: 3)
    machine = Machine(model, tmp_path, PART)
    before = machine.outputs(ns=1.0)
    with machine.another() as worker:
        machine.fails, machine.started = True, 0
        run = Timed("m", Target(batch=PART), worker, model, {}, 0.0, medians=[(1e10,)])
        found = predict(run, machine.paths, COUNT, tmp_path, machine.another)
    assert machine.started == 1
    assert np.array_equal(found, before)


def test_a_worker_that_fails_in_the_middle_is_one_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "cores", lambda: 3)
    machine = Machine(model, tmp_path, PART)
    x = np.full((COUNT, 3), np.nan, np.float32)
    np.save(machine.paths[0], x)
    with pytest.raises(WorkerFailed, match="NaN"):
        machine.outputs(ns=1e10)
