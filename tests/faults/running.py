"""Runs that something happens to, and what must hold of their folder whatever did."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest

from compressor.artifact import digest
from compressor.report import FILE, Report

MARK = "COMPRESSOR_TEST"
WAIT = 120
"""Seconds that a run may take, beside busy neighbours: only what hangs takes so long."""


class Case(NamedTuple):
    """A command without its ``--out``, and the digests that it ends with."""

    words: tuple[str, ...]
    shas: dict[str, str]


class Launcher:
    """The parent's side of ``launcher.py``."""

    def __init__(self, model: Path) -> None:
        self.model = model
        script = Path(__file__).with_name("launcher.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        if (threads := self._read()["threads"]) != 1:
            self.close()
            pytest.fail(f"a process of {threads} threads cannot be forked safely")

    def _read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Ends it; nothing of it is running by then."""
        self.process.kill()
        self.process.communicate(timeout=WAIT)

    @contextmanager
    def started(self, folder: Path, *arguments: str, **request: Any) -> Iterator[Running]:
        """A command that works in ``folder``; it has ended when the block has."""
        assert self.process.stdin is not None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stages").unlink(missing_ok=True)
        asked = {"argv": list(map(str, arguments)), "cwd": str(folder), **request}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        running = Running(folder, self._read()["pid"])
        guard = threading.Timer(WAIT, running.hung)
        guard.start()
        try:
            yield running
        finally:
            running.code = self._read()["code"]
            guard.cancel()

    def run(
        self, folder: Path, *arguments: str, after: float | None = None, **request: Any
    ) -> Running:
        """Runs a command; it is killed ``after`` so many seconds if it has not ended by then."""
        with self.started(folder, *arguments, **request) as running:
            timer = threading.Timer(after or 0, running.send, (signal.SIGKILL,))
            if after is not None:
                timer.start()
        timer.cancel()
        return running


class Running:
    """A command that was started. ``code`` is that with which it ended, minus the signal's number
    where one ended it."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.folder = folder
        self.pid = pid
        self.code: int | None = None

    def send(self, number: int) -> None:
        """A signal, if it is still there. It is reaped by its own parent, whom we then ask."""
        if self.code is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return

    def hung(self) -> None:
        """Ends it by force; its standard error then says where it stood."""
        self.send(signal.SIGQUIT)
        time.sleep(1)
        self.send(signal.SIGKILL)

    def until(self, said: str) -> bool:
        """Waits until the command begins what starts so; false where it ended before."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            path = self.folder / "stages"
            if path.exists() and any(
                line.startswith(said) for line in path.read_text(encoding="utf-8").splitlines()
            ):
                return True
            if not Path(f"/proc/{self.pid}/exe").exists():  # a zombie has none
                return False
            time.sleep(0.005)
        return False

    @property
    def errors(self) -> str:
        """Standard error."""
        return (self.folder / "stderr").read_text(encoding="utf-8")


def left(mark: object) -> list[int]:
    """Processes that belong to a run in the folder ``mark`` and are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def soon(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether something comes to hold."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def shas(out: Path) -> dict[str, str]:
    """The digests of a finished run's models: ONNX files and the torch files they came from."""
    document = Report.read(out).document
    found = {one["path"]: one["sha256"] for one in document["artifacts"]}
    sources = {one["source"] for one in document["artifacts"] if one["source"]}
    return {**found, **{source: digest(out / source) for source in sources}}


def sound(out: Path) -> bool:
    """Fails where a reader of the folder would see a half; gives whether it is complete."""
    # As they lie there, for a reader who knows nothing of ours.
    for name in (FILE, "best.json"):
        if (out / name).exists():
            json.loads((out / name).read_text(encoding="utf-8"))
    for path in [*out.glob("*.onnx"), *out.glob("artifacts/*.onnx")]:
        onnx.checker.check_model(path)
    if not (out / FILE).exists():
        return False
    document = Report.read(out).document
    for one in document["artifacts"]:
        assert digest(out / one["path"]) == one["sha256"], one["name"]
    best = next(one for one in document["artifacts"] if one["best"])
    said = json.loads((out / "best.json").read_text(encoding="utf-8"))
    assert (said["artifact"], said["sha256"]) == (best["name"], best["sha256"])
    assert digest(out / "best.onnx") == best["sha256"]
    for name in ("report.md", "report.html", "recipe.toml", document["samples"]):
        assert (out / name).stat().st_size > 0
    assert document["fingerprint"] in (out / "run.json").read_text(encoding="utf-8")
    return True


def litter(out: Path) -> list[str]:
    """What a finished run should not have left: parts of files, and locks."""
    hidden = [str(path.relative_to(out)) for path in out.rglob(".*")]
    return hidden + [path.name for path in out.glob("*.lock")]


def one_line(running: Running, code: int) -> str:
    """Standard error of a command that ended so and said why in one line."""
    text = running.errors
    if running.code != code or "Traceback" in text or len(text.splitlines()) != 1:
        pytest.fail(f"exit code {running.code}, wanted {code}: {text}")
    return text
