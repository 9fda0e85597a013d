"""Counters: fake trees of Linux's files and a fake NVML. Nothing here asks the real machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.measure import device
from compressor.measure.device import Counter, Times, energy, governor, share, spent, stolen

counts = st.integers(0, 1 << 40)


def domain(root: Path, folder: str, name: str, used: int, limit: int) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{used}\n")
    (path / "max_energy_range_uj").write_text(f"{limit}\n")
    return path


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the package: two GPUs, the second at work for process 7 and others."""

    def refuse(uuid: str) -> None:
        raise RuntimeError("no such GPU")

    def process(pid: int, held: int | None) -> SimpleNamespace:
        return SimpleNamespace(pid=pid, usedGpuMemory=held)

    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=refuse,
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: [5_000, 70][gpu],
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=[300, 4000][gpu]),
        nvmlDeviceGetComputeRunningProcesses=lambda gpu: (
            [process(7, 1000), process(8, 50), process(7, 24), process(9, None)] if gpu else []
        ),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


# --- energy of the CPU ---


def test_packages_are_counted_and_nothing_inside_or_around_them(tmp_path: Path) -> None:
    domain(tmp_path, "intel-rapl:0", "package-0", 100, 1000)
    domain(tmp_path, "intel-rapl:0:0", "core", 60, 1000)
    domain(tmp_path, "intel-rapl:0:1", "dram", 30, 1000)
    domain(tmp_path, "intel-rapl:1", "package-1", 5, 2000)
    domain(tmp_path, "intel-rapl:2", "psys", 500, 1000)
    domain(tmp_path, "intel-rapl-mmio:0", "package-0", 100, 1000)
    assert energy(root=tmp_path) == {
        "intel-rapl:0": Counter(100, 1000),
        "intel-rapl:1": Counter(5, 2000),
    }


@pytest.mark.parametrize("lost", ["name", "energy_uj", "max_energy_range_uj"])
@pytest.mark.parametrize("text", [None, "<unsupported>"])
def test_a_package_that_cannot_be_read_leaves_no_sum(
    tmp_path: Path, lost: str, text: str | None
) -> None:
    domain(tmp_path, "intel-rapl:0", "package-0", 100, 1000)
    path = domain(tmp_path, "intel-rapl:1", "package-1", 5, 2000) / lost
    path.unlink()
    if text is not None and lost != "name":
        path.write_text(text)
    assert energy(root=tmp_path) is None


def test_no_counter_is_none(tmp_path: Path) -> None:
    assert energy(root=tmp_path) is None
    assert energy(root=tmp_path / "missing") is None
    domain(tmp_path, "intel-rapl:0", "psys", 1, 10)
    assert energy(root=tmp_path) is None


@given(
    st.dictionaries(
        st.text(min_size=1),
        st.tuples(st.integers(1, 1 << 40), st.floats(0, 1, exclude_max=True), counts),
        min_size=1,
    )
)
def test_what_was_spent_is_exact_over_a_wrap(domains: dict[str, tuple[int, float, int]]) -> None:
    """Each: after how much it starts anew, where it stood, how much was drawn (below one turn)."""
    before, after, drawn = {}, {}, 0
    for name, (limit, part, amount) in domains.items():
        start, step = int(part * limit), amount % limit
        before[name] = Counter(start, limit)
        after[name] = Counter((start + step) % limit, limit)
        drawn += step
    assert spent(before, after) == drawn / 1e3


@given(counts, counts, st.none() | counts)
def test_no_reading_gives_a_negative_energy(first: int, second: int, limit: int | None) -> None:
    """Limits that are none, 0 or below what the counter said, too."""
    found = spent({"a": Counter(first, limit)}, {"a": Counter(second, limit)})
    assert found is None or found >= 0
    assert (found is None) == (second < first and not limit)


def test_other_counters_cannot_be_compared() -> None:
    one = {"a": Counter(1, 10)}
    assert spent(None, one) is None
    assert spent(one, None) is None
    assert spent(one, {"b": Counter(2, 10)}) is None
    assert spent(one, {**one, "b": Counter(2, 10)}) is None


# --- the GPU ---


@pytest.mark.parametrize(
    ("visible", "mj"), [(None, 5_000), ("0", 5_000), ("1,0", 70), ("", None), ("-1", None)]
)
def test_the_first_visible_gpu_is_asked(
    nvml: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, visible: str | None, mj: int | None
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = energy(gpu=True)
    assert found == (None if mj is None else {"gpu": Counter(mj * 1000)})
    if found is not None:
        assert spent(found, {"gpu": Counter((mj or 0) * 1000 + 2500)}) == 2.5
        assert spent(found, {"gpu": Counter(0)}) is None, "the driver was loaded anew"


def test_a_gpu_may_be_named_by_its_uuid(
    nvml: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.nvmlDeviceGetHandleByUUID = {"GPU-8932": 1}.__getitem__
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932")
    assert energy(gpu=True) == {"gpu": Counter(70_000)}


def test_memory_is_that_of_the_process_where_it_is_listed(
    nvml: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert device.used() == 4000
    assert device.vram(7) == 1024
    assert device.vram(7, before=1) == 1024


@pytest.mark.parametrize("pid", [1, 9])
def test_memory_is_the_rise_of_all_where_it_is_not(
    nvml: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, pid: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert device.vram(pid) is None
    assert device.vram(pid, before=3000) == 1000
    assert device.vram(pid, before=4001) is None


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ("nvmlInit", (None, None, None)),
        ("nvmlDeviceGetTotalEnergyConsumption", (None, 300, 200)),
        ("nvmlDeviceGetMemoryInfo", ({"gpu": Counter(5_000_000)}, None, None)),
        ("nvmlDeviceGetComputeRunningProcesses", ({"gpu": Counter(5_000_000)}, 300, 200)),
    ],
)
def test_what_nvml_refuses_is_none(nvml: SimpleNamespace, broken: str, found: object) -> None:
    def refuse(*given: Any) -> None:
        raise RuntimeError("not supported")

    setattr(nvml, broken, refuse)
    assert (energy(gpu=True), device.used(), device.vram(7, before=100)) == found


def test_without_nvml_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy(gpu=True) is None
    assert device.used() is None
    assert device.vram(os.getpid(), before=0) is None


# --- steal, governor, switches ---

STATS = "cpu  10 20 30 40 50 60 70 8 900 1000\ncpu0 1 1 1 1 1 1 1 1 0 0\nctxt 5\n"


def test_steal_is_a_part_of_all_time_that_guests_are_not_counted_twice_in(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(STATS)
    assert stolen(tmp_path / "stat") == Times(8, 198), "idle and waiting for disks apart"


@pytest.mark.parametrize("text", ["", "cpu 1 2 3", "cpu a b c d e f g h", "intr 1 2 3 4 5 6 7 8"])
def test_another_stat_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "stat").write_text(text)
    assert stolen(tmp_path / "stat") is None
    assert stolen(tmp_path / "missing") is None


@given(st.builds(Times, counts, counts), st.builds(Times, counts, counts))
def test_a_share_is_between_0_and_1(before: Times, after: Times) -> None:
    found = share(before, after)
    assert (found is None) == (after.wanted <= before.wanted)
    assert found is None or 0 <= found <= 1


@given(st.builds(Times, counts, counts), st.integers(0, 10**9), st.integers(1, 10**9))
def test_a_share_is_exact(before: Times, steal: int, other: int) -> None:
    after = Times(before.steal + steal, before.wanted + steal + other)
    assert share(before, after) == steal / (steal + other)
    assert share(None, after) is None
    assert share(before, None) is None


def test_the_governor_is_named_or_none(tmp_path: Path) -> None:
    assert governor(tmp_path) is None
    (tmp_path / "scaling_governor").write_text("powersave\n")
    assert governor(tmp_path) == "powersave"


def test_switches_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    def usage(who: int) -> SimpleNamespace:
        return SimpleNamespace(ru_nivcsw={resource.RUSAGE_SELF: 41}[who])

    assert device.switches() >= 0
    monkeypatch.setattr(resource, "getrusage", usage)
    assert device.switches() == 41


def test_asking_imports_nothing_heavy() -> None:
    code = (
        "import sys; from compressor.measure import device; device.energy(); device.vram(1);"
        "print({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
