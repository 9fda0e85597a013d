"""The pytest plugin, in a pytest of its own: what a benchmark file of a user gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, save_model

import compressor.pipeline  # noqa: F401  # a pytest inside this one would load torch again
from compressor import plugin
from compressor.artifact import Artifact
from compressor.measure import protocol
from compressor.measure.process import Worker, WorkerFailed
from compressor.measurement import Target
from compressor.plugin import Recorded
from compressor.report import Report, problem
from compressor.report.gate import read

pytest_plugins = ["pytester"]

# Installed, it is loaded like any other plugin; from a checkout it has to be named.
KNOWN = any(one.name == "compressor" for one in metadata.entry_points(group="pytest11"))
ARGUMENTS = ["-p", "no:cacheprovider", *([] if KNOWN else ["-p", "compressor.plugin"])]

SIDE_BY_SIDE = """
def test_{name}(variants):
    rows = variants({{"fp32": "one.onnx", "again": "two.onnx"}})
    assert not rows or rows["again"]["speedup"]["low"] > 0
"""

QUICK = """
import pytest

def pytest_benchmark_generate_machine_info(config):
    return {}  # finding out takes a second
"""


def write_model(path: Path, operators: int = 1, weight: float = 0.5) -> None:
    """``operators`` times ``x @ w`` over float32 of shape (n, 4), eight of each value in ``w``."""
    nodes = [
        helper.make_node("MatMul", [f"x{at}" if at else "x", "w"], [f"x{at + 1}"])
        for at in range(operators)
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info(f"x{operators}", TensorProto.FLOAT, ["n", 4])
    held = numpy_helper.from_array(np.full((4, 4), weight, dtype=np.float32), "w")
    graph = helper.make_graph(nodes, "tiny", [x], [y], [held])
    opset = [helper.make_opsetid("", 17)]
    save_model(helper.make_model(graph, opset_imports=opset, ir_version=9), path)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside others pytest-benchmark times nothing: the runs in here are runs of their own."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.fixture
def folder(pytester: pytest.Pytester) -> Path:
    """Where a user's benchmarks and two models lie."""
    pytester.makeconftest(QUICK)
    write_model(pytester.path / "one.onnx")
    write_model(pytester.path / "two.onnx", operators=3)
    return pytester.path


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess(*ARGUMENTS, *arguments)


def stored(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["benchmarks"]
    return found


# --- times that are played back ---


@given(st.lists(st.floats(1e-9, 1e4), min_size=1))
def test_a_recorded_time_comes_back_as_it_was(seconds: list[float]) -> None:
    timer, seen = Recorded(), []
    timer.seconds = iter(seconds)
    for _ in seconds:
        timer.reset()
        start = timer()
        timer.step()
        seen.append(timer() - start)
    assert seen == seconds


# --- what is stored ---


def test_a_benchmark_stores_its_ratios(pytester: pytest.Pytester, folder: Path) -> None:
    """The row has the calls of the last file; the ratios and all the rest stand beside it."""
    pytester.makepyfile(test_side_by_side=SIDE_BY_SIDE.format(name="pair"))
    done = run(pytester, "--benchmark-json=out.json", "--benchmark-autosave")
    done.assert_outcomes(passed=1)
    [bench] = stored(folder / "out.json")
    extra, found = bench["extra_info"], bench["extra_info"]["compressor"]
    reference, again = found["measurements"]
    assert (reference["artifact"], again["artifact"]) == ("fp32", "again")
    # What pytest-benchmark knows are the very calls that our row is made of.
    assert bench["stats"]["median"] * 1e3 == pytest.approx(again["latency_ms"]["p50"], rel=1e-9)
    assert bench["stats"]["min"] * 1e3 == pytest.approx(again["latency_ms"]["min"], rel=1e-9)
    assert bench["stats"]["rounds"] == again["latency_ms"]["n"]
    assert bench["options"]["timer"] == "recorded"
    assert extra["speedup of again"] == again["speedup"]["value"]
    assert extra["speedup of again, low"] <= extra["speedup of again"]
    assert extra["speedup of again"] <= extra["speedup of again, high"]
    assert "speedup of fp32" not in extra
    assert reference["speedup"] | {"verdict": "same", "value": 1.0} == reference["speedup"]
    assert [one["size_bytes"] for one in found["artifacts"]] == [
        (folder / name).stat().st_size for name in ("one.onnx", "two.onnx")
    ]
    assert [one["params"] for one in found["artifacts"]] == [16, 16]

    # The same fields as report.json has: with a name, a date and a command it is a report.
    whole = {"name": "x", "created": "2026-11-21T14:02:11", "command": "pytest", "recipe": [],
             **found, "best_per_target": [], "stages": [], "samples": None}  # fmt: skip
    assert problem(whole) is None
    assert "again" in Report(whole, folder).table()

    assert [one["name"] for one in read(folder / "out.json").document["artifacts"]] == [
        "fp32",
        "again",
    ]
    shown = ["*compressor: side by side*", "test_side*.py::test_pair (cpu, *", "fp32 *reference*"]
    flags = dict.fromkeys(flag for row in (reference, again) for flag in row["noise"])
    done.stdout.fnmatch_lines([*shown, "again *", *(f"noisy: {flag}" for flag in flags)])

    # And pytest-benchmark compares with what it saved.
    again_done = run(pytester, "--benchmark-compare", "--benchmark-compare-fail=median:100000%")
    again_done.assert_outcomes(passed=1)
    again_done.stdout.fnmatch_lines(["*test_pair (NOW)*"])
    again_done.stdout.fnmatch_lines(["*test_pair (0001_*"])


def test_one_benchmark_beside_others(pytester: pytest.Pytester, folder: Path) -> None:
    """Other tests keep their timer, whatever they call their fixtures, and marks keep counting."""
    pytester.makepyfile(
        test_side_by_side="""
        import pytest

        @pytest.fixture
        def own(variants):
            return variants

        @pytest.mark.benchmark(group="ours")
        def test_through_another_fixture(benchmark, own):
            own(["one.onnx"], bench_time="quick", seed=3)
            benchmark.extra_info["note"] = 7
        """,
        test_other="""
        import pytest

        @pytest.fixture
        def variants():
            return 3

        @pytest.mark.benchmark(max_time=0.01, min_rounds=1)
        def test_another(variants, benchmark):
            assert benchmark(lambda: variants) == 3
        """,
    )
    run(pytester, "--benchmark-json=out.json").assert_outcomes(passed=2)
    ours, other = sorted(
        stored(folder / "out.json"), key=lambda one: str(one["group"]), reverse=True
    )
    assert (ours["group"], ours["extra_info"]["note"]) == ("ours", 7)
    assert [one["name"] for one in ours["extra_info"]["compressor"]["artifacts"]] == ["one"]
    assert (other["options"]["timer"], other["extra_info"]) == ("perf_counter", {})


def test_disabled_benchmarks_run_once_and_measure_nothing(
    pytester: pytest.Pytester, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("compressor.measure.protocol.observe", measured)
    pytester.makepyfile(test_side_by_side=SIDE_BY_SIDE.format(name="pair"))
    done = run(pytester, "--benchmark-disable", "--benchmark-json=out.json")
    done.assert_outcomes(passed=1)
    done.stdout.no_fnmatch_line("*side by side*")
    assert not (folder / "out.json").exists() or stored(folder / "out.json") == []


def test_a_file_is_tried_as_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its session is the same one: what its maker switched off stays off."""
    write_model(tmp_path / "one.onnx")
    step = {"stage": "quantize", "settings": {}, "facts": {"disabled": ["MatMulAddFusion"]}}
    made = replace(Artifact.of(tmp_path / "one.onnx", "onnx"), steps=(step,))
    asked, ask = [], Worker.ask

    def heard(worker: Worker, do: str, **request: Any) -> dict[str, Any]:
        if do == "load":
            asked.append(request)
        return ask(worker, do, **request)

    monkeypatch.setattr(Worker, "ask", heard)
    monkeypatch.setitem(protocol.SECONDS, "quick", 0.01)
    bench = plugin._bench("pair", [made], None, None, 0)
    plugin._tried(bench)
    plugin._measured(bench, "quick")
    assert len(asked) == 3  # tried, measured, and the second worker of the reference
    assert asked[0] == asked[1]
    assert (asked[0]["disabled"], asked[0]["inputs"]) == (["MatMulAddFusion"], 1)

    eager = bench._replace(target=Target("torch"))
    with pytest.raises(WorkerFailed, match="one: it has no PyTorch form: it was made from ONNX"):
        plugin._tried(eager)


# --- what fails ---

BAD: dict[str, tuple[str, Callable[[Path], object]]] = {
    "cut": ("is not ONNX or cut off", lambda path: path.write_bytes(path.read_bytes()[:40])),
    "gone": ("does not exist", lambda path: path.unlink()),
    "nan": ("not finite", lambda path: write_model(path, weight=float("nan"))),
}


@pytest.mark.parametrize("disabled", [False, True])
def test_a_broken_file_fails_with_the_reason(
    pytester: pytest.Pytester, folder: Path, disabled: bool
) -> None:
    """Each with its own, nothing stored for it, and pytest-benchmark adds no blame of its own."""
    tests = []
    for name, (_, spoil) in BAD.items():
        write_model(folder / f"{name}.onnx")
        spoil(folder / f"{name}.onnx")
        tests.append(f"def test_{name}(variants):\n    variants(['one.onnx', '{name}.onnx'])\n")
    pytester.makepyfile(test_side_by_side="\n".join(tests))
    arguments = ["--benchmark-disable"] if disabled else ["--benchmark-json=out.json"]
    done = run(pytester, "-Werror", *arguments)
    done.assert_outcomes(failed=len(BAD))
    text = done.stdout.str()
    for name, (reason, _) in BAD.items():
        assert any(name in line and reason in line for line in text.splitlines()), text
    if not disabled:
        assert stored(folder / "out.json") == []


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("[]", "variants of the names none: give each a name"),
        ("['one.onnx', 'deeper/one.onnx']", "variants of the names one, one: give each a name"),
        ("['one.onnx'], bench_time='long'", "bench_time 'long': one of quick, normal, full"),
        ("'two.txt'", "two.txt is no .onnx file"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(
    pytester: pytest.Pytester, folder: Path, call: str, reason: str
) -> None:
    (folder / "deeper").mkdir()
    write_model(folder / "deeper" / "one.onnx")
    pytester.makepyfile(f"def test_wrong(variants):\n    variants({call})\n")
    done = run(pytester, "-Werror")
    done.assert_outcomes(failed=1)
    assert reason in done.stdout.str()


# --- what everybody pays for it ---


def test_loading_the_plugin_imports_next_to_nothing() -> None:
    code = (
        "import sys; import pytest; before = set(sys.modules)\n"
        "import compressor.plugin\n"
        "print(sorted({name for name in set(sys.modules) - before if name != '__future__'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['compressor', 'compressor.plugin']"
