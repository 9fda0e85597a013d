"""Counters of the machine and of its GPU: energy, device memory, steal, interruptions, governor.

Read from files of Linux and from NVML, where they are: what is not there is ``None``, never an
error. Nothing heavy is imported, so that a worker can ask between two blocks.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

POWERCAP = Path("/sys/class/powercap")
CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")
STAT = Path("/proc/stat")


class Counter(NamedTuple):
    """Microjoules since some moment; after ``limit`` of them it starts at 0 again."""

    value: int
    limit: int | None = None


Energy = Mapping[str, Counter]
"""What every counter said at one moment, by its name; :func:`spent` compares two of them."""


class Times(NamedTuple):
    """Jiffies of all cores since boot: those that other guests took, and all that were wanted."""

    steal: int
    wanted: int


def energy(gpu: bool = False, root: Path = POWERCAP) -> Energy | None:
    """The counters of the CPU's packages (RAPL), or of the GPU that CUDA computes on (NVML).

    They count what everything on that chip draws, idle or not. RAPL's change every millisecond and
    are for root alone on most systems; NVML's change a few times a second, so that less than a
    second of work says little. ``None`` where a package cannot be read: a part is no sum.
    """
    if gpu:
        return _gpu_energy()
    counters = {}
    try:
        for domain in root.glob("intel-rapl:*"):
            # Its cores and its memory have a domain each beside the package's own.
            if _text(domain / "name").startswith("package"):
                used = int(_text(domain / "energy_uj"))
                limit = int(_text(domain / "max_energy_range_uj"))
                counters[domain.name] = Counter(used, limit)
    except (OSError, ValueError):
        return None
    return counters or None


def spent(before: Energy | None, after: Energy | None) -> float | None:
    """Millijoules between two readings of the same counters, never negative.

    A counter that started anew once is allowed for; ``None`` where that cannot be.
    """
    if before is None or after is None or set(before) != set(after):
        return None
    total = 0
    for name, (value, _) in before.items():
        now, limit = after[name]
        if now < value:
            if not limit:
                return None
            now = value + (now - value) % limit
        total += now - value
    return total / 1e3


def used() -> int | None:
    """Bytes that are taken of the GPU's memory, by whomever."""
    try:
        nvml, gpu = _nvml()
        return int(nvml.nvmlDeviceGetMemoryInfo(gpu).used)
    except Exception:  # NVML's own have no base that is there without it
        return None


def vram(pid: int, before: int | None = None) -> int | None:
    """Bytes of the GPU's memory that process ``pid`` holds.

    Where NVML does not list it, as in most containers, by how much :func:`used` rose since it was
    ``before``; that is everybody's, and ``None`` where it fell or ``before`` is not given.
    """
    try:
        nvml, gpu = _nvml()
        listed = nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
        held = [int(one.usedGpuMemory) for one in listed if one.pid == pid and one.usedGpuMemory]
    except Exception:  # as above
        held = []
    if held:
        return sum(held)
    now = None if before is None else used()
    return None if before is None or now is None or now < before else now - before


def governor(root: Path = CPUFREQ) -> str | None:
    """Who decides the clock of the first core: ``performance``, ``powersave`` ..."""
    try:
        return _text(root / "scaling_governor") or None
    except (OSError, ValueError):
        return None


def stolen(path: Path = STAT) -> Times | None:
    """Jiffies so far; :func:`share` compares two readings."""
    try:
        name, *counts = _text(path).partition("\n")[0].split()
        # user nice system idle iowait irq softirq steal; what guests of ours took is in user.
        jiffies = [int(count) for count in counts[:8]]
    except (OSError, ValueError):
        return None
    if name != "cpu" or len(jiffies) < 8:
        return None
    return Times(jiffies[7], sum(jiffies) - jiffies[3] - jiffies[4])


def share(before: Times | None, after: Times | None) -> float | None:
    """The part of the CPU's time that was wanted, 0 to 1, which went to other guests between two
    readings."""
    if before is None or after is None or after.wanted <= before.wanted:
        return None
    return min(1.0, max(0.0, (after.steal - before.steal) / (after.wanted - before.wanted)))


def switches() -> int:
    """Involuntary context switches of this process so far, all of its threads."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()


def _gpu_energy() -> Energy | None:
    try:
        nvml, gpu = _nvml()
        return {"gpu": Counter(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) * 1000)}
    except Exception:  # as in used()
        return None


def _nvml() -> tuple[Any, Any]:
    """NVML, and the first GPU that CUDA may use; raises where either is missing."""
    import pynvml

    pynvml.nvmlInit()  # counted: every call but the first is cheap
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if first.isdigit():
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(first))
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(first)
