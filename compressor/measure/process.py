"""The parent's side of a worker: starts it, asks it, and outlives its death."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import Any

from compressor.errors import CompressorError, signal_name


class WorkerFailed(CompressorError):
    """A worker answered with an error, died, or did not answer in time."""


class Worker:
    """A child process running :mod:`compressor.measure.worker`; use it in a ``with`` block."""

    def __init__(self, timeout: float = 300.0) -> None:
        self.timeout = timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        try:
            self._process = subprocess.Popen(
                # -P: a json.py where the user stands must not stand in for Python's.
                [sys.executable, "-P", "-m", "compressor.measure.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which then closes us
            )
        except OSError as error:
            self._errors.close()
            raise WorkerFailed(f"no worker could be started: {error.strerror}") from None

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Sends one request and waits for its answer, asleep.

        Raises :class:`WorkerFailed` with the reason in one line; where the worker died or did not
        answer in time it is closed, and there is nobody left to ask.
        """
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            raise WorkerFailed("the worker was ended before")
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None
        answer = json.loads(self._line())
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return dict(answer["ok"])

    def _line(self) -> bytes:
        """The next line, read as it comes: a worker may also fall silent in the middle of one."""
        assert self._process.stdout is not None
        end = time.monotonic() + self.timeout
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    self.close()
                    raise WorkerFailed(f"no answer within {self.timeout:g} s")
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    raise self._died()
                line += part
        return line

    def _died(self) -> WorkerFailed:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it closed its pipes and lives on
            self._process.kill()
            code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").split("\n")
        last = next((" ".join(line.split())[:200] for line in reversed(said) if line.strip()), "")
        self.close()
        cause = (
            f"ended with exit code {code}" if code >= 0 else f"was killed by {signal_name(-code)}"
        )
        return WorkerFailed(f"the worker {cause}" + (f": {last}" if last else ""))

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._process.poll() is None:
            try:
                # With its children: a compiler would go on beside whoever is timed next.
                os.killpg(self._process.pid, signal.SIGKILL)
            except (AttributeError, OSError):  # not POSIX, or gone meanwhile
                self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
