"""The listed facts about this machine that go into a report, and nothing else of it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from compressor.measure.runtime import SETTINGS

PACKAGES = ("torch", "torch-pruning", "onnx", "onnxscript", "onnxruntime", "numpy", "compressor")

FEATURES = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "amx_int8",
    "amx_bf16",
    "avx512_bf16",
    "asimddp",
    "i8mm",
    "sve",
)
"""CPU flags that decide how fast int8 and bf16 are."""


def environment() -> dict[str, Any]:
    """Versions, CPU model and features, cores, load: read from files, importing nothing heavy."""
    return {
        "versions": versions(),
        "cpu": cpu(),
        "os": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "session_settings": dict(SETTINGS),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu() -> dict[str, Any]:
    """``{"model", "features", "cores"}``; ``cores`` are those that this process may use."""
    model, flags = platform.processor() or platform.machine(), ""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        facts = dict(
            (part.strip() for part in line.split(":", 1)) for line in text.splitlines() if ":" in line
        )
        model = facts.get("model name", model)
        flags = facts.get("flags", facts.get("Features", ""))
    except OSError:
        pass
    features = [feature for feature in FEATURES if feature in flags.split()]
    return {"model": model, "features": features, "cores": cores()}


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_vnni() -> bool:
    """Whether 8-bit dot products accumulate without saturating at 16 bits on this CPU."""
    return bool({"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"} & set(cpu()["features"]))
