"""The process in which one artifact runs on one target. Speaks JSON lines; run with ``-m``.

It imports onnxruntime and numpy only, so that its memory and its speed are those of the shipped
model. Requests carry a verb of :data:`VERBS`; an answer is ``{"ok": ...}`` or ``{"error": ...}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import one_line
from compressor.measure.runtime import open_session

CHUNK = 256
"""Examples per call while predicting a whole split."""


class Holder:
    """The open session of this worker and the inputs that it is timed with."""

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self.clock = clock
        self.opened: Any = None
        self.feed: dict[str, Any] = {}

    def load(self, path: str, provider: str, threads: int) -> dict[str, Any]:
        """Opens the model; ``load_ms`` is the time from file to ready session."""
        before = self.clock()
        self.opened = open_session(Path(path), provider, threads)
        load_ms = (self.clock() - before) / 1e6
        return {"load_ms": load_ms, "modules": [name for name in ("torch",) if name in sys.modules]}

    def take(self, inputs: list[str], batch: int) -> dict[str, Any]:
        """Keeps the first ``batch`` examples of the ``.npy`` files as the inputs to time with."""
        self.feed = {
            given.name: np.resize(whole, (batch, *whole.shape[1:]))
            for given, whole in zip(self.opened.get_inputs(), map(np.load, inputs), strict=True)
        }
        return {}

    def time(self, calls: int) -> dict[str, Any]:
        """One block: nanoseconds of each of ``calls`` runs, and of the block as a whole.

        Raises ``ValueError`` when an output is not finite: a broken model is never a fast one.
        """
        run, feed, clock = self.opened.run, self.feed, self.clock
        taken = []
        begin = clock()
        for _ in range(calls):
            start = clock()
            outputs = run(None, feed)
            taken.append(clock() - start)
        elapsed = clock() - begin
        if not all(np.isfinite(output).all() for output in outputs):
            raise ValueError("the model's output is not finite (NaN or infinity)")
        return {"ns": taken, "elapsed_ns": elapsed}

    def predict(self, inputs: list[str], out: str) -> dict[str, Any]:
        """Runs whole splits (``.npy`` files, one per input); writes the first output to ``out``."""
        parts = [np.load(path, mmap_mode="r") for path in inputs]
        names = [given.name for given in self.opened.get_inputs()]
        outputs = []
        for start in range(0, len(parts[0]), CHUNK):
            rows = (np.ascontiguousarray(part[start : start + CHUNK]) for part in parts)
            outputs.append(self.opened.run(None, dict(zip(names, rows, strict=True)))[0])
        whole = np.concatenate(outputs)
        if not np.isfinite(whole).all():
            raise ValueError("the model's output is not finite (NaN or infinity)")
        np.save(out, whole)
        return {"n": len(whole)}

    def memory(self) -> dict[str, Any]:
        """The kernel's high-water mark of this process, in bytes."""
        return {"peak_rss_bytes": peak_rss_bytes()}

    def providers(self) -> dict[str, Any]:
        """The execution providers that this onnxruntime has."""
        import onnxruntime

        return {"providers": onnxruntime.get_available_providers()}


VERBS = ("providers", "load", "take", "time", "predict", "memory")


def peak_rss_bytes() -> int:
    """The largest resident set that this process ever had, as the kernel counted it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def serve() -> None:
    """Answers requests from standard input until it closes."""
    # Whatever the runtime prints must not break the protocol: answers get a descriptor of their
    # own, and standard output becomes standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    holder = Holder()
    for line in sys.stdin:
        request = json.loads(line)
        verb = request.pop("do")
        try:
            answer = {"ok": getattr(holder, verb)(**request) if verb in VERBS else None}
        except Exception as error:
            answer = {"error": one_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
