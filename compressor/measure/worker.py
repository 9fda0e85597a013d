"""The process in which one artifact runs on one target. Speaks JSON lines; run with ``-m``.

It imports one runtime and numpy only, so that its memory and its speed are those of the shipped
model. Requests carry a verb of :data:`VERBS`; an answer is ``{"ok": ...}`` or ``{"error": ...}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import one_line
from compressor.measure import device
from compressor.measure.runtime import RUNTIMES, OpenVino, open_session
from compressor.measurement import GPUS, SETTINGS


class Holder:
    """The open session of this worker and the inputs that it is timed with."""

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self.clock = clock
        self.opened: Any = None
        self.feed: dict[str, Any] = {}
        self.batch = self.threads = 1
        self.runtime = "onnxruntime"
        self.fixed = False  # whether the file takes whole batches only
        self.disabled: list[str] = []
        self.loading, self.reset = 0, False
        self.gpu = False
        self.held: int | None = None

    def load(
        self,
        path: str,
        provider: str,
        threads: int,
        disabled: Sequence[str] = (),
        runtime: str = "onnxruntime",
        arch: str | None = None,
        inputs: int = 1,
    ) -> dict[str, Any]:
        """Opens the model; ``load_ms`` is the time from file to ready session.

        ``session`` is what the same session is opened with anywhere else, ``peak_rss_bytes`` the
        high-water mark so far, which then starts anew where the kernel lets it.
        """
        RUNTIMES[runtime].module()  # before the clock: importing it takes longer than loading
        self.gpu = provider in GPUS
        self.held = device.used() if self.gpu else None
        before = self.clock()
        self.opened = open_session(
            Path(path),
            provider,
            threads,
            disabled=disabled,
            runtime=runtime,
            arch=arch,
            inputs=inputs,
        )
        taken = self.clock() - before
        self.threads, self.runtime = threads, runtime
        # Optimizers are onnxruntime's: another runtime knows nothing of them.
        own = getattr(self.opened, "settings", None)
        self.disabled = list(disabled) if own is None else []
        settings = dict(SETTINGS if own is None else own)
        return {
            "load_ms": taken / 1e6,
            "session": {"settings": settings, "disabled": self.disabled},
            "peak_rss_bytes": self._peak(),
        }

    def take(self, inputs: list[str], batch: int) -> dict[str, Any]:
        """Keeps the first ``batch`` examples of the ``.npy`` files as the inputs to time with.

        Where they hold fewer, examples are repeated. Raises ``ValueError`` when the model takes
        another number of inputs.
        """
        names = [given.name for given in self.opened.get_inputs()]
        if len(inputs) != len(names):
            raise ValueError(
                f"the model takes {len(names)} inputs ({', '.join(names)}), "
                f"{len(inputs)} were given"
            )
        arrays = map(np.load, inputs)
        self.feed = {
            name: np.resize(array, (batch, *array.shape[1:]))
            for name, array in zip(names, arrays, strict=True)
        }
        self.batch = batch
        shapes = [getattr(given, "shape", None) for given in self.opened.get_inputs()]
        self.fixed = any(shape and isinstance(shape[0], int) for shape in shapes)
        return {}

    def time(self, calls: int) -> dict[str, Any]:
        """One block: nanoseconds of each of ``calls`` runs, and of the block as a whole.

        With the CPU time of all threads and the involuntary context switches meanwhile. Raises
        ``ValueError`` when an output is not finite: a broken model is never a fast one.
        """
        run, feed, clock = self.opened.run, self.feed, self.clock
        taken = []
        switches, cpu = device.switches(), time.process_time_ns()
        begin = clock()
        for _ in range(calls):
            start = clock()
            outputs = run(None, feed)
            taken.append(clock() - start)
        elapsed = clock() - begin
        cpu = time.process_time_ns() - cpu
        if self.threads > 1 and "torch" in self.runtime:
            time.sleep(WOUND_DOWN)
        for output in outputs:
            _finite(output)
        return {
            "ns": taken,
            "elapsed_ns": elapsed,
            "cpu_ns": cpu,
            "switches": device.switches() - switches,
        }

    def draw(self, ms: float) -> dict[str, Any]:
        """Millijoules of one call, by the counters of the CPU's packages or of the GPU over calls
        of ``ms`` milliseconds without a pause; ``None`` without a counter."""
        before = device.energy(self.gpu)
        if before is None:
            return {"energy_mj": None}
        calls, end = 0, self.clock() + ms * 1e6
        while not calls or self.clock() < end:
            self.opened.run(None, self.feed)
            calls += 1
        spent = device.spent(before, device.energy(self.gpu))
        return {"energy_mj": None if spent is None else spent / calls}

    def bound(self, calls: int) -> dict[str, Any]:
        """One block with inputs and outputs bound to the device, where they stay: nanoseconds of
        each call until the device is done. onnxruntime only."""
        binding = self.opened.io_binding()
        place = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}.get(
            self.opened.get_providers()[0], "cpu"
        )
        from onnxruntime import OrtValue

        for name, array in self.feed.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array, place, 0))
        for output in self.opened.get_outputs():
            binding.bind_output(output.name, place)
        taken = []
        for _ in range(calls):
            start = self.clock()
            binding.synchronize_inputs()
            self.opened.run_with_iobinding(binding)
            binding.synchronize_outputs()
            taken.append(self.clock() - start)
        for output in binding.copy_outputs_to_cpu():
            _finite(output)
        return {"ns": taken}

    def offer(self, rate: float, count: int, seed: int) -> dict[str, Any]:
        """Answers ``count`` calls that arrive at random, ``rate`` a second on average, in turn.

        ``ns`` are from each arrival to its answer, so they hold the wait behind earlier ones.
        """
        gaps = np.random.default_rng(seed).exponential(1e9 / rate, count)
        arrivals = np.cumsum(gaps).astype(np.int64).tolist()
        taken = []
        begin = self.clock()
        for arrival in arrivals:
            while (ahead := arrival - (self.clock() - begin)) > 0:
                if ahead > SLEEP_NS:
                    time.sleep((ahead - SLEEP_NS) / 1e9)
            outputs = self.opened.run(None, self.feed)
            taken.append(self.clock() - begin - arrival)
        elapsed = self.clock() - begin
        for output in outputs:
            _finite(output)
        return {"ns": taken, "elapsed_ns": elapsed}

    def predict(self, inputs: list[str], start: int, stop: int, out: str) -> dict[str, Any]:
        """Runs examples ``start`` to ``stop`` of the ``.npy`` files; ``out`` gets the first output.

        In batches as they were taken for timing: what dynamic quantization answers depends on
        what else is in the batch.
        """
        parts = [np.load(path, mmap_mode="r")[start:stop] for path in inputs]
        outputs = []
        for at in range(0, len(parts[0]), self.batch):
            here = np.arange(at, min(at + self.batch, len(parts[0])))
            whole = np.resize(here, self.batch) if self.fixed else here  # filled up, and cut again
            rows = (part[whole] for part in parts)
            answer = self.opened.run(None, dict(zip(self.feed, rows, strict=True)))[0]
            outputs.append(answer[: len(here)] if self.fixed else answer)
        whole = np.concatenate(outputs)
        _finite(whole)
        np.save(out, whole)
        return {"n": len(whole)}

    def kernels(self, path: str, ms: float, out: str) -> dict[str, Any]:
        """Microseconds that each node of the opened graph took, in each of :data:`CALLS` or more
        calls of about ``ms`` milliseconds in all, by onnxruntime's own profiler.

        The session is opened anew from ``path``, with the same settings, and given up again: the
        profiler can only be chosen then. Its file starts with ``out``.
        """
        return {"kernels": self._profiled(path, ms, CALLS, out)[0]}

    def placement(self, path: str, ms: float, out: str) -> dict[str, Any]:
        """Which node ran where and for how long: ``kernels`` of a few calls, named, with providers.

        ``assigned`` counts the nodes that each provider was given before it fused them. ``graph``
        is where the optimized graph was written: empty for a file without ``DequantizeLinear``,
        ``None`` where the provider compiles what no graph shows. OpenVINO says neither.
        """
        if isinstance(self.opened, OpenVino):
            return {"kernels": self._counted(path, ms), "assigned": None, "graph": None}
        graph = None
        if self.opened.get_providers()[0] not in COMPILING:
            pairs = b"DequantizeLinear" in Path(path).read_bytes()
            graph = f"{out}-optimized.onnx" if pairs else ""
        kernels, session = self._profiled(path, ms, GLANCE, out, graph)
        assigned: dict[str, int] = {}
        for part in session.get_provider_graph_assignment_info():
            assigned[part.ep_name] = assigned.get(part.ep_name, 0) + len(part.get_nodes())
        return {"kernels": kernels, "assigned": assigned, "graph": graph}

    def _profiled(
        self, path: str, ms: float, least: int, out: str, graph: str | None = None
    ) -> tuple[list[dict[str, Any]], Any]:
        import onnxruntime

        options = self.opened.get_session_options()
        options.enable_profiling = True
        options.profile_file_prefix = out
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if graph:
            options.optimized_model_filepath = graph
        session = onnxruntime.InferenceSession(
            path,
            options,
            providers=self.opened.get_providers(),
            disabled_optimizers=self.disabled,
        )
        self._repeat(lambda: session.run(None, self.feed), ms, least)
        nodes: dict[tuple[str, str], dict[str, Any]] = {}
        for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
            name, kernel, _ = event["name"].rpartition("_kernel_time")
            if kernel:
                ran = event["args"]
                node = nodes.setdefault(
                    (ran["node_index"], name),
                    {"name": name, "op": ran["op_name"], "provider": ran["provider"], "us": []},
                )
                node["us"].append(event["dur"])
        return list(nodes.values()), session

    def _counted(self, path: str, ms: float) -> list[dict[str, Any]]:
        counting = OpenVino(Path(path), self.threads, self.opened.settings, profile=True)
        nodes: dict[str, dict[str, Any]] = {}

        def call() -> None:
            counting.run(None, self.feed)
            for ran in counting.request.get_profiling_info():
                if ran.status == ran.Status.EXECUTED:
                    node = nodes.setdefault(
                        ran.node_name,
                        {"name": ran.node_name, "op": ran.node_type, "provider": "CPU", "us": []},
                    )
                    node["us"].append(ran.real_time.total_seconds() * 1e6)

        self._repeat(call, ms, GLANCE)
        return list(nodes.values())

    def _repeat(self, call: Callable[[], object], ms: float, least: int) -> None:
        end = self.clock() + ms * 1e6
        calls = 0
        while calls < least or self.clock() < end:
            call()
            calls += 1

    def memory(self) -> dict[str, Any]:
        """The kernel's high-water mark of this process, in bytes: ever, and since loading, which is
        ``None`` where it could not be set back."""
        since = peak_rss_bytes()
        return {
            "peak_rss_bytes": max(self.loading, since),
            "run_rss_bytes": since if self.reset else None,
        }

    def vram(self) -> dict[str, Any]:
        """Bytes of device memory of this process, ``None`` where NVML says nothing."""
        return {"vram_bytes": device.vram(os.getpid(), self.held)}

    def _peak(self) -> int:
        self.loading = peak_rss_bytes()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self.reset = False
        else:
            self.reset = True
        return self.loading

    def providers(self) -> dict[str, Any]:
        """The execution providers that this onnxruntime has."""
        import onnxruntime

        return {"providers": onnxruntime.get_available_providers()}


def _finite(output: Any) -> None:
    if not np.isfinite(output).all():
        raise ValueError("the model's output is not finite (NaN or infinity)")


VERBS = (
    "providers",
    "load",
    "take",
    "time",
    "bound",
    "draw",
    "offer",
    "kernels",
    "placement",
    "predict",
    "memory",
    "vram",
)

WOUND_DOWN = 0.01
"""Seconds after which PyTorch's threads no longer wait busily and disturb who comes next."""

SLEEP_NS = 1_000_000
"""How long before an arrival a waiting server stops sleeping: longer than a sleep overshoots."""

CALLS = 5
"""Calls of a layer that are profiled even where the time is up."""

COMPILING = ("TensorrtExecutionProvider", "OpenVINOExecutionProvider", "CoreMLExecutionProvider")
"""Providers whose graphs onnxruntime cannot write."""

GLANCE = 3
"""The same for a whole model, which may be slow: the first one allocates."""


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
            if verb not in VERBS:
                raise ValueError(f"unknown request {verb!r}")
            answer = {"ok": getattr(holder, verb)(**request)}
        except Exception as error:
            answer = {"error": one_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
