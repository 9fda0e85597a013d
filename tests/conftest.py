"""A small trained model and one finished run, made once for all tests that look at them."""

from __future__ import annotations

import base64
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from compressor.measure.protocol import SECONDS
from compressor.report import Report

# Examples are never judged by the clock; CI draws the same ones every time.
settings.register_profile(
    "compressor",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("compressor")

EMPTY = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
)
"""A PNG of one pixel."""

# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def short_timing() -> None:
    """Whole runs in tests time each artifact for moments: nothing here asserts a latency."""
    SECONDS["quick"] = 0.05


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model.pt``: the zoo's cnn after a few epochs on the digits."""
    from compressor.demo import demo

    return demo("cnn", epochs=8, out=tmp_path_factory.mktemp("trained") / "model.pt").path


@pytest.fixture(scope="session")
def finished(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of ``--prune 0.5 --epochs 6 --quantize int8`` on one thread."""
    from compressor.pipeline import run

    return run(
        trained,
        prune=0.5,
        epochs=6,
        quantize="int8",
        threads=(1,),
        out=tmp_path_factory.mktemp("runs") / "finished",
        command="compressor run model.pt",
    )


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's file that a test names adds its folder to ``sys.path``: not for the next test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(autouse=True)
def no_ink(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs whose tests are not about reports draw their pictures and save an empty one."""
    if request.path.parent.name == "pipeline" or request.path.stem in ("test_pipeline", "test_cli"):
        from matplotlib.figure import Figure

        monkeypatch.setattr(Figure, "savefig", lambda self, file, **how: file.write(EMPTY))
