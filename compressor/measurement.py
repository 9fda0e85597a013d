"""Where something is measured, and the raw values of one quantity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino-ep": "OpenVINOExecutionProvider",
}
"""Providers of a target, and what onnxruntime calls them."""

PLACES = {
    **{name: ("onnxruntime", name) for name in PROVIDERS},
    "openvino": ("openvino", "cpu"),
    "torch": ("torch", "cpu"),
    "torch-compile": ("torch-compile", "cpu"),
    "torch-cuda": ("torch", "cuda"),
    "torch-compile-cuda": ("torch-compile", "cuda"),
}
"""What ``--provider`` may say: the runtime and its provider. OpenVINO's own runtime is one."""

TORCH = ("torch", "torch-compile")
"""Runtimes that open the torch file which an ONNX file was exported from."""

GPUS = ("cuda", "tensorrt")
"""Providers that compute on a GPU with memory and counters of its own."""

SETTINGS: dict[str, str] = {"session.intra_op.allow_spinning": "0"}
"""Session settings used for every row. Spinning is off: idle workers must not take a core."""

OPENVINO: dict[str, str] = {"NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}
"""The same for OpenVINO: all threads work on one call. The model's precision is added to it."""


@dataclass(frozen=True)
class Target:
    """Where an artifact is measured: batch size in examples, intra-op threads."""

    runtime: str = "onnxruntime"
    provider: str = "cpu"
    batch: int = 1
    threads: int = 1

    def __str__(self) -> str:
        threads = "thread" if self.threads == 1 else "threads"
        runtime = "" if self.runtime == Target.runtime else f", {self.runtime}"
        return f"{self.provider}, batch {self.batch}, {self.threads} {threads}{runtime}"

    def to_json(self) -> dict[str, Any]:
        """The four fields as the report names them."""
        return {
            "runtime": self.runtime,
            "provider": self.provider,
            "batch": self.batch,
            "threads": self.threads,
        }


@dataclass(frozen=True)
class Measurement:
    """Raw values of one quantity of one artifact on one target, or why there are none.

    ``values`` are blocks in the order they were taken, each block's values in order, and
    ``processes`` how many of them each start of the worker took; statistics are derived from them,
    never stored in their place. Exactly one of ``values`` and ``skipped``
    is given: a measurement without values and without a reason cannot be made.
    """

    artifact: str
    target: Target
    quantity: str
    unit: str
    values: tuple[tuple[float, ...], ...] = ()
    warmup: int = 0
    skipped: str | None = None
    processes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.values) == bool(self.skipped):
            raise ValueError(f"{self.quantity} of {self.artifact}: values or a reason, not both")
        for block in self.values:
            if not block or not all(math.isfinite(value) for value in block):
                raise ValueError(f"{self.quantity} of {self.artifact}: empty or not finite")
