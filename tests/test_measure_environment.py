"""The facts about a machine that go into a report: these, and nothing else of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from compressor.measure import environment as facts
from compressor.measure.environment import absent, affinity, cores, cpu, environment
from compressor.measurement import PROVIDERS, SETTINGS, TORCH, Target
from compressor.stages.quantize.kernels import codes

ARM = "processor : 0\nFeatures : fp asimd asimddp i8mm sve\nCPU part : 0xd40\n"


def test_the_listed_facts_and_no_others() -> None:
    found = environment()
    assert set(found) == {"versions", "cpu", "os", "load", "session_settings"}
    assert set(found["cpu"]) == {"model", "features", "cores"}
    assert set(found["versions"]) <= {"python", *(p.replace("-", "_") for p in facts.PACKAGES)}
    assert {"python", "numpy", "onnxruntime", "torch"} <= set(found["versions"])
    assert all(isinstance(version, str) for version in found["versions"].values())
    assert isinstance(found["cpu"]["model"], str)
    assert set(found["cpu"]["features"]) <= set(facts.FEATURES)
    assert found["session_settings"] == SETTINGS
    assert found["session_settings"] is not SETTINGS
    assert found["load"] is None or found["load"] >= 0
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_nothing_of_the_user_or_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2hunter2")
    said = json.dumps(environment())
    assert "hunter2" not in said
    assert len(platform.node()) < 5 or platform.node() not in said
    assert str(Path.home()) not in said


def test_cores_are_those_that_this_process_may_use() -> None:
    code = (
        "import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]);"
        "from compressor.measure.environment import cores; print(cores())"
    )
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity on this system")
    assert cores() == len(os.sched_getaffinity(0))
    assert affinity() == sorted(os.sched_getaffinity(0))
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "1\n"
    )


@pytest.mark.parametrize(
    ("flags", "vnni"),
    [
        ("flags : fpu avx2 avx512f avx512_vnni", True),
        ("flags : fpu avx2 avx512f", False),
        ("flags : fpu avx2 notavx512_vnni", False),
        (ARM, True),
        ("", False),
    ],
)
def test_features_are_read_word_by_word(
    monkeypatch: pytest.MonkeyPatch, flags: str, vnni: bool
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: flags)
    assert (codes().bits == 8) is vnni
    assert set(cpu()["features"]) == set(flags.split()) & set(facts.FEATURES)


def test_a_system_without_cpuinfo_still_has_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path, encoding: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert cpu()["model"]
    assert cpu()["features"] == []


@pytest.mark.parametrize(("provider", "name"), list(PROVIDERS.items()))
def test_a_provider_is_absent_where_onnxruntime_lacks_it(provider: str, name: str) -> None:
    assert absent(Target(provider=provider), [name]) is None
    assert absent(Target(provider=provider), []) == f"onnxruntime here has no {name}"


@pytest.mark.parametrize("here", [False, True])
def test_openvino_is_absent_where_it_is_not_installed(
    here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "installed", lambda package: here and package == "openvino")
    why = absent(Target("openvino"), ["CPUExecutionProvider"])
    assert why == (None if here else facts.NO_OPENVINO)


@pytest.mark.parametrize("runtime", TORCH)
@pytest.mark.parametrize(
    ("version", "why"),
    [("2.13.0+cpu", facts.NO_CUDA), ("2.13.0+cu130", None), ("2.13.0", None)],
)
def test_pytorch_is_absent_on_cuda_where_it_is_built_without(
    runtime: str, version: str, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", {"torch": version}.__getitem__)
    assert absent(Target(runtime, "cuda"), []) == why
    assert absent(Target(runtime), []) is None


def test_asking_imports_nothing_heavy() -> None:
    code = (
        "import sys; from compressor.measure.environment import absent, environment;"
        "from compressor.measurement import Target;"
        "environment(); absent(Target('torch', 'cuda'), []);"
        "print({'torch', 'onnx', 'onnxruntime', 'sklearn', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
