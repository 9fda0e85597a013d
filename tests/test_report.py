"""The report: schema, table, page and picture, all from one realistic document."""

from __future__ import annotations

import copy
import html
import json
import re
import subprocess
import sys
from itertools import groupby, pairwise, takewhile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from compressor.cli import app
from compressor.errors import InputError
from compressor.measure.statistics import speedup, verdict
from compressor.measurement import Target
from compressor.report import FILE, Report, problem, schema
from compressor.report import table as tables
from compressor.report.markdown import markdown
from compressor.report.plots import pictures, shown
from compressor.report.table import (
    ONCE,
    count,
    escaped,
    figures,
    footnotes,
    plain,
    score,
    size,
)

PNG = b"\x89PNG\r\n\x1a\n"
NO_CUDA = "onnxruntime here has no CUDAExecutionProvider"
ONE, TWO = Target(threads=1), Target(threads=2)
CUDA = Target(provider="cuda")


def _steps(*stages: str) -> list[dict[str, Any]]:
    known = {
        "prune": {
            "stage": "prune",
            "settings": {"ratio": 0.5, "keep": []},
            "facts": {
                "reached": {"params": 0.731, "macs": 0.718},
                "left_alone": [{"layer": "head", "why": "it makes the output"}],
            },
        },
        "distill": {
            "stage": "distill",
            "settings": {"epochs": 2, "loss": "kd"},
            "facts": {
                "best_epoch": 2,
                "validate": 0.9741,
                "history": [
                    {"epoch": 1, "loss": 1.21, "accuracy": 0.9402},
                    {"epoch": 2, "loss": 0.73, "accuracy": 0.9741},
                ],
            },
        },
        "export": {"stage": "export", "settings": {}, "facts": {"opset": 20, "parity": 1.9e-06}},
        "dynamic": {"stage": "quantize", "settings": {"scheme": "dynamic"}, "facts": {}},
        "static": {
            "stage": "quantize",
            "settings": {"scheme": "static", "calibrate": "minmax"},
            "facts": {"quantized": ["conv1", "conv2", "fc"], "in_float": None},
        },
    }
    return [known[stage] for stage in stages]


# name, steps, bytes, params, MACs, accuracy, drop, sqnr dB, p50 on 1 and 2 threads, gain on 1
ROWS: list[tuple[Any, ...]] = [
    ("baseline", ("export",), 88_312, 21_840, 1_204_224, 0.9778, (0.0, -0.0055, 0.0055), None,
     0.261, 0.201, (1.0, 0.99, 1.01, "same")),
    ("pruned", ("prune", "export"), 27_004, 5_874, 339_810, 0.8139, (0.1639, 0.12, 0.2), 4.21,
     0.108, 0.0971, (2.417, 2.35, 2.47, "faster")),
    ("recovered", ("prune", "distill", "export"), 27_004, 5_874, 339_810, 0.9756,
     (0.0022, -0.004, 0.009), 11.3, 0.1082, 0.0975, (2.412, 2.35, 2.468, "faster")),
    ("int8-dynamic", ("prune", "distill", "export", "dynamic"), 15_020, 5_874, 339_810, 0.9750,
     (0.0028, -0.0041, 0.0098), 10.9, 0.2688, 0.251, (0.971, 0.93, 1.003, "inconclusive")),
    ("int8-static", ("prune", "distill", "export", "static"), 14_233, 5_874, 339_810, 0.9744,
     (0.0034, -0.0036, 0.0103), 10.1, 0.0731, 0.0702, (3.57, 3.48, 3.66, "faster")),
]  # fmt: skip


def placement(name: str, p50: float) -> dict[str, Any]:
    """Two nodes, the second by another name in the 8-bit model."""
    conv = "QLinearConv" if name == "int8-static" else "Conv"
    found = {
        "nodes": {"CPUExecutionProvider": 2},
        "assigned": {"CPUExecutionProvider": 9},
        "share": {"CPUExecutionProvider": 1.0},
        "memcpy": 0,
        "quantize": 1 if name == "int8-static" else 0,
        "dequantize": 0,
        "unfused": 0,
        "operators": [
            {"op": conv, "nodes": 1, "ms": p50 * 0.8},
            {"op": "Gemm", "nodes": 1, "ms": p50 * 0.1},
        ],
        "dearest": [
            {"node": f"/{conv}|1", "op": conv, "provider": "CPUExecutionProvider", "ms": p50 * 0.8},
        ],
    }
    return copy.deepcopy(found)


PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR4nGOMYoAAJgaKGAAbfgBqEMfrVAAAAABJ"
    "RU5ErkJggg=="
)
"""Eight by eight gray pixels."""


def damage(lost: float) -> dict[str, Any]:
    """Two classes, many more in one row, and an example; nothing where nothing was lost."""
    if not lost:
        return {"classes": None, "worst": None}
    rows = [("7", 40, lost + 0.1), ("3", 30, lost - 0.1), ("others", 290, lost)]
    return {
        "classes": [
            {
                "class": name,
                "n": n,
                "baseline": 0.95,
                "value": 0.95 - less,
                "drop": {"value": less, "low": less - 0.03, "high": less + 0.03},
            }
            | ({"classes": 8} if name == "others" else {})
            for name, n, less in rows
        ],
        "worst": [
            {
                "example": 17,
                "target": "7",
                "baseline": "7",
                "output": "1",
                "lost": 3.25,
                "picture": PICTURE,
            }
        ],
    }


def conditions(p50: float, rate: float) -> dict[str, Any]:
    """What is measured beside latency: nothing of a GPU, and too few samples at half load."""
    return {
        "processes": 3,
        "first_ms": p50 * 4,
        "cpu_ms": p50 * 0.98,
        "peak_load_bytes": 41_000_000,
        "peak_run_bytes": 45_000_000,
        "vram_bytes": None,
        "energy_mj": None,
        "device_ms": None,
        "load_curve": [
            {
                "offered_per_s": rate * share,
                "served_per_s": rate * share,
                "p50": p50 / (1 - share),
                "p90": p50 * 2 / (1 - share),
                "p99": p50 * 4 / (1 - share) if share > 0.5 else None,
                "n": 900,
            }
            for share in (0.5, 0.75, 0.9)
        ],
        "conditions": {
            "iqr": 0.12,
            "drift": -0.013,
            "cpu_share": 0.99,
            "switches_per_s": 3.2,
            "steal": 0.0,
            "load": 0.31,
            "governor": "performance",
        },
    }


def document(**changes: Any) -> dict[str, Any]:
    """A run of the CNN on digits as a schema 1 document, fresh at every call; keywords replace
    top-level fields."""
    # fmt: off
    artifacts, measurements = [], []
    for name, steps, size_bytes, params, macs, accuracy, lost, sqnr, one, two, gain in ROWS:
        fidelity = {"sqnr_db": sqnr, "n": 360,
                    "top1_agreement": 0.9944 if sqnr else 1.0, "max_abs_diff": 0.21 if sqnr else 0}
        artifacts.append(
            {
                "name": name,
                "path": f"{name}.onnx",
                "sha256": f"{len(artifacts):x}7" * 32,
                "form": "onnx",
                "source": f"{name}.safetensors",
                "steps": _steps(*steps),
                "size_bytes": size_bytes,
                "params": params,
                "macs": macs,
                "best": name == "int8-static",
                "within_budget": lost[0] <= 0.01,
                "proven": lost[2] <= 0.01,
                "accuracy": {
                    "accuracy": accuracy,
                    "n": 360,
                    "drop": dict(zip(("value", "low", "high"), lost, strict=True)),
                },
                "fidelity": fidelity,
                **damage(lost[0]),
            }
        )
        for target, p50 in ((ONE, one), (TWO, two)):
            value, low, high, verdict = gain
            measurements.append(
                {
                    "artifact": name,
                    **target.to_json(),
                    "primary": target == ONE,
                    "latency_ms": {
                        "min": p50 * 0.97,
                        "p50": p50,
                        "p90": p50 * 1.1,
                        "p99": None,
                        "mean": p50 * 1.02,
                        "n": 400,
                    },
                    "throughput_per_s": 1000 / p50,
                    "peak_rss_bytes": 45_012_000 + size_bytes,
                    "load_ms": 11.5,
                    "accuracy": {"accuracy": accuracy, "n": 360},
                    "fidelity": fidelity,
                    "speedup": {
                        "versus": "baseline",
                        "value": value,
                        "low": low,
                        "high": high,
                        "verdict": verdict,
                    },
                    "noise": [],
                    "session": {"settings": {"session.intra_op.allow_spinning": "0"},
                                "disabled": ["SkipLayerNormFusion"]},
                    "placement": placement(name, p50),
                    **conditions(p50, 1000 / p50),
                }
            )
        measurements.append({"artifact": name, **CUDA.to_json(), "skipped": NO_CUDA})
    took = {"pruned": 1.42, "recovered": 8.15, "int8-dynamic": 0.35, "int8-static": 0.61}
    stages = ("prune", "distill", "quantize", "quantize")
    whole = {
        "schema": 1,
        "name": "cnn",
        "created": "2026-11-21T14:02:11+00:00",
        "command": "compressor run cnn.pt --prune 0.5 --epochs 2 --quantize int8 --threads 1,2",
        "finished": True,
        "model": {"path": "cnn.pt", "sha256": "ab" * 32},
        "max_drop": 0.01,
        "primary": ONE.to_json(),
        "recommendation": "Use int8-static: 3.57x [3.48, 3.66] faster than baseline on cpu, "
        "batch 1, 1 thread, 84 % smaller, for a drop in accuracy of +0.0034 [-0.0036, 0.0103].",
        "warnings": ["within the drop of 0.01 by point estimate; the interval reaches 0.0103"],
        "environment": {
            "versions": {"python": "3.11.9", "torch": "2.13.0", "onnx": "1.23.2",
                         "onnxruntime": "1.31.1", "torch_pruning": "1.6.1", "numpy": "2.4.0",
                         "compressor": "0.1.0"},
            "cpu": {"model": "Intel(R) Xeon(R)", "features": ["avx512f", "avx512_vnni"],
                    "cores": 2},
            "threads": {"intra_op": [1, 2], "spinning": False},
            "session_settings": {"session.intra_op.allow_spinning": "0"},
            "providers": ["CPUExecutionProvider"],
            "load": 0.31,
            "noise_floor": {"value": 0.013, "n": 400},
            "os": "Linux 6.1",
        },
        "recipe": [
            {"stage": "prune", "settings": {"ratio": 0.5}, "name": "pruned", "from": "baseline"},
            {"stage": "distill", "settings": {"epochs": 2}, "name": "recovered",
             "from": "pruned"},
        ],
        "task": {"name": "digits", "kind": "classification", "data": "digits",
                 "splits": {"train": 1077, "validate": 180, "calibrate": 180, "test": 360},
                 "metric": "accuracy", "higher_is_better": True},
        "artifacts": artifacts,
        "measurements": measurements,
        "best_per_target": [{**ONE.to_json(), "artifact": "int8-static"},
                            {**TWO.to_json(), "artifact": "int8-static"}],
        "stages": [{"stage": stage, "artifact": name, "seconds": took[name],
                    "peak_rss_bytes": 412_000_000, "cached": stage == "prune"}
                   for stage, name in zip(stages, took, strict=True)],
        "samples": "samples.npz",
        "runtimes": {"artifact": "int8-static", "runtime": "openvino", "versus": "onnxruntime",
                     "value": 0.42, "low": 0.41, "high": 0.44, "verdict": "slower",
                     "drop": {"value": 0.0011, "low": -0.002, "high": 0.0042},
                     "within_budget": True},
    }
    # fmt: on
    return copy.deepcopy({**whole, **changes})


def without_data() -> dict[str, Any]:
    """Nothing could be judged."""
    changed = document()
    changed["task"] |= {"data": None, "splits": None, "metric": None, "higher_is_better": None}
    for artifact in changed["artifacts"]:
        artifact |= {"accuracy": {"skipped": "no data"}, "within_budget": None, "proven": None}
    for row in changed["measurements"]:
        row |= {} if "skipped" in row else {"accuracy": None}
    return changed


def all_skipped() -> dict[str, Any]:
    """No target could be measured."""
    changed = document(primary=None, best_per_target=[])
    changed["measurements"] = [
        {"artifact": row["artifact"], **ONE.to_json(), "skipped": "the worker was killed"}
        for row in changed["measurements"][::3]
    ]
    return changed


def only_baseline() -> dict[str, Any]:
    """An interrupted run, without the fields that are our own additions."""
    changed = document(finished=False)
    for field in ("primary", "recommendation", "warnings", "model", "max_drop"):
        del changed[field]
    changed["artifacts"] = changed["artifacts"][:1]
    changed["measurements"] = changed["measurements"][:1]
    changed["measurements"][0]["speedup"] = None
    return changed


def an_error() -> dict[str, Any]:
    """A regression: the metric is an error and its drop relative to the baseline's."""
    changed = document()
    changed["task"] |= {"kind": "regression", "metric": "rmse", "higher_is_better": False}
    for artifact in changed["artifacts"]:
        lost = artifact["accuracy"]["drop"]
        artifact["accuracy"] = {"rmse": 53.2 * (1 + lost["value"]), "n": 360, "drop": lost}
    return changed


def nothing() -> dict[str, Any]:
    """Interrupted before the first file was made."""
    return document(artifacts=[], measurements=[], stages=[], best_per_target=[], primary=None)


def old() -> dict[str, Any]:
    """From before there were load curves, conditions and damage."""
    changed = document()
    for artifact in changed["artifacts"]:
        del artifact["classes"], artifact["worst"]
        for step in artifact["steps"]:
            step["facts"].pop("history", None)
    for row in changed["measurements"]:
        for field in conditions(1.0, 1.0):
            row.pop(field, None)
    return changed


CASES = [document, old, without_data, all_skipped, only_baseline, an_error, nothing]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)

# Schema.


@every_case
def test_schema_accepts(case: Any) -> None:
    assert problem(case()) is None


def test_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


FREE = {"settings", "facts", "threads", "session_settings", "nodes", "assigned", "share"}
OPTIONAL = {
    *zip(["finished", "model", "max_drop", "primary", "recommendation", "warnings"], strict=True),
    ("runtimes",),
    *(("measurements", "[]", field) for field in conditions(1.0, 1.0)),
    *(("measurements", "[]", "conditions", name) for name in conditions(1.0, 1.0)["conditions"]),
    *(("artifacts", "[]", field) for field in ("classes", "worst")),
    ("artifacts", "[]", "classes", "[]", "classes"),
    ("measurements", "[]", "session"),
    ("measurements", "[]", "placement"),
    ("environment", "session_settings"),
    *(("environment", "versions", name) for name in ("torch", "onnx", "torch_pruning")),
    ("environment", "versions", "compressor"),
    ("stages", "[]", "artifact"),
    ("artifacts", "[]", "steps", "[]", "facts"),
}


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and position below ``value`` that the schema speaks of."""
    entries = enumerate(value) if isinstance(value, list) else getattr(value, "items", tuple)()
    found = []
    for key, entry in entries:
        found.append((*path, key))
        # ``threads`` of a target is a number, that of the environment a free table.
        if key not in FREE or not isinstance(entry, dict):
            found += _paths(entry, (*path, key))
    return found


def _shape(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The path with one row standing for its like; a skipped measurement is unlike the others."""
    skipped = path[0] == "measurements" and len(path) > 1 and path[1] % 3 == 2
    return (skipped, *("[]" if isinstance(key, int) else key for key in path))


def short() -> dict[str, Any]:
    """The document with two of its artifacts: every shape is there, and it is soon checked."""
    changed = document()
    return {
        **changed,
        "artifacts": changed["artifacts"][:2],
        "measurements": changed["measurements"][:6],
    }


PATHS = list({_shape(path): path for path in _paths(short())}.values())


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def test_schema_rejects_every_missing_key() -> None:
    for path in PATHS:
        broken = short()
        del _at(broken, path[:-1])[path[-1]]
        may_go = isinstance(path[-1], int) or _shape(path)[1:] in OPTIONAL
        assert may_go == (problem(broken) is None), path


@given(st.sampled_from(PATHS), st.recursive(st.text(max_size=3), st.lists) | st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_schema_rejects_a_wrong_type(path: tuple[Any, ...], wrong: Any) -> None:
    broken = short()
    before = _at(broken, path)
    if isinstance(wrong, type(before)):
        wrong = {"wrong": True}
    _at(broken, path[:-1])[path[-1]] = wrong
    assert problem(broken) is not None


@pytest.mark.parametrize(
    ("path", "wrong", "where"),
    [
        (("schema",), 2, "at $.schema: 1 was expected"),
        (("artifacts", 0, "sha256"), "xyz", "at $.artifacts[0].sha256"),
        (("artifacts", 1, "accuracy"), {"skipped": " "}, "at $.artifacts[1].accuracy.skipped"),
        (("artifacts", 1, "accuracy"), {"n": 1, "drop": None}, "at $.artifacts[1].accuracy"),
        (("measurements", 0, "latency_ms", "p50"), None, "at $.measurements[0].latency_ms.p50"),
        (("measurements", 0, "skipped"), "both", "at $.measurements[0].latency_ms"),
        (("measurements", 2, "skipped"), "", "at $.measurements[2].skipped"),
        (("measurements", 3, "speedup", "low"), 1.0, "at $.measurements[3].speedup.low"),
        (("measurements", 3, "speedup", "verdict"), "slower", "at $.measurements[3].speedup.high"),
        (("measurements", 0, "batch"), 0, "at $.measurements[0].batch"),
        (("task", "kind"), "poetry", "at $.task.kind: 'poetry' is not one of"),
    ],
)
def test_schema_says_where(path: tuple[Any, ...], wrong: Any, where: str) -> None:
    broken = document()
    _at(broken, path[:-1])[path[-1]] = wrong
    assert str(problem(broken)).startswith(where)


def test_the_page_says_where_the_time_goes() -> None:
    page = markdown(document())
    section = page.split("## Where the time goes")[1].split("\n## ")[0]
    operators, nodes = section.strip().split("\n\n")
    assert cells(operators, markdown=True) == [
        ["operator", "baseline nodes", "ms", "int8-static nodes", "ms"],
        ["Conv", "1", "0.209", "0", "0"],
        ["QLinearConv", "0", "0", "1", "0.0585"],
        ["Gemm", "1", "0.0261", "1", "0.00731"],
    ]
    assert cells(nodes, markdown=True)[1:] == [
        ["/QLinearConv|1", "QLinearConv", "CPUExecutionProvider", "0.0585"]
    ]
    line = "placement of int8-static: nodes that ran: 2 on CPUExecutionProvider (100% of the time);"
    assert f"{line} 1 QuantizeLinear\n" in page
    assert line in Report(document(), Path("run")).table()


def test_a_report_of_before_has_no_placement() -> None:
    old = document()
    for row in old["measurements"]:
        row.pop("placement", None)
    assert "placement" not in markdown(old)
    assert "Where the time goes" not in markdown(old)
    assert "placement" not in Report(old, Path("run")).table()


def test_a_problem_is_one_short_line() -> None:
    assert len(str(problem(["x" * 100_000]))) < 300
    assert "\n" not in str(problem({**document(), "name": ["a\nb"]}))


# The table.


def cells(table: str, *, markdown: bool) -> list[list[str]]:
    """The rows of a rendered table, header first, as what a reader sees."""
    header, rule, *rows = table.splitlines()
    if markdown:
        split = [line.strip("| ").split("|") for line in (header, *rows)]
        shown = [[html.unescape(re.sub(r"\\(.)", r"\1", cell)) for cell in row] for row in split]
        return [[cell.strip().strip("*") for cell in row] for row in shown]
    spans = [match.span() for match in re.finditer("-+", rule)]
    return [[line[a:b].strip() for a, b in spans] for line in (header, *rows)]


def _tables(report: Report) -> tuple[list[list[str]], list[list[str]]]:
    lines = report.table().splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("variant"))
    terminal = "\n".join(lines[start : start + 2 + len(report.document["artifacts"])])
    page = [line for line in report.markdown().splitlines() if line.startswith("|")]
    page = page[: 2 + len(report.document["artifacts"])]
    return cells(terminal, markdown=False), cells("\n".join(page), markdown=True)


def test_the_numbers_stand_in_the_table() -> None:
    header, *rows = _tables(Report(document(), Path("run")))[0]
    assert header == [
        "variant", "accuracy", "drop [95 %]", "size", "params", "MACs", "p50 ms", "p90 ms",
        "inferences/s", "peak memory", "speed-up",
    ]  # fmt: skip
    assert rows[2] == [
        "recovered", "0.9756", "+0.0022 [-0.0040, 0.0090]", "27.0 KB", "5.87k", "340k", "0.108",
        "0.119", "9.24k", "45.0 MB", "2.41x [2.35, 2.47] faster",
    ]  # fmt: skip
    assert [row[0] for row in rows][-1] == "int8-static *"
    assert rows[3][-1] == "0.971x [0.930, 1.003] inconclusive"


@every_case
def test_terminal_and_markdown_say_the_same(case: Any) -> None:
    terminal, page = _tables(Report(case(), Path("run")))
    swapped = [[cell.replace("** ★", " *") for cell in row] for row in page]
    assert terminal == swapped


def test_what_is_not_known_is_said() -> None:
    report = Report(all_skipped(), Path("run"))
    assert _tables(report)[0][1][-5:] == ["n/a"] * 5
    why = "cpu, batch 1, 1 thread: not measured: the worker was killed (all variants)"
    assert why in report.table()
    assert why in report.markdown()


def test_footnotes_group_by_reason() -> None:
    changed = document()
    changed["measurements"].append(
        {"artifact": "pruned", **Target(provider="cuda", batch=32).to_json(), "skipped": NO_CUDA}
    )
    changed["measurements"][0]["noise"] = ["drift: +9% from first to second half"]
    changed["stages"].append(
        {"stage": "qat", "artifact": "int8-qat", "seconds": 0.0, "peak_rss_bytes": None,
         "cached": False, "skipped": "no data"}
    )  # fmt: skip
    assert footnotes(changed) == [
        "qat: skipped: no data (int8-qat)",
        f"cuda, batch 1, 1 thread; cuda, batch 32, 1 thread: not measured: {NO_CUDA} "
        "(all variants)",
        "cpu, batch 1, 1 thread: noisy: drift: +9% from first to second half (baseline)",
    ]


def test_one_start_says_what_it_cannot_say() -> None:
    changed = document()
    changed["measurements"][0] |= {"processes": 1}
    assert f"cpu, batch 1, 1 thread: {ONCE} (baseline)" in footnotes(changed)
    assert "too far to call any two the same (--bench-time normal starts three)" in ONCE
    for starts, said in ((1, "inconclusive"), (3, "same")):
        blocks = [[1.0]] * 8 * starts
        found = speedup(blocks, blocks, processes=[8] * starts)
        assert verdict(found["low"], found["high"]) == said


def test_where_nothing_is_recommended_the_fastest_is_shown() -> None:
    """Beside the reference, as what is recommended is; and a file alone by itself."""
    changed = document()
    for artifact in changed["artifacts"]:
        artifact |= {"best": False, "within_budget": None}
    assert tables.operators(changed, ONE) == tables.operators(document(), ONE)
    assert tables.nodes(changed, ONE) == tables.nodes(document(), ONE)
    assert tables.placement(changed, ONE) == tables.placement(document(), ONE)
    assert tables.placement(changed, ONE).startswith("placement of int8-static: ")
    changed["artifacts"] = changed["artifacts"][:1]
    assert tables.placement(changed, ONE).startswith("placement of baseline: ")
    assert tables.operators(changed, ONE).splitlines()[0].count("nodes") == 1


def test_the_reference_is_compared_with_another_even_where_it_stays() -> None:
    changed = document()
    for artifact in changed["artifacts"]:
        artifact["best"] = artifact["name"] == "baseline"
    assert tables.operators(changed, ONE) == tables.operators(document(), ONE)
    assert tables.placement(changed, ONE).startswith("placement of baseline: ")


def test_one_target_or_all() -> None:
    report = Report(document(), Path("run"))
    assert "0.0702 (3.57x faster)" in report.table()
    assert "cpu, batch 1, 2 threads" in report.table()
    assert report.table(TWO).splitlines()[0] == "cpu, batch 1, 2 threads"
    assert "0.0702" in report.table(TWO)
    assert "0.0731" not in report.table(TWO)
    with pytest.raises(InputError, match=r"nothing on cuda, batch 7, 1 thread.*known: cpu, batch"):
        report.table(Target(provider="cuda", batch=7))


def test_best() -> None:
    assert Report(document(), Path()).best == "int8-static"
    assert Report(nothing(), Path()).best == ""
    plain_baseline = only_baseline()
    assert Report(plain_baseline, Path()).best == "baseline"


def test_what_the_terminal_prints() -> None:
    report = Report(document(), Path("run"))
    *_, advice, warning, where = str(report).splitlines()
    assert advice == report.document["recommendation"]
    assert warning.startswith("warning: within the drop of 0.01")
    assert where == "report: run"
    assert "did not finish" in str(Report(only_baseline(), Path("run")))
    assert report._repr_markdown_() == report.markdown()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (count(None), "n/a"), (count(0), "0"), (count(640), "640"), (count(64), "64"),
        (count(999), "999"), (count(999.9), "1.00k"), (count(21_840), "21.8k"),
        (count(999_999), "1.00M"), (count(25_557_032), "25.6M"), (count(0.25), "0.250"),
        (count(4.1e16), "41000T"),
        (size(None), "n/a"), (size(812), "812 B"), (size(45_012_000), "45.0 MB"),
        (figures(0.26123), "0.261"), (figures(0), "0"), (figures(1234.4), "1234"),
        (figures(9.999), "10.0"), (score(0.97), "0.9700"),
        (score(3120.4), "3120"), (score(1.2e-6), "1.2e-06"), (score(0.0), "0.0000"),
    ],
)  # fmt: skip
def test_numbers(shown: str, expected: str) -> None:
    assert shown == expected


# Names that somebody else chose.

HOSTILE = [
    "a|b", "a\\|b\\", "<script>alert(1)</script>", "\x1b[31mred\x1b[0m", "\x1b]8;;http://x\x07link",
    "two\nlines\r\n| x |", "`code` ```", "![x](http://t)", "*b* _i_ ~s~ $m$", "\ud800\u202e\x00",
    "\\", "   ", "é 漢 \U0001f600", "|" * 7, "&lt;", "#1", "a\u2028b\x85c",
]  # fmt: skip


def hostile(text: str) -> dict[str, Any]:
    """The document with ``text`` wherever a user may choose words."""
    changed = document(name=text, recommendation=text, warnings=[text], command=text)
    changed["task"] |= {"metric": text, "data": text}
    changed["model"]["path"] = text
    changed["stages"][0] |= {"artifact": text, "skipped": text}
    for artifact in changed["artifacts"]:
        artifact["accuracy"][text] = artifact["accuracy"].pop("accuracy")
        artifact["steps"] = [{"stage": text, "settings": {text: text}, "facts": {text: [text]}}]
        for row in artifact["classes"] or []:
            row["class"] = text
        for one in artifact["worst"] or []:
            one |= {"target": text, "baseline": text, "output": text}
    changed["artifacts"][1] |= {"name": text, "path": text}
    for row in changed["measurements"]:
        row["artifact"] = text if row["artifact"] == "pruned" else row["artifact"]
        if "conditions" in row:
            row["conditions"]["governor"] = text
        if "skipped" in row:
            row["skipped"] = text + "!"
    return changed


words = st.one_of(st.sampled_from(HOSTILE), st.text(min_size=1, max_size=20)).filter(
    lambda text: text not in {"n", "drop", "skipped"}
)


@given(words)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_name_breaks_a_row(text: str) -> None:
    report = Report(hostile(text), Path("run"))
    page = report.markdown()
    outside = re.sub(r"^(`{3,}).*?^\1$", "", page, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in outside
    tables = [
        list(lines)
        for ruled, lines in groupby(outside.splitlines(), lambda line: line.startswith("|"))
        if ruled
    ]
    assert len(tables) == 9
    for rows in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    tokens = MarkdownIt().enable("table").parse(page)
    assert [token.type for token in tokens].count("table_open") == 9
    # A code host shows the very name, and takes nothing in it for a link, a picture or a tag.
    inline = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in inline} <= {
        "text",
        "text_special",
        "strong_open",
        "image",
        "strong_close",
        "softbreak",
    }
    assert [child.attrs["src"] for child in inline if child.type == "image"] == [
        "pareto.png",
        "worst.png",
        "load.png",
    ]
    firsts = [
        "".join(child.content for child in after.children or ())
        for before, after in pairwise(tokens)
        if before.type == "td_open" and after.type == "inline"
    ]
    assert plain(text) in firsts
    for said in (page, str(report)):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said)
        said.encode()


def test_plain_and_escaped() -> None:
    assert plain("\x1b[31mred\x1b[0m\n  and\x00 \u202eblue") == "red and blue"
    assert plain("\x1b]8;;http://x\x07link") == "link"
    assert escaped("a|b `c` <i> & *d* \\ [e](f)") == (
        "a&#124;b \\`c\\` &lt;i&gt; &amp; \\*d\\* \\\\ \\[e](f)"
    )


@given(st.text())
@settings(deadline=None, derandomize=True)
def test_plain_is_stable(text: str) -> None:
    assert plain(plain(text)) == plain(text)
    assert not re.search("[|<>\n]", escaped(text))


def test_a_command_cannot_leave_its_fence() -> None:
    page = Report(document(command="x ``` \n```\n# Owned"), Path()).markdown()
    assert "````sh\nx ```  ``` # Owned\n````" in page


# The page, the picture, the files.


def test_the_page_tells_how() -> None:
    page = Report(document(), Path("run")).markdown()
    for said in (
        "# cnn\n\nUse int8-static",
        "![Accuracy against latency](pareto.png)",
        "## What each stage gave and cost\n\nA change of p50 by less than the noise floor, 1.3%",
        "\n\n![Accuracy, latency and size after each stage](waterfall.png)\n\n"
        "## Where it hurts\n\n1 of 10 classes lost beyond noise",
        "### recovered\n\n- prune → distill → export → recovered.onnx (SHA-256 272727272727…)\n"
        "- **distill** epochs = 2, loss = kd\n  - best epoch: 2",
        "  - left alone:\n    - layer: head; why: it makes the output",
        "SQNR 10.1 dB, top-1 agreement 0.9944",
        "- noise floor: ±1.3% (reference against itself, n = 400)",
        "compressor run cnn.pt --threads 1,2 --recipe recipe.toml --out replayed",
        "- within the budget\n",
    ):
        assert said in page
    # A step is told once, by the first artifact that it made.
    assert page.count("**prune** ratio = 0.5") == 1


@every_case
def test_the_pictures(case: Any) -> None:
    drawn = pictures(case())
    for picture in drawn.values():
        assert picture.startswith(PNG)
        assert len(picture) > 5_000
    # The page shows these and no others.
    assert sorted(re.findall(r"!\[.*?\]\((.*?)\)", markdown(case()))) == sorted(drawn)


@pytest.mark.parametrize(
    ("case", "drawn"),
    [
        (document, ["pareto.png", "waterfall.png", "worst.png", "load.png", "curves.png"]),
        (old, ["pareto.png", "waterfall.png"]),
        (only_baseline, ["pareto.png", "load.png"]),
        (nothing, ["pareto.png"]),
    ],
)
def test_which_pictures_have_something_to_show(case: Any, drawn: list[str]) -> None:
    assert shown(case()) == drawn


@pytest.mark.parametrize("text", ["$x^2", "漢字 \U0001f600", "a_b{}\\"])
def test_the_pictures_of_hostile_names(text: str) -> None:
    changed = hostile(text)
    changed["artifacts"][4]["steps"] = _steps("prune", "distill", "export")
    changed["artifacts"][1]["steps"] = _steps("prune", "export")
    changed["artifacts"][1]["steps"][0]["stage"] = text
    changed["artifacts"][4]["steps"][0]["stage"] = text
    drawn = pictures(changed)
    assert set(drawn) == {"pareto.png", "waterfall.png", "worst.png", "load.png", "curves.png"}
    assert all(picture.startswith(PNG) for picture in drawn.values())


def test_what_is_imported() -> None:
    """The data opens without the heavy libraries, and a picture leaves no global state."""
    code = (
        "import sys, json, compressor.report as r\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'matplotlib', 'jsonschema', 'tabulate'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from compressor.report.plots import pictures, shown\n"
        "document = json.load(sys.stdin)\n"
        "assert len(shown(document)) == 5 and 'matplotlib' not in sys.modules\n"
        "pictures(document)\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], input=json.dumps(document()).encode(), check=True)


def test_save_and_read(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    Report(document(), folder).save()
    written = {"report.html", "report.json", "report.md", *shown(document())}
    assert {path.name for path in folder.iterdir()} == written
    for path in (folder, folder / FILE):
        again = Report.read(path)
        assert (again.document, again.folder) == (document(), folder)
    assert (folder / "report.md").read_text(encoding="utf-8") == again.markdown()
    again.save()
    assert Report.read(folder) == again


def test_rendering_again_leaves_what_has_another_name_alone(tmp_path: Path) -> None:
    Report(document(), tmp_path).save()
    old = tmp_path / "old.json"
    old.write_text(json.dumps(document(name="old")))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    refused = CliRunner().invoke(app, ["report", str(old)])
    assert refused.exit_code == 2
    assert "old.json would be rendered over the report.json" in refused.stderr
    several = CliRunner().invoke(app, ["report", str(old), str(tmp_path / FILE)])
    assert several.exit_code == 0, several.output
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "report.md").unlink()
    again = CliRunner().invoke(app, ["report", str(tmp_path / FILE)])
    assert again.exit_code == 0, again.output
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@given(words)
@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_save_any_name(tmp_path: Path, text: str) -> None:
    Report(hostile(text), tmp_path).save()
    assert Report.read(tmp_path).document == hostile(text)


@pytest.mark.parametrize("wrong", [None, float("nan"), {1, 2}, "later"])
def test_save_refuses_a_broken_document(tmp_path: Path, wrong: Any) -> None:
    Report(document(), tmp_path).save()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    broken = document(name="changed")
    broken["measurements"][0]["latency_ms"]["p50"] = wrong
    with pytest.raises(ValueError, match=r"report|JSON"):
        Report(broken, tmp_path).save()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_save_that_is_interrupted_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Report(document(), tmp_path).save()
    names = sorted(tmp_path.iterdir())

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        Report(document(name="changed"), tmp_path).save()
    assert sorted(tmp_path.iterdir()) == names
    assert Report.read(tmp_path).document["name"] == "cnn"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON: Expecting"),
        ("[NaN]", "is not JSON: NaN is not a finite number"),
        ("[1e999]", "is not JSON: 1e999 is not a finite number"),
        ("[" * 100_000, "is not JSON"),
        ("[]", r"breaks schema 1, at \$: \[\] is not of type 'object'"),
        ("{}", r"breaks schema 1, at \$: 'schema' is a required property"),
        (json.dumps({**document(), "schema": 2}), r"at \$.schema: 1 was expected"),
        (json.dumps(document(name=3)), r"at \$.name: 3 is not of type 'string'"),
    ],
)
def test_read_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(InputError, match=f"^report .*{FILE}.*{said}") as caught:
        Report.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_read_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        Report.read(tmp_path)
    (tmp_path / FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not JSON"):
        Report.read(tmp_path / FILE)


def test_all_reasons_why_layers_were_left_alone() -> None:
    why = {f"layers.{at}.mix": f"reason {at % 12}" for at in range(40)}
    changed = document()
    changed["artifacts"][1]["steps"][0]["facts"]["left_alone"] = why
    page = markdown(changed)
    _, _, after = page.partition("  - left alone:\n")
    listed = [
        line.removeprefix("    - ")
        for line in takewhile(lambda x: x[4:6] == "- ", after.split("\n"))
    ]
    assert listed == [
        f"reason {reason}: {', '.join(f'layers.{at}.mix' for at in range(reason, 40, 12))}"
        for reason in range(12)
    ]
