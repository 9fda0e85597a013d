"""The parent's side of a worker: starts it, asks it, and outlives its death."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any

from compressor.errors import CompressorError, one_line


class WorkerFailed(CompressorError):
    """A worker answered with an error, died, or did not answer in time."""


class Worker:
    """A child process running :mod:`compressor.measure.worker`; use it in a ``with`` block."""

    def __init__(self, timeout: float = 300.0) -> None:
        self.timeout = timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "compressor.measure.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then closes us
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Sends one request and waits for its answer.

        Raises :class:`WorkerFailed` with the reason in one line.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise WorkerFailed(self._death()) from None
        ready, _, _ = select.select([self._process.stdout], [], [], self.timeout)
        if not ready:
            self.close()
            raise WorkerFailed(f"no answer within {self.timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailed(self._death())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return dict(answer["ok"])

    def _death(self) -> str:
        code = self._process.wait(timeout=10)
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        cause = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return one_line(ValueError(f"the worker was {cause}" + (f": {said[-1]}" if said else "")))

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._process.poll() is None:
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
