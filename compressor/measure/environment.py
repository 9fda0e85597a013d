"""The listed facts about this machine that go into a report, and nothing else of it."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from importlib import metadata, util
from pathlib import Path
from typing import Any

from compressor.measurement import PROVIDERS, SETTINGS, TORCH, Target

PACKAGES = (
    "torch",
    "torch-pruning",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "numpy",
    "compressor",
)

NO_OPENVINO = "OpenVINO is not installed: pip install 'compressor[openvino]'"

NO_CUDA = "this PyTorch is built without CUDA"

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


def installed(package: str) -> bool:
    """Whether a package could be imported, without doing so."""
    return util.find_spec(package) is not None


def absent(target: Target, providers: Collection[str]) -> str | None:
    """Why nothing can run on ``target``, ``None`` where something can; imports nothing.

    ``providers`` are those that this onnxruntime has. Whether a PyTorch that is built with CUDA
    finds a GPU is known once it is asked to open a model.
    """
    if target.runtime in TORCH:
        without = target.provider == "cuda" and metadata.version("torch").endswith("+cpu")
        return NO_CUDA if without else None
    if target.runtime == "openvino":
        return None if installed("openvino") else NO_OPENVINO
    wanted = PROVIDERS[target.provider]
    return None if wanted in providers else f"onnxruntime here has no {wanted}"


def cpu() -> dict[str, Any]:
    """``{"model", "features", "cores"}``; ``cores`` are those that this process may use."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            facts[key.strip()] = value.strip()
    except OSError:
        facts = {}  # not Linux: the model's name is all there is
    model = facts.get("model name") or platform.processor() or platform.machine()
    flags = facts.get("flags") or facts.get("Features") or ""
    features = [feature for feature in FEATURES if feature in flags.split()]
    return {"model": model, "features": features, "cores": cores()}


def affinity() -> list[int] | None:
    """The cores that this process and its workers may run on, as ``taskset`` sets them; ``None``
    where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def cores() -> int:
    """How many cores this process may run on."""
    return len(affinity() or ()) or os.cpu_count() or 1
