"""Make a trained PyTorch model smaller and faster, and know what it cost."""

from __future__ import annotations

import importlib
import os
from typing import Any

# onnxruntime sends telemetry from version 1.29 on unless this stands before its first import;
# child processes inherit it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# DDP says on standard error of every process that all parameters were used.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

_HOMES = {
    "Artifact": "artifact",
    "BudgetError": "errors",
    "CompressorError": "errors",
    "InputError": "errors",
    "Measurement": "measurement",
    "Report": "report",
    "Split": "task",
    "Splits": "task",
    "StageError": "errors",
    "Step": "recipe",
    "Target": "measurement",
    "Task": "task",
    "Unsuitable": "errors",
    "bench": "pipeline.bench",
    "inspect": "inspection",
    "load": "loading",
    "run": "pipeline",
    "save": "loading",
    "session": "measure.runtime",
}
"""Public names and the module each lives in, imported at first use: torch is heavy."""

__version__ = "0.1.0"
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    return getattr(importlib.import_module(f"compressor.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
